"""Classification metrics, computed from sums and counts over all examples."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Bool, Float, Int, PyTree

from cnn_jax.training.loss import cross_entropy

# The names of the metrics that `summarize` returns.
HEADLINE = ("accuracy", "precision", "recall", "f1", "loss")

# A normal variable is within this number of standard deviations of its mean with probability 95 %.
_NORMAL_95 = float(scipy.special.ndtri(0.975))
# The user is warned if half the width of an accuracy's 95 % confidence interval reaches this value.
MAX_HALF_WIDTH = 0.02
# The number of resamples of the bootstrap.
_RESAMPLES = 1000


@flax.struct.dataclass
class Metrics:
    """Sums over examples, steps and devices, from which all metrics are computed.

    The fields have the general type `PyTree`, because JAX also builds trees of shapes and trees
    of shardings from this class.

    Attributes:
      loss_sum: float32 [classes], for each true class the sum of its examples'
        cross-entropies in nats, without label smoothing.
      confusion: int32 [classes, classes], the number of examples by true class (row)
        and predicted class (column).
    """

    loss_sum: PyTree
    confusion: PyTree

    @classmethod
    def empty(cls, num_classes: int) -> "Metrics":
        """Returns metrics with all sums and counts at zero."""
        return cls(
            loss_sum=jnp.zeros(num_classes, jnp.float32),
            confusion=jnp.zeros((num_classes, num_classes), jnp.int32),
        )

    @classmethod
    def from_logits(
        cls,
        logits: Float[Array, "batch classes"],
        labels: Int[Array, " batch"],
        mask: Bool[Array, " batch"],
    ) -> "Metrics":
        """Returns the metrics of one batch.

        Args:
          logits: The outputs of the network, float32.
          labels: The true class of each example.
          mask: False for examples that are ignored, such as padding.
        """
        num_classes = logits.shape[-1]
        losses = jnp.where(mask, cross_entropy(logits, labels), 0)
        predictions = jnp.argmax(logits, axis=-1)
        confusion = jnp.zeros((num_classes, num_classes), jnp.int32)
        confusion = confusion.at[labels, predictions].add(mask.astype(jnp.int32))
        loss_sum = jax.lax.platform_dependent(
            losses,
            labels,
            cpu=functools.partial(_scatter_by_class, num_classes=num_classes),
            default=functools.partial(_sum_by_class, num_classes=num_classes),
        )
        return cls(loss_sum=loss_sum, confusion=confusion)

    def merge(self, other: "Metrics") -> "Metrics":
        """Returns the metrics of all examples of `self` and `other`."""
        return jax.tree.map(jnp.add, self, other)

    def compute(self, class_counts: Int[np.ndarray, " classes"] | None = None) -> dict[str, float]:
        """Returns the accuracy, the macro precision, recall and F1, and the mean loss.

        Args:
          class_counts: The number of examples of each class in the data, if the examples
            were sampled with different class frequencies. The metrics are then reweighted to
            the class frequencies of the data.
        """
        host = jax.device_get(self)
        if class_counts is None:
            return summarize(host.confusion, float(host.loss_sum.sum()))
        weights = _divide(class_counts, host.confusion.sum(axis=1))
        return summarize(host.confusion * weights[:, None], float(host.loss_sum @ weights))


def _scatter_by_class(values: Array, labels: Array, num_classes: int) -> Array:
    """Returns the sum of the values of each class."""
    return jnp.zeros(num_classes, values.dtype).at[labels].add(values)


def _sum_by_class(values: Array, labels: Array, num_classes: int) -> Array:
    """Returns the same as `_scatter_by_class`, in an order of additions that never changes.

    On a GPU, a scatter adds values in any order, so that the rounding differs between runs.
    """
    is_class = labels[:, None] == jnp.arange(num_classes)[None]
    return jnp.sum(jnp.where(is_class, values[:, None], 0), axis=0)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Returns the element-wise quotient, with 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the precision, recall, F1 and support (number of examples) of each class.

    Args:
      confusion: int [classes, classes], rows are true classes.

    Returns:
      Arrays [classes]. The precision of a class that is never predicted is 0, and so is
      the recall of a class without examples.
    """
    correct = np.diag(confusion).astype(np.float64)
    return _per_class(correct, confusion.sum(axis=0), confusion.sum(axis=1))


def _per_class(
    correct: np.ndarray, predicted: np.ndarray, support: np.ndarray
) -> dict[str, np.ndarray]:
    """Computes `per_class` from the counts of correct, predicted and true examples by class."""
    return {
        "precision": _divide(correct, predicted),
        "recall": _divide(correct, support),
        "f1": _divide(2 * correct, predicted + support),
        "support": support,
    }


def summarize(confusion: np.ndarray, loss_sum: float) -> dict[str, float]:
    """Returns the accuracy, the macro precision, recall and F1, and the mean loss.

    Macro metrics are means over all classes. All metrics of an empty confusion matrix are 0.

    Args:
      confusion: [classes, classes], rows are true classes.
      loss_sum: The sum of the examples' cross-entropies, in nats.
    """
    count = float(confusion.sum()) or 1.0
    classes = per_class(confusion)
    return {
        "accuracy": float(np.trace(confusion) / count),
        "precision": float(classes["precision"].mean()),
        "recall": float(classes["recall"].mean()),
        "f1": float(classes["f1"].mean()),
        "loss": loss_sum / count,
    }


