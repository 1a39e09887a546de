"""Errors that a person can act on: what is wrong, where, and what to do."""

import contextlib
import os
from collections.abc import Iterator


class _OneLine(BaseException):
    """An exception that a notebook shows without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython calls it.
        return [f"{type(self).__name__}: {self}"]


class UserError(_OneLine, Exception):
    """Something outside the program is wrong; the message is one line.

    A command prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class ConfigError(UserError):
    """A flag or a configuration key is wrong."""

    exit_code = 2


class DataError(UserError):
    """A data source cannot be read as a set of labelled images."""


class TrainingError(UserError):
    """Training cannot go on."""


class Interrupted(_OneLine, KeyboardInterrupt):
    """A run was interrupted, all its processes at the same step, and is saved."""


class BundleError(UserError):
    """A directory is not a bundle, or is a damaged one."""


@contextlib.contextmanager
def of_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file in an OSError that does not: writing knows a number alone."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def printable(text: str) -> str:
    """A name from outside on one line: what is not printable stands as its escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
