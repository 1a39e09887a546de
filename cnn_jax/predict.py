"""From images to class probabilities.

    python -m cnn_jax.predict --bundle=RUN/bundle --input=FILE_OR_FOLDER [--output=out.csv]

writes a CSV row for each image. Importing this module brings no training code.
"""

import argparse
import csv
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import IO

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8
from PIL import Image

from cnn_jax import cli, runtime
from cnn_jax.bundle import Bundle, read_bundle
from cnn_jax.compiled import keep_compiled
from cnn_jax.data import decode, files
from cnn_jax.data.decode import Pixels
from cnn_jax.errors import BundleError, DataError
from cnn_jax.models import abstract_variables, forward, make_model
from cnn_jax.preprocessing import SPECIFICATION, Preprocessing

logger = logging.getLogger(__name__)

# Images that go to the device at once. A longer sequence is cut, a shorter one
# padded to a power of two, so that few shapes are ever compiled.
BATCH_SIZE = 64

AnyImage = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


class Predictor:
    """A loaded bundle: `uint8 [B, H, W, 3] -> probabilities float32 [B, C]`.

    Attributes:
      class_names: In the order of the probabilities.
      preprocessing: How an image becomes an input.
      temperature: By which logits are divided before the softmax.
      data: What it was trained on; see `Bundle`.
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

        Raises:
          BundleError: It is no bundle, or a damaged one.
        """
        return cls(read_bundle(path))

    def __call__(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> Float[np.ndarray, "batch classes"]:
        """Probabilities of preprocessed images; each row sums to 1.

        Raises:
          ValueError: The images are not of the bundle's size.
        """
        size = self.preprocessing.image_size
        if images.shape[1:] != (*size, 3):
            raise ValueError(f"images must be [B, {size[0]}, {size[1]}, 3], got {images.shape}")
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
    """What the predictor says of one image, or why it says nothing.

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


def preprocess_for_inference(
    image: AnyImage, preprocessing: Preprocessing = SPECIFICATION
) -> Pixels:
    """One image, as it comes, in the shape that a predictor takes.

    Args:
      image: A path, the bytes of an image file, a Pillow image, or RGB or grey
        pixels, [h, w, 3] or [h, w]: uint8, uint16, or any numbers if the network was
        trained with a white level. The same picture gives the same pixels in each of
        these forms. (An array must be upright and opaque.)
      preprocessing: That of the predictor, `predictor.preprocessing`; by default
        the specification's 224 x 224.

    Returns:
      uint8 [height, width, 3]. Normalisation is the predictor's own business.

    Raises:
      DataError: It is not an image, is damaged or too large.
    """
    if isinstance(image, str | os.PathLike):
        try:
            image = pathlib.Path(image).read_bytes()
        except OSError as error:
            raise DataError(error.strerror or str(error)) from error
        except ValueError as error:  # A name that no file can have.
            raise DataError(str(error)) from error
    if isinstance(image, bytes):
        pixels = decode.decode(image, preprocessing.max_pixels, preprocessing.white_level)
    elif isinstance(image, Image.Image):
        pixels = decode.to_rgb(image, preprocessing.max_pixels, preprocessing.white_level)
    elif isinstance(image, np.ndarray):
        pixels = decode.from_array(image, preprocessing.white_level)
    else:
        raise DataError(f"an image array must be uint8, got {type(image).__name__}")
    return decode.resize(pixels, preprocessing.image_size)


def predict_batch(predictor: Predictor, images: Sequence[AnyImage]) -> list[Prediction]:
    """Predicts images of any kind and size; a bad one spoils no other.

    Args:
      predictor: A loaded bundle.
      images: Whatever `preprocess_for_inference` takes, in any mixture.

    Returns:
      One prediction for each image, in their order. For an image that could not
      be read it holds the reason, which is also logged.
    """
    predictions = [Prediction()] * len(images)
    for start in range(0, len(images), BATCH_SIZE):
        rows, pixels = [], []
        for row in range(start, min(start + BATCH_SIZE, len(images))):
            try:
                pixels.append(preprocess_for_inference(images[row], predictor.preprocessing))
                rows.append(row)
            except DataError as error:
                logger.warning("%s: %s", _describe(images[row], row), error)
                predictions[row] = Prediction(error=str(error))
        if rows:
            probabilities = predictor(_pad(np.stack(pixels)))
            for row, row_probabilities in zip(rows, probabilities, strict=False):
                predictions[row] = _prediction(row_probabilities, predictor.class_names)
    return predictions


def _describe(image: AnyImage, row: int) -> str:
    if isinstance(image, str | os.PathLike):
        return str(image)
    return f"image {row} ({type(image).__name__})"


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


def list_images(path: str | os.PathLike[str], allow_outside: bool = False) -> list[pathlib.Path]:
    """A file itself, or the image files anywhere below a folder, sorted.

    What is left out of a folder is counted in a warning.

    Args:
      path: A file or a folder.
      allow_outside: Whether links may lead out of the folder.

    Raises:
      DataError: There is no such file, or the folder has no images.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"--input: there is no file or folder {path}")
    listing = files.list_images(path, allow_outside)
    left_out = files.describe_ignored(listing.ignored)
    if not listing.files:
        raise DataError(f"--input: no image files below {path}{left_out}")
    if left_out:
        logger.warning("%s: %d images%s", path, len(listing.files), left_out)
    return [path / image.path for image in listing.files]


def write_predictions(predictor: Predictor, paths: Sequence[pathlib.Path], file: IO[str]) -> int:
    """Writes CSV rows path, predicted, confidence, error; returns the number of errors."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "predicted", "confidence", "error"])
    num_errors = 0
    for start in range(0, len(paths), BATCH_SIZE):
        batch = paths[start : start + BATCH_SIZE]
        for path, prediction in zip(batch, predict_batch(predictor, batch), strict=True):
            if prediction.error is not None:
                num_errors += 1
                writer.writerow([path, "", "", prediction.error])
            else:
                writer.writerow([path, prediction.predicted, f"{prediction.confidence:.6f}", ""])
    return num_errors


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cnn_jax.predict", description="Classify an image or a folder of images."
    )
    path = cli.path
    parser.add_argument("--bundle", required=True, type=path, help="the bundle, RUN/bundle")
    parser.add_argument("--input", required=True, type=path, help="an image, or a folder of them")
    parser.add_argument("--output", type=path, help="CSV file to write; stdout if not given")
    parser.add_argument(
        "--allow_outside", action="store_true", help="follow links out of the folder"
    )
    flags = parser.parse_args(argv)

    runtime.keep_freed_memory()
    keep_compiled()
    predictor = Predictor.load(flags.bundle)
    paths = list_images(flags.input, flags.allow_outside)
    with cli.open_output(flags.output) as file:
        num_errors = write_predictions(predictor, paths, file)
    if num_errors:
        raise DataError(f"{num_errors} of {len(paths)} images could not be read")


if __name__ == "__main__":
    cli.run(main)
