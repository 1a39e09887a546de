"""Per-example losses."""

import jax
import numpy as np
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
