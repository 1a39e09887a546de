"""Tests of the distances and of the trust model, against scikit-learn and NumPy."""

import numpy as np
import pytest
from sklearn.covariance import empirical_covariance
from sklearn.linear_model import LogisticRegression

from cnn_jax.quality import trust
from cnn_jax.quality.reference import Predictions, Reference

CLASSES, FEATURES = 3, 8


def predictions(rng, labels, noise):
    """Returns predictions whose embeddings, confidence and images get worse with the noise."""
    noise = np.broadcast_to(noise, len(labels))[:, np.newaxis]
    embeddings = np.eye(CLASSES, FEATURES)[labels] * 4 + rng.normal(size=(len(labels), FEATURES))
    embeddings = (embeddings * (1 - noise) + noise * rng.normal(size=embeddings.shape) * 3).astype(
        np.float32
    )
    logits = 3 * embeddings[:, :CLASSES]
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    images = (100 + 20 * rng.normal(size=(len(labels), 3)) + [0, 1, 1] * noise * 60).clip(0)
    return Predictions(probabilities, embeddings, images.astype(np.float32))


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    train, clean, corrupted = (rng.integers(CLASSES, size=n) for n in (1000, 600, 3000))
    noise = rng.choice([0.2, 0.4, 0.6, 0.8, 1.0], len(corrupted))
    means, covariance = trust.fit_embedding(predictions(rng, train, 0).embeddings, train, CLASSES)
    return trust.fit_reference(
        means,
        covariance,
        predictions(rng, clean, 0),
        clean,
        predictions(rng, corrupted, noise),
        corrupted,
    )


def test_class_means_and_covariance_equal_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(200, 5)).astype(np.float32)
    labels = rng.integers(3, size=200)
    means, covariance = trust.fit_embedding(embeddings, labels, 4)
    for label in range(3):
        expected = embeddings[labels == label].mean(axis=0)
        np.testing.assert_allclose(means[label], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(means[3], embeddings.mean(axis=0), rtol=1e-5, atol=1e-6)
    expected = empirical_covariance(embeddings - means[labels], assume_centered=True)
    np.testing.assert_allclose(covariance, expected, rtol=1e-4, atol=1e-5)


def test_distances_equal_the_formula_with_the_inverse():
    rng = np.random.default_rng(2)
    embeddings = rng.normal(size=(50, 5)).astype(np.float32)
    means, covariance = trust.fit_embedding(embeddings, np.arange(50) % 3, 3)
    to_classes, to_centre = trust.Distances(means, covariance)(embeddings)
    ridge = 0.01 * np.trace(covariance) / 5 * np.eye(5)
    inverse = np.linalg.inv(covariance.astype(np.float64) + ridge)
    for row, embedding in enumerate(embeddings):
        for label, mean in enumerate(means):
            difference = embedding - mean
            expected = np.sqrt(difference @ inverse @ difference)
            assert to_classes[row, label] == pytest.approx(expected, rel=1e-4)
        difference = embedding - means.mean(axis=0)
        assert to_centre[row] == pytest.approx(np.sqrt(difference @ inverse @ difference), rel=1e-4)


def test_the_logistic_regression_equals_that_of_scikit_learn():
    rng = np.random.default_rng(3)
    rows, weights = rng.normal(size=(400, 4)), rng.uniform(0.1, 2, 400)
    hits = rng.random(400) < 1 / (1 + np.exp(-rows @ [2, -1, 0, 0.5] - 1))
    solution = trust.fit_logistic(rows, hits, weights)
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(rows, hits, weights)
    np.testing.assert_allclose(solution[:-1], model.coef_[0], atol=1e-4)
    assert solution[-1] == pytest.approx(model.intercept_[0], abs=1e-4)


@pytest.mark.parametrize("hits", [np.ones(20, bool), np.zeros(20, bool)])
def test_equal_outcomes_give_finite_weights(hits):
    rows = np.random.default_rng(0).normal(size=(20, 3))
    solution = trust.fit_logistic(rows, hits, np.ones(20))
    assert np.isfinite(solution).all()


def test_the_estimate_equals_the_accuracy_on_the_validation_images(fitted):
    distances = trust.Distances(fitted.class_means, fitted.covariance)
    rng = np.random.default_rng(0)
    rng_labels = [rng.integers(CLASSES, size=n) for n in (1000, 600, 3000)]
    rng.choice(5, 3000)
    predictions(rng, rng_labels[0], 0)
    clean = predictions(rng, rng_labels[1], 0)
    assert fitted.accuracy == (clean.classes == rng_labels[1]).mean()
    estimate = trust.estimate_accuracy(fitted, distances, clean)
    assert estimate == pytest.approx(fitted.accuracy, abs=1e-6)
    np.testing.assert_array_equal(fitted.statistics, trust.statistics(distances, clean))


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.5, 0.7, 0.9])
def test_the_estimate_follows_the_accuracy(fitted, noise):
    rng = np.random.default_rng(9)
    labels = rng.integers(CLASSES, size=3000)
    drifted = predictions(rng, labels, noise)
    distances = trust.Distances(fitted.class_means, fitted.covariance)
    estimated = trust.correctness(fitted, distances, drifted)
    assert estimated.shape == (3000,)
    assert estimated.min() >= 0
    assert estimated.max() <= 1
    accuracy = (drifted.classes == labels).mean()
    estimate = trust.estimate_accuracy(fitted, distances, drifted)
    assert estimate == pytest.approx(min(estimated.mean() * fitted.trust_factor, 1))
    assert estimate == pytest.approx(accuracy, abs=0.07)


