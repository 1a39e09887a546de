import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from cnn_jax.training.loss import balanced_weights, cross_entropy, example_weights


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_equals_its_definition_in_float64(label_smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (16, 7))
    labels = rng.integers(0, 7, 16)

    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = np.full((16, 7), label_smoothing / 7)
    target[np.arange(16), labels] += 1 - label_smoothing
    expected = -(target * log_probabilities).sum(axis=1)

    actual = cross_entropy(jnp.array(logits, jnp.float32), jnp.array(labels), label_smoothing)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def _mixed(num_examples, num_classes):
    """Returns logits, two classes of each example, the weight of the first class, and targets."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (num_examples, num_classes))
    first, second = rng.integers(0, num_classes, (2, num_examples))
    weight = rng.random(num_examples)
    one_hot = np.eye(num_classes)
    targets = weight[:, None] * one_hot[first] + (1 - weight[:, None]) * one_hot[second]
    return logits, (first, second), weight, targets


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_of_two_classes_is_their_weighted_mean(label_smoothing):
    logits, classes, weight, targets = _mixed(16, 7)
    logits, targets = jnp.array(logits, jnp.float32), jnp.array(targets, jnp.float32)
    first_losses, second_losses = (
        np.float64(cross_entropy(logits, jnp.array(labels), label_smoothing)) for labels in classes
    )
    losses = cross_entropy(logits, targets, label_smoothing)
    np.testing.assert_allclose(
        losses, weight * first_losses + (1 - weight) * second_losses, rtol=1e-5
    )


def test_cross_entropy_equals_values_computed_by_hand():
    # The predicted probabilities are 3/4 and 1/4. The first target is (0.5, 0.5). The second target
    # is (1, 0), which label smoothing changes to (0.8, 0.2).
    logits = jnp.log(jnp.array([[3.0, 1.0]]))
    losses = cross_entropy(logits, jnp.array([[0.5, 0.5]]))
    np.testing.assert_allclose(losses, -np.log(3 / 16) / 2, rtol=1e-6)
    losses = cross_entropy(logits, jnp.array([[1.0, 0.0]]), 0.4)
    np.testing.assert_allclose(losses, -0.8 * np.log(3 / 4) - 0.2 * np.log(1 / 4), rtol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_class_equals_a_one_hot_target(label_smoothing):
    logits, (labels, _), _, _ = _mixed(16, 7)
    logits = jnp.array(logits, jnp.float32)
    np.testing.assert_array_equal(
        cross_entropy(logits, jnp.array(labels), label_smoothing),
        cross_entropy(logits, jnp.eye(7)[labels], label_smoothing),
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_gradient_is_probabilities_minus_smoothed_targets(label_smoothing):
    logits, _, _, targets = _mixed(16, 7)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = probabilities - ((1 - label_smoothing) * targets + label_smoothing / 7)
    gradient = jax.grad(lambda x, t: cross_entropy(x, t, label_smoothing).sum())
    actual = gradient(jnp.array(logits, jnp.float32), jnp.array(targets, jnp.float32))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_the_weight_of_two_classes_is_their_weighted_mean():
    _, (first, second), weight, targets = _mixed(16, 7)
    weights = np.random.default_rng(1).uniform(0.1, 10, 7)
    on_device = jnp.array(weights, jnp.float32)
    np.testing.assert_array_equal(example_weights(on_device, jnp.array(first)), on_device[first])
    np.testing.assert_allclose(
        example_weights(on_device, jnp.array(targets, jnp.float32)),
        weight * weights[first] + (1 - weight) * weights[second],
        rtol=1e-5,
    )


def test_the_loss_of_huge_logits_is_finite():
    losses = cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    np.testing.assert_allclose(losses, [2e4])


@pytest.mark.parametrize("counts", [[10, 20, 70], [5, 5], [1, 0, 9]])
def test_balanced_weights_equal_scikit_learn(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    nonempty = np.unique(labels)
    expected = np.zeros(len(counts))
    expected[nonempty] = compute_class_weight("balanced", classes=nonempty, y=labels)
    weights = balanced_weights(np.array(counts))
    np.testing.assert_allclose(weights, expected)
    assert weights[labels].mean() == pytest.approx(1)
