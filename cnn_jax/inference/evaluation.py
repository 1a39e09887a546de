"""The metrics of a predictor on a split of a data set."""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from cnn_jax.data import Track, no_track
from cnn_jax.data.dataset import Dataset, choose_residency, open_dataset
from cnn_jax.data.pipeline import Loader, evaluation_batches
from cnn_jax.data.sources import absolute, open_source
from cnn_jax.data.splits import Division
from cnn_jax.inference.batching import BATCH_SIZE, map_batches
from cnn_jax.inference.calibration import log_probabilities
from cnn_jax.inference.predictor import Predictor, TrainedPredictor
from cnn_jax.system.errors import ConfigError, DataError
from cnn_jax.training.metrics import HEADLINE, agreement_p_value, full_report

logger = logging.getLogger(__name__)


def evenly_spaced(indices: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " m"]:
    """Returns `count` of the indices, spread evenly over them; all indices if there are fewer."""
    count = min(count, len(indices))
    return indices[np.linspace(0, len(indices) - 1, count).astype(int)]


def image_batches(
    loader: Loader,
    indices: Int[np.ndarray, " n"],
    track: Track = no_track,
    description: str = "loading images",
) -> Generator[UInt8[np.ndarray, "_batch height width 3"]]:
    """Yields images of a data set in batches of `BATCH_SIZE`; the last batch may be smaller.

    Args:
      loader: The loader of the source.
      indices: The positions of the examples in the source.
      track: Shows progress.
      description: The text beside the progress.
    """
    with evaluation_batches(loader, indices, BATCH_SIZE) as batches:
        num_batches = math.ceil(len(indices) / BATCH_SIZE)
        for batch in track(batches, description, num_batches):
            # The padding is at the end of the batch.
            yield batch["image"][: int(batch["mask"].sum())]


def map_split(
    function: Callable[[UInt8[np.ndarray, "_batch height width 3"]], Any],
    loader: Loader,
    indices: Int[np.ndarray, " n"],
    track: Track = no_track,
    description: str = "measuring",
) -> np.ndarray:
    """Applies a function to batches of images of a data set.

    Args:
      function: Takes images and returns an array with one row for each image. It treats the
        images independently.
      loader: The loader of the source.
      indices: The positions of the examples in the source, one or more.
      track: Shows progress.
      description: The text beside the progress.

    Returns:
      The rows in the order of `indices`.
    """
    batches = image_batches(loader, indices, track, description)
    with contextlib.closing(batches):  # Stops the loader's threads, also after an error.
        return np.concatenate(list(map_batches(function, batches, BATCH_SIZE)))


def predict_split(
    predictor: Predictor,
    loader: Loader,
    indices: Int[np.ndarray, " n"],
    track: Track = no_track,
    description: str = "measuring",
) -> Float[np.ndarray, "n classes"]:
    """Predicts the class probabilities of images of a data set.

    Args:
      predictor: A loaded bundle or any other predictor.
      loader: The loader of the source.
      indices: The positions of the examples in the source.
      track: Shows progress.
      description: The text beside the progress.

    Returns:
      Probabilities, float32, in the order of `indices`.
    """
    if not len(indices):
        return np.empty((0, len(predictor.class_names)), np.float32)
    return map_split(predictor, loader, indices, track, description)


def score(
    probabilities: Float[np.ndarray, "n classes"],
    labels: Int[np.ndarray, " n"],
    class_names: list[str],
) -> dict[str, Any]:
    """Computes the metrics of a split from probabilities and labels; see `metrics.full_report`."""
    num_classes = len(class_names)
    predictions = probabilities.argmax(axis=1)
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    losses = -log_probabilities(probabilities)[np.arange(len(labels)), labels]
    return full_report(cells.reshape(num_classes, num_classes), losses, class_names)


