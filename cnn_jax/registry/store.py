"""Reads and writes the files of a registry, in a folder or in any file system of fsspec.

A file is created once, either completely or not at all, and is never changed. Concurrent changes of
a registry are safe because two writers cannot both create the same file. `check_exclusive_create`
tests whether a store guarantees this.
"""

import abc
import contextlib
import datetime
import errno
import os
import pathlib
import re
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cnn_jax.system.atomic import sync
from cnn_jax.system.errors import ConfigError, UserError, printable

# The folder of temporary files, relative to the registry.
TEMPORARY = "tmp"
_LOCAL = ("file", "local")
# The error numbers by which a file system reports that it does not support hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV}
_READERS = 16  # Number of threads that read files.
_RIVALS = 8  # Number of concurrent writers in `check_exclusive_create`.
# Timeouts for S3, in seconds. With these values, an operation on a store that never answers fails
# after six requests of ten seconds each. With the defaults of the libraries, the operation would
# make 25 requests of a minute each.
_S3_CONFIG = {"connect_timeout": 5, "read_timeout": 10, "retries": {"max_attempts": 2}}
# Number of attempts of s3fs for each operation. botocore sends several requests in each attempt.
_S3_TRIES = 2
# This lock is needed because fsspec's memory file system is not thread-safe.
_MEMORY = threading.Lock()


class StoreError(UserError):
    """Raised if the files of a registry cannot be read or written."""


class NoAnswerError(StoreError):
    """Raised if the store gave no clear answer, so that the operation may have succeeded."""


class Store(abc.ABC):
    """The storage for the files of a registry.

    The name of a file is its path relative to the registry, with `/` as the separator. All methods
    raise `StoreError` on failure, and `NoAnswerError` if the outcome is unknown.

    Attributes:
      url: The location of the registry, without passwords.
    """

    url: str

    @abc.abstractmethod
    def create(self, name: str, data: bytes) -> None:
        """Creates a new file, completely or not at all.

        If several writers create the same file at the same time, exactly one writer succeeds.

        Raises:
          FileExistsError: The file already exists.
        """

    @abc.abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Creates a file; the caller guarantees that no other writer uses the same name."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Returns the current content of a file.

        Raises:
          FileNotFoundError: The file does not exist.
        """

    @abc.abstractmethod
    def download(self, name: str, path: pathlib.Path) -> None:
        """Copies a file to a path on this machine.

        Raises:
          FileNotFoundError: The file does not exist.
        """

    @abc.abstractmethod
    def names(self, folder: str) -> list[str]:
        """Returns the sorted names in a folder, or an empty list if the folder does not exist."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file, or a folder with its content; does nothing if the name does not exist."""

    @abc.abstractmethod
    def local(self, name: str) -> pathlib.Path | None:
        """Returns the local path of a file or folder, or None if the store is remote."""

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        """Returns the contents of the files `names`, in order, with None for each missing file."""

        def read(name: str) -> bytes | None:
            try:
                return self.read(name)
            except FileNotFoundError:
                return None

        if len(names) == 1:
            return [read(names[0])]
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(read, names))


