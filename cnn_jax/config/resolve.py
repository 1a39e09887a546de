"""Functions that replace the automatic values of a configuration, or take values from a bundle."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from cnn_jax.config.schema import (
    PREPROCESSING_KEYS,
    Config,
    check_image_size,
    flat,
    image_size,
    keys,
    weights_preprocessing_keys,
)
from cnn_jax.data.sources import absolute
from cnn_jax.inference.bundle import Bundle, digest, find_bundle
from cnn_jax.models import NETWORKS, hub
from cnn_jax.models.network import compute_dtype
from cnn_jax.models.pretrained import check_network, open_weights
from cnn_jax.system.errors import ConfigError, MissingBundleError

# The keys of the preprocessing that pretrained weights do not determine.
_IMAGE_KEYS = ("max_pixels", "white_level")


def resolve(
    config: Config, previous: Mapping[str, Any] | None = None, platform: str | None = None
) -> Config:
    """Returns a copy of a configuration; the copy has the same meaning on every machine.

    `precision` and `augment.place` are not "auto", `optimizer.decay_epochs` is not 0, and
    paths are absolute. `model.pretrained` has its revision, and the preprocessing of these
    weights is in the section `data`; a new run downloads the weights for this.
    (`train.steps_per_execution` may be 0 until the data is opened.)

    Args:
      config: A configuration.
      previous: The values of the configuration of a run that resumes, by key, such as
        "train.epochs"; None for a new run. Automatic values are taken from it.
      platform: The platform of the devices, such as "tpu"; None for JAX's default backend.

    Raises:
      ConfigError: Keys contradict each other.
      WeightsError: The pretrained weights cannot be downloaded now, or are damaged.
    """
    previous = previous or {}
    platform = platform or jax.default_backend()
    resolved = config.copy_and_resolve_references()
    with resolved.ignore_type():
        if config.precision == "auto":
            resolved.precision = previous.get("precision", compute_dtype("auto", platform).name)
        if not config.optimizer.decay_epochs:
            previous_epochs = previous.get("optimizer.decay_epochs", 0)
            resolved.optimizer.decay_epochs = previous_epochs or config.train.epochs
        if not config.train.steps_per_execution:
            resolved.train.steps_per_execution = previous.get("train.steps_per_execution", 0)
        _resolve_pretrained(resolved, previous)
        if config.distill.bundles:
            _resolve_teachers(resolved, previous)
        else:
            resolved.distill.sha256 = ""
        if config.checkpoint.init_from:
            resolved.checkpoint.init_from = str(_absolute_path(config.checkpoint.init_from))
        if config.model.get("batch_norm_statistics") == "auto":
            # Frozen statistics are useful only with trained weights. The initial statistics, mean 0
            # and variance 1, would not normalise the activations.
            is_trained = config.model.pretrained or config.checkpoint.init_from
            resolved.model.batch_norm_statistics = "frozen" if is_trained else "batch"
        resolved.data.source = absolute(config.data.source)
        resolved.data.image_size = image_size(resolved)
        if config.augment.place == "auto":
            # If the device is a CPU, OpenCV augments images in parallel with the training step. XLA
            # would augment images within the step, which would be slower.
            default = "host" if platform == "cpu" else "device"
            resolved.augment.place = previous.get("augment.place", default)
        if resolved.augment.place == "host" and config.data.cache == "device":
            raise ConfigError(
                "config.data.cache: images on the device can only be augmented there; "
                "set augment.place=device too"
            )
    return resolved


def bundle_values(bundle: Bundle) -> dict[str, Any]:
    """Returns the values of the configuration keys that a bundle determines, by key.

    They are the keys of the images, of the splits and of the network, but not the source.
    """
    division, preprocessing = bundle.data["division"], dataclasses.asdict(bundle.preprocessing)
    return {
        "data.split_seed": division["seed"],
        "data.folds": division.get("folds", 0),
        "data.fold": division.get("fold", 0),
        "data.split": tuple(division["fractions"]),
        "data.stratify": division["rule"],
        "data.group": division["group"],
        "data.keep_splits": division["keep_splits"],
        **{f"data.{key}": preprocessing[key] for key in (*PREPROCESSING_KEYS, *_IMAGE_KEYS)},
        "data.preprocessing": "config",
        "data.max_unreadable": bundle.data["max_unreadable"],
        "data.allow_outside": bundle.data["allow_outside"],
        **{f"model.{key}": value for key, value in flat(bundle.model).items()},
    }


def _absolute_path(text: str) -> pathlib.Path:
    return pathlib.Path(text).expanduser().resolve()


def _resolve_teachers(resolved: Config, previous: Mapping[str, Any]) -> None:
    """Makes the paths of the teachers absolute, and sets their sha256.

    If a teacher is missing, a run that resumes keeps its sha256. A finished run needs no teachers.

    Raises:
      BundleError: A teacher is not a bundle.
      ConfigError: The teachers have changed.
    """
    paths = [
        find_bundle(_absolute_path(name.strip())) for name in resolved.distill.bundles.split(",")
    ]
    try:
        sha256 = hashlib.sha256("".join(map(digest, paths)).encode()).hexdigest()
    except MissingBundleError:
        sha256 = previous.get("distill.sha256")
        if not sha256:
            raise
    if resolved.distill.sha256 not in ("", sha256):
        raise ConfigError(
            "config.distill.sha256: the teachers in distill.bundles are not those of the "
            "configuration; restore them, or leave distill.sha256 empty"
        )
    resolved.distill.bundles = ",".join(map(str, paths))
    resolved.distill.sha256 = sha256


def _resolve_pretrained(resolved: Config, previous: Mapping[str, Any]) -> None:
    """Resolves `model.pretrained`, and copies the weights' preprocessing to the section `data`.

    Only the keys of the preprocessing that have their defaults are changed.

    Args:
      resolved: The configuration, which is changed.
      previous: The values of the configuration of a run that resumes, by key. If the weights are
        the same, the weights are not read again.

    Raises:
      ConfigError: There are no such weights, or they are weights of another network.
      WeightsError: The weights cannot be downloaded now, or are damaged.
    """
    name = resolved.model.get("pretrained")
    if not name:
        return
    if name == "auto":
        name = NETWORKS[resolved.model.name].weights
        if not name:
            raise ConfigError(
                f"config.model.pretrained: the network {resolved.model.name} has no usual weights; "
                "set a model id or a path"
            )
    source = str(previous.get("model.pretrained", ""))
    if source and hub.absolute(name) in (source, source.partition("@")[0]):
        values = {key: previous.get(f"data.{key}") for key in PREPROCESSING_KEYS}
    else:
        weights = open_weights(name)
        check_network(weights, resolved.model.name)
        source, values = weights.source, weights.preprocessing
    resolved.model.pretrained = source
    for key in weights_preprocessing_keys(resolved):
        has_default = resolved.data[key] == keys()[f"data.{key}"].default
        is_possible = key != "crop_ratio" or resolved.data.resize == "crop"
        if has_default and is_possible and values.get(key) is not None:
            value = values[key]
            resolved.data[key] = tuple(value) if isinstance(value, list) else value
    check_image_size(resolved)
