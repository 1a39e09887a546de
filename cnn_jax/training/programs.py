"""The jitted functions of a run, and an estimate of the memory that a training step needs."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree

from cnn_jax.config.schema import Config
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.mix import Mixing
from cnn_jax.models.base import Backbone, Network
from cnn_jax.models.network import updates_statistics
from cnn_jax.system import runtime
from cnn_jax.system.errors import TrainingError
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

# A suggested batch size is rounded down to a multiple of this number.
_ROUND_BATCH = 8


def make_train_step(
    config: Config,
    model: Network,
    schedule: optax.Schedule,
    dataset: Dataset,
    distillation: Distillation | None = None,
) -> TrainStep:
    """Returns the training step of a run.

    Args:
      config: The resolved configuration.
      model: The network.
      schedule: The learning rate by step.
      dataset: The data set of the run.
      distillation: The additional term of the loss, or None.
    """
    train, optimizer = config.train, config.optimizer
    class_weights = None
    if train.balance == "loss":
        class_weights = tuple(balanced_weights(dataset.findings.counts["train"]).tolist())
    head_factor = (optimizer.head_learning_rate or optimizer.learning_rate) / (
        optimizer.learning_rate
    )
    has_factors = optimizer.stage_decay != 1 or head_factor != 1
    return TrainStep(
        model=model,
        optimizer=make_optimizer(
            schedule,
            optimizer.l2,
            name=optimizer.name,
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
        preprocessing=dataset.loader.preprocessing,
        seed=config.seed,
        label_smoothing=train.label_smoothing,
        class_weights=class_weights,
        mixing=Mixing.from_config(config.augment),
        accumulation_steps=train.accumulation_steps,
        ema=train.ema,
        extra_loss=distillation,
        label_weight=1.0 if distillation is None else 1 - distillation.weight,
    )


class Programs:
    """The jitted functions of a run, with the shardings of their arguments and results.

    Each function is compiled at its first call. The argument `pixels` is an array of all
    images of the data set if they are on the devices, else None.

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

    def __init__(self, train_step: TrainStep, batch_size: int, model_devices: int = 1):
        """Creates the jitted functions, without compiling them.

        Args:
          train_step: The training step.
          batch_size: The number of examples in a global batch.
          model_devices: The number of devices that share the large parameters (`mesh.model`).
        """
        num_classes = train_step.model.num_classes
        jit = functools.partial(jax.jit, compiler_options=runtime.compiler_options())
        self.model = train_step.model
        self.accumulation_steps = train_step.accumulation_steps
        self._image_size = train_step.preprocessing.image_size
        self.layout = layout = sharding.Layout(sharding.make_mesh(model_devices), batch_size)
        abstract_state = jax.eval_shape(train_step.init_state)
        state_sharding = sharding.split_large(layout.mesh, abstract_state)
        statistics_sharding = Statistics(layout.replicated, state_sharding.batch_stats)

        def training(
            state: TrainState, batch: Mapping[str, Array], pixels: Array | None, extra: PyTree
        ) -> tuple[TrainState, Metrics]:
            return train_step(state, _with_images(batch, pixels), extra)

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

        def add_batch(
            statistics: Statistics,
            variables: PyTree,
            batch: Mapping[str, Array],
            pixels: Array | None,
        ) -> Statistics:
            return update_statistics(
                statistics,
                variables,
                _with_images(batch, pixels),
                model=train_step.model,
                preprocessing=train_step.preprocessing,
            )

        def evaluation(
            variables: PyTree, batch: Mapping[str, Array], pixels: Array | None
        ) -> Metrics:
            return eval_step(
                variables,
                _with_images(batch, pixels),
                model=train_step.model,
                preprocessing=train_step.preprocessing,
            )

        replicated, batch_sharding = layout.replicated, layout.batch_sharding
        jit_training = functools.partial(
            jit, donate_argnums=0, out_shardings=(state_sharding, replicated)
        )
        # A network that can have pretrained weights has many layers. XLA would need half a minute
        # to optimise the program that draws the random initial weights. These weights are seldom
        # used.
        is_backbone = isinstance(self.model, Backbone)
        self.init_state = jax.jit(
            train_step.init_state,
            out_shardings=state_sharding,
            compiler_options=runtime.quick_compiler_options() if is_backbone else None,
        )
        self.empty_metrics = jax.jit(
            functools.partial(Metrics.empty, num_classes), out_shardings=replicated
        )
        self.empty_statistics = jax.jit(
            lambda: Statistics.empty(abstract_state.batch_stats), out_shardings=statistics_sharding
        )
        self.train_step = jit_training(
            training, in_shardings=(state_sharding, batch_sharding, replicated, replicated)
        )
        self.train_steps = jit_training(
            several,
            in_shardings=(state_sharding, layout.stacked_batch_sharding, replicated, replicated),
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

    @functools.cached_property
    def updates_statistics(self) -> bool:
        """Whether training changes BatchNorm's statistics."""
        return updates_statistics(self.model, self._image_size)

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
        return self.train_steps, self.layout.to_devices(stacked, is_stacked=True)


def _with_images(batch: Mapping[str, Array], pixels: Array | None) -> Mapping[str, Array]:
    """Adds images from `pixels` to a batch; returns the batch unchanged if `pixels` is None."""
    return batch if pixels is None else {**batch, "image": pixels[batch["row"]]}


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Returns whether every number in a tree of arrays is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """The memory that a training step needs on one device, in bytes, as reported by XLA.

    Attributes:
      fixed: The memory of the state, and of the pixels if they are on the device.
      per_example: The memory for each example of the batch part that is being computed.
      batch_size: The number of examples in a global batch.
      data_devices: The number of devices that share a batch.
      parts: The number of parts of a batch that are computed one after the other.
    """

    fixed: float
    per_example: float
    batch_size: int
    data_devices: int
    parts: int

    @property
    def total(self) -> float:
        """The total memory that a training step needs on one device, in bytes."""
        return self.fixed + self.per_example * self.batch_size / (self.data_devices * self.parts)

    def largest_batch(self, available: float) -> int:
        """Returns the largest global batch size that fits into `available` bytes, or 0."""
        examples = max(0, int((available - self.fixed) / self.per_example))
        if examples >= 2 * _ROUND_BATCH:
            examples -= examples % _ROUND_BATCH
        return examples * self.data_devices * self.parts

    def fewest_parts(self, available: float) -> int | None:
        """Returns the smallest train.accumulation_steps with which a step fits into memory.

        The number of parts must divide the number of examples on a device. The result is None
        if the step needs more than `available` bytes with every number of parts.
        """
        examples = self.batch_size // self.data_devices
        for parts in range(1, examples + 1):
            needed = self.fixed + self.per_example * examples / parts
            if examples % parts == 0 and needed <= available:
                return parts
        return None

    def error(self, available: float, has: str = "has") -> TrainingError:
        """Returns an out-of-memory error that suggests settings with which a step would fit.

        Args:
          available: The memory of the device, in bytes.
          has: The verb in the message before the number of available bytes.
        """
        if largest := self.largest_batch(available):
            advice = f"the largest train.batch_size that fits is about {largest}"
            if parts := self.fewest_parts(available):
                advice += f", and train.accumulation_steps={parts} computes it in {parts} parts"
        else:
            advice = "a batch of one image does not fit; use a smaller data.image_size or model"
        return TrainingError(
            f"out of memory: a training step with train.batch_size={self.batch_size} needs about "
            f"{_size(self.total)} of each device, which {has} {_size(available)}; {advice}"
        )


class Memory:
    """Checks that the devices have enough memory for training."""

    def __init__(self, programs: Programs):
        """Creates the memory check of a run.

        Args:
          programs: The jitted functions of the run.
        """
        self._programs = programs
        self._estimate: MemoryEstimate | None = None

    def check(
        self,
        program: Any,
        state: TrainState,
        batch: Mapping[str, jax.Array],
        pixels: Any,
        extra: Any = None,
    ) -> None:
        """Compiles a training function and checks that each device has enough memory for it.

        Args:
          program: `Programs.train_step` or `Programs.train_steps`.
          state: The train state, or abstract arrays with its shapes and shardings.
          batch: The arrays of the batch or batches of one execution.
          pixels: The images of the whole data set on the devices, or None.
          extra: The last argument of the training function.

        Raises:
          TrainingError: The program needs more memory than a device has.
        """
        programs = self._programs
        analysis = program.lower(state, batch, pixels, extra).compile().memory_analysis()
        if analysis is None:  # On some devices, XLA does not report how much memory is needed.
            return
        layout, parts = programs.layout, programs.accumulation_steps
        batch_bytes = sum(array.nbytes for array in batch.values()) / layout.data_devices
        examples = layout.batch_size / (layout.data_devices * parts)
        self._estimate = MemoryEstimate(
            fixed=max(analysis.argument_size_in_bytes - batch_bytes, 0.0),
            per_example=(analysis.temp_size_in_bytes + batch_bytes) / examples,
            batch_size=layout.batch_size,
            data_devices=layout.data_devices,
            parts=parts,
        )
        available = sharding.device_bytes()
        if available and self._estimate.total > available:
            raise self._estimate.error(available)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Converts a JAX runtime error within the context to a one-line TrainingError.

        Raises:
          TrainingError: A device has no memory left (other programs may use it), or
            another process of the run has ended.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if lost := sharding.lost_process(error):
                raise lost from error
            if self._estimate is None or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            available = sharding.free_device_bytes() + self._estimate.fixed
            raise self._estimate.error(available, "now has") from error


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
