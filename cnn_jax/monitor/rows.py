"""Reads the predictions of one bundle, and their labels, from request logs."""

import dataclasses
import hashlib
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float64, Int

from cnn_jax.data.findings import count
from cnn_jax.data.request_log import (
    Folders,
    Key,
    class_names,
    read_requests,
    read_valid_feedback,
)
from cnn_jax.quality.reference import Predictions
from cnn_jax.system.errors import DataError, printable

# The columns of the request log that the monitor needs.
_COLUMNS = (
    *("time", "request_id", "image_index", "model", "version", "digest"),
    *("probabilities", "embedding", "brightness", "sharpness", "contrast"),
)
# The difference between the clocks of two servers, in seconds, that is accepted without a warning.
_MAX_SKEW = 60.0


@dataclasses.dataclass(frozen=True)
class Rows:
    """Predictions of one bundle, the oldest first.

    Attributes:
      keys: The request id and the image index of each prediction.
      times: When each image was predicted, in seconds since the epoch.
      predictions: The predictions.
      labels: The true class of each image, in the numbering of `class_names`; -1 without a label,
        and the number of classes if the label is not a class of the bundle.
      class_names: The classes of the bundle.
      model: The name under which the latest image was served.
      version: The version under which the latest image was served.
      warnings: One sentence for each problem of the log.
    """

    keys: list[Key]
    times: Float64[np.ndarray, " n"]
    predictions: Predictions
    labels: Int[np.ndarray, " n"]
    class_names: list[str]
    model: str
    version: int
    warnings: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def hits(self) -> Bool[np.ndarray, " n"]:
        """Whether each prediction equals the label; False without a label."""
        return self.predictions.classes == self.labels


def read_rows(folders: Folders, digest: str, since: float = 0.0) -> Rows:
    """Reads the predictions of a bundle, and their labels, from one or several request logs.

    Rows of deleted files to which there is feedback are not read: with them, a window would not be
    a random sample of the requests.

    Args:
      folders: The folders of the request logs.
      digest: The digest of the bundle.
      since: Seconds since the epoch; earlier rows are left out.

    Raises:
      DataError: A folder is not a request log, the logs have no predictions of this bundle, or
        their predictions have no embeddings.
    """
    tables = {f: read_requests(f, _COLUMNS, since, with_labelled=False) for f in folders}
    own_tables = {f: table.filter(pc.field("digest") == digest) for f, table in tables.items()}
    table = pa.concat_tables(own_tables.values())
    if not table.num_rows:
        in_time = " in this time" if since else ""
        raise DataError(
            f"{', '.join(map(str, folders))}: there are no predictions of the bundle "
            f"{digest[:12]}{in_time}; {_describe_versions(pa.concat_tables(tables.values()))}"
        )
    classes = class_names(next(f for f, table in own_tables.items() if table.num_rows), digest)
    warnings = []
    table, left_out = _unique(table)
    if left_out:
        warnings.append(
            f"{count(left_out, 'row has', 'rows have')} the request id and the image index of "
            "another row: left out; are the folders of --log copies of each other?"
        )
    times = table["time"].to_numpy().astype("datetime64[us]").astype(np.int64) / 1e6
    is_wanted = (times >= since) & (times <= time.time() + _MAX_SKEW)
    if future := int((times > time.time() + _MAX_SKEW).sum()):
        warnings.append(
            f"{count(future, 'row is', 'rows are')} from the future: left out; set the clocks of "
            "the servers"
        )
    latest = int(np.argmax(times))
    model, version = table["model"][latest].as_py(), table["version"][latest].as_py()
    order = np.flatnonzero(is_wanted)[np.argsort(times[is_wanted], kind="stable")]
    table, times = table.take(order), times[order]
    ids, indices = table["request_id"].to_pylist(), table["image_index"].to_pylist()
    keys = list(zip(ids, indices, strict=True))
    labels, label_warnings = _labels(folders, keys, times, classes)
    return Rows(
        keys=keys,
        times=times,
        predictions=_predictions(table, digest),
        labels=labels,
        class_names=classes,
        model=model,
        version=version,
        warnings=warnings + label_warnings,
    )


