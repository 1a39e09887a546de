"""Compares augmentations with results computed by hand from the definitions of Keras.

Keras maps an output pixel to the input pixel that it shows: a horizontal flip is
x -> (width - 1) - x, a rotation by a positive angle turns the picture
counter-clockwise, a zoom factor above 1 zooms out, "reflect" continues a row
a b c d as (d c b a | a b c d | d c b a), and contrast is
(x - mean) * factor + mean with the mean of each channel of each image.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.config import schema
from cnn_jax.data import augment
from cnn_jax.data.augment import Augmentation


def _matrix(*, flip_x=False, flip_y=False, turns=0.0, window=1.0, size=(8, 8)):
    return augment.affine_matrix(
        np.array([flip_x]),
        np.array([flip_y]),
        np.array([2 * np.pi * turns]),
        np.array([window]),
        size,
    )


def _on_device(images, **changes):
    """Augments images in JAX with the given random parameters; the defaults change nothing."""
    draws = augment.identity_draws(len(images), images.shape[1:3]) | changes
    return np.asarray(augment.apply_on_device(jnp.array(images), **jax.tree.map(jnp.array, draws)))


def _on_host(images, **changes):
    """Augments images in OpenCV with the given random parameters; see `_on_device`."""
    draws = augment.identity_draws(len(images), images.shape[1:3]) | changes
    return augment.apply_on_host(images, **draws).astype(np.float32)


BOTH = pytest.mark.parametrize("apply", [_on_device, _on_host])
RANGES = dataclasses.fields(Augmentation)
# An augmentation with all ranges switched on. Each range is 0.4, or the value in VALUES if 0.4 is
# not valid.
VALUES = {"flip": "horizontal_and_vertical", "trivial_augment": True}
EVERYTHING = Augmentation(**{field.name: VALUES.get(field.name, 0.4) for field in RANGES})


def _image(size=(8, 8), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (1, *size, 3), np.uint8)


@BOTH
@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_flips(apply, size):
    image = _image(size)
    flipped = apply(image, matrix=_matrix(flip_x=True, size=size))
    np.testing.assert_allclose(flipped, image[:, :, ::-1], atol=1e-2)
    flipped = apply(image, matrix=_matrix(flip_y=True, size=size))
    np.testing.assert_allclose(flipped, image[:, ::-1], atol=1e-2)


@BOTH
def test_a_quarter_turn_is_counter_clockwise(apply):
    image = _image()
    turned = apply(image, matrix=_matrix(turns=0.25))
    np.testing.assert_allclose(turned, np.rot90(image, axes=(1, 2)), atol=1e-2)


@BOTH
def test_zooming_out_by_two_shows_every_second_pixel_and_its_reflections(apply):
    # The output pixel x shows the input position 2 x - 3.5, because the centre 3.5 stays in place.
    # So the pixels 0 to 7 show the positions -3.5, -1.5, ..., 10.5, each between two input pixels.
    ramp = np.tile(np.arange(0, 80, 10, dtype=np.uint8)[None, None, :, None], (1, 8, 1, 3))
    zoomed = apply(ramp, matrix=_matrix(window=2.0))
    # Reflection continues the row: the positions -4 to -1 have the values of the pixels 3 to 0, and
    # the positions 8 to 11 have the values of the pixels 7 to 4.
    expected = [25, 5, 5, 25, 45, 65, 65, 45]
    np.testing.assert_allclose(zoomed[0, 0, :, 0], expected, atol=0.5)


@BOTH
def test_zooming_in_by_two_shows_the_middle(apply):
    ramp = np.tile(np.arange(0, 80, 10, dtype=np.uint8)[None, None, :, None], (1, 8, 1, 3))
    zoomed = apply(ramp, matrix=_matrix(window=0.5))
    # The output pixel x shows the input position 0.5 x + 1.75, because the centre stays in place.
    np.testing.assert_allclose(zoomed[0, 0, :, 0], 17.5 + 5 * np.arange(8), atol=0.51)


@BOTH
def test_contrast_moves_levels_away_from_each_channels_mean(apply):
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, ..., 0] = [[100, 120], [140, 160]]  # The mean of this channel is 130.
    image[0, ..., 1] = 50  # Contrast does not change a uniform channel.
    # The mean of the last channel is 127.5, and its results are clipped to 0 and 255.
    image[0, ..., 2] = [[0, 255], [0, 255]]
    out = apply(image, contrast=np.array([1.5], np.float32))
    np.testing.assert_allclose(out[0, ..., 0], [[85, 115], [145, 175]], atol=0.51)
    np.testing.assert_allclose(out[0, ..., 1], 50, atol=0.51)
    np.testing.assert_allclose(out[0, ..., 2], [[0, 255], [0, 255]], atol=0.51)


def test_the_three_geometric_ones_compose_in_the_order_flip_rotation_zoom():
    """The matrix of a combined transform is the product of flip, rotation and zoom matrices."""
    flip, turn, zoom = (
        np.vstack([_matrix(**kind)[0], [0, 0, 1]])
        for kind in ({"flip_x": True}, {"turns": 0.1}, {"window": 1.3})
    )
    combined = _matrix(flip_x=True, turns=0.1, window=1.3)[0]
    # Keras flips first. The matrices map output positions to input positions, so the matrix of the
    # first transform is the leftmost factor.
    np.testing.assert_allclose(combined, (flip @ turn @ zoom)[:2], atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([(32, 32), (24, 40)]),
    smooth=st.booleans(),
)
def test_host_and_device_move_the_same_pixels(seed, size, smooth):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (4, *size, 3), np.uint8)
    if smooth:
        images = (images // 8 + np.arange(size[1], dtype=np.uint8)[:, None] * 4).astype(np.uint8)
    # TrivialAugment can turn small differences into large ones.
    draws = augment.draw(rng, dataclasses.replace(EVERYTHING, trivial_augment=False), 4, size)
    host, device = _on_host(images, **draws), _on_device(images, **draws)
    assert np.abs(host - device).mean(axis=(1, 2, 3)).max() < 2


@BOTH
def test_a_crop_shows_its_part_of_the_image(apply):
    """A crop of the right half, at the bottom half of the height, is scaled by two."""
    image = np.repeat(np.arange(0, 128, 2, dtype=np.uint8).reshape(1, 8, 8, 1), 3, axis=-1)
    crop = augment.Affine(np.eye(2)[None] / 2, np.array([[2.0, 2.0]]))
    matrix = augment.affine_matrix(
        *np.array([[False], [False], [0.0], [1.0]]), image_size=(8, 8), first=crop
    )
    # The output pixel i shows the position 3.75 + i / 2 of each axis, at which the level is
    # 2 x + 16 y. Positions behind the last pixel show the last pixel.
    position = np.minimum(3.75 + np.arange(8) / 2, 7)
    expected = 2 * position[None, :] + 16 * position[:, None]
    np.testing.assert_allclose(apply(image, matrix=matrix)[0, ..., 0], expected, atol=0.51)


def test_crops_have_the_published_areas_and_ratios():
    size = (20, 30)
    augmentation = Augmentation(crop_area=0.25)
    matrix = augment.draw(np.random.default_rng(0), augmentation, 4000, size)["matrix"]
    width, height = 30 * matrix[:, 0, 0], 20 * matrix[:, 1, 1]
    np.testing.assert_array_equal(matrix[:, [0, 1], [1, 0]], 0)
    # The left edge of the output is at x = -0.5, half a pixel before the centre of the first pixel.
    left, top = (matrix[:, i, 2] - 0.5 * matrix[:, i, i] + 0.5 for i in (0, 1))
    for start, side, whole in ((left, width, 30), (top, height, 20)):
        assert start.min() > -1e-4
        assert (start + side).max() < whole + 1e-4
        assert start.min() < 0.1
        assert (start + side).max() > whole - 0.1
    ratio, area = width / height, width * height / 600
    is_whole = area > 1 - 1e-5
    assert is_whole.mean() < 0.01
    assert 0.75 - 1e-4 < ratio[~is_whole].min() < 0.76
    assert 1.32 < ratio[~is_whole].max() < 4 / 3 + 1e-4
    assert 0.25 - 1e-4 < area.min() < 0.26


@BOTH
def test_erased_pixels_have_the_colour(apply):
    image = _image((6, 9))
    box, colour = np.array([[1, 3, 4, 8]], np.int32), np.array([[7, 200, 90]], np.uint8)
    expected = image.copy()
    expected[0, 1:4, 3:8] = [7, 200, 90]
    np.testing.assert_allclose(apply(image, box=box, colour=colour), expected, atol=1e-4)


def test_erased_boxes_have_the_published_areas_and_ratios():
    size = (200, 300)
    augmentation = Augmentation(erasing_probability=0.5)
    draws = augment.draw(np.random.default_rng(0), augmentation, 4000, size)
    top, left, bottom, right = draws["box"].T
    height, width = bottom - top, right - left
    is_erased = height > 0
    assert 0.47 < is_erased.mean() < 0.53
    assert not width[~is_erased].any()
    assert top.min() == left.min() == 0
    assert 197 < bottom.max() <= 200
    assert 297 < right.max() <= 300
    area, ratio = (height * width)[is_erased] / 60_000, (width / np.maximum(height, 1))[is_erased]
    assert 0.018 < area.min() < 0.024
    assert 0.32 < area.max() < 0.34
    assert 0.29 < ratio.min() < 0.32
    assert 3.1 < ratio.max() < 3.4
    colours = draws["colour"]
    assert (colours.min(), colours.max()) == (0, 255)
    assert abs(colours.mean() - 127.5) < 3


def test_trivial_augment_moves_pixels_in_the_same_resampling():
    """The draws move pixels and change grey levels of an image, never both."""
    draws = augment.draw(np.random.default_rng(0), Augmentation(trivial_augment=True), 2000, (8, 8))
    is_moved = (draws["matrix"] != np.eye(2, 3)).any(axis=(1, 2))
    assert 0.3 < is_moved.mean() < 5 / 14 + 0.03
    assert not draws["operation"][is_moved].any()
    counts = np.bincount(draws["operation"][~is_moved])
    assert len(counts) == 9
    assert counts[1:].min() > 100


def test_draws_fill_their_ranges_and_nothing_beyond():
    size = (9, 9)
    draws = augment.draw(
        np.random.default_rng(0), Augmentation("horizontal", 0.2, 0.2, 0.3), 4000, size
    )
    linear = draws["matrix"][:, :, :2].astype(np.float64)
    determinant = np.linalg.det(linear)
    flipped = determinant < 0
    window = np.sqrt(np.abs(determinant))
    unflipped = linear * np.where(flipped, -1, 1)[:, None, None] ** np.array([[1], [0]])
    turns = np.arctan2(unflipped[:, 1, 0], unflipped[:, 1, 1]) / (2 * np.pi)
    assert 0.47 < flipped.mean() < 0.53
    for values, low, high in (
        (window, 0.8, 1.2),
        (turns, -0.2, 0.2),
        (draws["contrast"], 0.7, 1.3),
    ):
        assert low - 1e-5 <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high + 1e-5
        assert abs(values.mean() - (low + high) / 2) < 0.01
    centre = np.array([4.0, 4.0, 1.0])
    np.testing.assert_allclose(draws["matrix"] @ centre, 4.0, atol=1e-4)


@BOTH
def test_no_augmentation_keeps_the_images(apply):
    draws = augment.identity_draws(3, (5, 7))
    np.testing.assert_array_equal(draws["matrix"], np.tile(np.eye(2, 3), (3, 1, 1)))
    np.testing.assert_array_equal(draws["contrast"], 1)
    images = np.concatenate([_image((5, 7), seed) for seed in range(3)])
    np.testing.assert_allclose(apply(images), images, atol=1e-4)


@pytest.mark.parametrize("name", [field.name for field in RANGES])
def test_one_range_changes_no_other_draw(name):
    """A random value depends only on the range of its own augmentation, not on other ranges."""
    default, value = getattr(Augmentation(), name), getattr(EVERYTHING, name)
    one = dataclasses.replace(Augmentation(), **{name: value})
    all_others = dataclasses.replace(EVERYTHING, **{name: default})
    changed = _names_of_different_draws(one, Augmentation())
    assert changed
    assert changed == _names_of_different_draws(EVERYTHING, all_others)


def _names_of_different_draws(*augmentations):
    one, other = (augment.draw(np.random.default_rng(0), a, 8, (5, 5)) for a in augmentations)
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if not (name in one and name in other and np.array_equal(one[name], other[name]))
    ]


def test_the_random_numbers_are_those_of_earlier_versions():
    """Other numbers would change the batches of earlier runs, which then could not resume."""
    ranges = Augmentation("horizontal_and_vertical", rotation=0.2, zoom=0.2, contrast=0.2)
    draws = augment.draw(np.random.default_rng(0), ranges, 2, (8, 8))
    first = [[0.7358393, -0.7386938, 3.5099905], [-0.7386938, -0.7358393, 8.6608658]]
    second = [[-0.5551670, 0.9401138, 2.1526861], [-0.9401138, -0.5551670, 8.7334824]]
    np.testing.assert_allclose(draws["matrix"], [first, second], rtol=1e-6)
    np.testing.assert_allclose(draws["contrast"], [1.0174500, 1.1740290], rtol=1e-6)

    draws = augment.draw(np.random.default_rng(0), Augmentation(crop_area=0.4), 2, (8, 8))
    first = [[0.9449810, 0, 0.0551088], [0, 0.7620500, 0.7561795]]
    second = [[0.8449490, 0, 0.3276253], [0, 0.7945083, 0.5460862]]
    np.testing.assert_allclose(draws["matrix"], [first, second], rtol=1e-6)

    draws = augment.draw(np.random.default_rng(0), Augmentation(trivial_augment=True), 4, (8, 8))
    np.testing.assert_array_equal(draws["operation"], [3, 4, 0, 0])
    np.testing.assert_allclose(draws["strength"], [238, 5, 1.099, 0.472], rtol=1e-6)
    np.testing.assert_allclose(draws["matrix"][2], [[1, 0, 0], [0.099, 1, -0.3465]], atol=1e-6)

    draws = augment.draw(np.random.default_rng(0), Augmentation(erasing_probability=0.5), 4, (8, 8))
    assert draws["box"].tolist() == [[2, 1, 2, 1], [0, 8, 0, 8], [5, 8, 5, 8], [5, 2, 7, 8]]
    colours = [[190, 24, 5], [156, 2, 71], [207, 71, 200], [86, 1, 46]]
    assert draws["colour"].tolist() == colours


def test_augmentations_draw_from_different_generators(monkeypatch):
    """With a common generator, one augmentation would determine the values of another."""
    make, seeds = np.random.default_rng, []
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or make(seed))
    augment.draw(make(0), EVERYTHING, 2, (8, 8))
    assert len(seeds) == len(set(seeds)) >= 3


def test_every_range_is_a_key_and_has_words():
    for field in RANGES:
        assert "words" in field.metadata, f"create the field {field.name} with _range"
        key, value = schema.keys()[f"augment.{field.name}"], getattr(EVERYTHING, field.name)
        assert key.accepts(field.default)
        assert key.accepts(value)
        assert dataclasses.replace(Augmentation(), **{field.name: value}).describe()


def test_every_draw_reaches_the_pixels_of_a_batch():
    """`draws_in` and the two augmentation functions use all arrays that `draw` returns."""
    draws = augment.draw(np.random.default_rng(0), EVERYTHING, 2, (4, 4))
    assert augment.draws_in(draws).keys() == draws.keys()
    for function in (augment.apply_on_device, augment.apply_on_host):
        parameters = list(inspect.signature(function).parameters)
        assert parameters == ["images", *draws]


def test_an_augmentation_in_words():
    assert augment.Augmentation().describe() == ""
    ranges = augment.Augmentation("horizontal_and_vertical", rotation=0.2, contrast=0.1)
    assert (
        ranges.describe() == "flip horizontal and vertical, rotation up to 0.2, contrast up to 0.1"
    )
