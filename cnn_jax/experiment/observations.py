"""Reads the observations of an experiment from request logs: units, outcomes, and pairs of images.

Times are in seconds since the epoch.
"""

import dataclasses
import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from cnn_jax.data.request_log import (
    Folders,
    Key,
    ValidFeedback,
    read_failures,
    read_requests,
    read_valid_feedback,
)
from cnn_jax.registry.split import Experiment
from cnn_jax.system.errors import DataError, printable

# The columns of the request log that `read_observations` reads.
_COLUMNS = (
    "time", "request_id", "image_index", "unit", "arm", "model", "version", "class",
    "milliseconds", "shadow_of",
)  # fmt: skip
# The difference between the clocks of the servers that is accepted, in seconds.
MAX_SKEW = 5.0


@dataclasses.dataclass
class Unit:
    """A unit of an experiment, such as a user.

    Attributes:
      arm: The arm of its first request.
      start: The time of its first request.
      outcomes: For each image in the window, the outcome; None without feedback in the window.
      milliseconds: The longest time that an image in the window took; NaN if unknown.
      failures: The number of requests in the window that were not answered.
    """

    arm: str
    start: float
    outcomes: list[float | None] = dataclasses.field(default_factory=list)
    milliseconds: float = math.nan
    failures: int = 0

    def outcome(self, kind: str) -> float | None:
        """Returns the mean outcome of the images, or None if no image has an outcome.

        Args:
          kind: One of `OUTCOMES`. With "reward", an image without feedback has the outcome 0.
        """
        values = [one for one in self.outcomes if one is not None]
        count = max(len(self.outcomes), 1) if kind == "reward" else len(values)
        return sum(values) / count if count else None


@dataclasses.dataclass
class Observations:
    """The observations of an experiment.

    Attributes:
      units: The units, by their first request.
      pairs: For an experiment whose challenger is a shadow: for each labelled image, whether the
        challenger and the champion are correct, in the order of the labels.
      agreements: In the same case: whether both versions predict the same class, for each image.
      milliseconds: The times of the images of each arm.
      failures: The number of failed requests of each arm.
      misplaced: The number of rows whose arm or version contradicts the experiment.
      skew: The largest difference between the clocks that the rows prove, in seconds.
    """

    units: list[Unit]
    pairs: list[tuple[bool, bool]]
    agreements: list[bool]
    milliseconds: dict[str, list[float]]
    failures: dict[str, int]
    misplaced: int
    skew: float


def read_observations(experiment: Experiment, folders: Folders, now: float) -> Observations:
    """Reads the observations of an experiment from one or more request logs.

    Raises:
      DataError: A folder is not a request log, an image is in the logs twice, the logs have no
        row of the experiment, or a reward is not in the range of 0 to 1.
    """
    start = datetime.datetime.fromisoformat(experiment.start).timestamp()
    columns = {experiment.column(arm): arm for arm in experiment.versions}
    tables = [read_requests(folder, _COLUMNS, start - MAX_SKEW) for folder in folders]
    failures = [row for folder in folders for row in read_failures(folder).to_pylist()]
    rows = [row for row in pa.concat_tables(tables).to_pylist() if row["arm"] in columns]
    own = [row for row in rows if row["model"] == experiment.model]
    if not own:
        found = sorted({row["model"] for row in rows} or _models(tables))
        raise DataError(
            f"{', '.join(map(str, folders))}: no image was answered in the experiment "
            f"{experiment.name} of {experiment.model}; the log has rows of the models "
            f"{printable(', '.join(found)) or '(none)'}"
        )
    check_unique(own, folders)
    # Rows with the same time have a fixed order, whatever the order of the folders and files.
    own.sort(key=lambda row: (row["time"], row["request_id"], row["image_index"]))
    failed = [r for r in failures if r["arm"] in columns and r["model"] == experiment.model]
    events = sorted([*own, *failed], key=lambda row: row["time"])
    units, ends = {}, None
    if not experiment.is_shadow:
        units = _units(events)
        # A later value must not replace a value that has arrived in the window of the unit.
        ends = {_key(row): units[row["unit"]].start + experiment.window for row in own}
    column = "label" if experiment.outcome == "label" else "reward"
    feedback = read_valid_feedback(folders, column, ends)
    if not experiment.is_shadow:
        _add_outcomes(units, experiment, events, feedback)
    milliseconds: dict[str, list[float]] = {arm: [] for arm in experiment.versions}
    misplaced, skew = 0, start - own[0]["time"].timestamp()
    for row in own:
        arm = columns[row["arm"]]
        if row["milliseconds"] is not None:
            milliseconds[arm].append(row["milliseconds"])
        misplaced += row["version"] != experiment.versions[arm] or (
            not experiment.is_shadow and experiment.arm(row["unit"]) != arm
        )
        if given := feedback.get(_key(row)):
            skew = max(skew, row["time"].timestamp() - given.time)
        skew = max(skew, row["time"].timestamp() - now)
    pairs, agreements = _pairs(own, feedback) if experiment.is_shadow else ([], [])
    return Observations(
        units=list(units.values()),
        pairs=pairs,
        agreements=agreements,
        milliseconds=milliseconds,
        failures={
            arm: sum(columns[row["arm"]] == arm for row in failed) for arm in experiment.versions
        },
        misplaced=misplaced,
        skew=skew,
    )


