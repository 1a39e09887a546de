"""Residual networks (He et al. 2015), as implemented in timm and torchvision."""

import functools
from collections.abc import Callable, Sequence
from typing import cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.models.convolutions import ConvolutionalBackbone
from cnn_jax.models.layers import max_pool_3x3
from cnn_jax.models.network import Stages, gate


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    Attributes:
      features: The number of output channels.
      inner_features: The number of channels between the two convolutions.
      stride: The stride of the first convolution and of the shortcut.
      conv_norm: `convolve_and_normalize` with the options of the network.
    """

    features: int
    inner_features: int
    stride: int
    conv_norm: Callable[..., Array]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch new_height new_width features"]:
        shortcut = _shortcut(x, self.features, self.stride, self.conv_norm)
        x = self.conv_norm(x, self.inner_features, 3, self.stride, conv="conv1", norm="bn1")
        x = gate(self, "conv1", nn.relu(x))
        x = self.conv_norm(x, self.features, 3, conv="conv2", norm="bn2")
        return nn.relu(x + shortcut)


class Bottleneck(nn.Module):
    """Three convolutions (1 x 1, 3 x 3 and 1 x 1) and a shortcut.

    The 3 x 3 convolution has the stride; in the paper, the first convolution has the stride.

    Attributes:
      features: The number of output channels.
      inner_features: The number of output channels of the first two convolutions; in the paper, a
        quarter of `features`.
      stride: The stride of the 3 x 3 convolution and of the shortcut.
      conv_norm: `convolve_and_normalize` with the options of the network.
    """

    features: int
    inner_features: int
    stride: int
    conv_norm: Callable[..., Array]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch new_height new_width features"]:
        width = self.inner_features
        shortcut = _shortcut(x, self.features, self.stride, self.conv_norm)
        x = self.conv_norm(x, width, 1, conv="conv1", norm="bn1")
        x = gate(self, "conv1", nn.relu(x))
        x = self.conv_norm(x, width, 3, self.stride, conv="conv2", norm="bn2")
        x = gate(self, "conv2", nn.relu(x))
        x = self.conv_norm(x, self.features, 1, conv="conv3", norm="bn3")
        return nn.relu(x + shortcut)


def _shortcut(x: Array, features: int, stride: int, conv_norm: Callable[..., Array]) -> Array:
    """Returns the input of a block, projected if the input and the output have different shapes."""
    if stride == 1 and x.shape[-1] == features:
        return x
    return conv_norm(x, features, 1, stride, conv="downsample_0", norm="downsample_1")


class ResNet(ConvolutionalBackbone):
    """A stem, four groups of residual blocks, and the mean over all pixels.

    Table 1 of the paper, with the stages "stem" and "layer1" to "layer4":

        stem    7 x 7 convolution, 64 channels, stride 2; max pool 3 x 3, stride 2
        layer1  blocks of 64 channels (bottleneck blocks: 256)
        layer2  blocks of 128 (512), the first with stride 2
        layer3  blocks of 256 (1024), the first with stride 2
        layer4  blocks of 512 (2048), the first with stride 2

    The stage "stem" ends before the max pool.

    Attributes:
      blocks: The number of blocks of each group.
      block: The class of the blocks: `BasicBlock` or `Bottleneck`.
      inner_features: The number of channels between the convolutions of a block, for each group.
    """

    blocks: Sequence[int] = (2, 2, 2, 2)
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    inner_features: Sequence[int] = (64, 128, 256, 512)

    first_layer = ("conv1",)

    @property
    def stage_names(self) -> Sequence[str]:
        layers = [f"layer{i + 1}" for i in range(len(self.blocks))]
        return ("stem", *layers, "embedding", "logits")

    @nn.nowrap
    def find_stage(self, layer: str) -> str:
        stages = {"conv1": "stem", "bn1": "stem", "head": "logits"}
        return stages.get(layer) or layer.partition("_")[0]

    @nn.nowrap
    def add_stages(
        self, x: Float[Array, "batch height width channel"], stages: Stages, *, train: bool
    ) -> None:
        conv_norm = self.conv_norm("stem", train)
        x = nn.relu(conv_norm(x, 64, 7, 2, conv="conv1", norm="bn1"))
        x = stages.add("stem", x)
        x = cast(Array, max_pool_3x3(x))
        for group, blocks in enumerate(self.blocks, start=1):
            conv_norm = self.conv_norm(f"layer{group}", train)
            features = 64 * 2 ** (group - 1) * (4 if self.block is Bottleneck else 1)
            for i in range(blocks):
                stride = 2 if group > 1 and i == 0 else 1
                inner = self.inner_features[group - 1]
                x = self.block(features, inner, stride, conv_norm, name=f"layer{group}_{i}")(x)
            x = stages.add(f"layer{group}", x)
        self.classify(stages, jnp.mean(x, axis=(1, 2)), train=train)


resnet18 = functools.partial(ResNet, blocks=(2, 2, 2, 2), block=BasicBlock)
resnet34 = functools.partial(ResNet, blocks=(3, 4, 6, 3), block=BasicBlock)
resnet50 = functools.partial(ResNet, blocks=(3, 4, 6, 3), block=Bottleneck)
