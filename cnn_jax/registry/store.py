"""Where a registry's files are: a folder, or any place that fsspec reaches.

A file is made once, complete or not at all, and never changed. That two writers cannot both
make the same one is all that a registry's safety rests on, so `prove` tries it out.
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

# Where files lie that are not yet, or no longer, of any use.
ASIDE = "tmp"
_LOCAL = ("file", "local")
# What a file system answers that cannot make hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV}
_READERS = 16  # Files that are read at once.
_RIVALS = 8  # Writers of one file, when it is tried out.
# What a store of S3's kind is given that never answers, unless the caller says otherwise: six
# requests of ten seconds each, which by themselves would be twenty-five of a minute.
_S3_CONFIG = {"connect_timeout": 5, "read_timeout": 10, "retries": {"max_attempts": 2}}
_S3_TRIES = 2  # Of s3fs, which tries again what botocore has given up.
# Threads that share the memory of a process are not kept apart by its file system.
_MEMORY = threading.Lock()


class StoreError(UserError):
    """A registry's files cannot be read or written."""


class AwayError(StoreError):
    """There was no answer, or none that is clear: what was asked for may have happened."""


class Store(abc.ABC):
    """Files by their names, which are paths below a registry's place with `/` between.

    All methods raise `StoreError`, and `AwayError` where the outcome is not known.

    Attributes:
      url: The registry's place, without a password.
    """

    url: str

    @abc.abstractmethod
    def create(self, name: str, data: bytes) -> None:
        """Makes a file that is not there, complete or not at all, whoever else tries to.

        Raises:
          FileExistsError: It is there.
        """

    @abc.abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Makes a file that nobody else makes."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """A file's content, as it is now.

        Raises:
          FileNotFoundError: There is no such file.
        """

    @abc.abstractmethod
    def download(self, name: str, path: pathlib.Path) -> None:
        """Copies a file to this machine.

        Raises:
          FileNotFoundError: There is no such file.
        """

    @abc.abstractmethod
    def names(self, folder: str) -> list[str]:
        """What is in a folder now, sorted; nothing if there is no such folder."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it, if it is there."""

    @abc.abstractmethod
    def local(self, name: str) -> pathlib.Path | None:
        """The path of a file or folder, if it is on this machine."""

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        """The contents of files in their order, None of one that is not there."""

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
    """The store at a place; nothing is read or written yet.

    Args:
      url: A folder, or a URL of fsspec, such as s3://BUCKET/PATH.
      options: What fsspec is to know of it besides, such as {"endpoint_url": ...}.

    Raises:
      ConfigError: It is empty or no such URL, or what reaches it is not installed.
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
    """A folder. Its files are read-only, and on the disk when they are said to be there."""

    def __init__(self, root: pathlib.Path):
        self._root = root.expanduser().absolute()
        self.url = str(self._root)

    def create(self, name: str, data: bytes) -> None:
        path, aside = self._root / name, self._root / ASIDE / unique()
        with self._explained(path):
            _make_folder(path.parent)
            _make_folder(aside.parent)
        try:
            with self._explained(path):
                _write(aside, data)
            self._link(aside, path)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()

    def _link(self, aside: pathlib.Path, path: pathlib.Path) -> None:
        try:
            os.link(aside, path)
            sync(path.parent)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise StoreError(
                    f"{self.url} is on a file system without hard links ({error.strerror}), by "
                    "which a registry keeps two writers apart; use a folder on another one"
                ) from error
            raise AwayError(f"{path}: {error.strerror}") from error

    def write(self, name: str, data: bytes) -> None:
        path = self._root / name
        with self._explained(path):
            _make_folder(path.parent)
            _write(path, data)
            sync(path.parent)

    def read(self, name: str) -> bytes:
        with self._explained(self._root / name, FileNotFoundError):
            return (self._root / name).read_bytes()

    def download(self, name: str, path: pathlib.Path) -> None:
        path.write_bytes(self.read(name))

    def names(self, folder: str) -> list[str]:
        with self._explained(self._root / folder):
            try:
                return sorted(path.name for path in (self._root / folder).iterdir())
            except FileNotFoundError:
                return []

    def remove(self, name: str) -> None:
        path = self._root / name
        with self._explained(path), contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def local(self, name: str) -> pathlib.Path | None:
        return self._root / name

    @contextlib.contextmanager
    def _explained(self, path: pathlib.Path, *passed_on: type[OSError]) -> Iterator[None]:
        """Makes one line of an OSError but those that mean something to the caller."""
        try:
            yield
        except passed_on:
            raise
        except OSError as error:
            advice = "; make room, and give the command again" * (error.errno == errno.ENOSPC)
            what = error.strerror or str(error)
            raise StoreError(f"{error.filename or path}: {what}{advice}") from error


def _make_folder(path: pathlib.Path) -> None:
    """Makes a folder and those above it, each of which outlasts a power failure."""
    if not path.is_dir():
        _make_folder(path.parent)
        try:
            path.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(path)) from error
        sync(path.parent)


def _write(path: pathlib.Path, data: bytes) -> None:
    """Writes a new read-only file, and waits for the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
    with open(descriptor, "wb") as file:  # noqa: PTH123 (it is no path)
        file.write(data)
        file.flush()
        os.fsync(descriptor)


