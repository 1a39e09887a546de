"""Image files to arrays: the only decoder and the only resize of the project.

The same picture has the same pixels whatever it came as (a file, its bytes, a Pillow
image, an array): every JPEG is decoded at its full size, and every picture is resized
by `resize`. Decoding JPEGs at 1/2 to 1/8 of their size in the cosine transform would
be up to five times as fast, but Pillow images and arrays cannot be reduced in that
way, and at no factor does the difference vanish (`experiments/benchmarks/bench_decode.py`).

A value of a file becomes a grey level, 0 to 255, by

    rint(clip(value * 255 / white, 0, 255)),

where `white` is known for unsigned integers of at most 16 bits, and must be declared
(`data.white_level`) for all other types.
"""

import contextlib
import dataclasses
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

from cnn_jax.data.preprocessing import MAX_PIXELS
from cnn_jax.system.errors import DataError

# Part of the name of a cache of pixels: raise it when any pixel would change.
VERSION = 3
# The decoders that may be tried on a file's content. Others of Pillow's are
# rarely used, and one of them (EPS) runs another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# How files of these formats begin; TIFF includes BigTIFF.
_BEGINNINGS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM....\0\0\0\0",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "PPM": rb"P[1-6]\s+[\d#]",
}
# How files of formats begin that are often found under the name of another one.
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
# A failed download often leaves a web page.
_WEB_PAGE = re.compile(rb"\s*<(?:!doctype\s+html|html|head)", re.IGNORECASE)
_BEGINNING = re.compile(b"|".join(_BEGINNINGS.values()), re.DOTALL)
# A progressive JPEG of a usual program has about ten scans. Each passes over all
# pixels, so a small file of very many could keep a core busy for minutes.
_MAX_SCANS = 100
_START_OF_SCAN = b"\xff\xda"
# A marker with a length behind it, or the one of the picture's end.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")

# Pillow's decoders of a PPM in text, or whose largest value is below 255, are written in
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
# The largest values of the usual kinds of images, and by how much of it the values of a
# resized image may exceed its white: bicubic and Lanczos filters overshoot.
_USUAL_WHITES = (1, 255, 1023, 4095, 16383, 65535)
OVERSHOOT = 1.1
# An image is dark if none of its values is above this fraction of white; 14 bits of 16 are.
DARK = 0.25
# Values of TIFF's tags (TIFF 6.0, sections 8 and 19).
_WHITE_IS_ZERO, _PLANAR, _SIGNED = 0, 2, 2
# How Pillow scales grey levels of 2 and 4 bits.
_SCALES = {"L;2": 85, "L;4": 17}


class TooManyPixelsError(DataError):
    """An image is larger than it may be."""


class UnknownFormatError(DataError):
    """What is no image, or one of a format that is not read.

    Attributes:
      format: The format that is not read; "" if it is not known.
    """

    def __init__(self, message: str, format: str = ""):
        super().__init__(message)
        self.format = format


@dataclasses.dataclass(frozen=True)
class Values:
    """The values of an image's pixels as its file has them.

    Attributes:
      kind: Their type, such as "8-bit", "12-bit", "16-bit signed" or "float".
      low: The smallest.
      high: The largest.
      white: The value that is white by the file's format; 0 if the format does not say.
    """

    kind: str
    low: float
    high: float
    white: float

    def doubt(self, white_level: float) -> str:
        """Why the values hardly suit a network of this white level; "" if they do.

        Args:
          white_level: See `Preprocessing`.
        """
        white = white_level or self.white
        if self.kind == "8-bit" or DARK * white < self.high <= OVERSHOOT * white or not self.high:
            return ""
        effect = "those above it become white" if self.high > white else "it is almost black"
        return (
            f"has {self.kind} values {span(self)}, and {format_number(white)} is white, so that "
            f"{effect}: scale them like those of the training's images, or train with a "
            "data.white_level that suits them"
        )


