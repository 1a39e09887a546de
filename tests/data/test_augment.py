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
VALUES = {"flip": "horizontal_and_vertical"}
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
    draws = augment.draw(rng, EVERYTHING, 4, size)
    host, device = _on_host(images, **draws), _on_device(images, **draws)
    assert np.abs(host - device).mean(axis=(1, 2, 3)).max() < 2


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
    return [name for name in one if not np.array_equal(one[name], other[name])]


def test_the_random_numbers_are_those_of_earlier_versions():
    """Other numbers would change the batches of earlier runs, which then could not resume."""
    ranges = Augmentation("horizontal_and_vertical", rotation=0.2, zoom=0.2, contrast=0.2)
    draws = augment.draw(np.random.default_rng(0), ranges, 2, (8, 8))
    first = [[0.7358393, -0.7386938, 3.5099905], [-0.7386938, -0.7358393, 8.6608658]]
    second = [[-0.5551670, 0.9401138, 2.1526861], [-0.9401138, -0.5551670, 8.7334824]]
    np.testing.assert_allclose(draws["matrix"], [first, second], rtol=1e-6)
    np.testing.assert_allclose(draws["contrast"], [1.0174500, 1.1740290], rtol=1e-6)


def test_every_range_is_a_key_and_has_words():
    for field in RANGES:
        assert "words" in field.metadata, f"create the field {field.name} with _range"
        key, value = schema.keys()[f"augment.{field.name}"], getattr(EVERYTHING, field.name)
        assert key.accepts(field.default)
        assert key.accepts(value)
        assert dataclasses.replace(Augmentation(), **{field.name: value}).describe()


def test_every_draw_reaches_the_pixels_of_a_batch():
    """`draws_in` and the two augmentation functions use all arrays that `draw` returns."""
    draws = augment.draw(np.random.default_rng(0), augment.Augmentation(), 2, (4, 4))
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
