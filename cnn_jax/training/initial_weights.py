"""Starts a new run from the weights of another."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.traverse_util
from jaxtyping import PyTree

from cnn_jax.inference.bundle import Bundle, read_bundle
from cnn_jax.system.errors import BundleError, ConfigError
from cnn_jax.training import sharding
from cnn_jax.training.step import TrainState

# The layer that belongs to the classes: another data set has other ones.
_HEAD = "head"


def start_from(path: str, state: TrainState, class_names: Sequence[str]) -> tuple[TrainState, str]:
    """A state before the first step that has another run's parameters and statistics.

    Those of the last layer are taken only if the classes are the same, and else stay
    as they are. The optimizer starts anew.

    Args:
      path: A bundle, or a run that has written one.
      state: The state before the first step.
      class_names: Of the new run, in the order of its labels.

    Returns:
      The state, with the shardings of the one given, and in words what was taken.

    Raises:
      ConfigError: There is no bundle, or it is damaged, or of another network.
    """
    folder = pathlib.Path(path)
    if (folder / "config.json").exists() and not (folder / "bundle").exists():
        raise ConfigError(
            f"config.checkpoint.init_from: {path} has no bundle yet: let that run end first"
        )
    try:
        bundle = read_bundle(folder / "bundle" if (folder / "bundle").is_dir() else folder)
    except BundleError as error:
        raise ConfigError(f"config.checkpoint.init_from: {error}") from error
    is_same = list(class_names) == bundle.class_names
    params = _take(bundle, "params", state.params, with_head=is_same)
    batch_stats = _take(bundle, "batch_stats", state.batch_stats, with_head=is_same)
    taken = "all its weights" if is_same else f"its weights but for {_HEAD}: its classes are others"
    state = dataclasses.replace(state, params=params, batch_stats=batch_stats)
    return state, f"{path}, {taken}"


def _take(bundle: Bundle, collection: str, into: PyTree, *, with_head: bool) -> PyTree:
    """The arrays of a bundle in the place of those of the same names.

    Raises:
      ConfigError: Their names or shapes are not the same.
    """
    new: dict[str, Any] = flax.traverse_util.flatten_dict(into, sep="/")
    old: dict[str, Any] = flax.traverse_util.flatten_dict(
        bundle.variables.get(collection, {}), sep="/"
    )
    names = {name for name in new.keys() | old.keys() if with_head or name.split("/")[0] != _HEAD}
    for name in sorted(names):
        shapes = [tree[name].shape if name in tree else "absent" for tree in (old, new)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"config.checkpoint.init_from: it is of another network: {name} is {shapes[0]} "
                f"there and {shapes[1]} here"
            )
        # A copy: what is given to a training step is given away.
        new[name] = sharding.distribute(old[name].copy(), new[name].sharding)
    return flax.traverse_util.unflatten_dict(new, sep="/")
