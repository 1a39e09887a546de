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
    """Linear warm-up from zero, then cosine decay (Loshchilov and Hutter 2017).

    The rate is `learning_rate` at step `warmup_steps` and `final_learning_rate`
    from step `total_steps` on. The two equal make a constant rate.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else learning_rate,
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(total_steps, warmup_steps + 1),
        end_value=final_learning_rate,
    )


def kernel_mask(params: PyTree) -> PyTree:
    """True for the kernels of convolutions and dense layers, False for all else."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(schedule: optax.Schedule, l2: float) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015) on the gradient of loss + l2 / 2 * sum(kernel ** 2).

    The penalty's gradient is added before Adam's moments, as a penalty in the
    loss is. It is not decoupled weight decay (AdamW), which the specification
    does not use.
    """
    return optax.chain(
        optax.add_decayed_weights(l2, mask=kernel_mask),
        optax.adam(schedule),
    )
