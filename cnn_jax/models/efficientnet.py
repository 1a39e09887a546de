"""EfficientNet (Tan and Le 2019) and EfficientNet-Lite, as implemented in timm."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.models.convolutions import ConvolutionalBackbone
from cnn_jax.models.layers import relu6
from cnn_jax.models.network import Stages


class _Row(NamedTuple):
    """A stage in table 1 of the paper; only the first block of a stage uses `stride`."""

    expansion: int
    kernel_size: int
    stride: int
    features: int
    blocks: int


_TABLE = (
    _Row(expansion=1, kernel_size=3, stride=1, features=16, blocks=1),
    _Row(expansion=6, kernel_size=3, stride=2, features=24, blocks=2),
    _Row(expansion=6, kernel_size=5, stride=2, features=40, blocks=2),
    _Row(expansion=6, kernel_size=3, stride=2, features=80, blocks=3),
    _Row(expansion=6, kernel_size=5, stride=1, features=112, blocks=3),
    _Row(expansion=6, kernel_size=5, stride=2, features=192, blocks=4),
    _Row(expansion=6, kernel_size=3, stride=1, features=320, blocks=1),
)
_STEM_FEATURES, _HEAD_FEATURES = 32, 1280


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a factor that depends on the means of all channels.

    Attributes:
      squeezed: The number of hidden units.
      dtype: The dtype of the computation.
    """

    squeezed: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch height width channel"]:
        conv = functools.partial(nn.Conv, kernel_size=(1, 1), dtype=self.dtype)
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        hidden = nn.silu(conv(self.squeezed, name="conv_reduce")(means))
        return x * nn.sigmoid(conv(x.shape[-1], name="conv_expand")(hidden))


