"""Chooses images of a request log for labelling, and stores their labels in the log."""

import csv
import json
import os
import pathlib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np
from jaxtyping import Bool

from cnn_jax.data.request_log import (
    FEEDBACK,
    Folders,
    Key,
    Segments,
    class_names,
    read_keys,
)
from cnn_jax.monitor.rows import Rows, random_order
from cnn_jax.quality.reference import Reference
from cnn_jax.quality.trust import Distances, statistics
from cnn_jax.report import style
from cnn_jax.system.atomic import write_text
from cnn_jax.system.errors import DataError, closest, printable

REASONS = ("random", "uncertain", "unusual")
COLUMNS = ("request_id", "image_index", "label", "new_class")
_YES = ("1", "true", "yes")


def choose(
    rows: Rows,
    is_free: Bool[np.ndarray, " n"],
    reference: Reference | None,
    count: int,
    random_fraction: float,
) -> list[tuple[int, str]]:
    """Chooses the images that are most worth a label.

    Args:
      rows: The predictions.
      is_free: Whether each image may be chosen: it has no label, and its pixels were logged.
      reference: The reference statistics; without them no image counts as unusual.
      count: The number of images to choose.
      random_fraction: The fraction, 0 to 1, of images to choose at random. One half of the other
        images has the smallest confidences, and the other half has the largest distances from
        their predicted class.

    Returns:
      The positions of at most `count` images, each with one of `REASONS`.
    """
    if not len(rows):
        return []
    is_free = is_free.copy()
    predictions = rows.predictions
    unusual = np.zeros(len(rows))
    if reference is not None:
        distances = Distances(reference.class_means, reference.covariance)
        unusual = -statistics(distances, predictions)[:, 0].astype(np.float64)
    quota_random = round(count * random_fraction)
    quota_unusual = (count - quota_random) // 2 if reference is not None else 0
    chosen: list[tuple[int, str]] = []
    for reason, scores, quota in (
        ("random", random_order(rows.keys), quota_random),
        ("unusual", unusual, quota_unusual),
        ("uncertain", predictions.probabilities.max(axis=1), count),
    ):
        positions = np.flatnonzero(is_free)
        order = np.argsort(scores[positions], kind="stable")
        for row in positions[order[: min(quota, count - len(chosen))]].tolist():
            chosen.append((row, reason))
            is_free[row] = False
    return chosen


def write_label_page(
    path: pathlib.Path,
    items: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    title: str,
) -> None:
    """Writes the page on which a person labels images; the page saves a CSV file.

    The page does not show the predictions, because they would influence the labels.

    Args:
      path: The HTML file.
      items: For each image "key", "reason" and "image" (PNG).
      names: The classes.
      title: The title of the page.

    Raises:
      OSError: The file cannot be written.
    """
    data = {
        "classes": list(names),
        "items": [
            {
                "request_id": item["key"][0],
                "image_index": item["key"][1],
                "reason": item["reason"],
                "image": style.png_uri(item["image"]),
            }
            for item in items
        ],
    }
    # In a script element "<" could start a tag, so it is written as an escape sequence of JSON.
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    page = style.template("label.html").render(
        title=title, data=markupsafe.Markup(text), **style.page_script("label.js")
    )
    write_text(path, page)


def read_labels(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a CSV file of labels with the columns of `COLUMNS`; rows without a label are skipped.

    The columns `image_index` (0) and `new_class` (no) may be missing.

    Raises:
      DataError: The file cannot be read, or a row is not valid.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    labels = []
    for number, record in enumerate(records, start=2):
        if missing := {"request_id", "label"} - record.keys():
            raise DataError(f"{path}: the column {sorted(missing)[0]} is missing")
        index = record.get("image_index") or "0"
        if not index.isdecimal():
            raise DataError(f"{path}, line {number}: image_index must be a number, got {index!r}")
        if (label := record["label"] or "").strip():
            key = (record["request_id"] or "").strip(), int(index)
            is_new = (record.get("new_class") or "").strip().lower() in _YES
            labels.append({"key": key, "label": label, "new_class": is_new, "line": number})
    return labels


def add_labels(folders: Folders, labels: Sequence[Mapping[str, Any]]) -> int:
    """Stores labels in the request logs that have the images. All labels are checked before.

    Args:
      folders: The request logs. Servers may write to them at the same time.
      labels: For each image "key", "label" and "new_class", and "line" for messages.

    Returns:
      The number of labels.

    Raises:
      DataError: The logs do not have an image, two labels of an image differ, or a label is not a
        class of the bundle that predicted the image.
      OSError: The labels cannot be written.
    """
    keys = [item["key"] for item in labels]
    digests = {folder: _digests(folder, keys) for folder in folders}
    given: dict[Any, dict[Key, str]] = {folder: {} for folder in folders}
    for item in labels:
        key, label, where = item["key"], item["label"], f"line {item['line']}"
        folder = next((folder for folder in folders if key in digests[folder]), None)
        if folder is None:
            raise DataError(
                f"{where}: {', '.join(map(str, folders))} has no image {key[1]} of request "
                f"{printable(key[0])}; it was deleted, or it is in another request log"
            )
        known = class_names(folder, digests[folder][key])
        if label not in known:  # The name of a class may start or end with a space.
            label = label.strip()
        if given[folder].setdefault(key, label) != label:
            raise DataError(
                f"{where}: image {key[1]} of request {key[0]} has two labels, "
                f"{printable(given[folder][key])!r} and {printable(label)!r}; keep one of them"
            )
        if label not in known and not item["new_class"]:
            close = closest(label, known)
            hint = f"did you mean {printable(close)!r}? " if close else ""
            raise DataError(
                f"{where}: the model has no class {printable(label)!r}; {hint}for a class "
                "that the model does not know, write true in the column new_class"
            )
    for folder, labels_by_image in given.items():
        if labels_by_image:
            _append_labels(folder, labels_by_image)
    return sum(map(len, given.values()))


def _append_labels(folder: str | os.PathLike[str], labels: Mapping[Key, str]) -> None:
    """Writes a file of labels to a request log."""
    segments = Segments(pathlib.Path(folder) / "feedback", FEEDBACK)
    ids, indices = zip(*labels, strict=True)
    segments.append(
        {
            "time": [round(1e6 * time.time())] * len(labels),
            "request_id": ids,
            "image_index": indices,
            "label": list(labels.values()),
            "reward": [None] * len(labels),
        }
    )
    segments.close()
    # A server may have deleted rows before the labels were written.
    if lost := len(labels.keys() - _digests(folder, labels).keys()):
        raise DataError(f"{folder}: a server has just deleted {lost} of the labelled images")


def _digests(folder: str | os.PathLike[str], keys: Collection[Key]) -> dict[Key, str]:
    """Returns the digest of the bundle that predicted each of some images of a request log."""
    rows = read_keys(folder, keys, ("request_id", "image_index", "digest"))
    return {(row["request_id"], row["image_index"]): row["digest"] for row in rows}
