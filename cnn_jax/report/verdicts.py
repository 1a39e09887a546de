"""Verdicts on measured metrics: whether a network beats guessing, and how its training went.

Nothing is said that the numbers do not support: a difference counts where a test or separate
95 % confidence intervals leave no doubt of it, and the verdict says so where they do not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.special

from cnn_jax.data.findings import count
from cnn_jax.report.texts import percent, points
from cnn_jax.training.metrics import half_width, wilson_interval

# One-sided tests at 2.5 %, which agree with 95 % confidence intervals.
_SIGNIFICANT = 0.025
# Smaller differences of two accuracies are of no consequence, even if they are significant.
_GAP = 0.05
# The accuracies of one network on two devices that round differently.
_SAME_ACCURACY = 0.02
# A network with a lower training accuracy has not learned its training images.
_LEARNED = 0.85
# Validation loss counts as risen above this multiple of its least value, and a loss counts as
# falling if it has lost this fraction of its value in the second half of the epochs.
_RISE_OF_LOSS, _FALL_OF_LOSS = 1.05, 0.02
# Significance of a trend of the loss: a noisy one needs more epochs.
_TREND = 0.05
# Above this fraction of the way from chance to 1, a confidence is high.
_SURE = 0.75


def guessing(metrics: Mapping[str, Any], train: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Compares a network with always naming the most common class of its training images.

    Two exact or nearly exact one-sided tests at 2.5 %: the binomial test of the number of right
    predictions against the fraction of that class in the split, which is fixed because splits
    are made by class; and a permutation test of the agreement of predictions and labels (Hoeffding
    1951, normal approximation with continuity correction), which a network can pass whose
    accuracy is not above that fraction because one class has nearly all images.

    Args:
      metrics: The metrics of a split, with "confusion" and "per_class".
      train: Those of the training split; without them the most common class is that of the split.

    Returns:
      "class", the most common one; "accuracy", its fraction of the split; "p_value" of the
      binomial test; "agreement_p_value"; and "verdict": "better" (than always naming that
      class, and predictions depend on the image's class), "informative" (no higher accuracy, but
      they do), "worse", or "chance".
    """
    matrix = np.array(metrics["confusion"])
    names = list(metrics["per_class"])
    support = matrix.sum(axis=1)
    class_sizes = support if train is None else np.array(train["confusion"]).sum(axis=1)
    commonest, total, hits = int(class_sizes.argmax()), int(support.sum()), int(np.trace(matrix))
    fraction = float(support[commonest] / max(total, 1))
    # P(X >= hits) of the binomial distribution, and P(X <= hits) below.
    p_value = float(scipy.special.bdtrc(hits - 1, total, fraction)) if hits else 1.0
    agreement = agreement_p_value(matrix)
    verdict = "chance"
    # Both tests: naming always a class that is more common here than in training is no skill.
    if agreement < _SIGNIFICANT:
        verdict = "better" if p_value < _SIGNIFICANT else "informative"
    elif scipy.special.bdtr(hits, total, fraction) < _SIGNIFICANT:
        verdict = "worse"
    return {
        "class": names[commonest],
        "accuracy": fraction,
        "p_value": p_value,
        "agreement_p_value": agreement,
        "verdict": verdict,
    }


def agreement_p_value(matrix: np.ndarray) -> float:
    """The probability of so many right predictions if they were shuffled among the images.

    The mean and variance of the trace of a confusion matrix with these row and column sums
    (Hoeffding 1951), and the normal distribution with continuity correction.
    """
    rows, columns, total = matrix.sum(axis=1), matrix.sum(axis=0), int(matrix.sum())
    if total < 2:
        return 1.0
    mean = float(rows @ columns) / total
    deviation = np.eye(len(matrix)) - columns[:, None] / total - rows[None, :] / total
    deviation += mean / total
    variance = float(rows @ deviation**2 @ columns) / (total - 1)
    if variance <= 1e-12 * total:  # All images or all predictions are of one class.
        return 1.0
    excess = float(np.trace(matrix)) - mean - 0.5
    return float(scipy.special.ndtr(-excess / math.sqrt(variance)))


def beats_chance(metrics: Mapping[str, Any], train: Mapping[str, Any] | None = None) -> bool:
    """Whether predictions on a split are shown to depend on the images' classes; see `guessing`."""
    return guessing(metrics, train)["verdict"] in ("better", "informative")


def sure_threshold(num_classes: int) -> float:
    """The confidence from which a prediction counts as sure.

    Three quarters of the way from chance, 1 / classes, to 1: 87.5 % of two classes, 77.5 % of
    ten.
    """
    chance = 1 / num_classes
    return chance + _SURE * (1 - chance)


