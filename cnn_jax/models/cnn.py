"""The convolutional network that the project's specification prescribes."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.models.layers import BatchNorm, Conv, max_pool_2x2
from cnn_jax.models.parts import NetworkParts


class CNN(nn.Module):
    """A network of convolution blocks, followed by one or two dense layers.

    There is a block [conv 3x3 -> ReLU -> BatchNorm -> pool] for each value of `features`. The
    pool is max pooling with a 2 x 2 window. The last block instead takes the mean over the whole
    image, so that the network accepts any image size.

    Attributes:
      num_classes: The number of classes.
      features: The number of channels of each convolution.
      dense: The number of units of the hidden dense layer; 0 for no hidden layer.
      dropout: The probability that a hidden unit is dropped in training.
      batch_norm: Whether BatchNorm follows each convolution.
      dtype: The dtype of the computation. Parameters, statistics and logits are float32.
    """

    num_classes: int
    features: Sequence[int] = (32, 64, 128)
    dense: int = 256
    dropout: float = 0.5
    batch_norm: bool = True
    dtype: jnp.dtype = jnp.dtype("float32")

    def __call__(
        self,
        x: Float[Array, "batch height width channel"],
        *,
        train: bool = False,
    ) -> Float[Array, "batch classes"]:
        """Returns the logits, float32, of normalised images."""
        return self.stages(x, train=train)["logits"]

    @nn.nowrap
    def parts(self, params: Mapping[str, Any]) -> NetworkParts:
        """Returns the parameters that the explanation methods need; see `NetworkParts`."""
        return NetworkParts(
            first_kernel=params["conv1"]["kernel"],
            head_kernel=params["head"]["kernel"],
            head_bias=params["head"]["bias"],
            embedding_is_mean_map=not self.dense,
        )

    @nn.compact
    def stages(
        self,
        x: Float[Array, "batch height width channel"],
        *,
        train: bool = False,
        offsets: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Returns the output of each stage of the network for normalised images.

        Args:
          x: The images.
          train: Whether to use dropout and the statistics of the batch.
          offsets: Arrays to add to the outputs of the stages with these names. The gradient
            with respect to an offset of zeros is the gradient with respect to the output.

        Returns:
          The outputs by name, in the order of the stages: "conv1", "conv2" and so on, the
          feature maps [batch, height, width, channel] after the convolution, ReLU and
          BatchNorm, and before the pool; "embedding" [batch, dense], the input of the head
          (the mean feature maps if there is no hidden layer); "logits" [batch, classes],
          float32.
        """
        stages = {}

        def stage(name: str, x: Array) -> Array:
            if offsets and name in offsets:
                x = x + offsets[name].astype(x.dtype)
            stages[name] = x
            return x

        x = x.astype(self.dtype)
        for i, features in enumerate(self.features, start=1):
            x = Conv(features, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.relu(x)
            if self.batch_norm:
                x = BatchNorm(
                    use_running_average=not train,
                    epsilon=1e-3,  # Keras uses this epsilon by default.
                    dtype=self.dtype,
                    name=f"norm{i}",
                )(x)
            x = stage(f"conv{i}", x)
            if i < len(self.features):
                x = max_pool_2x2(x)
        x = jnp.mean(x, axis=(1, 2))
        if self.dense:
            x = nn.Dense(
                self.dense,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                name="dense",
            )(x)
            x = nn.relu(x)
        x = stage("embedding", x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        stage("logits", nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x))
        return stages
