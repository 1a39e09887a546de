"""Input images: the types that a predictor accepts, and the files that a command reads."""

import functools
import glob
import itertools
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from cnn_jax.data import decode, files
from cnn_jax.data.decode import Pixels
from cnn_jax.data.preprocessing import SPECIFICATION, Preprocessing
from cnn_jax.data.resize import resize
from cnn_jax.system.errors import DataError, MissingDataError

logger = logging.getLogger(__name__)


@runtime_checkable
class Readable(Protocol):
    """An object with a method `read`, such as an open binary file or an HTTP response."""

    def read(self) -> bytes: ...


@runtime_checkable
class ArrayLike(Protocol):
    """An object that NumPy can convert to an array, such as a JAX array or a PyTorch CPU tensor."""

    def __array__(self) -> np.ndarray: ...


_Encoded = bytes | bytearray | memoryview


AnyImage = str | os.PathLike[str] | _Encoded | Readable | Image.Image | np.ndarray | ArrayLike


_ONE_IMAGE = (
    "a path, the bytes of an image file, an open binary file, a Pillow image, or an array uint8 "
    "[height, width] or [height, width, 1, 3 or 4]"
)


def preprocess_for_inference(
    image: AnyImage, preprocessing: Preprocessing = SPECIFICATION
) -> Pixels:
    """Reads one image in any supported form, and resizes it to the network's input size.

    Args:
      image: One of
          a path, str or PathLike;
          the bytes of an image file, as bytes, bytearray or memoryview;
          an open binary file, or any object whose `read()` returns such bytes;
          a Pillow image;
          an array, or an object that NumPy converts to an array, upright: grey [h, w] or
          [h, w, 1], RGB [h, w, 3] or RGBA uint8 [h, w, 4]. The values are uint8 from 0, black,
          to 255, white; or bool; or any other numbers if the network was trained with a white
          level. OpenCV's arrays are BGR, which cannot be seen from the array: pass
          `image[..., ::-1]`.
        The same picture gives the same pixels in each of these forms. A warning is logged if
        the image uses a small part of the values up to white, or has values far above white.
      preprocessing: `predictor.preprocessing`; the default is the specification's 224 x 224.

    Returns:
      uint8 [height, width, 3]. The pixels are not normalised, because the predictor does that.

    Raises:
      DataError: The image cannot be read, is damaged or too large, or its array has another
        dtype or shape.
      TypeError: The object has none of these forms.
    """
    return ImageReader(preprocessing).read(image, describe_image(image))


class ImageReader:
    """Reads images as `preprocess_for_inference` does, but logs at most one warning."""

    def __init__(self, preprocessing: Preprocessing = SPECIFICATION):
        self._preprocessing = preprocessing
        self._has_warned = False

    def read(self, image: AnyImage, name: str, max_pixels: int | None = None) -> Pixels:
        """Reads and resizes one image in any form that `preprocess_for_inference` accepts.

        Args:
          image: The image; see `preprocess_for_inference`.
          name: The name of the image in a warning.
          max_pixels: A limit on the pixels of the image, below the limit of the preprocessing.

        Raises:
          DataError: See `preprocess_for_inference`.
          TypeError: See `preprocess_for_inference`.
        """
        preprocessing = self._preprocessing
        if not isinstance(image, bytes | Image.Image | np.ndarray):
            image = _read(image)
        if isinstance(image, np.ndarray):
            image = _plain_array(image)
        limit = preprocessing.max_pixels if max_pixels is None else max_pixels
        values, pixels = decode.decode_with_values(
            image, min(limit, preprocessing.max_pixels), preprocessing.white_level
        )
        doubt = values.doubt(preprocessing.white_level) if values else ""
        if doubt and not self._has_warned:
            self._has_warned = True
            logger.warning("%s: %s (only the first such image is named)", name, doubt)
        return resize(pixels, preprocessing)


def _read(image: object) -> bytes | np.ndarray:
    """Reads an image in any supported form except bytes, a Pillow image or a NumPy array.

    Returns:
      The bytes of an image file, or an array.

    Raises:
      DataError: The image cannot be read.
      TypeError: The object is not an image in any supported form.
    """
    if isinstance(image, str | os.PathLike):
        try:
            return pathlib.Path(image).read_bytes()
        except IsADirectoryError as error:
            raise DataError("is a folder; list_images lists the images in it") from error
        except OSError as error:
            raise DataError(error.strerror or str(error)) from error
        except ValueError as error:  # The path contains a null byte.
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
    except Exception as error:  # Objects of other libraries may raise exceptions of any type.
        raise DataError(f"cannot be read: {error or type(error).__name__}") from error
    if not isinstance(content, bytes | bytearray | memoryview):
        raise DataError(f"read() must return bytes, got {_kind(content)}; open it with mode 'rb'")
    if not content:
        raise DataError("has nothing left to read: it is empty, or at its end (seek(0) rewinds it)")
    return bytes(content)


