"""Tests on a folder with every kind of problematic file that users' folders contain."""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from cnn_jax.data import decode
from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.files import open_folder
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.splits import Division
from cnn_jax.system.errors import DataError
from cnn_jax.training.loop import train_and_evaluate
from experiments.checks import fuzz_decode
from experiments.checks.fuzz_decode import encode, png_chunk

SMALL = Preprocessing(image_size=(16, 16))
SECRET = b"the content of a file that is none of the folder's"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file that a user's folder may contain, and the result that the tests expect.

    Attributes:
      path: The path below the folder.
      make: The content, or a function that creates the file at a given path.
      expected: "image", "unreadable: " with the beginning of the reason, or "ignored: "
        with the category under which the file is counted.
    """

    path: str
    make: bytes | Callable[[pathlib.Path], object]
    expected: str

    def write(self, root: pathlib.Path) -> None:
        path = root / self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(self.make, bytes):
            path.write_bytes(self.make)
        else:
            self.make(path)


def _picture(seed=0, mode="RGB", height=20, width=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _jpeg(**options):
    return encode(_picture(), "JPEG", **options)


def _png(seed=0):
    return encode(_picture(seed), "PNG")


def _cut_jpeg(marker, extra=0):
    """Returns a JPEG truncated `extra` bytes after the first segment with the given marker."""
    encoded = b""
    for part in fuzz_decode.jpeg_parts(_jpeg()):
        if part[1] == marker:
            length = int.from_bytes(part[2:4], "big") + 2
            return encoded + part[: length + extra]
        encoded += part
    raise ValueError(marker)


def _before(marker, inserted):
    """Returns a JPEG with bytes inserted before the first segment with the given marker."""
    return _jpeg().replace(bytes([0xFF, marker]), inserted + bytes([0xFF, marker]), 1)


def _cut_png(kind, extra):
    """Returns a PNG truncated `extra` bytes after the start of its first `kind` chunk."""
    at = _png().index(kind) - 4
    return _png()[: at + extra]


def _bad_checksum(kind):
    encoded = bytearray(_png())
    at = encoded.index(kind)
    length = int.from_bytes(encoded[at - 4 : at], "big")
    encoded[at + 4 + length] ^= 1
    return bytes(encoded)


def _with_chunk(kind, data):
    """Returns a PNG with an additional chunk before the pixel data (IDAT chunk)."""
    encoded = _png()
    at = encoded.index(b"IDAT") - 4
    return encoded[:at] + png_chunk(kind, data) + encoded[at:]


@functools.cache
def _zeros(megabytes):
    """Returns many megabytes of zeros, compressed by zlib to about a thousandth of the size."""
    squeeze = zlib.compressobj(1)
    zeros = bytes(2**20)
    return b"".join([*(squeeze.compress(zeros) for _ in range(megabytes)), squeeze.flush()])


def _png_bomb(path):
    """Writes a complete PNG of 48,000 x 48,000 one-bit pixels in a file of about a megabyte."""
    header = struct.pack(">IIBBBBB", 48_000, 48_000, 1, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", _zeros(300)), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))


def _tiff(width, height, compression=1, tile=None):
    """Returns a TIFF that declares one byte per pixel, but has only eight bytes of pixels."""
    tags = [(256, width), (257, height), (258, 8), (259, compression), (262, 1), (277, 1)]
    if tile:
        tags += [(322, tile), (323, tile), (324, 8), (325, 8)]
    else:
        tags += [(273, 8), (278, height), (279, 8)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags)]
    count = struct.pack("<H", len(entries))
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + count + b"".join(entries) + bytes(4)


def _gif(screen, frame):
    """Returns a GIF with few bytes of pixels; `screen` and `frame` are (width, height)."""
    sizes = [struct.pack("<HH", *size) for size in (screen, frame)]
    return b"GIF89a%b\x80\0\0%b,\0\0\0\0%b\0\2\2D\1\0;" % (sizes[0], bytes(6), sizes[1])


def _webp_bomb():
    """Returns a truncated lossless WebP, whose header declares 16,383 x 16,383 pixels."""
    bits = (16_382 | 16_382 << 14).to_bytes(4, "little")
    chunk = b"VP8L" + struct.pack("<I", 106) + b"\x2f" + bits + bytes(101)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def _many_scans(count):
    """Returns a progressive JPEG whose first scan is repeated `count` times."""
    parts = fuzz_decode.jpeg_parts(_jpeg(progressive=True))
    at = next(i for i, part in enumerate(parts) if part[1] == 0xDA)
    return b"".join([*parts[:at], parts[at] * count, *parts[at + 1 :]])


def _oriented(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(_picture(orientation), file_format, exif=exif)


def _animation(file_format):
    frames = [_picture(seed) for seed in range(3)]
    return encode(frames[0], file_format, save_all=True, append_images=frames[1:])


def _zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", _png())
    return file.getvalue()


def _link(target):
    return lambda path: path.symlink_to(target)


def _socket(path):
    # The path is relative, because a socket's path may have only about 100 bytes.
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


def _sparse(path):
    with path.open("wb") as file:
        file.write(_jpeg())
        file.truncate(10 * 2**30)


_UNKNOWN = "unreadable: is not an image of a known format"
_DAMAGED = "unreadable: is a damaged {}, or of a kind that is not read"
_BROKEN = "unreadable: cannot be decoded: "
_CUT = _BROKEN + "image file is truncated"
_HUGE = "unreadable: has "
_NO_IMAGE = "ignored: not images"
_HIDDEN = "ignored: hidden"
_SYSTEM = "ignored: thumbnails, bins and the like of other programs"
_SPECIAL = "ignored: neither files nor folders"
_SEEN = "ignored: links to what is there already"
_DANGLING = "ignored: links that lead nowhere"
_OUTSIDE = "ignored: links out of the folder"
_NO_CLASS = "ignored: outside the class folders"

_CUTS = [
    Kind("cut/after SOI.jpg", _jpeg()[:2], _UNKNOWN),
    Kind("cut/within APP0.jpg", _jpeg()[:11], _BROKEN),
    Kind("cut/after DQT.jpg", _cut_jpeg(0xDB), _DAMAGED.format("JPEG")),
    Kind("cut/after SOF.jpg", _cut_jpeg(0xC0), _BROKEN),
    Kind("cut/after DHT.jpg", _cut_jpeg(0xC4), _BROKEN),
    Kind("cut/after SOS.jpg", _cut_jpeg(0xDA), _CUT),
    Kind("cut/within the scan.jpg", _cut_jpeg(0xDA, extra=300), _CUT),
    Kind("cut/before EOI.jpg", _jpeg()[:-2], _CUT),
    Kind("cut/signature.png", _png()[:8], _DAMAGED.format("PNG")),
    Kind("cut/within IHDR.png", _cut_png(b"IHDR", 12), _BROKEN),
    Kind("cut/before IDAT.png", _cut_png(b"IDAT", 0), _DAMAGED.format("PNG")),
    Kind("cut/within IDAT.png", _cut_png(b"IDAT", 300), _CUT),
    Kind("cut/header.gif", encode(_picture(), "GIF")[:10], _DAMAGED.format("GIF")),
    Kind("cut/half.gif", encode(_picture(), "GIF")[:900], _CUT),
    Kind("cut/header.webp", encode(_picture(), "WEBP")[:16], _BROKEN),
    Kind("cut/half.webp", encode(_picture(), "WEBP")[:300], _BROKEN),
    Kind("cut/header.bmp", encode(_picture(), "BMP")[:20], _BROKEN),
    Kind("cut/half.bmp", encode(_picture(), "BMP")[:700], _CUT),
    Kind("cut/header.tif", encode(_picture(), "TIFF")[:8], _DAMAGED.format("TIFF")),
    Kind("cut/half.tif", encode(_picture(), "TIFF")[:700], _BROKEN),
    Kind("cut/half.ppm", encode(_picture(), "PPM")[:700], _CUT),
    Kind("cut/nothing.jpg", b"", "unreadable: is empty"),
    Kind("cut/one byte.jpg", b"\xff", _UNKNOWN),
]
_FALSE = [
    Kind("false/text.jpg", b"this is no picture\n", _UNKNOWN),
    Kind(
        "false/page.png",
        b"<!DOCTYPE html><html><body>404</body></html>",
        "unreadable: is a web page",
    ),
    Kind("false/archive.jpg", _zip(), _UNKNOWN),
    Kind("false/script.jpg", b"#!/bin/sh\ntouch executed\n", _UNKNOWN),
    Kind("false/program.png", b"\x7fELF\x02\x01\x01" + bytes(100), _UNKNOWN),
    Kind(
        "false/drawing.png",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "unreadable: is SVG, which is not read: convert it",
    ),
    Kind("false/zeros.png", bytes(5000), _UNKNOWN),
    Kind(
        "false/postscript.jpg",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n",
        _UNKNOWN,
    ),
    Kind("false/fax.tif", _tiff(20, 20, compression=4), _BROKEN),
    Kind("false/IHDR checksum.png", _bad_checksum(b"IHDR"), _DAMAGED.format("PNG")),
    Kind(
        "false/zero wide.png",
        _png().replace(struct.pack(">I", 24), bytes(4), 1),
        _DAMAGED.format("PNG"),
    ),
    Kind("false/zero wide.bmp", b"BM" + encode(_picture(), "BMP")[2:18] + bytes(40), _BROKEN),
]
_BOMBS = [
    Kind("bombs/bits.png", _png_bomb, _HUGE),
    Kind("bombs/screen.gif", _gif((65535, 65535), (1, 1)), _HUGE),
    Kind("bombs/frame.gif", _gif((1, 1), (65535, 65535)), _HUGE),
    Kind("bombs/largest.webp", _webp_bomb(), _HUGE),
    Kind(
        "bombs/declared.bmp",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 60000, 60000, 1, 24, *[0] * 6),
        _HUGE,
    ),
    Kind("bombs/declared.ppm", b"P6 90000 90000 255\n" + bytes(100), _HUGE),
    Kind("bombs/plain text.ppm", b"P3 9000 9000 255\n" + b"0 " * 100, _HUGE + "9000 x 9000"),
    Kind("bombs/declared.tif", _tiff(65000, 65000), _HUGE),
    Kind("bombs/squeezed.tif", _tiff(9000, 9000, compression=8), _HUGE + "9000 x 9000"),
    Kind("bombs/tile.tif", _tiff(20, 20, compression=8, tile=32_000), _HUGE),
    Kind("bombs/high.tif", _tiff(1, 60_000_000), _HUGE + "1 x 60000000"),
    Kind(
        "bombs/declared.jpg",
        _jpeg().replace(struct.pack(">HH", 20, 24), struct.pack(">HH", 65500, 65500), 1),
        _HUGE,
    ),
    Kind("bombs/scans.jpg", _many_scans(300), "unreadable: is a JPEG of more than 100 scans"),
    Kind("bombs/sparse.jpg", _sparse, "unreadable: has 10,737,418,240 bytes, more than"),
    Kind(
        "bombs/text.png",
        lambda path: path.write_bytes(_with_chunk(b"zTXt", b"k\0\0" + _zeros(300))),
        _BROKEN + "Decompressed data too large",
    ),
    Kind(
        "bombs/profile.png",
        lambda path: path.write_bytes(_with_chunk(b"iCCP", b"k\0\0" + _zeros(300))),
        _BROKEN + "Decompressed data too large",
    ),
]
_ODD = [
    Kind("odd/without IEND.png", _png()[:-12], "image"),
    Kind("odd/IDAT checksum.png", _bad_checksum(b"IDAT"), "image"),
    Kind("odd/extraneous bytes.jpg", _before(0xDB, b"\0\0\0"), "image"),
    Kind("odd/extraneous end.jpg", _jpeg()[:-2] + b"\0\0\0" + _jpeg()[-2:], "image"),
    Kind("odd/scans.jpg", _many_scans(80), "image"),
    Kind("odd/something behind.jpg", _jpeg() + b"PK\3\4 and so on", "image"),
    # Some phones append a video to the image file.
    Kind("odd/a film behind.jpg", _jpeg() + b"\0\xff\xda\0" * 200, "image"),
    Kind("odd/progressive.jpg", _jpeg(progressive=True), "image"),
    Kind("odd/grey.jpg", encode(_picture(mode="L"), "JPEG"), "image"),
    Kind("odd/cmyk.jpg", encode(_picture(mode="CMYK"), "JPEG"), "image"),
    Kind("odd/profile.jpg", _jpeg(icc_profile=bytes(2_000_000)), "image"),
    Kind("odd/comment.jpg", _jpeg(comment=b"\xff\xd8\xff\xda" * 20), "image"),
    Kind("odd/text.png", _with_chunk(b"tEXt", b"k\0" + b"x" * 3_000_000), "image"),
    Kind("odd/16 bits.png", encode(_picture(mode="I;16"), "PNG"), "image"),
    Kind("odd/16 bits.tif", encode(_picture(mode="I;16"), "TIFF"), "image"),
    Kind(
        "odd/32 bits.tif",
        encode(_picture(mode="I"), "TIFF"),
        "unreadable: has 32-bit signed values from 5 to 242, none of which is known to be white",
    ),
    Kind("odd/floats.tif", encode(_picture(mode="F"), "TIFF"), "unreadable: has float values"),
    Kind("odd/palette.png", encode(_picture(mode="P"), "PNG"), "image"),
    Kind("odd/clear palette.png", encode(_picture(mode="P"), "PNG", transparency=0), "image"),
    Kind("odd/alpha.png", encode(_picture(mode="RGBA"), "PNG"), "image"),
    Kind("odd/grey alpha.png", encode(_picture(mode="LA"), "PNG"), "image"),
    Kind("odd/interlaced.png", fuzz_decode.interlaced_png(np.asarray(_picture())), "image"),
    Kind("odd/one bit.png", encode(_picture(mode="1"), "PNG"), "image"),
    Kind("odd/one bit.tif", encode(_picture(mode="1"), "TIFF"), "image"),
    Kind("odd/lab.tif", encode(_picture(mode="LAB"), "TIFF"), "image"),
    Kind("odd/still.gif", encode(_picture(), "GIF"), "image"),
    Kind("odd/moving.gif", _animation("GIF"), "image"),
    Kind("odd/moving.webp", _animation("WEBP"), "image"),
    Kind("odd/pages.tif", _animation("TIFF"), "image"),
    Kind("odd/one pixel.png", encode(_picture(height=1, width=1), "PNG"), "image"),
    Kind("odd/one pixel.jpg", encode(_picture(height=1, width=1), "JPEG"), "image"),
    Kind("odd/high.png", encode(_picture(height=20_000, width=1), "PNG"), "image"),
    Kind("odd/wide.jpg", encode(_picture(height=1, width=20_000), "JPEG"), "image"),
    *(
        Kind(f"odd/orientation {orientation}.jpg", _oriented("JPEG", orientation), "image")
        for orientation in range(10)
    ),
    Kind("odd/orientation 6.png", _oriented("PNG", 6), "image"),
]
_NAMES = [
    Kind("names/a PNG.jpg", _png(1), "image"),
    Kind("names/a JPEG.txt", _jpeg(quality=80), "image"),
    Kind("names/a JPEG", _jpeg(quality=81), "image"),
    Kind("names/UPPER.PNG", _png(2), "image"),
    Kind("names/new\nline.png", _png(3), "image"),
    Kind("names/carriage\rreturn and \x1b[31m.png", _png(4), "image"),
    Kind("names/😀 猫.png", _png(5), "image"),
    Kind("names/שלום.png", _png(6), "image"),
    Kind("names/" + os.fsdecode(b"\xff\xfe caf\xe9.png"), _png(7), "image"),
    Kind("names/" + os.fsdecode(b"broken \xff.png"), b"no picture", _UNKNOWN),
    Kind("names/'single' \"double\", comma; $(touch executed).png", _png(8), "image"),
    Kind("names/-rf.png", _png(9), "image"),
    Kind("names/back\\slash {class} *.png", _png(10), "image"),
    Kind("names/=cmd|' /C calc'!A0.png", _png(11), "image"),
    Kind("names/" + "x" * 251 + ".png", _png(12), "image"),
    Kind("names/ .png", _png(13), "image"),
    Kind("names/deep/er/and/deep er/a.png", _png(14), "image"),
    Kind("names/a folder.jpg/a.png", _png(15), "image"),
    Kind("names/e\u0301.png", _png(16), "image"),
    Kind("names/\u00e9.png", _png(17), "image"),
    # Each folder of the first level is a class, even if its name is unusual.
    Kind("new\nline/a.png", _png(20), "image"),
    Kind("new\nline/b.png", _png(21), "image"),
    Kind(os.fsdecode(b"caf\xe9") + "/a.png", _png(22), "image"),
    Kind(os.fsdecode(b"caf\xe9") + "/b.png", _png(23), "image"),
    Kind("a class.jpg/a.png", _png(24), "image"),
    Kind("-猫 'x'/a.png", _png(25), "image"),
    Kind("with nothing to read/a.png", b"no picture", _UNKNOWN),
]
_NO_FILES = [
    Kind("other/.hidden.png", _png(), _HIDDEN),
    Kind("other/._a.jpg", b"\0\5\x16\7", _HIDDEN),
    Kind("other/.thumbnails/a.png", _png(), _HIDDEN),
    Kind(".git/config", b"[core]", _HIDDEN),
    Kind("other/notes.txt", b"no image", _NO_IMAGE),
    Kind("other/Thumbs.db", b"\xd0\xcf\x11\xe0", _SYSTEM),
    Kind("other/@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", _png(50), _SYSTEM),
    Kind("$RECYCLE.BIN/$R1.png", _png(51), _SYSTEM),
    Kind("other/empty", b"", _NO_IMAGE),
    Kind("other/drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", _NO_IMAGE),
    Kind("other/drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n", _NO_IMAGE),
    Kind("only text/README", b"no class", _NO_IMAGE),
    Kind("README", b"no class", _NO_IMAGE),
    Kind("stray.png", _png(), _NO_CLASS),
    Kind("stray.jpg", b"neither class nor picture", _NO_CLASS),
    Kind("other/nowhere.png", _link("no such file"), _DANGLING),
    Kind("other/itself.png", _link("itself.png"), _DANGLING),
    Kind("other/loop/one", _link("two"), _DANGLING),
    Kind("other/loop/two", _link("one"), _DANGLING),
    Kind("other/up", _link(".."), _SEEN),
    Kind("other/inside", _link("../names/deep"), _SEEN),
    Kind("other/again.png", _link("../names/UPPER.PNG"), _SEEN),
    Kind("other/kept.png", _link("../.store/kept.png"), "image"),
    Kind(".store/kept.png", _png(30), _HIDDEN),
    Kind("other/secret.jpg", _link("../../outside/secret"), _OUTSIDE),
    Kind("other/out.jpg", _link("../../outside/picture.png"), _OUTSIDE),
    Kind("other/outside", _link("../../outside/folder"), _OUTSIDE),
    Kind("other/endless.jpg", _link("/dev/zero"), _OUTSIDE),
    Kind("other/pipe.jpg", os.mkfifo, _SPECIAL),
    Kind("other/socket.jpg", _socket, _SPECIAL),
]
KINDS = [*_CUTS, *_FALSE, *_BOMBS, *_ODD, *_NAMES, *_NO_FILES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a file of each kind; some links point to a folder outside of this folder."""
    root = tmp_path_factory.mktemp("dirty") / "folder"
    for path, content in {
        "secret": SECRET,
        "picture.png": _png(40),
        "folder/a.png": _png(41),
    }.items():
        Kind(f"../outside/{path}", content, "").write(root)
    (root.parent / "outside" / "folder" / "back").symlink_to("../../folder")
    for kind in KINDS:
        kind.write(root)
    return root


