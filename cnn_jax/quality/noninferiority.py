"""Tests whether one classifier is worse than another by at most a margin, on the same images."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binom, norm

from cnn_jax.quality.comparison import Comparison

# The significance level. If a classifier is worse by exactly the margin, the score test passes with
# about this probability. If two classifiers are equal, one or more classes are called worse with at
# most this probability.
LEVEL = 0.05


def compare(
    candidate: Bool[np.ndarray, " n"],
    reference: Bool[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    class_names: Sequence[str],
    margin: float,
) -> Comparison:
    """Compares two classifiers by their predictions for the same images.

    Args:
      candidate: Whether the candidate classifies each image correctly.
      reference: Whether the reference classifies each image correctly.
      labels: The class of each image.
      class_names: The names of the classes.
      margin: The difference in accuracy that is still accepted, above 0 and below 1.
    """

    def count(which: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " classes"]:
        return np.bincount(labels[which], minlength=len(class_names))

    images = count(np.ones_like(candidate))
    gains, losses = count(candidate & ~reference), count(reference & ~candidate)
    score = score_statistic(np.asarray(gains.sum()), np.asarray(losses.sum()), len(labels), margin)
    worse = [class_names[label] for label in np.flatnonzero(worse_classes(gains, losses)).tolist()]
    counts = np.stack([images, gains, losses], axis=1).tolist()
    # The variance per image is about the fraction of gains and losses, but at least about the
    # margin.
    fraction = max((gains.sum() + losses.sum()) / len(labels), margin)
    p_value = float(norm.sf(score))
    return Comparison(
        is_not_worse=p_value <= LEVEL and not worse,
        images=len(labels),
        margin=margin,
        level=LEVEL,
        candidate_correct=int(candidate.sum()),
        reference_correct=int(reference.sum()),
        gains=int(gains.sum()),
        losses=int(losses.sum()),
        p_value=p_value,
        worse_classes=tuple(worse),
        classes={
            name: (n, gain, loss)
            for name, (n, gain, loss) in zip(class_names, counts, strict=True)
            if gain or loss
        },
        images_needed=math.ceil(fraction * ((norm.isf(LEVEL) + norm.isf(0.2)) / margin) ** 2),
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
      gains: The number of images that only the candidate classifies correctly.
      losses: The number of images that only the reference classifies correctly.
      images: The number of all images, 1 or more.
      margin: The accepted difference in accuracy, above 0 and below 1.

    Returns:
      The statistic. If the candidate is worse by exactly the margin, the statistic has
      approximately the standard normal distribution. It is larger if the candidate is better.
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
    """Returns for each class whether the candidate is significantly worse than the reference.

    Each class gets the exact test of McNemar (one-sided binomial test of the losses among the gains
    and losses). Holm's correction limits the probability that any class is called worse although
    the classifiers are equal to 5 %.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian
    Journal of Statistics 6, 1979.

    Args:
      gains: The number of images of each class that only the candidate classifies correctly.
      losses: The number of images of each class that only the reference classifies correctly.
    """
    p_values = binom.sf(losses - 1, gains + losses, 0.5)
    order = np.argsort(p_values, axis=-1, kind="stable")
    tests_left = np.arange(gains.shape[-1], 0, -1)
    is_small = np.take_along_axis(p_values, order, -1) * tests_left <= LEVEL
    is_worse = np.zeros(p_values.shape, bool)
    np.put_along_axis(is_worse, order, np.logical_and.accumulate(is_small, axis=-1), axis=-1)
    return is_worse
