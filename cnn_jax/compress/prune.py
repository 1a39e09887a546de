"""Structured pruning of a network: the importance of channels, and the network without some.

Channels can be pruned if exactly one layer reads them. In "cnn", these are all channels. In a
residual network, these are the channels between two convolutions of the same block; the shortcuts
add the outputs of several blocks, so the blocks of a group must have the same output channels.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, PyTree, UInt8

from cnn_jax.data.preprocessing import Preprocessing, normalize
from cnn_jax.models.cnn import CNN
from cnn_jax.models.network import GATES, Network, forward_flops, make_model
from cnn_jax.models.resnet import Bottleneck, ResNet
from cnn_jax.system.errors import ConfigError
from cnn_jax.training.loss import cross_entropy

# Runtimes compute channels in blocks of 8 or 16, so other numbers of channels are not faster.
WIDTH_MULTIPLE = 16


class _Channels(NamedTuple):
    """Channels that can be pruned.

    Attributes:
      width: The number of channels.
      layers: The layers that compute the channels; the channels are the last axis of their arrays.
      reader: The layer that reads the channels; they are the second last axis of its kernel.
    """

    width: int
    layers: tuple[str, ...]
    reader: str


def _prunable_channels(model: Network) -> dict[str, _Channels]:
    """Returns the channels that can be pruned, by the path of their gate; see `network.gate`."""
    found = {}
    if isinstance(model, CNN):
        layers = [f"conv{i + 1}" for i in range(len(model.features))]
        layers += ["dense"] * (model.dense > 0)
        for layer, reader, width in zip(
            layers, [*layers[1:], "head"], [*model.features, model.dense], strict=False
        ):
            name = "embedding" if layer == "dense" else layer
            found[name] = _Channels(width, (layer, layer.replace("conv", "norm")), reader)
    if isinstance(model, ResNet):
        for group, (blocks, width) in enumerate(
            zip(model.blocks, model.inner_features, strict=True), start=1
        ):
            for block in (f"layer{group}_{i}" for i in range(blocks)):
                for i in range(1, 3 if model.block is Bottleneck else 2):
                    layers = (f"{block}/conv{i}", f"{block}/bn{i}")
                    found[layers[0]] = _Channels(width, layers, f"{block}/conv{i + 1}")
    return found


def widths(section: Mapping[str, Any]) -> dict[str, int]:
    """Returns the numbers of channels that can be pruned, by the path of the gate.

    Args:
      section: The section `model` of a configuration or bundle.

    Raises:
      ConfigError: The network has no such channels.
    """
    found = _prunable_channels(make_model(section, 1, "float32"))
    if not found:
        raise ConfigError(
            f"--bundle: the network {section['name']} cannot be pruned; cnn, resnet18, resnet34 "
            "and resnet50 can be pruned"
        )
    return {name: channels.width for name, channels in found.items()}


def with_widths(section: Mapping[str, Any], new_widths: Mapping[str, int]) -> dict[str, Any]:
    """Returns a copy of the section `model` with other numbers of channels.

    Args:
      section: The section `model` of a configuration or bundle.
      new_widths: The numbers of channels by the path of the gate, for all paths of `widths`. The
        blocks of a group of a residual network have the same number.
    """
    if section["name"] == "cnn":
        features = [width for name, width in new_widths.items() if name != "embedding"]
        return {**section, "features": features, "dense": new_widths.get("embedding", 0)}
    inner = {name.partition("_")[0]: width for name, width in new_widths.items()}
    return {**section, "inner_features": list(inner.values())}


def choose_widths(
    section: Mapping[str, Any],
    num_classes: int,
    image_size: tuple[int, int],
    keep: float,
    precision: str = "float32",
) -> dict[str, int]:
    """Returns the numbers of channels of the largest network within a number of operations.

    All layers keep the same fraction of their channels, rounded to a multiple of
    `WIDTH_MULTIPLE`. A layer keeps at least this number of channels, if it has them.

    Args:
      section: The section `model` of the original network.
      num_classes: The number of classes.
      image_size: The height and the width of the images.
      keep: The largest number of operations, as a fraction of the original number.
      precision: The precision in which the operations are counted; see `compute_dtype`.

    Raises:
      ConfigError: The network cannot be pruned, or not as much.
    """
    original = widths(section)
    flops: dict[tuple[int, ...], float] = {}
    for percent in range(100, -1, -1):
        new_widths = {name: _reduced(width, percent) for name, width in original.items()}
        key = tuple(new_widths.values())
        if key not in flops:
            model = make_model(with_widths(section, new_widths), num_classes, precision)
            flops[key] = forward_flops(model, image_size)
        if flops[key] <= keep * flops[tuple(original.values())]:
            return new_widths
    smallest = min(flops.values()) / flops[tuple(original.values())]
    raise ConfigError(
        f"--keep: must be at least {np.ceil(100 * smallest) / 100:.2f} for this network, because "
        f"no layer is reduced to fewer than {WIDTH_MULTIPLE} channels; got {keep:g}"
    )


def _reduced(width: int, percent: int) -> int:
    """Returns a percentage of a number of channels, rounded to a multiple, half up.

    The result is at most `width`. For 100 percent it is `width`, even if that is not a multiple.
    """
    if percent == 100:
        return width
    multiples = math.floor(width * percent / (100 * WIDTH_MULTIPLE) + 0.5)
    return min(width, max(1, multiples) * WIDTH_MULTIPLE)


def importance(
    model: Network,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    batches: Iterable[tuple[UInt8[np.ndarray, "_ height width 3"], Int[np.ndarray, " _"]]],
) -> dict[str, Float[np.ndarray, " channels"]]:
    """Returns the importance of each channel that can be pruned, by the path of the gate.

    The importance of a channel is the mean over the images of |d|, where d is the change of the
    image's loss to first order if the channel is set to zero: the sum over the pixels of the
    activation times its gradient (Molchanov et al. 2017, "Pruning Convolutional Neural Networks
    for Resource Efficient Inference", equation 8). This is the gradient with respect to a gate.

    Args:
      model: The network.
      variables: {"params", "batch_stats"} of the network.
      preprocessing: The mean and the standard deviation of the normalisation.
      batches: Images, and the class of each image; one or more batches.

    Returns:
      The importance, float64, 0 or more. A channel with importance 0 changes no loss.
    """
    prunable = _prunable_channels(model)

    def loss(gates: PyTree, variables: Mapping[str, Any], images: Array, labels: Array) -> Array:
        normalized = normalize(images, preprocessing)
        logits = cast(Array, model.apply({**variables, GATES: gates}, normalized))
        return jnp.sum(cross_entropy(logits, labels))

    @jax.jit
    def sums(variables: Mapping[str, Any], images: Array, labels: Array) -> dict[str, Array]:
        ones = {name: jnp.ones((len(images), one.width)) for name, one in prunable.items()}
        gradients = jax.grad(loss)(unflatten_dict(ones, sep="/"), variables, images, labels)
        flat = cast(dict[str, Array], flatten_dict(gradients, sep="/"))
        return {name: jnp.abs(gradient).sum(axis=0) for name, gradient in flat.items()}

    total: dict[str, Any] = dict.fromkeys(prunable, 0.0)
    count = 0
    for images, labels in batches:
        part = jax.device_get(sums(variables, images, labels))
        total = {name: total[name] + part[name].astype(np.float64) for name in total}
        count += len(images)
    return {name: total[name] / count for name in total}


def most_important(
    scores: Mapping[str, Float[np.ndarray, " channels"]], new_widths: Mapping[str, int]
) -> dict[str, Int[np.ndarray, " kept"]]:
    """Returns the positions of the most important channels, by the path of the gate.

    Args:
      scores: The result of `importance`.
      new_widths: The number of channels to keep, by the path of the gate.

    Returns:
      The positions in ascending order. Of two equally important channels, the first is kept.
    """
    return {
        name: np.sort(np.argsort(-scores[name], kind="stable")[:width])
        for name, width in new_widths.items()
    }


def narrow(
    model: Network,
    variables: Mapping[str, Any],
    channels: Mapping[str, Int[np.ndarray, " kept"]],
) -> dict[str, Any]:
    """Returns the variables of the network without some channels.

    Args:
      model: The original network.
      variables: {"params", "batch_stats"} of the original network.
      channels: The positions of the channels to keep, by the path of the gate.

    Returns:
      The variables as NumPy arrays of the same dtypes. The statistics, scales and shifts of
      BatchNorm have the kept channels too.
    """
    prunable = _prunable_channels(model)
    outputs = {layer: kept for name, kept in channels.items() for layer in prunable[name].layers}
    inputs = {prunable[name].reader: kept for name, kept in channels.items()}

    def select(path: str, array: Any) -> np.ndarray:
        layer, _, name = path.rpartition("/")
        array = np.asarray(array)
        if name == "kernel":
            array = array[..., inputs.get(layer, slice(None)), :]
        return array[..., outputs.get(layer, slice(None))]

    flat = flatten_dict(variables, sep="/")
    # A path starts with the name of the collection, such as "params".
    selected = {path: select(path.partition("/")[2], array) for path, array in flat.items()}
    return unflatten_dict(selected, sep="/")