def _snapshot(root):
    """Returns the metadata of all files in a folder, and the contents of files under 32 MiB."""
    seen = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = b""
        if stat.S_ISREG(status.st_mode) and status.st_size < 2**25:
            content = path.read_bytes()
        seen[path] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, content)
    return seen


@pytest.fixture(scope="module")
def opened(folder):
    """The listing, the data set, and two snapshots of `folder`: before and after it is opened."""
    before = _snapshot(folder)
    listing = open_folder(folder)
    dataset = open_dataset(listing, Division(), SMALL, max_unreadable=1.0)
    return listing, dataset, before, _snapshot(folder)


def _outcome(dataset, path):
    reasons = {image.id: f"unreadable: {image.reason}" for image in dataset.findings.unreadable}
    return "image" if path in dataset.source.ids else reasons.get(path, "ignored")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: ascii(kind.path))
def test_each_kind_ends_as_stated(opened, kind):
    _, dataset, _, _ = opened
    outcome = _outcome(dataset, kind.path)
    if kind.expected.startswith("unreadable"):
        assert outcome.startswith(kind.expected)
    else:
        assert outcome == kind.expected.partition(":")[0]


def test_all_counts_are_exactly_right(opened):
    listing, dataset, _, _ = opened
    expected = Counter(kind.expected.partition(":")[0] for kind in KINDS)
    assert len(KINDS) == len({kind.path for kind in KINDS}) == sum(expected.values())
    assert len(dataset.source) == expected["image"]
    assert len(dataset.findings.unreadable) == expected["unreadable"]
    assert len(listing) == expected["image"] + expected["unreadable"]
    assert sum(len(indices) for indices in dataset.splits.values()) == expected["image"]
    ignored = Counter(
        kind.expected.removeprefix("ignored: ")
        for kind in KINDS
        if kind.expected.startswith("ignored")
    )
    assert listing.ignored == dataset.source.ignored == ignored
    rotated = [dataset.source.ids[i] for i in dataset.findings.rotated]
    turned = [f"odd/orientation {orientation}.jpg" for orientation in range(2, 9)]
    assert rotated == sorted([*turned, "odd/orientation 6.png"])


