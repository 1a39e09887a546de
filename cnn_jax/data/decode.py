"""The project's only decoder: converts image files, Pillow images and arrays to RGB pixels.

The same picture gives the same pixels in each of these forms: every JPEG is decoded at its
full size, and every picture is resized by `cnn_jax.data.resize`. A JPEG could be decoded at
1/2 to 1/8 of its size in the cosine transform, up to five times as fast. But Pillow images
and arrays cannot be reduced in that way, so their pixels would differ, whatever the factor
(`experiments/benchmarks/bench_decode.py`).

A value of a file becomes a grey level, 0 to 255, by

    rint(clip(value * 255 / white, 0, 255)).

The file format defines `white` for unsigned integers of at most 16 bits. For all other types
the user must set it (`data.white_level`).
"""

import contextlib
import dataclasses
import hashlib
import io
import math
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import Shaped, UInt8
from PIL import ExifTags, Image, ImageFile, PpmImagePlugin, TiffImagePlugin

from cnn_jax.data.preprocessing import MAX_PIXELS, Preprocessing
from cnn_jax.data.resize import Pixels, resize
from cnn_jax.system.errors import DataError

# This version is part of the cache key. Increase the version when any decoded pixel changes.
VERSION = 3
# The formats that are decoded. Pillow's other decoders are rarely needed, and its EPS decoder runs
# another program (Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Regular expressions for the first bytes of a file in each supported format. TIFF includes BigTIFF.
_BEGINNINGS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM....\0\0\0\0",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "PPM": rb"P[1-6]\s+[\d#]",
}
# Regular expressions for the first bytes of unsupported formats. Files in these formats often have
# the suffix of a supported format.
_OTHER_BEGINNINGS = {
    "HEIC": rb"....ftyphe(?:i[cmsx]|v[cmsx])",
    "HEIC or AVIF": rb"....ftyp(?:mif1|msf1)",
    "AVIF": rb"....ftypavi[fs]",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ",
    "a Photoshop file": rb"8BPS",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Radiance HDR": rb"#\?R(?:ADIANCE|GBE)",
    "PFM in colour": rb"PF\s",
    "DICOM": rb".{128}DICM",
    "FITS": rb"SIMPLE  =",
    "HDF5": rb"\x89HDF\r\n\x1a\n",
    "a NumPy array": rb"\x93NUMPY",
    "PDF": rb"%PDF-",
    "SVG": rb"(?i)\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?<svg",
}
# A failed download often saves a web page instead of an image. This expression matches the
# beginning of a web page.
_WEB_PAGE = re.compile(rb"\s*<(?:!doctype\s+html|html|head)", re.IGNORECASE)
_BEGINNING = re.compile(b"|".join(_BEGINNINGS.values()), re.DOTALL)
# The largest number of scans of a JPEG. A progressive JPEG usually has about ten. Each scan passes
# over all pixels, so a small file with thousands of scans could occupy a core for minutes.
_MAX_SCANS = 100
_START_OF_SCAN = b"\xff\xda"
# Matches the markers of a JPEG that are followed by a length, and the end-of-image marker.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")

# Pillow's slow PPM decoders, and the largest number of pixels that they may decode. These decoders
# are written in Python. They decode PPM files in text format, and PPM files with a maximum value
# other than 255. A million pixels take one to two seconds, during which no other thread can run.
_SLOW_PPM, _MAX_SLOW_PIXELS = ("ppm", "ppm_plain"), 4_000_000

