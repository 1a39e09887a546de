import numpy as np
import pytest

from cnn_jax.report import label_errors


def _noisy():
    """Returns probabilities that are mostly correct, and labels, some of which are wrong."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 60)
    labels = true.copy()
    is_wrong = rng.random(60) < 0.15
    labels[is_wrong] = rng.integers(0, 4, is_wrong.sum())
    logits = rng.normal(size=(60, 4))
    logits[np.arange(60), true] += 2.5
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), labels


def test_suspects_match_values_by_hand():
    probabilities = np.array(
        [[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9], [0.3, 0.7], [0.55, 0.45]]
    )
    labels = np.array([0, 0, 0, 1, 1, 1])
    # The thresholds are the mean self-confidence of each class: (0.9 + 0.7 + 0.2) / 3 for class 0,
    # and (0.9 + 0.7 + 0.45) / 3 for class 1.
    assert label_errors.thresholds(probabilities, labels) == pytest.approx([0.6, 0.68333333])
    # For image 2, the probability of class 1 is 0.8, above the threshold of class 1. For image 5,
    # the probability of class 0 is 0.55, below the threshold of class 0.
    found = label_errors.find(probabilities, labels)
    assert found.rows.tolist() == [2]
    assert found.suggested.tolist() == [1]
    assert found.margin == pytest.approx([0.2 - 0.8])


def test_most_probable_label_is_not_suspect():
    """Image 1 is not suspect, because its label is the most probable class.

    The probability of class 1 for image 1 is above the threshold of class 1.
    """
    probabilities = np.array([[0.9, 0.1], [0.55, 0.45], [0.6, 0.4], [0.6, 0.4]])
    labels = np.array([0, 0, 1, 1])
    assert label_errors.thresholds(probabilities, labels) == pytest.approx([0.725, 0.4])
    assert not len(label_errors.find(probabilities, labels).rows)


def test_suggested_class_is_above_its_threshold():
    probabilities = np.array([[0.9, 0.05, 0.05], [0.2, 0.3, 0.5], [0.5, 0.35, 0.15]])
    found = label_errors.find(probabilities, np.array([0, 1, 2]))
    # For image 2, class 0 has the highest probability, 0.5, but the threshold of class 0 is 0.9. So
    # class 1 is suggested.
    assert dict(zip(found.rows.tolist(), found.suggested.tolist(), strict=True))[2] == 1


def test_suspects_match_cleanlab():
    # The expected rows are the result of cleanlab 2.9.0, which is not a dependency:
    # find_label_issues(labels, probabilities, filter_by="confident_learning",
    #                   return_indices_ranked_by="normalized_margin")
    probabilities, labels = _noisy()
    assert label_errors.find(probabilities, labels).rows.tolist() == [32, 2, 18, 44, 58, 31]


def test_float32_gives_the_same_suspects():
    probabilities, labels = _noisy()
    found = label_errors.find(probabilities.astype(np.float32), labels)
    np.testing.assert_array_equal(found.rows, label_errors.find(probabilities, labels).rows)


def test_class_without_images_is_never_suggested():
    probabilities = np.array([[0.1, 0.0, 0.9], [0.8, 0.1, 0.1], [0.2, 0.7, 0.1]])
    labels = np.array([0, 0, 1])
    assert np.isinf(label_errors.thresholds(probabilities, labels)[2])
    assert not len(label_errors.find(probabilities, labels).rows)


def test_labels_that_agree_are_not_suspect():
    probabilities = np.eye(3)[[0, 1, 2, 0]]
    assert not len(label_errors.find(probabilities, np.array([0, 1, 2, 0])).rows)
    assert not len(label_errors.find(np.empty((0, 3)), np.empty(0, int)).rows)
