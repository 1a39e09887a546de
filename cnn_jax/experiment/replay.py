"""Compares two versions of a model by logged images with labels."""

import dataclasses
import datetime
import logging
import tempfile
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cnn_jax.data import Track, no_track
from cnn_jax.data.decode import decode
from cnn_jax.data.request_log import (
    Folders,
    Key,
    read_images,
    read_requests,
    read_valid_feedback,
)
from cnn_jax.data.resize import resize
from cnn_jax.experiment.analysis import analyse_pairs
from cnn_jax.experiment.observations import check_unique
from cnn_jax.inference.exported import load_predictor
from cnn_jax.inference.protocol import TrainedPredictor
from cnn_jax.registry.ledger import Version
from cnn_jax.registry.registry import Registry
from cnn_jax.registry.split import ARMS
from cnn_jax.system.errors import ConfigError, DataError, printable
from cnn_jax.system.text import utc

logger = logging.getLogger(__name__)
_BATCH = 64


class NoLabelsError(DataError):
    """The logs have no labelled image of the model, with its pixels, in the period."""


def replay(
    registry: Registry,
    challenger: Version,
    champion: Version,
    folders: Folders,
    since: float | None = None,
    track: Track = no_track,
    *,
    keys: Container[Key] | None = None,
) -> dict[str, Any]:
    """Lets two versions predict the same logged images, and compares them by the labels.

    Args:
      registry: The registry of the versions.
      challenger: A version.
      champion: The version that it is compared with.
      folders: The folders of request logs with images.
      since: Only later images count, in seconds since the epoch. By default, the time at which the
        newer version was added to the registry: a version may have been trained on older images.
      track: Shows progress.
      keys: The request ids and image indices of the images to use; by default all images.

    Returns:
      The values of `analyse_pairs`, of JSON types; and the "versions", "since", and "copies", the
      number of images that were left out because they are equal to other images.

    Raises:
      BundleError: A version is damaged.
      ConfigError: Both versions are the same.
      NoLabelsError: The logs have no labelled image of the model in the period.
      DataError: A log cannot be used.
    """
    if challenger.number == champion.number:
        raise ConfigError(f"both versions are {champion}: name two versions")
    if since is None:
        since = max(
            datetime.datetime.fromisoformat(version.time).timestamp()
            for version in (challenger, champion)
        )
    images, labels, copies = _read(folders, champion.model, since, keys)
    correct = []
    for version in (challenger, champion):
        with tempfile.TemporaryDirectory(prefix="cnn_jax-") as folder:
            predictor = load_predictor(registry.fetch(version, folder))
        predicted = _predict(predictor, images, str(version), track)
        correct.append(np.array(predicted) == np.array(labels))
    return {
        "model": champion.model,
        "versions": dict(zip(ARMS, (champion.number, challenger.number), strict=True)),
        "since": utc(since),
        "copies": copies,
        **analyse_pairs(np.stack(correct, axis=1)),
    }


def _predict(
    predictor: TrainedPredictor, images: Sequence[bytes], name: str, track: Track
) -> list[str]:
    """Returns the predicted classes of images, each PNG; a warning says if sizes differ."""
    # The log has the images after cropping.
    preprocessing = dataclasses.replace(predictor.preprocessing, crop_ratio=1.0)
    is_resized, predicted = False, []
    batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    for batch in track(batches, f"predicting with {name}", len(batches)):
        decoded = list(map(decode, batch))
        is_resized |= any(one.shape[:2] != preprocessing.image_size for one in decoded)
        pixels = np.stack([resize(one, preprocessing) for one in decoded])
        best = predictor(pixels).argmax(axis=1).tolist()
        predicted += [predictor.class_names[index] for index in best]
    if is_resized:
        logger.warning(
            "%s reads images of %d x %d pixels, and the log has images of other sizes: its "
            "accuracy may be lower than on the original images",
            name,
            *preprocessing.image_size,
        )
    return predicted


def _read(
    folders: Folders, model: str, since: float, keys: Container[Key] | None
) -> tuple[list[bytes], list[str], int]:
    """Returns the labelled images as PNG, and their labels, without copies of the same image.

    The image that was labelled first is the first. The last result is the number of copies.

    Raises:
      DataError: See `replay`.
    """
    columns = ("time", "request_id", "image_index", "model", "shadow_of")
    rows = pa.concat_tables([read_requests(folder, columns, since) for folder in folders])
    name = ", ".join(map(str, folders))
    models = sorted(rows["model"].unique().to_pylist())
    if model not in models:
        found = printable(", ".join(models)) or "(none)"
        raise NoLabelsError(f"{name} has no images of the model {model}; it has: {found}")
    own = [row for row in rows.to_pylist() if row["model"] == model and row["shadow_of"] is None]
    check_unique(own, folders)
    recent = [
        (row["request_id"], row["image_index"]) for row in own if row["time"].timestamp() >= since
    ]
    if keys is not None:
        recent = [key for key in recent if key in keys]
    feedback = read_valid_feedback(folders, "label")
    labelled = [key for key in recent if key in feedback]
    images = read_images(folders, labelled)
    if not images:
        advice = (
            "record images with --request_log_images"
            if labelled
            else "send labels with POST /feedback, or choose an earlier --since"
        )
        raise NoLabelsError(
            f"{name}: of {len(recent):,} images of {model} since {utc(since)}, {len(labelled):,} "
            f"have a label and none of these has the image itself: {advice}"
        )
    first: dict[bytes, str] = {}
    # Labels with the same time have an order that does not depend on the predictions.
    for key in sorted(labelled, key=lambda key: (feedback[key].time, key)):
        if key in images:
            first.setdefault(images[key], feedback[key].value)
    return list(first), list(first.values()), len(images) - len(first)
