"""The interfaces of predictors. Importing this module does not import JAX."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from cnn_jax.data.preprocessing import Preprocessing


@runtime_checkable
class Predictor(Protocol):
    """The interface of loaded bundles, ensembles, exported models and user-defined functions.

    Attributes:
      class_names: The classes in the order of the probabilities.
      preprocessing: The preprocessing from an image to the predictor's input.
    """

    class_names: list[str]
    preprocessing: Preprocessing

    def __call__(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> Float[np.ndarray, "batch classes"]:
        """Returns the class probabilities of preprocessed images.

        Each row depends only on its own image.

        Args:
          images: Images of the size `preprocessing.image_size`, one or more.

        Returns:
          Probabilities, float32; each row sums to 1.
        """
        ...


@runtime_checkable
class TrainedPredictor(Predictor, Protocol):
    """A predictor that knows how it was trained: a loaded bundle or an exported model.

    Attributes:
      temperature: The logits are divided by the temperature before the softmax.
      data: The description of the training data; see `Bundle`.
      metrics: The metrics by split; see `Bundle`.
    """

    temperature: float
    data: dict[str, Any]
    metrics: dict[str, Any]


@runtime_checkable
class EnsembleLike(Predictor, Protocol):
    """A predictor that also measures the disagreement of the predictions that it averages."""

    def predict_with_disagreement(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> tuple[Float[np.ndarray, "batch classes"], Float[np.ndarray, " batch"]]:
        """Returns the class probabilities, and the disagreement of each image in nats.

        See `calibration.mutual_information`. Both are float32.
        """
        ...


def check_images(images: np.ndarray, preprocessing: Preprocessing) -> None:
    """Raises ValueError if images are not uint8, or do not have the size of the preprocessing."""
    size = preprocessing.image_size
    if images.dtype != np.uint8 or images.shape[1:] != (*size, 3):
        raise ValueError(
            f"images must be [B, {size[0]}, {size[1]}, 3] of uint8, got {images.shape} of "
            f"{images.dtype}"
        )
