"""Image files to arrays: the one decoder and the one resize of the project."""

import contextlib
import dataclasses
import io
import re
import threading
from collections.abc import Iterator

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image, PpmImagePlugin, TiffImagePlugin

from cnn_jax.errors import DataError
from cnn_jax.preprocessing import MAX_PIXELS

# Part of the name of a cache of pixels: raise it when any pixel would change.
VERSION = 2
# Pillow refuses a larger image whatever `max_pixels` is.
LARGEST_MAX_PIXELS = 178_956_970
# The decoders that may be tried on a file's content. Others of Pillow's are
# rarely used, and one of them (EPS) runs another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# How files of these formats begin.
_BEGINNING = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|BM....\0\0\0\0|GIF8[79]a|II\*\0|MM\0\*"
    rb"|P[1-6]\s+[\d#]",
    re.DOTALL,
)
# A progressive JPEG of a usual program has about ten scans. Each passes over all
# pixels, so a small file of very many could keep a core busy for minutes.
_MAX_SCANS = 100
_START_OF_SCAN = b"\xff\xda"
# A marker with a length behind it, or the one of the picture's end.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")

# Pillow's decoders of a PPM in text, or whose largest value is not 255, are written in
# Python: a second or two for a million pixels, in which no other thread can work.
_SLOW_PPM, _MAX_SLOW_PIXELS = ("ppm", "ppm_plain"), 4_000_000

# Markers of a JPEG (ITU T.81, table B.1): of the segments before the scan, those of a
# plain one are JFIF and ICC data, tables and comments.
_SOF_BASELINE, _SOS = 0xC0, 0xDA
_PLAIN_SEGMENTS = frozenset((0xE0, 0xE2, 0xDB, 0xC4, 0xDD, 0xFE))
# Pixels from which on an image may take some hundred megabytes to decode.
_LARGE = 8_000_000
_LARGE_TURN = threading.Lock()
# Pixels that are converted at a time.
_STRIP = 1_000_000


class TooManyPixelsError(DataError):
    """An image is larger than it may be."""


class UnknownFormatError(DataError):
    """What is no image, or one of a format that is not read."""


# The underscores say that two images in one signature may differ in size.
Pixels = UInt8[np.ndarray, "_height _width 3"]


@dataclasses.dataclass(frozen=True)
class Header:
    """What an image file says of itself before its pixels are decoded.

    Attributes:
      format: One of `FORMATS`, or "MPO", a JPEG with further pictures.
      mode: Pillow's name of the colour mode, such as "RGB", "L", "P", "CMYK".
      width: Of the upright picture, in pixels.
      height: Of the upright picture, in pixels.
      orientation: EXIF, 1 to 8; 1 is upright.
    """

    format: str
    mode: str
    width: int
    height: int
    orientation: int


def decode(
    encoded: bytes, max_pixels: int = MAX_PIXELS, at_least: tuple[int, int] | None = None
) -> Pixels:
    """Decodes an image file to RGB.

    EXIF orientation is applied, transparency lies over white, and of an
    animation the first frame is taken.

    Args:
      encoded: The bytes of a file in one of `FORMATS`, whatever its name.
      max_pixels: Largest width times height. The header is checked before
        anything is decoded.
      at_least: (height, width) that suffice: a JPEG is decoded at 1/8, 2/8, ... of
        its size, in its cosine transform, so that neither side falls below.

    Returns:
      uint8 [height, width, 3].

    Raises:
      DataError: The bytes are no image, a damaged one, or one too large.
    """
    plain = _decode_plain_jpeg(encoded, max_pixels, at_least)
    if plain is not None:
        return plain
    with _opened(encoded, max_pixels) as image, _one_large_at_a_time(image.width * image.height):
        return _decode_opened(image, encoded, at_least)


def decode_with_header(encoded: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Header, Pixels]:
    """What an image file says of itself, and its pixels as `decode` gives them.

    Raises:
      DataError: As `decode`.
    """
    with _opened(encoded, max_pixels) as image, _one_large_at_a_time(image.width * image.height):
        # The orientation before Pillow turns the image and forgets it.
        file_format, mode, orientation = image.format or "", image.mode, _orientation(image)
        pixels = _decode_opened(image, encoded)
        height, width, _ = pixels.shape
        return Header(file_format, mode, width, height, orientation), pixels


def _decode_plain_jpeg(
    encoded: bytes, max_pixels: int, at_least: tuple[int, int] | None
) -> Pixels | None:
    """The pixels of a JPEG that needs no further care; None if it may need some.

    This is most JPEGs, and opening them with Pillow takes as long as decoding
    small ones.
    """
    if not _is_plain_jpeg(encoded):
        return None
    try:
        stored_height, stored_width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        height, width = int(stored_height), int(stored_width)
        if colours not in ("YCbCr", "Gray") or height * width > max_pixels:
            return None
        with _one_large_at_a_time(height * width):
            return _decode_jpeg(encoded, (height, width), at_least or (height, width))
    except ValueError:
        return None


def _decode_jpeg(encoded: bytes, stored: tuple[int, int], at_least: tuple[int, int]) -> Pixels:
    """A JPEG as it lies in the file; `stored` and `at_least` are (height, width).

    Raises:
      ValueError: It is damaged, or not of a kind that this decoder knows.
    """
    height, width = (min(sides) for sides in zip(stored, at_least, strict=True))
    return simplejpeg.decode_jpeg(encoded, min_height=height, min_width=width)


