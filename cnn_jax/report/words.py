"""What the figures of a run say, in words."""

import math
from collections.abc import Mapping
from typing import Any

from cnn_jax.calibration import NUM_BINS
from cnn_jax.data.findings import count

# In shares of the images. Train and validation further apart than this are of two minds.
_GAP = 0.05
# Of a network measured twice, on devices that round in other ways.
_SAME_ACCURACY = 0.02
# A network that gets fewer of its training images right has not learned them.
_LEARNED = 0.85
# With less it cannot be said to know the training images.
_LEARNED_MUCH = 0.5
# How much a validation loss rises above its least value before it counts.
_RISE_OF_LOSS = 1.05
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


def percent(share: float, digits: int = 1) -> str:
    """Such as "96.1 %"."""
    return f"{100 * share:.{digits}f} %"


def verdict(
    curves: Mapping[str, Any], train: Mapping[str, Any] | None, validation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How a training went: whether it overfits, underfits, is still improving or is balanced.

    The gap is that of the finished network on the plain images of both splits: while it
    learns, dropout and augmentation make the training images harder than the validation's.

    Args:
      curves: Columns by epoch, `best_epoch` and `epochs`.
      train: Figures of the finished network; None if it is not finished.
      validation: Likewise.

    Returns:
      "verdict", a word or two; "words", sentences; and "gap", "train_accuracy_at_end" and
      "validation_accuracy_at_end" if the network is finished.
    """
    epochs, best = curves["epochs"], curves["best_epoch"]
    if train is None or validation is None:
        so_far = curves["validation_accuracy"][curves["epoch"].index(best)]
        return {
            "verdict": "not finished",
            "words": f"The training has not come to its end. Of {count(epochs, 'epoch')} so far "
            f"the best is {best}, with a validation accuracy of {percent(so_far)}.",
        }
    high, low = train["accuracy"], validation["accuracy"]
    at_best = curves["validation_accuracy"][curves["epoch"].index(best)]
    if epochs > 1 and abs(low - at_best) > _SAME_ACCURACY:
        return {
            "verdict": "going on",
            "words": f"The figures are not those of the best epoch, {best}, whose validation "
            f"accuracy is {percent(at_best)}, but of an earlier end of this run, with "
            f"{percent(low)}: it has been made longer since. When it ends, so do the figures.",
        }
    gap = high - low
    figures = {
        "gap": gap,
        "train_accuracy_at_end": high,
        "validation_accuracy_at_end": low,
    }
    apart = (
        f"The finished network classifies {percent(high)} of the training images and "
        f"{percent(low)} of the validation images correctly, {100 * abs(gap):.1f} percentage "
        "points apart"
    )
    if gap < 0:
        apart += ", with validation ahead"
    name, advice = _judge(curves, train, validation)
    return figures | {"verdict": name, "words": f"{apart}. {advice}"}


def _judge(
    curves: Mapping[str, Any], train: Mapping[str, Any], validation: Mapping[str, Any]
) -> tuple[str, str]:
    """The verdict, and why, with what to do about it."""
    epochs, best = curves["epochs"], curves["best_epoch"]
    if epochs == 1:
        return "one epoch", "After a single epoch it is too early to say more: train longer."
    gap = train["accuracy"] - validation["accuracy"]
    late = math.ceil(epochs / 10)
    before, after = _best_accuracies(curves, epochs - max(late, epochs // 5))
    if best > epochs - late and after - before > _standard_error(validation):
        return "still improving", (
            f"It is still improving: the best of {epochs} epochs is {best}, and validation "
            f"accuracy has risen from {percent(before)} to {percent(after)} lately. More epochs "
            "may help."
        )
    _, reach = validation["confidence_intervals"]["accuracy"]
    if gap > _GAP and train["accuracy"] > max(reach, _LEARNED_MUCH):
        return "overfits", (
            f"It overfits: it knows the training images better than their kind.{_rise(curves)} "
            "More images, stronger augmentation or more dropout may help."
        )
    if train["accuracy"] < _LEARNED:
        return "underfits", (
            "It underfits: it has not learned even the images that it was trained on. A larger "
            "network, weaker augmentation, less dropout or another learning rate may help."
        )
    return "balanced", (
        f"That is balanced, and validation has levelled off (the best of {epochs} epochs is "
        f"{best}): more images, or a larger network with more augmentation, would be the next step."
    )


def _rise(curves: Mapping[str, Any]) -> str:
    """That the validation loss has risen, if it has; in a sentence."""
    losses = curves["validation_loss"]
    least = min(losses)
    if losses[-1] <= _RISE_OF_LOSS * least:
        return ""
    epoch = curves["epoch"][losses.index(least)]
    return (
        f" Validation loss was least in epoch {epoch}, {least:.3f}, and has risen to "
        f"{losses[-1]:.3f} since."
    )


def _best_accuracies(curves: Mapping[str, Any], epoch: int) -> tuple[float, float]:
    """The best validation accuracy up to an epoch, and of all."""
    accuracies = curves["validation_accuracy"]
    return max(accuracies[: max(epoch, 1)]), max(accuracies)


def _standard_error(figures: Mapping[str, Any]) -> float:
    """Of an accuracy: a quarter of its 95 % interval."""
    low, high = figures["confidence_intervals"]["accuracy"]
    return (high - low) / 4


def summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """How good the network is in a sentence, and what to look at, the most important first.

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
    remarks = [
        *_of_classes(test),
        *_of_curves(figures.get("curves")),
        *_of_pairs(figures.get("confusion")),
        *_of_labels(figures.get("label_errors")),
        *_of_calibration(figures.get("calibration")),
    ]
    if not remarks:
        text = "No class, pair of classes or label stands out; see the mistakes one by one."
        remarks = [{"text": text, "section": "mistakes"}]
    return {"headline": headline, "remarks": remarks[:_MAX_REMARKS]}


def _of_classes(test: Mapping[str, Any]) -> list[dict[str, str]]:
    present = {name: row for name, row in test["per_class"].items() if row["support"]}
    columns = zip(test["per_class"], zip(*test["confusion"], strict=True), strict=True)
    never = [name for name, predicted in columns if name in present and not any(predicted)]
    remarks = []
    if never:
        more = f" and {count(len(never) - 3, 'other class', 'other classes')}" * (len(never) > 3)
        remarks.append(f"No test image is taken for {', '.join(never[:3])}{more}.")
    weakest = min(present, key=lambda name: present[name]["f1"])
    f1 = present[weakest]["f1"]
    if f1 < test["f1"] - _WEAK and weakest not in never:
        remarks.append(
            f"The weakest class is {weakest}: its F1 is {percent(f1)}, and {percent(test['f1'])} "
            "on average."
        )
    return [{"text": text, "section": "classes"} for text in remarks]


def _of_curves(curves: Mapping[str, Any] | None) -> list[dict[str, str]]:
    texts = {
        "overfits": "The network overfits",
        "underfits": "The network underfits",
        "still improving": "The network is still improving",
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
    text = f"Confidence and accuracy are {percent(error)} apart, even after temperature scaling."
    return [{"text": text, "section": "calibration"}]
