"""Calibration of probabilities: metrics, temperature scaling, and selective prediction.

All arrays are NumPy arrays. `probabilities` are [n, classes] with rows that sum to 1, and `labels`
are [n]. The computation is float64. The confidence of a prediction is its largest probability.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

NUM_BINS = 15

Probabilities = Float[np.ndarray, "n classes"]
Labels = Int[np.ndarray, " n"]

# The maximum number of probabilities that `fit_temperature` uses. This number is enough to fit the
# temperature to three digits, and the fit takes only seconds.
_MAX_PROBABILITIES = 2**23
# The logarithm of the highest allowed temperature. Temperatures range from 1/100 to 100.
_MAX_LOG_TEMPERATURE = math.log(100)


def log_probabilities(probabilities: Probabilities) -> Float[np.ndarray, "n classes"]:
    """Returns the logarithms of probabilities; 0 is replaced by the smallest normal float32.

    All logarithms are therefore finite.
    """
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))


def apply_temperature(probabilities: Probabilities, temperature: float) -> Probabilities:
    """Returns the probabilities, float64, after the logits are divided by a temperature."""
    logits = log_probabilities(probabilities) / temperature
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def fit_temperature(probabilities: Probabilities, labels: Labels) -> float:
    """Fits the temperature by maximum likelihood (Guo et al. 2017, section 4.2).

    The logarithm of the temperature has a standard normal prior, which weighs about as much as
    one image. The prior keeps the temperature near 1 with very few images, and finite if all
    predictions are correct. With a hundred images the influence of the prior is negligible.

    Args:
      probabilities: The probabilities of a network without temperature scaling.
      labels: The true classes.

    Returns:
      The temperature; 1 without images.
    """
    if not len(labels):
        return 1.0
    # The import takes 0.2 s, and prediction does not need it.
    import scipy.optimize
    import scipy.special

    # If there are more than _MAX_PROBABILITIES probabilities, only every k-th image is used. Data
    # sets are sorted by class, so the fraction of each class hardly changes.
    step = math.ceil(probabilities.size / _MAX_PROBABILITIES)
    probabilities, labels = probabilities[::step], labels[::step]
    logits = log_probabilities(probabilities)
    label_logits = logits[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        losses = scipy.special.logsumexp(logits * inverse, axis=1) - label_logits * inverse
        return losses.sum() + log_temperature**2 / 2

    bounds = (-_MAX_LOG_TEMPERATURE, _MAX_LOG_TEMPERATURE)
    result = scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded")
    return math.exp(result.x)


def bin_numbers(
    confidence: Float[np.ndarray, " n"], num_bins: int = NUM_BINS
) -> Int[np.ndarray, " n"]:
    """Returns the bin of each confidence, from 0; the bins are equally wide, from 0 to 1.

    A bin includes its upper edge.
    """
    return np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)


def reliability(
    probabilities: Probabilities, labels: Labels, num_bins: int = NUM_BINS
) -> dict[str, list[float]]:
    """Returns the values of a reliability diagram, which compares confidence with accuracy.

    Args:
      probabilities: The probabilities of images.
      labels: The true classes.
      num_bins: The number of bins of the confidence; see `bin_numbers`.

    Returns:
      Lists with one value for each bin: "count", the number of images; and "confidence" and
      "accuracy", means over the images of the bin, or 0 without images.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    hits = probabilities.argmax(axis=1) == labels
    bins = bin_numbers(confidence, num_bins)
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
    """Returns the expected calibration error (Naeini et al. 2015).

    Returns:
      The mean absolute difference between confidence and accuracy over the bins of
      `reliability`, weighted by their numbers of images, 0 to 1; 0 without images.
    """
    bins = reliability(probabilities, labels, num_bins)
    distance = np.abs(np.subtract(bins["confidence"], bins["accuracy"]))
    return float(np.dot(bins["count"], distance) / max(len(labels), 1))


def brier_score(probabilities: Probabilities, labels: Labels) -> float:
    """Returns the Brier score (Brier 1950).

    Returns:
      The mean squared distance between the probabilities and the one-hot labels, 0 to 2; 0
      without images.
    """
    errors = probabilities.astype(np.float64)
    errors[np.arange(len(labels)), labels] -= 1
    return float((errors**2).sum() / max(len(labels), 1))


def negative_log_likelihood(probabilities: Probabilities, labels: Labels) -> float:
    """Returns the mean of -log(probability of the true class), in nats; 0 for no images."""
    logits = log_probabilities(probabilities)
    return float(-logits[np.arange(len(labels)), labels].sum() / max(len(labels), 1))


def mutual_information(
    predictions: Float[np.ndarray, "predictors n classes"],
) -> Float[np.ndarray, " n"]:
    """Returns the disagreement of several predictors about each image, in nats.

    The disagreement is the entropy of the mean of the probabilities minus the mean of their
    entropies: the mutual information of the class and the predictor (Houlsby et al. 2011, BALD).

    Args:
      predictions: The probabilities of each predictor for each image.

    Returns:
      0 if all predictors have the same probabilities; at most the logarithm of the number of
      predictors, or of classes if there are fewer.
    """
    predictions = predictions.astype(np.float64)
    entropy_of_mean = _entropy(predictions.mean(axis=0))
    mean_entropy = _entropy(predictions).mean(axis=0)
    # A rounding error can make the difference of equal numbers negative.
    return np.maximum(entropy_of_mean - mean_entropy, 0.0)


def _entropy(probabilities: Float[np.ndarray, "*n classes"]) -> Float[np.ndarray, "*n"]:
    """Returns the entropy in nats; a probability of 0 adds nothing."""
    logarithms = np.log(np.where(probabilities > 0, probabilities, 1))
    return -(probabilities * logarithms).sum(axis=-1)


def describe(probabilities: Probabilities, labels: Labels) -> dict[str, Any]:
    """Returns all calibration metrics of this module as JSON types."""
    return {
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
        "brier_score": brier_score(probabilities, labels),
        "loss": negative_log_likelihood(probabilities, labels),
        "reliability": reliability(probabilities, labels),
    }


def coverage(
    probabilities: Probabilities, labels: Labels, num_points: int = 100
) -> dict[str, list[float]]:
    """Returns the risk-coverage curve of selective prediction (El-Yaniv and Wiener 2010).

    Selective prediction rejects the images with the lowest confidence. Images with equal
    confidence are kept or rejected together.

    Args:
      probabilities: The probabilities of images.
      labels: The true classes.
      num_points: The maximum number of points.

    Returns:
      Lists with one value for each point, empty without images: "coverage", the fraction of
      images that are kept, increasing to 1; "accuracy", on the kept images; and "confidence",
      the lowest confidence of a kept image.
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
