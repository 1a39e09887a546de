import contextlib
import io
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image, ImageOps

from cnn_jax.data import decode
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.resize import resize
from cnn_jax.system.errors import DataError


def _encode(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _smooth(height=24, width=32):
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 8, x * 6, 255 - x * 6], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_come_back_exactly(file_format):
    pixels = _smooth()
    encoded = _encode(Image.fromarray(pixels), file_format)
    np.testing.assert_array_equal(decode.decode(encoded), pixels)


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("JPEG", {"quality": 95}), ("JPEG", {"progressive": True, "quality": 95}), ("WEBP", {})],
)
def test_lossy_formats_come_back_nearly(file_format, options):
    pixels = _smooth()
    decoded = decode.decode(_encode(Image.fromarray(pixels), file_format, **options))
    assert np.abs(decoded.astype(int) - pixels).mean() < 6


def test_grey_palette_and_cmyk_become_rgb():
    grey = _smooth()[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(decode.decode(_encode(Image.fromarray(grey))), expected)
    palette = Image.fromarray(expected).quantize(256)
    np.testing.assert_array_equal(
        decode.decode(_encode(palette)), np.asarray(palette.convert("RGB"))
    )
    cmyk = Image.fromarray(_smooth()).convert("CMYK")
    decoded = decode.decode(_encode(cmyk, "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - _smooth()).mean() < 6


def test_sixteen_bits_are_scaled_not_clipped():
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    decoded = decode.decode(_encode(Image.fromarray(levels)))
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 1, 128, 255])


def test_transparency_lies_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = [0, 255, 128]
    decoded = decode.decode(_encode(Image.fromarray(rgba)))
    np.testing.assert_allclose(decoded[0, :, 0], [255, 0, 127], atol=1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "CMYK", "I;16", "1"])
def test_strips_give_the_same_pixels_as_the_whole(mode, monkeypatch):
    rgba = np.random.default_rng(0).integers(0, 256, (23, 17, 4), np.uint8)
    image = Image.fromarray(rgba)
    options = {}
    if mode == "I;16":
        image = Image.fromarray(rgba.view(np.uint16)[..., 0].copy())
    elif mode == "P":
        image, options = image.convert("RGB").quantize(64), {"transparency": 5}
    else:
        image = image.convert(mode)
    encoded = _encode(image, "TIFF" if mode in ("CMYK", "PA") else "PNG", **options)
    whole = decode.decode(encoded)
    # With this limit, the decoder converts the image in strips of three rows.
    monkeypatch.setattr(decode, "_STRIP", 60)
    np.testing.assert_array_equal(decode.decode(encoded), whole)


_PEAK = """
import pathlib, sys
from cnn_jax.data.decode import load
from cnn_jax.data.preprocessing import Preprocessing

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

encoded = pathlib.Path(sys.argv[1]).read_bytes()
before = peak()
load(encoded, Preprocessing((8, 8)))
print(peak() - before)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_large_transparent_image_takes_little_more_than_its_pixels(tmp_path):
    path = tmp_path / "large.png"
    Image.new("RGBA", (4000, 4000), (10, 20, 30, 128)).save(path, compress_level=1)
    command = [sys.executable, "-c", _PEAK, str(path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    # Pillow's RGBA image takes 64 MB, and the RGB array takes 48 MB. Pillow also copies the array
    # before the resize.
    assert float(result.stdout) < 150


@pytest.mark.parametrize("strip", [decode._STRIP, 70])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, file_format, strip, monkeypatch):
    monkeypatch.setattr(decode, "_STRIP", strip)
    upright = _smooth()
    # Each function converts the upright picture to the picture that is stored in the file.
    transforms = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(transforms[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = _encode(stored, file_format, exif=exif)
    np.testing.assert_array_equal(decode.decode(encoded), upright)
    header, _, _ = decode.decode_with_header(encoded)
    assert (header.orientation, header.width, header.height) == (orientation, 32, 24)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"garbage", bytes(40), b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01"])
def test_a_damaged_exif_block_does_not_spoil_the_image(file_format, exif):
    encoded = _encode(Image.fromarray(_smooth()), file_format, exif=exif)
    plain = _encode(Image.fromarray(_smooth()), file_format)
    np.testing.assert_array_equal(decode.decode(encoded), decode.decode(plain))
    header, _, _ = decode.decode_with_header(encoded)
    assert header.orientation == 1


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    encoded = _encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode.decode(encoded)[0, 0], [255, 0, 0])


_PNG = _encode(Image.fromarray(_smooth()))


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "is empty"),
        (b"not an image at all", "is not an image"),
        (_PNG[: len(_PNG) // 2], "cannot be decoded"),
        (_encode(Image.fromarray(_smooth()), "JPEG")[:300], "cannot be decoded"),
    ],
)
def test_what_is_no_image_is_one_clear_error(encoded, reason):
    with pytest.raises(DataError, match=reason):
        decode.decode(encoded)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    encoded = _encode(Image.new("L", (3000, 3000)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match="3000 x 3000 pixels, more than"):
        decode.decode(encoded, max_pixels=8_999_999)


@pytest.mark.parametrize("header", [b"P3 2001 2000 255\n", b"P6 2001 2000 254\n"])
def test_a_ppm_that_takes_long_is_refused(header):
    with pytest.raises(DataError, match="2001 x 2000 pixels, which would take too long"):
        decode.decode(header + b"1 " * 100)
    small = b"P3 2 1 255\n 1 2 3 4 5 6\n"
    np.testing.assert_array_equal(decode.decode(small), [[[1, 2, 3], [4, 5, 6]]])


def _photo(height=150, width=200):
    """Returns a smooth image with some noise, like a photograph."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9) + np.cos(y / 7), np.sin((x + y) / 15), np.cos(x / 40)], -1)
    noise = np.random.default_rng(0).normal(0, 6, waves.shape)
    return Image.fromarray(np.clip(128 + 50 * waves + noise, 0, 255).astype(np.uint8))


