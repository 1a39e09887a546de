"""Tests of the conversion of pixel values: bit depth, dtype, mode, transparency, white level."""

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from cnn_jax.data import decode
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.resize import resize
from cnn_jax.inference.images import preprocess_for_inference
from cnn_jax.system.errors import DataError

_RNG = np.random.default_rng(0)
_DEEP = _RNG.integers(0, 65536, (5, 7, 4), np.uint16)
# The array must contain the extreme values, and 258, whose high and low bytes (1 and 2) differ.
_DEEP[0, :3, 0] = (0, 65535, 258)
_GREY, _COLOUR = _DEEP[..., 0], _DEEP[..., :3]
_BYTES = (_DEEP >> 8).astype(np.uint8)


def _tiff(array, order="<", *, photometric=None, planar=1, extra=(), deflate=False, bits=None):
    """Encodes an array as a TIFF 6.0 file, also in dtypes that few programs can write."""
    array = array if array.ndim == 3 else array[..., None]
    height, width, channels = array.shape
    bits = bits or 8 * array.itemsize
    data = array.astype(array.dtype.newbyteorder(order))
    planes = [data[..., i].tobytes() for i in range(channels)] if planar == 2 else [data.tobytes()]
    if bits == 12:
        assert channels == 1
        assert width % 2 == 0
        high = array[..., 0].astype(int).ravel()
        a, b = high[::2], high[1::2]
        planes = [np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype("u1").tobytes()]
    if deflate:
        planes = [zlib.compress(plane) for plane in planes]
    if photometric is None:
        photometric = 2 if channels >= 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    tags = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * channels),
        259: ("H", [8 if deflate else 1]),
        262: ("H", [photometric]),
        273: ("I", [0] * len(planes)),
        277: ("H", [channels]),
        278: ("I", [height]),
        279: ("I", [len(plane) for plane in planes]),
        284: ("H", [planar]),
        **({338: ("H", list(extra))} if extra else {}),
        339: ("H", [kind] * channels),
    }

    def packed(tag):
        code, values = tags[tag]
        return struct.pack(f"{order}{len(values)}{code}", *values)

    first = 8 + 2 + 12 * len(tags) + 4
    first += sum(len(packed(tag)) for tag in tags if len(packed(tag)) > 4)
    ends = np.cumsum([first, *map(len, planes)]).tolist()
    tags[273] = ("I", ends[:-1])
    entries, behind = b"", b""
    for tag, (code, values) in tags.items():
        value = packed(tag)
        if len(value) > 4:
            place = 8 + 2 + 12 * len(tags) + 4 + len(behind)
            behind, value = behind + value, struct.pack(f"{order}I", place)
        number = {"H": 3, "I": 4}[code]
        entries += struct.pack(f"{order}HHI", tag, number, len(values)) + value.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return start + entries + bytes(4) + behind + b"".join(planes)


