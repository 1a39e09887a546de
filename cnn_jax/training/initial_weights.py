"""Starts a new run from pretrained weights, or from the weights of another run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from cnn_jax.config.schema import Config
from cnn_jax.data.findings import count
from cnn_jax.models.pretrained import (
    PretrainedWeights,
    check_network,
    current_sha256,
    open_weights,
)
from cnn_jax.system.errors import ConfigError
from cnn_jax.training import sharding
from cnn_jax.training.step import TrainState

# The name of the last layer. The head is copied only if both networks have the same classes.
_HEAD = "head"
# The maximum number of names that an error message lists for each kind of difference.
_MAX_NAMES = 2


def open_initial_weights(config: Config) -> PretrainedWeights | None:
    """Reads the initial weights of a new run; returns None if the initial weights are random.

    Args:
      config: The resolved configuration.

    Raises:
      ConfigError: There are no such weights, or they are weights of another network.
      WeightsError: The weights cannot be downloaded now, or are damaged.
    """
    key, name = _choice(config)
    if not name:
        return None
    weights = open_weights(name, key)
    check_network(weights, config.model.name, key)
    return weights


def check_unchanged(config: Config, record: Mapping[str, Any] | None) -> None:
    """Checks that the file of the initial weights has not changed since the run started.

    A run does not need the file when it resumes, so the file may be missing.

    Args:
      config: The resolved configuration.
      record: The record of the weights in the run's folder; None if there is none.

    Raises:
      ConfigError: The file has changed.
    """
    if record is None:
        return
    key, _ = _choice(config)
    sha256 = current_sha256(record["source"])
    if sha256 not in (None, record["sha256"]):
        raise ConfigError(
            f"config.{key}: {record['source']} has changed since the run started; restore the "
            f"file with the sha256 {record['sha256']}, or start a new run with another --workdir"
        )


def start_from(
    weights: PretrainedWeights, config: Config, state: TrainState, class_names: Sequence[str]
) -> tuple[TrainState, str]:
    """Copies pretrained parameters and BatchNorm statistics into a new state.

    The head is copied only if the weights have a head for the same classes. The optimizer's
    state is not copied.

    Args:
      weights: The weights.
      config: The resolved configuration.
      state: The state of the new run before its first step.
      class_names: The class names of the new run, in the order of its labels.

    Returns:
      The new state, with the shardings of `state`, and a description of the weights that were
      copied and of those that were not.

    Raises:
      ConfigError: The weights are weights of another network.
    """
    target: dict[str, Any] = flatten_dict(
        {"params": state.params, "batch_stats": state.batch_stats}, sep="/"
    )
    source: dict[str, Any] = flatten_dict(weights.variables, sep="/")
    new_head = _why_new_head(source, target, weights.class_names, class_names)
    if new_head:
        source, own = _without_head(source), _without_head(target)
    else:
        own = target
    if differences := _differences(source, own):
        key, name = _choice(config)
        raise ConfigError(
            f"config.{key}: {name} does not fit the network {config.model.name}: {differences}"
        )
    # The array is copied, because the training step may overwrite the arrays of its state.
    target |= {
        name: sharding.distribute(source[name].copy(), array.sharding)
        for name, array in own.items()
    }
    params, batch_stats = (
        unflatten_dict(_collection(target, name), sep="/") for name in ("params", "batch_stats")
    )
    state = dataclasses.replace(state.with_params(params), batch_stats=batch_stats)
    copied = f"all weights except {_HEAD}: {new_head}" if new_head else "all weights"
    return state, f"{weights.source}, {copied}"


def _choice(config: Config) -> tuple[str, str]:
    """Returns the configuration key that names the initial weights, and its value."""
    if name := config.model.get("pretrained", ""):
        return "model.pretrained", name
    return "checkpoint.init_from", config.checkpoint.init_from


def _collection(flat: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the arrays whose names begin with `name`/, and removes this prefix from the names."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): v for key, v in flat.items() if key.startswith(prefix)}


def _without_head(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in flat.items() if name.split("/")[1] != _HEAD}


def _why_new_head(
    source: Mapping[str, PyTree],
    target: Mapping[str, PyTree],
    their_classes: Sequence[str] | None,
    own_classes: Sequence[str],
) -> str:
    """Returns the reason why the head keeps its random weights, or "" if the head is copied.

    Args:
      source: The pretrained arrays by name.
      target: The arrays of the network by name.
      their_classes: The classes of the pretrained head; None if they are unknown.
      own_classes: The classes of the new run.
    """
    kernel = f"params/{_HEAD}/kernel"
    if kernel not in source:
        return "the weights have no head"
    if their_classes is None or list(their_classes) != list(own_classes):
        theirs = count(source[kernel].shape[-1], "class", "classes")
        unknown = " without names" if their_classes is None else ""
        return f"new classes (the weights have {theirs}{unknown})"
    if source[kernel].shape != target[kernel].shape:
        return "another embedding"
    return ""


def _differences(source: Mapping[str, PyTree], target: Mapping[str, PyTree]) -> str:
    """Describes differences in the names and shapes of arrays; returns "" if there are none."""
    wrong = [
        f"{_short(name)} is {_shape(source[name])} instead of {_shape(target[name])}"
        for name in target
        if name in source and source[name].shape != target[name].shape
    ]
    for name in target:
        if name in source and _has_other_input_channels(source[name].shape, target[name].shape):
            channels = count(source[name].shape[2], "channel")
            return (
                f"its images have {channels} ({_short(name)} is {_shape(source[name])}), and "
                "cnn_jax trains on images with 3 channels; choose other weights"
            )
    missing = [_short(name) for name in target if name not in source]
    unused = [_short(name) for name in source if name not in target]
    parts = {"missing": missing, "unused": unused, "of another shape": wrong}
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:_MAX_NAMES])}"
        f"{', ...' if len(names) > _MAX_NAMES else ''})"
        for kind, names in parts.items()
        if names
    )


def _has_other_input_channels(source: Sequence[int], target: Sequence[int]) -> bool:
    """Returns whether two first-layer kernel shapes differ only in the number of input channels."""
    is_first = len(source) == len(target) == 4 and target[2] == 3 != source[2]
    return is_first and (*source[:2], source[3]) == (*target[:2], target[3])


def _short(name: str) -> str:
    """Returns the name of an array without its first part, "params" or "batch_stats"."""
    return name.partition("/")[2]


def _shape(array: Any) -> str:
    return " x ".join(map(str, array.shape)) or "a number"
