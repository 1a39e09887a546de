"""Per-example losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

# What examples are meant to be: a class each, or the probability of each class.
Targets = Int[Array, " batch"] | Float[Array, "batch classes"]


def cross_entropy(
    logits: Float[Array, "batch classes"], targets: Targets, label_smoothing: float = 0.0
) -> Float[Array, " batch"]:
    """Categorical cross-entropy in nats against smoothed targets.

    A class's probability p becomes (1 - s) p + s / C: for a single true class that is
    1 - s + s / C, and s / C for the others (Szegedy et al. 2016, "Rethinking the Inception
    Architecture", section 7).
    """
    if _are_classes(targets):
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def example_weights(
    class_weights: Float[Array, " classes"], targets: Targets
) -> Float[Array, " batch"]:
    """The weight of each example's class; of several classes, their mean by the target."""
    if _are_classes(targets):
        return class_weights[targets]
    return jnp.matmul(targets, class_weights, precision=jax.lax.Precision.HIGHEST)


def _are_classes(targets: Array) -> bool:
    return jnp.issubdtype(targets.dtype, jnp.integer)


def balanced_weights(class_counts: Int[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    """Weights of the classes' losses by which each class counts for as much.

    n / (C n_c), where n_c of all n examples are of class c and C classes have
    any: the mean weight of an example is 1. (After King and Zeng 2001,
    "Logistic Regression in Rare Events Data".) A class without examples gets 0.
    """
    present = class_counts > 0
    weights = np.zeros(len(class_counts))
    weights[present] = class_counts.sum() / (present.sum() * class_counts[present])
    return weights
