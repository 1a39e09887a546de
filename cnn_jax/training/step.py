"""Pure functions for the training step, the evaluation step and BatchNorm's statistics."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree, UInt32

from cnn_jax.data import augment, mix
from cnn_jax.data.mix import NO_MIXING, Mixing
from cnn_jax.data.preprocessing import Preprocessing, normalize
from cnn_jax.models.network import Network, forward
from cnn_jax.training.loss import cross_entropy, example_weights
from cnn_jax.training.metrics import Metrics

# The purposes of PRNG keys. The key of a step is `fold_in(fold_in(key(seed), purpose), step)`.
INIT, DROPOUT, MIX = 0, 1, 2

Batch = Mapping[str, Array]
# PRNG keys by purpose: "dropout", and "mix" if images are mixed.
Keys = Mapping[str, PRNGKeyArray]
# A function from the inputs and the logits of the network, and other arrays such as the weights of
# teachers, to a loss for each example.
ExtraLoss = Callable[[Array, Array, PyTree], Float[Array, " batch"]]


@flax.struct.dataclass
class TrainState:
    """The arrays that a training step reads and updates.

    The fields have the general type `PyTree`, because JAX also builds trees of shapes and trees
    of shardings from this class.

    Attributes:
      step: int32 [], the number of steps taken.
      params: The network's parameters, float32.
      batch_stats: The statistics that BatchNorm uses in inference, float32; empty without
        BatchNorm. No training step changes the statistics; see `update_statistics`.
      opt_state: The optimizer's state.
    """

    step: PyTree
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree

    @property
    def variables(self) -> dict[str, PyTree]:
        """The variables for inference, in the form that `model.apply` expects."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def with_params(self, params: PyTree) -> "TrainState":
        """Returns a copy with other parameters."""
        return dataclasses.replace(self, params=params)


# This is a subclass, because checkpoints of runs without an average have no field for it.
@flax.struct.dataclass
class AveragedState(TrainState):
    """A train state with a moving average of the parameters, which inference uses.

    Attributes:
      average: The average, float32; see `TrainStep.ema`.
    """

    average: PyTree

    @property
    def variables(self) -> dict[str, PyTree]:
        return {"params": self.average, "batch_stats": self.batch_stats}

    def with_params(self, params: PyTree) -> "AveragedState":
        # The average is a copy, because a buffer of a donated state must not occur twice in it.
        return dataclasses.replace(self, params=params, average=jax.tree.map(jnp.copy, params))


