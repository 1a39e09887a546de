"""Functions that construct and apply networks, and count their parameters and operations."""

import importlib
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from cnn_jax.data.preprocessing import Preprocessing, normalize
from cnn_jax.models import NETWORKS
from cnn_jax.models.base import Network, NetworkParts
from cnn_jax.system.errors import ConfigError, did_you_mean


def compute_dtype(precision: str) -> jnp.dtype:
    """Converts a value of the configuration key `precision` to the dtype of the computation.

    Args:
      precision: "float32", "bfloat16" or "auto". The last one means float32 if JAX's default
        backend is a CPU, else bfloat16.
    """
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def make_model(
    config: Mapping[str, Any], num_classes: int, precision: str, train_from: str = ""
) -> Network:
    """Constructs the network that the section `model` of a configuration or bundle describes.

    Args:
      config: The section `model`.
      num_classes: The number of classes.
      precision: See `compute_dtype`.
      train_from: The first stage that is trained, or "head"; see `Network`.

    Raises:
      ConfigError: The network has no such stage.
    """
    module, _, name = NETWORKS[config["name"]].path.partition(":")
    # The fields of a Linen module must be hashable, so lists from JSON become tuples.
    fields = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key not in ("name", "pretrained")
    }
    make = getattr(importlib.import_module(module), name)
    network = make(num_classes=num_classes, dtype=compute_dtype(precision), **fields)
    if not train_from:
        return network
    names = [*network.stage_names[:-1], "head"]
    if train_from not in names:
        hint = did_you_mean(train_from, names)
        raise ConfigError(
            f"config.train.from_stage: must be one of {', '.join(names)} for the network "
            f"{config['name']}, got {train_from!r}{hint}"
        )
    return network.clone(train_from="logits" if train_from == "head" else train_from)


def forward(
    model: Network,
    variables: Mapping[str, Any],
    images: Num[Array, "batch height width 3"],
    preprocessing: Preprocessing,
) -> Float[Array, "batch classes"]:
    """Returns the logits of images in inference mode.

    Args:
      model: The network.
      variables: {"params", "batch_stats"} of the network.
      images: Grey levels from 0 to 255, any dtype.
      preprocessing: The mean and the standard deviation of the normalisation.
    """
    return cast(Array, model.apply(variables, normalize(images, preprocessing)))


def stages(
    model: Network,
    variables: Mapping[str, Any],
    images: Num[Array, "batch height width 3"],
    preprocessing: Preprocessing,
    offsets: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Returns the outputs of all stages of the network in inference mode; see `Network.stages`.

    Args:
      model: The network.
      variables: {"params", "batch_stats"} of the network.
      images: Grey levels from 0 to 255, any dtype.
      preprocessing: The mean and the standard deviation of the normalisation.
      offsets: Arrays to add to the outputs of stages, by name.
    """
    images = normalize(images, preprocessing)
    return cast(dict, model.apply(variables, images, offsets=offsets, method="stages"))


def network_parts(model: Network, variables: Mapping[str, Any]) -> NetworkParts:
    """Returns the network parameters that the explanation methods need; see `NetworkParts`."""
    return model.parts(variables["params"])


def feature_map_shapes(
    model: Network, variables: Mapping[str, Any], image_size: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a network's feature maps, in the order of the stages.

    Returns:
      The shape (height, width, channels) by the name of the stage.
    """
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    shapes: dict[str, tuple[int, ...]] = {}

    def run(variables: Mapping[str, Any], images: Array) -> None:
        # JAX sorts the keys of a returned dictionary, but `shapes` keeps the order of the stages.
        for name, array in cast(dict, model.apply(variables, images, method="stages")).items():
            if array.ndim == 4:
                shapes[name] = array.shape[1:]

    jax.eval_shape(run, variables, images)
    return shapes


def layer_names(model: Network, image_size: tuple[int, int]) -> list[str]:
    """Returns the names of the layers with parameters, from the first layer to the last."""
    names: list[str] = []

    def init(images: Array) -> None:
        names.extend(model.init(jax.random.key(0), images)["params"])

    jax.eval_shape(init, jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32))
    return names


def abstract_variables(model: Network, image_size: tuple[int, int]) -> dict[str, Any]:
    """Returns the shapes and dtypes of a network's variables, without computing their values."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def has_batch_norm(model: Network, image_size: tuple[int, int]) -> bool:
    """Returns whether a network has BatchNorm layers."""
    return bool(jax.tree.leaves(abstract_variables(model, image_size).get("batch_stats", {})))


def updates_statistics(model: Network, image_size: tuple[int, int]) -> bool:
    """Returns whether training mode changes the statistics of any BatchNorm layer."""

    def train(variables: Mapping[str, Any], images: Array) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        _, updates = model.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        return updates

    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(train)(abstract_variables(model, image_size), images).jaxpr
    # A statistic that no layer changes is both an input and an output of the traced function.
    return any(output not in jaxpr.invars for output in jaxpr.outvars)


def count_parameters(model: Network, image_size: tuple[int, int]) -> int:
    """Returns the number of trainable parameters of a network."""
    params = abstract_variables(model, image_size)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward_flops(model: Network, image_size: tuple[int, int]) -> float:
    """Returns the number of floating-point operations of one forward pass, as counted by XLA."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    lowered = jax.jit(model.apply).lower(abstract_variables(model, image_size), images)
    cost = lowered.cost_analysis()
    return cost["flops"] if cost else 0.0
