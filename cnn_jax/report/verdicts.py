"""Verdicts on metrics: whether a network is better than guessing, and how training went.

A verdict mentions a difference only if a statistical test is significant, or if the two 95 %
confidence intervals do not overlap.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

from cnn_jax.data.findings import count
from cnn_jax.inference.calibration import bin_numbers
from cnn_jax.system.text import percent, points
from cnn_jax.training.metrics import agreement_p_value, half_width, wilson_interval

# The significance level of one-sided tests. This level corresponds to 95 % confidence intervals.
_SIGNIFICANT = 0.025
# A verdict ignores a difference of at most this value between two accuracies, even if the
# difference is significant.
_GAP = 0.05
# The accuracies of one network on two devices may differ by this much because of rounding errors.
_SAME_ACCURACY = 0.02
# If the training accuracy is lower than this value, the network has not learned the training
# images.
_LEARNED = 0.85
# The validation loss has risen if its last value is above _RISE_OF_LOSS times its minimum. A loss
# is falling if it decreases by at least the fraction _FALL_OF_LOSS in the second half of the
# epochs.
_RISE_OF_LOSS, _FALL_OF_LOSS = 1.05, 0.02
# The significance level of the test for a falling loss. If the loss is noisy, more epochs are
# needed for a significant result.
_TREND = 0.05
# A learning rate counts as decayed if it is below this fraction of its maximum.
_DECAYED = 0.5
# A prediction counts as sure if its confidence exceeds 1 / classes by at least this fraction of the
# largest possible difference, 1 - 1 / classes.
_SURE = 0.75
# The number of simulations of the calibration error, and the maximum number of random numbers in
# all simulations together.
_SIMULATIONS, _MAX_DRAWS = 1000, 2**26


def guessing(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Compares a network with a classifier that always predicts the split's most common class.

    There are two one-sided tests at the 2.5 % level. The first is the exact binomial test of the
    number of correct predictions against the fraction of the most common class. The second is a
    permutation test of the agreement of predictions and labels (see `agreement_p_value`). If one
    class has nearly all images, even a useful network may pass only the second test.

    Args:
      metrics: The metrics of a split, with "confusion" and "per_class".

    Returns:
      "class", the most common class of the split; "accuracy", its fraction of the images;
      "p_value" of the binomial test; "agreement_p_value"; and "verdict": "better" (both tests
      are passed), "informative" (only the agreement test is passed), "worse" (accuracy is below
      the fraction of the most common class), or "chance" (none of these is shown).
    """
    matrix = np.array(metrics["confusion"])
    support = matrix.sum(axis=1)
    most_common, total, hits = int(support.argmax()), int(support.sum()), int(np.trace(matrix))
    fraction = float(support[most_common] / max(total, 1))
    p_value = _binomial_p_value(hits, total, fraction, "greater")
    agreement = agreement_p_value(matrix)
    verdict = "chance"
    if agreement < _SIGNIFICANT:
        verdict = "better" if p_value < _SIGNIFICANT else "informative"
    elif _binomial_p_value(hits, total, fraction, "less") < _SIGNIFICANT:
        verdict = "worse"
    return {
        "class": list(metrics["per_class"])[most_common],
        "accuracy": fraction,
        "p_value": p_value,
        "agreement_p_value": agreement,
        "verdict": verdict,
    }


def _binomial_p_value(hits: int, total: int, fraction: float, alternative: str) -> float:
    """Returns the one-sided p-value of the binomial test; 1 if there are no observations."""
    if not total:
        return 1.0
    return float(scipy.stats.binomtest(hits, total, fraction, alternative).pvalue)


def beats_chance(metrics: Mapping[str, Any]) -> bool:
    """Returns whether the predictions on a split depend significantly on the true classes.

    See `guessing` for the tests.
    """
    return guessing(metrics)["verdict"] in ("better", "informative")


def sure_threshold(num_classes: int) -> float:
    """Returns the lowest confidence at which a prediction counts as sure.

    The threshold is three quarters of the way from 1 / classes to 1: 87.5 % for two classes,
    77.5 % for ten classes.
    """
    chance = 1 / num_classes
    return chance + _SURE * (1 - chance)


