import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from cnn_jax.loss import balanced_weights, cross_entropy


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
def test_equals_the_definition_in_float64(label_smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (16, 7))
    labels = rng.integers(0, 7, 16)

    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = np.full((16, 7), label_smoothing / 7)
    target[np.arange(16), labels] += 1 - label_smoothing
    expected = -(target * log_probabilities).sum(axis=1)

    actual = cross_entropy(jnp.array(logits, jnp.float32), jnp.array(labels), label_smoothing)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_huge_logits_stay_finite():
    losses = cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    np.testing.assert_allclose(losses, [2e4])


@pytest.mark.parametrize("counts", [[10, 20, 70], [5, 5], [1, 0, 9]])
def test_balanced_weights_are_scikit_learns(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    present = np.unique(labels)
    expected = np.zeros(len(counts))
    expected[present] = compute_class_weight("balanced", classes=present, y=labels)
    weights = balanced_weights(np.array(counts))
    np.testing.assert_allclose(weights, expected)
    assert weights[labels].mean() == pytest.approx(1)
