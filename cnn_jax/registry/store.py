"""Reads and writes the files of a registry, in a folder or in an object store, with obstore.

A file is created once, either completely or not at all, and is never changed. Concurrent changes of
a registry are safe because two writers cannot both create the same file.
"""

import contextlib
import datetime
import functools
import os
import pathlib
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url

from cnn_jax.system.atomic import sync
from cnn_jax.system.errors import ConfigError, UserError, error_line, hide_passwords, printable

# The folder of temporary files, relative to the registry.
TEMPORARY = "tmp"
_LOCAL = ("file", "local")
_REMOTE = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss")
_READERS = 16  # Number of threads that read files.
# After these errors, the operation has certainly not been performed.
_REFUSED = (
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    PermissionError,
    UnauthenticatedError,
)
# `read_timeout` limits the time without any data. `timeout` limits a whole request, and the default
# of 30 seconds would be too short for the weights of a large network. An endpoint such as a local
# MinIO may be an http:// URL.
_CLIENT = {
    "allow_http": True,
    "connect_timeout": "5s",
    "read_timeout": "10s",
    "timeout": "1h",
}
# A failed request is repeated for at most this time. If the store does not answer, an operation
# therefore fails in less than a minute.
_RETRY = {"retry_timeout": datetime.timedelta(seconds=30)}

_Result = TypeVar("_Result")


class StoreError(UserError):
    """Raised if the files of a registry cannot be read or written."""


class NoAnswerError(StoreError):
    """Raised if the store gave no clear answer, so that the operation may have succeeded."""


