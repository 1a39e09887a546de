"""Compares `resize` with Pillow; the sizes follow the rules of torchvision and ultralytics."""

import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from cnn_jax.data import resize as resizing
from cnn_jax.data.preprocessing import INTERPOLATIONS, RESIZES, Preprocessing
from cnn_jax.data.resize import PADDING, resize, view

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Image sizes (height, width): ordinary sizes, extreme sizes, sizes equal to a target, a single
# pixel, and sizes that differ from a target by an odd number of pixels.
_SIZES = [
    *((37, 50), (50, 37), (41, 41), (45, 44), (301, 299)),
    *((1, 1000), (1000, 1), (16, 16), (24, 16), (1, 1)),
]
_TARGETS = [(16, 16), (17, 17), (24, 16), (15, 32)]


def _image(size):
    rng = np.random.default_rng(size[0] * 1000 + size[1])
    return rng.integers(0, 256, (*size, 3), np.uint8)


def _torchvision_center_crop(image, side, crop_ratio, interpolation):
    """Applies torchvision's Resize(floor(side / crop_ratio)) and then CenterCrop(side)."""
    short_side = math.floor(side / crop_ratio)
    width, height = image.size
    if width <= height:
        size = short_side, int(short_side * height / width)
    else:
        size = int(short_side * width / height), short_side
    scaled = image.resize(size, _FILTERS[interpolation])
    top = round((scaled.height - side) / 2.0)
    left = round((scaled.width - side) / 2.0)
    return scaled.crop((left, top, left + side, top + side))


def _ultralytics_letterbox(image, target, interpolation):
    """Applies LetterBox of ultralytics 8, but with Pillow's filters instead of OpenCV's."""
    ratio = min(target[0] / image.height, target[1] / image.width)
    size = max(round(image.width * ratio), 1), max(round(image.height * ratio), 1)
    rest_x, rest_y = (target[1] - size[0]) / 2, (target[0] - size[1]) / 2
    left, right = round(rest_x - 0.1), round(rest_x + 0.1)
    top, bottom = round(rest_y - 0.1), round(rest_y + 0.1)
    scaled = image.resize(size, _FILTERS[interpolation])
    return ImageOps.expand(scaled, (left, top, right, bottom), (114, 114, 114))


def test_stretch_averages_and_returns_an_image_of_the_size_unchanged():
    checkerboard = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    checkerboard = np.repeat(checkerboard[..., None], 3, axis=-1)
    small = resize(checkerboard, Preprocessing((8, 16)))
    assert small.shape == (8, 16, 3)
    assert np.abs(small.astype(int) - 127.5).max() < 8
    assert resize(checkerboard, Preprocessing((64, 64))) is checkerboard


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", _SIZES)
def test_stretch_equals_pillows_resize(size, interpolation):
    image = _image(size)
    for height, width in _TARGETS:
        preprocessing = Preprocessing((height, width), interpolation=interpolation)
        expected = Image.fromarray(image).resize((width, height), _FILTERS[interpolation])
        np.testing.assert_array_equal(resize(image, preprocessing), np.asarray(expected))


