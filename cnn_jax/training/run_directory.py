"""The files of a run, except checkpoints and the bundle."""

import contextlib
import csv
import datetime
import fcntl
import io
import json
import logging
import math
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from cnn_jax.config import schema
from cnn_jax.config.schema import Config
from cnn_jax.data import Track
from cnn_jax.data.files import check_output
from cnn_jax.data.scan import Unreadable
from cnn_jax.data.sources import listed_folder
from cnn_jax.system.atomic import write_text
from cnn_jax.system.errors import ConfigError, file_errors, printable
from cnn_jax.system.text import spreadsheet_cell
from cnn_jax.training import sharding

logger = logging.getLogger(__name__)

# The configuration keys that do not affect any metric. The fingerprint of the data identifies the
# images, wherever the images are stored, and distill.sha256 identifies the teachers. The mesh and
# train.steps_per_execution change only rounding errors.
INDIFFERENT_KEYS = frozenset(
    {
        *("data.source", "data.workers", "data.cache"),
        *("data.max_pixels", "data.max_unreadable", "data.allow_outside"),
        *("mesh.data", "mesh.model"),
        "distill.bundles",
        "train.steps_per_execution",
        *("checkpoint.keep", "checkpoint.every_steps"),
        *("report.detail", "report.splits", "report.reference"),
    }
)
# The keys that may change when a run resumes. No result of a finished epoch depends on these keys.
FREE_KEYS = INDIFFERENT_KEYS | {"train.epochs", "train.patience", "checkpoint.restore_step"}
LOCK, HEARTBEAT, BACKUP, CHECKPOINTS = "lock", "heartbeat.json", "backup.json", "checkpoints"
_CONFIG, _PRETRAINED = "config.json", "pretrained.json"
# The sub-folders of a run's folder.
_FOLDERS = (CHECKPOINTS, "bundle", "damaged", "narrowed", "profile", "report", "tensorboard")
# The minimum time between two heartbeats of the same activity.
_HEARTBEAT_SECONDS = 5.0


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
    """Creates the folder of a run, and locks the folder inside the context.

    The operating system releases the lock when the process ends for any reason. If the context
    raises an error before the run has written its configuration, the files and folders that
    were created are removed.

    Raises:
      ConfigError: Another run has locked the folder, or the folder cannot be created or written.
    """
    created = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = _open_lock(workdir)
    except OSError as error:
        _remove_empty(created)
        reason = "it is a file" if workdir.is_file() else error.strerror
        raise ConfigError(f"--workdir: cannot use {workdir}: {reason}") from error
    with file:
        try:
            yield
        except BaseException:
            if not (workdir / _CONFIG).exists() and not _has_checkpoints(workdir):
                for name in (HEARTBEAT, LOCK, BACKUP):
                    (workdir / name).unlink(missing_ok=True)
                _remove_empty([workdir / CHECKPOINTS, *created])
            raise


def _open_lock(workdir: pathlib.Path) -> IO[str]:
    """Opens and locks the lock file of a run.

    Raises:
      ConfigError: Another run has locked the file.
      OSError: The file cannot be written.
    """
    path = workdir / LOCK
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = _describe_holder(file.read())
        file.close()
        raise ConfigError(
            f"--workdir: {workdir} is in use{holder}; stop that run, or use another folder"
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s): make sure that no two runs use it", path, error)
    # Another run that failed to start may have removed the file before this process locked it.
    if not os.fstat(file.fileno()).st_nlink:
        file.close()
        workdir.mkdir(parents=True, exist_ok=True)
        return _open_lock(workdir)
    with file_errors(path):
        file.truncate(0)
        file.write(json.dumps(_this_process() | {"since": _now()}))
        file.flush()
    return file


def _remove_empty(folders: Iterable[pathlib.Path]) -> None:
    """Removes the folders in the given order, except folders that contain files."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _has_checkpoints(workdir: pathlib.Path) -> bool:
    """Returns whether a run has saved a checkpoint in its folder."""
    return any(entry.name.isdecimal() for entry in (workdir / CHECKPOINTS).glob("*"))


def check_apart(workdir: pathlib.Path, source: str) -> None:
    """Checks that the folder of a run and the data of the run do not overlap.

    A run's folder may be inside the folder of the data. The data source then ignores the run's
    folder.

    Args:
      workdir: The run's folder.
      source: The value of data.source.

    Raises:
      ConfigError: The run's folder contains images of the data, or the data is in a folder
        that the run writes to.
    """
    data = listed_folder(source)
    if data is None:
        return
    check_output("--workdir", workdir, data)
    for name in _FOLDERS:
        if data.resolve().is_relative_to((workdir / name).resolve()):
            raise ConfigError(
                f"--workdir: the data, {data}, is inside {workdir / name}, which the run "
                "overwrites; use another folder"
            )


def _this_process() -> dict[str, Any]:
    """Returns the process id and the host name of this process."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _describe_holder(text: str) -> str:
    """Describes the process that holds a lock; returns "" if the lock file is incomplete."""
    try:
        holder = json.loads(text)
        return f" by process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return ""