class UnknownWhiteError(DataError):
    """An image whose values could mean any grey level, since none is known to be white.

    Attributes:
      values: The values that it has.
    """

    def __init__(self, values: Values):
        super().__init__(f"has {values.kind} {unknown_white(values)}")
        self.values = values


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


def decode(encoded: bytes, max_pixels: int = MAX_PIXELS, white_level: float = 0) -> Pixels:
    """Decodes an image file to RGB, at its full size.

    EXIF orientation is applied, transparency lies over white, and of an
    animation the first frame is taken.

    Args:
      encoded: The bytes of a file in one of `FORMATS`, whatever its name.
      max_pixels: Largest width times height. The header is checked before
        anything is decoded.
      white_level: See `Preprocessing`.

    Returns:
      uint8 [height, width, 3].

    Raises:
      DataError: The bytes are no image, a damaged one, or one too large, or what
        its values mean is not known.
    """
    return decode_any(encoded, max_pixels, white_level)[1]


def decode_any(
    image: bytes | Image.Image | Shaped[np.ndarray, "..."],
    max_pixels: int = MAX_PIXELS,
    white_level: float = 0,
) -> tuple[Values | None, Pixels]:
    """The range of values, None if they are of 8 bits, and what the three others return.

    The others are `decode` for bytes, `to_rgb` and `from_array`.

    Raises:
      DataError: As these.
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
    """Decodes as `decode` does, and returns the file's header and range of values as well.

    Raises:
      DataError: As `decode`.
    """
    with _opened(encoded, max_pixels) as image, _one_large_at_a_time(image.width * image.height):
        file_format, mode = image.format or "", image.mode
        # Loading a TIFF turns it and drops the tag; reading the tag of a PNG loads the PNG.
        turned = _orientation(image) if file_format == "TIFF" else 0
        values, pixels = _decode_opened(image, encoded, white_level)
        orientation = turned or _orientation(image)
        height, width, _ = pixels.shape
        if values is None:
            values = Values("8-bit", pixels.min().item(), pixels.max().item(), 255)
        return Header(file_format, mode, width, height, orientation), values, pixels


def _decode_plain_jpeg(encoded: bytes, max_pixels: int) -> Pixels | None:
    """The pixels of a JPEG that needs no further care; None if it may need some.

    This is most JPEGs, and opening them with Pillow takes as long as decoding
    small ones.
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
    image: Image.Image, encoded: bytes, white_level: float
) -> tuple[Values | None, Pixels]:
    if image.format not in ("JPEG", "MPO"):
        return _to_rgb(image, encoded, white_level)
    if encoded.count(_START_OF_SCAN) > _MAX_SCANS and _num_scans(encoded) > _MAX_SCANS:
        raise DataError(f"is a JPEG of more than {_MAX_SCANS} scans")
    if image.mode in ("RGB", "L"):
        # simplejpeg gives the same pixels as Pillow, bit for bit, in half the time. What
        # it refuses, Pillow may still read.
        with contextlib.suppress(ValueError):
            return None, _upright(simplejpeg.decode_jpeg(encoded), _orientation(image))
    return _to_rgb(image, encoded, white_level)


def load(
    encoded: bytes,
    image_size: tuple[int, int],
    max_pixels: int = MAX_PIXELS,
    white_level: float = 0,
) -> Pixels:
    """Decodes and resizes: uint8 [height, width, 3] of this (height, width).

    Raises:
      DataError: As `decode`.
    """
    return resize(decode(encoded, max_pixels, white_level), image_size)


def to_rgb(image: Image.Image, max_pixels: int = MAX_PIXELS, white_level: float = 0) -> Pixels:
    """A Pillow image of any mode, with the pixels that `decode` gives for its file.

    Of colours of 16 bits Pillow keeps 8 bits once it has loaded an image. An image
    that is not loaded yet is read from its file again, in full.

    Raises:
      DataError: It is too large, or damaged where Pillow had not looked yet, or what
        its values mean is not known.
    """
    return decode_any(image, max_pixels, white_level)[1]


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


