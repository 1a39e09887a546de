"""Classification metrics, kept as sums and counts and divided once at the end."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from cnn_jax.loss import cross_entropy

# The figures that `summarize` gives.
HEADLINE = ("accuracy", "precision", "recall", "f1", "loss")


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
    predicted = confusion.sum(axis=0)
    support = confusion.sum(axis=1)
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


def full_report(confusion: np.ndarray, loss_sum: float, class_names: list[str]) -> dict[str, Any]:
    """`summarize`, the figures of each class and the confusion matrix, as JSON types."""
    columns = per_class(confusion)
    return summarize(confusion, loss_sum) | {
        "count": int(confusion.sum()),
        "per_class": {
            name: {key: column[i].item() for key, column in columns.items()}
            for i, name in enumerate(class_names)
        },
        "confusion": confusion.tolist(),
    }