def training(
    curves: Mapping[str, Any], train: Mapping[str, Any] | None, validation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How a training went, and what to try next.

    The gap is that of the finished network on the plain images of both splits: during
    training, dropout and augmentation make the training images harder than the validation's.

    Args:
      curves: Columns by epoch, `best_epoch` and `epochs`.
      train: The metrics of the finished network; None if it is not finished.
      validation: Likewise.

    Returns:
      "verdict", a word or two; "words", sentences; and "gap", "train_accuracy_at_end" and
      "validation_accuracy_at_end" if the network is finished.
    """
    epochs, best = curves["epochs"], curves["best_epoch"]
    at_best = curves["validation_accuracy"][curves["epoch"].index(best)]
    if train is None or validation is None:
        return {
            "verdict": "not finished",
            "words": f"The training has not come to its end. Of {count(epochs, 'epoch')} so far "
            f"the best is {best}, with a validation accuracy of {percent(at_best)}.",
        }
    high, low = train["accuracy"], validation["accuracy"]
    if epochs > 1 and abs(low - at_best) > _SAME_ACCURACY:
        return {
            "verdict": "going on",
            "words": "These metrics belong to an earlier end of this run, with a validation "
            f"accuracy of {percent(low)}. The run has been made longer since: its best epoch is "
            f"now {best}, with {percent(at_best)}. The report is complete once it has ended.",
        }
    apart = (
        f"The finished network classifies {percent(high)} of the training images and "
        f"{percent(low)} of the validation images correctly, {points(abs(high - low))} apart"
    )
    if high < low:
        apart += ", with validation ahead"
    name, advice = _judge(curves, train, validation)
    return {
        "gap": high - low,
        "train_accuracy_at_end": high,
        "validation_accuracy_at_end": low,
        "verdict": name,
        "words": f"{apart}. {advice}",
    }


def _judge(
    curves: Mapping[str, Any], train: Mapping[str, Any], validation: Mapping[str, Any]
) -> tuple[str, str]:
    """The verdict, and the measured reason with what to do about it."""
    epochs, best = curves["epochs"], curves["best_epoch"]
    if not beats_chance(validation, train):
        return "at chance", _at_chance(curves, train)
    if epochs == 1:
        return "one epoch", "After a single epoch it is too early to say more: train longer."
    if reason := _improvement(curves, validation):
        return "still improving", f"It is still improving: {reason}. More epochs may help."
    gap = train["accuracy"] - validation["accuracy"]
    are_apart = _interval(train)[0] > _interval(validation)[1]
    if gap > _GAP and are_apart:
        return "overfits", (
            "It overfits: the 95 % confidence intervals of the two accuracies do not overlap."
            f"{_rise(curves)} More images, stronger augmentation or more dropout may help."
        )
    if decline := _decline(curves, validation):
        return "peaked early", (
            f"{decline} The weights of epoch {best} are kept. A lower learning rate, stronger "
            "augmentation or more dropout may keep later epochs from getting worse."
        )
    if gap > _GAP:
        reach = half_width(_interval(validation))
        return "too few images", (
            f"{count(validation['count'], 'validation image')} are too few to tell whether it "
            f"overfits: their accuracy is known to ± {points(reach, 0)}, and the confidence "
            "intervals of the two accuracies overlap."
        )
    if _interval(train)[1] < _LEARNED:
        if _falls(curves["train_loss"]):
            return "still learning", (
                "It has not learned all of its training images yet, and their loss is still "
                f"falling ({_from_to(curves['train_loss'])} in the second half of the epochs). "
                "More epochs may help."
            )
        if not _has_levelled_off(curves):
            return "too short to tell", (
                f"It has not learned all of its training images yet, and {count(epochs, 'epoch')} "
                f"are too few to tell whether it would: the best is {best}, and the training loss "
                f"went {_from_to(curves['train_loss'])} in the second half of the epochs. Train "
                "longer before anything else is changed."
            )
        return "underfits", f"It underfits: {_underfit(curves, train)}"
    if train["accuracy"] == validation["accuracy"] == 1:
        return "balanced", "All of them are right: these splits have nothing more to teach."
    return "balanced", (
        f"That is balanced, and validation is not shown to be still improving (the best of "
        f"{epochs} epochs is {best}): more images, or a larger network with more augmentation, "
        "would be the next step."
    )


def _at_chance(curves: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    """Why there is no verdict on a network that does not beat chance on validation."""
    start = "On validation it is not shown to be better than guessing"
    if beats_chance(train):
        return (
            f"{start}, while it has learned something of its training images that does not hold "
            "for others. More images or stronger augmentation may help."
        )
    start += ", nor on the images that it was trained on"
    if curves["epochs"] > 1 and _falls(curves["train_loss"]):
        return (
            f"{start}. The training loss is still falling "
            f"({_from_to(curves['train_loss'])} in the second half of the epochs): train longer."
        )
    return (
        f"{start}: it has learned nothing yet. See whether the labels are right, then train "
        "longer, or try another learning rate."
    )


def _improvement(curves: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """How validation is still getting better at the end; empty if it is not shown to."""
    epochs, best = curves["epochs"], curves["epoch"].index(curves["best_epoch"]) + 1
    late = math.ceil(epochs / 10)
    if best <= epochs - late:
        return ""
    accuracies = curves["validation_accuracy"]
    before, after = max(accuracies[: max(epochs - max(late, epochs // 5), 1)]), max(accuracies)
    if after - before > half_width(_interval(validation)):
        return (
            f"the best of {epochs} epochs is {curves['best_epoch']}, and validation accuracy has "
            f"risen from {percent(before)} to {percent(after)} lately"
        )
    if _falls(curves["validation_loss"]):
        return (
            f"the best of {epochs} epochs is {curves['best_epoch']}, and validation loss has "
            f"fallen in the second half of the epochs, {_from_to(curves['validation_loss'])}"
        )
    return ""


def _falls(losses: Sequence[float]) -> bool:
    """Whether a loss falls in the second half of the epochs (Mann 1945)."""
    half = losses[len(losses) // 2 :]
    if len(half) < 4 or half[-1] > (1 - _FALL_OF_LOSS) * half[0]:
        return False
    return falling_p_value(half) < _TREND


def _has_levelled_off(curves: Mapping[str, Any]) -> bool:
    """Whether enough epochs show that neither validation nor the training loss gets better."""
    epochs, losses = curves["epochs"], curves["train_loss"]
    half = losses[len(losses) // 2 :]
    best = curves["epoch"].index(curves["best_epoch"]) + 1
    is_flat = half[-1] > (1 - _FALL_OF_LOSS) * half[0]
    return len(half) >= 4 and is_flat and best <= epochs - math.ceil(epochs / 10)


def falling_p_value(values: Sequence[float]) -> float:
    """The probability that values without a trend fall as often, one after another, as these.

    Of all pairs those that fall count against those that rise; normal approximation.
    """
    n = len(values)
    rising = np.sign(np.subtract.outer(values, values))  # Value i less value j.
    score = float(np.triu(rising).sum())  # Falling pairs less rising ones.
    variance = n * (n - 1) * (2 * n + 5) / 18
    return float(scipy.special.ndtr(-(score - 1) / math.sqrt(variance)))


def _from_to(losses: Sequence[float]) -> str:
    return f"from {losses[len(losses) // 2]:.3f} to {losses[-1]:.3f}"


def _decline(curves: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """A sentence on how validation became worse after an early best epoch; empty if it did not."""
    best = curves["epoch"].index(curves["best_epoch"])
    if best + 1 > curves["epochs"] / 2:
        return ""
    later = curves["validation_accuracy"][best + 1 :]
    end = float(np.median(later[-max(len(later) // 2, 1) :]))
    low, _ = wilson_interval(
        curves["validation_accuracy"][best] * validation["count"], validation["count"]
    )
    learned = curves["train_accuracy"]
    if end >= low or learned[-1] <= learned[best]:
        return ""
    return (
        f"Validation was best in epoch {curves['best_epoch']} of {curves['epochs']} and fell to "
        f"about {percent(end)} in the later half of the epochs since, while accuracy on the "
        f"augmented training images rose from {percent(learned[best])} to {percent(learned[-1])}."
    )


def _underfit(curves: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    """What holds a network back that has learned neither split and has levelled off."""
    augmented = curves["train_accuracy"][curves["epoch"].index(curves["best_epoch"])]
    start = "both are low, they differ little, and the training loss has levelled off. "
    if train["accuracy"] - augmented > _GAP:
        return (
            f"{start}With augmentation and dropout it got {percent(augmented)} of the training "
            "images right, less than without: weaker augmentation or less dropout may help."
        )
    return f"{start}A larger network or another learning rate may help."


def _rise(curves: Mapping[str, Any]) -> str:
    """A sentence on how the validation loss has risen since its minimum; empty if it has not."""
    losses = curves["validation_loss"]
    least = min(losses)
    if losses[-1] <= _RISE_OF_LOSS * least:
        return ""
    epoch = curves["epoch"][losses.index(least)]
    return (
        f" Validation loss was least in epoch {epoch}, {least:.3f}, and has risen to "
        f"{losses[-1]:.3f} since."
    )


def _interval(metrics: Mapping[str, Any]) -> tuple[float, float]:
    low, high = metrics["confidence_intervals"]["accuracy"]
    return low, high
