import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from test_checks import BrightCorner
from test_maps import SIZE, make_predictor

from cnn_jax.explain import features
from cnn_jax.models.network import stages


@pytest.fixture(scope="module")
def predictor():
    predictor = make_predictor()
    predictor.temperature = 1.5
    return predictor


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (70, *SIZE, 3), np.uint8)


def test_maps_and_embeddings_are_the_networks_stages(predictor, images):
    maps = features.feature_maps(predictor, images[:3])
    assert {name: array.shape for name, array in maps.items()} == {
        "conv1": (3, 16, 12, 4),
        "conv2": (3, 8, 6, 8),
    }
    result = stages(
        predictor.model, predictor.variables, jnp.array(images), predictor.preprocessing
    )
    np.testing.assert_allclose(maps["conv2"], result["conv2"][:3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        features.embeddings(predictor, images), result["embedding"], rtol=1e-4, atol=1e-5
    )


def test_filters_are_the_first_kernels(predictor):
    filters = features.first_filters(predictor)
    assert filters.shape == (4, 3, 3, 3)
    kernel = np.asarray(predictor.variables["params"]["conv1"]["kernel"])
    np.testing.assert_array_equal(filters[2, 0, 1], kernel[0, 1, :, 2])


def test_feature_importance_equals_a_computation_with_the_whole_network(predictor, images):
    labels = np.random.default_rng(2).integers(0, 3, len(images))
    embedding = features.embeddings(predictor, images)
    importance = features.feature_importance(predictor, embedding, labels, seed=4)
    is_dead = ~embedding.any(axis=0)
    assert (importance[is_dead] == 0).all()

    def loss(embedding):
        offsets = {"embedding": jnp.array(embedding - features.embeddings(predictor, images))}
        logits = stages(
            predictor.model,
            predictor.variables,
            jnp.array(images),
            predictor.preprocessing,
            offsets,
        )["logits"]
        probabilities = scipy.special.log_softmax(np.asarray(logits, float) / 1.5, axis=1)
        return -probabilities[np.arange(len(labels)), labels].mean()

    rng = np.random.default_rng(4)
    orders = [rng.permutation(len(images)) for _ in range(5)]
    base = loss(embedding)
    for feature in np.flatnonzero(~is_dead)[:3]:
        losses = []
        for order in orders:
            exchanged = embedding.copy()
            exchanged[:, feature] = embedding[order, feature]
            losses.append(loss(exchanged) - base)
        assert importance[feature] == pytest.approx(np.mean(losses), abs=2e-5)


def test_the_strongest_images_come_first_and_are_positive():
    embedding = np.array([[0, 1], [3, 0], [0, 2], [5, 0]], np.float32)
    assert features.strongest_images(embedding, 0, 3).tolist() == [3, 1]
    assert features.strongest_images(embedding, 1, 1).tolist() == [2]


def test_only_the_informative_region_is_important():
    predictor = BrightCorner((16, 16))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 50, (40, 16, 16, 3), np.uint8)
    labels = rng.integers(0, 2, 40)
    images[labels == 1, :8, :8] += 200
    result = features.region_importance(predictor, images, labels)
    assert result["accuracy"] == 1
    lost = np.array(result["loss_gained"])
    assert (lost[:2, :2] > 0.05).all()
    lost[:2, :2] = 0
    assert np.abs(lost).max() == 0
