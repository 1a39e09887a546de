"""The parameters of a network that explanations use."""

from typing import NamedTuple

from jaxtyping import Array, Float


class NetworkParts(NamedTuple):
    """Some parameters of a network by their role, because their names differ between networks.

    A network for which explanations are wanted has two methods: `stages`, whose result ends with
    "embedding" and "logits", and `parts`. `models.cnn.CNN` shows both.

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
