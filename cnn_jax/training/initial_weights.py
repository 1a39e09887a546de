"""Initialization of a new run with the weights of another run."""

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

# The name of the last layer, whose weights can be reused only if both runs have the same classes.
_HEAD = "head"


def start_from(path: str, state: TrainState, class_names: Sequence[str]) -> tuple[TrainState, str]:
    """Copies the parameters and the BatchNorm statistics of another run to the new run's state.

    The parameters of the last layer are copied only if both runs have the same classes. The
    optimizer's state is not copied.

    Args:
      path: A bundle, or a run that has written its bundle.
      state: The state of the new run before its first step.
      class_names: The class names of the new run, in the order of its labels.

    Returns:
      The new state, with the shardings of `state`, and a description of the copied weights.

    Raises:
      ConfigError: There is no bundle at the path, the bundle is damaged, or its network
        differs from the network of the new run.
    """
    folder = pathlib.Path(path)
    if (folder / "config.json").exists() and not (folder / "bundle").exists():
        raise ConfigError(
            f"config.checkpoint.init_from: {path} has no bundle yet; let that run finish first"
        )
    try:
        bundle = read_bundle(folder / "bundle" if (folder / "bundle").is_dir() else folder)
    except BundleError as error:
        raise ConfigError(f"config.checkpoint.init_from: {error}") from error
    has_same_classes = list(class_names) == bundle.class_names
    params = _copy(bundle, "params", state.params, with_head=has_same_classes)
    batch_stats = _copy(bundle, "batch_stats", state.batch_stats, with_head=has_same_classes)
    state = dataclasses.replace(state, params=params, batch_stats=batch_stats)
    description = "all weights" if has_same_classes else f"all weights except {_HEAD}: new classes"
    return state, f"{path}, {description}"


def _copy(bundle: Bundle, collection: str, target: PyTree, *, with_head: bool) -> PyTree:
    """Returns a copy of the tree `target` with the arrays of a bundle.

    The arrays are matched by name. Without `with_head`, the last layer keeps its own arrays.

    Raises:
      ConfigError: The names or the shapes of the arrays differ.
    """
    new: dict[str, Any] = flax.traverse_util.flatten_dict(target, sep="/")
    old: dict[str, Any] = flax.traverse_util.flatten_dict(
        bundle.variables.get(collection, {}), sep="/"
    )
    names = {name for name in new.keys() | old.keys() if with_head or name.split("/")[0] != _HEAD}
    for name in sorted(names):
        shapes = [tree[name].shape if name in tree else "absent" for tree in (old, new)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"config.checkpoint.init_from: the bundle has another network: {name} is "
                f"{shapes[0]} there and {shapes[1]} in this run"
            )
        # The array is copied, because the training step may overwrite the arrays of its state.
        new[name] = sharding.distribute(old[name].copy(), new[name].sharding)
    return flax.traverse_util.unflatten_dict(new, sep="/")
