"""The learning-rate schedule and the optimizer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from cnn_jax.models.network import Network

# In the one-cycle schedule, the fraction of the steps in which the learning rate rises, and the
# factor by which it rises. These are the defaults of PyTorch and Optax.
_ONE_CYCLE_RISE, _ONE_CYCLE_FACTOR = 0.3, 25.0
# The decay rates of Lion's two averages of the gradient (Chen et al. 2023, algorithm 2).
_LION = {"b1": 0.9, "b2": 0.99}


def make_schedule(
    learning_rate: float,
    final_learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    shape: str = "cosine",
) -> optax.Schedule:
    """Returns a schedule whose learning rate first rises, and then falls.

    "cosine": the learning rate rises linearly from 0, and then falls along a cosine (Loshchilov
    and Hutter 2017). "one_cycle": it rises and falls along cosines, from 1/25 of its largest
    value (Smith and Topin 2018, "Super-Convergence"; the cosines are those of PyTorch and Optax).
    The momentum is constant in both.

    Args:
      learning_rate: The learning rate at the end of the rise.
      final_learning_rate: The learning rate from step `total_steps` on. If it equals
        `learning_rate`, the learning rate is constant after the rise.
      total_steps: The number of steps of rise and fall.
      warmup_steps: The number of steps of the rise. With 0, "cosine" has no rise, and the rise of
        "one_cycle" takes 30 % of the steps.
      shape: One of `schema.SCHEDULES`.

    Returns:
      A function from the number of steps taken to the learning rate.
    """
    if shape == "one_cycle":
        rise = warmup_steps or max(1, int(_ONE_CYCLE_RISE * total_steps))
        return optax.piecewise_interpolate_schedule(
            "cosine",
            learning_rate / _ONE_CYCLE_FACTOR,
            {
                rise: _ONE_CYCLE_FACTOR,
                max(total_steps, rise + 1): final_learning_rate / learning_rate,
            },
        )
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


def head_kernel_mask(params: PyTree) -> PyTree:
    """Returns a tree of booleans: True for the kernel of the head, else False."""
    return jax.tree.map_with_path(lambda path, _: _names(path) == ("head", "kernel"), params)


def learning_rate_factors(
    params: PyTree, *, model: Network, stage_decay: float, head_factor: float
) -> PyTree:
    """Returns the factor of the learning rate for each parameter of a network.

    The factor is 1 for the last stage before the head, `stage_decay` for the stage before it,
    its square for the stage before that one, and so on ("discriminative fine-tuning", Howard
    and Ruder 2018).

    Args:
      params: The parameters of the network.
      model: The network.
      stage_decay: The ratio of the learning rates of a stage and the next stage.
      head_factor: The factor of the head.
    """
    stages = [name for name in model.stage_names if name not in ("embedding", "logits")]

    def factor(path: tuple[Any, ...], _: Array) -> float:
        stage = model.find_stage(_names(path)[0])
        if stage == "logits":
            return head_factor
        distance = len(stages) - 1 - stages.index(stage) if stage in stages else 0
        return stage_decay**distance

    return jax.tree.map_with_path(factor, params)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns the names in the path of a parameter, such as ("conv1", "kernel")."""
    return tuple(entry.key for entry in path)


def make_optimizer(
    schedule: optax.Schedule,
    l2: float,
    *,
    name: str = "adam",
    momentum: float = 0.9,
    l2_mask: Callable[[PyTree], PyTree] = kernel_mask,
    weight_decay: float = 0.0,
    factors: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Returns an optimizer for the objective loss + l2 / 2 * sum(kernel ** 2).

    "adam" is Adam (Kingma and Ba 2015); "adamw" is another name for it, because the weight decay
    makes it AdamW. "sgd" is gradient descent with momentum, and "lion" is Lion (Chen et al. 2023).
    The gradient of the penalty is included in the moments, as if the penalty were a term of the
    loss, because the project's specification prescribes an L2 penalty. The decoupled weight decay
    (Loshchilov and Hutter 2019) is not included in the moments.

    Args:
      schedule: A function from the number of steps taken to the learning rate.
      l2: The weight of the penalty, 0 or more.
      name: One of `schema.OPTIMIZERS`.
      momentum: The part of the previous step that "sgd" repeats, in [0, 1).
      l2_mask: A function from the parameters to a tree with True for each parameter that has
        the penalty.
      weight_decay: The weight of the decoupled decay, 0 or more: a step subtracts
        learning rate * weight_decay * kernel from each kernel.
      factors: A function from the parameters to a tree with a factor of the learning rate for
        each parameter, or None for a factor of 1.
    """
    steps = [
        {
            "adam": optax.scale_by_adam,
            "adamw": optax.scale_by_adam,
            "sgd": functools.partial(optax.trace, momentum),
            "lion": functools.partial(optax.scale_by_lion, **_LION),
        }[name]()
    ]
    if weight_decay:
        steps.append(optax.add_decayed_weights(weight_decay, mask=kernel_mask))
    if factors is not None:
        steps.append(_scale_by(factors))
    steps.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(optax.add_decayed_weights(l2, mask=l2_mask), optax.chain(*steps))


def _scale_by(factors: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """Returns the transformation that multiplies each update by the factor of its parameter."""

    def scale(updates: PyTree, params: PyTree | None) -> PyTree:
        del params
        return jax.tree.map(jnp.multiply, updates, factors(updates))

    return optax.stateless(scale)
