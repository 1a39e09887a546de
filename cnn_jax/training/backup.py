"""A copy of a run's folder in object storage, from which another machine can continue the run.

Orbax 0.12 cannot write checkpoints to s3:// (docs/scaling.md). The checkpoints are therefore
written to a local folder, and a thread copies the finished files.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
import socket
import threading
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from cnn_jax.system.atomic import write_bytes
from cnn_jax.system.errors import ConfigError, TrainingError, UserError, is_url
from cnn_jax.training.run_directory import BACKUP, CHECKPOINTS, HEARTBEAT, LOCK

logger = logging.getLogger(__name__)

_NOT_COPIED = {BACKUP, LOCK, HEARTBEAT, "damaged"}
# Orbax writes this file into each checkpoint. In the copy, it marks a complete checkpoint.
_COMPLETE = "_CHECKPOINT_METADATA"


class Backup:
    """The copy of a run's folder in an object store, or in a folder on another disk.

    The file `backup.json` has an id of the run and an id of its latest start. If the folder and the
    copy have the same `backup.json`, no other machine has used the copy since.
    """

    def __init__(self, url: str | os.PathLike[str], seconds: float = 10.0) -> None:
        """Creates the object without reading or writing files.

        Args:
          url: A URL such as s3://BUCKET/PATH, or a folder; it contains nothing but this copy.
          seconds: The time between two searches for new files.

        Raises:
          ConfigError: The URL is invalid.
        """
        if is_url(text := os.fspath(url)) and "://" not in text:
            raise ConfigError(f"--backup: must begin with s3://, gs:// or az://, got {text}")
        # obstore takes 0.1 s to import, and a run without a backup does not need it.
        from cnn_jax.registry.store import Store

        self._store = Store(url, flag="--backup")
        self._seconds = seconds
        self._folder = pathlib.Path()
        self._run = ""  # The id of the run.
        self._owner = b""  # The content of backup.json of this start.
        self._copied: dict[str, Any] = {}  # The time and the size of each copied file, by name.
        self._warning = ""

    def restore(self, folder: pathlib.Path) -> None:
        """Restores the folder of a run if another machine has used the copy since this folder.

        The copy is not changed, because the run may have to be refused.

        Raises:
          ConfigError: The copy contains another run or other files.
          StoreError: The object store cannot be read.
          TrainingError: A file cannot be written, or another machine is changing the copy.
        """
        self._folder = folder
        copy = self._store.local("")
        if copy is not None and copy.is_relative_to(folder.resolve()):
            raise ConfigError(f"--backup: {copy} is inside the run's folder; use another folder")
        path = folder / BACKUP
        known = path.read_bytes() if path.exists() else b""
        names = set(self._store.all_names())
        if names and BACKUP not in names:
            raise ConfigError(f"--backup: {self._store.url} contains other files; use another URL")
        owner = self._read_owner() if names else known
        has_run = (folder / CHECKPOINTS).exists()
        if has_run and _value(owner, "run") != _value(known, "run"):
            raise ConfigError(
                f"--backup: {self._store.url} has the copy of another run than {folder}; use "
                "another URL"
            )
        self._run = _value(owner, "run") or uuid.uuid4().hex
        names.discard(BACKUP)
        self._copied = dict.fromkeys(names)
        try:
            if owner == known:
                self._copied |= self._stored_checkpoints(names)
                return
            # With this content, the next start repeats a restoration that was interrupted.
            write_bytes(path, json.dumps({"run": self._run}).encode())
            self._write_files(names)
        except OSError as error:
            raise TrainingError(
                f"--backup: {self._store.url} cannot be restored to {folder}: {error}; start the "
                "same command again"
            ) from error

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Updates the copy inside the context; the folder must have been restored.

        From now on, no other machine writes the copy. At the end of the context the copy is
        complete. If the context raises an error, and the copy cannot be completed, only a warning
        is logged.

        Raises:
          StoreError: The object store cannot be read or written.
          TrainingError: The run was started on another machine, which now writes the copy.
        """
        owner = {"run": self._run, "start": uuid.uuid4().hex, "host": socket.gethostname()}
        self._owner = json.dumps(owner).encode()
        self._store.write(BACKUP, self._owner)
        write_bytes(self._folder / BACKUP, self._owner)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(self._seconds):
                self._try_to_copy()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            try:
                yield
            finally:
                ended.set()
                thread.join()
        except BaseException:
            self._try_to_copy()
            raise
        self.copy()

    def copy(self) -> None:
        """Copies the files that are new or have changed; removes files that no longer exist.

        A new checkpoint is complete in the copy before an older checkpoint is removed. Checkpoints
        are copied from the oldest to the newest, because the newest may need the checkpoint of the
        best epoch.

        Raises:
          StoreError: The object store cannot be read or written.
          TrainingError: The run was started on another machine, which now writes the copy.
        """
        owner = self._read_owner()
        if not owner:  # The copy was deleted.
            self._copied.clear()
            self._store.write(BACKUP, self._owner)
        elif owner != self._owner:
            raise TrainingError(
                f"--backup: the run was started again on {_value(owner, 'host')}, which now writes "
                f"{self._store.url}; {self._folder} is no longer copied"
            )
        files = self._files()
        for name in _in_order(files):
            if self._copied.get(name) != files[name]:
                try:
                    content = (self._folder / name).read_bytes()
                except FileNotFoundError:
                    return  # The file was removed after it was listed. The next call continues.
                self._store.write(name, content)
                self._copied[name] = files[name]
        for name in reversed(_in_order(self._copied.keys() - files.keys())):
            self._store.remove(name)
            del self._copied[name]

    def _try_to_copy(self) -> None:
        try:
            self.copy()
            self._warning = ""
        except (UserError, OSError) as error:
            if str(error) != self._warning:
                logger.warning("%s", error)
            self._warning = str(error)

    def _stored_checkpoints(self, names: set[str]) -> dict[str, Any]:
        """Returns the files of the checkpoints that the copy has in full.

        The file that marks a complete checkpoint has the time at which the checkpoint was saved. So
        it differs if a checkpoint of the same step was saved again.

        Args:
          names: The names of all files in the copy.

        Returns:
          The time and the size of each file in the folder, by its name.
        """
        files = self._files()
        same = tuple(
            mark.removesuffix(_COMPLETE)
            for mark in names & files.keys()
            if mark.endswith(f"/{_COMPLETE}")
            and self._store.read(mark) == (self._folder / mark).read_bytes()
        )
        return {name: files[name] for name in names & files.keys() if name.startswith(same)}

    def _write_files(self, names: set[str]) -> None:
        """Replaces the checkpoints of the folder, and writes the other files of the copy."""
        shutil.rmtree(self._folder / CHECKPOINTS, ignore_errors=True)
        for name in _in_order(names):
            step = pathlib.PurePath(name).parts[:2]
            if step[0] == CHECKPOINTS and "/".join((*step, _COMPLETE)) not in names:
                continue
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._store.read(name))
            self._copied[name] = _version(path)

    def _files(self) -> dict[str, Any]:
        """Returns the time of change and the size of each finished file of the run, by its name."""
        files = {}
        for parent, folders, names in os.walk(self._folder):
            place = pathlib.Path(parent).relative_to(self._folder)
            if place.as_posix() == CHECKPOINTS:  # A checkpoint that is being written has a suffix.
                folders[:] = filter(str.isdecimal, folders)
            elif parent == str(self._folder):
                folders[:] = set(folders) - _NOT_COPIED
                names = set(names) - _NOT_COPIED
            # `atomic` writes to hidden files and folders first.
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    if not name.startswith("."):
                        files[(place / name).as_posix()] = _version(pathlib.Path(parent, name))
        return files

    def _read_owner(self) -> bytes:
        try:
            return self._store.read(BACKUP)
        except FileNotFoundError:
            return b""


def _in_order(names: Iterable[str]) -> list[str]:
    """Returns the names in the order in which the files are copied.

    Checkpoints come after all other files, the oldest checkpoint first. The last file of each
    checkpoint is the file that marks it as complete.
    """

    def order(name: str) -> tuple[int, str, bool, str]:
        folder, *rest = pathlib.PurePath(name).parts
        step = rest[0] if folder == CHECKPOINTS else ""
        return len(step), step, name.endswith(f"/{_COMPLETE}"), name

    return sorted(names, key=order)


def _version(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _value(owner: bytes, key: str) -> str:
    """Returns a value of backup.json; "" if the content is empty or damaged."""
    with contextlib.suppress(ValueError):
        return json.loads(owner)[key]
    return ""
