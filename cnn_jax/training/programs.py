"""The jitted functions of a run."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree

from cnn_jax.config.schema import Config
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.mix import Mixing
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