class Store:
    """The storage for the files of a registry.

    The name of a file is its path relative to the registry, with `/` as the separator. All methods
    raise `StoreError` on failure, and `NoAnswerError` if the outcome is unknown. In a local folder,
    every new file is read-only and is flushed to the disk.

    Attributes:
      url: The location of the registry for messages: without passwords, and in one line.
    """

    def __init__(self, url: str | os.PathLike[str], flag: str = "--registry") -> None:
        """Creates the object without reading or writing files.

        Args:
          url: A folder, or a URL such as s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH.
          flag: The flag that names the store, for messages.

        Raises:
          ConfigError: The URL is empty or invalid.
        """
        url = os.fspath(url)
        protocol, separator, rest = url.partition("://")
        self._root: pathlib.Path | None = None
        if url and (not separator or protocol in _LOCAL):
            path = pathlib.Path(rest if separator else url).expanduser().absolute()
            self.url, self._root = printable(str(path)), path.resolve()
            self._prefix, self._files = f"{self._root}/", LocalStore()
            return
        self.url, self._prefix = printable(hide_passwords(url)), ""
        if protocol not in _REMOTE:
            raise ConfigError(
                f"{flag}: must be a folder, or a URL that begins with s3://, gs:// or az://, "
                f"got '{self.url}'"
            )
        if "?" in rest or "#" in rest:
            raise ConfigError(f"{flag}: {self.url}: must not contain ? or #")
        needs_profile = protocol.startswith("s3") and "AWS_ACCESS_KEY_ID" not in os.environ
        try:
            self._files = from_url(
                url,
                client_options=_CLIENT,  # type: ignore[arg-type]
                retry_config=_RETRY,  # type: ignore[arg-type]
                credential_provider=_aws_profile() if needs_profile else None,
            )
        except Exception as error:
            raise ConfigError(f"{flag}: {self.url}: {error_line(error)}") from error

    def create(self, name: str, data: bytes) -> None:
        """Creates a new file, completely or not at all.

        If several writers create the same file at the same time, exactly one writer succeeds.

        Raises:
          FileExistsError: The file already exists.
        """
        path = self._prefix + name
        if self._root is None:
            with self._one_line_errors(name, FileExistsError):
                self._call(lambda: obstore.put(self._files, path, data, mode="create"))
            return
        # obstore does not flush local files. If the name existed before the content is on the disk,
        # a power failure could leave an empty log entry.
        temporary = f"{TEMPORARY}/{unique_name()}"
        try:
            self._put(temporary, data)
            with self._one_line_errors(name, FileExistsError):
                obstore.rename(self._files, self._prefix + temporary, path, overwrite=False)
                self._sync_folders(name)
        finally:
            with contextlib.suppress(OSError):
                (self._root / temporary).unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file; the caller guarantees that no other writer uses the same name."""
        self._put(name, data)
        with self._one_line_errors(name):
            self._sync_folders(name)

    def _put(self, name: str, data: bytes) -> None:
        """Writes a file; in a local folder, makes the file read-only and flushes its content."""
        unclear = NoAnswerError if self._root is None else StoreError
        with self._one_line_errors(name, unclear=unclear):
            self._create_root()
            self._call(lambda: obstore.put(self._files, self._prefix + name, data))
            if self._root is not None:
                (self._root / name).chmod(0o444)
                sync(self._root / name)

    def _create_root(self) -> None:
        """Creates the folder of a local registry, and flushes the new folders to the disk."""
        if self._root is not None:
            new = [path for path in (self._root, *self._root.parents) if not path.exists()]
            self._root.mkdir(parents=True, exist_ok=True)
            for folder in reversed(new):
                _sync_folder(folder.parent)

    def _sync_folders(self, name: str) -> None:
        """Flushes the folders of a local file, from the registry's folder to the file's parent."""
        if self._root is not None:
            for folder in reversed(pathlib.PurePath(name).parents):
                _sync_folder(self._root / folder)

    def read(self, name: str) -> bytes:
        """Returns the current content of a file.

        Raises:
          FileNotFoundError: The file does not exist.
        """
        with self._one_line_errors(name, FileNotFoundError):
            path = self._prefix + name
            return self._call(lambda: bytes(obstore.get(self._files, path).bytes()))

    def names(self, folder: str) -> list[str]:
        """Returns the sorted names in a folder, or an empty list if the folder does not exist."""
        with self._one_line_errors(folder):
            path = self._prefix + folder
            found = self._call(lambda: obstore.list_with_delimiter(self._files, path))
            paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
            return sorted(path.rpartition("/")[2] for path in paths)

    def all_names(self) -> list[str]:
        """Returns the names of all files, also in sub-folders, in no particular order."""
        prefix = self._prefix.lstrip("/")
        with self._one_line_errors(""):
            parts = self._call(lambda: list(obstore.list(self._files, self._prefix or None)))
            return [item["path"].removeprefix(prefix) for items in parts for item in items]

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with its content; does nothing if the name does not exist."""
        path = self._prefix + name
        with self._one_line_errors(name), contextlib.suppress(FileNotFoundError):
            if self._root is not None and pathlib.Path(path).is_dir():
                shutil.rmtree(path)
                return
            parts = self._call(lambda: list(obstore.list(self._files, path)))
            paths = [item["path"] for items in parts for item in items]
            self._call(lambda: obstore.delete(self._files, paths or path))

    def local(self, name: str) -> pathlib.Path | None:
        """Returns the local path of a file or folder, or None if the store is remote."""
        return None if self._root is None else self._root / name

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        """Returns the contents of the files `names`, in order, with None for each missing file."""

        def read(name: str) -> bytes | None:
            with contextlib.suppress(FileNotFoundError):
                return self.read(name)
            return None

        contents: list[bytes | None] = []
        # After an error or Ctrl-C, no thread of a later batch is started.
        for start in range(0, len(names), _READERS):
            batch = names[start : start + _READERS]
            threads = [_start_thread(functools.partial(read, name)) for name in batch]
            contents += [thread.result() for thread in threads]
        return contents

    def _call(self, function: Callable[[], _Result]) -> _Result:
        """Calls a function; for a remote store in a thread, because Ctrl-C cannot end the call."""
        if self._root is not None:
            return function()
        return _start_thread(function).result()

    @contextlib.contextmanager
    def _one_line_errors(
        self, name: str, *expected: type[OSError], unclear: type[StoreError] = NoAnswerError
    ) -> Iterator[None]:
        """Converts exceptions to StoreErrors of one line, except the types in `expected`.

        Obstore's AlreadyExistsError is first converted to FileExistsError. If the operation may
        have been performed, the StoreError has the type `unclear`.
        """
        try:
            try:
                yield
            except AlreadyExistsError as error:
                raise FileExistsError(name) from error
        except expected:
            raise
        except Exception as error:
            kind = StoreError if isinstance(error, _REFUSED) else unclear
            raise kind(f"{self.url}/{printable(name)}: {error_line(error)}") from error


def _start_thread(function: Callable[[], _Result]) -> Future[_Result]:
    """Calls a function in a new daemon thread, for which a process does not wait when it ends."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _sync_folder(folder: pathlib.Path) -> None:
    """Flushes the entries of a folder to the disk, unless this process may not read the folder.

    A user may be allowed to create files in `log/`, but not to read the folder above. An error
    would then report a failure after the change was made.
    """
    with contextlib.suppress(PermissionError):
        sync(folder)


def _aws_profile() -> Any:
    """Returns a provider of the credentials and the region in ~/.aws, if boto3 is installed.

    obstore itself reads the variables AWS_..., and the role of a machine or a container.
    """
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()
    except (ImportError, ValueError):  # A ValueError means that boto3 finds no credentials.
        return None


def unique_name() -> str:
    """Returns a unique name that begins with the current time in UTC."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:16]}"
