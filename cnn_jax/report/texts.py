"""Texts about the metrics of a run: the headline, remarks on notable results, and the methods."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cnn_jax.data.findings import count
from cnn_jax.inference.calibration import NUM_BINS
from cnn_jax.system.text import percent, points
from cnn_jax.training.metrics import MAX_HALF_WIDTH, half_width

# The report remarks on a class if its F1 is below the mean F1 by more than this value.
_WEAK = 0.1
# The report remarks on a pair of confused classes if the pair causes at least this fraction of all
# mistakes.
_OFTEN = 0.1
# The report remarks on suspected label errors if their fraction is at least _SUSPECTED, and on a
# calibration error of at least _MISCALIBRATED.
_SUSPECTED = 0.01
_MISCALIBRATED = 0.05
_MAX_REMARKS = 4
# The maximum number of classes that a remark names.
_MAX_NAMED = 3

# Descriptions of the measurement methods of each section. The function `methods` adds the
# description for the section "explanations".
_METHODS = {
    "figures": "Precision, recall and F1 are means over all classes; a quotient with a zero "
    "divisor counts as 0. Confidence intervals (95 %): Wilson (1927) for accuracy; percentiles of "
    "1,000 bootstrap resamples of the images (Efron 1979) for precision, recall and F1; a normal "
    "approximation for the loss, which is the mean cross-entropy in nats.",
    "confusion": "Classes that are often confused stand next to each other: hierarchical "
    "clustering with optimal leaf ordering (Bar-Joseph, Gifford and Jaakkola 2001). The colour "
    "shows the square root of the value, so that rare confusions can be seen.",
    "calibration": f"Expected calibration error: the mean distance between confidence and "
    f"accuracy over {NUM_BINS} bins of equal width (Naeini et al. 2015). A perfectly calibrated "
    "network: the error in simulations in which each prediction is correct with a probability "
    "equal to its confidence. Brier score: the mean squared distance from the true class over "
    "all classes, 0 to 2 (Brier 1950). Temperature scaling: Guo et al. 2017.",
    "coverage": "Selective prediction (El-Yaniv and Wiener 2010) on the test images.",
    "members": "Disagreement: the mutual information between the class and the choice of the "
    "prediction, in nats (Houlsby et al. 2011, BALD). It is 0 if all predictions are equal.",
    "label_errors": "Confident learning (Northcutt, Jiang and Chuang 2021) on validation and "
    "test, because the network was not trained on these images. A label is suspect if the network "
    "predicts another class with at least the confidence that it usually has for images of that "
    "class. Images are sorted by their normalised margin, the smallest first.",
    "robustness": "The 19 corruptions of ImageNet-C (Hendrycks and Dietterich 2019), with "
    "distances scaled to the size of the images, and further changes that occur in photographs, "
    "at severities 1 to 5. Sharpness: the variance of the Laplacian (Pech-Pacheco et al. 2000). "
    "Confidence intervals (95 %): Wilson.",
}
_MAP_METHODS = {
    "grad_cam": "Grad-CAM: Selvaraju et al. 2017.",
    "grad_cam_plus_plus": "Grad-CAM++: Chattopadhay et al. 2018.",
    "layer_cam": "Layer-CAM: Jiang et al. 2021.",
    "cam": "CAM: Zhou et al. 2016.",
    "hires_cam": "HiResCAM: Draelos and Carin 2020, for the last stage whose feature maps are "
    "larger than the final ones.",
}
_CHECKS = {
    "randomization": "Randomization (Adebayo et al. 2018): maps must change when the weights are "
    "shuffled. Each image has a shuffle of its own.",
    "deletion": "Deletion (Petsiuk et al. 2018): when pixels are removed in the order of the map, "
    "the probability of the class must fall faster than in a random order and than from the "
    "centre outwards.",
    "insertion": "Insertion (Petsiuk et al. 2018): when pixels are restored in the order of the "
    "map, the probability must rise faster than in these two orders.",
    "pointing_game": "Pointing game (Zhang et al. 2018): the largest value of the map must lie on "
    "the object more often than a random pixel and than the centre.",
}


def methods(figures: Mapping[str, Any]) -> dict[str, str]:
    """Describes the measurement methods of each section, with references.

    Args:
      figures: The content of metrics.json. The text on explanations names only the map methods
        and checks that it contains.
    """
    if "explanations" not in figures:
        return _METHODS
    maps = figures["explanations"]["methods"]
    checks = {check for method in maps.values() for check in method["checks"]}
    sentences = [
        *(text for name, text in _MAP_METHODS.items() if name in maps),
        *(text for name, text in _CHECKS.items() if name in checks),
        "A method passes a check if the 95 % confidence intervals of the differences exclude 0.",
        "Importance: Breiman 2001.",
    ]
    return _METHODS | {"explanations": " ".join(sentences)}


def duration(seconds: float) -> str:
    """Formats a duration in seconds as text, such as "2 min 29 s"."""
    whole = round(seconds)
    hours, minutes, seconds = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# The tasks after training that the report lists, by their names in metrics.json. The remaining
# tasks together take less time than any of these tasks.
_TASKS = {
    "measuring": "evaluation",
    "explanations": "explanations",
    "robustness": "corruptions",
    "images": "images",
    "charts": "charts",
}


def time_spent(training: float, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Returns the time that each task after training took.

    Args:
      training: Seconds of all epochs.
      seconds: Seconds of each task after training.

    Returns:
      "training" and "after_training", in seconds; "parts", seconds by task with "other" last;
      and "words", a text for the report.
    """
    total = sum(seconds.values())
    parts = {name: seconds[name] for name in _TASKS if name in seconds}
    parts["other"] = total - sum(parts.values())
    listed = ", ".join(f"{_TASKS.get(name, name)} {spent:.0f} s" for name, spent in parts.items())
    text = f"training {duration(training)}; evaluation and report {duration(total)} ({listed})"
    if "explanations" in parts:
        text += "; report.detail=figures makes the report faster"
    return {"training": training, "after_training": total, "parts": parts, "words": text}


def summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the headline of a report, and remarks on notable results, the most important first.

    Args:
      figures: The content of metrics.json.

    Returns:
      "headline"; "remarks", each with "text" and the "section" that shows it; and, if they
      apply, "absent_classes" and "small_test_split".
    """
    test = figures.get("test")
    if test is None:
        return {"headline": "There is no finished network to measure yet.", "remarks": []}
    low, high = test["confidence_intervals"]["accuracy"]
    subject = "ensemble" if "members" in figures else "network"
    headline = (
        f"The {subject} classifies {percent(test['accuracy'], 2)} of "
        f"{count(test['count'], 'test image')} correctly (95 % interval {percent(low)} to "
        f"{percent(high)})."
    )
    if "guessing" in figures:
        headline += f" {_compared_with_guessing(figures['guessing'], test, subject)}"
    absent = _absent_classes(test)
    remarks = [
        *([{"text": absent, "section": "figures"}] if absent else []),
        *_class_remarks(test, figures.get("train")),
        *_curve_remarks(figures.get("curves")),
        *_pair_remarks(figures.get("confusion")),
        *_label_remarks(figures.get("label_errors")),
        *_calibration_remarks(figures.get("calibration")),
        *_size_remarks(test),
    ]
    if not remarks:
        text = "No class, pair of classes or label stands out; look through the mistakes."
        remarks = [{"text": text, "section": "mistakes"}]
    found = {"headline": headline, "remarks": remarks[:_MAX_REMARKS]}
    if absent:
        found["absent_classes"] = absent
    if _size_remarks(test) and "configuration" in figures.get("run", {}):
        found["small_test_split"] = _small_test_split(test, figures["run"])
    return found


def _absent_classes(test: Mapping[str, Any]) -> str:
    """Describes the classes without test images, and the means over the remaining classes.

    The text is empty if all classes have test images, or if no class has any.
    """
    absent = [name for name, row in test["per_class"].items() if not row["support"]]
    if not absent or len(absent) == len(test["per_class"]):
        return ""
    means = (
        f"{name} {percent(_mean_of_present(test, key), 2)}"
        for key, name in (("precision", "precision"), ("recall", "recall"), ("f1", "F1"))
    )
    if len(absent) == 1:
        start = f"The class {absent[0]} has no test images. It counts"
    else:
        start = f"{len(absent):,} classes have no test images: {_some(absent)}. They count"
    return (
        f"{start} as 0 in precision, recall and F1. The means over the other classes are: "
        f"{', '.join(means)}."
    )


def _mean_of_present(test: Mapping[str, Any], key: str) -> float:
    """Returns a metric's mean over the classes with test images; 0 if no class has test images."""
    values = [row[key] for row in test["per_class"].values() if row["support"]]
    return sum(values) / max(len(values), 1)