def from_array(array: Shaped[np.ndarray, "..."], white_level: float = 0) -> Pixels:
    """Grey or RGB values of any type, with the pixels that `decode` gives for a file of them.

    An array has no file format to say what is white. So every type other than uint8 and
    bool needs a white level, uint16 too.

    Args:
      array: [height, width] or [height, width, 3].
      white_level: See `Preprocessing`.

    Raises:
      DataError: It is of another shape or type, or what its values mean is not known.
    """
    return decode_any(array, white_level=white_level)[1]


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


def resize(image: Pixels, image_size: tuple[int, int]) -> Pixels:
    """Stretches to (height, width): bilinear, averaging over each output pixel's area."""
    if image.shape[:2] == tuple(image_size):
        return image
    height, width = image_size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def looks_like_an_image(beginning: bytes) -> bool:
    """Whether a file that begins so (16 bytes suffice) is of one of `FORMATS`."""
    return _BEGINNING.match(beginning) is not None


def format_number(value: float) -> str:
    """A value in the fewest digits, such as "4095" or "0.5"."""
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def span(values: Any) -> str:
    """Such as "from 0 to 4095", of anything with a `low` and a `high`."""
    return f"from {format_number(values.low)} to {format_number(values.high)}"


def likely_white(high: float) -> float:
    """The value that is probably white where `high` is the largest: 1, 255, 4095, ..."""
    high = max(high, 1)
    for white in _USUAL_WHITES:
        if DARK * white < high <= OVERSHOOT * white:
            return white
    return 2.0 ** math.ceil(math.log2(high + 1)) - 1


