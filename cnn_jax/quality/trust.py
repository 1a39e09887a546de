"""A model that estimates the probability that a prediction is correct, without its label.

The model is a logistic regression on ten features of a prediction. It is fitted on validation
images, of which most are corrupted (`corruptions.IMAGENET_C`), so that it has seen many predictions
that are wrong. The mean of its probabilities estimates the accuracy on a window of images.

The confidence of a network is not enough for this purpose: on corrupted images, networks are often
confident and wrong. Therefore the features also describe the embedding and the image.

Blind spot: images of a class that the network does not know. No corruption makes such images, and
the estimate can be much too high for them. Only labels show this.
"""

import dataclasses

import numpy as np
import scipy.linalg
import scipy.special
from jaxtyping import Bool, Float, Float64, Int

from cnn_jax.quality.reference import Predictions, Reference

# Probabilities are clipped to this distance from 0 and 1 before a logarithm.
_CLIP = 1e-6
# The ridge that makes the covariance of the embedding invertible, as a fraction of the mean
# variance. Some units of an embedding may never be active, and their variance is 0.
_RIDGE = 0.01
# The L2 penalty of the weights, as in scikit-learn with C=1.
_PENALTY = 1.0
# The total weight of the clean images as a fraction of the total weight of the corrupted images.
_CLEAN_WEIGHT = 0.5
# The number of images, with the mean accuracy, that are added to the images of each predicted
# class. The estimated accuracy of a class is clipped to the distance _MARGIN from 0 and 1.
_PRIOR_IMAGES, _MARGIN = 10, 0.01
_MAX_ITERATIONS = 50
# If an embedding is farther from its predicted class than this fraction of the images in the fit,
# the logistic model would extrapolate. The prediction then counts as a random guess.
_FAMILIAR = 0.99
# The column of the logarithm of this distance in `features`.
_LOG_DISTANCE = 2


def fit_embedding(
    embeddings: Float[np.ndarray, "n features"], labels: Int[np.ndarray, " n"], num_classes: int
) -> tuple[Float[np.ndarray, "classes features"], Float[np.ndarray, "features features"]]:
    """Returns the mean embedding of each class, and the covariance within the classes, float32.

    A class without images has the mean of all images.

    Args:
      embeddings: The embeddings of training images, one or more.
      labels: The classes of these images.
      num_classes: The number of classes.
    """
    embeddings = embeddings.astype(np.float64)
    counts = np.bincount(labels, minlength=num_classes)[:, np.newaxis]
    sums = np.zeros((num_classes, embeddings.shape[1]))
    np.add.at(sums, labels, embeddings)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), embeddings.mean(axis=0))
    residuals = embeddings - means[labels]
    covariance = residuals.T @ residuals / len(embeddings)
    return means.astype(np.float32), covariance.astype(np.float32)


class Distances:
    """Mahalanobis distances of embeddings from the means of the classes and from their centre."""

    def __init__(
        self,
        class_means: Float[np.ndarray, "classes features"],
        covariance: Float[np.ndarray, "features features"],
    ):
        """Creates the object from the values of `fit_embedding`."""
        matrix = covariance.astype(np.float64)
        # The smallest number makes the matrix invertible if all embeddings are equal.
        ridge = _RIDGE * np.trace(matrix) / len(matrix) + np.finfo(np.float32).tiny
        self._factor = np.linalg.cholesky(matrix + ridge * np.eye(len(matrix)))
        self._means = self._whiten(class_means)
        self._centre = self._means.mean(axis=0)

    def _whiten(self, rows: Float[np.ndarray, "n features"]) -> Float64[np.ndarray, "n features"]:
        rows = rows.astype(np.float64)
        return scipy.linalg.solve_triangular(self._factor, rows.T, lower=True).T

    def __call__(
        self, embeddings: Float[np.ndarray, "n features"]
    ) -> tuple[Float64[np.ndarray, "n classes"], Float64[np.ndarray, " n"]]:
        """Returns the distances from the mean of each class, and from the mean of these means."""
        rows = self._whiten(embeddings)
        # |x - m|^2 = |x|^2 - 2 x m + |m|^2 needs no array [n, classes, features].
        squares = (rows**2).sum(axis=1)[:, np.newaxis] + (self._means**2).sum(axis=1)
        squares -= 2 * rows @ self._means.T
        return np.sqrt(np.maximum(squares, 0)), np.linalg.norm(rows - self._centre, axis=1)