def _models(tables: Iterable[pa.Table]) -> set[str]:
    return {name for table in tables for name in table["model"].unique().to_pylist()}


def check_unique(rows: Iterable[Mapping[str, Any]], folders: Folders) -> None:
    """Raises DataError if two rows of the request logs have the same request id and image index."""
    seen: set[Key] = set()
    for row in rows:
        key = _key(row)
        if key in seen:
            raise DataError(
                f"{', '.join(map(str, folders))}: image {key[1]} of request {key[0]} is recorded "
                "twice: name each folder once, and remove copies of files in it"
            )
        seen.add(key)


def _key(row: Mapping[str, Any]) -> Key:
    return row["request_id"], row["image_index"]


def _units(events: Iterable[Mapping[str, Any]]) -> dict[str, Unit]:
    """Returns the units by name, in the order of their first request.

    Args:
      events: The images and the failed requests, sorted by time.
    """
    units: dict[str, Unit] = {}
    for row in events:
        if row["unit"] not in units:
            units[row["unit"]] = Unit(row["arm"].rpartition("/")[2], row["time"].timestamp())
    return units


def _add_outcomes(
    units: Mapping[str, Unit],
    experiment: Experiment,
    events: Iterable[Mapping[str, Any]],
    feedback: Mapping[Key, ValidFeedback],
) -> None:
    """Adds the images and the failed requests in the window of each unit to the unit.

    Args:
      units: The units by name.
      experiment: The experiment.
      events: The images and the failed requests, which have a "reason".
      feedback: The valid feedback in the windows.
    """
    for row in events:
        unit = units[row["unit"]]
        if row["time"].timestamp() > unit.start + experiment.window:
            continue
        if "reason" in row:
            unit.failures += 1
            continue
        given = feedback.get(_key(row))
        unit.outcomes.append(None if given is None else _outcome(experiment, row, given))
        unit.milliseconds = max(row["milliseconds"], unit.milliseconds)


def _outcome(experiment: Experiment, row: Mapping[str, Any], given: ValidFeedback) -> float:
    if experiment.outcome == "label":
        return float(given.value == row["class"])
    if not 0 <= given.value <= 1:
        raise DataError(
            f"the reward {given.value:g} of image {row['image_index']} of request "
            f"{row['request_id']} is not from 0 to 1: an experiment needs rewards in this range"
        )
    return given.value


def _pairs(
    rows: Sequence[Mapping[str, Any]], feedback: Mapping[Key, ValidFeedback]
) -> tuple[list[tuple[bool, bool]], list[bool]]:
    """Returns the pairs of labelled images in the order of the labels, and the agreements."""
    champions = {_key(row): row for row in rows if row["shadow_of"] is None}
    pairs, agreements = [], []
    for row in rows:
        key = row["shadow_of"], row["image_index"]
        if key not in champions:
            continue
        champion = champions[key]["class"]
        agreements.append(row["class"] == champion)
        if (given := feedback.get(key)) is not None:
            pair = row["class"] == given.value, champion == given.value
            pairs.append((given.time, pair))
    # Labels with the same time, for example from one file of `cnn_jax label`, keep the order of
    # their images. An order that depended on the outcomes would make the test wrong.
    pairs.sort(key=lambda item: item[0])
    return [pair for _, pair in pairs], agreements