def test_classes_are_those_with_something_to_read(opened):
    listing, dataset, _, _ = opened
    expected = {kind.path.split("/")[0] for kind in KINDS if kind.expected == "image"}
    assert dataset.source.class_names == sorted(expected)
    assert set(listing.class_names) - expected == {"bombs", "cut", "false", "with nothing to read"}
    remarks = "\n".join(dataset.source.remarks)
    assert "the folder only text has no images" in remarks
    assert "bombs, cut, false, with nothing to read: no readable images" in remarks
    assert "4 links lead out of the folder: data.allow_outside=True" in remarks


def test_nothing_in_the_folder_is_changed_or_executed(opened):
    _, _, before, after = opened
    assert after == before
    assert not any(path.name == "executed" for path in after)
    assert not pathlib.Path("executed").exists()


def test_too_much_that_cannot_be_read_is_refused(folder, opened):
    listing, dataset, _, _ = opened
    number = len(dataset.findings.unreadable)
    with pytest.raises(DataError) as error:
        open_dataset(listing, Division(), SMALL)
    message = str(error.value)
    assert f"{number} of {len(listing)} images cannot be read" in message
    assert "more than data.max_unreadable = 0.01 allows: bombs/" in message
    share = number / len(listing)
    assert len(open_dataset(listing, Division(), SMALL, max_unreadable=share).source)
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(listing, Division(), SMALL, max_unreadable=share - 1e-3)


