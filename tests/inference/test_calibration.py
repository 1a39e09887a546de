import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from cnn_jax.inference import calibration


def _example(n=2000, num_classes=4, scale=1.0, seed=0):
    """Returns miscalibrated probabilities, and labels drawn from the true probabilities.

    The miscalibrated probabilities are the softmax of the scaled logits.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, num_classes))
    true = scipy.special.softmax(logits, axis=1)
    labels = (true.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return scipy.special.softmax(logits * scale, axis=1).astype(np.float32), labels


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_the_scale_of_the_logits(scale):
    probabilities, labels = _example(20_000, scale=scale)
    assert calibration.fit_temperature(probabilities, labels) == pytest.approx(scale, rel=0.03)


def test_the_temperature_equals_a_logistic_regression():
    """For two classes, the temperature is the inverse slope of a logistic regression.

    The regression has no intercept.
    """
    probabilities, labels = _example(3000, num_classes=2, scale=2.0)
    log_odds = np.diff(np.log(probabilities.astype(np.float64)), axis=1)
    regression = LogisticRegression(C=1e9, fit_intercept=False).fit(log_odds, labels)
    expected = 1 / regression.coef_.item()
    assert calibration.fit_temperature(probabilities, labels) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("n", [0, 1, 50])
@pytest.mark.parametrize("right", [True, False])
def test_the_temperature_is_finite_for_few_or_identical_images(n, right):
    probabilities = np.tile(np.array([[0.9, 0.1]], np.float32), (n, 1))
    temperature = calibration.fit_temperature(probabilities, np.full(n, 0 if right else 1))
    assert 0.02 < temperature < 50
    if n == 0:
        assert temperature == 1
    elif n == 1:
        assert 0.4 < temperature < 2.5
    else:
        assert temperature < 1 if right else temperature > 1


def test_a_probability_of_zero_stays_finite():
    probabilities = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    labels = np.array([0, 1, 1])
    temperature = calibration.fit_temperature(probabilities, labels)
    assert np.isfinite(calibration.apply_temperature(probabilities, temperature)).all()
    assert np.isfinite(calibration.negative_log_likelihood(probabilities, labels))


def test_applying_a_temperature_is_dividing_the_logits():
    logits = np.random.default_rng(0).normal(0, 3, (10, 5))
    hot = calibration.apply_temperature(scipy.special.softmax(logits, axis=1), 1.7)
    np.testing.assert_allclose(hot, scipy.special.softmax(logits / 1.7, axis=1), rtol=1e-9)


def test_temperature_scaling_improves_calibration_and_keeps_predictions():
    probabilities, labels = _example(scale=3.0)
    fit, fit_labels = _example(scale=3.0, seed=1)
    temperature = calibration.fit_temperature(fit, fit_labels)
    after = calibration.apply_temperature(probabilities, temperature)
    np.testing.assert_array_equal(after.argmax(1), probabilities.argmax(1))
    for figure in ("expected_calibration_error", "brier_score", "loss"):
        before = calibration.describe(probabilities, labels)[figure]
        assert calibration.describe(after, labels)[figure] < 0.9 * before


def test_the_expected_calibration_error_of_an_example():
    # The two bins are (0, 0.5] and (0.5, 1], so a confidence of 0.5 belongs to the lower bin.
    probabilities = np.array([[0.5, 0.5], [0.6, 0.4], [0.2, 0.8], [1.0, 0.0]], np.float32)
    labels = np.array([0, 1, 1, 0])
    bins = calibration.reliability(probabilities, labels, 2)
    assert bins["count"] == [1, 3]
    assert bins["confidence"] == pytest.approx([0.5, 0.8])
    assert bins["accuracy"] == pytest.approx([1, 2 / 3])
    expected = 1 / 4 * 0.5 + 3 / 4 * (0.8 - 2 / 3)
    error = calibration.expected_calibration_error(probabilities, labels, 2)
    assert error == pytest.approx(expected)


def test_brier_score_and_loss_equal_scikit_learn():
    probabilities, labels = _example(500, num_classes=2, scale=2.0)
    exact = probabilities.astype(float)
    brier = calibration.brier_score(probabilities, labels)
    assert brier == pytest.approx(
        2 * sklearn.metrics.brier_score_loss(labels, exact[:, 1]), rel=1e-5
    )
    loss = calibration.negative_log_likelihood(probabilities, labels)
    exact /= exact.sum(axis=1, keepdims=True)
    assert loss == pytest.approx(sklearn.metrics.log_loss(labels, exact), rel=1e-5)
    one_hot = np.eye(4)[[0, 1]]
    assert calibration.brier_score(one_hot, np.array([0, 0])) == 1


def test_coverage_of_a_case_by_hand():
    # The most confident prediction is correct. Of the two predictions with confidence 0.8, one is
    # correct. The least confident prediction is wrong.
    confidence = np.array([0.6, 0.9, 0.8, 0.8])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    result = calibration.coverage(probabilities, np.array([1, 0, 0, 1]))
    assert result["coverage"] == [0.25, 0.75, 1.0]
    assert result["accuracy"] == pytest.approx([1, 2 / 3, 1 / 2])
    assert result["confidence"] == [0.9, 0.8, 0.6]


@given(st.integers(0, 400), st.integers(2, 6), st.integers(0, 99))
def test_calibration_metrics_are_finite_and_in_range(n, num_classes, seed):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(num_classes) / 5, n).astype(np.float32)
    labels = rng.integers(0, num_classes, n)
    metrics = calibration.describe(probabilities, labels)
    assert 0 <= metrics["expected_calibration_error"] <= 1
    assert 0 <= metrics["brier_score"] <= 2
    assert sum(metrics["reliability"]["count"]) == n
    curve = calibration.coverage(probabilities, labels)
    assert len(curve["coverage"]) <= 100
    assert np.all(np.diff(curve["coverage"]) > 0)
    if n:
        assert curve["coverage"][-1] == 1
        accuracy = np.mean(probabilities.argmax(1) == labels)
        assert curve["accuracy"][-1] == pytest.approx(accuracy)
