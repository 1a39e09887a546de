"""From images to class probabilities.

    cnn_jax predict --bundle=RUN --input FILE_FOLDER_OR_PATTERN ... [--top=K]
        [--output=out.csv]

writes a CSV row for each image. Importing this module imports no training code.
"""

import argparse
import csv
import dataclasses
import functools
import glob
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import IO, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8
from PIL import Image

from cnn_jax import cli, runtime
from cnn_jax.bundle import Bundle, find_bundle, read_bundle
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


@runtime_checkable
class Readable(Protocol):
    """An open binary file, a response, a member of a zip file: anything with `read`."""

    def read(self) -> bytes: ...


@runtime_checkable
class ArrayLike(Protocol):
    """A JAX array, a PyTorch tensor on the CPU: anything that becomes a NumPy array."""

    def __array__(self) -> np.ndarray: ...


_Encoded = bytes | bytearray | memoryview
AnyImage = str | os.PathLike[str] | _Encoded | Readable | Image.Image | np.ndarray | ArrayLike
_ONE_IMAGE = (
    "a path, the bytes of an image file, an open binary file, a Pillow image, or an array uint8 "
    "[height, width] or [height, width, 1, 3 or 4]"
)


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


def preprocess_for_inference(
    image: AnyImage, preprocessing: Preprocessing = SPECIFICATION
) -> Pixels:
    """One image of any kind, in the shape that a predictor takes.

    Args:
      image: One of
          a path, str or PathLike;
          the bytes of an image file, as bytes, bytearray or memoryview;
          an open binary file, or anything else whose `read()` returns such bytes;
          a Pillow image;
          an array, or what NumPy makes one of, upright: grey [h, w] or [h, w, 1], RGB
          [h, w, 3] or RGBA uint8 [h, w, 4]; uint8 from 0, black, to 255, white; bool; or
          any other numbers if the network was trained with a white level. OpenCV's
          arrays are BGR, which cannot be seen from the array: pass `image[..., ::-1]`.
        The same picture gives the same pixels in each of these forms. A warning is logged
        if it uses a small part of the values up to white, or has values far above white.
      preprocessing: The predictor's, `predictor.preprocessing`; the default is the
        specification's 224 x 224.

    Returns:
      uint8 [height, width, 3]. Normalisation is the predictor's own business.

    Raises:
      DataError: The image cannot be read, is damaged or too large, or its array is of
        another dtype or shape.
      TypeError: It is of none of these kinds.
    """
    return ImageReader(preprocessing).read(image, _describe(image))


class ImageReader:
    """Reads images as `preprocess_for_inference` does, and warns of the first one only."""

    def __init__(self, preprocessing: Preprocessing = SPECIFICATION):
        self._preprocessing = preprocessing
        self._has_warned = False

    def read(self, image: AnyImage, name: str) -> Pixels:
        """One image; a warning calls it by this name.

        Raises:
          DataError, TypeError: As `preprocess_for_inference`.
        """
        preprocessing = self._preprocessing
        if not isinstance(image, bytes | Image.Image | np.ndarray):
            image = _read(image)
        if isinstance(image, np.ndarray):
            image = _plain_array(image)
        values, pixels = decode.decode_any(
            image, preprocessing.max_pixels, preprocessing.white_level
        )
        doubt = values.doubt(preprocessing.white_level) if values else ""
        if doubt and not self._has_warned:
            self._has_warned = True
            logger.warning("%s: %s (said once, of the first such image)", name, doubt)
        return decode.resize(pixels, preprocessing.image_size)


def _read(image: object) -> bytes | np.ndarray:
    """The bytes of an image file, or the array, that any other kind of image stands for.

    Raises:
      DataError: It cannot be read.
      TypeError: It is no kind of image.
    """
    if isinstance(image, str | os.PathLike):
        try:
            return pathlib.Path(image).read_bytes()
        except IsADirectoryError as error:
            raise DataError("is a folder; list_images lists the images in it") from error
        except OSError as error:
            raise DataError(error.strerror or str(error)) from error
        except ValueError as error:  # No file can have such a name.
            raise DataError(str(error)) from error
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, Readable):
        return _read_file(image)
    if isinstance(image, ArrayLike):
        return np.asarray(image)
    raise TypeError(f"an image must be {_ONE_IMAGE}; got {_kind(image)}")


def _read_file(file: Readable) -> bytes:
    try:
        content = file.read()
    except UnicodeDecodeError as error:
        raise DataError("is open as text; open it with mode 'rb'") from error
    except Exception as error:  # Files of other libraries raise errors of any type.
        raise DataError(f"cannot be read: {error or type(error).__name__}") from error
    if not isinstance(content, bytes | bytearray | memoryview):
        raise DataError(f"read() must return bytes, got {_kind(content)}; open it with mode 'rb'")
    if not content:
        raise DataError("has nothing left to read: it is empty, or at its end (seek(0) goes back)")
    return bytes(content)