def unknown_white(values: Any) -> str:
    """Why values cannot be read, of anything with a `low` and a `high`, and what to do."""
    return (
        f"values {span(values)}, none of which is known to be white, so that they cannot be read: "
        f"set --config.data.white_level={format_number(likely_white(values.high))}, or whatever "
        "is white in all images, for training"
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
    """What is known of a file that Pillow does not know."""
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
    """The channels of a TIFF, in words; "" if it is too damaged to tell."""
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
    is_slow &= not _ppm_white(image)  # `_read_deep_ppm` does not use Pillow's decoder.
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


def _to_rgb(image: Image.Image, encoded: bytes, white_level: float) -> tuple[Values | None, Pixels]:
    """The upright pixels of an image, and its range of values unless that is 8 bits.

    Args:
      image: Not loaded yet, if `encoded` is given.
      encoded: Its file; b"" if `_loses_values` is False.
      white_level: See `Preprocessing`.
    """
    deep = _read_deep(image, encoded)
    image.load()  # This turns a TIFF; its orientation is 1 from then on.
    orientation = _orientation(image)
    if deep is not None:
        values, pixels = _to_grey_levels(deep, white_level)
        return values, _upright(pixels, orientation)
    width, height = image.size
    rows = max(_STRIP // width, 1)
    if rows >= height:
        return None, _upright(np.asarray(_strip_to_rgb(image)), orientation)
    # A strip at a time, so that intermediate images stay small.
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(_strip_to_rgb(strip))
    return None, _upright(pixels, orientation)


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow converts it to nothing else.
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


@dataclasses.dataclass(frozen=True, eq=False)
class _Deep:
    """Values that are not grey levels from 0 to 255.

    Attributes:
      values: [height, width] or [height, width, 3].
      kind: As in `Values`.
      white: As in `Values`.
      alpha: [height, width, 1], 0 (transparent) to 1; None if all of it is opaque.
      is_premultiplied: Whether the values are multiplied by alpha already.
      is_inverted: Whether 0 is white.
    """

    values: np.ndarray
    kind: str
    white: float
    alpha: np.ndarray | None = None
    is_premultiplied: bool = False
    is_inverted: bool = False


def _to_grey_levels(deep: _Deep, white_level: float) -> tuple[Values, Pixels]:
    """Grey levels in RGB, and the range of the values that they came from.

    Raises:
      DataError: There are negative values, or some that are not finite, or none is
        known to be white.
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
    """The name of a type of values, and the value that is white, 0 if that is not known."""
    if dtype.kind == "f":
        return "float", 0
    bits = 8 * dtype.itemsize
    if dtype.kind == "i" or bits > 16:
        return f"{bits}-bit{' signed' if dtype.kind == 'i' else ''}", 0
    return f"{bits}-bit", 2**bits - 1


def _rawmode(image: Image.Image) -> str:
    """How Pillow unpacks a file's samples; "" once the image is loaded."""
    tile = image.tile[0] if isinstance(image, ImageFile.ImageFile) and image.tile else None
    args = tile.args if tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args or "")


def _ppm_white(image: Image.Image) -> int:
    """The largest value that a PPM declares, if it is above 255 and not loaded yet; else 0."""
    if not isinstance(image, PpmImagePlugin.PpmImageFile) or not image.tile:
        return 0
    args = image.tile[0].args
    if args == "I;16B":
        return 65535
    white = args[1] if isinstance(args, tuple) and args[0] != "F" and len(args) == 2 else 0
    return white if isinstance(white, int) and white > 255 else 0


def _loses_values(image: Image.Image) -> bool:
    """Whether Pillow changes values, or forgets what they mean, as it loads this image."""
    if image.format not in FORMATS:
        return False
    rawmode = _rawmode(image)
    is_deep_colour = ";16" in rawmode and image.mode in ("RGB", "RGBA")
    is_transparent_level = rawmode in _SCALES and "transparency" in image.info
    return is_deep_colour or is_transparent_level or _ppm_white(image) > 0


def _content(image: Image.Image) -> bytes:
    """The file of an image that is not loaded yet."""
    assert isinstance(image, ImageFile.ImageFile)
    file = image.fp
    assert file is not None
    position = file.tell()
    file.seek(0)
    encoded = file.read()
    file.seek(position)
    return encoded


def _read_deep(image: Image.Image, encoded: bytes) -> _Deep | None:
    """The values of an image that are not grey levels from 0 to 255; None if they are."""
    rawmode = _rawmode(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = tags.get(ExifTags.Base.BitsPerSample, (0,))
    is_planar = tags.get(ExifTags.Base.PlanarConfiguration) == _PLANAR
    if is_planar and len(bits) > 1 and bits[0] > 8:
        # If they are not compressed, Pillow takes each byte for a value.
        raise DataError(
            "is a TIFF of 16-bit channels that lie apart (planar), which is not read: save them "
            "interleaved"
        )
    if white := _ppm_white(image):
        return _read_deep_ppm(image, encoded, white)
    if rawmode in _SCALES and isinstance(image.info.get("transparency"), int):
        # A PNG names the transparent level in the file's own bits; Pillow scales the pixels
        # and not this level.
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
        kind, white = "16-bit", 65535  # To which Pillow has scaled it.
    elif image.mode == "I" and bits == (16,):
        kind = "16-bit signed"
    elif bits == (12,) and image.mode.startswith("I;16"):
        kind, white = "12-bit", 4095
    transparent = image.info.get("transparency")
    alpha = None
    if isinstance(transparent, int):
        alpha = (values != transparent)[..., np.newaxis]
    is_inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO
    # Pillow inverts 8 bits and fewer, and no others.
    return _Deep(values, kind, white, alpha, is_inverted=is_inverted and image.mode != "L")


def _read_deep_ppm(image: Image.Image, encoded: bytes, white: int) -> _Deep:
    """Values of two bytes each (the PPM and PGM format specifications of Netpbm)."""
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
    """The values of colours of 16 bits, of which Pillow keeps the high bytes only.

    The file is unpacked twice. In the other byte order, the low bytes are the high ones.
    """
    if rawmode == "LA;16B":
        # The four bytes of a pixel: high and low of the grey value, high and low of alpha.
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
    """The bytes of the same frame of a PNG or TIFF, unpacked in another way."""
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