def calibrated_error(confidence: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Returns the calibration error that a perfectly calibrated network would show by chance.

    The error is above 0 on a finite number of images even if every confidence is the true
    probability of a correct prediction. The error is estimated by 1,000 simulations with
    seed 0 (fewer for more than 67,000 images). Each simulation draws at random which predictions
    are correct, with the given confidences as probabilities.

    Args:
      confidence: The largest probability of each image, 0 to 1; at least one image.

    Returns:
      "mean" and "percentile_95" of the simulated errors, over the bins of `calibration`.
    """
    confidence = np.sort(confidence.astype(np.float64))
    starts = np.flatnonzero(np.diff(bin_numbers(confidence), prepend=-1))
    simulations = min(_SIMULATIONS, max(_MAX_DRAWS // len(confidence), 100))
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(simulations):
        difference = confidence - (rng.random(len(confidence)) < confidence)
        errors.append(np.abs(np.add.reduceat(difference, starts)).sum() / len(confidence))
    return {"mean": float(np.mean(errors)), "percentile_95": float(np.percentile(errors, 95))}


def training(
    curves: Mapping[str, Any],
    train: Mapping[str, Any] | None,
    validation: Mapping[str, Any] | None,
    dropout: float | None = None,
) -> dict[str, Any]:
    """Returns a verdict on the training of a network, and advice on what to try next.

    The gap between training and validation accuracy is measured with the finished network on
    images without augmentation. During training, augmentation and dropout make the training
    accuracy lower.

    Args:
      curves: Columns by epoch, `best_epoch` and `epochs`.
      train: The training metrics of the finished network; None if the run is not finished.
      validation: The validation metrics of the finished network, or None.
      dropout: The network's key `dropout`; None if the network has no such key.

    Returns:
      "verdict", one to four words; "words", sentences; and "gap", "train_accuracy_at_end" and
      "validation_accuracy_at_end" if the network is finished.
    """
    epochs, best = curves["epochs"], curves["best_epoch"]
    at_best = curves["validation_accuracy"][curves["epoch"].index(best)]
    if train is None or validation is None:
        return {
            "verdict": "not finished",
            "words": "The training is not finished. The best of "
            f"{count(epochs, 'epoch')} so far is epoch {best}, with a validation accuracy of "
            f"{percent(at_best)}.",
        }
    high, low = train["accuracy"], validation["accuracy"]
    if epochs > 1 and abs(low - at_best) > _SAME_ACCURACY:
        return {
            "verdict": "going on",
            "words": "These metrics were measured when this run ended the first time, with a "
            f"validation accuracy of {percent(low)}. The run was continued since: its best epoch "
            f"is now {best}, with {percent(at_best)}. The report will be complete when the run "
            "ends again.",
        }
    apart = (
        f"The finished network classifies {percent(high)} of the training images and "
        f"{percent(low)} of the validation images correctly, {points(abs(high - low))} apart"
    )
    if high < low:
        apart += ", with validation ahead"
    name, advice = _verdict(curves, train, validation, dropout)
    return {
        "gap": high - low,
        "train_accuracy_at_end": high,
        "validation_accuracy_at_end": low,
        "verdict": name,
        "words": f"{apart}. {advice}",
    }


def _verdict(
    curves: Mapping[str, Any],
    train: Mapping[str, Any],
    validation: Mapping[str, Any],
    dropout: float | None,
) -> tuple[str, str]:
    """Returns the verdict, and an explanation with measured values and advice."""
    epochs, best = curves["epochs"], curves["best_epoch"]
    # The end of a list of advice. A network without the key `dropout` cannot have more dropout.
    regularization = " or stronger augmentation"
    if dropout is not None:
        regularization = ", stronger augmentation or more dropout"
    if not beats_chance(validation):
        return "at chance", _at_chance(curves, train)
    if epochs == 1:
        return "one epoch", "One epoch is too few for a verdict: train longer."
    if reason := _improvement(curves, validation):
        return "still improving", f"It is still improving: {reason}. More epochs may help."
    gap = train["accuracy"] - validation["accuracy"]
    has_gap = _interval(train)[0] > _interval(validation)[1]
    if gap > _GAP and has_gap:
        return "overfits", (
            "It overfits: the 95 % confidence intervals of the two accuracies do not overlap."
            f"{_rise(curves)} More images{regularization} may help."
        )
    if decline := _decline(curves, validation):
        return "peaked early", (
            f"{decline} The weights of epoch {best} are kept. A lower learning rate"
            f"{regularization} may keep later epochs from getting worse."
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
                "The network has not learned all of its training images yet, and their loss is "
                f"still falling ({_from_to(curves['train_loss'])} in the second half of the "
                "epochs). More epochs may help."
            )
        if not _has_levelled_off(curves):
            return "too short to tell", (
                "The network has not learned all of its training images yet, and "
                f"{count(epochs, 'epoch')} are too few to tell whether it would: the best is epoch "
                f"{best}, and the training loss went {_from_to(curves['train_loss'])} in the "
                "second half of the epochs. Train longer before you change anything else."
            )
        return "underfits", f"It underfits: {_underfit(curves, train, dropout or 0)}"
    if train["accuracy"] == validation["accuracy"] == 1:
        return (
            "balanced",
            "All predictions on both splits are correct, so neither can show a further gain.",
        )
    return "balanced", (
        "The training is balanced, and validation is not shown to be still improving (the best of "
        f"{epochs} epochs is {best}). The next step is more images, or a larger network with "
        "more augmentation."
    )


def _at_chance(curves: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    """Returns advice for a network whose validation predictions may be no better than chance."""
    start = "On validation the network is not shown to be better than guessing"
    if beats_chance(train):
        return (
            f"{start}, but it is better than guessing on its training images: what it has learned "
            "does not hold for other images. More images or stronger augmentation may help."
        )
    start += ", and neither is it on the training images"
    if curves["epochs"] > 1 and _falls(curves["train_loss"]):
        return (
            f"{start}. The training loss is still falling "
            f"({_from_to(curves['train_loss'])} in the second half of the epochs): train longer."
        )
    return (
        f"{start}. Check that the labels are correct, then train longer or try another learning "
        "rate."
    )


def _improvement(curves: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """Returns evidence that validation metrics still improve at the end of training, or ""."""
    epochs, best = curves["epochs"], curves["epoch"].index(curves["best_epoch"]) + 1
    late = math.ceil(epochs / 10)
    if best <= epochs - late:
        return ""
    accuracies = curves["validation_accuracy"]
    before, after = max(accuracies[: max(epochs - max(late, epochs // 5), 1)]), max(accuracies)
    if after - before > half_width(_interval(validation)):
        return (
            f"the best of {epochs} epochs is {curves['best_epoch']}, and validation accuracy rose "
            f"from {percent(before)} to {percent(after)} in the last epochs"
        )
    if _falls(curves["validation_loss"]):
        return (
            f"the best of {epochs} epochs is {curves['best_epoch']}, and validation loss fell "
            f"{_from_to(curves['validation_loss'])} in the second half of the epochs"
        )
    return ""


def _falls(losses: Sequence[float]) -> bool:
    """Returns whether a loss falls significantly in the second half of the epochs (Mann 1945)."""
    half = losses[len(losses) // 2 :]
    if len(half) < 4 or half[-1] > (1 - _FALL_OF_LOSS) * half[0]:
        return False
    return falling_p_value(half) < _TREND


def _has_levelled_off(curves: Mapping[str, Any]) -> bool:
    """Returns whether the training loss and the validation metrics have stopped improving.

    The result is False for fewer than seven epochs.
    """
    epochs, losses = curves["epochs"], curves["train_loss"]
    half = losses[len(losses) // 2 :]
    best = curves["epoch"].index(curves["best_epoch"]) + 1
    is_flat = half[-1] > (1 - _FALL_OF_LOSS) * half[0]
    return len(half) >= 4 and is_flat and best <= epochs - math.ceil(epochs / 10)


def falling_p_value(values: Sequence[float]) -> float:
    """Returns the p-value of a falling trend: Kendall's rank correlation with time (Mann 1945)."""
    found = scipy.stats.kendalltau(range(len(values)), values, alternative="less")
    return float(found.pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def _from_to(losses: Sequence[float]) -> str:
    return f"from {losses[len(losses) // 2]:.3f} to {losses[-1]:.3f}"


def _decline(curves: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """Returns a sentence about validation accuracy that fell after an early best epoch, or ""."""
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
        f"about {percent(end)} in the later half of the epochs after it, while accuracy on the "
        f"augmented training images rose from {percent(learned[best])} to {percent(learned[-1])}."
    )


def _underfit(curves: Mapping[str, Any], train: Mapping[str, Any], dropout: float) -> str:
    """Returns advice for low training and validation accuracies and a flat training loss."""
    start = "both accuracies are low, they differ little, and the training loss has levelled off."
    rates = curves.get("learning_rate") or [0.0]
    if rates[-1] < _DECAYED * max(rates):
        start += (
            f" The learning rate fell from {max(rates):.2g} to {rates[-1]:.2g}, which can flatten "
            "the loss by itself: try more epochs first."
        )
    augmented = curves["train_accuracy"][curves["epoch"].index(curves["best_epoch"])]
    if train["accuracy"] - augmented > _GAP:
        return (
            f"{start} With augmentation{' and dropout' if dropout else ''}, {percent(augmented)} "
            "of the training images were classified correctly, fewer than without: weaker "
            f"augmentation{' or less dropout' if dropout else ''} may help."
        )
    return f"{start} A larger network or another learning rate may help."


def _rise(curves: Mapping[str, Any]) -> str:
    """Returns a sentence about a validation loss that has risen since its minimum, or ""."""
    losses = curves["validation_loss"]
    least = min(losses)
    if losses[-1] <= _RISE_OF_LOSS * least:
        return ""
    epoch = curves["epoch"][losses.index(least)]
    return (
        f" The lowest validation loss was {least:.3f}, in epoch {epoch}; it rose to "
        f"{losses[-1]:.3f} by the end."
    )


def _interval(metrics: Mapping[str, Any]) -> tuple[float, float]:
    low, high = metrics["confidence_intervals"]["accuracy"]
    return low, high