def _plain_array(array: np.ndarray) -> np.ndarray | Image.Image:
    """An array of one image without a channel of its own for grey, or for transparency.

    Raises:
      DataError: It has another shape, or is RGBA and not uint8.
    """
    channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if channels not in (1, 3, 4) or 0 in array.shape:
        raise DataError(
            f"an image array must be [height, width] or [height, width, 1, 3 or 4], got "
            f"{_shape(array)}"
        )
    if channels == 4:
        if array.dtype != np.uint8:
            raise DataError(f"an image array may be RGBA only as uint8, got {array.dtype}")
        return Image.fromarray(np.ascontiguousarray(array))
    return array.reshape(array.shape[:2]) if channels == 1 else array


def _shape(array: np.ndarray) -> str:
    """The shape of an array, with a hint if its channels seem to come first."""
    shape = str(list(array.shape))
    if array.ndim in (3, 4) and array.shape[-3] in (1, 3, 4):
        return f"{shape}; channels come last: np.moveaxis(array, -3, -1)"
    return shape


def _kind(value: object) -> str:
    return f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"


def predict_batch(predictor: Predictor, images: AnyImage | Iterable[AnyImage]) -> list[Prediction]:
    """Predicts images of any kind and size; an unusable one affects no other.

    Args:
      predictor: A loaded bundle.
      images: One image of a kind that `preprocess_for_inference` takes, which is a batch
        of one; or an iterable of them, in any mixture: a list, a tuple, a generator, or
        an array uint8 [b, h, w, 1, 3 or 4]. A generator may reuse its memory: each
        image is copied before the next one is asked for.

    Returns:
      One prediction for each image, in their order. For an image that could not
      be used it holds the reason, which is also logged. Of the images whose values
      hardly suit the network's white level, a warning names the first.

    Raises:
      TypeError: `images`, or one of them, is of none of these kinds.
    """
    return _predict_batch(predictor, images, ImageReader(predictor.preprocessing))


def _predict_batch(
    predictor: Predictor, images: AnyImage | Iterable[AnyImage], reader: ImageReader
) -> list[Prediction]:
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
            batch[len(rows)] = reader.read(image, _describe(image, row))
        except DataError as error:
            logger.warning("%s: %s", _describe(image, row), error)
            predictions[row] = Prediction(error=str(error))
            continue
        rows.append(row)
        if len(rows) == BATCH_SIZE:
            predict_rows()
    predict_rows()
    return predictions


def single_images(images: object) -> Iterator[AnyImage]:
    """The images of an argument that is one image or an iterable of them.

    Raises:
      TypeError: It is neither.
    """
    if isinstance(images, str | os.PathLike | _Encoded | Image.Image | Readable):
        return iter([images])
    if isinstance(images, ArrayLike):
        return _images_of_array(np.asarray(images))
    # The predictions of a set could not be told apart.
    if isinstance(images, Iterable) and not isinstance(images, Mapping | Set):
        return iter(images)
    raise TypeError(
        f"images must be one image or an iterable of images such as a list, got {_kind(images)}; "
        f"an image is {_ONE_IMAGE}"
    )


def _images_of_array(array: np.ndarray) -> Iterator[AnyImage]:
    """The only image of an array of two or three dimensions, each one of a batch.

    Raises:
      TypeError: The array is neither.
    """
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    if array.dtype == object or array.dtype.kind == "U":
        if array.ndim == 1:  # For example a column of paths of a table.
            return iter(array.tolist())
    elif array.size == 0 and not is_image:
        return iter([])
    elif is_image:
        return iter([array])
    elif array.ndim == 4 and array.shape[-1] in (1, 3, 4):
        return iter(array)
    raise TypeError(
        f"an array of images must be [batch, height, width, 1, 3 or 4], and one image [height, "
        f"width] or [height, width, 1, 3 or 4], got {_shape(array)} of {array.dtype}"
    )


def _describe(image: object, row: int | None = None) -> str:
    if isinstance(image, str | os.PathLike):
        return str(image)
    return f"image{'' if row is None else f' {row}'} ({type(image).__name__})"


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


