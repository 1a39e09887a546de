"""Functions that construct and apply networks, and count their parameters and operations."""

import importlib
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from cnn_jax.data.preprocessing import Preprocessing, normalize
from cnn_jax.models import NETWORKS
from cnn_jax.models.parts import NetworkParts


def compute_dtype(precision: str) -> jnp.dtype:
    """Converts a value of the configuration key `precision` to the dtype of the computation.

    Args:
      precision: "float32", "bfloat16" or "auto". The last one means float32 if JAX's default
        backend is a CPU, else bfloat16.
    """
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def make_model(config: Mapping[str, Any], num_classes: int, precision: str) -> nn.Module:
    """Constructs the network that the section `model` of a configuration or bundle describes."""
    module, _, name = NETWORKS[config["name"]].path.partition(":")
    # The fields of a Linen module must be hashable, so lists from JSON become tuples.
    fields = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key != "name"
    }
    network = getattr(importlib.import_module(module), name)
    return network(num_classes=num_classes, dtype=compute_dtype(precision), **fields)


def forward(
    model: nn.Module,
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
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Num[Array, "batch height width 3"],
    preprocessing: Preprocessing,
    offsets: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Returns the outputs of all stages of the network in inference mode; see `CNN.stages`.

    Args:
      model: The network.
      variables: {"params", "batch_stats"} of the network.
      images: Grey levels from 0 to 255, any dtype.
      preprocessing: The mean and the standard deviation of the normalisation.
      offsets: Arrays to add to the outputs of stages, by name.
    """
    images = normalize(images, preprocessing)
    return cast(dict, model.apply(variables, images, offsets=offsets, method="stages"))


def network_parts(model: nn.Module, variables: Mapping[str, Any]) -> NetworkParts:
    """Returns the network parameters that the explanation methods need; see `NetworkParts`."""
    return cast(Any, model).parts(variables["params"])


def feature_map_shapes(
    model: nn.Module, variables: Mapping[str, Any], image_size: tuple[int, int]
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


def layer_names(model: nn.Module, image_size: tuple[int, int]) -> list[str]:
    """Returns the names of the layers with parameters, from the first layer to the last."""
    names: list[str] = []

    def init(images: Array) -> None:
        names.extend(model.init(jax.random.key(0), images)["params"])

    jax.eval_shape(init, jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32))
    return names


def abstract_variables(model: nn.Module, image_size: tuple[int, int]) -> dict[str, Any]:
    """Returns the shapes and dtypes of a network's variables, without computing their values."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def has_batch_norm(model: nn.Module, image_size: tuple[int, int]) -> bool:
    """Returns whether a network has BatchNorm layers."""
    return bool(jax.tree.leaves(abstract_variables(model, image_size).get("batch_stats", {})))


def count_parameters(model: nn.Module, image_size: tuple[int, int]) -> int:
    """Returns the number of trainable parameters of a network."""
    params = abstract_variables(model, image_size)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward_flops(model: nn.Module, image_size: tuple[int, int]) -> float:
    """Returns the number of floating-point operations of one forward pass, as counted by XLA."""
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    lowered = jax.jit(model.apply).lower(abstract_variables(model, image_size), images)
    cost = lowered.cost_analysis()
    return cost["flops"] if cost else 0.0
