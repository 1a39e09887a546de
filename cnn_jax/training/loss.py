"""The loss of each example, and the weights of examples in the mean loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

# The class of each example, or the probability of each class for each example.
Targets = Int[Array, " batch"] | Float[Array, "batch classes"]


def cross_entropy(
    logits: Float[Array, "batch classes"], targets: Targets, label_smoothing: float = 0.0
) -> Float[Array, " batch"]:
    """Returns the cross-entropy between each example's prediction and smoothed target, in nats.

    Label smoothing s replaces each of the C target probabilities p by (1 - s) p + s / C
    (Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7).

    Args:
      logits: The outputs of the network.
      targets: The class of each example, or a probability for each class.
      label_smoothing: The probability s, in [0, 1).
    """
    if _are_classes(targets):
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def example_weights(
    class_weights: Float[Array, " classes"], targets: Targets
) -> Float[Array, " batch"]:
    """Returns a weight for each example: the mean class weight under the target distribution.

    If the target is a single class, the result is the weight of this class.
    """
    if _are_classes(targets):
        return class_weights[targets]
    return jnp.matmul(targets, class_weights, precision=jax.lax.Precision.HIGHEST)


def _are_classes(targets: Array) -> bool:
    """Returns whether targets are class indices, as opposed to class probabilities."""
    return jnp.issubdtype(targets.dtype, jnp.integer)


def balanced_weights(class_counts: Int[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    """Returns a weight for each class, such that all classes contribute equally to the loss.

    The weight of class c is n / (C n_c), where n is the number of examples, n_c the number of
    examples of the class, and C the number of classes that have examples. The mean weight of
    an example is then 1 (after King and Zeng 2001, "Logistic Regression in Rare Events
    Data"). The weight of a class without examples is 0.
    """
    has_examples = class_counts > 0
    weights = np.zeros(len(class_counts))
    weights[has_examples] = class_counts.sum() / (has_examples.sum() * class_counts[has_examples])
    return weights