def list_inputs(inputs: Sequence[str], allow_outside: bool = False) -> list[pathlib.Path]:
    """The image files that files, folders and patterns name, each of them once, in their order.

    Args:
      inputs: Files, folders, and patterns such as `photos/**/*.jpg` that the shell did not
        expand. A file whose own name looks like a pattern is that file. What a pattern matches
        in folders that this project wrote is left out, unless the pattern names the folder.
      allow_outside: Whether links may lead out of a folder.

    Raises:
      DataError: A file or folder does not exist, a pattern matches nothing, or a folder has
        no images.
    """
    images: list[pathlib.Path] = []
    for text in inputs:
        for path in _match(text) if _is_pattern(text) else [text]:
            images += list_images(path, allow_outside)
    return list(dict.fromkeys(images))


def searched_folder(text: str) -> pathlib.Path:
    """The folder in which a file, folder or pattern has its images, itself or further below."""
    path = pathlib.Path(text)
    if _is_pattern(text):
        return pathlib.Path(
            *itertools.takewhile(lambda part: part == glob.escape(part), path.parts)
        )
    return path if path.is_dir() else path.parent


def _is_pattern(text: str) -> bool:
    return glob.escape(text) != text and not os.path.lexists(text)


def _match(pattern: str) -> list[str]:
    """What a pattern matches, sorted, without the folders that this project wrote."""
    matched = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  (may be absolute)
    top = searched_folder(pattern)

    @functools.cache
    def is_output(folder: pathlib.Path) -> bool:
        try:
            return files.is_output(os.listdir(folder))  # noqa: PTH208
        except OSError:  # A file, or a folder that may not be listed.
            return False

    kept, outputs = [], set[pathlib.Path]()
    for path in map(pathlib.Path, matched):
        below = len(path.parts) - len(top.parts)
        found = {folder for folder in (path, *path.parents)[:below] if is_output(folder)}
        outputs |= found
        if not found:
            kept.append(str(path))
    left_out = files.describe_ignored(
        {"folders that cnn_jax wrote": len(outputs)} if outputs else {}
    )
    if not kept:
        raise DataError(f"--input: no file matches {pattern}{left_out}")
    if left_out:
        logger.warning("%s: %d matches%s", pattern, len(kept), left_out)
    return kept


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that reads images with a bundle."""
    cli.add_bundle_flag(parser)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        type=cli.path,
        metavar="INPUT",
        help="images, folders of images, and patterns such as 'photos/*.jpg'",
    )
    parser.add_argument(
        "--allow_outside", action="store_true", help="follow links out of the folder"
    )


def write_predictions(
    predictor: Predictor, paths: Sequence[pathlib.Path], file: IO[str], top: int = 1
) -> int:
    """Writes a CSV row for each image.

    Args:
      predictor: A loaded bundle.
      paths: The image files.
      file: A text file that is open for writing.
      top: Number of classes in a row, 1 or more; at most all of them are written.

    Returns:
      The number of images that could not be read. Their rows hold the error.

    The columns are path, predicted, confidence, error, and then for the second most
    probable class predicted_2, confidence_2, and so on up to `top`.
    """
    top = min(top, len(predictor.class_names))
    further = [f"{key}_{k}" for k in range(2, top + 1) for key in ("predicted", "confidence")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "predicted", "confidence", "error", *further])
    num_errors = 0
    reader = ImageReader(predictor.preprocessing)
    for start in range(0, len(paths), BATCH_SIZE):
        batch = paths[start : start + BATCH_SIZE]
        for path, prediction in zip(batch, _predict_batch(predictor, batch, reader), strict=True):
            if prediction.probabilities is None:
                num_errors += 1
                writer.writerow([path, "", "", prediction.error, *("" for _ in further)])
                continue
            order = np.argsort(-prediction.probabilities, kind="stable")[:top]
            first, *others = (
                [predictor.class_names[i], f"{prediction.probabilities[i]:.6f}"] for i in order
            )
            writer.writerow([path, *first, "", *itertools.chain(*others)])
    return num_errors


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="cnn_jax predict", description="Classify images and folders of images."
    )
    add_input_flags(parser)
    parser.add_argument(
        "--top",
        type=cli.positive,
        default=1,
        metavar="K",
        help="classes to list for each image, the most probable first (1)",
    )
    parser.add_argument(
        "--output", type=cli.path, metavar="FILE", help="CSV file to write; stdout if not given"
    )
    flags = parser.parse_args(argv)

    runtime.keep_freed_memory()
    keep_compiled()
    predictor = Predictor.load(flags.bundle)
    paths = list_inputs(flags.input, flags.allow_outside)
    with cli.open_output(flags.output) as file:
        num_errors = write_predictions(predictor, paths, file, flags.top)
    if num_errors:
        raise DataError(f"{num_errors} of {len(paths)} images could not be read")


if __name__ == "__main__":
    cli.run(main)
