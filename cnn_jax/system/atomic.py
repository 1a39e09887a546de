"""Atomic writes: a file has either its old content or its complete new content."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import IO

from cnn_jax.system.errors import file_errors


def write_text(
    path: pathlib.Path,
    text: str,
    *,
    errors: str = "backslashreplace",
    durable: bool = True,
    shared: bool = False,
) -> None:
    """Writes a text file in UTF-8 atomically; see `replacing` for the possible errors.

    Args:
      path: The file.
      text: The content of the file.
      errors: The error handler of the encoding. A file name that is not UTF-8 has
        surrogates, which the default handler converts to escape sequences of JSON.
      durable: Whether the file is complete even after a power failure.
      shared: Whether several processes may write the file at the same time.
    """
    write_bytes(path, text.encode("utf-8", errors), durable=durable, shared=shared)


def write_bytes(
    path: pathlib.Path, data: bytes, *, durable: bool = True, shared: bool = False
) -> None:
    """Writes a binary file atomically; see `replacing` for the arguments and errors."""
    with replacing(path, durable=durable, shared=shared) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(
    path: pathlib.Path, *, durable: bool = True, shared: bool = False
) -> Iterator[IO[bytes]]:
    """Opens a temporary file in the folder of `path`, and renames the file to `path` at the end.

    After an exception, `path` is unchanged and the temporary file is removed. A killed
    process leaves its temporary file: `.NAME.partial`, which the next write replaces, or
    `.partial-RANDOM` if `shared` is True.

    Args:
      path: The file; its folder exists.
      durable: Whether the file is complete even after a power failure, because the
        content is written to the disk before the file is renamed.
      shared: Whether several processes may write the file at the same time. The content of
        the last writer remains, and all users may read the file.

    Raises:
      OSError: The file cannot be written. The error contains a file name.
    """
    if shared:
        descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
        temporary = pathlib.Path(name)
        file = os.fdopen(descriptor, "wb")
    else:
        temporary = path.with_name(f".{path.name}.partial")
        file = temporary.open("wb")
    try:
        with file_errors(path):
            with file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            if shared:
                temporary.chmod(0o644)  # `mkstemp` creates files that only the user can read.
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync(path: str | os.PathLike[str]) -> None:
    """Flushes a file, or the entries of a folder, to the disk (`fsync`)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
