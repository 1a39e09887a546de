"""What of a training run is compiled: its programs, and how much memory they need."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PyTree

from cnn_jax.config.schema import Config
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.mix import Mixing
from cnn_jax.system import runtime
from cnn_jax.system.errors import TrainingError
from cnn_jax.training import sharding
from cnn_jax.training.loss import balanced_weights
from cnn_jax.training.metrics import Metrics
from cnn_jax.training.optimizer import make_optimizer
from cnn_jax.training.step import (
    INIT,
    Statistics,
    TrainState,
    eval_step,
    init_state,
    random_key,
    train_step,
    update_statistics,
)

# Batches that a person is told: larger ones are rounded down to a multiple of this.
_ROUND_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Programs:
    """What runs on the devices, each compiled once, with the shardings of its arrays.

    Attributes:
      init_state: () -> the state before the first step.
      empty_metrics: () -> metrics of nothing.
      empty_statistics: () -> BatchNorm's statistics of no batch.
      train_step: (state, batch, pixels) -> (state, metrics); the state is donated.
        `pixels` are those of the whole data set if they are on the devices, or None.
      train_steps: The same for several steps in one execution: each array of the batch,
        and nothing else, has a dimension of steps before all others, and the metrics
        are those of all.
      update_statistics: (statistics, variables, batch, pixels) -> BatchNorm's statistics with
        one batch more; the first are donated.
      eval_step: (variables, batch, pixels) -> metrics.
      merge: (metrics, metrics) -> metrics; the first is donated.
      is_finite: (state) -> bool [], whether every number is.
      gather: (tree) -> the same, with a whole copy on each device.
      to_devices: The global batch, of the `rows` that this process loads.
      to_devices_by_step: Several, in arrays with a dimension of steps before all others.
      to_all_devices: A copy of an array on each device.
      rows: The rows of a global batch that this process loads.
      batch_size: Examples in a global batch.
      shares: Devices that share it.
      accumulation_steps: In how many parts it goes through.
    """

    init_state: Callable[[], TrainState]
    empty_metrics: Callable[[], Metrics]
    empty_statistics: Callable[[], Statistics]
    train_step: Any  # Of jax.jit, which also lowers.
    train_steps: Any
    update_statistics: Callable[[Statistics, Any, dict, PyTree], Statistics]
    eval_step: Callable[[Any, dict, PyTree], Metrics]
    merge: Callable[[Metrics, Metrics], Metrics]
    is_finite: Callable[[TrainState], jax.Array]
    gather: Callable[[PyTree], PyTree]
    to_devices: Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]
    to_devices_by_step: Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]
    to_all_devices: Callable[[np.ndarray], jax.Array]
    rows: Int[np.ndarray, " rows"]
    batch_size: int
    shares: int
    accumulation_steps: int


def make_programs(
    config: Config, model: nn.Module, schedule: optax.Schedule, dataset: Dataset
) -> Programs:
    """The programs of a run. Nothing is compiled before it is called.

    Args:
      config: The resolved configuration.
      model: The network.
      schedule: The learning rate by step.
      dataset: What is trained on.
    """
    preprocessing = dataset.loader.preprocessing
    train = config.train
    optimizer = make_optimizer(schedule, config.optimizer.l2)
    class_weights = None
    if train.balance == "loss":
        class_weights = balanced_weights(dataset.findings.counts["train"]).tolist()
    init = functools.partial(
        init_state,
        random_key(config.seed, INIT),
        model=model,
        optimizer=optimizer,
        image_size=preprocessing.image_size,
    )

    def training(
        state: TrainState, batch: Mapping[str, Array], pixels: Array | None
    ) -> tuple[TrainState, Metrics]:
        return train_step(
            state,
            _with_images(batch, pixels),
            model=model,
            optimizer=optimizer,
            preprocessing=preprocessing,
            seed=config.seed,
            label_smoothing=train.label_smoothing,
            class_weights=class_weights,
            mixing=Mixing.from_config(config.augment),
            accumulation_steps=train.accumulation_steps,
        )

    def several(
        state: TrainState, batches: Mapping[str, Array], pixels: Array | None
    ) -> tuple[TrainState, Metrics]:
        def step(
            carried: tuple[TrainState, Metrics], batch: Mapping[str, Array]
        ) -> tuple[tuple[TrainState, Metrics], None]:
            state, totals = carried
            state, metrics = training(state, batch, pixels)
            return (state, totals.merge(metrics)), None

        start = state, Metrics.empty(model.num_classes)
        return jax.lax.scan(step, start, batches)[0]

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
            model=model,
            preprocessing=preprocessing,
        )

    def evaluation(variables: PyTree, batch: Mapping[str, Array], pixels: Array | None) -> Metrics:
        batch = _with_images(batch, pixels)
        return eval_step(variables, batch, model=model, preprocessing=preprocessing)

    mesh = sharding.make_mesh(config.mesh.model)
    everywhere, by_example = sharding.replicated(mesh), sharding.split_by_example(mesh)
    by_step = sharding.split_by_step_and_example(mesh)
    of_state = sharding.split_large(mesh, jax.eval_shape(init))
    statistics_sharding = Statistics(everywhere, of_state.batch_stats)
    jit_training = functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(of_state, everywhere),
        compiler_options=runtime.compiler_options(),
    )
    return Programs(
        init_state=jax.jit(init, out_shardings=of_state),
        empty_metrics=jax.jit(
            functools.partial(Metrics.empty, model.num_classes), out_shardings=everywhere
        ),
        empty_statistics=jax.jit(
            lambda: Statistics.empty(jax.eval_shape(init).batch_stats),
            out_shardings=statistics_sharding,
        ),
        train_step=jit_training(training, in_shardings=(of_state, by_example, everywhere)),
        train_steps=jit_training(several, in_shardings=(of_state, by_step, everywhere)),
        update_statistics=jax.jit(
            add_batch,
            donate_argnums=0,
            in_shardings=(statistics_sharding, of_state.variables, by_example, everywhere),
            out_shardings=statistics_sharding,
            compiler_options=runtime.compiler_options(),
        ),
        eval_step=jax.jit(
            evaluation,
            in_shardings=(of_state.variables, by_example, everywhere),
            out_shardings=everywhere,
            compiler_options=runtime.compiler_options(),
        ),
        is_finite=jax.jit(_all_finite, out_shardings=everywhere),
        merge=jax.jit(Metrics.merge, donate_argnums=0, out_shardings=everywhere),
        gather=jax.jit(lambda tree: tree, out_shardings=everywhere),
        to_devices=functools.partial(
            sharding.to_devices, sharding=by_example, batch_size=train.batch_size
        ),
        to_devices_by_step=functools.partial(
            sharding.to_devices, sharding=by_step, batch_size=train.batch_size
        ),
        to_all_devices=functools.partial(sharding.place, sharding=everywhere),
        rows=sharding.local_rows(by_example, train.batch_size),
        batch_size=train.batch_size,
        shares=mesh.shape["data"],
        accumulation_steps=train.accumulation_steps,
    )


def _with_images(batch: Mapping[str, Array], pixels: Array | None) -> Mapping[str, Array]:
    """The batch itself, or, if all pixels are on the device, with its images."""
    return batch if pixels is None else {**batch, "image": pixels[batch["row"]]}


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """What a training step takes of one device, in bytes, as XLA counts it.

    Attributes:
      fixed: State, and pixels that are on the device.
      per_example: For each example that the device works on at a time.
      batch_size: Examples in a global batch.
      shares: Devices that share it.
      parts: In how many parts it goes through.
    """

    fixed: float
    per_example: float
    batch_size: int
    shares: int
    parts: int

    @property
    def total(self) -> float:
        return self.fixed + self.per_example * self.batch_size / (self.shares * self.parts)

    def largest_batch(self, available: float) -> int:
        """The largest global batch, in as many parts as now, for which so much is enough."""
        examples = max(0, int((available - self.fixed) / self.per_example))
        if examples >= 2 * _ROUND_BATCH:
            examples -= examples % _ROUND_BATCH
        return examples * self.shares * self.parts

    def fewest_parts(self, available: float) -> int | None:
        """The fewest parts in which so much is enough for this batch, if there are any."""
        examples = self.batch_size // self.shares
        for parts in range(1, examples + 1):
            needed = self.fixed + self.per_example * examples / parts
            if examples % parts == 0 and needed <= available:
                return parts
        return None

    def too_much(self, available: float, has: str = "has") -> TrainingError:
        """The error if a device has only `available` bytes: what is needed, and what would fit."""
        if largest := self.largest_batch(available):
            advice = f"the largest train.batch_size that fits is about {largest}"
            if parts := self.fewest_parts(available):
                advice += f", and train.accumulation_steps={parts} takes this one in {parts} parts"
        else:
            advice = "not even one image at a time fits: try a smaller data.image_size or model"
        return TrainingError(
            f"out of memory: a training step with train.batch_size={self.batch_size} needs about "
            f"{_size(self.total)} of each device, which {has} {_size(available)}; {advice}"
        )


class Memory:
    """Whether the devices' memory is enough for training."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self._estimate: MemoryEstimate | None = None

    def check(
        self, program: Any, state: TrainState, batch: Mapping[str, jax.Array], pixels: Any
    ) -> None:
        """Compiles `train_step` or `train_steps` for these arrays, and looks at what it will take.

        Raises:
          TrainingError: It is more than a device has.
        """
        programs = self._programs
        analysis = program.lower(state, batch, pixels).compile().memory_analysis()
        if analysis is None:  # This kind of device does not tell.
            return
        batch_bytes = sum(array.nbytes for array in batch.values()) / programs.shares
        examples = programs.batch_size / (programs.shares * programs.accumulation_steps)
        self._estimate = MemoryEstimate(
            fixed=max(analysis.argument_size_in_bytes - batch_bytes, 0.0),
            per_example=(analysis.temp_size_in_bytes + batch_bytes) / examples,
            batch_size=programs.batch_size,
            shares=programs.shares,
            parts=programs.accumulation_steps,
        )
        available = sharding.device_bytes()
        if available and self._estimate.total > available:
            raise self._estimate.too_much(available)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Says in one line what JAX says in many, where devices fail in the middle of training.

        Raises:
          TrainingError: Memory, which others may use too, is used up, or another process
            of the run is gone.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if lost := sharding.lost_process(error):
                raise lost from error
            if self._estimate is None or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            available = sharding.free_device_bytes() + self._estimate.fixed
            raise self._estimate.too_much(available, "now has") from error


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
