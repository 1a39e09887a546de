"""The convolutional network that the project's specification prescribes."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.models.layers import BatchNorm, Conv, max_pool_2x2
from cnn_jax.models.network import Network, Stages, gate


class CNN(Network):
    """A network of convolution blocks, followed by one or two dense layers.

    There is a block [conv 3x3 -> ReLU -> BatchNorm -> pool] for each value of `features`. The
    pool is max pooling with a 2 x 2 window. The last block instead takes the mean over the whole
    image, so that the network accepts any image size.

    The names of the stages with feature maps are "conv1", "conv2" and so on. Their outputs are
    the feature maps after the convolution, ReLU and BatchNorm, and before the pool.

    Attributes:
      features: The number of channels of each convolution.
      dense: The number of units of the hidden dense layer; 0 for no hidden layer.
      dropout: The probability that a hidden unit is dropped in training.
      batch_norm: Whether BatchNorm follows each convolution.
    """

    features: Sequence[int] = (32, 64, 128)
    dense: int = 256
    dropout: float = 0.5
    batch_norm: bool = True

    first_layer = ("conv1",)

    @property
    def embedding_is_mean_map(self) -> bool:
        return not self.dense

    @property
    def stage_names(self) -> Sequence[str]:
        convolutions = [f"conv{i + 1}" for i in range(len(self.features))]
        return (*convolutions, "embedding", "logits")

    @nn.nowrap
    def find_stage(self, layer: str) -> str:
        return {"dense": "embedding", "head": "logits"}.get(layer, layer.replace("norm", "conv"))

    @nn.nowrap
    def add_stages(
        self, x: Float[Array, "batch height width channel"], stages: Stages, *, train: bool
    ) -> None:
        x = x.astype(self.dtype)
        for i, features in enumerate(self.features, start=1):
            x = Conv(features, dtype=self.dtype, name=f"conv{i}")(x)
            # An average over the whole image replaces the last pool.
            is_last = i == len(self.features)
            pool = _mean if is_last else max_pool_2x2
            maps, pooled = nn.relu(x), None
            if self.batch_norm:
                normalization = BatchNorm(
                    use_running_average=not self.is_training(f"conv{i}", train),
                    epsilon=1e-3,  # Keras uses this epsilon by default.
                    dtype=self.dtype,
                    name=f"norm{i}",
                )
                normalize = normalization.with_mean if is_last else normalization.with_max_pool
                maps, pooled = normalize(maps)
            x = gate(self, f"conv{i}", stages.add(f"conv{i}", maps))
            # Pool again if an offset or a gate has changed the maps.
            x = pool(x) if pooled is None or x is not maps else pooled
        if self.dense:
            x = nn.Dense(
                self.dense,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                name="dense",
            )(x)
            x = nn.relu(x)
        x = gate(self, "embedding", stages.add("embedding", x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        stages.add("logits", nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x))


def _mean(x: Float[Array, "batch height width channel"]) -> Float[Array, "batch channel"]:
    return jnp.mean(x, axis=(1, 2))
