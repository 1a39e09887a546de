"""Reads the number of pixels of an image file from its first bytes, in bounded time.

The server needs the number before it admits a request to the decoder threads. Pillow cannot be
used here: its time to open a hostile file is not bounded, and this code runs on the event loop.
"""

import re
import struct

# Maximum number of segments of a JPEG, or of tags of a TIFF, that are searched for the size.
_MAX_STEPS = 300
# A comment ends with the line. The size follows after spaces and comments.
_SPACE = rb"(?:\s|#[^\n]*\n)+"
_PPM = re.compile(rb"P[1-6]" + _SPACE + rb"(\d{1,9})" + _SPACE + rb"(\d{1,9})")
_PPM_BYTES = 4_096
# The markers of a JPEG that start a frame header (ITU T.81, table B.1).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_SHORT = 256, 257, 3


def count_pixels(encoded: bytes) -> int | None:
    """Returns the width times the height of an image file, according to its first bytes.

    A hostile file may have another size in a later part. Decode the file with the returned number
    as the limit.

    Returns:
      The number of pixels; 0 for a format that the server does not read; None if the size was not
      found in bounded time.
    """
    try:
        if encoded.startswith(b"\xff\xd8\xff"):
            return _jpeg(encoded)
        if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
            return _product(">II", encoded, 16)
        if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
            return _webp(encoded)
        if encoded.startswith(b"GIF8"):
            return _product("<HH", encoded, 6)
        if encoded.startswith(b"BM"):
            is_old = encoded[14:18] == b"\x0c\0\0\0"
            return _product("<HH" if is_old else "<ii", encoded, 18)
        if encoded.startswith((b"II", b"MM")):
            return _tiff(encoded)
    except struct.error:  # The file is too short, so decoding will fail.
        return 0
    if encoded.startswith(b"P"):
        found = _PPM.match(encoded[:_PPM_BYTES])
        return int(found[1]) * int(found[2]) if found else None
    return 0


def _product(layout: str, encoded: bytes, offset: int) -> int:
    width, height = struct.unpack_from(layout, encoded, offset)
    return abs(width * height)


def _jpeg(encoded: bytes) -> int | None:
    position = 2
    for _ in range(_MAX_STEPS):
        start, marker, length = struct.unpack_from(">BBH", encoded, position)
        if start != 0xFF:
            return None
        if marker == 0xFF:  # A fill byte.
            position += 1
        elif marker in _FRAMES:
            return _product(">HH", encoded, position + 5)
        else:
            position += 2 + length
    return None


def _webp(encoded: bytes) -> int | None:
    kind = encoded[12:16]
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", encoded, 24)
        return (low_width + (high_width << 16) + 1) * (low_height + (high_height << 16) + 1)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", encoded, 21)
        return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", encoded, 26)
        return (width & 0x3FFF) * (height & 0x3FFF)
    return None


def _tiff(encoded: bytes) -> int | None:
    order = "<" if encoded.startswith(b"II") else ">"
    version, position = struct.unpack_from(f"{order}HI", encoded, 2)
    if version != 42:
        return None  # BigTIFF has another layout.
    (count,) = struct.unpack_from(f"{order}H", encoded, position)
    sizes = {}
    for entry in range(min(count, _MAX_STEPS)):
        offset = position + 2 + 12 * entry
        tag, kind = struct.unpack_from(f"{order}HH", encoded, offset)
        if tag in (_TIFF_WIDTH, _TIFF_HEIGHT):
            value = "H" if kind == _TIFF_SHORT else "I"
            (sizes[tag],) = struct.unpack_from(f"{order}{value}", encoded, offset + 8)
    return sizes[_TIFF_WIDTH] * sizes[_TIFF_HEIGHT] if len(sizes) == 2 else None
