"""Tests that the size of an image is read from its first bytes, in bounded time."""

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image

from cnn_jax.serve.image_size import count_pixels

_ROUGH = np.random.default_rng(0).integers(0, 256, (37, 91, 3), np.uint8)


def encode(kind, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(_ROUGH).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "encoded",
    [
        encode("PNG"),
        encode("JPEG"),
        encode("JPEG", progressive=True),
        encode("JPEG", icc_profile=b"a" * 200_000, exif=b"Exif\0\0" + b"b" * 60_000),
        encode("JPEG", "CMYK"),
        encode("WEBP"),
        encode("WEBP", lossless=True),
        encode("WEBP", "RGBA"),
        encode("WEBP", icc_profile=b"a" * 10),
        encode("BMP"),
        encode("GIF", "P"),
        encode("TIFF"),
        encode("TIFF", compression="tiff_lzw"),
        encode("PPM"),
        encode("PPM", "L"),
        b"P3 # a comment\n#another\n 91\n#\n37 255\n" + b"1 " * 3 * 91 * 37,
        b"BM\0\0\0\0\0\0\0\0\0\0\0\0\x0c\0\0\0" + struct.pack("<HHHH", 91, 37, 1, 24),
    ],
)
def test_the_size_is_that_of_pillow(encoded):
    assert count_pixels(encoded) == 37 * 91


def test_a_big_endian_tiff():
    tags = struct.pack(">HHIHH", 256, 3, 1, 91, 0) + struct.pack(">HHII", 257, 4, 1, 37)
    assert count_pixels(b"MM\0*\0\0\0\x08" + struct.pack(">H", 2) + tags) == 37 * 91


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (b"", 0),
        (b"text", 0),
        (b"\x89PNG\r\n\x1a\n\0\0", 0),
        (b"\xff\xd8\xff\xe0", 0),
        (b"GIF89a", 0),
        (b"\xff\xd8\xff\xe0\0\2" + b"x" * 100, None),
        (b"II+\0" + b"\0" * 100, None),
        (b"P6 # a comment without an end" + b" x" * 5_000, None),
        (b"RIFF\0\0\0\0WEBPVP9 " + b"\0" * 20, None),
    ],
)
def test_a_damaged_header_has_no_size(encoded, expected):
    assert count_pixels(encoded) == expected


def test_a_hostile_header_takes_no_time():
    start = time.perf_counter()
    for encoded in (
        b"\xff\xd8\xff" + b"\xff" * 5_000_000,
        b"\xff\xd8" + b"\xff\xfe\0\2" * 1_000_000,
        b"P6" + b" #\n" * 1_000_000,
        b"II*\0\x08\0\0\0\xff\xff" + b"\0" * 1_000_000,
    ):
        assert count_pixels(encoded) is None
    assert time.perf_counter() - start < 0.1
