"""Where a study is kept, for all who work at it: a database or a journal."""

import importlib.util
import logging
import pathlib
import time
from collections.abc import Callable
from typing import TypeVar

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from cnn_jax.errors import ConfigError, UserError, printable

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
        if url.startswith(_JOURNAL):
            path = pathlib.Path(url.removeprefix(_JOURNAL)).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path)))
        return RDBStorage(_with_driver(url), engine_kwargs=_engine_options(url))
    except sqlalchemy.exc.ArgumentError as error:
        raise ConfigError(f"--storage: must be {FORMS}, got {url!r}") from error
    except ImportError as error:
        raise ConfigError(
            f"--storage: no driver for {_hidden(url)} is installed: {error}"
        ) from error
    except (*_AWAY, RuntimeError) as error:
        raise StorageError(
            f"--storage: {_hidden(url)} cannot be opened: {_reason(error)}"
        ) from error


def _with_driver(url: str) -> str:
    """A URL of PostgreSQL that names no driver, with the one that is installed."""
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgres", "postgresql") and importlib.util.find_spec("psycopg2") is None:
        scheme = "postgresql+psycopg"
    return scheme + separator + rest


def _engine_options(url: str) -> dict[str, object]:
    """Options of SQLAlchemy: a server is asked whether it is there, a file's lock waited for."""
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": 60}}
    return {"pool_pre_ping": True}


def _hidden(url: str) -> str:
    """A URL without its password."""
    try:
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return url


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
