"""The metrics of a run in words: its headline, what to look at first, and how it was measured."""

import shlex
from collections.abc import Mapping
from typing import Any

from cnn_jax.data.findings import count
from cnn_jax.inference.calibration import NUM_BINS
from cnn_jax.training.metrics import MAX_HALF_WIDTH, half_width

# A class this far below the mean F1, or images this often confused, stand out.
_WEAK = 0.1
_OFTEN = 0.1
# Suspected labels, and an error of calibration, worth a word.
_SUSPECTED = 0.01
_MISCALIBRATED = 0.05
_MAX_REMARKS = 4

# How the figures were made, by what they are of.
METHODS = {
    "figures": "Precision, recall and F1 are means over all classes; a class with nothing to "
    "divide by counts 0. Intervals of 95 %: Wilson's (1927) for accuracy; for precision, recall "
    "and F1 percentiles of 1,000 bootstrap resamples of the images (Efron 1979); the normal "
    "approximation for the loss, which is the mean cross-entropy in nats.",
    "confusion": "Classes that are taken for each other stand together: hierarchical clustering "
    "with optimal leaf ordering (Bar-Joseph, Gifford and Jaakkola 2001). The square root of a "
    "value is its colour, so that rare confusions can be seen.",
    "calibration": f"Expected calibration error: the mean distance of confidence and accuracy "
    f"over {NUM_BINS} bins of equal width (Naeini et al. 2015). Brier score: the mean squared "
    "distance from the truth over all classes, 0 to 2 (Brier 1950). Temperature scaling: Guo et "
    "al. 2017.",
    "coverage": "Selective prediction (El-Yaniv and Wiener 2010) on the test images.",
    "label_errors": "Confident learning (Northcutt, Jiang and Chuang 2021) on validation and test, "
    "which the network was not trained on: an image is suspect if the network takes it for another "
    "class, as surely as it usually takes images of that class for it. The first have the lowest "
    "normalised margin.",
    "explanations": "Grad-CAM: Selvaraju et al. 2017. Grad-CAM++: Chattopadhay et al. 2018. "
    "Layer-CAM: Jiang et al. 2021. CAM: Zhou et al. 2016. Randomization (Adebayo et al. 2018): "
    "maps must change when the weights are shuffled. Deletion and insertion (Petsiuk et al. 2018): "
    "the class's probability must fall faster, or come back sooner, when pixels go or come in the "
    "order of the map than in that of a random map and of the distance from the centre. Pointing "
    "game (Zhang et al. 2018), where it is known where the object is: the map's largest value must "
    "lie on it more often than the centre and than a random pixel. A check is passed where 95 % "
    "confidence intervals of the differences leave no doubt. Importance: Breiman 2001.",
    "robustness": "The 19 corruptions of ImageNet-C (Hendrycks and Dietterich 2019), distances "
    "scaled to the size of the images, and more qualities of photographs, at severities 1 to 5. "
    "Sharpness: the variance of the Laplacian (Pech-Pacheco et al. 2000). Intervals of 95 %: "
    "Wilson's.",
}


def duration(seconds: float) -> str:
    """Such as "2 min 29 s"."""
    whole = round(seconds)
    hours, minutes, seconds = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# What the time after training is spent on: in metrics.json, and in words. The other sections
# together take less than any of these.
_TASKS = {
    "measuring": "measuring",
    "explanations": "explanations",
    "robustness": "corruptions",
    "images": "images",
    "charts": "charts",
}