def _plain_array(array: np.ndarray) -> np.ndarray | Image.Image:
    """Converts the array of an image to [h, w] (grey), [h, w, 3] (RGB) or a Pillow image (RGBA).

    Raises:
      DataError: The array has another shape, or is RGBA but not uint8.
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
    """Returns the shape of an array as text, with a hint if the channels seem to come first."""
    shape = str(list(array.shape))
    if array.ndim in (3, 4) and array.shape[-3] in (1, 3, 4):
        return f"{shape}; channels come last: np.moveaxis(array, -3, -1)"
    return shape


def _kind(value: object) -> str:
    return f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"


def single_images(images: object) -> Iterator[AnyImage]:
    """Yields the images in an argument, which is one image or an iterable of images.

    Raises:
      TypeError: The argument is neither.
    """
    if isinstance(images, str | os.PathLike | _Encoded | Image.Image | Readable):
        return iter([images])
    if isinstance(images, ArrayLike):
        return _images_of_array(np.asarray(images))
    # A set is refused, because a set has no order, so predictions could not be matched to images.
    if isinstance(images, Iterable) and not isinstance(images, Mapping | Set):
        return iter(images)
    raise TypeError(
        f"images must be one image or an iterable of images such as a list, got {_kind(images)}; "
        f"an image is {_ONE_IMAGE}"
    )


def _images_of_array(array: np.ndarray) -> Iterator[AnyImage]:
    """Yields the images of an array that is one image, a batch of images, or a list of paths.

    Raises:
      TypeError: The array is none of these.
    """
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    if array.dtype == object or array.dtype.kind == "U":
        if array.ndim == 1:  # The array is, for example, a table column of paths.
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


def describe_image(image: object, row: int | None = None) -> str:
    """Returns the name of an image for messages: its path, or its position and type."""
    if isinstance(image, str | os.PathLike):
        return str(image)
    return f"image{'' if row is None else f' {row}'} ({type(image).__name__})"


def list_images(path: str | os.PathLike[str], allow_outside: bool = False) -> list[pathlib.Path]:
    """Returns the path of a file, or the paths of all image files in and below a folder.

    A warning says how many files of a folder are left out.

    Args:
      path: A file or a folder.
      allow_outside: Whether links may lead out of the folder.

    Returns:
      Paths, sorted.

    Raises:
      DataError: There is no such file or folder, or the folder has no images.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingDataError(f"--input: there is no file or folder {path}")
    listing = files.list_images(path, allow_outside)
    left_out = files.describe_ignored(listing.ignored)
    if not listing.files:
        raise DataError(f"--input: no image files below {path}{left_out}")
    if left_out:
        logger.warning("%s: %d images%s", path, len(listing.files), left_out)
    return [path / image.path for image in listing.files]


def list_inputs(inputs: Sequence[str], allow_outside: bool = False) -> list[pathlib.Path]:
    """Returns the paths of the image files that a list of files, folders and patterns selects.

    Args:
      inputs: Files, folders, and patterns such as `photos/**/*.jpg` that the shell did not
        expand. A name that looks like a pattern is a file if the file exists. A pattern does not
        match files in folders that this project wrote, unless the pattern names the folder.
      allow_outside: Whether links may lead out of a folder.

    Returns:
      Paths in the order of the inputs, each once. A missing file among several inputs is listed
      too, so that only this file gets an error and the other images get their results.

    Raises:
      DataError: The only input does not exist, a pattern matches no file, or a folder has no
        images.
    """
    images: list[pathlib.Path] = []
    for text in inputs:
        if len(inputs) > 1 and not _is_pattern(text) and not pathlib.Path(text).exists():
            images.append(pathlib.Path(text))
            continue
        for path in _match(text) if _is_pattern(text) else [text]:
            images += list_images(path, allow_outside)
    return list(dict.fromkeys(images))


def searched_folder(text: str) -> pathlib.Path:
    """Returns a folder that contains, at any depth, all images that a path or pattern selects."""
    path = pathlib.Path(text)
    if _is_pattern(text):
        return pathlib.Path(
            *itertools.takewhile(lambda part: part == glob.escape(part), path.parts)
        )
    return path if path.is_dir() else path.parent


def _is_pattern(text: str) -> bool:
    return glob.escape(text) != text and not os.path.lexists(text)


def _match(pattern: str) -> list[str]:
    """Returns the sorted paths that match a pattern, except paths in output folders of cnn_jax.

    Raises:
      DataError: There is no match.
    """
    matched = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  (may be absolute)
    top = searched_folder(pattern)

    @functools.cache
    def is_output(folder: pathlib.Path) -> bool:
        try:
            return files.is_output(os.listdir(folder))  # noqa: PTH208
        except OSError:  # The path is a file, or a folder without read permission.
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
        raise MissingDataError(f"--input: no file matches {pattern}{left_out}")
    if left_out:
        logger.warning("%s: %d matches%s", pattern, len(kept), left_out)
    return kept