def _png(array, colour_type, depth, transparent=b"", interlaced=False):
    """Encodes a PNG of any bit depth and colour type (PNG specification, sections 4 and 8)."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    def rows(part):
        if depth >= 8:
            return [row.astype(f">u{depth // 8}").tobytes() for row in part]
        padded = np.pad(part, [(0, 0), (0, -part.shape[1] % (8 // depth))]).astype(np.uint8)
        bits = np.unpackbits(padded[..., None], axis=-1)[..., 8 - depth :]
        return [np.packbits(row).tobytes() for row in bits.reshape(len(padded), -1)]

    first, *others = (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2)
    passes = [first, *others, (0, 1, 2, 2), (1, 0, 2, 1)] if interlaced else [(0, 0, 1, 1)]
    parts = [array[top::down, left::right] for top, left, down, right in passes]
    data = b"".join(b"\0" + row for part in parts if part.size for row in rows(part))
    height, width = array.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced)
    trns = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IHDR", header) + trns + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _encode(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _lzw(array):
    options = [cv2.IMWRITE_TIFF_COMPRESSION, 5]
    ok, encoded = cv2.imencode(".tiff", array[..., ::-1] if array.ndim == 3 else array, options)
    assert ok
    return encoded.tobytes()


def _levels(values, white):
    """Converts pixel values to grey levels from 0 to 255 by a plain float64 computation."""
    return np.rint(np.clip(values.astype(np.float64) * 255 / white, 0, 255)).astype(np.uint8)


def _over_white(levels, alpha):
    levels = levels.astype(np.float64)
    return np.rint(levels * alpha + 255 * (1 - alpha))


def _rgb(array):
    return np.repeat(array[..., None], 3, axis=-1) if array.ndim == 2 else array


_IN_12 = _GREY[:, :6] >> 4
_ALPHA = _DEEP[..., 3:] / 65535
_EXACT = _DEEP[..., :3].astype(np.float64) * 255 / 65535
_FLOATS = (_GREY / 65535).astype(np.float32)
_CLEAR = struct.pack(">H", int(_GREY[1, 1]))
_CLEAR_COLOUR = struct.pack(">HHH", *map(int, _COLOUR[1, 1]))
_G4, _G2 = _GREY % 16, _GREY % 4


def _clear(levels, mask):
    return np.where(mask[..., None], 255, _rgb(levels))


# Each row has a name, the encoded file, the white level, and the expected pixels or the pattern of
# the expected error message.
_TABLE = [
    ("png 8-bit grey", _png(_BYTES[..., 0], 0, 8), 0, _BYTES[..., 0]),
    ("png 8-bit RGB, white level", _png(_BYTES[..., :3], 2, 8), 4095, _BYTES[..., :3]),
    ("png 1-bit", _png(_GREY % 2, 0, 1), 0, 255 * (_GREY % 2)),
    ("png 2-bit", _png(_G2, 0, 2), 0, 85 * _G2),
    ("png 4-bit", _png(_G4, 0, 4), 0, 17 * _G4),
    ("png 1-bit, clear", _png(_GREY % 2, 0, 1, b"\0\0"), 0, 255 + 0 * _GREY),
    ("png 2-bit, clear", _png(_G2, 0, 2, b"\0\1"), 0, _clear(85 * _G2, _G2 == 1)),
    ("png 4-bit, clear", _png(_G4, 0, 4, b"\0\3"), 0, _clear(17 * _G4, _G4 == 3)),
    (
        "png 8-bit, clear",
        _png(_BYTES[..., 0], 0, 8, b"\0" + _BYTES[1, 1, 0].tobytes()),
        0,
        _clear(_BYTES[..., 0], _BYTES[..., 0] == _BYTES[1, 1, 0]),
    ),
    ("png 16-bit grey", _png(_GREY, 0, 16), 0, _levels(_GREY, 65535)),
    ("png 12 in 16 bits", _png(_GREY >> 4, 0, 16), 4095, _levels(_GREY >> 4, 4095)),
    (
        "png 16-bit grey, clear",
        _png(_GREY, 0, 16, _CLEAR),
        0,
        _clear(_levels(_GREY, 65535), _GREY[1, 1] == _GREY),
    ),
    ("png 16-bit RGB", _png(_COLOUR, 2, 16), 0, _levels(_COLOUR, 65535)),
    ("png 12 in 16-bit RGB", _png(_COLOUR >> 4, 2, 16), 4095, _levels(_COLOUR >> 4, 4095)),
    (
        "png 16-bit RGB interlaced",
        _png(_COLOUR, 2, 16, interlaced=True),
        0,
        _levels(_COLOUR, 65535),
    ),
    (
        "png 16-bit RGB, clear",
        _png(_COLOUR, 2, 16, _CLEAR_COLOUR),
        0,
        _clear(_levels(_COLOUR, 65535), (_COLOUR[1, 1] == _COLOUR).all(-1)),
    ),
    ("png 16-bit RGBA", _png(_DEEP, 6, 16), 0, _over_white(_EXACT, _ALPHA)),
    (
        "png 16-bit grey and alpha",
        _png(_DEEP[..., ::3], 4, 16),
        0,
        _over_white(_EXACT[..., :1], _ALPHA).repeat(3, -1),
    ),
    ("tiff 16-bit", _tiff(_GREY), 0, _levels(_GREY, 65535)),
    ("tiff 16-bit big-endian", _tiff(_GREY, ">"), 0, _levels(_GREY, 65535)),
    ("tiff 16-bit LZW", _lzw(_GREY), 0, _levels(_GREY, 65535)),
    ("tiff 16-bit deflated, big-endian", _tiff(_GREY, ">", deflate=True), 0, _levels(_GREY, 65535)),
    ("tiff 0 is white", _tiff(_GREY, photometric=0), 0, 255 - _levels(_GREY, 65535)),
    ("tiff 0 is white, 8-bit", _tiff(_BYTES[..., 0], photometric=0), 0, 255 - _BYTES[..., 0]),
    ("tiff 0 is white, float", _tiff(_FLOATS, photometric=0), 1, 255 - _levels(_FLOATS, 1)),
    ("tiff 12-bit", _tiff(_IN_12, bits=12), 0, _levels(_IN_12, 4095)),
    ("tiff 12-bit, white level", _tiff(_IN_12, bits=12), 2000, _levels(_IN_12, 2000)),
    ("tiff 16-bit RGB", _tiff(_COLOUR), 0, _levels(_COLOUR, 65535)),
    ("tiff 16-bit RGB big-endian", _tiff(_COLOUR, ">"), 0, _levels(_COLOUR, 65535)),
    ("tiff 16-bit RGB LZW", _lzw(_COLOUR), 1000, _levels(_COLOUR, 1000)),
    ("tiff 16-bit RGB deflated", _tiff(_COLOUR, ">", deflate=True), 0, _levels(_COLOUR, 65535)),
    ("tiff 16-bit RGB, unused", _tiff(_DEEP, extra=(0,)), 0, _levels(_COLOUR, 65535)),
    ("tiff 16-bit RGBA", _tiff(_DEEP, extra=(2,)), 0, _over_white(_EXACT, _ALPHA)),
    (
        "tiff 16-bit premultiplied",
        _tiff(np.concatenate([_COLOUR // 4, _DEEP[..., 3:] // 2 + 32768], -1), extra=(1,)),
        0,
        np.rint((_COLOUR // 4) * (255 / 65535) + 255 * (1 - (_DEEP[..., 3:] // 2 + 32768) / 65535)),
    ),
    ("tiff 16-bit RGB planar", _tiff(_COLOUR, planar=2), 0, "channels that lie apart"),
    (
        "tiff 16-bit RGB planar, deflated",
        _tiff(_COLOUR, planar=2, deflate=True),
        0,
        "channels that lie apart",
    ),
    ("tiff 8-bit RGB planar", _tiff(_BYTES[..., :3], planar=2), 0, _BYTES[..., :3]),
    ("tiff 8-bit signed", _tiff(_GREY.astype(np.int8)), 0, "8-bit signed values from -"),
    ("tiff 8-bit signed", _tiff((_G4 * 8).astype(np.int8)), 0, "8-bit signed values from 0 to 120"),
    ("tiff 8-bit signed", _tiff((_G4 * 8).astype(np.int8)), 127, _levels(_G4 * 8, 127)),
    ("tiff 16-bit signed", _tiff(_GREY.astype(np.int16)), 0, "values from -.* shift them"),
    ("tiff 16-bit signed", _tiff((_GREY >> 4).astype(np.int16)), 0, "data.white_level=4095"),
    (
        "tiff 16-bit signed",
        _tiff((_GREY >> 4).astype(np.int16), ">"),
        4095,
        _levels(_GREY >> 4, 4095),
    ),
    ("tiff 32-bit", _tiff(_GREY.astype(np.int32)), 0, "32-bit signed values from 0 to 65535, none"),
    ("tiff 32-bit", _tiff(_GREY.astype(np.int32)), 65535, _levels(_GREY, 65535)),
    ("tiff 32-bit", _tiff(_GREY.astype(np.int32), ">"), 65535, _levels(_GREY, 65535)),
    ("tiff 32-bit unsigned", _tiff(_GREY * np.uint32(65536)), 0, "32-bit values from 0 to 4294901"),
    ("tiff 32-bit unsigned", _tiff(_GREY * np.uint32(65536)), 2.0**32, _levels(_GREY, 2.0**16)),
    ("tiff float", _tiff(_FLOATS), 0, "float values from 0 to 1, none of .*data.white_level=1,"),
    ("tiff float", _tiff(_FLOATS), 1, _levels(_FLOATS, 1)),
    ("tiff float big-endian", _tiff(_FLOATS, ">"), 1, _levels(_FLOATS, 1)),
    ("tiff float LZW", _lzw(_FLOATS), 0.5, _levels(_FLOATS, 0.5)),
    ("tiff float, negative", _tiff(_FLOATS - 0.5), 1, "from -0.5 to 0.5: shift them"),
    ("tiff float, NaN", _tiff(np.where(_FLOATS > 0.5, np.nan, _FLOATS)), 1, "not finite"),
    ("tiff float, infinite", _tiff(np.where(_FLOATS > 0.5, np.inf, _FLOATS)), 1, "not finite"),
    ("tiff float, NaN", _tiff(np.full((3, 3), np.nan, np.float32)), 0, "not finite"),
    ("tiff 64-bit float", _tiff(_FLOATS.astype(np.float64)), 1, r"a TIFF whose .*1 x 64 bits, fl"),
    ("tiff 16-bit float", _tiff(_FLOATS.astype(np.float16)), 1, r"a TIFF whose .*1 x 16 bits, fl"),
    ("tiff float RGB", _tiff(_COLOUR.astype(np.float32)), 1, r"a TIFF whose .*3 x 32 bits, float"),
    ("tiff 16-bit grey and alpha", _tiff(_DEEP[..., :2], extra=(2,)), 0, "a TIFF whose .*2 x 16"),
    ("tiff grey and alpha", _tiff(_BYTES[..., :2], extra=(2,)), 0, None),
    ("tiff grey and alpha, premultiplied", _tiff(_BYTES[..., :2] | 128, extra=(1,)), 0, None),
    ("tiff grey and unused", _tiff(_BYTES[..., :2], extra=(0,)), 0, _BYTES[..., 0]),
    ("tiff YCbCr", _tiff(_BYTES[..., :3], photometric=6), 0, None),
    ("tiff CMYK", _tiff(_BYTES, photometric=5), 0, None),
    ("tiff 16-bit CMYK", _tiff(_DEEP, photometric=5), 0, None),
    ("tiff LAB", _tiff(_BYTES[..., :3], photometric=8), 0, None),
    ("pgm 4-bit", b"P5 7 5 15\n" + _G4.astype("u1").tobytes(), 0, 17 * _G4),
    (
        "pgm 12-bit",
        b"P5 7 5 4095\n" + (_GREY >> 4).astype(">u2").tobytes(),
        0,
        _levels(_GREY >> 4, 4095),
    ),
    (
        "pgm 12-bit, white level",
        b"P5 7 5 4095\n" + (_GREY >> 4).astype(">u2").tobytes(),
        1000,
        _levels(_GREY >> 4, 1000),
    ),
    ("pgm 16-bit", b"P5 7 5 65535\n" + _GREY.astype(">u2").tobytes(), 0, _levels(_GREY, 65535)),
    (
        "ppm 16-bit, white level",
        b"P6 7 5 65535\n" + _COLOUR.astype(">u2").tobytes(),
        4095,
        _levels(_COLOUR, 4095),
    ),
    ("ppm 16-bit, cut", b"P6 7 5 65535\n" + bytes(99), 0, "cannot be decoded: it is cut off"),
    ("pgm in text", b"P2 2 1 255\n1 2\n", 0, np.array([[1, 2]])),
    ("pgm in text, 12-bit", b"P2 2 1 4095\n1 2\n", 0, "in text, of more than 8 bits"),
    ("pfm", b"Pf 7 5 -1\n" + _FLOATS[::-1].astype("<f4").tobytes(), 1, _levels(_FLOATS, 1)),
    ("pfm in colour", b"PF 7 5 -1\n" + bytes(5 * 7 * 12), 1, "is PFM in colour, which is not read"),
    ("palette", _encode(Image.fromarray(_BYTES[..., :3]).quantize(16), "PNG"), 0, None),
    (
        "transparent palette",
        _encode(Image.fromarray(_BYTES[..., :3]).quantize(16), "PNG", transparency=3),
        0,
        None,
    ),
    ("gif", _encode(Image.fromarray(_BYTES[..., 0]), "GIF", transparency=5), 0, None),
    ("webp", _encode(Image.fromarray(_BYTES), "WEBP", lossless=True), 0, None),
    ("cmyk jpeg", _encode(Image.fromarray(_BYTES[..., :3]).convert("CMYK"), "JPEG"), 0, None),
    ("grey jpeg", _encode(Image.fromarray(_BYTES[..., 0]), "JPEG"), 0, None),
    ("bmp", _encode(Image.fromarray(_BYTES[..., :3]), "BMP"), 0, _BYTES[..., :3]),
]


@pytest.mark.parametrize(
    ("encoded", "white_level", "expected"),
    [row[1:] for row in _TABLE],
    ids=[f"{i} {row[0]}" for i, row in enumerate(_TABLE)],
)
def test_every_kind_of_file(encoded, white_level, expected, tmp_path):
    """Bytes, a path and a Pillow image all give the expected pixels or the expected error."""
    path = tmp_path / "image"
    path.write_bytes(encoded)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            decode.decode(encoded, white_level=white_level)
        with pytest.raises(DataError, match=expected):
            preprocess_for_inference(path, Preprocessing(white_level=white_level))
        return
    pixels = decode.decode(encoded, white_level=white_level)
    if expected is not None:
        np.testing.assert_array_equal(pixels, _rgb(np.asarray(expected)))
    same = Preprocessing(image_size=pixels.shape[:2], white_level=white_level)
    with Image.open(path) as image:
        for form in (path, encoded, image):
            np.testing.assert_array_equal(preprocess_for_inference(form, same), pixels)
    *_, again = decode.decode_with_header(encoded, white_level=white_level)
    np.testing.assert_array_equal(again, pixels)


def _loses_values(encoded):
    with Image.open(io.BytesIO(encoded)) as image:
        return decode._loses_values(image)


@pytest.mark.parametrize(
    ("encoded", "white_level"),
    [row[1:3] for row in _TABLE if not isinstance(row[3], str) and not _loses_values(row[1])],
)
def test_a_loaded_pillow_image_gives_the_same_pixels(encoded, white_level):
    image = Image.open(io.BytesIO(encoded))
    image.load()
    expected = decode.decode(encoded, white_level=white_level)
    np.testing.assert_array_equal(decode.decode(image, white_level=white_level), expected)


def test_a_loaded_16_bit_colour_image_has_only_the_high_bytes():
    image = Image.open(io.BytesIO(_png(_COLOUR, 2, 16)))
    position = image.fp.tell()
    whole = decode.decode(image)
    # The position in the file is unchanged, so Pillow can still load the image.
    assert image.fp.tell() == position
    image.load()
    assert np.abs(decode.decode(image).astype(int) - whole).max() == 1


@pytest.mark.parametrize("colour", [None, 3])
@pytest.mark.parametrize("orientation", [1, 6])
def test_deep_images_are_turned_by_exif_in_every_form(orientation, colour, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = _COLOUR if colour else _GREY
    ok, encoded = cv2.imencode(".png", stored)
    assert ok
    # The EXIF chunk is inserted directly after the header of the PNG.
    chunk = b"eXIf" + exif.tobytes()
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    encoded = encoded.tobytes()[:33] + chunk + encoded.tobytes()[33:]
    upright = np.rot90(stored, -1) if orientation == 6 else stored
    expected = _rgb(_levels(upright[..., ::-1] if colour else upright, 65535))
    np.testing.assert_array_equal(decode.decode(encoded), expected)
    np.testing.assert_array_equal(decode.decode(Image.open(io.BytesIO(encoded))), expected)


@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "LAB",
        "I;16",
        "I;16B",
        "I;16L",
    ],
)
def test_pillow_images_of_every_mode_are_read(mode):
    pixels = decode.decode(Image.new(mode, (3, 2)))
    assert pixels.shape == (2, 3, 3)
    black = Image.new("RGB", (3, 2)).convert("YCbCr") if mode == "YCbCr" else None
    if black:
        assert decode.decode(black).max() <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pillow_images_of_32_bits_need_a_white_level(mode):
    image = Image.new(mode, (3, 2), 7)
    with pytest.raises(decode.UnknownWhiteError, match="from 7 to 7, none of"):
        decode.decode(image)
    assert decode.decode(image, white_level=7).min() == 255


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (np.ones((2, 3), np.float32), "has float values from 1 to 1, none .*white_level=1, or"),
        (np.full((2, 3), 4095, np.uint16), "16-bit values from 4095 .*white_level=4095, or"),
        (np.full((2, 3, 3), 255, np.uint16), "white_level=255, or .*; or pass uint8"),
        (np.full((2, 3, 3), 65535, np.uint16), "white_level=65535, or"),
        (np.full((2, 3), 9, np.int8), "8-bit signed values from 9 to 9, none"),
        (np.full((2, 3), 200, np.int64), "64-bit signed values .*white_level=255, or"),
        (np.full((2, 3, 3), -1, np.int64), "64-bit signed values from -1 to -1: shift"),
        (np.zeros((2, 3, 4), np.uint16), r"width, 3\], got \[2, 3, 4\] of uint16"),
        (np.zeros((0, 3), np.uint16), r"got \[0, 3\]"),
        (np.zeros((2, 3), complex), "must be uint8, got complex128"),
        (np.full((2, 3), np.nan), "not finite"),
    ],
)
def test_arrays_whose_meaning_is_unknown_are_refused(array, error):
    with pytest.raises(DataError, match=error):
        decode.decode(array)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.uint32, np.int64, np.float32])
def test_arrays_are_read_by_the_white_level(dtype):
    array = np.array([[0, 2, 4095]], dtype)
    expected = _rgb(_levels(array, 4095))
    np.testing.assert_array_equal(decode.decode(array, white_level=4095), expected)


def test_arrays_of_booleans_are_black_and_white():
    np.testing.assert_array_equal(decode.decode(np.eye(3) > 0)[..., 0], 255 * np.eye(3))


_SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
_FORMATS_OF = {
    np.uint8: ("PNG", "TIFF", "BMP", "WEBP"),
    np.uint16: ("PNG", "TIFF"),
    np.int32: ("TIFF",),
    np.float32: ("TIFF",),
}


@st.composite
def _pictures(draw):
    """Draws an array, a white level for the array's dtype, and a file format for the dtype."""
    dtype = draw(st.sampled_from(list(_FORMATS_OF)))
    shape = draw(_SHAPES)
    if dtype == np.uint8 and draw(st.booleans()):
        shape = (*shape, 3)
    if dtype == np.float32:
        elements = st.floats(0, 2.0**20, width=32)
    else:
        elements = st.integers(0, np.iinfo(dtype).max)
    array = draw(hnp.arrays(dtype, shape, elements=elements))
    white = draw(st.floats(2.0**-10, 2.0**31) | st.sampled_from([1.0, 255.0, 4095.0, 65535.0]))
    if dtype in (np.uint8, np.uint16) and draw(st.booleans()):
        white = 0.0
    return array, white, draw(st.sampled_from(_FORMATS_OF[dtype]))


