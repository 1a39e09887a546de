"""The storage that all workers of a study share: a database or a journal."""

import importlib.util
import itertools
import logging
import os
import pathlib
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from cnn_jax.system.errors import ConfigError, UserError, printable

logger = logging.getLogger(__name__)

FORMS = "a database's URL, such as postgresql://USER@HOST/NAME, or journal:PATH"
_JOURNAL = "journal:"
# Errors that are raised while the storage is unavailable, for example because a database is
# locked.
_UNAVAILABLE = (
    optuna.exceptions.StorageInternalError,
    sqlalchemy.exc.DBAPIError,
    OSError,
)
_MAX_PAUSE = 2.0  # The maximum time between two attempts, in seconds.
# Workers that start at the same time may try to create the same table. A worker then retries up to
# this number of times.
_MAX_COLLISIONS = 30

T = TypeVar("T")


class StorageError(UserError):
    """Raised if the storage of a study is unavailable."""


def open_storage(url: str) -> BaseStorage:
    """Opens the storage at a URL, and creates missing tables.

    Raises:
      ConfigError: The URL has none of the forms in `FORMS`, or the driver is not installed.
      StorageError: The storage cannot be opened.
    """
    try:
        if url == _JOURNAL or re.fullmatch(r"sqlite(\+\w+)?:/*(:memory:)?", url):
            raise ConfigError(f"--storage: {url} keeps nothing; it must be {FORMS}")
        if url.startswith(_JOURNAL):
            return _open_journal(pathlib.Path(url.removeprefix(_JOURNAL)).expanduser())
        return _open_database(url)
    except ImportError as error:
        raise ConfigError(
            f"--storage: no driver for {_without_passwords(url)} is installed: {error}"
        ) from error
    except (*_UNAVAILABLE, RuntimeError) as error:
        raise StorageError(
            f"--storage: {_without_passwords(url)} cannot be opened: {_reason(error)}"
        ) from error


def _open_journal(path: pathlib.Path) -> JournalStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(path), lock_obj=_JournalLock(path))
    try:
        return JournalStorage(backend)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--storage: {path} is not a journal of studies") from error


class _JournalLock(JournalFileSymlinkLock):
    """A lock of a journal file; acquiring the lock also removes an incomplete last line.

    A full disk or a killed writer leaves an incomplete line. Optuna would append to the line,
    and could then read neither of the two records.
    """

    def __init__(self, path: pathlib.Path):
        super().__init__(str(path))
        self._path = path

    def acquire(self) -> bool:
        is_held = super().acquire()
        try:
            with self._path.open("r+b") as file:
                end = file.seek(0, os.SEEK_END)
                while end and file.seek(end - 1) >= 0 and file.read(1) != b"\n":
                    end -= 1
                file.truncate(end)
        except BaseException:
            self.release()
            raise
        return is_held


def _open_database(url: str) -> RDBStorage:
    try:
        if "@" in (sqlalchemy.engine.make_url(url).host or ""):
            raise ConfigError("--storage: an @ in a password is written %40")
        # Optuna treats braces in a URL as placeholders, so braces are doubled.
        template = _with_driver(url).replace("{", "{{").replace("}", "}}")
        for collisions in itertools.count():
            try:
                return RDBStorage(template, engine_kwargs=_engine_options(url))
            except sqlalchemy.exc.DBAPIError as error:
                is_collision = isinstance(error, sqlalchemy.exc.IntegrityError)
                if not (is_collision or "already exists" in str(error)):
                    raise
                if collisions == _MAX_COLLISIONS:
                    raise
            time.sleep(random.uniform(0, 0.2))
        raise AssertionError
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        # SQLAlchemy raises ValueError if the port is not a number.
        raise ConfigError(f"--storage: must be {FORMS}, got {_without_passwords(url)!r}") from error


def _with_driver(url: str) -> str:
    """Adds the name of the installed driver to a PostgreSQL URL that names no driver."""
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgres", "postgresql"):
        has_psycopg2 = importlib.util.find_spec("psycopg2") is not None
        scheme = "postgresql" if has_psycopg2 else "postgresql+psycopg"
    return scheme + separator + rest


def _engine_options(url: str) -> dict[str, object]:
    """Returns the options of SQLAlchemy's engine for the database of a URL.

    For a SQLite file, the engine waits until the file is unlocked. For a server, the engine
    tests each connection before use.
    """
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": 60}}
    return {"pool_pre_ping": True}


def sqlite_url(path: pathlib.Path) -> str:
    """Returns the URL of a SQLite file; the path may contain any characters."""
    return sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()


def _without_passwords(url: str) -> str:
    """Replaces the passwords in a URL with asterisks. The URL may be malformed."""
    if not url.startswith((_JOURNAL, "sqlite:")):
        url = re.sub(r"^(\w[\w+.-]*:/+)?([^:/@]*):.*@", r"\1\2:***@", url, flags=re.DOTALL)
    return re.sub(r"(?i)(password=)[^&]*", r"\1***", url)


def _reason(error: BaseException) -> str:
    """Returns the message of an error's original cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return printable(" ".join(str(error).split())) or type(error).__name__


def call_with_retries(call: Callable[[], T], seconds: float, safe: str) -> T:
    """Calls a function that uses the storage, and retries while the storage is unavailable.

    Args:
      call: The function; it may be executed more than once.
      seconds: The time for which the call is retried, in seconds.
      safe: A clause for the error message that names the data that is not lost.

    Returns:
      The result of the call.

    Raises:
      StorageError: The storage was unavailable for the whole time.
    """
    start, pause = time.monotonic(), 0.1
    while True:
        try:
            return call()
        except _UNAVAILABLE as error:
            waited = time.monotonic() - start
            if waited >= seconds:
                raise StorageError(
                    f"the study's storage has not answered for {seconds:.0f} s ({_reason(error)}). "
                    f"{safe}; start the same command again when the storage is available"
                ) from error
            if pause == 0.1:
                logger.warning(
                    "the study's storage does not answer (%s); retrying for %.0f s",
                    _reason(error),
                    seconds,
                )
            time.sleep(min(pause, seconds - waited))
            pause = min(2 * pause, _MAX_PAUSE)