# Two markers of a JPEG (ITU T.81, table B.1), and the markers of the segments that may precede the
# scan of a plain JPEG: JFIF and ICC data, tables and comments.
_SOF_BASELINE, _SOS = 0xC0, 0xDA
_PLAIN_SEGMENTS = frozenset((0xE0, 0xE2, 0xDB, 0xC4, 0xDD, 0xFE))
# Images with more pixels than this number are decoded one at a time, because each of these images
# may need hundreds of megabytes.
_LARGE = 8_000_000
_LARGE_TURN = threading.Lock()
# To limit the memory use, pixels are converted in strips of at most this number of pixels.
_STRIP = 1_000_000
# The values that usually represent white: 1 for floats, and the largest integers of 8, 10, 12, 14
# and 16 bits.
_USUAL_WHITES = (1, 255, 1023, 4095, 16383, 65535)
# The factor by which values of a resized image may exceed the white level, because bicubic and
# Lanczos filters overshoot.
OVERSHOOT = 1.1
# An image counts as dark if no value is above this fraction of the white level. An example is a
# 14-bit image that is stored in a file of 16 bits.
DARK = 0.25
# Values of the TIFF tags PhotometricInterpretation, PlanarConfiguration and SampleFormat (TIFF 6.0,
# sections 8 and 19).
_WHITE_IS_ZERO, _PLANAR, _SIGNED = 0, 2, 2
# The factors by which Pillow multiplies grey levels of 2 and 4 bits. The keys are raw modes of
# Pillow.
_SCALES = {"L;2": 85, "L;4": 17}


class TooManyPixelsError(DataError):
    """The error for an image that has more pixels than allowed."""


class UnknownFormatError(DataError):
    """The error for a file that is not an image, or whose format is not supported.

    Attributes:
      format: The unsupported format; "" if it is not known.
    """

    def __init__(self, message: str, format: str = ""):
        super().__init__(message)
        self.format = format


@dataclasses.dataclass(frozen=True)
class Values:
    """The range of the values in an image file.

    Attributes:
      kind: The type of the values, such as "8-bit", "12-bit", "16-bit signed" or "float".
      low: The smallest value.
      high: The largest value.
      white: The white level of the file's format; 0 if the format does not define it.
    """

    kind: str
    low: float
    high: float
    white: float

    def doubt(self, white_level: float) -> str:
        """Returns the reason why the values may not suit a network; "" if they suit it.

        Args:
          white_level: The network's white level; see `Preprocessing`.
        """
        white = white_level or self.white
        if self.kind == "8-bit" or DARK * white < self.high <= OVERSHOOT * white or not self.high:
            return ""
        effect = "larger values become white" if self.high > white else "it is almost black"
        return (
            f"has {self.kind} values {span(self)}, and {format_number(white)} is white, so "
            f"{effect}: scale its values like those of the training images, or train with a "
            "suitable data.white_level"
        )


class UnknownWhiteError(DataError):
    """The error for an image whose white level (the value of white) is unknown.

    The values of such an image cannot be converted to grey levels.

    Attributes:
      values: The range of the image's values.
    """

    def __init__(self, values: Values):
        super().__init__(f"has {values.kind} {unknown_white(values)}")
        self.values = values


@dataclasses.dataclass(frozen=True)
class Header:
    """The properties of an image file, apart from its pixels.

    Attributes:
      format: One of `FORMATS`, or "MPO", a JPEG that contains further images.
      mode: Pillow's colour mode, such as "RGB", "L", "P", "CMYK".
      width: The width of the upright image, in pixels.
      height: The height of the upright image, in pixels.
      orientation: The EXIF orientation, 1 to 8; 1 is upright.
    """

    format: str
    mode: str
    width: int
    height: int
    orientation: int


def decode(
    image: bytes | Image.Image | Shaped[np.ndarray, "..."],
    max_pixels: int = MAX_PIXELS,
    white_level: float = 0,
) -> Pixels:
    """Converts an image to RGB pixels at full size.

    EXIF orientation is applied, transparent pixels are laid over white, and an animation is
    represented by its first frame. The same picture gives the same pixels in each form, with two
    exceptions. A Pillow image with colours of 16 bits has only 8 bits of each colour after it was
    loaded; if it is not loaded yet, its file is read again, with all 16 bits. And an array has no
    file format that defines white; so every dtype except uint8 and bool needs a white level,
    including uint16.

    Args:
      image: The bytes of a file in one of `FORMATS`; a Pillow image of any mode; or grey or RGB
        values of any numeric dtype, [height, width] or [height, width, 3].
      max_pixels: The largest allowed width times height of a file or a Pillow image, checked before
        decoding.
      white_level: See `Preprocessing`.

    Returns:
      uint8 [height, width, 3].

    Raises:
      DataError: The bytes are not an image, the image is damaged or too large, the array has
        another shape or dtype, or the value of white is unknown.
    """
    return decode_with_values(image, max_pixels, white_level)[1]


