"""One training step and one evaluation step, as pure functions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree

from cnn_jax.data import augment, mix
from cnn_jax.data.mix import NO_MIXING, Mixing
from cnn_jax.data.preprocessing import Preprocessing, normalize
from cnn_jax.models.network import forward
from cnn_jax.training.loss import cross_entropy, example_weights
from cnn_jax.training.metrics import Metrics

# Purposes of random keys: `fold_in(key(seed), purpose)`, then `fold_in(., step)`.
INIT, DROPOUT, MIX = 0, 1, 2

Batch = Mapping[str, Array]
# PRNG keys by purpose: "dropout", and "mix" if images are mixed.
Keys = Mapping[str, PRNGKeyArray]
# (inputs of the network, its logits) -> a loss for each example.
ExtraLoss = Callable[[Array, Array], Float[Array, " batch"]]


@flax.struct.dataclass
class TrainState:
    """All that a step changes: arrays only.

    The fields are typed loosely because JAX also builds trees of shapes and of
    shardings from this class.

    Attributes:
      step: int32 [], the number of steps taken.
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
        """The variables that the model is applied with."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def random_key(seed: int, purpose: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(seed), purpose)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A pure function that takes one optimizer step: (state, batch) -> (state, metrics).

    Attributes:
      model: The network; its dropout is drawn from `seed` and the step.
      optimizer: The gradient transformation.
      preprocessing: How grey levels are normalised.
      seed: The seed of the run.
      label_smoothing: The probability that the target spreads over all classes, in [0, 1).
      class_weights: The factor of each class's losses; None for 1. The metrics are not
        weighted.
      mixing: How images and labels are mixed with others of the batch, after
        augmentation; drawn from `seed` and the step.
      accumulation_steps: The number of parts, a divisor of B, that go through the network
        one after the other, so that the memory for one part is enough. The gradient is
        that of the whole batch, to rounding, except that BatchNorm normalises each part by
        the part's own statistics, and that dropout and mixing draw other numbers, because
        each part is mixed within itself.
      is_trainable: Tells by its path, such as "conv1/kernel", whether a parameter is
        trained; None for all of them. The optimizer has no state for the others.
      extra_loss: A further term of the loss, for example of distillation. It gets the
        inputs of the network (augmented, normalised, mixed) and the logits, float32 [B, C],
        and returns float32 [B].
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    preprocessing: Preprocessing
    seed: int = 0
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    mixing: Mixing = NO_MIXING
    accumulation_steps: int = 1
    is_trainable: Callable[[str], bool] | None = None
    extra_loss: ExtraLoss | None = None

    def init_state(self) -> TrainState:
        """The state before the first step, whose parameters are drawn from `seed`."""
        images = jnp.zeros((1, *self.preprocessing.image_size, 3))
        variables = self.model.init(random_key(self.seed, INIT), images)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=self._masked_optimizer.init(params),
        )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Takes one optimizer step on one batch.

        Args:
          state: The state before the step.
          batch: "image" uint8 [B, H, W, 3], "label" int32 [B], "mask" bool [B] and, if the
            images are to be augmented here, "matrix" and "contrast" of `augment.draw`.

        Returns:
          The state after the step, and the metrics of this batch in training mode, with
          dropout. A mixed example counts as the class with the largest weight.
        """
        # Examples without a mask add nothing to the sum, and do not count in its divisor.
        loss = functools.partial(self._loss, count=jnp.maximum(jnp.sum(batch["mask"]), 1))
        gradient = jax.value_and_grad(loss, has_aux=True)
        keys = self._keys(state.step)
        if self.accumulation_steps == 1:
            (_, metrics), grads = gradient(state.params, state.batch_stats, batch, keys)
        else:
            split_rows = functools.partial(_split, parts=self.accumulation_steps)
            split_key = functools.partial(jax.random.split, num=self.accumulation_steps)
            grads, metrics = _accumulate(
                gradient,
                state,
                jax.tree.map(split_rows, dict(batch)),
                jax.tree.map(split_key, keys),
            )
        updates, opt_state = self._masked_optimizer.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=state.batch_stats,
            opt_state=opt_state,
        )
        return new_state, metrics

    @property
    def _masked_optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the trainable parameters, which leaves the others as they are."""
        if self.is_trainable is None:
            return self.optimizer
        return optax.partition(
            {True: self.optimizer, False: optax.set_to_zero()}, self._trainable_mask
        )

    def _trainable_mask(self, params: PyTree) -> PyTree:
        """Whether each parameter is trained."""
        is_trainable = self.is_trainable
        assert is_trainable is not None
        return jax.tree.map_with_path(
            lambda path, _: is_trainable("/".join(entry.key for entry in path)), params
        )

    def _keys(self, step: Array) -> Keys:
        """The random keys of one step."""
        purposes = {"dropout": DROPOUT}
        if not self.mixing.is_identity():
            purposes["mix"] = MIX
        return {
            name: jax.random.fold_in(random_key(self.seed, purpose), step)
            for name, purpose in purposes.items()
        }

    def _loss(
        self, params: PyTree, batch_stats: PyTree, batch: Batch, keys: Keys, *, count: Array
    ) -> tuple[Array, Metrics]:
        """The sum of a batch's losses divided by `count`, and the batch's metrics."""
        if self.is_trainable is not None:  # XLA then computes no gradients of the others.
            params = jax.tree.map(
                lambda leaf, is_trained: leaf if is_trained else jax.lax.stop_gradient(leaf),
                params,
                self._trainable_mask(params),
            )
        images = batch["image"]
        if "matrix" in batch:
            images = augment.apply_on_device(images, batch["matrix"], batch["contrast"])
        images = normalize(images, self.preprocessing)
        labels, mask = batch["label"], batch["mask"]
        targets = labels
        if "mix" in keys:
            one_hot = jax.nn.one_hot(labels, self.model.num_classes)
            images, targets = mix.mix_batch(keys["mix"], images, one_hot, mask, self.mixing)
            labels = jnp.argmax(targets, axis=-1)
        logits, _ = self.model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            rngs={"dropout": keys["dropout"]},
            mutable=["batch_stats"],
        )
        losses = cross_entropy(logits, targets, self.label_smoothing)
        if self.class_weights is not None:
            losses *= example_weights(jnp.array(self.class_weights, jnp.float32), targets)
        if self.extra_loss is not None:
            losses += self.extra_loss(images, logits)
        loss = jnp.sum(jnp.where(mask, losses, 0)) / count
        return loss, Metrics.from_logits(logits, labels, mask)


def _split(rows: Array, parts: int) -> Array:
    """[B, ...] as [parts, B / parts, ...], so that every device keeps its rows."""
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
    """BatchNorm's means and variances over the batches seen until now.

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
    section 3). A running average over training steps would mix statistics of parameters
    that have changed since, and its own initial values.

    Args:
      statistics: Statistics of the batches before.
      variables: {"params", "batch_stats"} of the network.
      batch: "image", as in `TrainStep`; of the same size as the batches before.
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
    """The metrics of one batch: "image", "label" and "mask" as in `TrainStep`."""
    logits = forward(model, variables, batch["image"], preprocessing)
    return Metrics.from_logits(logits, batch["label"], batch["mask"])
