"""The vision transformer (Dosovitskiy et al. 2020) of DINOv2 (Oquab et al. 2023), as in timm."""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.models.layers import Dense, LayerNorm, Mlp
from cnn_jax.models.network import Backbone, Stages

_initial_kernel = nn.initializers.truncated_normal(0.02)


class PatchEmbed(nn.Module):
    """A linear projection of image patches.

    Attributes:
      features: The number of output channels.
      patch: The height and the width of a patch.
      dtype: The dtype of the computation.
    """

    features: int
    patch: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch rows columns features"]:
        side = (self.patch, self.patch)
        return nn.Conv(
            self.features, side, strides=side, padding="VALID", dtype=self.dtype, name="proj"
        )(x)


@jax.custom_vjp
def attention_weights(
    query: Float[Array, "batch head query channel"], key: Float[Array, "batch head key channel"]
) -> Float[Array, "batch head query key"]:
    """Returns the softmax, over the keys, of the products of queries and keys.

    The products and the softmax are computed in float32, and the weights have the dtype of the
    query. No other array of this size is kept for the backward pass. The gradient of `nn.softmax`
    would keep a float32 array too, and would multiply float32 arrays.
    """
    logits = jnp.einsum("bhqc,bhkc->bhqk", query, key, preferred_element_type=jnp.float32)
    return nn.softmax(logits).astype(query.dtype)


def _attention_weights_forward(query: Array, key: Array) -> tuple[Array, tuple[Array, ...]]:
    weights = attention_weights(query, key)
    return weights, (query, key, weights)


def _attention_weights_backward(
    residuals: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array]:
    query, key, weights = residuals
    in_float32 = weights.astype(jnp.float32)
    weighted = in_float32 * gradient.astype(jnp.float32)
    logits_gradient = weighted - in_float32 * jnp.sum(weighted, axis=-1, keepdims=True)
    logits_gradient = logits_gradient.astype(query.dtype)
    return (
        jnp.einsum("bhqk,bhkc->bhqc", logits_gradient, key),
        jnp.einsum("bhqk,bhqc->bhkc", logits_gradient, query),
    )


attention_weights.defvjp(_attention_weights_forward, _attention_weights_backward)


