"""Ensembles: the mean of the probabilities of several networks, or for several views of an image.

An ensemble averages the calibrated probabilities of its members (Lakshminarayanan et al. 2017) for
each view. Then a temperature calibrates the mean. Test-time augmentation is an ensemble of one
network with several views.
"""

from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cnn_jax.inference.bundle import Bundle, Ensemble
from cnn_jax.inference.calibration import apply_temperature, mutual_information
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.inference.protocol import EnsembleLike, TrainedPredictor, check_images

_Images = TypeVar("_Images", Array, np.ndarray)


class EnsemblePredictor(TrainedPredictor, EnsembleLike):
    """A predictor that averages the probabilities of the members and views of an ensemble.

    Attributes:
      class_names: The classes in the order of the probabilities.
      preprocessing: The preprocessing from an image to the input of all members.
      temperature: The logarithms of the mean probabilities are divided by the temperature before
        the softmax.
      data: The description of the training data; see `Bundle`.
      metrics: The metrics by split; see `Bundle`.
      members: The predictors of the members.
      flip, shift: The views of an image; see `views`.
    """

    def __init__(self, ensemble: Ensemble, runs_once: bool = False):
        """Creates the predictor of an ensemble; see `BundlePredictor` for `runs_once`."""
        self.class_names = ensemble.class_names
        self.preprocessing = ensemble.preprocessing
        self.temperature = ensemble.temperature
        self.data = ensemble.data
        self.metrics = ensemble.metrics
        self.members = [BundlePredictor(member, runs_once) for member in ensemble.members]
        self.flip = ensemble.flip
        self.shift = ensemble.shift

    def __call__(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> Float[np.ndarray, "batch classes"]:
        """Returns the class probabilities of preprocessed images; see `Predictor`.

        Raises:
          ValueError: The images are not uint8, or their size is not the ensemble's.
        """
        return self.predict_with_disagreement(images)[0]

    def predict_with_disagreement(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> tuple[Float[np.ndarray, "batch classes"], Float[np.ndarray, " batch"]]:
        """Returns the class probabilities, and the disagreement of each image in nats.

        The disagreement is the mutual information over all members and views, before the
        temperature of the ensemble; see `calibration.mutual_information`.

        Raises:
          ValueError: The images are not uint8, or their size is not the ensemble's.
        """
        predictions = self.predict_members(images)
        probabilities = apply_temperature(predictions.mean(axis=0), self.temperature)
        disagreement = mutual_information(predictions)
        return probabilities.astype(np.float32), disagreement.astype(np.float32)

    def predict_members(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> Float[np.ndarray, "predictions batch classes"]:
        """Returns the class probabilities of each member for each view, float32.

        The first predictions are the predictions of the members for the images themselves, in the
        order of the members.

        Raises:
          ValueError: The images are not uint8, or their size is not the ensemble's.
        """
        check_images(images, self.preprocessing)
        return np.stack(
            jax.device_get(
                [
                    member.dispatch(view)
                    for view in views(images, self.flip, self.shift)
                    for member in self.members
                ]
            )
        )


def views(images: _Images, flip: str, shift: int) -> list[_Images]:
    """Returns the views of images for test-time augmentation; the images themselves come first.

    Args:
      images: [batch, height, width, 3], NumPy or JAX arrays.
      flip: The axes along which images are also flipped, one of `schema.FLIPS`. With
        "horizontal_and_vertical", there are four views.
      shift: If this number of pixels is not 0, each of these views is also shifted up, down, left
        and right by it. The pixels at the edge are repeated.
    """
    found = [images]
    for axis, name in ((2, "horizontal"), (1, "vertical")):
        if name in flip:
            reversed_axis = (slice(None),) * axis + (slice(None, None, -1),)
            found += [view[reversed_axis] for view in found]
    if shift:
        found += [
            _shifted(view, axis, pixels)
            for view in list(found)
            for axis in (1, 2)
            for pixels in (-shift, shift)
        ]
    return found


def _shifted(images: _Images, axis: int, pixels: int) -> _Images:
    """Shifts images along an axis, towards larger indices if `pixels` is positive."""
    xp = images.__array_namespace__()
    before = (slice(None),) * axis
    if pixels < 0:
        edge = images[(*before, slice(-1, None))]
        return xp.concatenate([images[(*before, slice(-pixels, None))]] + [edge] * -pixels, axis)
    edge = images[(*before, slice(0, 1))]
    return xp.concatenate([edge] * pixels + [images[(*before, slice(None, -pixels))]], axis)


def make_predictor(
    contents: Bundle | Ensemble, runs_once: bool = False
) -> BundlePredictor | EnsemblePredictor:
    """Returns the predictor of a bundle or an ensemble; see `BundlePredictor` for `runs_once`."""
    if isinstance(contents, Ensemble):
        return EnsemblePredictor(contents, runs_once)
    return BundlePredictor(contents, runs_once)