@pytest.mark.parametrize("crop_ratio", [1.0, 0.875, 0.9, 0.33])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", _SIZES)
def test_crop_equals_torchvisions_resize_and_center_crop(size, interpolation, crop_ratio):
    image = _image(size)
    for side in (15, 16):
        preprocessing = Preprocessing(
            (side, side), resize="crop", crop_ratio=crop_ratio, interpolation=interpolation
        )
        expected = _torchvision_center_crop(Image.fromarray(image), side, crop_ratio, interpolation)
        np.testing.assert_array_equal(resize(image, preprocessing), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "target", "crop_ratio", "scaled", "corner"),
    [
        # The width determines the scale, and half of the surplus height, 2.5 pixels, rounds to 2.
        ((30, 40), (10, 20), 1.0, (15, 20), (2, 0)),
        # The height determines the scale.
        ((30, 40), (20, 10), 1.0, (20, 26), (0, 8)),
        # Half of the surplus height, 3.5 pixels, rounds to 4.
        ((35, 40), (10, 20), 1.0, (17, 20), (4, 0)),
        ((30, 40), (10, 20), 0.5, (30, 40), (10, 10)),
        ((10, 20), (10, 20), 1.0, (10, 20), (0, 0)),
    ],
)
def test_crop_covers_a_target_that_is_no_square(size, target, crop_ratio, scaled, corner):
    image = _image(size)
    preprocessing = Preprocessing(target, resize="crop", crop_ratio=crop_ratio)
    top, left = corner
    whole = np.asarray(Image.fromarray(image).resize(scaled[::-1], _FILTERS["bilinear"]))
    expected = whole[top : top + target[0], left : left + target[1]]
    np.testing.assert_array_equal(resize(image, preprocessing), expected)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", _SIZES)
def test_pad_equals_ultralytics_letterbox(size, interpolation):
    image = _image(size)
    for target in _TARGETS:
        preprocessing = Preprocessing(target, resize="pad", interpolation=interpolation)
        expected = _ultralytics_letterbox(Image.fromarray(image), target, interpolation)
        np.testing.assert_array_equal(resize(image, preprocessing), np.asarray(expected))


def test_pad_puts_an_extra_row_at_the_bottom():
    image = np.full((5, 8, 3), 7, np.uint8)
    padded = resize(image, Preprocessing((8, 8), resize="pad"))
    assert (padded[[0, 6, 7]] == PADDING).all()
    np.testing.assert_array_equal(padded[1:6], image)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (50, 37), (301, 299), (4, 900)])
def test_a_large_crop_is_scaled_in_part_with_the_same_pixels(size, interpolation, monkeypatch):
    image = _image(size)
    for crop_ratio in (1.0, 0.3):
        preprocessing = Preprocessing(
            (16, 20), resize="crop", crop_ratio=crop_ratio, interpolation=interpolation
        )
        whole = resize(image, preprocessing)
        with monkeypatch.context() as patch:
            patch.setattr(resizing, "_MAX_SCALED_PIXELS", 0)
            part = resize(image, preprocessing)
        assert part.shape == (16, 20, 3)
        assert np.abs(part.astype(int) - whole).max() <= 1


def test_a_very_long_image_needs_little_memory():
    image = np.zeros((1, 20_000_001, 3), np.uint8)
    image[:, 9_999_999:10_000_002] = (10, 20, 30)
    cropped = resize(image, Preprocessing((224, 224), resize="crop"))
    assert cropped.shape == (224, 224, 3)
    assert (cropped[:, 112] == (10, 20, 30)).all()
    assert resize(image, Preprocessing((224, 224), resize="pad")).shape == (224, 224, 3)


@pytest.mark.parametrize("mode", RESIZES)
def test_every_size_becomes_the_target(mode):
    rng = np.random.default_rng(0)
    for _ in range(200):
        size, target = rng.integers(1, 60, (2, 2)).tolist()
        preprocessing = Preprocessing(
            tuple(target), resize=mode, crop_ratio=float(rng.uniform(0.1, 1))
        )
        assert resize(_image(size), preprocessing).shape == (*target, 3)


@pytest.mark.parametrize(
    ("mode", "image_box", "input_box"),
    [
        ("stretch", (0, 0, 40, 20), (0, 0, 10, 10)),
        ("crop", (10, 0, 30, 20), (0, 0, 10, 10)),
        ("pad", (0, 0, 40, 20), (0, 2, 10, 7)),
    ],
)
def test_the_view_is_the_part_that_the_network_sees(mode, image_box, input_box):
    seen = view((20, 40), Preprocessing((10, 10), resize=mode))
    assert seen.image_box == image_box
    assert seen.input_box == input_box