def decode_with_values(
    image: bytes | Image.Image | Shaped[np.ndarray, "..."],
    max_pixels: int = MAX_PIXELS,
    white_level: float = 0,
) -> tuple[Values | None, Pixels]:
    """Converts an image like `decode`; also returns the range of its values, None for 8 bits.

    Raises:
      DataError: See `decode`.
    """
    if isinstance(image, bytes):
        if (plain := _decode_plain_jpeg(image, max_pixels)) is not None:
            return None, plain
        with (
            _opened(image, max_pixels) as opened,
            _one_large_at_a_time(opened.width * opened.height),
        ):
            return _decode_opened(opened, image, white_level)
    if isinstance(image, Image.Image):
        return _decode_pillow(image, max_pixels, white_level)
    return _decode_array(image, white_level)


def decode_with_header(
    encoded: bytes, max_pixels: int = MAX_PIXELS, white_level: float = 0
) -> tuple[Header, Values, Pixels]:
    """Decodes an image file like `decode`, and also returns the header and the range of values.

    Raises:
      DataError: See `decode`.
    """
    with _opened(encoded, max_pixels) as image, _one_large_at_a_time(image.width * image.height):
        file_format, mode = image.format or "", image.mode
        # When Pillow loads a TIFF, Pillow rotates the image and removes the orientation tag. So the
        # orientation of a TIFF is read before loading. The orientation of other formats is read
        # after decoding, because reading the tag of a PNG loads the PNG.
        turned = _orientation(image) if file_format == "TIFF" else 0
        values, pixels = _decode_opened(image, encoded, white_level)
        orientation = turned or _orientation(image)
        height, width, _ = pixels.shape
        if values is None:
            values = Values("8-bit", pixels.min().item(), pixels.max().item(), 255)
        return Header(file_format, mode, width, height, orientation), values, pixels


def _decode_plain_jpeg(encoded: bytes, max_pixels: int) -> Pixels | None:
    """Decodes a plain JPEG without Pillow; returns None if Pillow must open the file.

    Most JPEGs are plain. Opening a small JPEG with Pillow takes as long as decoding it.
    """
    if not _is_plain_jpeg(encoded):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        pixels = int(height) * int(width)
        if colours not in ("YCbCr", "Gray") or pixels > max_pixels:
            return None
        with _one_large_at_a_time(pixels):
            return simplejpeg.decode_jpeg(encoded)
    except ValueError:
        return None


def _is_plain_jpeg(encoded: bytes) -> bool:
    """Returns whether a file is a baseline JPEG with one scan and without EXIF or XMP data.

    EXIF and XMP data may contain an orientation.
    """
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
    image: Image.Image, encoded: bytes, white_level: float
) -> tuple[Values | None, Pixels]:
    if image.format not in ("JPEG", "MPO"):
        return _to_rgb(image, encoded, white_level)
    if encoded.count(_START_OF_SCAN) > _MAX_SCANS and _num_scans(encoded) > _MAX_SCANS:
        raise DataError(f"is a JPEG of more than {_MAX_SCANS} scans")
    if image.mode in ("RGB", "L"):
        # simplejpeg returns exactly the same pixels as Pillow in half the time. If simplejpeg
        # cannot decode a file, Pillow is tried.
        with contextlib.suppress(ValueError):
            return None, _upright(simplejpeg.decode_jpeg(encoded), _orientation(image))
    return _to_rgb(image, encoded, white_level)


def load(encoded: bytes, preprocessing: Preprocessing) -> Pixels:
    """Decodes an image file and resizes the image; returns uint8 [height, width, 3].

    Raises:
      DataError: See `decode`.
    """
    pixels = decode(encoded, preprocessing.max_pixels, preprocessing.white_level)
    return resize(pixels, preprocessing)


def pixel_digest(pixels: Pixels) -> str:
    """Returns the sha256 of decoded pixels and their shape, hexadecimal, 32 digits."""
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data)
    digest.update(f"{pixels.shape[0]}x{pixels.shape[1]}".encode())
    return digest.hexdigest()[:32]