def half_width(interval: Sequence[float]) -> float:
    """Returns half the width of an interval (low, high)."""
    low, high = interval
    return (high - low) / 2


def wilson_interval(successes: float, count: float) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a fraction (Wilson 1927).

    `scipy.stats.binomtest` computes the same interval, but accepts only integers.

    Args:
      successes: The number of successes, 0 to `count`; it may have a fractional part.
      count: The number of observations.

    Returns:
      The low and the high end of the interval; 0 and 1 if there are no observations.
    """
    if not count:
        return 0.0, 1.0
    fraction, z2 = successes / count, _NORMAL_95**2
    centre = (fraction + z2 / (2 * count)) / (1 + z2 / count)
    margin = _NORMAL_95 * math.sqrt(fraction * (1 - fraction) / count + z2 / (4 * count**2))
    margin /= 1 + z2 / count
    return max(centre - margin, 0.0), min(centre + margin, 1.0)


def bootstrap_intervals(confusion: np.ndarray) -> dict[str, tuple[float, float]]:
    """Returns 95 % bootstrap confidence intervals of macro precision, recall and F1.

    The intervals are percentiles of 1,000 resamples of the examples, with seed 0 (Efron 1979). Each
    class is resampled separately, because a resample of all examples could lack a small
    class, whose recall would then be 0. An interval always contains the metric itself.

    Args:
      confusion: int [classes, classes], rows are true classes.

    Returns:
      The low and the high end of the interval of each metric.
    """
    if not confusion.sum():
        return dict.fromkeys(("precision", "recall", "f1"), (0.0, 1.0))
    num_classes = len(confusion)
    support = confusion.sum(axis=1)
    correct, predicted = (np.zeros((_RESAMPLES, num_classes), np.int64) for _ in range(2))
    rng = np.random.default_rng(0)
    for label, row in enumerate(confusion):
        # Drawing a row of the confusion matrix from a multinomial distribution is equivalent to
        # resampling the examples of a class.
        cells = np.flatnonzero(row)
        if not len(cells):
            continue
        counts = rng.multinomial(row.sum(), row[cells] / row.sum(), _RESAMPLES)
        predicted[:, cells] += counts
        correct[:, label] = counts[:, cells == label].sum(axis=1)
    resampled = _per_class(correct, predicted, np.broadcast_to(support, correct.shape))
    measured = per_class(confusion)
    intervals = {}
    for key in ("precision", "recall", "f1"):
        low, high = np.percentile(resampled[key].mean(axis=1), (2.5, 97.5))
        value = measured[key].mean()
        intervals[key] = float(min(low, value)), float(max(high, value))
    return intervals


def confidence_intervals(
    confusion: np.ndarray, losses: Float[np.ndarray, " n"]
) -> dict[str, tuple[float, float]]:
    """Returns 95 % confidence intervals of the metrics that `summarize` returns.

    The methods are Wilson's for accuracy, the bootstrap for precision, recall and F1, and
    the normal approximation for the mean loss.

    Args:
      confusion: int [classes, classes], rows are true classes.
      losses: The cross-entropy of each example, in nats.
    """
    count = max(len(losses), 1)
    mean = float(losses.sum() / count)
    margin = _NORMAL_95 * float(losses.std(ddof=1)) / math.sqrt(count) if count > 1 else mean
    return {
        "accuracy": wilson_interval(float(np.trace(confusion)), float(confusion.sum())),
        **bootstrap_intervals(confusion),
        "loss": (max(mean - margin, 0.0), mean + margin),
    }


def agreement_p_value(matrix: np.ndarray) -> float:
    """Returns the p-value of the hypothesis that predictions and labels agree only by chance.

    The p-value is the probability of at least this many correct predictions if the predictions
    were shuffled among the images. The method is a normal approximation, with continuity
    correction, to the permutation distribution of the matrix's trace (Hoeffding 1951).

    Args:
      matrix: int [classes, classes], a confusion matrix whose rows are the true classes.
    """
    rows, columns, total = matrix.sum(axis=1), matrix.sum(axis=0), int(matrix.sum())
    if total < 2:
        return 1.0
    mean = float(rows @ columns) / total
    deviation = np.eye(len(matrix)) - columns[:, None] / total - rows[None, :] / total
    deviation += mean / total
    variance = float(rows @ deviation**2 @ columns) / (total - 1)
    if variance <= 1e-12 * total:  # All images or all predictions belong to one class.
        return 1.0
    excess = float(np.trace(matrix)) - mean - 0.5
    return float(scipy.special.ndtr(-excess / math.sqrt(variance)))


def full_report(
    confusion: np.ndarray, losses: Float[np.ndarray, " n"], class_names: list[str]
) -> dict[str, Any]:
    """Returns all metrics of a split, with confidence intervals and the confusion matrix.

    Args:
      confusion: int [classes, classes], rows are true classes.
      losses: The cross-entropy of each example, in nats.
      class_names: The names in the order of the classes.

    Returns:
      The metrics of `summarize`, "count", "confidence_intervals", "per_class" and
      "confusion", as values that JSON can store.
    """
    columns = per_class(confusion)
    intervals = confidence_intervals(confusion, losses)
    return summarize(confusion, float(losses.sum())) | {
        "count": int(confusion.sum()),
        "confidence_intervals": {key: list(interval) for key, interval in intervals.items()},
        "per_class": {
            name: {key: column[i].item() for key, column in columns.items()}
            for i, name in enumerate(class_names)
        },
        "confusion": confusion.tolist(),
    }
