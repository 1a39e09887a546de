"""The networks that a configuration can select, and the configuration keys of each network.

This module imports no network, so that `--help` and the check of the configuration can read
the list before JAX is imported.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cnn_jax.config import keys
from cnn_jax.config.keys import Key


@dataclasses.dataclass(frozen=True)
class NetworkEntry:
    """A network that the key `model.name` can select.

    Attributes:
      path: The class of the network, or a function that makes one, as "package.module:name". The
        keys below are fields of the network, except `pretrained`.
      keys: The keys of the section `model` of the configuration, without `name`.
      size_divisor: A function from the section `model`, as a dictionary, to the number that must
        divide the height and the width of the images.
      weights: The pretrained weights for the value "auto" of the key `pretrained`; empty: none.
    """

    path: str
    keys: Mapping[str, Key]
    size_divisor: Callable[[Mapping[str, Any]], int] = lambda section: 1
    weights: str = ""


# Several networks use the functions below, which create keys and compute divisors of the image
# size.


def _channels(default: Sequence[int], comment: str, length: int | None = None) -> Key:
    """Creates a key whose value is a list of channel counts; None means any length above 0."""

    def accepts(value: Any) -> bool:
        is_list = isinstance(value, tuple | list) and len(value) == (length or len(value) or 1)
        return is_list and all(keys.is_int(count) and count > 0 for count in value)

    requirement = f"{length or 'one or more'} channel counts, each 1 or more"
    return Key(default, requirement, accepts, comment)


def _divisor_of_pools(section: Mapping[str, Any]) -> int:
    """Returns the number by which the image size must be divisible, because of 2 x 2 pooling.

    Each pooling halves the height and the width. The key `features` has a value for each block.
    """
    return 2 ** (len(section["features"]) - 1)


# The keys of all networks with pretrained weights.
_BACKBONE_KEYS = {
    "pretrained": keys.text(
        "",
        "The pretrained weights: a model id of the Hugging Face hub, a safetensors file or a "
        "bundle; auto: the usual weights of this network; empty: random weights.",
        "a model id, a path, auto, or empty",
        lambda v: True,
    ),
    "embedding": keys.choice(
        "last",
        "last: the head sees the last feature maps only; stages: it also sees the mean and the "
        "standard deviation of each feature map between the first and the last stage.",
        ("last", "stages"),
    ),
    "dropout": keys.fraction_below_one(
        0.0, "The fraction of the head's inputs that a training step leaves out."
    ),
}
_BATCH_NORM_KEYS = {
    "batch_norm_statistics": keys.choice(
        "auto",
        "frozen: BatchNorm keeps its initial statistics; batch: it uses those of the batches; "
        "auto: frozen with pretrained weights, else batch.",
        ("auto", "frozen", "batch"),
    ),
}
_DROP_PATH_KEYS = {
    "drop_path": keys.fraction_below_one(
        0.0,
        "The probability that an image skips the last block in a training step; it grows from 0 "
        "in proportion to the block's number.",
    ),
}


def _resnet(name: str) -> NetworkEntry:
    inner_features = _channels(
        (64, 128, 256, 512),
        "Channels between the convolutions of a block, for each of the four groups of blocks.",
        length=4,
    )
    own = _BACKBONE_KEYS | _BATCH_NORM_KEYS | {"inner_features": inner_features}
    return NetworkEntry(f"cnn_jax.models.resnet:{name}", own, weights=f"timm/{name}.a1_in1k")


def _efficientnet(name: str, tag: str) -> NetworkEntry:
    own = _BACKBONE_KEYS | _BATCH_NORM_KEYS | _DROP_PATH_KEYS
    weights = f"timm/{name}.{tag}" if tag else ""
    return NetworkEntry(f"cnn_jax.models.efficientnet:{name}", own, weights=weights)


NETWORKS = {
    "cnn": NetworkEntry(
        path="cnn_jax.models.cnn:CNN",
        keys={
            "features": _channels((32, 64, 128), "Channels of each convolution."),
            "dense": keys.integer(256, "Units of the hidden layer; 0: no hidden layer.", low=0),
            "dropout": keys.fraction_below_one(
                0.5, "The fraction of hidden units that a training step leaves out."
            ),
            "batch_norm": keys.boolean(True, "BatchNorm after each convolution."),
        },
        size_divisor=_divisor_of_pools,
    ),
    "resnet18": _resnet("resnet18"),
    "resnet34": _resnet("resnet34"),
    "resnet50": _resnet("resnet50"),
    # timm's networks pad symmetrically; those with the prefix "tf_" pad as TensorFlow does.
    "efficientnet_b0": _efficientnet("efficientnet_b0", "ra_in1k"),
    "efficientnet_lite0": _efficientnet("efficientnet_lite0", "ra_in1k"),
    "efficientnet_lite1": _efficientnet("efficientnet_lite1", ""),
    "efficientnet_lite2": _efficientnet("efficientnet_lite2", ""),
    "tf_efficientnet_b0": _efficientnet("tf_efficientnet_b0", "in1k"),
    "tf_efficientnet_lite0": _efficientnet("tf_efficientnet_lite0", "in1k"),
    "tf_efficientnet_lite1": _efficientnet("tf_efficientnet_lite1", "in1k"),
    "tf_efficientnet_lite2": _efficientnet("tf_efficientnet_lite2", "in1k"),
    "convnext_tiny": NetworkEntry(
        "cnn_jax.models.convnext:convnext_tiny",
        _BACKBONE_KEYS | _DROP_PATH_KEYS,
        # The strides are 4, 2, 2 and 2. If the image size were not divisible by 32, the network
        # would ignore pixels at the edges.
        size_divisor=lambda section: 32,
        weights="timm/convnext_tiny.in12k_ft_in1k",
    ),
    "vit_small_patch14_dinov2": NetworkEntry(
        "cnn_jax.models.vit:vit_small_patch14_dinov2",
        _BACKBONE_KEYS | _DROP_PATH_KEYS,
        size_divisor=lambda section: 14,
        weights="timm/vit_small_patch14_dinov2.lvd142m",
    ),
}
