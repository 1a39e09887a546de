"""How far probabilities can be trusted: calibration, temperature scaling, selective prediction.

Arrays of the host, float64. Probabilities are [n, classes], whose rows sum to 1; labels [n]. An
image's confidence is its largest probability.
"""

import math
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float, Int

NUM_BINS = 15

Probabilities = Float[np.ndarray, "n classes"]
Labels = Int[np.ndarray, " n"]

# Probabilities that a temperature is fitted on: enough for three digits, in seconds.
_MOST = 2**23
# Of the logarithm of a temperature that is searched for.
_REACH = math.log(100)


def log_probabilities(probabilities: Probabilities) -> Float[np.ndarray, "n classes"]:
    """Logarithms, finite: a float32 probability can be 0 where its logarithm would not be."""
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))


def apply_temperature(probabilities: Probabilities, temperature: float) -> Probabilities:
    """The softmax of the same logits divided by a temperature; float64."""
    return scipy.special.softmax(log_probabilities(probabilities) / temperature, axis=1)


def fit_temperature(probabilities: Probabilities, labels: Labels) -> float:
    """The temperature that makes these labels most probable (Guo et al. 2017, section 4.2).

    With a prior of about one image's weight, a standard normal one of its logarithm: it is
    nothing beside a hundred images, and keeps the temperature near 1 where there are hardly
    any, or finite and positive where all of them are right.

    Returns:
      1 for no images.
    """
    if not len(labels):
        return 1.0
    # Of very many, every so many will do: neighbours are of one class, so each keeps its share.
    step = math.ceil(probabilities.size / _MOST)
    probabilities, labels = probabilities[::step], labels[::step]
    logits = log_probabilities(probabilities)
    of_labels = logits[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        losses = scipy.special.logsumexp(logits * inverse, axis=1) - of_labels * inverse
        return losses.sum() + log_temperature**2 / 2

    found = scipy.optimize.minimize_scalar(loss, bounds=(-_REACH, _REACH), method="bounded")
    return math.exp(found.x)


def reliability(
    probabilities: Probabilities, labels: Labels, num_bins: int = NUM_BINS
) -> dict[str, list[float]]:
    """A reliability diagram: what confidence promises and what accuracy keeps.

    Bins of equal width divide (0, 1]; the upper edge belongs to a bin.

    Returns:
      "count", "confidence" and "accuracy" (means, 0 where there is no image) of each bin.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    hits = probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    count, sum_of_confidence, sum_of_hits = (
        np.bincount(bins, weights, num_bins)
        for weights in (np.ones_like(confidence), confidence, hits)
    )
    divisor = np.maximum(count, 1)
    return {
        "count": count.astype(int).tolist(),
        "confidence": (sum_of_confidence / divisor).tolist(),
        "accuracy": (sum_of_hits / divisor).tolist(),
    }


def expected_calibration_error(
    probabilities: Probabilities, labels: Labels, num_bins: int = NUM_BINS
) -> float:
    """The mean distance of confidence and accuracy over bins (Naeini et al. 2015), 0 to 1.

    0 for no images.
    """
    bins = reliability(probabilities, labels, num_bins)
    distance = np.abs(np.subtract(bins["confidence"], bins["accuracy"]))
    return float(np.dot(bins["count"], distance) / max(len(labels), 1))


def brier_score(probabilities: Probabilities, labels: Labels) -> float:
    """The mean squared distance from the truth, over all classes (Brier 1950), 0 to 2.

    0 for no images.
    """
    errors = probabilities.astype(np.float64)
    errors[np.arange(len(labels)), labels] -= 1
    return float((errors**2).sum() / max(len(labels), 1))


def negative_log_likelihood(probabilities: Probabilities, labels: Labels) -> float:
    """The mean of -log p of the true class, in nats; 0 for no images."""
    logits = log_probabilities(probabilities)
    return float(-logits[np.arange(len(labels)), labels].sum() / max(len(labels), 1))


def describe(probabilities: Probabilities, labels: Labels) -> dict[str, Any]:
    """All of it, as JSON types."""
    return {
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
        "brier_score": brier_score(probabilities, labels),
        "loss": negative_log_likelihood(probabilities, labels),
        "reliability": reliability(probabilities, labels),
    }


def coverage(
    probabilities: Probabilities, labels: Labels, num_points: int = 100
) -> dict[str, list[float]]:
    """Accuracy of the images that are kept when the least confident are refused.

    (El-Yaniv and Wiener 2010.) Images of equal confidence are kept or refused together.

    Returns:
      "coverage" (the share kept, rising to 1), "accuracy" (of those kept) and "confidence"
      (the least that is kept), at most `num_points` of each; empty for no images.
    """
    confidence = probabilities.max(axis=1)
    hits = probabilities.argmax(axis=1) == labels
    order = np.argsort(-confidence, kind="stable")
    confidence, hits = confidence[order], hits[order]
    kept = np.arange(1, len(labels) + 1)
    is_last = np.append(confidence[1:] != confidence[:-1], True)[: len(labels)]
    accuracy = np.cumsum(hits) / kept
    points = np.flatnonzero(is_last)
    if len(points) > num_points:
        points = points[np.linspace(0, len(points) - 1, num_points).round().astype(int)]
    return {
        "coverage": (kept[points] / max(len(labels), 1)).tolist(),
        "accuracy": accuracy[points].tolist(),
        "confidence": confidence[points].astype(float).tolist(),
    }