def _some(names: Sequence[str]) -> str:
    """Lists the first three class names, and states the number of remaining classes."""
    rest = len(names) - _MAX_NAMED
    more = f" and {count(rest, 'other class', 'other classes')}" if rest > 0 else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _compared_with_guessing(
    guessing: Mapping[str, Any], test: Mapping[str, Any], subject: str
) -> str:
    """Compares the predictions with a classifier that always predicts the most common class."""
    guess = (
        f"Always naming {guessing['class']}, the most common class of the test images, would be "
        f"correct for {percent(guessing['accuracy'])}"
    )
    if guessing["verdict"] == "better":
        return f"{guess}."
    if guessing["verdict"] == "informative":
        return (
            f"{guess}, and the {subject} is not shown to have a higher accuracy. But its "
            f"predictions depend on the class: its mean recall is {percent(test['recall'])}; that "
            f"of guessing is {percent(1 / len(test['per_class']))}."
        )
    if guessing["verdict"] == "worse":
        return f"{guess}: the {subject} is worse than guessing."
    return f"{guess}: the {subject} is not shown to be better than guessing."


def _size_remarks(test: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns a remark if the test split is so small that the confidence interval is wide."""
    reach = half_width(test["confidence_intervals"]["accuracy"])
    if reach < MAX_HALF_WIDTH:
        return []
    text = (
        f"{count(test['count'], 'test image')}: accuracy is known to ± {points(reach, 0)}. "
        "Smaller differences may be chance; the mean over several seeds is more precise."
    )
    return [{"text": text, "section": "figures"}]


def _small_test_split(test: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns advice for a small test split, including a command that repeats the run.

    The result has the texts "words" and "command". It also has the text "stratify" if another value
    of data.stratify would make the splits more exact.
    """
    reach = half_width(test["confidence_intervals"]["accuracy"])
    has_split_seed = run["configuration"]["data"].get("split_seed", -1) >= 0
    drawn = "other weights" if has_split_seed else "other splits and weights"
    text = (
        f"With {count(test['count'], 'test image')}, accuracy is known to "
        f"± {points(reach)}. Another seed draws {drawn}. The mean over "
        "several runs is more precise than a single run, and the standard deviation shows how "
        "much runs differ:"
    )
    folder = run["folder"]
    command = (
        "for seed in 1 2 3 4; do cnn_jax train "
        f"--config={shlex.quote(folder + '/config.json')} "
        f"--workdir={shlex.quote(folder)}-seed$seed --config.seed=$seed; done"
    )
    found = {"words": text, "command": command}
    if run["configuration"]["data"].get("stratify") == "stable":
        found["stratify"] = (
            "data.stratify=exact gives each split its exact fraction of every class. With "
            "data.stratify=stable, the fractions vary by chance."
        )
    return found


def _class_remarks(
    test: Mapping[str, Any], train: Mapping[str, Any] | None
) -> list[dict[str, str]]:
    """Returns remarks on classes that are never predicted, and on the class with the lowest F1."""
    tested = {name: row for name, row in test["per_class"].items() if row["support"]}
    if not tested:
        return []
    columns = zip(test["per_class"], zip(*test["confusion"], strict=True), strict=True)
    never = [name for name, predicted in columns if name in tested and not any(predicted)]
    texts = []
    support = count(tested[never[0]]["support"], "test image") if never else ""
    if len(never) == 1:
        texts.append(
            f"{never[0]} is never predicted: of its {support}, "
            f"{_predictions_text(never[0], test, train)}."
        )
    elif never:
        texts.append(
            f"{len(never):,} classes are never predicted: {_some(never)}. "
            f"Of {support} of {never[0]}, {_predictions_text(never[0], test, train)}."
        )
    weakest = min(tested, key=lambda name: tested[name]["f1"])
    f1, mean = tested[weakest]["f1"], _mean_of_present(test, "f1")
    if f1 < mean - _WEAK and weakest not in never:
        texts.append(
            f"The class with the lowest F1 is {weakest}: {percent(f1)}; the mean is "
            f"{percent(mean)}."
        )
    return [{"text": text, "section": "classes"} for text in texts]


def _predictions_text(name: str, test: Mapping[str, Any], train: Mapping[str, Any] | None) -> str:
    """Describes the predictions for a class's test images, and counts its training images."""
    names = list(test["per_class"])
    row = test["confusion"][names.index(name)]
    predicted = sorted(range(len(row)), key=lambda label: -row[label])[:2]
    verb = "is" if row[predicted[0]] == 1 else "are"
    first, *second = (names[label] for label in predicted if row[label])
    words = f"{row[predicted[0]]:,} {verb} predicted as {first}"
    if second:
        words += f" and {row[predicted[1]]:,} as {second[0]}"
    if train is None:
        return words
    trained = train["per_class"][name]["support"]
    return f"{words}; {trained:,} of {train['count']:,} training images are of this class"


def _curve_remarks(curves: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Returns a remark on the training if the verdict names a problem, such as "overfits"."""
    texts = {
        "at chance": "The network is not shown to be better than guessing on validation",
        "overfits": "The network overfits",
        "peaked early": "Later epochs made the network worse",
        "too short to tell": "The training was too short to tell whether the network underfits",
        "underfits": "The network underfits",
        "still improving": "The network is still improving",
        "still learning": "The network is still learning its training images",
        "one epoch": "The network was trained for one epoch",
    }
    if curves is None or curves["verdict"] not in texts:
        return []
    text = (
        f"{texts[curves['verdict']]}: accuracy is {percent(curves['train_accuracy_at_end'])} on "
        f"train and {percent(curves['validation_accuracy_at_end'])} on validation."
    )
    return [{"text": text, "section": "curves"}]


def _pair_remarks(confusion: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Returns a remark on the pair of classes that is confused most often."""
    if not confusion or not confusion["pairs"]:
        return []
    pair, errors = confusion["pairs"][0], confusion["errors"]
    if pair["count"] < max(2, _OFTEN * errors):
        return []
    text = (
        f"Of {count(errors, 'mistake')}, {pair['count']:,} are images of {pair['true']} that are "
        f"predicted as {pair['predicted']}."
    )
    return [{"text": text, "section": "confusion"}]


def _label_remarks(suspected: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Returns a remark on labels that are probably wrong."""
    if not suspected or suspected["share"] < _SUSPECTED or not suspected["credible"]:
        return []
    text = (
        f"{suspected['suspected']:,} of {suspected['of']:,} labels of validation and test are "
        "suspect: check whether the label or the network is wrong."
    )
    return [{"text": text, "section": "label_errors"}]


def _calibration_remarks(calibration: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Returns a remark if the calibration error is larger than chance explains; else []."""
    if not calibration:
        return []
    error = calibration["after"]["expected_calibration_error"]
    chance = calibration["calibrated"]["percentile_95"]
    if error < _MISCALIBRATED or error <= chance:
        return []
    text = (
        f"The expected calibration error is {points(error)}, even after temperature scaling; a "
        f"perfectly calibrated network would show at most {points(chance)} in 95 % of cases."
    )
    return [{"text": text, "section": "calibration"}]
