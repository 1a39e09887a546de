"""One training step and one evaluation step, as pure functions."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from cnn_jax.data import augment
from cnn_jax.loss import cross_entropy
from cnn_jax.metrics import Metrics
from cnn_jax.models import forward
from cnn_jax.preprocessing import Preprocessing, normalize

# What a random key is for: `fold_in(key(seed), purpose)`, then `fold_in(., step)`.
INIT, DROPOUT = 0, 1

Batch = Mapping[str, Array]


@flax.struct.dataclass
class TrainState:
    """All that a step changes: arrays only.

    The fields are typed loosely because JAX also builds trees of shapes,
    shardings and the like from this class.

    Attributes:
      step: int32 [], steps taken.
      params: The network's parameters, float32.
      batch_stats: The running statistics of BatchNorm, float32; empty without it.
      opt_state: The optimizer's state.
    """

    step: PyTree
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree

    @property
    def variables(self) -> dict[str, PyTree]:
        """What the model is applied with."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def random_key(seed: int, purpose: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(seed), purpose)


def init_state(
    key: PRNGKeyArray,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: tuple[int, int],
) -> TrainState:
    """The state before the first step."""
    variables = model.init(key, jnp.zeros((1, *image_size, 3)))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    preprocessing: Preprocessing,
    label_smoothing: float,
    class_weights: Sequence[float] | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on one batch.

    Args:
      state: The state before the step.
      batch: "image" uint8 [B, H, W, 3], "label" int32 [B], "mask" bool [B] and,
        if the images are to be augmented here, "matrix" and "contrast" of
        `augment.draw`.
      model: The network; its dropout is drawn from `seed` and the step.
      optimizer: Gradient transformation.
      seed: Seed of the run.
      preprocessing: How grey levels are normalised.
      label_smoothing: In [0, 1).
      class_weights: By what the loss of each class's examples is multiplied; None
        for 1. The metrics are not weighted.

    Returns:
      The state after the step and the metrics of this batch, as the network in
      training mode, with dropout, saw it.
    """
    images = batch["image"]
    if "matrix" in batch:
        images = augment.apply_on_device(images, batch["matrix"], batch["contrast"])
    images = normalize(images, preprocessing)
    labels, mask = batch["label"], batch["mask"]

    dropout_key = jax.random.fold_in(random_key(seed, DROPOUT), state.step)

    def loss_fn(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
        logits, updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        losses = cross_entropy(logits, labels, label_smoothing)
        if class_weights is not None:
            losses *= jnp.array(class_weights, jnp.float32)[labels]
        loss = jnp.sum(jnp.where(mask, losses, 0)) / jnp.maximum(jnp.sum(mask), 1)
        return loss, (logits, updates.get("batch_stats", {}))

    (_, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return new_state, Metrics.from_logits(logits, labels, mask)


def eval_step(
    variables: Mapping[str, Any],
    batch: Batch,
    *,
    model: nn.Module,
    preprocessing: Preprocessing,
) -> Metrics:
    """The metrics of one batch, "image", "label" and "mask" as in `train_step`."""
    logits = forward(model, variables, batch["image"], preprocessing)
    return Metrics.from_logits(logits, batch["label"], batch["mask"])
