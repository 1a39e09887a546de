"""From images to class probabilities. Importing this module imports no training code."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.inference.bundle import Bundle, find_bundle, read_bundle
from cnn_jax.inference.images import AnyImage, ImageReader, describe_image, single_images
from cnn_jax.models.network import abstract_variables, forward, make_model
from cnn_jax.system import runtime
from cnn_jax.system.errors import BundleError, DataError

logger = logging.getLogger(__name__)


# Images that go to the device at once. A longer sequence is cut, a shorter one
# padded to a power of two, so that few shapes are ever compiled.
BATCH_SIZE = 64


class Predictor:
    """A loaded bundle: `uint8 [B, H, W, 3] -> probabilities float32 [B, C]`.

    Attributes:
      class_names: In the order of the probabilities.
      preprocessing: How an image becomes an input.
      temperature: The divisor of the logits before the softmax.
      data: The description of the training data; see `Bundle`.
      model: The network.
      variables: Its parameters and statistics, on the device.
    """

    def __init__(self, bundle: Bundle):
        self.class_names = bundle.class_names
        self.preprocessing = bundle.preprocessing
        self.temperature = bundle.temperature
        self.data = bundle.data
        self.model = make_model(bundle.model, len(bundle.class_names), bundle.precision)
        _check_weights(self.model, bundle)
        self.variables = jax.device_put(bundle.variables)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Predictor":
        """Reads and verifies a bundle.

        Args:
          path: A bundle, or a run that has one.

        Raises:
          BundleError: There is no bundle, or it is damaged.
        """
        return cls(read_bundle(find_bundle(path)))

    def __call__(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> Float[np.ndarray, "batch classes"]:
        """Probabilities of preprocessed images; each row sums to 1.

        Raises:
          ValueError: The images are not uint8, or not of the bundle's size.
        """
        size = self.preprocessing.image_size
        if images.dtype != np.uint8 or images.shape[1:] != (*size, 3):
            raise ValueError(
                f"images must be [B, {size[0]}, {size[1]}, 3] of uint8, got {images.shape} of "
                f"{images.dtype}"
            )
        run = _compiled(self.model, self.preprocessing)
        temperature = np.float32(self.temperature)
        return np.asarray(jax.device_get(run(self.variables, temperature, images)))


@functools.lru_cache(64)
def _compiled(model: nn.Module, preprocessing: Preprocessing) -> Callable[..., Array]:
    """The program of all networks of one kind: another's weights need no other."""

    def probabilities(variables: PyTree, temperature: Array, images: Array) -> Array:
        return jax.nn.softmax(forward(model, variables, images, preprocessing) / temperature)

    return jax.jit(probabilities, compiler_options=runtime.compiler_options())


def _check_weights(model: nn.Module, bundle: Bundle) -> None:
    """Raises BundleError if the weights are not those of the network described."""

    def shapes(variables: PyTree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.leaves_with_path(variables)
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

    described = shapes(abstract_variables(model, bundle.preprocessing.image_size))
    present = shapes(bundle.variables)
    if described != present:
        differing = sorted(
            name
            for name in described.keys() | present.keys()
            if described.get(name) != present.get(name)
        )
        raise BundleError(
            f"the bundle's weights are not those of the network it describes: {differing[0]} is "
            f"{present.get(differing[0], 'absent')}, not {described.get(differing[0], 'wanted')}"
        )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or the reason why there is none.

    Attributes:
      predicted: Name of the most probable class; None after an error.
      confidence: Its probability, 0 to 1; None after an error.
      probabilities: float32 [C], in the order of `class_names`; None after an error.
      error: Why the image could not be read; None if it could.
    """

    predicted: str | None = None
    confidence: float | None = None
    probabilities: np.ndarray | None = None
    error: str | None = None


def predict_batch(
    predictor: Predictor,
    images: AnyImage | Iterable[AnyImage],
    reader: ImageReader | None = None,
) -> list[Prediction]:
    """Predicts images of any kind and size; an unusable one affects no other.

    Args:
      predictor: A loaded bundle.
      images: One image of a kind that `preprocess_for_inference` takes, which is a batch
        of one; or an iterable of them, in any mixture: a list, a tuple, a generator, or
        an array uint8 [b, h, w, 1, 3 or 4]. A generator may reuse its memory: each
        image is copied before the next one is asked for.
      reader: The reader of several calls, which warns once in all of them; by default one
        for this call.

    Returns:
      One prediction for each image, in their order. For an image that could not
      be used it holds the reason, which is also logged. Of the images whose values
      hardly suit the network's white level, a warning names the first.

    Raises:
      TypeError: `images`, or one of them, is of none of these kinds.
    """
    reader = reader or ImageReader(predictor.preprocessing)
    predictions: list[Prediction] = []
    rows: list[int] = []  # The positions in `predictions` of the images in `batch`.
    batch = np.empty((BATCH_SIZE, *predictor.preprocessing.image_size, 3), np.uint8)

    def predict_rows() -> None:
        if rows:
            probabilities = predictor(_pad(batch[: len(rows)]))
            for row, row_probabilities in zip(rows, probabilities, strict=False):
                predictions[row] = _prediction(row_probabilities, predictor.class_names)
            rows.clear()

    for row, image in enumerate(single_images(images)):
        predictions.append(Prediction())
        try:
            batch[len(rows)] = reader.read(image, describe_image(image, row))
        except DataError as error:
            logger.warning("%s: %s", describe_image(image, row), error)
            predictions[row] = Prediction(error=str(error))
            continue
        rows.append(row)
        if len(rows) == BATCH_SIZE:
            predict_rows()
    predict_rows()
    return predictions


def predict_pixels(
    predictor: Predictor, images: UInt8[np.ndarray, "n height width 3"]
) -> Float[np.ndarray, "n classes"]:
    """Probabilities of any number of preprocessed images, one or more, so many at once."""
    rows = []
    for start in range(0, len(images), BATCH_SIZE):
        part = images[start : start + BATCH_SIZE]
        rows.append(predictor(_pad(part))[: len(part)])
    return np.concatenate(rows)


def _pad(images: np.ndarray) -> np.ndarray:
    """Repeats the last image up to a power of two."""
    missing = (1 << (len(images) - 1).bit_length()) - len(images)
    return np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)], mode="edge")


def _prediction(probabilities: np.ndarray, class_names: list[str]) -> Prediction:
    best = int(np.argmax(probabilities))
    return Prediction(class_names[best], float(probabilities[best]), probabilities)
