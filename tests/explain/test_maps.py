import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bundles import MODEL, make_bundle

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.explain import maps
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.models.network import forward, make_model, stages

SIZE = (16, 12)


def make_predictor(**changes):
    """Returns a predictor with a small network whose parameters are all random."""
    config = MODEL | changes
    model = make_model(config, 3, "float32")
    variables = model.init(jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda leaf: np.asarray(leaf + rng.uniform(-0.2, 0.3, leaf.shape), np.float32), variables
    )
    # The channels have different means, so that a test fails if the code confuses two channels.
    preprocessing = Preprocessing(SIZE, mean=(120.0, 100.0, 140.0), std=(60.0, 70.0, 80.0))
    bundle = dataclasses.replace(
        make_bundle(), model=config, variables=noisy, preprocessing=preprocessing
    )
    return BundlePredictor(bundle)


@pytest.fixture(scope="module")
def predictor():
    return make_predictor()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (5, *SIZE, 3), np.uint8)


CLASSES = np.array([0, 1, 2, 1, 0], np.int32)


def _maps_and_gradients(predictor, images, classes, stage="conv2"):
    """Returns the last feature maps and the logits' gradients, in float64 without autodiff."""
    result = stages(
        predictor.model, predictor.variables, jnp.array(images), predictor.preprocessing
    )
    feature_maps = np.asarray(result[stage], np.float64)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), predictor.variables["params"])
    embedding_gradient = params["head"]["kernel"].T[classes]
    if "dense" in params:
        hidden = feature_maps.mean((1, 2)) @ params["dense"]["kernel"] + params["dense"]["bias"]
        embedding_gradient = (embedding_gradient * (hidden > 0)) @ params["dense"]["kernel"].T
    height, width = feature_maps.shape[1:3]
    gradients = np.broadcast_to(
        embedding_gradient[:, None, None] / (height * width), feature_maps.shape
    )
    return feature_maps, gradients


def _enlarged(small):
    return np.asarray(jax.image.resize(jnp.array(small, jnp.float32), (5, *SIZE), "bilinear"))


def test_grad_cam_is_the_weighted_sum_of_the_maps(predictor, images):
    feature_maps, gradients = _maps_and_gradients(predictor, images, CLASSES)
    weights = gradients.mean((1, 2))
    expected = np.maximum(np.einsum("bk,bhwk->bhw", weights, feature_maps), 0)
    result = maps.grad_cam(predictor, images, CLASSES)
    assert (expected > 0).any()
    assert (expected == 0).any()
    np.testing.assert_allclose(result, _enlarged(expected), rtol=1e-4, atol=1e-7)


def test_grad_cam_plus_plus_follows_the_papers_equations(predictor, images):
    feature_maps, gradients = _maps_and_gradients(predictor, images, CLASSES)
    expected = np.zeros(feature_maps.shape[:3])
    for image in range(5):
        for k in range(feature_maps.shape[-1]):
            a, g = feature_maps[image, ..., k], gradients[image, ..., k]
            # The paper uses the derivatives of exp(logit). Their common factor exp(logit) is left
            # out, because this factor only scales the map.
            alpha = g**2 / (2 * g**2 + a.sum() * g**3)
            expected[image] += (alpha * np.maximum(g, 0)).sum() * a
    result = maps.grad_cam_plus_plus(predictor, images, CLASSES)
    np.testing.assert_allclose(result, _enlarged(np.maximum(expected, 0)), rtol=1e-3, atol=1e-6)


def test_layer_cam_weights_each_pixel_by_its_positive_gradient(predictor, images):
    feature_maps, gradients = _maps_and_gradients(predictor, images, CLASSES)
    expected = np.maximum((np.maximum(gradients, 0) * feature_maps).sum(-1), 0)
    result = maps.layer_cam(predictor, images, CLASSES)
    np.testing.assert_allclose(result, _enlarged(expected), rtol=1e-4, atol=1e-7)


def test_cam_with_a_linear_head_is_proportional_to_grad_cam(images):
    predictor = make_predictor(dense=0)
    feature_maps, _ = _maps_and_gradients(predictor, images, CLASSES)
    head = np.asarray(predictor.variables["params"]["head"]["kernel"]).T[CLASSES]
    expected = np.maximum(np.einsum("bk,bhwk->bhw", head, feature_maps), 0)
    result = maps.cam(predictor, images, CLASSES)
    np.testing.assert_allclose(result, _enlarged(expected), rtol=1e-4, atol=1e-6)
    pixels = np.prod(feature_maps.shape[1:3])
    grad_cam = maps.grad_cam(predictor, images, CLASSES)
    np.testing.assert_allclose(pixels * grad_cam, result, rtol=1e-4, atol=1e-6)
    assert "cam" in maps.methods_for(predictor)


def test_hires_cam_is_the_effect_of_each_pixel_of_larger_maps(predictor, images):
    """The test measures the effect by a small change of one pixel of the feature maps of conv1."""
    height, width = SIZE
    pixels, image, label = height * width, images[:1], CLASSES[1]
    run = functools.partial(stages, predictor.model, predictor.variables)
    conv1 = np.asarray(run(jnp.array(image), predictor.preprocessing)["conv1"])
    assert conv1.shape[1:3] == SIZE
    change = jnp.array(1e-2 * np.eye(pixels).reshape(pixels, height, width, 1) * conv1)
    copies = jnp.repeat(image, pixels, axis=0)
    more, less = (
        np.asarray(run(copies, predictor.preprocessing, {"conv1": sign * change})["logits"])
        for sign in (1, -1)
    )
    effect = (more - less)[:, label].reshape(1, *SIZE) / 2e-2
    result = maps.hires_cam(predictor, image, np.array([label], np.int32))
    assert (effect > 0.01).any()
    assert (effect < -0.01).any()
    # A few pixels differ more, because the change of the pixel changes the maximum of a pool.
    error = np.abs(result - np.maximum(effect, 0))
    assert np.quantile(error, 0.9) < 0.002 < 0.01 * effect.max()


