"""Per-example losses."""

import jax
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    label_smoothing: float = 0.0,
) -> Float[Array, " batch"]:
    """Categorical cross-entropy in nats against a smoothed one-hot target.

    The target is 1 - s + s / C for the true class and s / C for the others
    (Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7).
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))