@settings(deadline=None, max_examples=150)
@given(_pictures(), st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_the_same_picture_has_the_same_pixels_whatever_it_comes_as(picture, size):
    array, white, file_format = picture
    image = Image.fromarray(array)
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    encoded = _encode(image, file_format, **options)
    preprocessing = Preprocessing(image_size=size, white_level=white)
    top = 255 if array.dtype == np.uint8 else white or 65535
    exact = _levels(array, top)
    expected = resize(_rgb(exact), preprocessing)
    opened = Image.open(io.BytesIO(encoded))
    for form in (encoded, opened, image):
        np.testing.assert_array_equal(preprocess_for_inference(form, preprocessing), expected)
    if array.dtype != np.uint8 and not white:
        with pytest.raises(DataError, match="none of which is known to be white"):
            preprocess_for_inference(array, preprocessing)
    else:
        np.testing.assert_array_equal(preprocess_for_inference(array, preprocessing), expected)


@settings(deadline=None, max_examples=60)
@given(
    _SHAPES,
    st.sampled_from(["L", "RGB", "CMYK"]),
    st.integers(1, 8),
    st.booleans(),
    st.integers(30, 100),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
def test_a_jpeg_has_the_same_pixels_whatever_it_comes_as(
    shape, mode, orientation, progressive, quality, size
):
    height, width = 8 * shape[0] - 3, 8 * shape[1] - 5
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x), np.cos(y / 2), np.sin(x + y)], -1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.rint(127.5 + 127.5 * waves).astype(np.uint8)).convert(mode)
    encoded = _encode(stored, "JPEG", exif=exif, progressive=progressive, quality=quality)
    preprocessing = Preprocessing(image_size=size)
    expected = preprocess_for_inference(encoded, preprocessing)
    opened = Image.open(io.BytesIO(encoded))
    pixels = decode.decode(encoded)
    for form in (opened, Image.fromarray(pixels), pixels):
        np.testing.assert_array_equal(preprocess_for_inference(form, preprocessing), expected)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 16), st.sampled_from([np.uint16, np.int32, np.float32]))
