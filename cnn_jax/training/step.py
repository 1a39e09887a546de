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
from cnn_jax.data.preprocessing import Preprocessing, normalize
from cnn_jax.models import forward
from cnn_jax.training.loss import cross_entropy, example_weights
from cnn_jax.training.metrics import Metrics

# Purposes of random keys: `fold_in(key(seed), purpose)`, then `fold_in(., step)`.
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
      batch_stats: The statistics that BatchNorm uses in inference, float32; empty without
        BatchNorm. No training step changes them: see `update_statistics`.
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
        enough. The gradient is that of the whole batch, to rounding, except that
        BatchNorm normalises each part by the part's own statistics, and that dropout and
        mixing draw other numbers, because each part is mixed within itself.

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
        (_, metrics), grads = gradient(state.params, state.batch_stats, batch, keys)
    else:
        parts = jax.tree.map(functools.partial(_split, parts=accumulation_steps), dict(batch))
        split_key = functools.partial(jax.random.split, num=accumulation_steps)
        keys_of_parts = jax.tree.map(split_key, keys)
        grads, metrics = _accumulate(gradient, state, parts, keys_of_parts)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=state.batch_stats,
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
) -> tuple[Array, Metrics]:
    """The sum of a batch's losses divided by `count`, and the batch's metrics."""
    images = batch["image"]
    if "matrix" in batch:
        images = augment.apply_on_device(images, batch["matrix"], batch["contrast"])
    images, labels, mask = normalize(images, preprocessing), batch["label"], batch["mask"]
    targets = labels
    if "mix" in keys:
        one_hot = jax.nn.one_hot(labels, model.num_classes)
        images, targets = mix.mix_batch(keys["mix"], images, one_hot, mask, mixing)
        labels = jnp.argmax(targets, axis=-1)
    logits, _ = model.apply(
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
    return loss, Metrics.from_logits(logits, labels, mask)


def _split(rows: Array, parts: int) -> Array:
    """[B, ...] as [parts, B / parts, ...]: every device keeps the rows that it has."""
    return jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0)


def _accumulate(
    gradient: Callable[..., Any],
    state: TrainState,
    parts: Batch,
    keys: Mapping[str, Key[Array, " parts"]],
) -> tuple[PyTree, Metrics]:
    """The sums of gradients and metrics over the parts of a batch."""

    def add(sums: PyTree, part: tuple[Batch, Keys]) -> tuple[PyTree, None]:
        (_, metrics), grads = gradient(state.params, state.batch_stats, *part)
        return jax.tree.map(jnp.add, sums, (grads, metrics)), None

    first = jax.tree.map(lambda rows: rows[0], (parts, keys))
    (_, metrics), grads = jax.eval_shape(gradient, state.params, state.batch_stats, *first)
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), (grads, metrics))
    return jax.lax.scan(add, zeros, (parts, keys))[0]


@flax.struct.dataclass
class Statistics:
    """BatchNorm's means and variances over the batches seen so far.

    Attributes:
      batches: float32 [], the number of batches.
      batch_stats: {"mean", "var"} of each layer, float32 [channel].
    """

    batches: PyTree
    batch_stats: PyTree

    @classmethod
    def empty(cls, batch_stats: PyTree) -> "Statistics":
        """Statistics of no batch, in a tree of the same shapes as `batch_stats`."""
        return cls(jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, batch_stats))


def update_statistics(
    statistics: Statistics,
    variables: Mapping[str, Any],
    batch: Batch,
    *,
    model: nn.Module,
    preprocessing: Preprocessing,
) -> Statistics:
    """Adds one batch to the statistics that BatchNorm uses in inference.

    All batches go through the same parameters, so that the result is the mean and the
    variance of each channel over their images ("precise BatchNorm", Wu and Johnson 2021,
    section 3). A running average over training steps would be of parameters that have
    changed since, and of its own initial values.

    Args:
      statistics: Statistics of the batches before.
      variables: {"params", "batch_stats"} of the network.
      batch: "image", as in `train_step`; of the same size as the batches before.
      model: The network.
      preprocessing: How grey levels are normalised.
    """
    _, updates = model.apply(
        variables,
        normalize(batch["image"], preprocessing),
        train=True,
        rngs={"dropout": jax.random.key(0)},
        mutable=["batch_stats"],
    )
    count = statistics.batches + 1

    def merge(before: PyTree, new: PyTree) -> PyTree:
        if "mean" not in new:
            return {name: merge(before[name], new[name]) for name in new}
        distance = new["mean"] - before["mean"]
        mean = before["mean"] + distance / count
        # The variance of all pixels: within batches, and between the batches' means
        # (Welford 1962).
        spread = new["var"] + distance * (new["mean"] - mean)
        return {"mean": mean, "var": before["var"] + (spread - before["var"]) / count}

    return Statistics(count, merge(statistics.batch_stats, updates.get("batch_stats", {})))


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