def bundle_metrics(report: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the metrics that a bundle stores; see `Bundle`.

    Args:
      report: The value of `score` for each split.
    """
    return {
        split: {
            **{key: metrics[key] for key in HEADLINE},
            # The explanation methods get a verdict only if this p-value shows that the network is
            # better than guessing.
            "agreement_p_value": agreement_p_value(np.array(metrics["confusion"])),
        }
        for split, metrics in report.items()
    }


def evaluate(
    predictor: Predictor, dataset: Dataset, split: str = "test", track: Track = no_track
) -> dict[str, Any]:
    """Computes the metrics of a predictor on a split of a data set.

    Args:
      predictor: A loaded bundle or any other predictor.
      dataset: A data set without classes that the predictor does not know; see
        `open_as_trained`.
      split: "train", "validation", "test" or "all".
      track: Shows progress.

    Returns:
      The metrics as JSON types; see `metrics.full_report`.

    Raises:
      DataError: The data set has a class that the predictor does not know, or the split is
        empty.
    """
    indices, labels = labelled_split(predictor, dataset, split)
    source = dataset.source
    absent = sorted(set(predictor.class_names) - set(source.class_names))
    if absent:
        logger.warning(
            "%s has no images of %s: they count 0 in the means of precision, recall and F1",
            source.name,
            ", ".join(absent),
        )
    probabilities = predict_split(predictor, dataset.loader, indices, track)
    return score(probabilities, labels, predictor.class_names)


def labelled_split(
    predictor: Predictor, dataset: Dataset, split: str, *, warn: bool = True
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Returns the positions of a split's images, and their labels in the predictor's class order.

    Args:
      predictor: A loaded bundle or any other predictor.
      dataset: The data set.
      split: "train", "validation", "test" or "all".
      warn: Whether to log a warning if the network may have been trained on some of the images.

    Returns:
      The positions of the images in the source, and the position of each image's class in
      the predictor's class names.

    Raises:
      DataError: The data set has a class that the predictor does not know, or the split is
        empty.
    """
    source = dataset.source
    unknown = sorted(set(source.class_names) - set(predictor.class_names))
    if unknown:
        raise DataError(
            f"{source.name} has classes that the bundle does not know: {', '.join(unknown)}; "
            f"it knows {', '.join(predictor.class_names)}"
        )
    indices = np.arange(len(source)) if split == "all" else dataset.splits[split]
    if not len(indices):
        raise DataError(f"{source.name} has no images in its {split} split")
    if warn and isinstance(predictor, TrainedPredictor):
        _warn_of_training_images(predictor, dataset, split)
    to_predictor = np.array([predictor.class_names.index(name) for name in source.class_names])
    return indices, to_predictor[source.labels[indices]]


def _warn_of_training_images(predictor: TrainedPredictor, dataset: Dataset, split: str) -> None:
    """Logs a warning if a bundle's network may have been trained on images of a split."""
    source = dataset.source
    is_same_data = dataset.fingerprint == predictor.data["fingerprint"]
    if split == "all" and (is_same_data or source.name == predictor.data["source"]):
        logger.warning(
            "%s is the data that the bundle was trained on, so --split=all includes the training "
            "images and the metrics are higher than on new images; --split=test measures only "
            "images that the network was not trained on",
            source.name,
        )
    elif split != "all" and not is_same_data:
        # If the images are only more than in training, most of them are training images.
        is_new = source.name != predictor.data["source"]
        logger.warning(
            "%s is not the data that the bundle was trained on: the network may have been "
            "trained on images of its %s split if the two share images%s",
            source.name,
            split,
            "; --split=all measures all images" * is_new,
        )


def open_as_trained(
    predictor: TrainedPredictor,
    source: str | None = None,
    track: Track = no_track,
    *,
    residency: str = "auto",
    grouped: bool = True,
    max_unreadable: float | None = None,
    allow_outside: bool = False,
    with_digests: bool = False,
) -> Dataset:
    """Opens a data source, and splits it as the training data of a bundle was split.

    By default the images are decoded once and cached, as in training.

    Args:
      predictor: A loaded bundle.
      source: The name of a source; by default the source of the bundle.
      track: Shows progress.
      residency: "auto" or one of `schema.RESIDENCIES`; "none": no image is cached.
      grouped: Whether to apply the pattern of the bundle's `data.group`, which the paths of
        other data may not match.
      max_unreadable: The largest fraction of images that may be unreadable, 0 to 1; by default
        the value in training.
      allow_outside: Whether links and paths may lead out of the data's folder, even if
        training did not allow it.
      with_digests: See `dataset.open_dataset`.

    Returns:
      The data set.

    Raises:
      ConfigError: The name has none of the forms of a source.
      DataError: The data cannot be used, or too many images are unreadable.
    """
    data = predictor.data
    name = absolute(source or data["source"])
    listing = open_source(name, track, allow_outside or data["allow_outside"])
    division = Division.from_dict(data["division"])
    return open_dataset(
        listing,
        division if grouped else dataclasses.replace(division, group=""),
        predictor.preprocessing,
        max_unreadable=data["max_unreadable"] if max_unreadable is None else max_unreadable,
        residency=choose_residency(residency, listing, predictor.preprocessing, device_bytes=0),
        with_digests=with_digests,
        track=track,
    )


def check_unseen(
    predictor: TrainedPredictor,
    path: str | os.PathLike[str],
    dataset: Dataset,
    source: str | None = None,
    track: Track = no_track,
) -> None:
    """Checks that a network was not trained on the images that measure another network.

    Images are compared by their pixels, because copies of an image may have other names.

    Args:
      predictor: The network, a loaded bundle.
      path: The path of the bundle, for messages.
      dataset: The data with the splits of the other network.
      source: The name of the bundle's training data; by default the name in the bundle.
      track: Shows progress.

    Raises:
      DataError: The network was trained on validation or test images of `dataset`, or was
        validated on its test images, or its training data has changed or cannot be opened.
    """
    if predictor.data["fingerprint"] == dataset.fingerprint:
        return
    try:
        own = open_as_trained(predictor, source, track, residency="none")
    except (ConfigError, DataError) as error:
        raise DataError(f"{path}: its training data cannot be opened: {error}") from error
    if own.fingerprint != predictor.data["fingerprint"]:
        raise DataError(
            f"{own.source.name} is not the data that {path} was trained on, or has changed, so the "
            "images that its network has seen are unknown; restore this data, or train again"
        )
    for split, used in (("test", ("train", "validation")), ("validation", ("train",))):
        seen = {own.contents[i] for name in used for i in own.splits[name]}
        contents = [dataset.contents[i] for i in dataset.splits[split]]
        if count := sum(content in seen for content in contents):
            raise DataError(
                f"{path} was trained on other splits: it has seen {count:,} of the "
                f"{len(contents):,} {split} images of {dataset.source.name}, so the metrics would "
                "be too good; train it with the same splits (data.split_seed, data.fold)"
            )