def test_links_lead_out_only_if_that_is_allowed(folder, opened):
    listing, _, _, _ = opened
    wider = open_folder(folder, allow_outside=True)
    added = ["other/out.jpg", "other/outside/a.png", "other/secret.jpg"]
    assert sorted(set(wider.ids) - set(listing.ids)) == added
    assert len(wider) == len(listing) + 3
    expected = dict(listing.ignored)
    del expected["links out of the folder"]
    expected["neither files nor folders"] += 1  # The link to /dev/zero is counted here.
    # The link outside/folder/back, which points to the opened folder, is counted here.
    expected["links to what is there already"] += 1
    assert wider.ignored == expected


_CHILD = """
import json, os, pathlib, sys

opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(args[0]))

from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.splits import Division
from cnn_jax.data.files import open_folder
from cnn_jax.data.scan import scan
from cnn_jax.data.preprocessing import Preprocessing

def peak():
    # Not ru_maxrss: that begins with the memory of whoever started this process.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

peaks = []
for folder in sys.argv[1:]:
    listing = open_folder(folder)
    open_dataset(listing, Division(), Preprocessing((16, 16)), max_unreadable=1.0)
    peaks.append(peak())
names = {os.path.realpath(path) for path in opened if isinstance(path, (str, bytes))}
digests = [record.digest for record in scan(listing, Preprocessing((16, 16)))]
print(json.dumps({"peaks": peaks, "opened": sorted(map(ascii, names)), "digests": digests}))
"""


