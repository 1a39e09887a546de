"""Image files to arrays: the one decoder and the one resize of the project."""

import contextlib
import io
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from cnn_jax.errors import DataError
from cnn_jax.preprocessing import MAX_PIXELS

# The decoders that may be tried on a file's content. Others of Pillow's are
# rarely used, and one of them (EPS) runs another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)

# The underscores say that two images in one signature may differ in size.
Pixels = UInt8[np.ndarray, "_height _width 3"]


def decode(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decodes an image file to RGB.

    EXIF orientation is applied, transparency lies over white, and of an
    animation the first frame is taken.

    Args:
      encoded: The bytes of a file in one of `FORMATS`, whatever its name.
      max_pixels: Largest width times height. The header is checked before
        anything is decoded.

    Returns:
      uint8 [height, width, 3].

    Raises:
      DataError: The bytes are no image, a damaged one, or one too large.
    """
    if not encoded:
        raise DataError("is empty")
    with _explain_errors(), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        return to_rgb(image, max_pixels)


def to_rgb(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Pixels:
    """A Pillow image of any mode as `decode` gives it.

    Raises:
      DataError: It is too large, or damaged where Pillow had not looked yet.
    """
    if image.width * image.height > max_pixels:
        raise DataError(
            f"has {image.width} x {image.height} pixels, more than max_pixels = {max_pixels}"
        )
    with _explain_errors():
        return _to_rgb(image)


@contextlib.contextmanager
def _explain_errors() -> Iterator[None]:
    """Turns what Pillow raises for bad images into a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # An image either decodes or does not.
            yield
    except (DataError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise DataError("is not an image of a known format") from error
    except Exception as error:  # Damaged files make Pillow raise errors of any type.
        raise DataError(f"cannot be decoded: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Pixels:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling.
        grey = np.asarray(image, np.float32) / (257 if image.mode != "F" else 1)
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return np.asarray(image.convert("RGB"))


def resize(image: Pixels, image_size: tuple[int, int]) -> Pixels:
    """Stretches to (height, width): bilinear, averaging over each output pixel's area."""
    if image.shape[:2] == tuple(image_size):
        return image
    height, width = image_size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def is_image_file(path: pathlib.Path) -> bool:
    """Whether the name is that of an image; the file is not opened."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def files_below(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files anywhere below a folder, sorted, but for hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