def _is_plain_jpeg(encoded: bytes) -> bool:
    """Whether it is a JPEG of one scan without EXIF or XMP, which may turn it."""
    position, components = 2, 0
    if not encoded.startswith(b"\xff\xd8"):
        return False
    while position + 9 < len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker == _SOF_BASELINE:
            components = encoded[position + 9]
        elif marker == _SOS:
            return components > 0 and encoded[position + 4] == components
        elif marker not in _PLAIN_SEGMENTS:
            return False
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return False


def _decode_opened(
    image: Image.Image, encoded: bytes, at_least: tuple[int, int] | None = None
) -> Pixels:
    if image.format not in ("JPEG", "MPO"):
        return _to_rgb(image)
    if encoded.count(_START_OF_SCAN) > _MAX_SCANS and _num_scans(encoded) > _MAX_SCANS:
        raise DataError(f"is a JPEG of more than {_MAX_SCANS} scans")
    orientation = _orientation(image)
    height, width = at_least or (image.height, image.width)
    if orientation >= 5 and at_least:
        height, width = width, height
    if image.mode in ("RGB", "L"):
        # In full size the same pixels as Pillow's, bit for bit, in half the time.
        # What it finds fault with is Pillow's to judge.
        with contextlib.suppress(ValueError):
            stored = image.height, image.width
            return _upright(_decode_jpeg(encoded, stored, (height, width)), orientation)
    image.draft(None, (width, height))
    return _to_rgb(image)


def load(encoded: bytes, image_size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decodes and resizes: uint8 [height, width, 3] of this (height, width).

    Raises:
      DataError: As `decode`.
    """
    return resize(decode(encoded, max_pixels, at_least=image_size), image_size)


def is_reduced(header: Header, image_size: tuple[int, int]) -> bool:
    """Whether `load` decodes such a file at less than its size."""
    is_jpeg = header.format in ("JPEG", "MPO")
    seven_eighths = -(-header.height * 7 // 8), -(-header.width * 7 // 8)
    return is_jpeg and seven_eighths[0] >= image_size[0] and seven_eighths[1] >= image_size[1]


def to_rgb(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Pixels:
    """A Pillow image of any mode as `decode` gives it.

    Raises:
      DataError: It is too large, or damaged where Pillow had not looked yet.
    """
    with _explain_errors():
        _check_size(image, max_pixels)
        return _to_rgb(image)


def resize(image: Pixels, image_size: tuple[int, int]) -> Pixels:
    """Stretches to (height, width): bilinear, averaging over each output pixel's area."""
    if image.shape[:2] == tuple(image_size):
        return image
    height, width = image_size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def looks_like_an_image(beginning: bytes) -> bool:
    """Whether a file that begins so (16 bytes suffice) is of one of `FORMATS`."""
    return _BEGINNING.match(beginning) is not None


@contextlib.contextmanager
def _opened(encoded: bytes, max_pixels: int) -> Iterator[Image.Image]:
    if not encoded:
        raise DataError("is empty")
    with _explain_errors(), Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        _check_size(image, max_pixels)
        yield image


def _one_large_at_a_time(pixels: int) -> contextlib.AbstractContextManager[object]:
    """Holds back the other threads' large images, so that memory does not grow with cores."""
    return _LARGE_TURN if pixels > _LARGE else contextlib.nullcontext()


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # A tile is decoded in full, however small the image is.
        width = image.tag_v2.get(ExifTags.Base.TileWidth, 0)
        height = image.tag_v2.get(ExifTags.Base.TileLength, 0)
        if width * height > max_pixels:
            raise TooManyPixelsError(
                f"has tiles of {width} x {height} pixels, more than max_pixels = {max_pixels}"
            )
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise TooManyPixelsError(
            f"has {image.width} x {image.height} pixels, more than max_pixels = {max_pixels}"
        )
    is_ppm = isinstance(image, PpmImagePlugin.PpmImageFile)
    is_slow = is_ppm and any(tile.codec_name in _SLOW_PPM for tile in image.tile)
    if is_slow and pixels > _MAX_SLOW_PIXELS:
        raise TooManyPixelsError(
            f"is a PPM in text, or with other values than 0 to 255, of {image.width} x "
            f"{image.height} pixels, which would take too long; save it as PNG"
        )


@contextlib.contextmanager
def _explain_errors() -> Iterator[None]:
    """Turns what Pillow raises for bad images into a DataError."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError("needs more memory than there is") from error
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError("has more pixels than any max_pixels allows") from error
    except Image.UnidentifiedImageError as error:
        raise UnknownFormatError("is not an image of a known format") from error
    except Exception as error:  # Damaged files make Pillow raise errors of any type.
        raise DataError(f"cannot be decoded: {error or type(error).__name__}") from error


def _num_scans(encoded: bytes) -> int:
    """Scans of a JPEG; what stands behind the picture, such as a film, does not count."""
    scans, position = 0, 2
    while (marker := _MARKER.search(encoded, position)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        length = int.from_bytes(encoded[marker.end() : marker.end() + 2], "big")
        position = marker.end() + max(length, 2)
    return scans


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1, upright, where there is none or it cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # A damaged block makes Pillow raise errors of any type.
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undoes an EXIF orientation (CIPA DC-008, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _to_rgb(image: Image.Image) -> Pixels:
    image.load()  # Which turns a TIFF already; its orientation is 1 from then on.
    orientation = _orientation(image)
    width, height = image.size
    rows = max(_STRIP // width, 1)
    if rows >= height:
        return _upright(np.asarray(_strip_to_rgb(image)), orientation)
    # A strip at a time: what lies between is as large as what it is made of.
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(_strip_to_rgb(strip))
    return _upright(pixels, orientation)


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling.
        grey = np.asarray(image, np.float32) / (257 if image.mode != "F" else 1)
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")
