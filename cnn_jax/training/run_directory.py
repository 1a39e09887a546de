"""The files that a run leaves behind, other than checkpoints and the bundle."""

import contextlib
import csv
import datetime
import fcntl
import functools
import io
import json
import logging
import math
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from cnn_jax.config import files
from cnn_jax.config.schema import Config
from cnn_jax.data import Track
from cnn_jax.data.files import check_output
from cnn_jax.data.scan import Unreadable
from cnn_jax.data.sources import listed_folder
from cnn_jax.system.errors import ConfigError, of_file, printable
from cnn_jax.training import sharding

logger = logging.getLogger(__name__)

# No figure depends on these: the data's fingerprint stands for where it lies, and a mesh and
# the steps of an execution change the rounding alone.
INDIFFERENT_KEYS = frozenset(
    {
        *("data.source", "data.workers", "data.cache"),
        *("data.max_pixels", "data.max_unreadable", "data.allow_outside"),
        *("mesh.data", "mesh.model"),
        "train.steps_per_execution",
        *("checkpoint.keep", "checkpoint.every_steps"),
        *("report.detail", "report.splits"),
    }
)
# What a run may change between two starts: no number of the epochs that are done depends on it.
FREE_KEYS = INDIFFERENT_KEYS | {"train.epochs", "train.patience", "checkpoint.restore_step"}
# What a run did that is older than these keys.
_BEFORE = {
    "augment.mixup_probability": 0.0,
    "augment.cutmix_probability": 0.0,
    "data.white_level": 0.0,
}
_CONFIG, _LOCK, _HEARTBEAT = "config.json", "lock", "heartbeat.json"
_CHECKPOINTS = "checkpoints"
# The sub-folders of a run.
_FOLDERS = (_CHECKPOINTS, "bundle", "damaged", "profile", "report", "tensorboard")
# A heartbeat is written no more often than this.
_HEARTBEAT_SECONDS = 5.0


def _by_primary(write: Callable[..., None]) -> Callable[..., None]:
    """Of several processes, one alone writes."""

    @functools.wraps(write)
    def by_primary(*args: Any, **kwargs: Any) -> None:
        if sharding.is_primary():
            write(*args, **kwargs)

    return by_primary


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the folder, and holds it for this run until the end.

    The system releases the lock with the process, however that ends. If what is done inside
    fails before the run has written its configuration, the folder is left as it was found.

    Raises:
      ConfigError: Another run holds it, or the folder cannot be made or written.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = _open_lock(workdir)
    except OSError as error:
        _remove_empty(made)
        raise ConfigError(f"--workdir: cannot use {workdir}: {error.strerror}") from error
    with file:
        try:
            yield
        except BaseException:
            if not (workdir / _CONFIG).exists() and not _has_checkpoints(workdir):
                for name in (_HEARTBEAT, _LOCK):
                    (workdir / name).unlink(missing_ok=True)
                _remove_empty([workdir / _CHECKPOINTS, *made])
            raise


def _open_lock(workdir: pathlib.Path) -> IO[str]:
    """The locked file.

    Raises:
      ConfigError: Another run holds it.
      OSError: It cannot be written.
    """
    path = workdir / _LOCK
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = _describe_holder(file.read())
        file.close()
        raise ConfigError(
            f"--workdir: {workdir} is in use{holder}; end that run, or use another folder"
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s): make sure that no two runs use it", path, error)
    if not os.fstat(file.fileno()).st_nlink:  # A run that failed to start has just removed it.
        file.close()
        workdir.mkdir(parents=True, exist_ok=True)
        return _open_lock(workdir)
    with of_file(path):
        file.truncate(0)
        file.write(json.dumps(_this_process() | {"since": _now()}))
        file.flush()
    return file