class RemoteStore(Store):
    """A place that fsspec reaches."""

    def __init__(self, url: str, options: Mapping[str, Any]):
        self.url = hidden(url)
        try:
            import fsspec.core

            # An instance of its own: what others list does not become its cache.
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
                f"--registry: {self.url} is no place of fsspec: {reason(error)}"
            ) from error
        except Exception as error:  # Of any kind: some libraries ask their place at once.
            raise ConfigError(
                f"--registry: {self.url} cannot be reached: {reason(error)}"
            ) from error
        self._root = root.rstrip("/")
        is_memory = "memory" in self._protocols()
        self._turn = _MEMORY if is_memory else contextlib.nullcontext()

    def _protocols(self) -> tuple[str, ...]:
        protocol = self._files.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def create(self, name: str, data: bytes) -> None:
        self._refuse_look_before_write()
        with self._turn, self._asking(name, FileExistsError):
            try:
                self._files.pipe_file(self._path(name), data, mode="create")
            except OSError as error:
                if _is_precondition(error):
                    raise FileExistsError(name) from error
                raise

    def _refuse_look_before_write(self) -> None:
        """What fsspec does by itself is to look whether a file is there, and then to write it."""
        import fsspec.spec

        # Of an instance: where the library is asynchronous, its class has no such method.
        function = getattr(self._files.pipe_file, "__func__", None)
        if function is fsspec.spec.AbstractFileSystem.pipe_file:
            raise _unsafe(self.url)

    def write(self, name: str, data: bytes) -> None:
        with self._asking(name):
            self._files.pipe_file(self._path(name), data)

    def read(self, name: str) -> bytes:
        with self._asking(name, FileNotFoundError):
            return self._files.cat_file(self._path(name))

    def download(self, name: str, path: pathlib.Path) -> None:
        with self._asking(name, FileNotFoundError):
            self._files.get_file(self._path(name), str(path))

    def names(self, folder: str) -> list[str]:
        path = self._path(folder)
        with self._asking(folder):
            try:
                found = self._files.ls(path, detail=False)
            except FileNotFoundError:
                return []
        names = {one.rstrip("/").rpartition("/")[2] for one in found if one.rstrip("/") != path}
        return sorted(names)

    def remove(self, name: str) -> None:
        path = self._path(name)
        with self._asking(name), contextlib.suppress(FileNotFoundError):
            # Not `rm`, which takes a * in a name for a pattern.
            for one in self._files.find(path):
                self._files.rm_file(one)

    def local(self, name: str) -> pathlib.Path | None:
        return None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _asking(self, name: str, *passed_on: type[OSError]) -> Iterator[None]:
        """Around a question of the files: nothing is answered from what was listed before.

        (s3fs would say of a file that it is not there, since it was not when its folder was
        listed.) Of whatever a library raises, each of which has its own, one line is made.
        """
        try:
            self._files.invalidate_cache()
            yield
        except passed_on:
            raise
        except Exception as error:
            kind = StoreError if isinstance(error, PermissionError) else AwayError
            raise kind(f"{self.url}/{name}: {reason(error)}") from error


def hidden(text: str) -> str:
    """A URL, or a text with URLs in it, without their passwords; NAME:PASSWORD@ as well."""
    return re.sub(r"([^/@:\s]*):[^/\s]*@", r"\1:***@", text)


def reason(error: BaseException) -> str:
    """What a library has said, on one line and without a password."""
    return hidden(printable(" ".join(str(error).split()))) or type(error).__name__


def _is_precondition(error: BaseException) -> bool:
    """Whether a store of S3's kind says that a file is there, in words that s3fs does not know."""
    response = getattr(error.__cause__, "response", None)
    return bool(response) and response.get("Error", {}).get("Code") == "PreconditionFailed"


def _unsafe(url: str) -> StoreError:
    return StoreError(
        f"{url} lets two writers make the same file, so it cannot hold a registry: use a folder, "
        "or s3://, gs:// or abfs:// with a current s3fs, gcsfs or adlfs"
    )


def prove(store: Store) -> None:
    """Tries out that of several writers of one file exactly one makes it.

    Raises:
      StoreError: It is not so, or nothing can be written.
    """
    name = f"{ASIDE}/{unique()}"
    start = threading.Barrier(_RIVALS)

    def attempt(rival: int) -> Exception | None:
        start.wait()
        try:
            return store.create(name, bytes([rival]))
        except (FileExistsError, AwayError) as error:
            return error

    try:
        with ThreadPoolExecutor(_RIVALS) as pool:
            outcomes = list(pool.map(attempt, range(_RIVALS)))
        makers = [bytes([rival]) for rival, outcome in enumerate(outcomes) if outcome is None]
        unclear = [outcome for outcome in outcomes if isinstance(outcome, AwayError)]
        if unclear and not makers:
            raise unclear[0]
        if makers != [store.read(name)]:
            raise _unsafe(store.url)
        with contextlib.suppress(FileExistsError):
            store.create(name, b"")
            raise _unsafe(store.url)
    finally:
        with contextlib.suppress(StoreError):
            store.remove(name)


def unique() -> str:
    """A name that is nobody else's and says when it was made; see `made_at`."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:16]}"


def made_at(name: str) -> datetime.datetime | None:
    """When a name that ends as `unique` made it was made; None of any other."""
    found = re.search(r"(?:^|-)(\d{8}T\d{6}Z)-[0-9a-f]{16}$", name)
    try:
        return found and datetime.datetime.strptime(found[1], "%Y%m%dT%H%M%S%z")
    except ValueError:
        return None
