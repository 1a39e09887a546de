"""Errors for the user; each message says what is wrong, where, and what to do."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator

# The minimum similarity of a misspelt name and a suggested name, from 0 to 1, by `difflib`. Below
# this value, the names are mostly different words, such as model.width and model.dense.
_SIMILARITY = 0.75
# `pathlib` changes "s3://" to "s3:/".
URL = r"(s3a?|gs|gcs|az|adl|azure|abfss?|hf|hdfs|https?):/"
COPY_FIRST = (
    "URLs are not supported here: copy the files to or from a folder (aws s3 cp --recursive, "
    "gcloud storage cp --recursive), or mount the bucket"
)


class _OneLine(BaseException):
    """An exception that a notebook shows as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython calls this method.
        return [f"{type(self).__name__}: {self}"]


class UserError(_OneLine, Exception):
    """An error that the user can correct; the message is one line.

    A command prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class ConfigError(UserError):
    """A flag or a configuration key is wrong."""

    exit_code = 2


class DataError(UserError):
    """A data source cannot be read as a set of labelled images."""


class MissingDataError(DataError):
    """A path that the user named does not exist."""

    exit_code = 2


class TrainingError(UserError):
    """Training cannot continue."""


class DivergedError(TrainingError):
    """The loss or a parameter is not finite, which happens again if the run is repeated."""


class Interrupted(_OneLine, KeyboardInterrupt):
    """A run was interrupted at the same step in all processes, and the run's state is saved."""


class BundleError(UserError):
    """A directory is not a bundle, or the bundle is damaged."""


class MissingBundleError(BundleError):
    """A path that the user named contains no bundle."""

    exit_code = 2


class WeightsError(UserError):
    """Pretrained weights are damaged or cannot be downloaded now."""


@contextlib.contextmanager
def file_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds a file name to an OSError that is raised inside the context without a file name.

    Functions such as `write` know only a file descriptor, so their errors name no file.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def is_url(text: str) -> bool:
    """Returns whether a text that should be a path is the URL of an object store or a server."""
    return bool(re.match(URL, text))


def printable(text: str) -> str:
    """Escapes all characters of a text that are not printable, such as line breaks."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def hide_passwords(text: str) -> str:
    """Replaces the passwords of URLs in a text with ***.

    In NAME:PASSWORD@HOST the password is replaced. A name without a password, and a query after ?,
    may be a token and are replaced too. The part before @ in an abfs:// URL is a container.
    """
    text = re.sub(r"([^/@:\s]*):[^/\s]*@", r"\1:***@", text)
    text = re.sub(r"(?<!abfs)(?<!abfss)://[^/@:\s]+@", "://***@", text)
    return re.sub(r"(://[^\s?]*\?)\S+", r"\1***", text)


def error_line(error: BaseException) -> str:
    """Returns the message of an exception in one line, without passwords and debugging data."""
    message = str(error).partition("\n\nDebug source:")[0]
    return hide_passwords(printable(" ".join(message.split()))) or type(error).__name__


def closest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that is most similar to a misspelt name, or None.

    Upper and lower case are not distinguished.

    Args:
      name: The name that does not exist.
      known: All names that exist.

    Returns:
      The known name, or None if no name is similar enough.
    """
    return next(iter(_similar(name, known, 1)), None)


def did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str:
    """Returns the end of an error message: "; did you mean X?", or "" if no name is similar.

    Args:
      name: The name that does not exist.
      known: All names that exist.
      count: The largest number of names to suggest.
    """
    similar = _similar(name, known, count)
    return f"; did you mean {' or '.join(similar)}?" if similar else ""


def _similar(name: str, known: Iterable[str], count: int) -> list[str]:
    folded = {other.casefold(): other for other in known}
    matches = difflib.get_close_matches(name.casefold(), folded, n=count, cutoff=_SIMILARITY)
    return [folded[match] for match in matches]