def random_key(seed: int | UInt32[Array, ""], purpose: int) -> PRNGKeyArray:
    """Returns the PRNG key for one purpose: `INIT`, `DROPOUT` or `MIX`."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A pure function that takes one optimizer step: (state, batch) -> (state, metrics).

    Attributes:
      model: The network. The random numbers of its dropout depend on `seed` and the step.
      optimizer: The gradient transformation.
      preprocessing: The mean and the standard deviation of the normalisation.
      seed: The seed of the run; an array, uint32 [], if the seed is an argument of a program.
      label_smoothing: The part of the target probability that is spread evenly over all
        classes, in [0, 1).
      class_weights: A factor for the losses of each class; None for a factor of 1. The
        metrics are not weighted.
      mixing: How each image and its label are mixed with another image of the batch, after
        augmentation. The random numbers depend on `seed` and the step.
      accumulation_steps: The number of parts of a batch, a divisor of B. The parts are
        computed one after the other, so that a step needs the memory of one part only. The
        gradient equals the gradient of the whole batch up to rounding, with two exceptions:
        BatchNorm normalises each part with the statistics of that part, and dropout and
        mixing draw different random numbers (images are mixed within a part).
      is_trainable: A function that takes the path of a parameter, such as "conv1/kernel", and
        returns whether the parameter is trained; None trains all parameters. The optimizer has no
        state for the parameters that are not trained.
      ema: The largest decay of the moving average of the parameters, in [0, 1); 0 for no average.
        The average is used for inference only. Step t multiplies the average by
        min(ema, (1 + t) / (10 + t)), so that the initial parameters are soon forgotten (as in
        TensorFlow's `ExponentialMovingAverage` with `num_updates`).
      extra_loss: An additional term of the loss, for example for distillation: a function
        of the network's inputs (augmented, normalised, mixed), of the logits, float32
        [B, C], and of the argument `extra` of a step, that returns float32 [B].
      label_weight: The factor of the loss without the additional term, for `extra_loss` only.
    """

    model: Network
    optimizer: optax.GradientTransformation
    preprocessing: Preprocessing
    seed: int | Array = 0
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    mixing: Mixing = NO_MIXING
    accumulation_steps: int = 1
    is_trainable: Callable[[str], bool] | None = None
    ema: float = 0.0
    extra_loss: ExtraLoss | None = None
    label_weight: float = 1.0

    def init_state(self) -> TrainState:
        """Returns the state before the first step, with random parameters that depend on `seed`."""
        images = jnp.zeros((1, *self.preprocessing.image_size, 3))
        variables = self.model.init(random_key(self.seed, INIT), images)
        params = variables["params"]
        arrays = {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "batch_stats": variables.get("batch_stats", {}),
            "opt_state": self._masked_optimizer.init(params),
        }
        return AveragedState(**arrays, average=params) if self.ema else TrainState(**arrays)

    def __call__(
        self, state: TrainState, batch: Batch, extra: PyTree = None
    ) -> tuple[TrainState, Metrics]:
        """Takes one optimizer step on one batch.

        Args:
          state: The state before the step.
          batch: "image" uint8 [B, H, W, 3], "label" int32 [B], "mask" bool [B]; also the
            arrays of `augment.draw` if this step augments the images.
          extra: The last argument of `extra_loss`.

        Returns:
          The state after the step, and the metrics of this batch in training mode, with
          dropout. The class of a mixed example is the class with the larger weight.
        """
        # The loss is the mean over the examples whose mask is True.
        count = jnp.maximum(jnp.sum(batch["mask"]), 1)
        loss = functools.partial(self._loss, count=count, extra=extra)
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
        params = optax.apply_updates(state.params, updates)
        changes = {"step": state.step + 1, "params": params, "opt_state": opt_state}
        if isinstance(state, AveragedState):
            decay = jnp.minimum(self.ema, (1 + state.step) / (10 + state.step))
            changes["average"] = optax.incremental_update(params, state.average, 1 - decay)
        return dataclasses.replace(state, **changes), metrics

    @property
    def _masked_optimizer(self) -> optax.GradientTransformation:
        """An optimizer that updates only the trainable parameters."""
        if self.is_trainable is None:
            return self.optimizer
        return optax.partition(
            {True: self.optimizer, False: optax.set_to_zero()}, self._trainable_mask
        )

    def _trainable_mask(self, params: PyTree) -> PyTree:
        """Returns a tree of booleans: True for the parameters that are trained."""
        is_trainable = self.is_trainable
        assert is_trainable is not None
        return jax.tree.map_with_path(
            lambda path, _: is_trainable("/".join(entry.key for entry in path)), params
        )

    def _keys(self, step: Array) -> Keys:
        """Returns the PRNG keys of one step, as a dictionary from purpose to key."""
        purposes = {"dropout": DROPOUT}
        if not self.mixing.is_identity():
            purposes["mix"] = MIX
        return {
            name: jax.random.fold_in(random_key(self.seed, purpose), step)
            for name, purpose in purposes.items()
        }

    def _loss(
        self,
        params: PyTree,
        batch_stats: PyTree,
        batch: Batch,
        keys: Keys,
        *,
        count: Array,
        extra: PyTree,
    ) -> tuple[Array, Metrics]:
        """Returns the batch's loss, sum(losses) / count, and the batch's metrics."""
        # With stop_gradient, XLA removes the backward pass of parameters that are not trained.
        if self.is_trainable is not None:
            params = jax.tree.map(
                lambda leaf, is_trained: leaf if is_trained else jax.lax.stop_gradient(leaf),
                params,
                self._trainable_mask(params),
            )
        images = batch["image"]
        if draws := augment.draws_in(batch):
            images = augment.apply_on_device(images, **draws)
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
            losses = self.label_weight * losses + self.extra_loss(images, logits, extra)
        loss = jnp.sum(jnp.where(mask, losses, 0)) / count
        return loss, Metrics.from_logits(logits, labels, mask)