def _now() -> str:
    """Returns the current time in UTC, in ISO format."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the configuration of the run in a folder.

    A folder contains a run only after the first checkpoint. Before that, there is
    nothing to resume and nothing to overwrite.

    Returns:
      The values by key, such as "train.epochs"; None if the folder contains no run.

    Raises:
      ConfigError: The configuration cannot be read.
    """
    path = workdir / _CONFIG
    if not _has_checkpoints(workdir):
        return None
    try:
        return schema.flat(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(
            f"--workdir: {workdir} has checkpoints but no {_CONFIG}; restore that file, or use "
            "another folder"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--workdir: {path} is not a configuration: {error}") from error


def changes(workdir: pathlib.Path, previous: Mapping[str, Any] | None, config: Config) -> list[str]:
    """Returns the configuration keys that have changed since the run was last started.

    Args:
      workdir: The run's folder.
      previous: The result of `read_config`.
      config: The resolved configuration with which the run is to resume.

    Returns:
      A line for each key whose value has changed.

    Raises:
      ConfigError: A key has changed that must not change when a run resumes.
    """
    if previous is None:
        return []
    # If a key did not exist when the run started, the run used the key's default value.
    known_keys = schema.keys(config.model.name)
    previous = {name: key.default for name, key in known_keys.items()} | dict(previous)
    wanted = schema.flat(json.loads(config.to_json()))
    lines = {
        key: f"{key}: {previous.get(key, 'absent')} -> {wanted.get(key, 'absent')}"
        for key in sorted((previous.keys() | wanted.keys()) - _unused_keys(wanted))
        if previous.get(key) != wanted.get(key)
    }
    if refused := [line for key, line in lines.items() if key not in FREE_KEYS]:
        raise ConfigError(
            f"--workdir: {workdir} contains a run with another configuration "
            f"({'; '.join(refused)}); use another folder, or the configuration in {_CONFIG}"
        )
    return list(map(printable, lines.values()))


def _unused_keys(config: Mapping[str, Any]) -> set[str]:
    """Returns the keys of MixUp and CutMix that have no effect because the method is not used."""
    methods = ("augment.mixup", "augment.cutmix")
    return {f"{method}_alpha" for method in methods if not config.get(f"{method}_probability")}


@sharding.primary_only
def write_config(workdir: pathlib.Path, config: Config) -> None:
    """Writes config.json, which marks the folder as the folder of a run.

    Raises:
      ConfigError: The folder cannot be written.
    """
    try:
        text = json.dumps(json.loads(config.to_json()), indent=1, ensure_ascii=False)
        write_text(workdir / _CONFIG, text + "\n")
    except OSError as error:
        raise ConfigError(f"--workdir: cannot write {workdir}: {error.strerror}") from error


@sharding.primary_only
def write_pretrained(workdir: pathlib.Path, record: Mapping[str, Any] | None) -> None:
    """Writes pretrained.json: the source and the sha256 of the weights with which a run starts.

    Args:
      workdir: The run's folder.
      record: The result of `PretrainedWeights.record`; None for random weights, for which there is
        no file.
    """
    if record is None:
        (workdir / _PRETRAINED).unlink(missing_ok=True)
        return
    write_text(workdir / _PRETRAINED, _json(record) + "\n")


def read_pretrained(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the content of pretrained.json; None if the run started with random weights.

    Raises:
      ConfigError: The file is damaged.
    """
    path = workdir / _PRETRAINED
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"source": record["source"], "sha256": record["sha256"]} | record
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--workdir: {path} cannot be read: {error!r}; restore that file, or use another folder"
        ) from error


class Heartbeat:
    """Writes heartbeat.json: the step and the activity of a run, and the time of writing.

    The training loop and not a thread writes the file, so that the file is no longer updated
    if the run hangs.
    """

    def __init__(self, workdir: pathlib.Path):
        """Creates the heartbeat of a run; the first call of `beat` writes heartbeat.json."""
        self._path = workdir / HEARTBEAT
        self._step = 0
        self._activity = ""
        self._last = -math.inf

    def beat(self, activity: str, step: int | None = None) -> None:
        """Writes heartbeat.json, at most once in five seconds for the same activity.

        Args:
          activity: The activity of the run, in a few words.
          step: The number of steps taken; None if unchanged.
        """
        self._step = self._step if step is None else step
        now = time.monotonic()
        is_due = activity != self._activity or now - self._last >= _HEARTBEAT_SECONDS
        if not is_due or not sharding.is_primary():
            return
        self._last, self._activity = now, activity
        beat = {"time": _now(), "step": self._step, "activity": activity}
        # The file is not flushed to the disk, because the next heartbeat follows within seconds.
        write_text(self._path, _line(beat | _this_process()), durable=False)

    def wrap(self, track: Track) -> Track:
        """Wraps the progress function `track` so that each item also updates heartbeat.json."""

        def tracked(items: Iterable, description: str, total: int) -> Iterator:
            for item in track(items, description, total):
                self.beat(description)
                yield item

        return tracked


class EpochLog:
    """The log of a run: metrics.jsonl and TensorBoard events, with a record for each epoch."""

    def __init__(self, workdir: pathlib.Path, history: Sequence[Mapping[str, Any]]):
        """Rewrites metrics.jsonl and the TensorBoard events from the records of finished epochs.

        A killed run may have logged an epoch that is trained again after the restart.

        Args:
          workdir: The run's folder.
          history: One record for each finished epoch.
        """
        self._path, self._folder = workdir / "metrics.jsonl", workdir / "tensorboard"
        self._events: EventsWriter | None = None
        if not sharding.is_primary():
            return
        write_text(self._path, "".join(map(_line, history)))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(exist_ok=True)
        # SummaryWriter is not used: on a full disk, its writer thread ends with a traceback, and
        # the tenth event after this error blocks forever.
        with file_errors(self._folder):
            self._events = EventsWriter(str(self._folder / "events"))
        for record in history:
            self._write_events(record)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds the record of an epoch to metrics.jsonl and to the TensorBoard events.

        Raises:
          OSError: A file cannot be written.
        """
        if self._events is None:
            return
        with file_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        self._write_events(record)

    def _write_events(self, record: Mapping[str, Any]) -> None:
        assert self._events is not None
        with file_errors(self._folder):
            for key, value in record.items():
                if key in ("step", "epoch"):
                    continue
                # "train_loss" becomes "loss/train", so that TensorBoard groups all losses.
                split, _, metric = key.partition("_")
                is_metric = split in ("train", "validation")
                tag = f"{metric}/{split}" if is_metric else f"run/{key}"
                event = Event(summary=summary.scalar(tag, value), step=record["step"])
                event.wall_time = time.time()
                self._events.write_event(event)
            self._events.flush()

    def close(self) -> None:
        """Closes the TensorBoard events."""
        if self._events is not None:
            with file_errors(self._folder):
                self._events.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


@sharding.primary_only
def write_metrics(workdir: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes report/metrics.json: the metrics of each split, and all other numbers of the report.

    Raises:
      ValueError: A number is not finite.
    """
    (workdir / "report").mkdir(exist_ok=True)
    write_text(workdir / "report" / "metrics.json", _json(report) + "\n")


def _json(value: Any, indent: str = "") -> str:
    """Formats a value as JSON with an indent of one space, and a list of numbers on one line."""
    inner = f"{indent} "
    if isinstance(value, Mapping) and value:
        parts = [
            f"{json.dumps(k, ensure_ascii=False)}: {_json(v, inner)}" for k, v in value.items()
        ]
        brackets = "{}"
    elif isinstance(value, list | tuple) and not all(isinstance(v, int | float) for v in value):
        parts, brackets = [_json(v, inner) for v in value], "[]"
    else:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    lines = f",\n{inner}".join(parts)
    return f"{brackets[0]}\n{inner}{lines}\n{indent}{brackets[1]}"


@sharding.primary_only
def write_unreadable(workdir: pathlib.Path, unreadable: Sequence[Unreadable]) -> None:
    """Writes report/unreadable.csv: the id of each image that cannot be read, and the reason."""
    (workdir / "report").mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "reason"])
    writer.writerows(
        (spreadsheet_cell(image.id), spreadsheet_cell(image.reason)) for image in unreadable
    )
    write_text(workdir / "report" / "unreadable.csv", text.getvalue())


@sharding.primary_only
def write_predictions(
    workdir: pathlib.Path,
    ids: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Writes report/predictions.csv: one row for each example of the test split.

    Args:
      workdir: The run's folder.
      ids: The id of each example.
      labels: int [n], the label of each example.
      probabilities: float32 [n, classes].
      class_names: The names in the order of the labels.
    """
    (workdir / "report").mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "label", "predicted", "confidence"])
    for example_id, label, row in zip(ids, labels, probabilities, strict=True):
        best = int(row.argmax())
        # `unique` gives the shortest decimal number that is parsed to the same float32.
        confidence = np.format_float_positional(row[best], unique=True)
        texts = (example_id, class_names[int(label)], class_names[best])
        writer.writerow([*map(spreadsheet_cell, texts), confidence])
    write_text(workdir / "report" / "predictions.csv", text.getvalue())
