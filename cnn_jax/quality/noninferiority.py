"""Tests whether a new classifier is at most a margin worse than an old one on the same images."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binom, norm

# The probability of each of two errors: that the score test passes a classifier that is worse by
# exactly the margin, and that a class of an equal classifier is called worse.
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of a new classifier with an old classifier on the same images.

    Attributes:
      images: The number of images.
      margin: The difference in accuracy that is still accepted, above 0 and below 1.
      new_correct, old_correct: The number of images that each classifier classifies correctly.
      gains: The number of images that only the new classifier classifies correctly.
      losses: The number of images that only the old classifier classifies correctly.
      p_value: The p-value of the score test.
      worse_classes: The classes in which the new classifier is worse than the old one.
      classes: The number of images, gains and losses of each class with gains or losses.
    """

    images: int
    margin: float
    new_correct: int
    old_correct: int
    gains: int
    losses: int
    p_value: float
    worse_classes: tuple[str, ...]
    classes: dict[str, tuple[int, int, int]]

    @property
    def is_not_worse(self) -> bool:
        """Whether the score test rejects at 5 %, and no class is worse."""
        return self.p_value <= LEVEL and not self.worse_classes


def compare(
    new_correct: Bool[np.ndarray, " n"],
    old_correct: Bool[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    class_names: Sequence[str],
    margin: float,
) -> Comparison:
    """Compares two classifiers by their predictions for the same images.

    Args:
      new_correct: Whether the new classifier classifies each image correctly.
      old_correct: Whether the old classifier classifies each image correctly.
      labels: The class of each image.
      class_names: The names of the classes.
      margin: The difference in accuracy that is still accepted, above 0 and below 1.
    """

    def count(which: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " classes"]:
        return np.bincount(labels[which], minlength=len(class_names))

    gains, losses = count(new_correct & ~old_correct), count(old_correct & ~new_correct)
    images, worse = np.bincount(labels, minlength=len(class_names)), worse_classes(gains, losses)
    counts = zip(class_names, images.tolist(), gains.tolist(), losses.tolist(), strict=True)
    score = score_statistic(np.asarray(gains.sum()), np.asarray(losses.sum()), len(labels), margin)
    return Comparison(
        images=len(labels),
        margin=margin,
        new_correct=int(new_correct.sum()),
        old_correct=int(old_correct.sum()),
        gains=int(gains.sum()),
        losses=int(losses.sum()),
        p_value=float(norm.sf(score)),
        worse_classes=tuple(
            name for name, is_worse in zip(class_names, worse, strict=True) if is_worse
        ),
        classes={name: (n, gain, loss) for name, n, gain, loss in counts if gain or loss},
    )


def score_statistic(
    gains: Int[np.ndarray, "*batch"],
    losses: Int[np.ndarray, "*batch"],
    images: int,
    margin: float,
) -> Float[np.ndarray, "*batch"]:
    """Returns the score statistic of non-inferiority for paired proportions.

    Source: T. Tango, "Equivalence test and confidence interval for the difference in proportions
    for the paired-sample design", Statistics in Medicine 17, 1998.

    Args:
      gains: The number of images that only the new classifier classifies correctly.
      losses: The number of images that only the old classifier classifies correctly.
      images: The number of all images, 1 or more.
      margin: The accepted difference in accuracy, above 0 and below 1.

    Returns:
      The statistic. If the new classifier is worse by exactly the margin, the statistic has
      approximately the standard normal distribution. It is larger if the new classifier is better.
    """
    # `loss_rate` is the maximum-likelihood estimate of the probability of a loss, under the
    # condition that the probability of a gain is lower by the margin. It is a root of
    # a x^2 + b x + c.
    a = 2.0 * images
    b = -gains - losses - margin * (2 * images - gains + losses)
    c = losses * margin * (1 + margin)
    loss_rate = (np.sqrt(b**2 - 4 * a * c) - b) / (2 * a)
    variance = images * (2 * loss_rate - margin * (1 + margin))
    return np.asarray((gains - losses + images * margin) / np.sqrt(variance))


def worse_classes(
    gains: Int[np.ndarray, "*batch classes"], losses: Int[np.ndarray, "*batch classes"]
) -> Bool[np.ndarray, "*batch classes"]:
    """Returns in which classes the new classifier is worse than the old classifier.

    Each class gets the exact test of McNemar (one-sided binomial test of the losses among the gains
    and losses). Holm's correction limits the probability that any class is called worse although
    the classifiers are equal to 5 %.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian
    Journal of Statistics 6, 1979.

    Args:
      gains: The number of images of each class that only the new classifier classifies correctly.
      losses: The number of images of each class that only the old classifier classifies correctly.
    """
    p_values = binom.sf(losses - 1, gains + losses, 0.5)
    order = np.argsort(p_values, axis=-1, kind="stable")
    tests_left = np.arange(gains.shape[-1], 0, -1)
    is_small = np.take_along_axis(p_values, order, -1) * tests_left <= LEVEL
    is_worse = np.zeros(p_values.shape, bool)
    np.put_along_axis(is_worse, order, np.logical_and.accumulate(is_small, axis=-1), axis=-1)
    return is_worse


def images_needed(comparison: Comparison) -> int:
    """Returns the number of images with which an equal classifier would pass 80 % of the time.

    Args:
      comparison: A comparison on other images of the same kind. The fraction of images that exactly
        one classifier classifies correctly is taken from this comparison.
    """
    fraction = (comparison.gains + comparison.losses) / comparison.images
    # The variance of the score statistic is at least the margin, also if no prediction differs.
    fraction = max(fraction, comparison.margin)
    score = norm.isf(LEVEL) + norm.isf(0.2)
    return math.ceil(fraction * (score / comparison.margin) ** 2)