def test_hires_cam_uses_the_last_maps_if_none_is_larger(images):
    predictor = make_predictor(features=(4,))
    feature_maps, gradients = _maps_and_gradients(predictor, images, CLASSES, stage="conv1")
    assert (gradients < 0).any()
    expected = np.maximum((gradients * feature_maps).sum(-1), 0)
    result = maps.hires_cam(predictor, images, CLASSES)
    np.testing.assert_allclose(result, _enlarged(expected), rtol=1e-4, atol=1e-7)


def test_cam_is_refused_with_a_hidden_layer(predictor, images):
    assert "cam" not in maps.methods_for(predictor)
    with pytest.raises(ValueError, match=r"model\.dense=0"):
        maps.cam(predictor, images, CLASSES)


def _logits(predictor, images):
    result = forward(
        predictor.model, predictor.variables, jnp.array(images), predictor.preprocessing
    )
    return np.asarray(result)[np.arange(len(images)), CLASSES]


def test_integrated_gradients_add_up_to_the_difference_of_logits(predictor, images):
    result = maps.integrated_gradients_by_channel(predictor, images, CLASSES)
    grey = np.broadcast_to(np.float32([120, 100, 140]), images.shape)
    gained = _logits(predictor, images.astype(np.float32)) - _logits(predictor, grey)
    assert np.abs(gained).min() > 0.05

    def gradient(share):
        def logits(images):
            logits = forward(predictor.model, predictor.variables, images, predictor.preprocessing)
            return logits[jnp.arange(5), CLASSES].sum()

        return jax.grad(logits)(grey + np.float32(share) * (images - grey))

    midpoints = np.mean([gradient((i + 0.5) / 32) for i in range(32)], axis=0)
    np.testing.assert_allclose(result, midpoints * (images - grey), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(result.sum((1, 2, 3)), gained, rtol=0.05, atol=0.02)
    np.testing.assert_allclose(
        maps.integrated_gradients(predictor, images, CLASSES), np.abs(result.sum(-1)), rtol=1e-5
    )


def test_smooth_grad_is_the_mean_over_noisy_copies(predictor, images):
    def logits(images):
        result = forward(predictor.model, predictor.variables, images, predictor.preprocessing)
        return result[jnp.arange(5), CLASSES].sum()

    rng = np.random.default_rng(0)
    copies = [
        jax.grad(logits)(images + 0.15 * 255 * rng.standard_normal((*SIZE, 3), np.float32))
        for _ in range(16)
    ]
    result = maps.smooth_grad(predictor, images, CLASSES)
    np.testing.assert_allclose(
        result, np.abs(np.mean(copies, axis=0)).max(-1), rtol=1e-3, atol=1e-6
    )


def test_occlusion_is_the_decrease_of_the_logit_under_each_patch(predictor, images):
    whole = _logits(predictor, images)
    lost, count = np.zeros((5, *SIZE)), np.zeros(SIZE)
    for top in range(15):  # The patches have 2 x 2 pixels and a stride of one pixel.
        for left in range(11):
            patch = np.s_[:, top : top + 2, left : left + 2]
            occluded = images.astype(np.float32)
            occluded[patch] = (120, 100, 140)
            loss = np.maximum(whole - _logits(predictor, occluded), 0)
            lost[patch] += loss[:, None, None]
            count[patch[1:]] += 1
    result = maps.occlusion(predictor, images, CLASSES)
    np.testing.assert_allclose(result, lost / count, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (224, 224)])
def test_patches_cover_every_pixel(size):
    count = np.zeros(size, int)
    for rows, columns in maps._patches(size):
        count[rows, columns] += 1
    assert count.min() >= 1
    assert count.max() <= 9


@pytest.mark.parametrize("name", maps.METHODS)
def test_an_images_map_depends_on_no_other_image(name, images):
    predictor = make_predictor(dense=0)
    method = maps.METHODS[name]
    batched = method(predictor, images, CLASSES)
    assert batched.shape == (5, *SIZE)
    assert batched.dtype == np.float32
    assert (batched >= 0).all()
    for i in (0, 4):
        single = method(predictor, images[i : i + 1], CLASSES[i : i + 1])
        np.testing.assert_allclose(single[0], batched[i], rtol=1e-3, atol=1e-5)
    assert not np.allclose(batched, method(predictor, images, (CLASSES + 1) % 3))
    assert method(predictor, images[:0], CLASSES[:0]).shape == (0, *SIZE)


@pytest.mark.parametrize("name", maps.METHODS)
def test_maps_are_finite_for_extreme_weights_and_images(name, images):
    predictor = make_predictor(dense=0)
    for scale in (0.0, 1e12):
        predictor.variables = jax.tree.map(lambda leaf: leaf * scale, predictor.variables)  # noqa: B023
        for batch in (images, np.zeros_like(images)):
            assert np.isfinite(maps.METHODS[name](predictor, batch, CLASSES)).all()


def test_more_images_than_a_batch_have_the_same_maps(predictor, monkeypatch, images):
    expected = maps.grad_cam(predictor, images, CLASSES)
    monkeypatch.setattr(maps, "_FEATURE_MAP_PIXELS_PER_BATCH", 2 * SIZE[0] * SIZE[1])
    np.testing.assert_allclose(
        maps.grad_cam(predictor, images, CLASSES), expected, rtol=1e-5, atol=1e-7
    )