def _split(rows: Array, parts: int) -> Array:
    """Reshapes [B, ...] to [parts, B / parts, ...] without moving rows between devices."""
    return jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0)


def _accumulate(
    gradient: Callable[..., Any],
    state: TrainState,
    parts: Batch,
    keys: Mapping[str, Key[Array, " parts"]],
) -> tuple[PyTree, Metrics]:
    """Returns the gradients and the metrics of a batch, summed over its parts (microbatches)."""

    def add(sums: PyTree, part: tuple[Batch, Keys]) -> tuple[PyTree, None]:
        (_, metrics), grads = gradient(state.params, state.batch_stats, *part)
        return jax.tree.map(jnp.add, sums, (grads, metrics)), None

    first = jax.tree.map(lambda rows: rows[0], (parts, keys))
    (_, metrics), grads = jax.eval_shape(gradient, state.params, state.batch_stats, *first)
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), (grads, metrics))
    return jax.lax.scan(add, zeros, (parts, keys))[0]


@flax.struct.dataclass
class Statistics:
    """The means and variances of the BatchNorm layers over a number of batches.

    Attributes:
      batches: float32 [], the number of batches.
      batch_stats: {"mean", "var"} of each layer, float32 [channel].
    """

    batches: PyTree
    batch_stats: PyTree

    @classmethod
    def empty(cls, batch_stats: PyTree) -> "Statistics":
        """Returns zero-initialised batch statistics with the shapes of `batch_stats`."""
        return cls(jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, batch_stats))


def update_statistics(
    statistics: Statistics,
    variables: Mapping[str, Any],
    batch: Batch,
    *,
    model: Network,
    preprocessing: Preprocessing,
) -> Statistics:
    """Adds one batch to the statistics that BatchNorm uses in inference.

    The parameters are the same for all batches, so that the result is the mean and the
    variance of each channel over all images ("precise BatchNorm", Wu and Johnson 2021,
    section 3). A running average over training steps would also contain the statistics of
    earlier parameters and its own initial values.

    Args:
      statistics: The statistics of the previous batches.
      variables: {"params", "batch_stats"} of the network.
      batch: "image" uint8 [B, H, W, 3]. All batches must have the same size.
      model: The network.
      preprocessing: The mean and the standard deviation of the normalisation.

    Returns:
      The statistics of the previous batches and this batch.
    """
    _, updates = model.apply(
        variables,
        normalize(batch["image"], preprocessing),
        train=True,
        rngs={"dropout": jax.random.key(0)},
        mutable=["batch_stats"],
    )
    count = statistics.batches + 1

    def merge(old: PyTree, new: PyTree) -> PyTree:
        if "mean" not in new:
            return {name: merge(old[name], new[name]) for name in new}
        distance = new["mean"] - old["mean"]
        mean = old["mean"] + distance / count
        # The variance over all pixels is the variance within batches plus the variance of the
        # batch means (Welford 1962).
        spread = new["var"] + distance * (new["mean"] - mean)
        return {"mean": mean, "var": old["var"] + (spread - old["var"]) / count}

    return Statistics(count, merge(statistics.batch_stats, updates.get("batch_stats", {})))


def eval_step(
    variables: Mapping[str, Any],
    batch: Batch,
    *,
    model: Network,
    preprocessing: Preprocessing,
) -> Metrics:
    """Returns the metrics of one batch in inference mode.

    Args:
      variables: {"params", "batch_stats"} of the network.
      batch: "image" uint8 [B, H, W, 3], "label" int32 [B], "mask" bool [B].
      model: The network.
      preprocessing: The mean and the standard deviation of the normalisation.
    """
    logits = forward(model, variables, batch["image"], preprocessing)
    return Metrics.from_logits(logits, batch["label"], batch["mask"])
