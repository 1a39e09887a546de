"""Compares TrivialAugment with results computed by hand, and its JAX functions with Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.data import trivial_augment
from cnn_jax.data.trivial_augment import LEVEL_OPERATIONS, OPERATIONS


def _draws(name, level, is_negative=False):
    return trivial_augment.make_draws(
        np.array([OPERATIONS.index(name)]), np.array([level]), np.array([is_negative])
    )


# The strongest strength of each operation, from the paper's table and torchvision.
@pytest.mark.parametrize(
    ("name", "weakest", "strongest", "negative"),
    [
        ("solarize", 255, 0, 0),
        ("posterize", 8, 2, 2),
        *((name, 1, 1.99, 0.01) for name in ("color", "contrast", "brightness", "sharpness")),
    ],
)
def test_strengths_of_level_operations(name, weakest, strongest, negative):
    for level, is_negative, expected in (
        (0.0, False, weakest),
        (1.0, False, strongest),
        (1.0, True, negative),
    ):
        draws = _draws(name, level, is_negative)
        assert draws.operation[0] == LEVEL_OPERATIONS.index(name)
        assert draws.strength[0] == pytest.approx(expected, abs=1e-6)
        np.testing.assert_array_equal(draws.linear[0], np.eye(2))
        np.testing.assert_array_equal(draws.offset[0], 0)


_COS = np.cos(0.75 * np.pi)


@pytest.mark.parametrize(
    ("name", "linear", "offset"),
    [
        ("rotate", [[_COS, -np.sin(0.75 * np.pi)], [np.sin(0.75 * np.pi), _COS]], [0, 0]),
        ("shear_x", [[1, 0.99], [0, 1]], [0, 0]),
        ("shear_y", [[1, 0], [0.99, 1]], [0, 0]),
        ("translate_x", np.eye(2), [32, 0]),
        ("translate_y", np.eye(2), [0, 32]),
    ],
)
def test_strengths_of_operations_that_move_pixels(name, linear, offset):
    draws, opposite = _draws(name, 1.0), _draws(name, 1.0, is_negative=True)
    np.testing.assert_allclose(draws.linear[0], linear, atol=1e-12)
    np.testing.assert_allclose(draws.offset[0], offset)
    np.testing.assert_allclose(opposite.offset, -draws.offset)
    np.testing.assert_allclose(
        opposite.linear[0] - np.eye(2) * opposite.linear[0, 0, 0],
        np.eye(2) * draws.linear[0, 0, 0] - draws.linear[0],
        atol=1e-12,
    )
    assert draws.operation[0] == 0


def test_draws_are_uniform():
    draws = trivial_augment.draw(np.random.default_rng(0), 14_000)
    counts = np.bincount(draws.operation, minlength=9)
    # The operations that move pixels have the position of "identity".
    assert 5700 < counts[0] < 6300
    assert 900 < counts[1:].min() < counts[1:].max() < 1100
    bits = draws.strength[draws.operation == LEVEL_OPERATIONS.index("posterize")]
    assert set(bits.tolist()) == {2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}
    factors = draws.strength[draws.operation == LEVEL_OPERATIONS.index("color")]
    assert abs(factors.mean() - 1) < 0.05
    assert len(set(factors.tolist())) == 61


_RAMP = np.array([10, 20, 40, 200], np.uint8)


# A row of four grey pixels, for which the results are easily computed.
@pytest.mark.parametrize(
    ("name", "strength", "expected"),
    [
        ("identity", 0, [10, 20, 40, 200]),
        # (x - 10) * 255 / 190, rounded down
        ("autocontrast", 0, [0, 13, 40, 255]),
        ("solarize", 40.0, [10, 20, 215, 55]),
        ("posterize", 2.0, [0, 0, 0, 192]),
        # A grey image has no other colour than its grey level.
        ("color", 1.7, [10, 20, 40, 200]),
        # The mean is 67.5, which Pillow rounds to 68; 68 + 0.5 (x - 68), rounded down.
        ("contrast", 0.5, [39, 44, 54, 134]),
        ("brightness", 1.5, [15, 30, 60, 255]),
        # Border pixels stay the same.
        ("sharpness", 0.5, [10, 20, 40, 200]),
    ],
)
def test_operations_by_hand(name, strength, expected):
    image = np.tile(_RAMP[None, :, None], (1, 1, 3))
    number = LEVEL_OPERATIONS.index(name)
    host = trivial_augment.apply_on_host(image, number, strength)
    np.testing.assert_array_equal(host[0, :, 0], expected)
    if name != "sharpness":
        device = _on_device(image, number, strength)
        np.testing.assert_array_equal(device[0, :, 0], expected)


def test_equalize_by_hand():
    """510 pixels: 256 of level 3, 253 of level 7 and one of level 9.

    The step is (510 - 1) // 255 = 1, and half of it is 0. The new levels are the numbers of pixels
    with lower levels, divided by the step and at most 255: 0, 255 and 255.
    """
    levels = np.array([3] * 256 + [7] * 253 + [9], np.uint8)
    image = np.tile(levels.reshape(17, 30, 1), (1, 1, 3))
    expected = np.where(image == 3, 0, 255)
    number = LEVEL_OPERATIONS.index("equalize")
    np.testing.assert_array_equal(trivial_augment.apply_on_host(image, number, 0.0), expected)
    np.testing.assert_array_equal(_on_device(image, number, 0.0), expected)


def test_sharpness_by_hand():
    """The smoothed centre is (8 * 10 + 5 * 140) / 13 = 60; with factor 1.5 it is 60 + 1.5 * 80."""
    image = np.full((3, 3, 3), 10, np.uint8)
    image[1, 1] = 140
    expected = image.copy()
    expected[1, 1] = 180
    number = LEVEL_OPERATIONS.index("sharpness")
    np.testing.assert_array_equal(trivial_augment.apply_on_host(image, number, 1.5), expected)
    np.testing.assert_array_equal(_on_device(image, number, 1.5), expected)


def _on_device(image, number, strength):
    (out,) = jax.jit(trivial_augment.apply_on_device)(
        jnp.array(image[None], jnp.float32), jnp.array([number]), jnp.array([strength], jnp.float32)
    )
    return np.asarray(out)


@pytest.mark.parametrize("kind", ["noise", "smooth", "dark", "uniform"])
def test_the_device_computes_what_pillow_computes(kind):
    """At most one level differs, in at most 3 % of the pixels, for all operations."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 37, 3), np.uint8)
    if kind == "smooth":
        image = (image // 8 + 6 * np.arange(37)[:, None]).astype(np.uint8)
    elif kind == "dark":
        image = (image // 3 + 5).astype(np.uint8)
    elif kind == "uniform":
        image[:] = [10, 200, 90]
    numbers = np.repeat(np.arange(len(OPERATIONS)), 7)
    levels, signs = (
        np.tile([0, 0.1, 1 / 3, 1, 0.1, 2 / 3, 1], 14),
        np.tile([0, 0, 0, 0, 1, 1, 1], 14),
    )
    draws = trivial_augment.make_draws(numbers, levels, signs.astype(bool))
    images = np.tile(image, (len(numbers), 1, 1, 1))
    device = jax.jit(trivial_augment.apply_on_device)(
        jnp.array(images, jnp.float32), jnp.array(draws.operation), jnp.array(draws.strength)
    )
    host = [
        trivial_augment.apply_on_host(image, number, strength)
        for number, strength in zip(draws.operation.tolist(), draws.strength.tolist(), strict=True)
    ]
    for name, first, second in zip(numbers, np.asarray(device), host, strict=True):
        difference = np.abs(first - second.astype(np.float32))
        assert difference.max() <= 1, OPERATIONS[name]
        assert (difference > 0).mean() <= 0.03, OPERATIONS[name]
