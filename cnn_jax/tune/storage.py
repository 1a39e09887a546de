"""Where a study is kept, for all who work at it: a database or a journal."""

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
# What a storage raises that is away: a server that is restarted, a network, a lock.
_AWAY = (
    optuna.exceptions.StorageInternalError,
    sqlalchemy.exc.DBAPIError,
    OSError,
)
_LONGEST_PAUSE = 2.0  # Seconds between two tries.
# Of workers that begin at once, each may find tables that another has just made: all there are.
_MOST_COLLISIONS = 30

T = TypeVar("T")


class StorageError(UserError):
    """The storage of a study does not answer."""


def open_storage(url: str) -> BaseStorage:
    """The storage at a URL; its tables are made if they are not there.

    Raises:
      ConfigError: It is no URL of a database, or its driver is missing.
      StorageError: It cannot be opened.
    """
    try:
        if url == _JOURNAL or re.fullmatch(r"sqlite(\+\w+)?:/*(:memory:)?", url):
            raise ConfigError(f"--storage: {url} keeps nothing; it must be {FORMS}")
        if url.startswith(_JOURNAL):
            return _open_journal(pathlib.Path(url.removeprefix(_JOURNAL)).expanduser())
        return _open_database(url)
    except ImportError as error:
        raise ConfigError(
            f"--storage: no driver for {_hidden(url)} is installed: {error}"
        ) from error
    except (*_AWAY, RuntimeError) as error:
        raise StorageError(
            f"--storage: {_hidden(url)} cannot be opened: {_reason(error)}"
        ) from error


def _open_journal(path: pathlib.Path) -> JournalStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(path), lock_obj=_JournalLock(path))
    try:
        return JournalStorage(backend)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--storage: {path} is not a journal of studies") from error


class _JournalLock(JournalFileSymlinkLock):
    """Held while a line is added; cuts off what a full disk or a dead writer left of another.

    Optuna would write on in that line, and could read none of them any more.
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
        # Optuna takes braces for places to fill in.
        template = _with_driver(url).replace("{", "{{").replace("}", "}}")
        for collisions in itertools.count():
            try:
                return RDBStorage(template, engine_kwargs=_engine_options(url))
            except sqlalchemy.exc.DBAPIError as error:
                is_collision = isinstance(error, sqlalchemy.exc.IntegrityError)
                if not (is_collision or "already exists" in str(error)):
                    raise
                if collisions == _MOST_COLLISIONS:
                    raise
            time.sleep(random.uniform(0, 0.2))
        raise AssertionError
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:  # The latter of a port.
        raise ConfigError(f"--storage: must be {FORMS}, got {_hidden(url)!r}") from error


def _with_driver(url: str) -> str:
    """A URL of PostgreSQL that names no driver, with the one that is installed."""
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgres", "postgresql"):
        has_psycopg2 = importlib.util.find_spec("psycopg2") is not None
        scheme = "postgresql" if has_psycopg2 else "postgresql+psycopg"
    return scheme + separator + rest


def _engine_options(url: str) -> dict[str, object]:
    """Options of SQLAlchemy: a server is asked whether it is there, a file's lock waited for."""
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": 60}}
    return {"pool_pre_ping": True}


def in_file(path: pathlib.Path) -> str:
    """The URL of a SQLite file, whatever its name."""
    return sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()


def _hidden(url: str) -> str:
    """A URL, or what was meant as one, without its passwords."""
    if not url.startswith((_JOURNAL, "sqlite:")):
        url = re.sub(r"^(\w[\w+.-]*:/+)?([^:/@]*):.*@", r"\1\2:***@", url, flags=re.DOTALL)
    return re.sub(r"(?i)(password=)[^&]*", r"\1***", url)


def _reason(error: BaseException) -> str:
    """What the database itself has said, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return printable(" ".join(str(error).split())) or type(error).__name__


def patiently(call: Callable[[], T], seconds: float, what_is_safe: str) -> T:
    """The result of a call to the storage, which is tried again for so long if that is away.

    Args:
      call: May be carried out more than once.
      seconds: How long to try.
      what_is_safe: For the message of the error: what is not lost.

    Raises:
      StorageError: It was away all the time.
    """
    start, pause = time.monotonic(), 0.1
    while True:
        try:
            return call()
        except _AWAY as error:
            away = time.monotonic() - start
            if away >= seconds:
                raise StorageError(
                    f"the study's storage has not answered for {seconds:.0f} s ({_reason(error)}). "
                    f"{what_is_safe}; the same command goes on once it is back"
                ) from error
            if pause == 0.1:
                logger.warning(
                    "the study's storage does not answer (%s); trying for %.0f s",
                    _reason(error),
                    seconds,
                )
            time.sleep(min(pause, seconds - away))
            pause = min(2 * pause, _LONGEST_PAUSE)