@pytest.fixture(scope="module")
def child(folder, tmp_path_factory):
    """Measurements of a process that opens first a folder of harmless files, and then `folder`.

    The harmless files include no decompression bombs.
    """
    harmless = tmp_path_factory.mktemp("harmless")
    for kind in [*_CUTS, *_FALSE, *_ODD, *_NAMES]:
        kind.write(harmless)
    result = subprocess.run(
        [sys.executable, "-c", _CHILD, harmless, folder],
        cwd=REPOSITORY,
        env={**os.environ, "CNN_JAX_CACHE": str(tmp_path_factory.mktemp("cache"))},
        capture_output=True,
        text=True,
        timeout=120,  # A process that reads a named pipe without a writer would wait forever.
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux")
def test_bombs_take_no_memory(child):
    without, with_bombs = child["peaks"]
    assert with_bombs - without < 200


def test_nothing_outside_the_folder_is_opened(folder, child):
    outside = str(folder.parent / "outside")
    assert any(str(folder) in path for path in child["opened"])
    assert not [path for path in child["opened"] if outside in path or "/dev/zero" in path]
    assert not [path for path in child["opened"] if "pipe.jpg" in path or "sparse.jpg" in path]
    assert hashlib.sha256(SECRET).hexdigest()[:32] not in child["digests"]
    assert hashlib.sha256(_png(20)).hexdigest()[:32] in child["digests"]


def test_a_run_on_it_finishes_and_lists_what_it_left_out(opened, folder, tiny_config, tmp_path):
    tiny_config.data.source = f"folder:{folder}"
    tiny_config.data.max_unreadable = 1.0
    tiny_config.train.epochs = 1
    train_and_evaluate(tiny_config, tmp_path / "run")
    path = tmp_path / "run" / "report" / "unreadable.csv"
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "reason"]
    # Bytes of names that are not valid UTF-8 are written to the file as escape sequences.
    expected = [kind.path for kind in KINDS if kind.expected.startswith("unreadable")]
    assert sorted(example_id for example_id, _ in rows) == sorted(
        path.encode("utf-8", "backslashreplace").decode() for path in expected
    )
    _, dataset, _, _ = opened
    assert [reason for _, reason in rows] == [u.reason for u in dataset.findings.unreadable]


