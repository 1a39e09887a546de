"""The learning-rate schedule and the optimizer."""

import jax
import optax
from jaxtyping import PyTree


def make_schedule(
    learning_rate: float,
    final_learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
) -> optax.Schedule:
    """Returns a schedule: linear warm-up from zero, then cosine decay (Loshchilov and Hutter 2017).

    Args:
      learning_rate: The learning rate at step `warmup_steps`.
      final_learning_rate: The learning rate from step `total_steps` on. If it equals
        `learning_rate`, the learning rate is constant after the warm-up.
      total_steps: The number of steps of warm-up and decay.
      warmup_steps: The number of steps of the warm-up; 0 for no warm-up.

    Returns:
      A function from the number of steps taken to the learning rate.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else learning_rate,
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(total_steps, warmup_steps + 1),
        end_value=final_learning_rate,
    )


def kernel_mask(params: PyTree) -> PyTree:
    """Returns a tree of booleans: True for the kernels of convolution and dense layers."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(schedule: optax.Schedule, l2: float) -> optax.GradientTransformation:
    """Returns Adam (Kingma and Ba 2015) for the objective loss + l2 / 2 * sum(kernel ** 2).

    The gradient of the penalty is included in Adam's moments, as if the penalty were a term
    of the loss. This method is not decoupled weight decay (AdamW), because the project's
    specification prescribes an L2 penalty.

    Args:
      schedule: A function from the number of steps taken to the learning rate.
      l2: The weight of the penalty, 0 or more.
    """
    return optax.chain(
        optax.add_decayed_weights(l2, mask=kernel_mask),
        optax.adam(schedule),
    )