def _describe_versions(table: pa.Table) -> str:
    """Describes the versions whose predictions a table has, for a message."""
    versions = table.group_by(["model", "version", "digest"]).aggregate([]).to_pylist()
    names = [f"{v['model']}/{v['version']} ({v['digest'][:12]})" for v in versions]
    return f"the log has {printable(', '.join(sorted(names)[:5]))}" if names else "it is empty"


def _unique(table: pa.Table) -> tuple[pa.Table, int]:
    """Removes rows whose request id and image index occurred before; returns their number too."""
    ids, indices = table["request_id"].to_pylist(), table["image_index"].to_pylist()
    keys = np.array([f"{i}/{index}" for i, index in zip(ids, indices, strict=True)], str)
    _, first = np.unique(keys, return_index=True)
    return table.take(np.sort(first)), table.num_rows - len(first)


def _predictions(table: pa.Table, digest: str) -> Predictions:
    """Converts the columns of a table to arrays.

    Raises:
      DataError: The rows have no embeddings.
    """
    embeddings = _matrix(table["embedding"])
    if len(table) and not embeddings.shape[1]:
        raise DataError(
            f"the predictions of the bundle {digest[:12]} have no embeddings, because an exported "
            "model or an ensemble answered; serve the bundle of a single network to monitor it"
        )
    images = [table[name].to_numpy() for name in ("brightness", "sharpness", "contrast")]
    return Predictions(_matrix(table["probabilities"]), embeddings, np.column_stack(images))


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Converts a column of lists of equal length to a float32 array [rows, length]."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32).reshape(len(column), -1 if len(column) else 0)


def _labels(
    folders: Folders,
    keys: Sequence[Key],
    times: Float64[np.ndarray, " n"],
    classes: Sequence[str],
) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """Returns the label of each image, and warnings."""
    numbers = {name: number for number, name in enumerate(classes)}
    feedback = read_valid_feedback(folders, "label")
    labels = np.full(len(keys), -1)
    skewed = 0
    for row, key in enumerate(keys):
        if (given := feedback.get(key)) is not None:
            labels[row] = numbers.get(given.value, len(classes))
            skewed += given.first < float(times[row]) - _MAX_SKEW
    warnings = []
    if skewed:
        warnings.append(
            f"{count(skewed, 'image has a label that is', 'images have labels that are')} older "
            "than the request; set the clocks of the servers"
        )
    return labels, warnings


def random_order(keys: Sequence[Key]) -> Float64[np.ndarray, " n"]:
    """Returns a number for each image, from 0 to 1, that is a hash of its key.

    `label` exports the images with the smallest numbers as its random sample, so the labelled
    images of this sample can be recognised without further files; see `random_sample`.
    """
    digests = (hashlib.sha256(f"{key}/{index}".encode()).digest() for key, index in keys)
    return np.array([int.from_bytes(digest[:7], "big") / 2**56 for digest in digests])


def random_sample(
    keys: Sequence[Key], is_labelled: Bool[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Returns a mask of those labelled images that form a random sample of all images.

    In `random_order`, the numbers of these images are smaller than the numbers of all images
    without a label. Other labelled images may have been chosen because they are difficult, so their
    accuracy would be too low.
    """
    order = random_order(keys)
    return order < order[~is_labelled].min(initial=np.inf)


def growing_sample(
    keys: Sequence[Key], is_labelled: Bool[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Returns which of the labelled images are a random sample that later images leave unchanged.

    In `random_order`, the number of each of these images is smaller than the numbers of all earlier
    images without a label. With more images and labels the sample only grows. So a test that may be
    repeated after every observation may be repeated on this sample.

    Args:
      keys: The images, the earliest first.
      is_labelled: Whether each image has a label.
    """
    order = random_order(keys)
    return order < np.minimum.accumulate(np.where(is_labelled, np.inf, order))