def _remove_empty(folders: Iterable[pathlib.Path]) -> None:
    """Removes these folders, from the inside out, as far as they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _has_checkpoints(workdir: pathlib.Path) -> bool:
    return any(entry.name.isdecimal() for entry in (workdir / _CHECKPOINTS).glob("*"))


def check_apart(workdir: pathlib.Path, source: str) -> None:
    """Checks that a run and the data that it is trained on do not spoil each other.

    A run may lie in a folder of the data, which it is then no part of.

    Raises:
      ConfigError: The run's folder has images of the data, or the data lies where the run
        writes.
    """
    data = listed_folder(source)
    if data is None:
        return
    check_output("--workdir", workdir, data)
    for name in _FOLDERS:
        if data.resolve().is_relative_to((workdir / name).resolve()):
            raise ConfigError(
                f"--workdir: the data, {data}, lies in {workdir / name}, where the run writes; use "
                "another folder"
            )


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _describe_holder(text: str) -> str:
    """Who holds the lock, in words; nothing if that was not written yet."""
    try:
        holder = json.loads(text)
        return f" by process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return ""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The configuration of the run that is there, with every key flat; None if there is none.

    There is one as soon as it has a checkpoint: before, there is nothing to go on with,
    and nothing to spoil.

    Raises:
      ConfigError: It cannot be read.
    """
    path = workdir / _CONFIG
    if not _has_checkpoints(workdir):
        return None
    try:
        return files.flat(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(
            f"--workdir: {workdir} has checkpoints and no {_CONFIG}, so nobody knows of what: put "
            "it back, or use another folder"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--workdir: {path} is not a configuration: {error}") from error


def changes(workdir: pathlib.Path, present: Mapping[str, Any] | None, config: Config) -> list[str]:
    """What is not as it was when the run was last started: a line for each key.

    Args:
      workdir: The run's folder.
      present: What `read_config` gives.
      config: The resolved configuration to go on with.

    Raises:
      ConfigError: Something has changed that a run cannot go on with.
    """
    if present is None:
        return []
    present = _BEFORE | dict(present)
    wanted = files.flat(json.loads(config.to_json()))
    lines = {
        key: f"{key}: {present.get(key, 'absent')} -> {wanted.get(key, 'absent')}"
        for key in sorted((present.keys() | wanted.keys()) - _idle(wanted))
        if present.get(key) != wanted.get(key)
    }
    if refused := [line for key, line in lines.items() if key not in FREE_KEYS]:
        raise ConfigError(
            f"--workdir: {workdir} holds a run of another configuration "
            f"({'; '.join(refused)}); use another folder, or the configuration in {_CONFIG}"
        )
    return list(map(printable, lines.values()))


def _idle(config: Mapping[str, Any]) -> set[str]:
    """The keys of a flat configuration that mean nothing, since what they are for is off."""
    methods = ("augment.mixup", "augment.cutmix")
    return {f"{method}_alpha" for method in methods if not config.get(f"{method}_probability")}


@_by_primary
def write_config(workdir: pathlib.Path, config: Config) -> None:
    """Writes config.json, from when on the folder is this run's.

    Raises:
      ConfigError: The folder cannot be written.
    """
    try:
        text = json.dumps(json.loads(config.to_json()), indent=1, ensure_ascii=False)
        write_text(workdir / _CONFIG, text + "\n")
    except OSError as error:
        raise ConfigError(f"--workdir: cannot write {workdir}: {error.strerror}") from error


def write_text(path: pathlib.Path, text: str, *, survives_power: bool = True) -> None:
    """Writes a file: the old content or the new, never a part.

    Of several processes only the one that holds the folder may.

    Args:
      path: The file.
      text: Its content.
      survives_power: Whether that holds even if the power fails, for which the disk
        is waited for.
    """
    aside = path.with_name(f".{path.name}.partial")
    # A file name that is not UTF-8 has surrogates, which become JSON's escapes.
    with (
        of_file(path),
        aside.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(text)
        if survives_power:
            file.flush()
            os.fsync(file.fileno())
    aside.replace(path)


class Heartbeat:
    """heartbeat.json: where the run is and when it was there.

    The training loop itself writes it, no thread: of a run that hangs it grows old.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / _HEARTBEAT
        self._step = 0
        self._activity = ""
        self._last = -math.inf

    def beat(self, activity: str, step: int | None = None) -> None:
        """Writes the file, unless it said the same activity less than five seconds ago.

        Args:
          activity: What the run is doing, in a word or two.
          step: Steps taken; None if they are still as many.
        """
        self._step = self._step if step is None else step
        now = time.monotonic()
        is_news = activity != self._activity or now - self._last >= _HEARTBEAT_SECONDS
        if not is_news or not sharding.is_primary():
            return
        self._last, self._activity = now, activity
        beat = {"time": _now(), "step": self._step, "activity": activity}
        # The next one is due in seconds, and training does not wait for the disk.
        write_text(self._path, _line(beat | _this_process()), survives_power=False)

    def following(self, track: Track) -> Track:
        """A `track` that also writes the file."""

        def tracked(items: Iterable, description: str, total: int) -> Iterator:
            for item in track(items, description, total):
                self.beat(description)
                yield item

        return tracked


class EpochLog:
    """metrics.jsonl and the TensorBoard events: one record for each epoch."""

    def __init__(self, workdir: pathlib.Path, history: Sequence[Mapping[str, Any]]):
        """Starts both anew with the epochs that are done already.

        A run that was killed may have logged an epoch that it has to repeat.
        """
        self._path, self._folder = workdir / "metrics.jsonl", workdir / "tensorboard"
        self._events: EventsWriter | None = None
        if not sharding.is_primary():
            return
        write_text(self._path, "".join(map(_line, history)))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(exist_ok=True)
        # Not SummaryWriter: the thread that it writes in dies of a full disk, with a traceback
        # of its own, and the tenth event after that waits for it for ever.
        with of_file(self._folder):
            self._events = EventsWriter(str(self._folder / "events"))
        for record in history:
            self._write_events(record)

    def append(self, record: Mapping[str, Any]) -> None:
        if self._events is None:
            return
        with of_file(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        self._write_events(record)

    def _write_events(self, record: Mapping[str, Any]) -> None:
        assert self._events is not None
        with of_file(self._folder):
            for key, value in record.items():
                if key in ("step", "epoch"):
                    continue
                # "train_loss" becomes "loss/train", which TensorBoard groups.
                split, _, metric = key.partition("_")
                is_metric = split in ("train", "validation")
                tag = f"{metric}/{split}" if is_metric else f"run/{key}"
                event = Event(summary=summary.scalar(tag, value), step=record["step"])
                event.wall_time = time.time()
                self._events.write_event(event)
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            with of_file(self._folder):
                self._events.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


@_by_primary
def write_metrics(workdir: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes report/metrics.json: the figures of each split, and what the report adds.

    Raises:
      ValueError: A number is not finite.
    """
    (workdir / "report").mkdir(exist_ok=True)
    write_text(workdir / "report" / "metrics.json", _json(report) + "\n")


def _json(value: Any, indent: str = "") -> str:
    """JSON, indented by a space, with a list of numbers, such as a matrix's row, on one line."""
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


@_by_primary
def write_unreadable(workdir: pathlib.Path, unreadable: Sequence[Unreadable]) -> None:
    """Writes report/unreadable.csv: a row for each image that was left out, and why."""
    (workdir / "report").mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "reason"])
    writer.writerows((image.id, image.reason) for image in unreadable)
    write_text(workdir / "report" / "unreadable.csv", text.getvalue())


@_by_primary
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
      ids: Identity of each example.
      labels: int [n], its class.
      probabilities: float32 [n, classes].
      class_names: In the order of the labels.
    """
    (workdir / "report").mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "label", "predicted", "confidence"])
    for example_id, label, row in zip(ids, labels, probabilities, strict=True):
        best = int(row.argmax())
        # The shortest digits that give back this float32, and no other.
        confidence = np.format_float_positional(row[best], unique=True)
        writer.writerow([example_id, class_names[label], class_names[best], confidence])
    write_text(workdir / "report" / "predictions.csv", text.getvalue())
