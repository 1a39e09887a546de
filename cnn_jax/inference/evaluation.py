"""The metrics of a predictor on a split of a data set."""

import dataclasses
import logging
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cnn_jax.data import Track, no_track
from cnn_jax.data.dataset import Dataset, choose_residency, open_dataset
from cnn_jax.data.pipeline import Loader, evaluation_batches
from cnn_jax.data.sources import absolute, open_source
from cnn_jax.data.splits import Division
from cnn_jax.inference.calibration import log_probabilities
from cnn_jax.inference.predictor import BATCH_SIZE, Predictor
from cnn_jax.system.errors import DataError
from cnn_jax.training.metrics import full_report

logger = logging.getLogger(__name__)


def predict_split(
    predictor: Predictor,
    loader: Loader,
    indices: Int[np.ndarray, " n"],
    track: Track = no_track,
    description: str = "measuring",
) -> Float[np.ndarray, "n classes"]:
    """Probabilities of these examples of a loader's source, in their order, float32."""
    rows = [np.empty((0, len(predictor.class_names)), np.float32)]
    with evaluation_batches(loader, indices, BATCH_SIZE) as batches:
        num_batches = math.ceil(len(indices) / BATCH_SIZE)
        for batch in track(batches, description, num_batches):
            rows.append(predictor(batch["image"])[batch["mask"]])
    return np.concatenate(rows)


def score(
    probabilities: Float[np.ndarray, "n classes"],
    labels: Int[np.ndarray, " n"],
    class_names: list[str],
) -> dict[str, Any]:
    """All figures of a split from its probabilities; see `metrics.full_report`."""
    num_classes = len(class_names)
    predictions = probabilities.argmax(axis=1)
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    losses = -log_probabilities(probabilities)[np.arange(len(labels)), labels]
    return full_report(cells.reshape(num_classes, num_classes), losses, class_names)


def evaluate(
    predictor: Predictor, dataset: Dataset, split: str = "test", track: Track = no_track
) -> dict[str, Any]:
    """Figures of a split of a data set.

    Args:
      predictor: A loaded bundle.
      dataset: Any whose classes the bundle knows; see `open_as_trained`.
      split: "train", "validation", "test" or "all".
      track: Shows progress.

    Raises:
      DataError: The data has a class that the bundle does not know, or the
        split is empty.
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
    predictor: Predictor, dataset: Dataset, split: str
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The positions of a split's images, and their labels as the bundle numbers them.

    Warns if the data is not that of the bundle.

    Raises:
      DataError: The data has a class that the bundle does not know, or the
        split is empty.
    """
    source = dataset.source
    unknown = sorted(set(source.class_names) - set(predictor.class_names))
    if unknown:
        raise DataError(
            f"{source.name} has classes that the bundle does not know: {', '.join(unknown)}; "
            f"it knows {', '.join(predictor.class_names)}"
        )
    if split != "all" and dataset.fingerprint != predictor.data["fingerprint"]:
        logger.warning(
            "%s is not the data that the bundle was trained on: its %s split may hold images "
            "that were trained on if it shares some; --split=all takes everything",
            source.name,
            split,
        )
    indices = np.arange(len(source)) if split == "all" else dataset.splits[split]
    if not len(indices):
        raise DataError(f"{source.name} has no images in its {split} split")
    to_bundle = np.array([predictor.class_names.index(name) for name in source.class_names])
    return indices, to_bundle[source.labels[indices]]


def open_as_trained(
    predictor: Predictor,
    source: str | None = None,
    track: Track = no_track,
    *,
    grouped: bool = True,
    max_unreadable: float | None = None,
    allow_outside: bool = False,
) -> Dataset:
    """Opens a source and divides it as the bundle's was when it was trained.

    Its images are decoded once and kept, as training keeps them.

    Args:
      predictor: A loaded bundle.
      source: The name of a source; by default that of the bundle.
      track: Shows progress.
      grouped: Whether the bundle's groups stay together; other data may have none.
      max_unreadable: The largest share of images that may be unreadable; by default
        that of the bundle.
      allow_outside: Whether links and paths may lead out of the data's folder, even
        if the bundle's might not.

    Raises:
      ConfigError: No source has a name of this form.
      DataError: The data cannot be used, or too much of it is unreadable.
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
        residency=choose_residency("auto", listing, predictor.preprocessing, device_bytes=0),
        track=track,
    )
