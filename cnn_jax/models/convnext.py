"""ConvNeXt (Liu et al. 2022), as implemented in timm."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.models.convolutions import depthwise_convolve, paddings
from cnn_jax.models.layers import LayerNorm, Mlp, add_bias
from cnn_jax.models.network import Backbone, Stages

_initial_kernel = nn.initializers.truncated_normal(0.02)


class DepthwiseConv(nn.Module):
    """A 7 x 7 depthwise convolution with stride 1 and symmetric padding.

    Attributes:
      dtype: The dtype of the computation.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch height width channel"]:
        channels = x.shape[-1]
        kernel = self.param("kernel", _initial_kernel, (7, 7, 1, channels)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,)).astype(self.dtype)
        pads = paddings("symmetric", 7, 1, (x.shape[1], x.shape[2]))
        x = depthwise_convolve(x.astype(self.dtype), kernel[:, :, 0], 1, pads)
        return add_bias(x, bias)


class ConvNeXtBlock(nn.Module):
    """A 7 x 7 depthwise convolution, LayerNorm, a multilayer perceptron, and a shortcut.

    Attributes:
      drop_path: The probability that an image skips the block in training.
      is_training: Whether images skip blocks at random.
      dtype: The dtype of the computation.
    """

    drop_path: float
    is_training: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch height width channel"]:
        shortcut = x
        channels = x.shape[-1]
        x = DepthwiseConv(self.dtype, name="conv_dw")(x)
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        x = Mlp(4 * channels, self.dtype, name="mlp")(x)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (channels,))
        x = x * gamma.astype(self.dtype)[None, None, None]
        is_kept = nn.Dropout(
            self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not self.is_training
        )
        return is_kept(x) + shortcut


class ConvNeXtStage(nn.Module):
    """An optional downsampling layer, followed by several blocks.

    Attributes:
      features: The number of channels.
      downsample: Whether LayerNorm and a 2 x 2 convolution with stride 2 precede the blocks.
      drop_path: The probability of each block that an image skips it in training.
      is_training: Whether images skip blocks at random.
      dtype: The dtype of the computation.
    """

    features: int
    downsample: bool
    drop_path: Sequence[float]
    is_training: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch new_height new_width features"]:
        if self.downsample:
            x = LayerNorm(dtype=self.dtype, name="downsample_0")(x)
            x = _patch_convolution(self.features, 2, self.dtype, "downsample_1")(x)
        for i, drop_path in enumerate(self.drop_path):
            x = ConvNeXtBlock(drop_path, self.is_training, self.dtype, name=f"blocks_{i}")(x)
        return x


def _patch_convolution(features: int, side: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    """Returns a convolution layer for non-overlapping patches of `side` x `side` pixels."""
    return nn.Conv(
        features,
        (side, side),
        strides=(side, side),
        padding="VALID",
        kernel_init=_initial_kernel,
        dtype=dtype,
        name=name,
    )


class ConvNeXt(Backbone):
    """A stem of 4 x 4 patches, four stages, the mean over all pixels, and LayerNorm.

    Each stage after the first one halves the height and the width. The stages are "stem" and
    "stages_0" to "stages_3".

    Attributes:
      blocks: The number of blocks of each stage.
      features: The number of channels of each stage.
      drop_path: The probability that an image skips the last block in training. The
        probability grows from 0 in proportion to the block's number (Huang et al. 2016).
    """

    blocks: Sequence[int] = (3, 3, 9, 3)
    features: Sequence[int] = (96, 192, 384, 768)
    drop_path: float = 0.0

    first_layer = ("stem_0",)

    @property
    def stage_names(self) -> Sequence[str]:
        return ("stem", *(f"stages_{i}" for i in range(len(self.blocks))), "embedding", "logits")

    @nn.nowrap
    def find_stage(self, layer: str) -> str:
        stages = {"stem_0": "stem", "stem_1": "stem", "norm": "embedding", "head": "logits"}
        return stages.get(layer, layer)

    @nn.nowrap
    def add_stages(
        self, x: Float[Array, "batch height width channel"], stages: Stages, *, train: bool
    ) -> None:
        x = _patch_convolution(self.features[0], 4, self.dtype, "stem_0")(x)
        x = LayerNorm(dtype=self.dtype, name="stem_1")(x)
        x = stages.add("stem", x)
        total = sum(self.blocks)
        drop_path = [self.drop_path * i / max(total - 1, 1) for i in range(total)]
        for i, blocks in enumerate(self.blocks):
            start = sum(self.blocks[:i])
            x = ConvNeXtStage(
                features=self.features[i],
                downsample=i > 0,
                drop_path=drop_path[start : start + blocks],
                is_training=self.is_training(f"stages_{i}", train),
                dtype=self.dtype,
                name=f"stages_{i}",
            )(x)
            x = stages.add(f"stages_{i}", x)
        x = jnp.mean(x, axis=(1, 2))
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        self.classify(stages, x, train=train)


convnext_tiny = functools.partial(ConvNeXt, blocks=(3, 3, 9, 3), features=(96, 192, 384, 768))
