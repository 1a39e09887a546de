"""The attempts to retrain a model, and their folder.

    STATE/retrain.json             the model to which the folder belongs
    STATE/lock                     locked while a pass is running
    STATE/attempts/KEY/            one folder for each attempt
        attempt.json               the record: the data, the decision and its evidence
        config.json                the configuration of the run
        data/                      the labelled images of the request log, and all splits
        champion/DIGEST/           the bundle with whose weights the run starts
        run/                       the run

The folder of an attempt appears at once, with all that the run needs, so a killed pass leaves no
incomplete attempt. Of old attempts, only the record, the configuration and the splits stay; the
latest attempt has all labelled images of the earlier ones. The registry is the only authority on
versions: a record that a killed pass could not write is completed by the next pass from the log of
the registry.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from cnn_jax.config.schema import Config, flat
from cnn_jax.data.labelled_log import delete_images
from cnn_jax.system.atomic import write_text
from cnn_jax.system.errors import ConfigError, UserError, printable
from cnn_jax.training.run_directory import INDIFFERENT_KEYS

# The states of an attempt. Only a started attempt is resumed.
STARTED, PROMOTED, REFUSED, ROLLED_BACK = "started", "promoted", "refused", "rolled_back"

_FORMAT = 1
_STATE, _LOCK, _ATTEMPTS = "retrain.json", "lock", "attempts"
_RECORD = "attempt.json"
# The folders of an attempt that is being prepared, and of one that is being removed.
_NEW, _REMOVED = ".new", ".removed"


class BusyError(UserError):
    """Another pass with the same folder is running."""


@dataclasses.dataclass
class Attempt:
    """An attempt to retrain a model.

    Attributes:
      folder: The folder of the attempt.
      record: The content of attempt.json, of JSON types:
        number: The number of the attempt, from 1.
        key: The sha256 of the data and the configuration; see `attempt_key`. The note of the
          version in the registry has it too.
        status: One of the states in this module.
        reason: The reason for the status, in one line.
        started, ended: The times in UTC; "ended" is missing in the state "started".
        triggers: The reasons for the attempt, such as ["labels"].
        labelled, new: The number of labelled images of the log, and how many of them the attempt
          before did not have.
        margin: The difference in accuracy that the judgement accepts.
        data: The fingerprint of the data and its splits.
        images: The number of images of the data.
        logged: The number of images of the log in each split.
        champion: The version whose weights the run starts from.
        digest: The digest of the new bundle, after the training.
        version: The version of the new bundle, after it was added to the registry.
        evidence: The comparison with other versions; see `registry.ledger.Evidence`.
        watch: The comparison with the version before, for a promoted version. Without a labelled
          image for it, "images" is 0, and "reason" says so. "labels" is the sha256 of the labels.
    """

    folder: pathlib.Path
    record: dict[str, Any]

    @property
    def status(self) -> str:
        return self.record["status"]

    @property
    def config(self) -> pathlib.Path:
        return self.folder / "config.json"

    @property
    def data(self) -> pathlib.Path:
        return self.folder / "data"

    @property
    def champion(self) -> pathlib.Path:
        return self.folder / "champion"

    @property
    def run(self) -> pathlib.Path:
        return self.folder / "run"

    def update(self, **fields: Any) -> None:
        """Changes fields of the record, and writes the record.

        Raises:
          OSError: The record cannot be written.
        """
        self.record |= fields
        text = json.dumps(self.record, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(self.folder / _RECORD, text + "\n")

    def end(self, status: str, reason: str, **fields: Any) -> None:
        """Records the decision about the attempt."""
        self.update(status=status, reason=reason, ended=now(), **fields)


class State:
    """The folder of all attempts of a model."""

    def __init__(self, path: pathlib.Path):
        self._attempts = path / _ATTEMPTS

    def attempts(self) -> list[Attempt]:
        """Returns all attempts, the earliest first.

        Raises:
          ConfigError: A record is damaged.
        """
        found = []
        for folder in self._attempts.iterdir():
            if folder.name in (_NEW, _REMOVED):
                continue
            path = folder / _RECORD
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                found.append((record["number"], record["status"], Attempt(folder, record)))
            except (OSError, KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"--state: {path} cannot be read: {error!r}; restore the file, or remove its "
                    "folder, so that the attempt may be made again"
                ) from error
        return [attempt for *_, attempt in sorted(found, key=lambda item: item[0])]

    def prepare(self) -> Attempt:
        """Returns an attempt with a new folder, which the next pass removes without `begin`."""
        folder = self._attempts / _NEW
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        # The clock may be set back, so the attempts are ordered by numbers.
        number = 1 + max((attempt.record["number"] for attempt in self.attempts()), default=0)
        return Attempt(folder, {"number": number})

    def begin(self, attempt: Attempt, key: str) -> Attempt:
        """Moves a prepared attempt, whose folder is complete, to the folder of its key."""
        folder = self.folder(key)
        attempt.folder.rename(folder)
        return Attempt(folder, attempt.record)

    def folder(self, key: str) -> pathlib.Path:
        """Returns the folder of the attempt with a key, which may not exist."""
        return self._attempts / key[:16]

    def prune(self, keep: int, versions: Collection[int]) -> None:
        """Deletes the images and the networks of ended attempts; the records and splits stay.

        Args:
          keep: The number of latest ended attempts that are kept whole. The attempt that is not
            ended may be discarded, and the next one needs the images of the last ended attempt.
          versions: The versions whose attempts are kept whole too.

        Raises:
          ConfigError: A record is damaged.
          OSError: A folder cannot be deleted.
        """
        ended = [attempt for attempt in self.attempts() if attempt.status != STARTED]
        for attempt in ended[:-keep]:
            if attempt.record.get("version") not in versions:
                delete_images(attempt.data)
                for folder in (attempt.champion, attempt.run):
                    if folder.exists():
                        shutil.rmtree(folder)

    def discard(self, attempt: Attempt) -> None:
        """Removes an attempt, so that it can be made again."""
        removed = self._attempts / _REMOVED
        shutil.rmtree(removed, ignore_errors=True)
        attempt.folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


@contextlib.contextmanager
def open_state(path: pathlib.Path, model: str) -> Iterator[State]:
    """Opens and locks the folder of the attempts of a model; creates it if it does not exist.

    The operating system releases the lock when the process ends for any reason. Only the owner may
    read a new folder, because it contains images of users.

    Raises:
      BusyError: Another pass has locked the folder.
      ConfigError: The folder belongs to another model or has other files, or cannot be used.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            names = {entry.name for entry in path.iterdir()}
            if foreign := sorted(names - {_STATE, _LOCK, _ATTEMPTS, f".{_STATE}.partial"}):
                raise ConfigError(
                    f"--state: {path} has files that are not of retrain, such as "
                    f"{printable(foreign[0])}; name another folder"
                )
            lock = stack.enter_context((path / _LOCK).open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(f"another pass with --state={path} is running") from error
            _check_model(path / _STATE, model)
            (path / _ATTEMPTS).mkdir(mode=0o700, exist_ok=True)
            for name in (_NEW, _REMOVED):
                shutil.rmtree(path / _ATTEMPTS / name, ignore_errors=True)
        except OSError as error:
            raise ConfigError(f"--state: cannot use {path}: {error.strerror}") from error
        yield State(path.resolve())


def _check_model(path: pathlib.Path, model: str) -> None:
    """Writes the name of the model to a new state folder, or compares it with the present one."""
    try:
        own = json.loads(path.read_text(encoding="utf-8"))["model"]
    except FileNotFoundError:
        write_text(path, json.dumps({"format": _FORMAT, "model": model}) + "\n")
        return
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--state: {path} cannot be read: {error!r}; restore it") from error
    if own != model:
        raise ConfigError(
            f"--state: {path.parent} belongs to the model {printable(str(own))}, not to {model}; "
            "each model needs its own folder"
        )


def attempt_key(fingerprint: str, config: Config) -> str:
    """Returns the key of an attempt: the sha256 of its data and its configuration.

    The same data and configuration are tried only once. The weights with which the run starts and
    keys without an influence on the result do not count. The seed and the precision do not count
    either, because another value only gives another random result.

    Args:
      fingerprint: The fingerprint of the data with its splits.
      config: The configuration of the run.
    """
    start = ("checkpoint.init_from", "checkpoint.restore_step")
    ignored = {*INDIFFERENT_KEYS, *start, "seed", "precision"}
    values: Mapping[str, Any] = {k: v for k, v in flat(config).items() if k not in ignored}
    text = json.dumps({"data": fingerprint, "configuration": values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def now() -> str:
    """Returns the current time in UTC, in ISO format."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
