"""One training step and one evaluation step, as pure functions."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from cnn_jax.data import augment, mix
from cnn_jax.data.mix import NO_MIXING, Mixing
from cnn_jax.loss import cross_entropy, example_weights
from cnn_jax.metrics import Metrics
from cnn_jax.models import forward
from cnn_jax.preprocessing import Preprocessing, normalize

# What a random key is for: `fold_in(key(seed), purpose)`, then `fold_in(., step)`.
INIT, DROPOUT, MIX = 0, 1, 2

Batch = Mapping[str, Array]
# By what they are for: "dropout", and "mix" if images are mixed.
Keys = Mapping[str, PRNGKeyArray]


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
    mixing: Mixing = NO_MIXING,
    accumulation_steps: int = 1,
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
      mixing: How images and labels are mixed with others of the batch, after
        augmentation; drawn from `seed` and the step.
      accumulation_steps: In how many parts, which divide B, the batch goes through
        the network, one after the other, so that the memory for one part is
        enough. The gradient is that of the whole batch, to rounding, but for two
        things: BatchNorm normalises each part by its own statistics, and moves its
        running ones once for each part; and dropout and mixing draw otherwise, each
        part being mixed within itself.

    Returns:
      The state after the step and the metrics of this batch, as the network in
      training mode, with dropout, saw it: of a mixed example, the mixed image against
      the class with the largest share.
    """
    loss = functools.partial(
        _loss,
        # Examples without a mask add nothing, also to what the sum is divided by.
        count=jnp.maximum(jnp.sum(batch["mask"]), 1),
        model=model,
        preprocessing=preprocessing,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        mixing=mixing,
    )
    gradient = jax.value_and_grad(loss, has_aux=True)
    keys = _keys(seed, state.step, mixing)
    if accumulation_steps == 1:
        (_, (batch_stats, metrics)), grads = gradient(state.params, state.batch_stats, batch, keys)
    else:
        parts = jax.tree.map(functools.partial(_split, parts=accumulation_steps), dict(batch))
        split_key = functools.partial(jax.random.split, num=accumulation_steps)
        keys_of_parts = jax.tree.map(split_key, keys)
        grads, batch_stats, metrics = _accumulate(gradient, state, parts, keys_of_parts)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return new_state, metrics


def _keys(seed: int, step: Array, mixing: Mixing) -> Keys:
    """The random keys of one step."""
    purposes = {"dropout": DROPOUT}
    if not mixing.is_identity():
        purposes["mix"] = MIX
    return {
        name: jax.random.fold_in(random_key(seed, purpose), step)
        for name, purpose in purposes.items()
    }


def _loss(
    params: PyTree,
    batch_stats: PyTree,
    batch: Batch,
    keys: Keys,
    *,
    count: Array,
    model: nn.Module,
    preprocessing: Preprocessing,
    label_smoothing: float,
    class_weights: Sequence[float] | None,
    mixing: Mixing,
) -> tuple[Array, tuple[PyTree, Metrics]]:
    """The sum of a batch's losses over `count`; and new statistics, and metrics."""
    images = batch["image"]
    if "matrix" in batch:
        images = augment.apply_on_device(images, batch["matrix"], batch["contrast"])
    images, labels, mask = normalize(images, preprocessing), batch["label"], batch["mask"]
    targets = labels
    if "mix" in keys:
        one_hot = jax.nn.one_hot(labels, model.num_classes)
        images, targets = mix.mix_batch(keys["mix"], images, one_hot, mask, mixing)
        labels = jnp.argmax(targets, axis=-1)
    logits, updates = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        rngs={"dropout": keys["dropout"]},
        mutable=["batch_stats"],
    )
    losses = cross_entropy(logits, targets, label_smoothing)
    if class_weights is not None:
        losses *= example_weights(jnp.array(class_weights, jnp.float32), targets)
    loss = jnp.sum(jnp.where(mask, losses, 0)) / count
    return loss, (updates.get("batch_stats", {}), Metrics.from_logits(logits, labels, mask))


def _split(rows: Array, parts: int) -> Array:
    """[B, ...] as [parts, B / parts, ...]: every device keeps the rows that it has."""
    return jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0)


def _accumulate(
    gradient: Callable[..., Any],
    state: TrainState,
    parts: Batch,
    keys: Mapping[str, Key[Array, " parts"]],
) -> tuple[PyTree, PyTree, Metrics]:
    """Sums gradients and metrics over the parts of a batch; statistics pass through them."""

    def add(carry: PyTree, part: tuple[Batch, Keys]) -> tuple[PyTree, None]:
        grads, batch_stats, metrics = carry
        (_, (batch_stats, more_metrics)), more_grads = gradient(state.params, batch_stats, *part)
        grads = jax.tree.map(jnp.add, grads, more_grads)
        return (grads, batch_stats, metrics.merge(more_metrics)), None

    first = jax.tree.map(lambda rows: rows[0], (parts, keys))
    (_, (_, metrics)), grads = jax.eval_shape(gradient, state.params, state.batch_stats, *first)
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), (grads, metrics))
    start = (zeros[0], state.batch_stats, zeros[1])
    return jax.lax.scan(add, start, (parts, keys))[0]


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