_JPEGS = {
    "baseline": (lambda image: image, {}),
    "4:4:4": (lambda image: image, {"subsampling": 0}),
    "progressive": (lambda image: image, {"progressive": True}),
    "grey": (lambda image: image.convert("L"), {}),
    "odd sides": (lambda image: image.crop((0, 0, 133, 77)), {}),
    "rgb": (lambda image: image, {"keep_rgb": True}),
    "restarts": (lambda image: image, {"restart_marker_rows": 1}),
    "cmyk": (lambda image: image.convert("CMYK"), {}),
}


@pytest.mark.parametrize("kind", _JPEGS)
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_are_decoded_bit_for_bit_as_pillow_does(kind, orientation):
    convert, options = _JPEGS[kind]
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = _encode(convert(_photo()), "JPEG", quality=85, exif=exif, **options)
    reference = Image.open(io.BytesIO(encoded))
    expected = np.asarray(ImageOps.exif_transpose(reference).convert("RGB"))
    np.testing.assert_array_equal(decode.decode(encoded), expected)
    header, values, pixels = decode.decode_with_header(encoded)
    assert (header.orientation, header.mode) == (orientation, reference.mode)
    assert (header.height, header.width) == pixels.shape[:2]
    assert values == decode.Values("8-bit", int(expected.min()), int(expected.max()), 255)
    np.testing.assert_array_equal(pixels, expected)
    # The decoder always decodes at full size; the target size only affects the resize.
    small = decode.load(encoded, Preprocessing((18, 25)))
    np.testing.assert_array_equal(small, resize(expected, Preprocessing((18, 25))))


def test_a_jpeg_of_very_many_scans_is_refused():
    encoded = _encode(_photo(), "JPEG", progressive=True)
    assert 5 < encoded.count(b"\xff\xda") < 20
    last = encoded.rindex(b"\xff\xda")
    many = encoded[:last] + 100 * encoded[last:-2] + encoded[-2:]
    with pytest.raises(DataError, match="is a JPEG of more than 100 scans"):
        decode.decode(many)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_every_format_is_known_by_its_beginning(file_format):
    encoded = _encode(_photo(), file_format)
    assert decode.looks_like_an_image(encoded[:16])
    assert decode.decode_with_header(encoded)[0].format == file_format
    assert not decode.looks_like_an_image(b"P7 is no PPM of ours")
    assert not decode.looks_like_an_image(b"")
    assert not decode.looks_like_an_image(b"RIFF....WAVEfmt ")


def test_postscript_is_not_even_tried():
    with pytest.raises(DataError, match="is not an image of a known format"):
        decode.decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_mutated_files_end_in_an_image_or_one_clear_error(file_format):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if file_format in ("JPEG", "PNG", "WEBP") else {}
    original = np.frombuffer(_encode(Image.fromarray(_smooth()), file_format, **options), np.uint8)
    for _ in range(80):
        mutated = original.copy()
        places = rng.integers(0, min(len(mutated), 400), rng.integers(1, 6))
        mutated[places] = rng.integers(0, 256, len(places))
        with contextlib.suppress(DataError):
            pixels = decode.decode(mutated.tobytes(), max_pixels=1_000_000)
            assert pixels.dtype == np.uint8
            assert pixels.shape[-1] == 3