def _decode_pillow(
    image: Image.Image, max_pixels: int, white_level: float
) -> tuple[Values | None, Pixels]:
    with _explain_errors():
        _check_size(image, max_pixels)
        if not _loses_values(image):
            return _to_rgb(image, b"", white_level)
        encoded = _content(image)
        with _opened(encoded, max_pixels) as again:
            if frame := image.tell():
                again.seek(frame)
            return _to_rgb(again, encoded, white_level)


def _decode_array(
    array: Shaped[np.ndarray, "..."], white_level: float
) -> tuple[Values | None, Pixels]:
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[-1] != 3):
        raise DataError(
            f"an image array must be [height, width] or [height, width, 3], got "
            f"{list(array.shape)} of {array.dtype}"
        )
    if array.dtype == bool:
        array = array * np.uint8(255)
    if array.dtype != np.uint8:
        if array.dtype.kind not in "iuf":
            raise DataError(f"an image array must be uint8, got {array.dtype}")
        try:
            return _to_grey_levels(_Deep(array, _kind(array.dtype)[0], 0), white_level)
        except UnknownWhiteError as error:
            raise DataError(f"{error}; or pass uint8, of which 255 is white") from error
    return None, np.ascontiguousarray(_three_channels(array))


def looks_like_an_image(beginning: bytes) -> bool:
    """Returns whether the first bytes of a file are those of a supported image format."""
    return _BEGINNING.match(beginning) is not None


def format_number(value: float) -> str:
    """Formats a number without trailing zeros, such as "4095" or "0.5"."""
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def span(values: Any) -> str:
    """Returns a range of values as text, such as "from 0 to 4095".

    Args:
      values: An object with the attributes `low` and `high`.
    """
    return f"from {format_number(values.low)} to {format_number(values.high)}"


def likely_white(high: float) -> float:
    """Guesses the white level, such as 1, 255 or 4095, from the largest value in some images."""
    high = max(high, 1)
    for white in _USUAL_WHITES:
        if DARK * white < high <= OVERSHOOT * white:
            return white
    return 2.0 ** math.ceil(math.log2(high + 1)) - 1


def unknown_white(values: Any) -> str:
    """Returns the error message for images whose white level (the value of white) is unknown.

    Args:
      values: An object with the attributes `low` and `high`.
    """
    return (
        f"values {span(values)}, none of which is known to be white, so they cannot be read: "
        f"set --config.data.white_level={format_number(likely_white(values.high))}, or another "
        "value that is white in all images, for training"
    )


@contextlib.contextmanager
def _opened(encoded: bytes, max_pixels: int) -> Iterator[Image.Image]:
    if not encoded:
        raise DataError("is empty")
    with _explain_errors():
        try:
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        except Image.UnidentifiedImageError as error:
            raise _unknown_format(encoded) from error
        with image:
            _check_size(image, max_pixels)
            yield image


def _unknown_format(encoded: bytes) -> UnknownFormatError:
    """Returns the error for a file whose format Pillow cannot identify."""
    for name, beginning in _BEGINNINGS.items():
        if re.compile(beginning, re.DOTALL).match(encoded):
            described = _describe_tiff(encoded) if name == "TIFF" else ""
            if described:
                return UnknownFormatError(
                    f"is a TIFF whose pixels are not read ({described}): save it with one or three "
                    "channels of 8 or 16 bits"
                )
            return UnknownFormatError(f"is a damaged {name}, or of a kind that is not read")
    for name, beginning in _OTHER_BEGINNINGS.items():
        if re.compile(beginning, re.DOTALL).match(encoded[:1024]):
            return UnknownFormatError(f"is {name}, which is not read: convert it", name)
    if _WEB_PAGE.match(encoded):
        return UnknownFormatError("is a web page, not an image")
    return UnknownFormatError("is not an image of a known format")


