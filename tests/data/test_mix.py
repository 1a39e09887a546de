"""Tests of MixUp and CutMix, which mix each example of a batch with the previous example.

The first example is mixed with the last.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import require_devices

from cnn_jax.data import mix
from cnn_jax.data.mix import Mixing
from cnn_jax.training import sharding
from configs import default

BOTH = Mixing(mixup_probability=0.4, mixup_alpha=0.7, cutmix_probability=0.35, cutmix_alpha=1.5)

# All statistical tests draw this number of examples, so that JAX compiles few programs.
MANY = 20_000


def _batch(size=16, image_size=(6, 10), num_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 1, (size, *image_size, 3)).astype(np.float32)
    targets = np.eye(num_classes, dtype=np.float32)[rng.integers(0, num_classes, size)]
    return jnp.array(images), jnp.array(targets), jnp.ones(size, bool)


def _array(*values):
    return jnp.array(values, jnp.float32)


def _mixup_weights(share, image_size):
    is_mixup, centre = jnp.ones(len(share), bool), jnp.zeros((len(share), 2))
    return mix.partner_weights(mix.Draws(is_mixup, ~is_mixup, share, centre), image_size)


def test_mixup_by_hand():
    images = _array([[0, 10], [20, 30]], [[100, 100], [0, 0]], [[8, 0], [0, 8]])[..., None]
    targets = _array([1, 0], [0, 1], [1, 0])
    mixed, labels = mix.blend(images, targets, _mixup_weights(_array(0.75, 0.5, 1.0), (2, 2)))
    # The first result is 3/4 of image 1 plus 1/4 of image 3. The second result is half of image 2
    # plus half of image 1. Image 3 is not mixed.
    expected = [[[2, 7.5], [15, 24.5]], [[50, 55], [10, 15]], [[8, 0], [0, 8]]]
    np.testing.assert_allclose(mixed[..., 0], expected)
    # Images 1 and 3 have the same class, so the label of image 1 does not change.
    np.testing.assert_allclose(labels, [[1, 0], [0.5, 0.5], [1, 0]])


@pytest.mark.parametrize(
    ("share", "centre", "rows", "columns"),
    [
        # The box has half the height and width of the image: two rows and four columns.
        (0.75, (0.5, 0.5), slice(1, 3), slice(2, 6)),
        (0.75, (0.25, 0.75), slice(0, 2), slice(4, 8)),
        # In these two cases, the box is clipped at the edges of the image.
        (0.75, (0.0, 0.0), slice(0, 1), slice(0, 2)),
        (0.75, (0.99, 0.5), slice(3, 4), slice(2, 6)),
        # The box has three quarters of the height and width of the image.
        (0.4375, (0.375, 0.625), slice(0, 3), slice(2, 8)),
        (0.0, (0.5, 0.5), slice(0, 4), slice(0, 8)),
        (1.0, (0.5, 0.5), slice(0, 0), slice(0, 0)),
    ],
)
def test_cutmix_by_hand(share, centre, rows, columns):
    box = np.zeros((4, 8), np.float32)
    box[rows, columns] = 1
    weights = mix.cutmix_weights(_array(share, 1), _array(centre, centre), (4, 8))
    np.testing.assert_array_equal(weights, [box, np.zeros_like(box)])
    images = jnp.stack([jnp.zeros((4, 8, 3)), jnp.full((4, 8, 3), 7.0)])
    mixed, labels = mix.blend(images, _array([1, 0], [0, 1]), weights)
    np.testing.assert_array_equal(mixed[0], 7 * box[..., None] * np.ones(3))
    np.testing.assert_array_equal(mixed[1], images[1])
    # The weight of the partner's label equals the fraction of pixels that come from the partner,
    # even if the box is clipped.
    partner_fraction = box.sum() / 32
    np.testing.assert_allclose(labels, [[1 - partner_fraction, partner_fraction], [0, 1]])


def _mixed_in_float64(images, targets, draws):
    """Returns mixed images and labels, computed pixel by pixel from the papers' definitions."""
    mixed, labels = np.float64(images), np.float64(targets)
    _, height, width, _ = images.shape
    for i in range(len(images)):
        keep = np.ones((height, width))
        share, (y, x) = float(draws.share[i]), np.float64(draws.centre[i])
        if draws.is_mixup[i]:
            keep[:] = share
        elif draws.is_cutmix[i]:
            high, wide = height * math.sqrt(1 - share), width * math.sqrt(1 - share)
            for row in range(height):
                for column in range(width):
                    is_in_rows = abs(row + 0.5 - y * height) < high / 2
                    if is_in_rows and abs(column + 0.5 - x * width) < wide / 2:
                        keep[row, column] = 0
        before = np.float64(images[i - 1])
        mixed[i] = keep[..., None] * images[i] + (1 - keep[..., None]) * before
        kept = keep.sum() / (height * width)
        labels[i] = kept * targets[i] + (1 - kept) * np.float64(targets[i - 1])
    return mixed, labels


