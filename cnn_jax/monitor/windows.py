"""Tests the windows of a request log for drift, and estimates their accuracy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from cnn_jax.monitor.rows import Rows, random_sample
from cnn_jax.quality.drift import LEVEL, consecutive, is_different, window_p_values
from cnn_jax.quality.reference import Reference
from cnn_jax.quality.trust import Distances, estimate_accuracy, statistics
from cnn_jax.system.errors import DataError
from cnn_jax.system.text import utc

# The default number of images in a window, the number of latest windows to test, and the decrease
# of the accuracy that counts as harm.
WINDOW, LAST, MAX_DROP = 250, 48, 0.05
STATES = ("no_data", "no_drift", "drift", "harm")


def measure(
    rows: Rows,
    reference: Reference,
    window: int = WINDOW,
    last: int = LAST,
    level: float = LEVEL,
    max_drop: float = MAX_DROP,
) -> dict[str, Any]:
    """Tests the latest windows of predictions for drift, and estimates their accuracy.

    Windows are consecutive groups of images, counted from the oldest image. A window differs if one
    of the tests of `drift` is significant. Two windows in a row that differ are an alarm. Drift is
    harm if there is an alarm in the latest window and the estimated accuracy of both windows of
    the alarm is lower than the accuracy on the validation images by more than `max_drop`; or if
    the labels of a random sample of the two latest windows prove such a decrease (interval of
    Clopper and Pearson 1934: for one look, it contains the accuracy with a probability of at least
    95 %, for any number of labels).

    Args:
      rows: The predictions.
      reference: The reference statistics of the same bundle.
      window: The number of images in a window.
      last: The number of latest windows to test.
      level: The probability that a window differs although there is no drift.
      max_drop: The decrease of the accuracy that is still accepted, 0 to 1.

    Returns:
      JSON types:
        state: One of `STATES`. Without a complete window the state is "no_data".
        images: The number of images in the log.
        waiting: The number of images after the last complete window.
        window, level, max_drop: The arguments.
        reference: "accuracy" and "images" of the validation images.
        windows: For each window, the oldest first: "first", the position of its first image in
          `rows`; "from" and "to", the times of its first and last image; "p_values"; "differs";
          "alarm"; "estimated_accuracy"; and "labels", see below.
        labels: "count" of labelled images; "new_class", how many of them have a class that the
          network does not know; and of the random sample among them "sample", "accuracy" and
          "interval", or None without a sample. At the top level, "labels" describes the two latest
          windows.
        warnings: The warnings of `rows`.

    Raises:
      DataError: The embedding or the classes of the rows do not fit the reference.
    """
    shape = rows.predictions.probabilities.shape[1], rows.predictions.embeddings.shape[1]
    if len(rows) and shape != reference.class_means.shape:
        raise DataError(
            f"the reference statistics are of {reference.class_means.shape} classes and features, "
            f"and the log is of {shape}; compute them from the bundle that is served"
        )
    count = len(rows) // window
    starts = range(max(count - last, 0) * window, count * window, window)
    distances = Distances(reference.class_means, reference.covariance)
    windows = [
        _measure_window(rows, slice(s, s + window), reference, distances, level) for s in starts
    ]
    alarms = consecutive(np.array([w["differs"] for w in windows], bool))
    for measured, alarm in zip(windows, alarms.tolist(), strict=True):
        measured["alarm"] = alarm
    recent = slice(starts[-min(2, len(windows))], count * window) if windows else slice(0, 0)
    labels = _measure_labels(rows, recent)
    return {
        "state": _state(windows, labels, float(reference.accuracy) - max_drop),
        "images": len(rows),
        "waiting": len(rows) - count * window,
        "window": window,
        "level": level,
        "max_drop": max_drop,
        "reference": {
            "accuracy": float(reference.accuracy),
            "images": len(reference.statistics),
        },
        "labels": labels,
        "windows": windows,
        "warnings": list(rows.warnings),
    }


def _measure_window(
    rows: Rows, part: slice, reference: Reference, distances: Distances, level: float
) -> dict[str, Any]:
    predictions = rows.predictions[part]
    counts = np.bincount(predictions.classes, minlength=len(reference.class_counts))
    p_values = window_p_values(
        reference.statistics, reference.class_counts, statistics(distances, predictions), counts
    )
    return {
        "first": part.start,
        "from": utc(rows.times[part][0]),
        "to": utc(rows.times[part][-1]),
        "p_values": p_values,
        "differs": is_different(list(p_values.values()), level),
        "estimated_accuracy": estimate_accuracy(reference, distances, predictions),
        "labels": _measure_labels(rows, part),
    }


def _measure_labels(rows: Rows, part: slice) -> dict[str, Any]:
    labels = rows.labels[part]
    is_labelled = labels >= 0
    in_sample = random_sample(rows.keys[part], is_labelled)
    result = {
        "count": int(is_labelled.sum()),
        "new_class": int((labels == len(rows.class_names)).sum()),
        "sample": int(in_sample.sum()),
        "accuracy": None,
        "interval": None,
    }
    if in_sample.any():
        hits = rows.hits[part][in_sample]
        result["accuracy"] = float(hits.mean())
        interval: Any = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="exact")
        result["interval"] = [float(interval.low), float(interval.high)]
    return result


def _state(windows: Sequence[dict[str, Any]], labels: dict[str, Any], limit: float) -> str:
    """Returns the state of the latest windows; `limit` is the lowest accuracy that is accepted."""
    if not windows:
        return "no_data"
    if labels["interval"] is not None and labels["interval"][1] < limit:
        return "harm"
    if not windows[-1]["alarm"]:
        return "no_drift"
    is_low = all(w["estimated_accuracy"] < limit for w in windows[-2:])
    return "harm" if is_low else "drift"
