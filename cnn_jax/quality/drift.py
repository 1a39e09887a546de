"""Tests whether a window of predictions differs from the predictions for the validation images.

There are six tests: a two-sample Kolmogorov-Smirnov test of each statistic in `STATISTICS`, and a
chi-square test of the predicted classes. With the Bonferroni correction, a window differs if the
smallest p-value is at most the level divided by six.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

# The scalars of each prediction. "distance" is the Mahalanobis distance of the embedding from the
# mean of the predicted class; the last three are properties of the image.
STATISTICS = ("distance", "confidence", "brightness", "sharpness", "contrast")
TESTS = (*STATISTICS, "classes")
# The default probability that a window without drift differs.
LEVEL = 0.01
# The chi-square distribution approximates the statistic if each expected count is at least 5
# (Cochran 1954).
_MIN_EXPECTED = 5
# Statistics are compared in steps of this fraction of their spread. Batches of different sizes give
# probabilities that differ by up to 1e-6. Without the steps, a probability of exactly 1 in one
# sample and 1 - 1e-7 in the other would count as a difference.
_STEP = 1e-4


def window_p_values(
    reference: Float[np.ndarray, "n statistics"],
    reference_counts: Int[np.ndarray, " classes"],
    window: Float[np.ndarray, "m statistics"],
    window_counts: Int[np.ndarray, " classes"],
) -> dict[str, float]:
    """Returns the p-value of each test in `TESTS`.

    Args:
      reference: The statistics of the validation images, in the order of `STATISTICS`.
      reference_counts: The number of validation images that are predicted as each class.
      window: The statistics of the images in the window, one or more.
      window_counts: The number of images in the window that are predicted as each class.
    """
    p_values = {
        name: statistic_p_value(reference[:, column], window[:, column])
        for column, name in enumerate(STATISTICS)
    }
    return p_values | {"classes": classes_p_value(reference_counts, window_counts)}


def statistic_p_value(reference: Float[np.ndarray, " n"], window: Float[np.ndarray, " m"]) -> float:
    """Returns the p-value of the two-sided Kolmogorov-Smirnov test of two samples.

    With equal values the p-value is too large, never too small.
    """
    low, high = np.quantile(reference.astype(np.float64), (0.01, 0.99))
    step = max((high - low) * _STEP, np.finfo(np.float32).eps * max(abs(low), abs(high), 1.0))
    first, second = (np.round(sample.astype(np.float64) / step) for sample in (reference, window))
    result: Any = stats.ks_2samp(first, second, method="asymp")
    return float(result.pvalue)


def classes_p_value(
    reference_counts: Int[np.ndarray, " classes"], window_counts: Int[np.ndarray, " classes"]
) -> float:
    """Returns the p-value of the chi-square test that two samples have the same class frequencies.

    Rare classes are counted together, so that each expected count is at least 5. If fewer than two
    groups of classes remain, the p-value is 1.
    """
    groups = group_classes(reference_counts, window_counts)
    table = np.zeros((2, groups.max() + 1), np.int64)
    for row, counts in zip(table, (reference_counts, window_counts), strict=True):
        np.add.at(row, groups, counts)
    if table.shape[1] < 2:
        return 1.0
    result: Any = stats.chi2_contingency(table, correction=False)
    return float(result.pvalue)


def group_classes(
    reference_counts: Int[np.ndarray, " classes"], window_counts: Int[np.ndarray, " classes"]
) -> Int[np.ndarray, " classes"]:
    """Assigns each class to a group, so that each expected count of the chi-square test is >= 5.

    Classes are added to a group in the order of their total count, the rarest first, until the
    group is large enough.
    """
    totals = reference_counts + window_counts
    smaller = min(reference_counts.sum(), window_counts.sum())
    needed = _MIN_EXPECTED * totals.sum() / max(smaller, 1)
    groups = np.zeros(len(totals), np.int64)
    number = size = 0
    order = np.argsort(totals, kind="stable")
    for position, label in enumerate(order.tolist()):
        groups[label] = number
        size += totals[label]
        remaining = totals[order[position + 1 :]].sum()
        if size >= needed and remaining >= needed:
            number, size = number + 1, 0
    return groups


def is_different(p_values: Sequence[float], level: float = LEVEL) -> bool:
    """Returns whether the smallest p-value is significant after the Bonferroni correction."""
    return min(p_values) <= level / len(p_values)


def consecutive(flags: Bool[np.ndarray, " windows"]) -> Bool[np.ndarray, " windows"]:
    """Returns for each window whether this window and the window before it are flagged."""
    return flags & np.concatenate([[False], flags[:-1]])
