"""Classification metrics, kept as sums and counts and divided once at the end."""

import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from cnn_jax.training.loss import cross_entropy

# The figures that `summarize` gives.
HEADLINE = ("accuracy", "precision", "recall", "f1", "loss")

# 95 % of a normal distribution lie within so many standard deviations.
_NORMAL_95 = 1.959963984540054
# An accuracy whose 95 % interval reaches further than this to either side is known too vaguely.
VAGUE = 0.02
_RESAMPLES = 1000


@flax.struct.dataclass
class Metrics:
    """What is summed over examples, steps and devices.

    The fields are typed loosely because JAX also builds trees of shapes,
    shardings and the like from this class.

    Attributes:
      loss_sum: float32 [classes], sum of the cross-entropies in nats, without
        label smoothing, of the examples of each true class.
      confusion: int32 [classes, classes], number of examples by true class (row)
        and predicted class (column).
    """

    loss_sum: PyTree
    confusion: PyTree

    @classmethod
    def empty(cls, num_classes: int) -> "Metrics":
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
        """The metrics of one batch; examples whose mask is False do not count."""
        num_classes = logits.shape[-1]
        losses = jnp.where(mask, cross_entropy(logits, labels), 0)
        predictions = jnp.argmax(logits, axis=-1)
        confusion = jnp.zeros((num_classes, num_classes), jnp.int32)
        confusion = confusion.at[labels, predictions].add(mask.astype(jnp.int32))
        loss_sum = jnp.zeros(num_classes, jnp.float32).at[labels].add(losses)
        return cls(loss_sum=loss_sum, confusion=confusion)

    def merge(self, other: "Metrics") -> "Metrics":
        return jax.tree.map(jnp.add, self, other)

    def compute(self, class_counts: Int[np.ndarray, " classes"] | None = None) -> dict[str, float]:
        """Accuracy, macro precision, recall and F1, and mean loss.

        Args:
          class_counts: Examples of each class in the data, if they were drawn in
            other proportions: the figures are then those of the data's.
        """
        host = jax.device_get(self)
        if class_counts is None:
            return summarize(host.confusion, float(host.loss_sum.sum()))
        weights = _divide(class_counts, host.confusion.sum(axis=1))
        return summarize(host.confusion * weights[:, None], float(host.loss_sum @ weights))


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element-wise quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator != 0)


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each class, and its number of examples (support).

    Args:
      confusion: int [classes, classes], rows are true classes.

    Returns:
      Arrays [classes]. A quotient with nothing to divide by is 0: the precision
      of a class never predicted, the recall of a class without examples.
    """
    hits = np.diag(confusion).astype(np.float64)
    return _per_class(hits, confusion.sum(axis=0), confusion.sum(axis=1))


def _per_class(
    hits: np.ndarray, predicted: np.ndarray, support: np.ndarray
) -> dict[str, np.ndarray]:
    return {
        "precision": _divide(hits, predicted),
        "recall": _divide(hits, support),
        "f1": _divide(2 * hits, predicted + support),
        "support": support,
    }


def summarize(confusion: np.ndarray, loss_sum: float) -> dict[str, float]:
    """Accuracy, macro precision, recall and F1 (means over all classes), mean loss.

    All of them are 0 for an empty confusion matrix.
    """
    count = float(confusion.sum()) or 1.0
    by_class = per_class(confusion)
    return {
        "accuracy": float(np.trace(confusion) / count),
        "precision": float(by_class["precision"].mean()),
        "recall": float(by_class["recall"].mean()),
        "f1": float(by_class["f1"].mean()),
        "loss": loss_sum / count,
    }


def half_width(interval: Sequence[float]) -> float:
    """Half the width of an interval (low, high)."""
    low, high = interval
    return (high - low) / 2


def wilson_interval(hits: float, count: float) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927); 0 to 1 for no observations."""
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, _NORMAL_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = _NORMAL_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    reach /= 1 + z2 / count
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def bootstrap_intervals(confusion: np.ndarray) -> dict[str, tuple[float, float]]:
    """95 % confidence intervals of precision, recall and F1 (macro), by the bootstrap.

    (Efron 1979; percentiles of 1,000 resamples of the examples, seed 0.) Each class is
    resampled by itself: in a resample of all, small classes would be absent and count 0. The
    figure itself is always in its interval.
    """
    if not confusion.sum():
        return dict.fromkeys(("precision", "recall", "f1"), (0.0, 1.0))
    num_classes = len(confusion)
    support = confusion.sum(axis=1)
    hits, predicted = (np.zeros((_RESAMPLES, num_classes), np.int64) for _ in range(2))
    rng = np.random.default_rng(0)
    for label, row in enumerate(confusion):
        # To resample examples is to draw counts for the cells; empty ones stay empty.
        cells = np.flatnonzero(row)
        if not len(cells):
            continue
        counts = rng.multinomial(row.sum(), row[cells] / row.sum(), _RESAMPLES)
        predicted[:, cells] += counts
        hits[:, label] = counts[:, cells == label].sum(axis=1)
    resampled = [
        _per_class(of_hits, of_predicted, support)
        for of_hits, of_predicted in zip(hits, predicted, strict=True)
    ]
    figures = per_class(confusion)
    intervals = {}
    for key in ("precision", "recall", "f1"):
        low, high = np.percentile([by_class[key].mean() for by_class in resampled], (2.5, 97.5))
        figure = figures[key].mean()
        intervals[key] = float(min(low, figure)), float(max(high, figure))
    return intervals


def confidence_intervals(
    confusion: np.ndarray, losses: Float[np.ndarray, " n"]
) -> dict[str, tuple[float, float]]:
    """95 % confidence intervals of the figures of `summarize`.

    Wilson's for accuracy, the bootstrap's for precision, recall and F1, the normal
    approximation for the mean loss.

    Args:
      confusion: int [classes, classes].
      losses: Of each example.
    """
    count = max(len(losses), 1)
    mean = float(losses.sum() / count)
    reach = _NORMAL_95 * float(losses.std(ddof=1)) / math.sqrt(count) if count > 1 else mean
    return {
        "accuracy": wilson_interval(float(np.trace(confusion)), float(confusion.sum())),
        **bootstrap_intervals(confusion),
        "loss": (max(mean - reach, 0.0), mean + reach),
    }


def full_report(
    confusion: np.ndarray, losses: Float[np.ndarray, " n"], class_names: list[str]
) -> dict[str, Any]:
    """`summarize`, its confidence intervals, each class and the confusion matrix, as JSON types.

    Args:
      confusion: int [classes, classes], rows are true classes.
      losses: The cross-entropy of each example, in nats.
      class_names: In the order of the classes.
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
