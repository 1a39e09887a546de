"""A function that replaces a configuration's automatic values and makes its paths absolute."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from cnn_jax.config.schema import Config, image_size
from cnn_jax.data.sources import absolute
from cnn_jax.models.network import compute_dtype
from cnn_jax.system.errors import ConfigError


def resolve(config: Config, previous: Mapping[str, Any] | None = None) -> Config:
    """Returns a copy of a configuration that has the same meaning on every machine.

    `precision` and `augment.place` are not "auto", `optimizer.decay_epochs` is not 0, and
    paths are absolute. (`train.steps_per_execution` may be 0 until the data is opened.)

    Args:
      config: A configuration.
      previous: The values of the configuration of a run that resumes, by key, such as
        "train.epochs"; None for a new run. Automatic values are taken from it.

    Raises:
      ConfigError: Keys contradict each other.
    """
    previous = previous or {}
    resolved = config.copy_and_resolve_references()
    with resolved.ignore_type():
        if config.precision == "auto":
            resolved.precision = previous.get("precision", compute_dtype("auto").name)
        if not config.optimizer.decay_epochs:
            previous_epochs = previous.get("optimizer.decay_epochs", 0)
            resolved.optimizer.decay_epochs = previous_epochs or config.train.epochs
        if not config.train.steps_per_execution:
            resolved.train.steps_per_execution = previous.get("train.steps_per_execution", 0)
        if config.checkpoint.init_from:
            path = pathlib.Path(config.checkpoint.init_from).expanduser()
            resolved.checkpoint.init_from = str(path.resolve())
        if config.model.get("batch_norm_statistics") == "auto":
            # The statistics of random weights, 0 and 1, normalise nothing.
            resolved.model.batch_norm_statistics = "frozen" if config.model.pretrained else "batch"
        resolved.data.source = absolute(config.data.source)
        resolved.data.image_size = image_size(config)
        if config.augment.place == "auto":
            # If the device is a CPU, OpenCV augments images in parallel with the training step. XLA
            # would augment images within the step, which would be slower.
            on_cpu = jax.default_backend() == "cpu"
            default = "host" if on_cpu else "device"
            resolved.augment.place = previous.get("augment.place", default)
        if resolved.augment.place == "host" and config.data.cache == "device":
            raise ConfigError(
                "config.data.cache: images on the device can only be augmented there; "
                "set augment.place=device too"
            )
    return resolved