class InvertedResidual(nn.Module):
    """The MBConv block: 1 x 1 expansion, depthwise convolution, 1 x 1 projection, shortcut.

    If the expansion is 1, the first convolution is missing, and the names of the layers are then
    different, as in timm. The shortcut exists if the input and the output have the same shape.

    Attributes:
      row: The row of the table.
      stride: The stride of the depthwise convolution.
      squeeze_excite: Whether the block has squeeze-and-excitation.
      drop_path: The probability that an example skips the block in training.
      is_training: Whether to skip blocks at random.
      activation: The activation function.
      conv_norm: `convolve_and_normalize` with the options of the network.
      dtype: The dtype of the computation.
    """

    row: _Row
    stride: int
    squeeze_excite: bool
    drop_path: float
    is_training: bool
    activation: Callable[[Array], Array]
    conv_norm: Callable[..., Array]
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch new_height new_width features"]:
        shortcut = x
        channels = x.shape[-1]
        expanded = channels * self.row.expansion
        names = ["conv_dw", "conv_pw"]
        if self.row.expansion > 1:
            names = ["conv_pw", "conv_dw", "conv_pwl"]
            x = self.activation(self.conv_norm(x, expanded, 1, conv="conv_pw", norm="bn1"))
        depthwise, projection = names[-2:]
        x = self.conv_norm(
            x,
            expanded,
            self.row.kernel_size,
            self.stride,
            depthwise=True,
            conv=depthwise,
            norm=f"bn{len(names) - 1}",
        )
        x = self.activation(x)
        if self.squeeze_excite:
            # The number of hidden units is a quarter of the block's input channels, not of the
            # expanded channels.
            x = SqueezeExcite(channels // 4, self.dtype, name="se")(x)
        x = self.conv_norm(x, self.row.features, 1, conv=projection, norm=f"bn{len(names)}")
        if x.shape != shortcut.shape:
            return x
        skip = nn.Dropout(
            self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not self.is_training
        )
        return skip(x) + shortcut


class EfficientNet(ConvolutionalBackbone):
    """A stem, seven stages of inverted residual blocks, a 1 x 1 convolution, and mean pooling.

    The stages are "stem", "blocks_0" to "blocks_6" (the rows of the table) and "conv_head".

    Attributes:
      width: The factor of the numbers of channels, which are rounded to multiples of 8.
      depth: The factor of the numbers of blocks, which are rounded up.
      is_lite: Whether the network is EfficientNet-Lite: ReLU6 instead of SiLU, and no
        squeeze-and-excitation. The factors do not change the stem, the last convolution, or the
        number of blocks in the first and the last row of the table.
      drop_path: The probability that an example skips the last block in training. It grows
        from 0 in proportion to the block's number (Huang et al. 2016).
    """

    width: float = 1.0
    depth: float = 1.0
    is_lite: bool = False
    drop_path: float = 0.0

    first_layer = ("conv_stem",)

    @property
    def stage_names(self) -> Sequence[str]:
        blocks = [f"blocks_{i}" for i in range(len(_TABLE))]
        return ("stem", *blocks, "conv_head", "embedding", "logits")

    @nn.nowrap
    def find_stage(self, layer: str) -> str:
        stages = {"conv_stem": "stem", "bn1": "stem", "bn2": "conv_head", "head": "logits"}
        return stages.get(layer) or "_".join(layer.split("_")[:2])

    @nn.nowrap
    def add_stages(
        self, x: Float[Array, "batch height width channel"], stages: Stages, *, train: bool
    ) -> None:
        activation = relu6 if self.is_lite else nn.silu
        stem, head = (
            n if self.is_lite else _scaled(n, self.width) for n in (_STEM_FEATURES, _HEAD_FEATURES)
        )
        conv_norm = self.conv_norm("stem", train)
        x = stages.add("stem", activation(conv_norm(x, stem, 3, 2, conv="conv_stem", norm="bn1")))
        rows = self._rows()
        block, total = 0, sum(row.blocks for row in rows)
        for i, row in enumerate(rows):
            for j in range(row.blocks):
                x = InvertedResidual(
                    row=row,
                    stride=row.stride if j == 0 else 1,
                    squeeze_excite=not self.is_lite,
                    drop_path=self.drop_path * block / total,
                    is_training=self.is_training(f"blocks_{i}", train),
                    activation=activation,
                    conv_norm=self.conv_norm(f"blocks_{i}", train),
                    dtype=self.dtype,
                    name=f"blocks_{i}_{j}",
                )(x)
                block += 1
            x = stages.add(f"blocks_{i}", x)
        conv_norm = self.conv_norm("conv_head", train)
        x = stages.add("conv_head", activation(conv_norm(x, head, 1, conv="conv_head", norm="bn2")))
        self.classify(stages, jnp.mean(x, axis=(1, 2)), train=train)

    @nn.nowrap
    def _rows(self) -> list[_Row]:
        """Returns `_TABLE` with the channel counts and block counts of this network."""
        return [
            row._replace(
                features=_scaled(row.features, self.width),
                blocks=row.blocks
                if self.is_lite and row in (_TABLE[0], _TABLE[-1])
                else math.ceil(row.blocks * self.depth),
            )
            for row in _TABLE
        ]


def _scaled(features: int, factor: float) -> int:
    """Rounds `features * factor` to the nearest multiple of 8 that is at least 90 % of it."""
    scaled = features * factor
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * scaled else rounded + 8


_lite = functools.partial(EfficientNet, is_lite=True)
# The options of the networks whose weights were trained in TensorFlow.
_tf = {"padding": "same", "epsilon": 1e-3}

efficientnet_b0 = EfficientNet
efficientnet_lite0 = _lite
efficientnet_lite1 = functools.partial(_lite, depth=1.1)
efficientnet_lite2 = functools.partial(_lite, width=1.1, depth=1.2)
tf_efficientnet_b0 = functools.partial(efficientnet_b0, **_tf)
tf_efficientnet_lite0 = functools.partial(efficientnet_lite0, **_tf)
tf_efficientnet_lite1 = functools.partial(efficientnet_lite1, **_tf)
tf_efficientnet_lite2 = functools.partial(efficientnet_lite2, **_tf)