def test_a_ramp_keeps_as_many_levels_as_fit(bits, dtype):
    high = 2**bits - 1
    ramp = np.arange(high + 1)[None].astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoded = _encode(Image.fromarray(ramp), "TIFF")
    pixels = decode.decode(encoded, white_level=high)[0, :, 0].astype(int)
    assert (np.diff(pixels) >= 0).all()
    assert len(set(pixels)) == min(high + 1, 256)
    assert (pixels[0], pixels[-1]) == (0, 255)


@pytest.mark.parametrize(
    ("high", "white"),
    [
        (0, 1),
        (0.3, 1),
        (1, 1),
        (1.004, 1),
        (1.02, 1),
        (1.05, 1),
        (1.1, 1),
        (2, 3),
        (15, 15),
        (63, 63),
        (100, 255),
        (130, 255),
        (200, 255),
        (255.5, 255),
        (256, 255),
        (257, 255),
        (280, 255),
        (281, 1023),
        (1100, 1023),
        (2100, 4095),
        (3071, 4095),
        (4095, 4095),
        (4200, 4095),
        (16383.0, 16383),
        (17000, 16383),
        (20000, 65535),
        (65535, 65535),
        (70000, 65535),
        (80000, 131071),
        (2**31 - 1, 2**31 - 1),
    ],
)
def test_the_likely_white_level(high, white):
    assert decode.likely_white(high) == white


