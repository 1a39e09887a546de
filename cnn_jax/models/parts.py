"""The network parameters that the explanation methods need."""

from typing import NamedTuple

from jaxtyping import Array, Float


class NetworkParts(NamedTuple):
    """The parameters that explanation methods need, under names common to all networks.

    A network that supports explanations has two methods: `stages`, whose result ends with
    "embedding" and "logits", and `parts`. `models.cnn.CNN` is an example.

    Attributes:
      first_kernel: The kernel of the first layer, if it is a convolution over R, G and B; else
        None.
      head_kernel: The kernel of the last dense layer.
      head_bias: The bias of the last dense layer.
      embedding_is_mean_map: Whether the embedding is the mean of the last feature maps over
        their pixels, which class activation maps need.
    """

    first_kernel: Float[Array, "height width 3 features"] | None
    head_kernel: Float[Array, "embedding classes"]
    head_bias: Float[Array, " classes"]
    embedding_is_mean_map: bool
