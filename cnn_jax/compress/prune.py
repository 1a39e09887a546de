"""Structured pruning of a network: the importance of channels, and the network without some.

Only networks that are a chain of layers can be pruned: a layer reads all channels of the layer
before it, and nothing else. Of the networks in `cnn_jax.models.NETWORKS`, this is "cnn".
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, UInt8

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.models.network import Network, forward_flops, layer_names, make_model, stages
from cnn_jax.system.errors import ConfigError
from cnn_jax.training.loss import cross_entropy

# Runtimes compute channels in blocks of 8 or 16, so other numbers of channels are not faster.
WIDTH_MULTIPLE = 16


def widths(section: Mapping[str, Any]) -> dict[str, int]:
    """Returns the number of channels of each stage that can be pruned.

    Args:
      section: The section `model` of a configuration or bundle.

    Raises:
      ConfigError: The network is not a chain of layers.
    """
    if section["name"] != "cnn":
        raise ConfigError(
            f"--bundle: the network {section['name']} cannot be pruned, because its blocks share "
            "their channels; only cnn can be pruned"
        )
    found = {f"conv{i}": width for i, width in enumerate(section["features"], start=1)}
    return found | ({"embedding": section["dense"]} if section["dense"] else {})


def with_widths(section: Mapping[str, Any], new_widths: Mapping[str, int]) -> dict[str, Any]:
    """Returns a copy of the section `model` with other numbers of channels, by stage."""
    features = [width for stage, width in new_widths.items() if stage != "embedding"]
    return {**section, "features": features, "dense": new_widths.get("embedding", 0)}


def choose_widths(
    section: Mapping[str, Any],
    num_classes: int,
    image_size: tuple[int, int],
    keep: float,
    precision: str = "float32",
) -> dict[str, int]:
    """Returns the numbers of channels of the largest network within a number of operations.

    All stages keep the same fraction of their channels, rounded to a multiple of
    `WIDTH_MULTIPLE`. A stage keeps at least this number of channels, if it has them.

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
        new_widths = {stage: _reduced(width, percent) for stage, width in original.items()}
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
    variables: PyTree,
    preprocessing: Preprocessing,
    batches: Iterable[tuple[UInt8[np.ndarray, "_ height width 3"], Int[np.ndarray, " _"]]],
    stage_names: Iterable[str],
) -> dict[str, Float[np.ndarray, " channels"]]:
    """Returns the importance of each channel of the stages.

    The importance of a channel is the mean over the images of |d|, where d is the change of the
    image's loss to first order if the channel is set to zero: the sum over the pixels of the
    activation times its gradient (Molchanov et al. 2017, "Pruning Convolutional Neural Networks
    for Resource Efficient Inference", equation 8).

    Args:
      model: The network.
      variables: {"params", "batch_stats"} of the network.
      preprocessing: The mean and the standard deviation of the normalisation.
      batches: Images, and the class of each image; one or more batches.
      stage_names: The names of the stages.
    """
    names = list(stage_names)

    def outputs_and_losses(
        offsets: Mapping[str, Array], variables: PyTree, images: Array, labels: Array
    ) -> tuple[Array, dict[str, Array]]:
        outputs = stages(model, variables, images, preprocessing, offsets)
        return jnp.sum(cross_entropy(outputs["logits"], labels)), outputs

    @jax.jit
    def sums(variables: PyTree, images: Array, labels: Array) -> dict[str, Array]:
        shapes = jax.eval_shape(lambda v, x: stages(model, v, x, preprocessing), variables, images)
        zeros = {name: jnp.zeros(shapes[name].shape, jnp.float32) for name in names}
        gradients, outputs = jax.grad(outputs_and_losses, has_aux=True)(
            zeros, variables, images, labels
        )
        changes = {
            name: jnp.reshape(outputs[name] * gradients[name], (len(images), -1, shape.shape[-1]))
            for name, shape in zeros.items()
        }
        return {name: jnp.abs(change.sum(axis=1)).sum(axis=0) for name, change in changes.items()}

    total: dict[str, Any] = dict.fromkeys(names, 0.0)
    count = 0
    for images, labels in batches:
        part = jax.device_get(sums(variables, images, labels))
        total = {name: total[name] + part[name].astype(np.float64) for name in names}
        count += len(images)
    return {name: total[name] / count for name in names}


def most_important(
    scores: Mapping[str, Float[np.ndarray, " channels"]], new_widths: Mapping[str, int]
) -> dict[str, Int[np.ndarray, " kept"]]:
    """Returns the positions, in ascending order, of the most important channels of each stage."""
    return {
        stage: np.sort(np.argsort(-scores[stage], kind="stable")[:width])
        for stage, width in new_widths.items()
    }


def narrow(
    model: Network,
    variables: Mapping[str, Any],
    image_size: tuple[int, int],
    channels: Mapping[str, Int[np.ndarray, " kept"]],
) -> dict[str, Any]:
    """Returns the variables of the network without some channels.

    Args:
      model: The original network, which must be a chain of layers.
      variables: {"params", "batch_stats"} of the original network.
      image_size: The height and the width of the images.
      channels: The positions of the channels to keep, by stage. Other stages keep all channels.
    """
    narrowed: dict[str, Any] = {name: {} for name in variables}
    inputs: Any = slice(None)
    for layer in layer_names(model, image_size):
        outputs: Any = channels.get(model.find_stage(layer), slice(None))
        for collection, layers in variables.items():
            for name, array in layers.get(layer, {}).items():
                array = np.asarray(array)
                if name == "kernel":
                    array = array[..., inputs, :]
                narrowed[collection].setdefault(layer, {})[name] = array[..., outputs]
        inputs = outputs
    return narrowed