@pytest.mark.parametrize(
    ("kind", "high", "own_white", "white_level", "doubt"),
    [
        (
            "16-bit",
            4095,
            65535,
            0,
            "from 0 to 4095, and 65535 is white, so it is almost black",
        ),
        ("16-bit", 16383, 65535, 0, "almost black"),
        ("16-bit", 16384, 65535, 0, ""),
        ("16-bit", 4095, 65535, 4095, ""),
        ("16-bit", 0, 65535, 0, ""),
        ("12-bit", 4095, 4095, 0, ""),
        ("float", 255, 0, 1, "from 0 to 255, and 1 is white, so larger values become white"),
        ("float", 1.1, 0, 1, ""),
        ("float", 1.11, 0, 1, "become white"),
        ("float", 0.2, 0, 1, "almost black"),
        ("8-bit", 3, 255, 4095, ""),
    ],
)
def test_values_that_hardly_suit_a_white_level(kind, high, own_white, white_level, doubt):
    found = decode.Values(kind, 0, high, own_white).doubt(white_level)
    assert (doubt in found) if doubt else (found == "")


@pytest.mark.parametrize(
    ("beginning", "name"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypmif1", "HEIC or AVIF"),
        (_encode(Image.fromarray(_BYTES), "AVIF"), "AVIF"),
        (b"\xff\x0a", "JPEG XL"),
        (_encode(Image.fromarray(_BYTES), "JPEG2000"), "JPEG 2000"),
        (b"8BPS", "a Photoshop file"),
        (bytes(128) + b"DICM", "DICOM"),
        (b"<?xml version='1.0'?>\n<svg>", "SVG"),
        (b"%PDF-1.7", "PDF"),
    ],
)
def test_files_of_other_formats_are_called_by_their_name(beginning, name):
    with pytest.raises(decode.UnknownFormatError, match=f"is {name}, which is not read") as error:
        decode.decode(beginning + bytes(50))
    assert error.value.format == name


def test_files_that_should_be_readable_are_called_damaged():
    with pytest.raises(decode.UnknownFormatError, match="is a damaged PNG") as error:
        decode.decode(_png(_GREY, 0, 16)[:20] + bytes(99))
    assert error.value.format == ""
    big_tiff = _encode(Image.fromarray(_GREY), "TIFF", big_tiff=True)
    assert decode.looks_like_an_image(big_tiff[:16])
    np.testing.assert_array_equal(decode.decode(big_tiff), _rgb(_levels(_GREY, 65535)))
