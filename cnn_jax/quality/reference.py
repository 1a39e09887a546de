"""Reference statistics: what the monitor of a served network compares its predictions with."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions of a network, with the properties of the images.

    Attributes:
      probabilities: The class probabilities, 0 to 1.
      embeddings: The inputs of the network's last layer.
      images: Brightness, sharpness and contrast of each image; see `image_statistics`.
    """

    probabilities: Float[np.ndarray, "n classes"]
    embeddings: Float[np.ndarray, "n features"]
    images: Float[np.ndarray, "n 3"]

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def classes(self) -> Int[np.ndarray, " n"]:
        """The predicted class of each image."""
        return self.probabilities.argmax(axis=1)

    def __getitem__(self, rows: slice | np.ndarray) -> "Predictions":
        return Predictions(self.probabilities[rows], self.embeddings[rows], self.images[rows])


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference statistics of a network. All attributes are arrays.

    The means and the covariance come from training images, and the statistics from validation
    images. If both came from the same images, the distances would be too small, and almost every
    window of new images would differ from them.

    Attributes:
      statistics: The values of `drift.STATISTICS` for each validation image, float32.
      class_counts: The number of validation images that are predicted as each class.
      accuracy: The accuracy on these validation images, 0 to 1.
      class_means: The mean embedding of the training images of each class, float32.
      covariance: The covariance of the embedding within the classes, float32.
      trust_classes: The first feature of the trust model, by predicted class; see `trust`.
      trust_means: The mean of each feature of the trust model.
      trust_scales: The standard deviation of each feature.
      trust_weights: The weight of each standardised feature, and the intercept.
      trust_limit: The largest logarithm of the distance for which the trust model is used.
      trust_factor: The accuracy divided by the mean probability on the validation images.
    """

    statistics: Float[np.ndarray, "n statistics"]
    class_counts: Int[np.ndarray, " classes"]
    accuracy: Float[np.ndarray, ""]
    class_means: Float[np.ndarray, "classes features"]
    covariance: Float[np.ndarray, "features features"]
    trust_classes: Float[np.ndarray, " classes"]
    trust_means: Float[np.ndarray, " trust"]
    trust_scales: Float[np.ndarray, " trust"]
    trust_weights: Float[np.ndarray, " trust+1"]
    trust_limit: Float[np.ndarray, ""]
    trust_factor: Float[np.ndarray, ""]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the attributes by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Reference":
        """Returns the reference with the attributes `arrays`; ignores unknown names.

        Raises:
          KeyError: An attribute is missing.
        """
        return cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})