def _describe_tiff(encoded: bytes) -> str:
    """Returns a description of the channels of a TIFF; "" if the tags are damaged."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(encoded[:8])
        file = io.BytesIO(encoded)
        file.seek(tags.next)
        tags.load(file)
        bits = tags[ExifTags.Base.BitsPerSample]
        kinds = {1: "unsigned", 2: "signed", 3: "float"}
        kind = kinds.get(tags.get(ExifTags.Base.SampleFormat, (1,))[0], "of an unusual type")
        return f"{len(bits)} x {bits[0]} bits, {kind}"
    except Exception:  # Damaged tags make Pillow raise errors of any type.
        return ""


def _one_large_at_a_time(pixels: int) -> contextlib.AbstractContextManager[object]:
    """Returns a context manager that lets only one thread at a time decode a large image.

    Without this limit, the memory used would grow with the number of cores.
    """
    return _LARGE_TURN if pixels > _LARGE else contextlib.nullcontext()


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Pillow's TIFF decoder decodes whole tiles, even if a tile is larger than the image.
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
    # A PPM with values above 255 is not slow, because `_read_deep_ppm` reads the file without
    # Pillow's decoder.
    is_slow &= not _ppm_white(image)
    if is_slow and pixels > _MAX_SLOW_PIXELS:
        raise TooManyPixelsError(
            f"is a PPM in text, or with other values than 0 to 255, of {image.width} x "
            f"{image.height} pixels, which would take too long; save it as PNG"
        )


@contextlib.contextmanager
def _explain_errors() -> Iterator[None]:
    """Converts all errors that Pillow raises inside this context to DataErrors."""
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
    """Returns the number of scans of a JPEG; data after the image, such as a video, is ignored."""
    scans, position = 0, 2
    while (marker := _MARKER.search(encoded, position)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        length = int.from_bytes(encoded[marker.end() : marker.end() + 2], "big")
        position = marker.end() + max(length, 2)
    return scans


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 (upright) if the tag is missing or invalid."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Damaged EXIF data makes Pillow raise errors of any type.
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Rotates or mirrors pixels to the upright position.

    Args:
      pixels: The pixels as they are stored in the file.
      orientation: The file's EXIF orientation, 1 to 8 (CIPA DC-008, tag 0x0112).
    """
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _to_rgb(image: Image.Image, encoded: bytes, white_level: float) -> tuple[Values | None, Pixels]:
    """Converts a Pillow image to upright RGB pixels.

    Args:
      image: The image; it must not be loaded yet if `encoded` is given.
      encoded: The bytes of the image's file; b"" if `_loses_values` is False.
      white_level: See `Preprocessing`.

    Returns:
      The range of the image's values, or None if they have 8 bits; and its pixels.
    """
    deep = _read_deep(image, encoded)
    # When Pillow loads a TIFF, Pillow also rotates the image and removes the orientation tag.
    image.load()
    orientation = _orientation(image)
    if deep is not None:
        values, pixels = _to_grey_levels(deep, white_level)
        return values, _upright(pixels, orientation)
    width, height = image.size
    rows = max(_STRIP // width, 1)
    if rows >= height:
        return None, _upright(np.asarray(_strip_to_rgb(image)), orientation)
    # Convert in strips, so that intermediate images stay small.
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(_strip_to_rgb(strip))
    return None, _upright(pixels, orientation)


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow converts the mode "La" only to the mode "LA".
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


@dataclasses.dataclass(frozen=True, eq=False)
class _Deep:
    """Image values that must be converted to grey levels, for example 16-bit values.

    Attributes:
      values: An array [height, width] or [height, width, 3].
      kind: See `Values`.
      white: See `Values`.
      alpha: [height, width, 1], 0 (transparent) to 1; None if the image is opaque.
      is_premultiplied: Whether the values are already multiplied by alpha.
      is_inverted: Whether 0 is white.
    """

    values: np.ndarray
    kind: str
    white: float
    alpha: np.ndarray | None = None
    is_premultiplied: bool = False
    is_inverted: bool = False


def _to_grey_levels(deep: _Deep, white_level: float) -> tuple[Values, Pixels]:
    """Converts image values to grey levels; returns the range of the values and the RGB pixels.

    Raises:
      DataError: A value is negative or not finite, or the white level is unknown.
    """
    values = Values(deep.kind, deep.values.min().item(), deep.values.max().item(), deep.white)
    if not math.isfinite(values.low) or not math.isfinite(values.high):
        raise DataError("has values that are not finite (NaN or infinity): replace them")
    if values.low < 0:
        raise DataError(
            f"has {deep.kind} values {span(values)}: shift them so that none is negative"
        )
    white = white_level or deep.white
    if not white:
        raise UnknownWhiteError(values)
    height, width = deep.values.shape[:2]
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(_STRIP // width, 1)
    for top in range(0, height, rows):
        strip = slice(top, top + rows)
        levels = np.clip(deep.values[strip].astype(np.float64) * 255 / white, 0, 255)
        if deep.is_inverted:
            levels = 255 - levels
        levels = _three_channels(levels)
        if deep.alpha is not None:
            alpha = deep.alpha[strip]
            levels = (levels if deep.is_premultiplied else levels * alpha) + 255 * (1 - alpha)
        pixels[strip] = np.rint(np.minimum(levels, 255))
    return values, pixels


def _three_channels(array: np.ndarray) -> np.ndarray:
    return np.repeat(array[..., np.newaxis], 3, axis=-1) if array.ndim == 2 else array


def _kind(dtype: np.dtype[Any]) -> tuple[str, float]:
    """Returns the name of a dtype, such as "16-bit", and its white level; 0 means unknown."""
    if dtype.kind == "f":
        return "float", 0
    bits = 8 * dtype.itemsize
    if dtype.kind == "i" or bits > 16:
        return f"{bits}-bit{' signed' if dtype.kind == 'i' else ''}", 0
    return f"{bits}-bit", 2**bits - 1


def _rawmode(image: Image.Image) -> str:
    """Returns a Pillow image's raw mode, which describes how the file stores the values.

    The raw mode is "" if the image is already loaded.
    """
    tile = image.tile[0] if isinstance(image, ImageFile.ImageFile) and image.tile else None
    args = tile.args if tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args or "")


def _ppm_white(image: Image.Image) -> int:
    """Returns the white level of an unloaded PPM image if the level exceeds 255; else returns 0."""
    if not isinstance(image, PpmImagePlugin.PpmImageFile) or not image.tile:
        return 0
    args = image.tile[0].args
    if args == "I;16B":
        return 65535
    white = args[1] if isinstance(args, tuple) and args[0] != "F" and len(args) == 2 else 0
    return white if isinstance(white, int) and white > 255 else 0


def _loses_values(image: Image.Image) -> bool:
    """Returns whether Pillow loses information when it loads the values of this image.

    Pillow loses information for colours of 16 bits, for grey levels of 2 or 4 bits of which one is
    transparent, and for a PPM with values above 255. Such a file must be read in another way.
    """
    if image.format not in FORMATS:
        return False
    rawmode = _rawmode(image)
    is_deep_colour = ";16" in rawmode and image.mode in ("RGB", "RGBA")
    is_transparent_level = rawmode in _SCALES and "transparency" in image.info
    return is_deep_colour or is_transparent_level or _ppm_white(image) > 0


def _content(image: Image.Image) -> bytes:
    """Returns the file content of a Pillow image that was opened but not yet loaded."""
    assert isinstance(image, ImageFile.ImageFile)
    file = image.fp
    assert file is not None
    position = file.tell()
    file.seek(0)
    encoded = file.read()
    file.seek(position)
    return encoded


def _read_deep(image: Image.Image, encoded: bytes) -> _Deep | None:
    """Reads the values of an image if they must be converted to grey levels; else returns None."""
    rawmode = _rawmode(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = tags.get(ExifTags.Base.BitsPerSample, (0,))
    is_planar = tags.get(ExifTags.Base.PlanarConfiguration) == _PLANAR
    if is_planar and len(bits) > 1 and bits[0] > 8:
        # In an uncompressed planar TIFF, Pillow reads each byte as a value, although a value has
        # several bytes.
        raise DataError(
            "is a TIFF of 16-bit channels that lie apart (planar), which is not read: save them "
            "interleaved"
        )
    if white := _ppm_white(image):
        return _read_deep_ppm(image, encoded, white)
    if rawmode in _SCALES and isinstance(image.info.get("transparency"), int):
        # Pillow scales the pixels to 8 bits, but does not scale the grey level that the PNG marks
        # as transparent.
        image.info["transparency"] *= _SCALES[rawmode]
    if ";16" in rawmode and image.mode in ("RGB", "RGBA"):
        return _read_deep_colour(image, encoded, rawmode)
    is_signed = tags.get(ExifTags.Base.SampleFormat, (1,))[0] == _SIGNED
    if not image.mode.startswith(("I", "F")) and not (image.mode == "L" and is_signed):
        return None
    image.load()
    values = np.asarray(image)
    if image.mode == "L":
        values = values.view(np.int8)
    elif image.mode == "I" and bits == (32,) and not is_signed:
        values = values.view(np.uint32)
    kind, white = _kind(values.dtype)
    if isinstance(image, PpmImagePlugin.PpmImageFile) and image.mode == "I":
        kind, white = "16-bit", 65535  # Pillow scales the values of a PPM to 16 bits.
    elif image.mode == "I" and bits == (16,):
        kind = "16-bit signed"
    elif bits == (12,) and image.mode.startswith("I;16"):
        kind, white = "12-bit", 4095
    transparent = image.info.get("transparency")
    alpha = None
    if isinstance(transparent, int):
        alpha = (values != transparent)[..., np.newaxis]
    is_inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO
    # Pillow itself inverts images with at most 8 bits per value, but not images with more bits.
    return _Deep(values, kind, white, alpha, is_inverted=is_inverted and image.mode != "L")


def _read_deep_ppm(image: Image.Image, encoded: bytes, white: int) -> _Deep:
    """Reads a PPM or PGM file with two bytes per value (Netpbm's specifications of PPM and PGM)."""
    assert isinstance(image, ImageFile.ImageFile)
    tile = image.tile[0]
    if tile.codec_name == "ppm_plain":
        raise DataError("is a PPM in text, of more than 8 bits: save it as PNG")
    shape = (image.height, image.width) + (3,) * (image.mode == "RGB")
    end = tile.offset + 2 * math.prod(shape)
    if end > len(encoded):
        raise DataError("cannot be decoded: it is cut off before its end")
    values = np.frombuffer(encoded[tile.offset : end], ">u2").reshape(shape)
    return _Deep(values, f"{white.bit_length()}-bit", white)


def _read_deep_colour(image: Image.Image, encoded: bytes, rawmode: str) -> _Deep:
    """Reads all 16 bits per channel of an image; Pillow itself keeps only the high bytes.

    The file is unpacked twice. The second time, Pillow is told the wrong byte order, so that it
    keeps the low bytes.
    """
    if rawmode == "LA;16B":
        # The four channels of `unpacked` are the high byte and the low byte of the grey value, and
        # the high byte and the low byte of alpha.
        unpacked = _unpack(image, encoded, "RGBA").astype(np.uint16)
        values, alpha = np.moveaxis(unpacked[..., ::2] << 8 | unpacked[..., 1::2], -1, 0)
        return _Deep(values, "16-bit", 65535, alpha[..., np.newaxis] / 65535)
    layout, _, order = rawmode.partition(";16")
    orders = "LB" if order == "L" or (order == "N" and sys.byteorder == "little") else "BL"
    layout_read = "RGBA" if layout == "RGBa" else layout
    high, low = (_unpack(image, encoded, f"{layout_read};16{order}") for order in orders)
    values = high.astype(np.uint16) << 8 | low
    transparent = image.info.get("transparency")
    alpha = None
    if image.mode == "RGBA":
        values, alpha = values[..., :3], values[..., 3:] / 65535
    elif isinstance(transparent, tuple):
        alpha = (values != transparent).any(axis=-1, keepdims=True)
    return _Deep(values, "16-bit", 65535, alpha, is_premultiplied=layout == "RGBa")


def _unpack(image: Image.Image, encoded: bytes, rawmode: str) -> UInt8[np.ndarray, "_h _w _c"]:
    """Reads the current frame of a PNG or TIFF again, with another raw mode of Pillow."""
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as again:
        if frame := image.tell():
            again.seek(frame)
        assert isinstance(again, ImageFile.ImageFile)
        again.tile = [
            tile._replace(
                args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode
            )
            for tile in again.tile
        ]
        again.load()
        return np.asarray(again)