def test_equals_the_definitions_in_float64():
    images, targets, mask = _batch()
    key = jax.random.key(3)
    draws = jax.tree.map(np.asarray, mix.draw(key, BOTH, 16))
    assert min(draws.is_mixup.sum(), draws.is_cutmix.sum()) > 3
    expected, expected_labels = _mixed_in_float64(np.asarray(images), np.asarray(targets), draws)
    mixed, labels = mix.mix_batch(key, images, targets, mask, BOTH)
    assert (mixed.dtype, labels.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    np.testing.assert_allclose(labels, expected_labels, atol=1e-6)
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    # Examples that are not mixed stay bitwise equal.
    is_plain = ~(draws.is_mixup | draws.is_cutmix)
    assert is_plain.any()
    np.testing.assert_array_equal(mixed[is_plain], images[is_plain])
    np.testing.assert_array_equal(labels[is_plain], targets[is_plain])


@pytest.fixture(scope="module")
def many_draws():
    return jax.tree.map(np.asarray, mix.draw(jax.random.key(0), BOTH, MANY))


def test_as_many_are_mixed_as_are_asked_for(many_draws):
    assert many_draws.is_mixup.mean() == pytest.approx(0.4, abs=0.015)
    assert many_draws.is_cutmix.mean() == pytest.approx(0.35, abs=0.015)
    assert not (many_draws.is_mixup & many_draws.is_cutmix).any()


@pytest.mark.parametrize(("method", "alpha"), [("is_mixup", 0.7), ("is_cutmix", 1.5)])
def test_shares_are_betas_of_each_method(many_draws, method, alpha):
    share = many_draws.share[getattr(many_draws, method)].astype(np.float64)
    assert share.mean() == pytest.approx(0.5, abs=0.015)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    assert scipy.stats.kstest(share, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_centres_are_anywhere_whatever_else_is_drawn(many_draws):
    for axis in range(2):
        assert scipy.stats.kstest(many_draws.centre[:, axis], "uniform").pvalue > 1e-3
    columns = [many_draws.is_mixup, many_draws.share, *many_draws.centre.T]
    correlations = np.corrcoef(columns) - np.eye(4)
    assert np.abs(correlations).max() < 0.03


def test_the_labels_share_is_that_of_the_pixels_kept():
    """Class 0 is black and class 1 is white: a mixed image's mean is the weight of class 1."""
    images = jnp.tile(jnp.array([0.0, 1.0])[:, None, None, None], (8, 7, 9, 1))
    targets = jnp.tile(jnp.eye(2), (8, 1))
    cutmix = Mixing(cutmix_probability=1.0, cutmix_alpha=1.0)
    mixed, labels = mix.mix_batch(jax.random.key(0), images, targets, jnp.ones(16, bool), cutmix)
    assert set(np.unique(mixed).tolist()) == {0, 1}
    white = np.asarray(mixed).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(labels, np.stack([1 - white, white], axis=1), atol=1e-6)
    assert len(np.unique(white)) > 10


@pytest.mark.parametrize(
    ("mixing", "are_mixed"),
    [
        (Mixing(mixup_probability=1.0), ("is_mixup",)),
        (Mixing(cutmix_probability=1.0), ("is_cutmix",)),
        (Mixing(mixup_probability=0.7, cutmix_probability=0.3), ("is_mixup", "is_cutmix")),
    ],
)
def test_if_all_are_to_be_mixed_all_are(mixing, are_mixed):
    draws = mix.draw(jax.random.key(0), mixing, MANY)
    assert all(sum(np.asarray(getattr(draws, method)) for method in are_mixed) == 1)
    assert mixing.is_identity() is False


def test_draws_are_a_function_of_the_key():
    first, same, other = (mix.draw(jax.random.key(seed), BOTH, 16) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert not np.array_equal(first.share, other.share)


def test_one_probability_changes_no_draw_of_another_example():
    mixup_alone = Mixing(mixup_probability=0.4, mixup_alpha=0.7)
    first, second = (mix.draw(jax.random.key(0), mixing, 16) for mixing in (BOTH, mixup_alone))
    np.testing.assert_array_equal(first.is_mixup, second.is_mixup)
    is_mixup = np.asarray(first.is_mixup)
    np.testing.assert_array_equal(first.share[is_mixup], second.share[is_mixup])


def test_nothing_is_mixed_with_padding():
    images, targets, mask = _batch()
    mask = mask.at[2].set(False).at[15].set(False)
    every = Mixing(mixup_probability=0.5, cutmix_probability=0.5)
    mixed, labels = mix.mix_batch(jax.random.key(0), images, targets, mask, every)
    same = [np.array_equal(a, b) for a, b in zip(mixed, images, strict=True)]
    assert np.flatnonzero(same).tolist() == [0, 3]
    np.testing.assert_array_equal(labels[jnp.array([0, 3])], targets[jnp.array([0, 3])])


def test_a_batch_of_one_stays_as_it_is():
    images, targets, _ = _batch(size=1)
    mixed, labels = mix.blend(images, targets, _mixup_weights(_array(0.3), (6, 10)))
    np.testing.assert_allclose(mixed, images, atol=1e-6)
    np.testing.assert_allclose(labels, targets, atol=1e-6)


def test_devices_change_no_number():
    """On each device, the first example is mixed with an example of another device."""
    require_devices(8)
    images, targets, mask = _batch()
    function = functools.partial(mix.mix_batch, mixing=BOTH)
    mesh = sharding.make_mesh()
    everywhere, batch_sharding = sharding.replicated(mesh), sharding.Layout(mesh, 8).batch_sharding
    on_many = jax.jit(function, in_shardings=(everywhere, *[batch_sharding] * 3))
    key = jax.random.key(1)
    one, many = function(key, images, targets, mask), on_many(key, images, targets, mask)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), many, one)
    assert len(many[0].sharding.device_set) == 8


def test_a_configuration_says_what_is_mixed():
    augment = default.get_config().augment
    assert Mixing.from_config(augment) == Mixing() == mix.NO_MIXING
    assert Mixing().is_identity()
    assert Mixing().describe() == ""
    augment.mixup_probability, augment.cutmix_probability = 0.5, 0.125
    mixing = Mixing.from_config(augment)
    assert mixing == Mixing(0.5, 0.2, 0.125, 1.0)
    assert mixing.describe() == "MixUp of 50% (alpha 0.2), CutMix of 12.5% (alpha 1)"
    older = {"flip": "none", "cutmix_probability": 0.25}
    assert Mixing.from_config(older).describe() == "CutMix of 25% (alpha 1)"