def test_predictions_unlike_all_known_images_count_as_guesses(fitted):
    rng = np.random.default_rng(4)
    near = predictions(rng, rng.integers(CLASSES, size=50), 0)
    far = Predictions(near.probabilities, 100 * near.embeddings, near.images)
    distances = trust.Distances(fitted.class_means, fitted.covariance)
    np.testing.assert_array_equal(trust.correctness(fitted, distances, far), 1 / CLASSES)


def test_features_equal_a_computation_row_by_row(fitted):
    rng = np.random.default_rng(7)
    some = predictions(rng, rng.integers(CLASSES, size=20), 0.5)
    distances = trust.Distances(fitted.class_means, fitted.covariance)
    found = trust.features(fitted, distances, some)
    to_classes, to_centre = distances(some.embeddings)
    known = fitted.statistics.astype(np.float64)
    scaled = np.column_stack([known[:, 2], np.log1p(known[:, 3]), np.log1p(known[:, 4])])
    for row in range(20):
        p, embedding = some.probabilities[row], np.abs(some.embeddings[row].astype(np.float64))
        label, best = int(p.argmax()), float(p.max())
        near = to_classes[row, label]
        other = min(to_classes[row, k] for k in range(CLASSES) if k != label)
        bright, sharp, contrast = some.images[row].astype(np.float64)
        image = np.array([bright, np.log1p(sharp), np.log1p(contrast)])
        standard = (image - scaled.mean(axis=0)) / scaled.std(axis=0)
        unusual = np.log1p(np.sqrt((standard**2).sum()))
        log_known = np.log(known[:, 0])
        distance = (np.log(near) - log_known.mean()) / log_known.std()
        expected = [
            *(fitted.trust_classes[label], np.log((best + 1e-6) / (1 - best + 1e-6))),
            *(np.log(near), np.log(other / near), np.log(to_centre[row])),
            *(np.log(embedding.sum() / np.sqrt((embedding**2).sum())), np.log1p(contrast)),
            *(unusual, distance * standard[1], distance * unusual),
        ]
        np.testing.assert_allclose(found[row], expected, rtol=1e-3, atol=1e-4)


def test_extreme_predictions_have_finite_features(fitted):
    """Probabilities of 0 and 1, embeddings of zeros, and black images."""
    extreme = Predictions(
        np.eye(CLASSES, dtype=np.float32),
        np.zeros((CLASSES, FEATURES), np.float32),
        np.zeros((CLASSES, 3), np.float32),
    )
    distances = trust.Distances(fitted.class_means, fitted.covariance)
    rows = trust.features(fitted, distances, extreme)
    assert rows.shape == (CLASSES, 10)
    assert np.isfinite(rows).all()


def test_a_constant_embedding_is_allowed():
    same = np.ones((10, 4), np.float32)
    distances = trust.Distances(*trust.fit_embedding(same, np.zeros(10, int), 2))
    to_classes, to_centre = distances(same)
    assert np.isfinite(to_classes).all()
    assert np.isfinite(to_centre).all()


def test_arrays_make_the_same_reference(fitted):
    again = Reference.from_arrays(fitted.arrays() | {"of a later version": np.zeros(1)})
    for name, array in fitted.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)