def open_store(url: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Store:
    """Creates the store for a folder or a URL, without reading or writing files.

    Args:
      url: A folder, or a URL of fsspec, such as s3://BUCKET/PATH.
      options: Options of fsspec for this file system, such as {"endpoint_url": ...}.

    Raises:
      ConfigError: The URL is empty or invalid, or a package for it is not installed.
    """
    url = os.fspath(url)
    protocol, separator, rest = url.partition("://")
    if not url or (separator and not protocol):
        raise ConfigError(f"--registry: must be a folder or a URL of fsspec, got {url!r}")
    if not separator:
        return LocalStore(pathlib.Path(url))
    if protocol in _LOCAL:
        return LocalStore(pathlib.Path(rest))
    return RemoteStore(url, options or {})


class LocalStore(Store):
    """A store in a local folder; every new file is read-only and is flushed to disk."""

    def __init__(self, root: pathlib.Path):
        self._root = root.expanduser().absolute()
        self.url = str(self._root)

    def create(self, name: str, data: bytes) -> None:
        path, temporary = self._root / name, self._root / TEMPORARY / unique_name()
        with self._store_errors(path):
            _make_folder(path.parent)
            _make_folder(temporary.parent)
        try:
            with self._store_errors(path):
                _write(temporary, data)
            self._link(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _link(self, temporary: pathlib.Path, path: pathlib.Path) -> None:
        try:
            os.link(temporary, path)
            sync(path.parent)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise StoreError(
                    f"{self.url} is on a file system without hard links ({error.strerror}), which "
                    "a registry needs; use a folder on another file system"
                ) from error
            raise NoAnswerError(f"{path}: {error.strerror}") from error

    def write(self, name: str, data: bytes) -> None:
        path = self._root / name
        with self._store_errors(path):
            _make_folder(path.parent)
            _write(path, data)
            sync(path.parent)

    def read(self, name: str) -> bytes:
        with self._store_errors(self._root / name, FileNotFoundError):
            return (self._root / name).read_bytes()

    def download(self, name: str, path: pathlib.Path) -> None:
        path.write_bytes(self.read(name))

    def names(self, folder: str) -> list[str]:
        with self._store_errors(self._root / folder):
            try:
                return sorted(path.name for path in (self._root / folder).iterdir())
            except FileNotFoundError:
                return []

    def remove(self, name: str) -> None:
        path = self._root / name
        with self._store_errors(path), contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def local(self, name: str) -> pathlib.Path | None:
        return self._root / name

    @contextlib.contextmanager
    def _store_errors(self, path: pathlib.Path, *expected: type[OSError]) -> Iterator[None]:
        """Converts unexpected OSErrors to StoreErrors with one-line messages."""
        try:
            yield
        except expected:
            raise
        except OSError as error:
            advice = "; free disk space, then run the command again"
            advice *= error.errno == errno.ENOSPC
            problem = error.strerror or str(error)
            raise StoreError(f"{error.filename or path}: {problem}{advice}") from error


def _make_folder(path: pathlib.Path) -> None:
    """Creates a folder and all missing parent folders, and flushes these folders to disk."""
    if not path.is_dir():
        _make_folder(path.parent)
        try:
            path.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(path)) from error
        sync(path.parent)


def _write(path: pathlib.Path, data: bytes) -> None:
    """Creates a read-only file, and flushes its content to disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
    with open(descriptor, "wb") as file:  # noqa: PTH123 (a descriptor, not a path)
        file.write(data)
        file.flush()
        os.fsync(descriptor)


class RemoteStore(Store):
    """A store in a file system that fsspec supports."""

    def __init__(self, url: str, options: Mapping[str, Any]):
        self.url = hide_passwords(url)
        try:
            import fsspec.core

            # Use a separate instance of the file system, because fsspec's shared instances also
            # share a cache of folder listings.
            options = {**options, "skip_instance_cache": True}
            is_s3 = url.startswith(("s3://", "s3a://"))
            if is_s3:
                config = {**_S3_CONFIG, **options.get("config_kwargs", {})}
                options["config_kwargs"] = config
            self._files, root = fsspec.core.url_to_fs(url, **options)
            if is_s3:
                self._files.retries = _S3_TRIES
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"--registry: {self.url} is not a URL of fsspec: {error_line(error)}"
            ) from error
        except Exception as error:
            # Catch every exception, because some libraries connect to the store during this call.
            raise ConfigError(
                f"--registry: {self.url} cannot be reached: {error_line(error)}"
            ) from error
        self._root = root.rstrip("/")
        is_memory = "memory" in self._protocols()
        self._lock = _MEMORY if is_memory else contextlib.nullcontext()

    def _protocols(self) -> tuple[str, ...]:
        protocol = self._files.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def create(self, name: str, data: bytes) -> None:
        self._refuse_generic_create()
        with self._lock, self._store_errors(name, FileExistsError):
            try:
                self._files.pipe_file(self._path(name), data, mode="create")
            except OSError as error:
                if _is_precondition(error):
                    raise FileExistsError(name) from error
                raise

    def _refuse_generic_create(self) -> None:
        """Raises StoreError if the file system has only fsspec's generic `pipe_file`.

        The generic method first checks whether the file exists and then writes the file. Between
        these two steps another writer could create the file.
        """
        import fsspec.spec

        # Look up `pipe_file` in the instance, because asynchronous file systems add the method to
        # instances, not to the class.
        function = getattr(self._files.pipe_file, "__func__", None)
        if function is fsspec.spec.AbstractFileSystem.pipe_file:
            raise _unsafe(self.url)

    def write(self, name: str, data: bytes) -> None:
        with self._store_errors(name):
            self._files.pipe_file(self._path(name), data)

    def read(self, name: str) -> bytes:
        with self._store_errors(name, FileNotFoundError):
            return self._files.cat_file(self._path(name))

    def download(self, name: str, path: pathlib.Path) -> None:
        with self._store_errors(name, FileNotFoundError):
            self._files.get_file(self._path(name), str(path))

    def names(self, folder: str) -> list[str]:
        path = self._path(folder)
        with self._store_errors(folder):
            try:
                found = self._files.ls(path, detail=False)
            except FileNotFoundError:
                return []
        paths = (entry.rstrip("/") for entry in found)
        return sorted({entry.rpartition("/")[2] for entry in paths if entry != path})

    def remove(self, name: str) -> None:
        path = self._path(name)
        with self._store_errors(name), contextlib.suppress(FileNotFoundError):
            # Do not use `rm`, because `rm` treats a * in a name as a pattern.
            for file in self._files.find(path):
                self._files.rm_file(file)

    def local(self, name: str) -> pathlib.Path | None:
        return None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _store_errors(self, name: str, *expected: type[OSError]) -> Iterator[None]:
        """Empties the listing cache; inside the context, converts unexpected errors to StoreErrors.

        If the cache has an old listing of the folder, s3fs reports a new file as missing.
        """
        try:
            self._files.invalidate_cache()
            yield
        except expected:
            raise
        except Exception as error:
            kind = StoreError if isinstance(error, PermissionError) else NoAnswerError
            raise kind(f"{self.url}/{name}: {error_line(error)}") from error


def hide_passwords(text: str) -> str:
    """Replaces PASSWORD in texts such as NAME:PASSWORD@HOST with ***."""
    return re.sub(r"([^/@:\s]*):[^/\s]*@", r"\1:***@", text)


def error_line(error: BaseException) -> str:
    """Returns the message of an exception in one line, without passwords."""
    return hide_passwords(printable(" ".join(str(error).split()))) or type(error).__name__


def _is_precondition(error: BaseException) -> bool:
    """Returns whether an error is S3's response for a file that already exists.

    s3fs does not convert this error to FileExistsError.
    """
    response = getattr(error.__cause__, "response", None)
    return bool(response) and response.get("Error", {}).get("Code") == "PreconditionFailed"


def _unsafe(url: str) -> StoreError:
    return StoreError(
        f"{url} lets two writers create the same file, so it cannot contain a registry: use a "
        "folder, or s3://, gs:// or abfs:// with a current s3fs, gcsfs or adlfs"
    )


def check_exclusive_create(store: Store) -> None:
    """Checks that a store lets exactly one of several concurrent writers create a file.

    Raises:
      StoreError: Several writers created the file, or no file can be written.
    """
    name = f"{TEMPORARY}/{unique_name()}"
    start = threading.Barrier(_RIVALS)

    def attempt(rival: int) -> Exception | None:
        start.wait()
        try:
            return store.create(name, bytes([rival]))
        except (FileExistsError, NoAnswerError) as error:
            return error

    try:
        with ThreadPoolExecutor(_RIVALS) as pool:
            outcomes = list(pool.map(attempt, range(_RIVALS)))
        winners = [bytes([rival]) for rival, outcome in enumerate(outcomes) if outcome is None]
        unclear = [outcome for outcome in outcomes if isinstance(outcome, NoAnswerError)]
        if unclear and not winners:
            raise unclear[0]
        if winners != [store.read(name)]:
            raise _unsafe(store.url)
        with contextlib.suppress(FileExistsError):
            store.create(name, b"")
            raise _unsafe(store.url)
    finally:
        with contextlib.suppress(StoreError):
            store.remove(name)


def unique_name() -> str:
    """Returns a unique name that contains its creation time; see `creation_time`."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:16]}"


def creation_time(name: str) -> datetime.datetime | None:
    """Parses the creation time in a name from `unique_name`; returns None if there is no time."""
    match = re.search(r"(?:^|-)(\d{8}T\d{6}Z)-[0-9a-f]{16}$", name)
    try:
        return match and datetime.datetime.strptime(match[1], "%Y%m%dT%H%M%S%z")
    except ValueError:
        return None
