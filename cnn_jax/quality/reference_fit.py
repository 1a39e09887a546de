"""Measures the reference statistics of a network on its training and validation images."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from cnn_jax.data import Track, no_track
from cnn_jax.data.pipeline import Loader
from cnn_jax.inference.batching import BATCH_SIZE, map_batches
from cnn_jax.inference.evaluation import image_batches
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.quality.corruptions import CORRUPTIONS, IMAGENET_C, SEVERITIES
from cnn_jax.quality.image_statistics import image_statistics
from cnn_jax.quality.reference import Predictions
from cnn_jax.quality.robustness import read_ahead, stratified_sample
from cnn_jax.quality.trust import fit_embedding

# The maximum numbers of training images for the means and the covariance of the embedding, of
# validation images for the statistics, and of validation images that are corrupted.
_TRAINING_IMAGES, _VALIDATION_IMAGES, _CORRUPTED_IMAGES = 4_000, 4_000, 1_000
# The number of corruptions of each of these images.
_COPIES = 6
_CONDITIONS = tuple(itertools.product(IMAGENET_C, SEVERITIES))

# A function that predicts the images at some positions of a list, and a function that divides this
# work among the processes of a run.
_Predict = Callable[[np.ndarray], Predictions]
Share = Callable[[_Predict, int], Predictions]
# A function that takes batches of images and the positions of these images.
_Change = Callable[[Iterable[np.ndarray], np.ndarray], Iterable[np.ndarray]]


def measure_samples(
    predictor: BundlePredictor,
    loader: Loader,
    splits: Mapping[str, Int[np.ndarray, " _n"]],
    labels: Int[np.ndarray, " n"],
    track: Track = no_track,
    share: Share = lambda predict, count: predict(np.arange(count)),
    seed: int = 0,
) -> dict[str, Any]:
    """Predicts the images from which `trust.fit_reference` makes the reference statistics.

    At most 4,000 training images, 4,000 validation images and 6,000 corrupted images are predicted.

    Args:
      predictor: The network.
      loader: The loader of the training data; its pixels are on the host.
      splits: The positions of the images of each split.
      labels: The position of each image's class in the predictor's class names.
      track: Shows progress.
      share: Calls its first argument with all positions below its second argument; the processes
        of a run may share the positions.
      seed: Seed of the samples and of the corruptions.

    Returns:
      The arguments of `trust.fit_reference` by name.
    """

    def draw(split: str, size: int) -> Int[np.ndarray, " m"]:
        indices = splits[split]
        return indices[stratified_sample(labels[indices], size, seed)]

    def predict(
        indices: Int[np.ndarray, " m"], name: str, change: _Change = lambda batches, _: batches
    ) -> Predictions:
        def predict_some(positions: Int[np.ndarray, " k"]) -> Predictions:
            batches = image_batches(loader, indices[positions], track, f"reference: {name}")
            with contextlib.closing(batches):  # Stops the loader's threads, also after an error.
                return predict_batches(predictor, change(batches, positions))

        return share(predict_some, len(indices))

    train, validation = draw("train", _TRAINING_IMAGES), draw("validation", _VALIDATION_IMAGES)
    to_corrupt = np.repeat(draw("validation", _CORRUPTED_IMAGES), _COPIES)
    embeddings = predict(train, "training images").embeddings
    means, covariance = fit_embedding(embeddings, labels[train], len(predictor.class_names))
    return {
        "class_means": means,
        "covariance": covariance,
        "clean": predict(validation, "validation images"),
        "clean_labels": labels[validation],
        "corrupted": predict(
            to_corrupt, "corrupted images", functools.partial(_corrupt, seed=seed)
        ),
        "corrupted_labels": labels[to_corrupt],
    }


def condition(position: int, seed: int = 0) -> tuple[str, int]:
    """Returns the corruption and the severity of a corrupted image.

    Args:
      position: The position of the image among the corrupted images of `measure_samples`.
      seed: The seed of the corruptions.
    """
    number, copy = divmod(position, _COPIES)
    order = np.random.default_rng([seed, number]).permutation(len(_CONDITIONS))
    return _CONDITIONS[order[copy]]


def predict_batches(
    predictor: BundlePredictor, batches: Iterable[UInt8[np.ndarray, "_batch height width 3"]]
) -> Predictions:
    """Returns the predictions for batches of preprocessed images, and the images' statistics."""
    images: list[tuple[float, float, float]] = []

    def count_batches() -> Iterator[UInt8[np.ndarray, "_batch height width 3"]]:
        for batch in batches:
            images.extend(image_statistics(image) for image in batch)
            yield batch

    head = predictor.variables["params"]["head"]["kernel"]
    parts = [
        (np.empty((0, head.shape[1]), np.float32), np.empty((0, head.shape[0]), np.float32)),
        *map_batches(predictor.predict_with_embeddings, count_batches(), BATCH_SIZE),
    ]
    probabilities, embeddings = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Predictions(probabilities, embeddings, np.array(images, np.float32).reshape(-1, 3))


def _corrupt(
    batches: Iterable[UInt8[np.ndarray, "_batch height width 3"]],
    positions: Int[np.ndarray, " n"],
    seed: int,
) -> Iterator[UInt8[np.ndarray, "_batch height width 3"]]:
    """Corrupts each image; threads compute the next batches.

    The corruption of an image is a function of its position and the seed. Consecutive positions,
    which have the same image, have different corruptions.
    """

    def work(
        item: tuple[int, UInt8[np.ndarray, "_batch height width 3"]],
    ) -> UInt8[np.ndarray, "_batch height width 3"]:
        start, batch = item
        images = []
        for image, position in zip(batch, positions[start:].tolist(), strict=False):
            name, severity = condition(position, seed)
            images.append(CORRUPTIONS[name](image, severity, position // _COPIES))
        return np.stack(images)

    starts = itertools.count(0, BATCH_SIZE)
    return read_ahead(work, zip(starts, batches, strict=False))