def statistics(distances: Distances, predictions: Predictions) -> Float[np.ndarray, "n 5"]:
    """Returns the values of `drift.STATISTICS` for each prediction, float32."""
    rows = np.arange(len(predictions))
    to_classes, _ = distances(predictions.embeddings)
    classes = predictions.classes
    columns = [to_classes[rows, classes], predictions.probabilities[rows, classes]]
    return np.column_stack([*columns, predictions.images]).astype(np.float32)


def fit_reference(
    class_means: Float[np.ndarray, "classes features"],
    covariance: Float[np.ndarray, "features features"],
    clean: Predictions,
    clean_labels: Int[np.ndarray, " n"],
    corrupted: Predictions,
    corrupted_labels: Int[np.ndarray, " m"],
) -> Reference:
    """Computes the reference statistics of a network and fits its trust model.

    Args:
      class_means: The first value of `fit_embedding`, for training images.
      covariance: The second value.
      clean: The predictions for validation images, one or more.
      clean_labels: The classes of these images.
      corrupted: The predictions for corrupted validation images.
      corrupted_labels: The classes of these images.
    """
    distances = Distances(class_means, covariance)
    clean_hits = clean.classes == clean_labels
    corrupted_hits = corrupted.classes == corrupted_labels
    accuracy = clean_hits.mean()
    partial = Reference(
        statistics=statistics(distances, clean),
        class_counts=np.bincount(clean.classes, minlength=len(class_means)),
        accuracy=np.asarray(accuracy),
        class_means=class_means,
        covariance=covariance,
        trust_classes=_class_log_odds(corrupted.classes, corrupted_hits, len(class_means)),
        trust_means=np.zeros(0),
        trust_scales=np.zeros(0),
        trust_weights=np.zeros(1),
        trust_limit=np.asarray(np.inf),
        trust_factor=np.ones(()),
    )
    # The arrays of the trust model are stored as float32, so that the last bits of a sum do not
    # change the bundle's digest.
    rows = np.concatenate([features(partial, distances, p) for p in (clean, corrupted)])
    hits = np.concatenate([clean_hits, corrupted_hits])
    weights = np.ones(len(hits))
    if len(corrupted):
        weights[: len(clean)] = _CLEAN_WEIGHT * len(corrupted) / len(clean)
    means, scales = rows.mean(axis=0), rows.std(axis=0) + _CLIP
    fitted = dataclasses.replace(
        partial,
        trust_means=means.astype(np.float32),
        trust_scales=scales.astype(np.float32),
        trust_weights=fit_logistic((rows - means) / scales, hits, weights).astype(np.float32),
        trust_limit=np.asarray(np.quantile(rows[:, _LOG_DISTANCE], _FAMILIAR), np.float32),
    )
    mean = correctness(fitted, distances, clean).mean()
    return dataclasses.replace(
        fitted, trust_factor=np.asarray(accuracy / max(mean, _CLIP), np.float32)
    )


def _class_log_odds(
    classes: Int[np.ndarray, " n"], hits: Bool[np.ndarray, " n"], num_classes: int
) -> Float[np.ndarray, " classes"]:
    """Returns the log-odds that a prediction of each class is correct on corrupted images.

    A network that does not recognise images often predicts the same few classes for them.
    """
    if not len(classes):
        return np.zeros(num_classes, np.float32)
    counts = np.bincount(classes, minlength=num_classes)
    correct = np.bincount(classes, hits, minlength=num_classes)
    rates = (correct + _PRIOR_IMAGES * hits.mean()) / (counts + _PRIOR_IMAGES)
    return scipy.special.logit(np.clip(rates, _MARGIN, 1 - _MARGIN)).astype(np.float32)