class Attention(nn.Module):
    """Self-attention with several heads (Vaswani et al. 2017).

    Attributes:
      heads: The number of heads.
      dtype: The dtype of the computation.
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch token channel"]
    ) -> Float[Array, "batch token channel"]:
        batch, tokens, channels = x.shape
        width = channels // self.heads
        x = Dense(3 * channels, self.dtype, name="qkv")(x)
        x = x.reshape(batch, tokens, 3, self.heads, width)
        # On a CPU, matrix products are fastest if the batch axes come first.
        query, key, value = x.transpose(2, 0, 3, 1, 4)
        weights = attention_weights(query / math.sqrt(width), key)
        x = jnp.einsum("bhqk,bhkc->bqhc", weights, value).reshape(batch, tokens, channels)
        return Dense(channels, self.dtype, name="proj")(x)


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al. 2021), initialised to 1e-5."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch token channel"]
    ) -> Float[Array, "batch token channel"]:
        gamma = self.param("gamma", nn.initializers.constant(1e-5), (x.shape[-1],))
        return x * gamma.astype(x.dtype)[None, None]


class Block(nn.Module):
    """Attention and a multilayer perceptron, each after LayerNorm and with a shortcut.

    Attributes:
      heads: The number of heads of the attention.
      drop_path: The probability that an image skips one half of the block in training.
      is_training: Whether images skip blocks at random.
      dtype: The dtype of the computation.
    """

    heads: int
    drop_path: float
    is_training: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch token channel"]
    ) -> Float[Array, "batch token channel"]:
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        is_kept = nn.Dropout(
            self.drop_path, broadcast_dims=(1, 2), deterministic=not self.is_training
        )
        y = Attention(self.heads, self.dtype, name="attn")(norm(name="norm1")(x))
        x = x + is_kept(LayerScale(name="ls1")(y))
        y = Mlp(4 * x.shape[-1], self.dtype, name="mlp")(norm(name="norm2")(x))
        return x + is_kept(LayerScale(name="ls2")(y))


class VisionTransformer(Backbone):
    """Patches and a class token with position embeddings, then blocks, then LayerNorm.

    The embedding is the class token after the last block and LayerNorm.

    The feature maps of a stage are the tokens of the patches as a grid. The stages are
    "patch_embed", and every third block ("blocks_2", "blocks_5" and so on) up to the last block
    but one. The last block belongs to the stage "embedding", because only its class token is
    used: the gradient with respect to the patches after this block is 0.

    Attributes:
      features: The number of channels.
      depth: The number of blocks.
      heads: The number of heads of the attention.
      patch: The height and the width of a patch.
      grid: The height and the width, in patches, of the images for which the position
        embeddings are stored. For other sizes, the embeddings are interpolated.
      drop_path: The probability that an image skips a half of the last block in training. The
        probability grows from 0 in proportion to the block's number (Huang et al. 2016).
    """

    features: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 14
    grid: int = 37
    drop_path: float = 0.0

    first_layer = ("patch_embed", "proj")

    @property
    def stage_names(self) -> Sequence[str]:
        last = self.depth - 2
        ends = [f"blocks_{i}" for i in range(self.depth - 1) if i % 3 == 2 or i == last]
        return ("patch_embed", *ends, "embedding", "logits")

    @nn.nowrap
    def find_stage(self, layer: str) -> str:
        if layer.startswith("blocks_"):
            later = [f"blocks_{i}" for i in range(int(layer[7:]), self.depth)]
            return next((name for name in later if name in self.stage_names), "embedding")
        return {"norm": "embedding", "head": "logits"}.get(layer, "patch_embed")

    @nn.nowrap
    def add_stages(
        self, x: Float[Array, "batch height width channel"], stages: Stages, *, train: bool
    ) -> None:
        x = PatchEmbed(self.features, self.patch, self.dtype, name="patch_embed")(x)
        shape = x.shape

        def add_stage(name: str, tokens: Array) -> Array:
            patches = stages.add(name, tokens[:, 1:].reshape(shape))
            return jnp.concatenate([tokens[:, :1], _flatten(patches)], axis=1)

        class_token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.features))
        class_token = jnp.broadcast_to(class_token, (len(x), 1, self.features))
        tokens = jnp.concatenate([class_token.astype(self.dtype), _flatten(x)], axis=1)
        tokens = tokens + self._positions(*shape[1:3]).astype(self.dtype)
        tokens = add_stage("patch_embed", tokens)
        for i in range(self.depth):
            name = f"blocks_{i}"
            tokens = Block(
                heads=self.heads,
                drop_path=self.drop_path * i / max(self.depth - 1, 1),
                is_training=self.is_training(self.find_stage(name), train),
                dtype=self.dtype,
                name=name,
            )(tokens)
            if name in self.stage_names:
                tokens = add_stage(name, tokens)
        x = LayerNorm(dtype=self.dtype, name="norm")(tokens[:, 0])
        self.classify(stages, x, train=train)

    def _positions(self, rows: int, columns: int) -> Float[Array, "1 token channel"]:
        """Returns the position embeddings of the class token and of a grid of patches."""
        stored = self.param("pos_embed", _initial_kernel, (1, 1 + self.grid**2, self.features))
        patches = stored[:, 1:].reshape(1, self.grid, self.grid, self.features)
        # By default, `jax.image.resize` applies antialiasing, like timm.
        patches = jax.image.resize(patches, (1, rows, columns, self.features), "bicubic")
        return jnp.concatenate([stored[:, :1], _flatten(patches)], axis=1)


def _flatten(
    maps: Float[Array, "batch height width channel"],
) -> Float[Array, "batch token channel"]:
    """Returns the pixels of feature maps as tokens, row by row."""
    return maps.reshape(len(maps), -1, maps.shape[-1])


vit_small_patch14_dinov2 = functools.partial(
    VisionTransformer, features=384, depth=12, heads=6, patch=14, grid=37
)