def time_spent(training: float, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Where the time after training went.

    Args:
      training: Seconds of all epochs.
      seconds: Seconds by what they were spent on after training.

    Returns:
      "training" and "after_training", in seconds; "parts", seconds by task, "other" last; and
      "words".
    """
    total = sum(seconds.values())
    parts = {name: seconds[name] for name in _TASKS if name in seconds}
    parts["other"] = total - sum(parts.values())
    listed = ", ".join(f"{_TASKS.get(name, name)} {of:.0f} s" for name, of in parts.items())
    text = f"training {duration(training)}, then {duration(total)}: {listed}"
    if "explanations" in parts:
        text += "; report.detail=figures takes less"
    return {"training": training, "after_training": total, "parts": parts, "words": text}


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction such as "96.1 %"."""
    return f"{100 * fraction:.{digits}f} %"


def points(difference: float, digits: int = 1) -> str:
    """A difference of two fractions such as "2.3 points"."""
    return f"{100 * difference:.{digits}f} points"


def summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The headline of a report, and remarks on what stands out, the most important first.

    Args:
      figures: The content of metrics.json.

    Returns:
      "headline", and "remarks", each with "text" and the "section" that shows it.
    """
    test = figures.get("test")
    if test is None:
        return {"headline": "There is no finished network to measure yet.", "remarks": []}
    low, high = test["confidence_intervals"]["accuracy"]
    headline = (
        f"The network classifies {percent(test['accuracy'], 2)} of "
        f"{count(test['count'], 'test image')} correctly (95 % interval {percent(low)} to "
        f"{percent(high)})."
    )
    if "guessing" in figures:
        headline += f" {_compared_with_guessing(figures['guessing'], test)}"
    remarks = [
        *_of_classes(test, figures.get("train")),
        *_of_curves(figures.get("curves")),
        *_of_pairs(figures.get("confusion")),
        *_of_labels(figures.get("label_errors")),
        *_of_calibration(figures.get("calibration")),
        *_of_size(test),
    ]
    if not remarks:
        text = "No class, pair of classes or label stands out; see the mistakes one by one."
        remarks = [{"text": text, "section": "mistakes"}]
    found = {"headline": headline, "remarks": remarks[:_MAX_REMARKS]}
    if _of_size(test) and "run" in figures:
        found["small_test_split"] = _on_small_test_split(test, figures["run"])
    return found


def _compared_with_guessing(guessing: Mapping[str, Any], test: Mapping[str, Any]) -> str:
    """How the network compares with always naming the most common class, in a sentence or two."""
    guess = (
        f"Always naming {guessing['class']}, the most common class, would be right for "
        f"{percent(guessing['accuracy'])}"
    )
    if guessing["verdict"] == "better":
        return f"{guess}."
    if guessing["verdict"] == "informative":
        return (
            f"{guess}, and the network is not shown to be better than that. It does tell classes "
            f"apart: its mean recall is {percent(test['recall'])}, where guessing has "
            f"{percent(1 / len(test['per_class']))}."
        )
    if guessing["verdict"] == "worse":
        return f"{guess}: the network is worse than guessing."
    return f"{guess}: the network is not shown to be better than guessing."


def _of_size(test: Mapping[str, Any]) -> list[dict[str, str]]:
    """How vaguely accuracy is known, if a small test split is the reason, and what helps."""
    reach = half_width(test["confidence_intervals"]["accuracy"])
    if reach < MAX_HALF_WIDTH:
        return []
    text = (
        f"{count(test['count'], 'test image')}: accuracy is known to ± {points(reach, 0)}. "
        "Smaller differences may be chance; the mean over several seeds is known better."
    )
    return [{"text": text, "section": "figures"}]


def _on_small_test_split(test: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """What to do about a small test split: "words", and "command", which repeats the run."""
    reach = half_width(test["confidence_intervals"]["accuracy"])
    text = (
        f"With {count(test['count'], 'test image')}, accuracy is known to "
        f"± {points(reach)}. Another seed draws other splits and weights, so the mean "
        "over several runs says more than one of them, and their standard deviation says how far "
        "they differ:"
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
            "data.stratify=exact gives each split its exact fraction of every class, where "
            "stable leaves that to chance."
        )
    return found


def _of_classes(test: Mapping[str, Any], train: Mapping[str, Any] | None) -> list[dict[str, str]]:
    present = {name: row for name, row in test["per_class"].items() if row["support"]}
    columns = zip(test["per_class"], zip(*test["confusion"], strict=True), strict=True)
    never = [name for name, predicted in columns if name in present and not any(predicted)]
    remarks = []
    support = count(present[never[0]]["support"], "test image") if never else ""
    if len(never) == 1:
        remarks.append(
            f"No test image is taken for {never[0]}: of {support}, "
            f"{_taken_for(never[0], test, train)}."
        )
    elif never:
        more = f" and {count(len(never) - 3, 'other class', 'other classes')}" * (len(never) > 3)
        remarks.append(
            f"No test image is taken for {', '.join(never[:3])}{more}. "
            f"Of {support} of {never[0]}, {_taken_for(never[0], test, train)}."
        )
    weakest = min(present, key=lambda name: present[name]["f1"])
    f1 = present[weakest]["f1"]
    if f1 < test["f1"] - _WEAK and weakest not in never:
        remarks.append(
            f"The weakest class is {weakest}: its F1 is {percent(f1)}, and {percent(test['f1'])} "
            "on average."
        )
    return [{"text": text, "section": "classes"} for text in remarks]


def _taken_for(name: str, test: Mapping[str, Any], train: Mapping[str, Any] | None) -> str:
    """The classes that test images of a class are taken for, and its number of training images."""
    names = list(test["per_class"])
    row = test["confusion"][names.index(name)]
    taken_for = sorted(range(len(row)), key=lambda label: -row[label])[:2]
    verb = "is" if row[taken_for[0]] == 1 else "are"
    first, *second = (f"for {names[label]}" for label in taken_for if row[label])
    words = f"{row[taken_for[0]]:,} {verb} taken {first}"
    if second:
        words += f" and {row[taken_for[1]]:,} {second[0]}"
    if train is None:
        return words
    trained = train["per_class"][name]["support"]
    return f"{words}; {trained:,} of {train['count']:,} training images are of this class"


def _of_curves(curves: Mapping[str, Any] | None) -> list[dict[str, str]]:
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


def _of_pairs(confusion: Mapping[str, Any] | None) -> list[dict[str, str]]:
    if not confusion or not confusion["pairs"]:
        return []
    pair, errors = confusion["pairs"][0], confusion["errors"]
    if pair["count"] < max(2, _OFTEN * errors):
        return []
    text = (
        f"Of {count(errors, 'mistake')}, {pair['count']:,} are {pair['true']} taken for "
        f"{pair['predicted']}."
    )
    return [{"text": text, "section": "confusion"}]


def _of_labels(suspected: Mapping[str, Any] | None) -> list[dict[str, str]]:
    if not suspected or suspected["share"] < _SUSPECTED or not suspected["credible"]:
        return []
    text = (
        f"{suspected['suspected']:,} of {suspected['of']:,} labels of validation and test are "
        "suspect: see whether the data or the network is wrong."
    )
    return [{"text": text, "section": "label_errors"}]


def _of_calibration(calibration: Mapping[str, Any] | None) -> list[dict[str, str]]:
    if not calibration or calibration["after"]["expected_calibration_error"] < _MISCALIBRATED:
        return []
    error = calibration["after"]["expected_calibration_error"]
    text = f"Confidence and accuracy are {points(error)} apart, even after temperature scaling."
    return [{"text": text, "section": "calibration"}]