_AS_NOBODY = """
import json, os, sys

from PIL import Image

from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.splits import Division
from cnn_jax.data.files import open_folder
from cnn_jax.data.preprocessing import Preprocessing

Image.init()  # As it cannot be later, if this user may not read the installation.
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
listing = open_folder(sys.argv[1])
dataset = open_dataset(listing, Division(), Preprocessing((16, 16)), max_unreadable=1.0)
unreadable = {image.id: image.reason for image in dataset.findings.unreadable}
print(json.dumps([listing.ignored, unreadable, dataset.source.ids, listing.remarks]))
"""


@pytest.fixture
def open_as_nobody():
    """A folder with unreadable files, and a function that opens the folder as another user.

    The function runs without privileges, because file permissions do not apply to root.
    """
    base = pathlib.Path(tempfile.mkdtemp())
    base.chmod(0o755)
    root = base / "folder"
    for name in ("cat/a.png", "cat/b.png", "cat/secret.png", "cat/secret", "dog/a.png"):
        Kind(name, _png(len(name)), "").write(root)
    (root / "cat" / "secret.png").chmod(0)
    (root / "cat" / "secret").chmod(0)

    def run():
        result = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, root],
            cwd=REPOSITORY,
            env={**os.environ, "CNN_JAX_CACHE": str(base / "cache")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    yield root, run
    for path in root.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(base)


def test_what_may_not_be_read_is_named(open_as_nobody):
    root, run = open_as_nobody
    Kind("locked/a.png", _png(), "").write(root)
    (root / "locked").chmod(0)
    ignored, unreadable, ids, remarks = run()
    # An unreadable file without a suffix is counted as "not images", because nothing suggests that
    # the file is an image.
    assert ignored == {"folders that cannot be read": 1, "not images": 1}
    assert unreadable == {"cat/secret.png": "cannot be read: Permission denied"}
    assert ids == ["cat/a.png", "cat/b.png", "dog/a.png"]
    assert "the folder locked has no images" in remarks[0]


def test_a_folder_whose_names_alone_may_be_read_counts_as_unreadable(open_as_nobody):
    root, run = open_as_nobody
    Kind("listed/a.png", _png(), "").write(root)
    (root / "listed").chmod(0o444)
    ignored, _, ids, _ = run()
    assert ignored["folders that cannot be read"] == 1
    assert ids == ["cat/a.png", "cat/b.png", "dog/a.png"]


def test_a_file_too_deep_for_a_path_counts_as_unreadable(tmp_path):
    Kind("cat/a.png", _png(), "").write(tmp_path)
    # The folders are created with relative paths, because the full paths are longer than the
    # operating system allows.
    with contextlib.chdir(tmp_path / "cat"):
        for _ in range(20):
            pathlib.Path("b.png").write_bytes(_png())
            pathlib.Path("x" * 250).mkdir()
            os.chdir("x" * 250)
    source = open_folder(tmp_path)
    longest = os.pathconf(tmp_path, "PC_PATH_MAX")
    assert 10 < len(source) < 20
    assert all(len(f"{tmp_path}/{path}") < longest for path in source.ids)
    assert source.ignored == {"folders that cannot be read": 1}


def test_no_file_comes_twice_by_links_to_a_hidden_folder(tmp_path):
    Kind("cat/a.png", _png(), "").write(tmp_path)
    Kind(".store/deep/b.png", _png(1), "").write(tmp_path)
    Kind(".store/c.png", _png(2), "").write(tmp_path)
    Kind("cat/1", _link("../.store/deep"), "").write(tmp_path)
    Kind("cat/2.png", _link("../.store/c.png"), "").write(tmp_path)
    Kind("cat/3", _link("../.store"), "").write(tmp_path)
    source = open_folder(tmp_path)
    assert source.ids == ["cat/1/b.png", "cat/2.png", "cat/a.png"]
    assert source.ignored == {"hidden": 1, "links to what is there already": 2}


def test_no_file_comes_twice_by_a_link_to_the_folder_above(tmp_path):
    root = tmp_path / "data"
    Kind("cat/a.png", _png(), "").write(root)
    Kind("cat/above", _link("../.."), "").write(root)
    Kind("dog/b.png", _png(1), "").write(root)
    Kind("../beside/c.png", _png(2), "").write(root)
    source = open_folder(root, allow_outside=True)
    assert source.ids == ["cat/a.png", "cat/above/beside/c.png", "dog/b.png"]
    # Through the link, the scan finds the two images and the link itself a second time.
    assert source.ignored == {"links to what is there already": 3}


def test_what_pillow_itself_refuses_is_as_clear():
    encoded = b"P6 90000 90000 255\n" + bytes(100)
    with pytest.raises(DataError, match="has more pixels than any max_pixels allows"):
        decode.decode(encoded, max_pixels=90_000**2)