def features(
    reference: Reference, distances: Distances, predictions: Predictions
) -> Float64[np.ndarray, "n 10"]:
    """Returns the ten features of each prediction.

    They are the log-odds of the predicted class on corrupted images; the log-odds of the
    confidence; the logarithms of the distance from the predicted class, of the ratio of the
    distance from the nearest other class to this distance, and of the distance from the centre;
    the sparsity of the embedding; the logarithm of the contrast; how unusual the image is; and the
    products of the standardised distance with the sharpness and with the last feature.

    Args:
      reference: The reference statistics; the trust model is not used.
      distances: The distances with the means and the covariance of the reference.
      predictions: The predictions.
    """
    rows, classes = np.arange(len(predictions)), predictions.classes
    to_classes, to_centre = distances(predictions.embeddings)
    to_predicted = to_classes[rows, classes].copy()
    to_classes[rows, classes] = np.inf
    to_other = to_classes.min(axis=1, initial=np.finfo(np.float32).max)
    confidence = predictions.probabilities[rows, classes].astype(np.float64)
    magnitudes = np.abs(predictions.embeddings.astype(np.float64))
    norms = np.linalg.norm(magnitudes, axis=1)
    log_distance = np.log(to_predicted + _CLIP)
    known = reference.statistics.astype(np.float64)
    distance = _standardise(np.log(known[:, 0] + _CLIP), log_distance)
    images = _standardise(_image_scale(known[:, 2:]), _image_scale(predictions.images))
    unusual = np.log1p(np.linalg.norm(images, axis=1))
    return np.column_stack(
        [
            reference.trust_classes[classes],
            np.log((confidence + _CLIP) / (1 - confidence + _CLIP)),
            log_distance,
            np.log(to_other + _CLIP) - log_distance,
            np.log(to_centre + _CLIP),
            np.log((magnitudes.sum(axis=1) + _CLIP) / (norms + _CLIP)),
            np.log1p(predictions.images[:, 2].astype(np.float64)),
            unusual,
            distance * images[:, 1],
            distance * unusual,
        ]
    )


def _image_scale(images: Float[np.ndarray, "n 3"]) -> Float64[np.ndarray, "n 3"]:
    """Takes the logarithm of the sharpness and the contrast, but not of the brightness."""
    scaled = images.astype(np.float64)
    scaled[:, 1:] = np.log1p(scaled[:, 1:])
    return scaled


def _standardise(
    known: Float64[np.ndarray, "n *columns"], values: Float64[np.ndarray, "m *columns"]
) -> Float64[np.ndarray, "m *columns"]:
    """Subtracts the mean of `known` from `values`, and divides by its standard deviation."""
    return (values - known.mean(axis=0)) / (known.std(axis=0) + _CLIP)


def fit_logistic(
    rows: Float64[np.ndarray, "n features"],
    hits: Bool[np.ndarray, " n"],
    weights: Float64[np.ndarray, " n"],
) -> Float64[np.ndarray, " features+1"]:
    """Fits a logistic regression with an L2 penalty by Newton's method with step halving.

    Args:
      rows: Standardised features.
      hits: The outcome of each row.
      weights: The weight of each row.

    Returns:
      The weight of each feature, and the intercept, which has almost no penalty.
    """
    design = np.column_stack([rows, np.ones(len(rows))])
    penalty = np.append(np.full(rows.shape[1], _PENALTY), _CLIP)

    def loss(solution: np.ndarray) -> float:
        logits = design @ solution
        losses = np.logaddexp(0, logits) - hits * logits
        return float(weights @ losses + penalty @ solution**2 / 2)

    solution = np.zeros(design.shape[1])
    current = loss(solution)
    for _ in range(_MAX_ITERATIONS):
        rates = scipy.special.expit(design @ solution)
        gradient = design.T @ (weights * (rates - hits)) + penalty * solution
        curvature = (design.T * (weights * rates * (1 - rates))) @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        while (new := loss(solution - step)) > current and np.abs(step).max() > _CLIP:
            step = step / 2
        solution, current = solution - step, new
        if np.abs(step).max() <= _CLIP:
            break
    return solution


def correctness(
    reference: Reference, distances: Distances, predictions: Predictions
) -> Float64[np.ndarray, " n"]:
    """Returns the estimated probability, 0 to 1, that each prediction is correct."""
    rows = features(reference, distances, predictions)
    standardised = (rows - reference.trust_means) / reference.trust_scales
    logits = standardised @ reference.trust_weights[:-1] + reference.trust_weights[-1]
    is_familiar = rows[:, _LOG_DISTANCE] <= reference.trust_limit
    return np.where(is_familiar, scipy.special.expit(logits), 1 / len(reference.class_means))


def estimate_accuracy(
    reference: Reference, distances: Distances, predictions: Predictions
) -> float:
    """Returns the estimated accuracy, 0 to 1, on a window of images.

    The factor of the reference makes the estimate on the clean validation images equal to their
    accuracy.
    """
    mean = correctness(reference, distances, predictions).mean()
    return min(float(mean * reference.trust_factor), 1.0)
