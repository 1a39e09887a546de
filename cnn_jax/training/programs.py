"""The jitted functions of a run."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PyTree, UInt8

from cnn_jax.config.schema import Config
from cnn_jax.data.mix import Mixing
from cnn_jax.data.pipeline import Loader
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.models.network import Backbone, Network, updates_statistics
from cnn_jax.system import runtime
from cnn_jax.training import sharding
from cnn_jax.training.distillation import Distillation
from cnn_jax.training.loss import balanced_weights
from cnn_jax.training.metrics import Metrics
from cnn_jax.training.optimizer import (
    head_kernel_mask,
    kernel_mask,
    learning_rate_factors,
    make_optimizer,
)
from cnn_jax.training.step import Statistics, TrainState, TrainStep, eval_step, update_statistics

# The number of columns of an array of packed images.
_COLUMNS = 128
# The size of the pieces in which the images of a data set are copied to the devices, in bytes.
_PIECE_BYTES = 2**25
# A jitted training function: (state, batch, pixels, extra) -> (state, metrics).
_Training = Callable[[TrainState, Mapping[str, Array], Array | None, PyTree], Any]


def make_programs(
    config: Config,
    model: Network,
    schedule: optax.Schedule,
    preprocessing: Preprocessing,
    class_counts: Int[np.ndarray, " classes"],
    distillation: Distillation | None = None,
    devices: Sequence[Any] | None = None,
) -> "Programs":
    """Returns the jitted functions of a run, which are not compiled yet.

    Args:
      config: The resolved configuration.
      model: The network.
      schedule: The learning rate by step.
      preprocessing: The preprocessing of the images.
      class_counts: The number of training images of each class.
      distillation: The additional term of the loss, or None.
      devices: The devices; by default all devices of all processes.
    """
    train, optimizer = config.train, config.optimizer
    class_weights = None
    if train.balance == "loss":
        class_weights = tuple(balanced_weights(class_counts).tolist())
    head_factor = (optimizer.head_learning_rate or optimizer.learning_rate) / (
        optimizer.learning_rate
    )
    has_factors = optimizer.stage_decay != 1 or head_factor != 1
    step = TrainStep(
        model=model,
        optimizer=make_optimizer(
            schedule,
            optimizer.l2,
            name=optimizer.algorithm,
            momentum=optimizer.momentum,
            # An L2 penalty would pull pretrained weights to zero.
            l2_mask=head_kernel_mask if config.model.get("pretrained") else kernel_mask,
            weight_decay=optimizer.weight_decay,
            factors=(
                functools.partial(
                    learning_rate_factors,
                    model=model,
                    stage_decay=optimizer.stage_decay,
                    head_factor=head_factor,
                )
                if has_factors
                else None
            ),
        ),
        is_trainable=model.is_trained_parameter if train.from_stage else None,
        preprocessing=preprocessing,
        seed=config.seed,
        label_smoothing=train.label_smoothing,
        class_weights=class_weights,
        mixing=Mixing.from_config(config.augment),
        accumulation_steps=train.accumulation_steps,
        ema=train.ema,
        extra_loss=distillation,
        label_weight=1.0 if distillation is None else 1 - distillation.weight,
    )
    return Programs(step, train.batch_size, config.mesh.model, devices)


def default_execution_length(on_device: bool, platform: str) -> int:
    """Returns the number of steps to dispatch together if train.steps_per_execution is 0.

    If the images are on an accelerator, a step may take less time than its dispatch. On a CPU
    a step takes longer than its dispatch.
    """
    return 8 if on_device and platform != "cpu" else 1


class Programs:
    """The jitted functions of a run, with the shardings of their arguments and results.

    Each function is compiled at its first call. The argument `pixels` is the result of
    `send_pixels`: all images of the data set if they are on the devices, else None.

    Attributes:
      layout: The division of batches among the devices.
      init_state: () -> state before the first step.
      empty_metrics: () -> metrics with all sums and counts at zero.
      empty_statistics: () -> BatchNorm's statistics, initialised with zeros.
      train_step: (state, batch, pixels, extra) -> (state, metrics); the state is donated. See
        `TrainStep` for `extra`.
      train_steps: `train_step` for several steps in one execution. The first dimension of each
        array of the batch counts steps; the metrics are sums over all steps.
      update_statistics: (statistics, variables, batch, pixels) -> BatchNorm's statistics,
        updated by one batch; the statistics are donated.
      eval_step: (variables, batch, pixels) -> metrics.
      merge: (metrics, metrics) -> metrics; the first argument is donated.
      is_finite: (state) -> bool [], whether every number is finite.
      gather: (tree) -> the same arrays, replicated on all devices.
      accumulation_steps: The number of parts of a batch that are computed one after the other.
      model: The network.
    """

    def __init__(
        self,
        train_step: TrainStep,
        batch_size: int,
        model_devices: int = 1,
        devices: Sequence[Any] | None = None,
    ):
        """Creates the jitted functions, without compiling them.

        Args:
          train_step: The training step.
          batch_size: The number of examples in a global batch.
          model_devices: The number of devices that share the large parameters (`mesh.model`).
          devices: The devices; by default all devices of all processes.
        """
        num_classes = train_step.model.num_classes
        with_images = functools.partial(
            _with_images, image_size=train_step.preprocessing.image_size
        )
        mesh = sharding.make_mesh(model_devices, devices)
        platform = mesh.devices.flat[0].platform
        self._platform = platform
        self._jit = jit = functools.partial(
            jax.jit, compiler_options=runtime.compiler_options(platform)
        )
        self._step = train_step
        self.model = train_step.model
        self.accumulation_steps = train_step.accumulation_steps
        self._image_size = train_step.preprocessing.image_size
        self.layout = layout = sharding.Layout(mesh, batch_size)
        abstract_state = jax.eval_shape(train_step.init_state)
        self._state_sharding = sharding.split_large(layout.mesh, abstract_state)
        state_sharding = self._state_sharding
        statistics_sharding = Statistics(layout.replicated, state_sharding.batch_stats)

        def add_batch(
            statistics: Statistics,
            variables: PyTree,
            batch: Mapping[str, Array],
            pixels: Array | None,
        ) -> Statistics:
            return update_statistics(
                statistics,
                variables,
                with_images(batch, pixels),
                model=train_step.model,
                preprocessing=train_step.preprocessing,
            )

        def evaluation(
            variables: PyTree, batch: Mapping[str, Array], pixels: Array | None
        ) -> Metrics:
            return eval_step(
                variables,
                with_images(batch, pixels),
                model=train_step.model,
                preprocessing=train_step.preprocessing,
            )

        replicated, batch_sharding = layout.replicated, layout.batch_sharding
        self._jit_seeded()
        self.empty_metrics = jax.jit(
            functools.partial(Metrics.empty, num_classes), out_shardings=replicated
        )
        self.empty_statistics = jax.jit(
            lambda: Statistics.empty(abstract_state.batch_stats), out_shardings=statistics_sharding
        )
        self.update_statistics = jit(
            add_batch,
            donate_argnums=0,
            in_shardings=(
                statistics_sharding,
                state_sharding.variables,
                batch_sharding,
                replicated,
            ),
            out_shardings=statistics_sharding,
        )
        self.eval_step = jit(
            evaluation,
            in_shardings=(state_sharding.variables, batch_sharding, replicated),
            out_shardings=replicated,
        )
        self.merge = jax.jit(Metrics.merge, donate_argnums=0, out_shardings=replicated)
        self.is_finite = jax.jit(_all_finite, out_shardings=replicated)
        self.gather = jax.jit(lambda tree: tree, out_shardings=replicated)

    def _jit_seeded(self) -> None:
        """Creates the jitted functions that depend on the seed of `self._step`."""
        layout, state_sharding = self.layout, self._state_sharding
        # A network that can have pretrained weights has many layers. XLA would need half a minute
        # to optimise the program that draws the random initial weights. These weights are seldom
        # used.
        is_backbone = isinstance(self.model, Backbone)
        quick = runtime.quick_compiler_options(self._platform) if is_backbone else None
        self.init_state = jax.jit(
            self._step.init_state, out_shardings=state_sharding, compiler_options=quick
        )
        training, several = _training_functions(self._step)
        jit_training = functools.partial(
            self._jit, donate_argnums=0, out_shardings=(state_sharding, layout.replicated)
        )
        others = (layout.replicated, layout.replicated)
        self.train_step = jit_training(
            training, in_shardings=(state_sharding, layout.batch_sharding, *others)
        )
        self.train_steps = jit_training(
            several, in_shardings=(state_sharding, layout.stacked_batch_sharding, *others)
        )

    def with_seed(self, seed: int) -> "Programs":
        """Returns the functions of a run that differs only in the seed.

        The functions that do not depend on the seed are shared, so they are compiled once.
        """
        other = copy.copy(self)
        other._step = dataclasses.replace(self._step, seed=seed)
        other._jit_seeded()
        return other

    def member_steps(self, seeds: Sequence[int], *, vectorize: bool) -> Any:
        """Returns a jitted function that trains several networks at once.

        The networks differ only in their seeds. Each of them takes the steps that it would take
        alone, except for rounding.

        Args:
          seeds: The seed of each network.
          vectorize: Whether each operation computes all networks (`jax.vmap`). Otherwise a loop
            computes one network after the other (`jax.lax.map`). On a CPU the loop is faster. For
            a TPU, XLA estimates more cycles and much more memory traffic without the loop.

        Returns:
          (states, batches, pixels, extra) -> (states, metrics), as `train_steps`. The first
          dimension of the states, of the batches and of the metrics counts networks, the second
          dimension of the batches counts steps. The states are donated.
        """

        def all_steps(
            states: TrainState, batches: Mapping[str, Array], pixels: Array | None, extra: PyTree
        ) -> tuple[TrainState, Metrics]:
            def steps(
                member: tuple[Array, TrainState, Mapping[str, Array]],
            ) -> tuple[TrainState, Metrics]:
                seed, state, own_batches = member
                _, several = _training_functions(dataclasses.replace(self._step, seed=seed))
                return several(state, own_batches, pixels, extra)

            members = (jnp.array(seeds, jnp.uint32), states, batches)
            return jax.vmap(steps)(members) if vectorize else jax.lax.map(steps, members)

        return self._jit(
            all_steps,
            donate_argnums=0,
            out_shardings=self.layout.replicated,
        )

    @functools.cached_property
    def updates_statistics(self) -> bool:
        """Whether training changes BatchNorm's statistics."""
        return updates_statistics(self.model, self._image_size)

    def send_pixels(self, loader: Loader) -> jax.Array | None:
        """Copies the images of the whole data set to all devices, for the argument `pixels`.

        The images are read from their files in pieces, because the memory of the host may be
        smaller than the memory of the devices.

        Returns:
          The images in the form of `pack`; None if the pixels are not kept on the devices.
        """
        pixels = loader.pixels
        if not loader.on_device or pixels is None:
            return None

        count, replicated = len(pixels), self.layout.replicated
        size = min(max(_PIECE_BYTES * count // pixels.nbytes, 1), count)
        shape = (count, *pack(pixels[np.arange(1)]).shape[1:])
        packed = jax.jit(lambda: jnp.zeros(shape, jnp.uint8), out_shardings=replicated)()
        insert = jax.jit(
            functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0),
            donate_argnums=0,
            out_shardings=replicated,
        )
        # All pieces have the same size, so that `insert` is compiled once.
        for start in (*range(0, count - size, size), count - size):
            piece = self.layout.to_all_devices(pack(pixels[np.arange(start, start + size)]))
            # Wait, so that the host's memory has only one piece at a time.
            packed = insert(packed, piece, start).block_until_ready()
        return packed

    def send(self, batches: Sequence[Mapping[str, np.ndarray]]) -> tuple[Any, dict[str, jax.Array]]:
        """Copies batches to the devices; selects the training function for one or several batches.

        Args:
          batches: One or more batches, with the rows that this process loads.

        Returns:
          `train_step` or `train_steps`, and the arrays for its argument `batch`.
        """
        if len(batches) == 1:
            return self.train_step, self.layout.to_devices(batches[0])
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        return self.train_steps, self.layout.to_devices(stacked, stacked=1)


def pack(pixels: UInt8[np.ndarray, "n height width 3"]) -> UInt8[np.ndarray, "n rows 128"]:
    """Reshapes images to rows of 128 bytes, padded with zeros at the end of each image.

    A TPU stores arrays in tiles of 128 columns. If the last dimension of the data set were the
    three colours, each execution of the training program would copy the whole data set.
    """
    flat = pixels.reshape(len(pixels), -1)
    if padding := -flat.shape[1] % _COLUMNS:
        flat = np.pad(flat, ((0, 0), (0, padding)))
    return flat.reshape(len(pixels), -1, _COLUMNS)


def _training_functions(train_step: TrainStep) -> tuple[_Training, _Training]:
    """Returns the functions for one training step and for several steps, before compilation."""
    with_images = functools.partial(_with_images, image_size=train_step.preprocessing.image_size)
    num_classes = train_step.model.num_classes

    def training(
        state: TrainState, batch: Mapping[str, Array], pixels: Array | None, extra: PyTree
    ) -> tuple[TrainState, Metrics]:
        return train_step(state, with_images(batch, pixels), extra)

    def several(
        state: TrainState, batches: Mapping[str, Array], pixels: Array | None, extra: PyTree
    ) -> tuple[TrainState, Metrics]:
        def step(
            carry: tuple[TrainState, Metrics], batch: Mapping[str, Array]
        ) -> tuple[tuple[TrainState, Metrics], None]:
            state, totals = carry
            state, metrics = training(state, batch, pixels, extra)
            return (state, totals.merge(metrics)), None

        return jax.lax.scan(step, (state, Metrics.empty(num_classes)), batches)[0]

    return training, several


def _with_images(
    batch: Mapping[str, Array], pixels: Array | None, image_size: tuple[int, int]
) -> Mapping[str, Array]:
    """Adds images from `pixels` to a batch; returns the batch unchanged if `pixels` is None.

    Args:
      batch: A batch with "row", the positions of its images in `pixels`.
      pixels: All images in the form of `pack`, or None.
      image_size: The height and the width of the images.
    """
    if pixels is None:
        return batch
    packed = pixels[batch["row"]]
    shape = (len(packed), *image_size, 3)
    flat = packed.reshape(len(packed), -1)[:, : math.prod(shape[1:])]
    return {**batch, "image": flat.reshape(shape)}


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Returns whether every number in a tree of arrays is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
