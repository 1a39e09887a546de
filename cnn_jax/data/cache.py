"""The cache folder for generated data, resized images, image records and compiled programs.

Everything in the folder can be computed again, so it may be removed at any time:
`cnn_jax cache --clear`.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Collection
from typing import IO, Any

import numpy as np

from cnn_jax.system.atomic import replacing, write_text

# Other programs may store files in the cache folder too. Only folders that match _OWN_FOLDER, and
# files that match the pattern of their folder in _OWN_FILES, belong to this package and may be
# removed.
_OWN_FOLDER = re.compile(r"\.?shapes-v\d+-seed.*")
_OWN_FILE = re.compile(r"[0-9a-f]{32}(\.npy|\.json|-[0-9a-f]{32}\.rows)|\.partial-.*")
# The folder of JAX's compilation cache; see `cnn_jax.system.compilation_cache`.
COMPILED = "compiled"
_OWN_FILES = {
    "pixels": _OWN_FILE,
    "scans": _OWN_FILE,
    "features": _OWN_FILE,
    "looks": _OWN_FILE,
    COMPILED: re.compile(r".+-[0-9a-f]{64}-cache"),
}
# The prefix of the temporary files that `open_temporary` creates.
_LOCKED = ".partial-locked-"
# A temporary file without a lock is kept for this time after it was written, in seconds: other
# machines do not see the locks of some network file systems.
_SECONDS_WITHOUT_LOCK = 10 * 60
# The length of a day in seconds.
_A_DAY = 24 * 60 * 60
# Cached arrays and compiled programs are removed after this number of seconds without use.
SECONDS_KEPT = 30 * _A_DAY


def cache_dir() -> pathlib.Path:
    """Returns the cache folder: `$CNN_JAX_CACHE`, or `cnn_jax` in the user's cache folder."""
    if path := os.environ.get("CNN_JAX_CACHE"):
        return pathlib.Path(path).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "cnn_jax"


def free_bytes() -> int:
    """Returns the number of free bytes on the disk of the cache folder."""
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def own_entries() -> dict[str, list[pathlib.Path]]:
    """Returns the files and folders of this package in the cache folder, grouped by kind."""
    folder = cache_dir()
    entries = {
        kind: [path for path in _listed(folder / kind) if own.fullmatch(path.name)]
        for kind, own in _OWN_FILES.items()
    }
    entries |= {p.name: [p] for p in _listed(folder) if _OWN_FOLDER.fullmatch(p.name)}
    return {kind: paths for kind, paths in entries.items() if paths}


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def clear() -> None:
    """Removes the files and folders of this package from the cache folder.

    Raises:
      OSError: A file or folder cannot be removed.
    """
    for path in itertools.chain(*own_entries().values()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for kind in _OWN_FILES:
        # `rmdir` fails if the folder still contains files of other programs. The folder then
        # remains.
        with contextlib.suppress(OSError):
            (cache_dir() / kind).rmdir()


def read_json(kind: str, key: str) -> Any:
    """Returns the value that `write_json` stored under a key; None if no value is stored."""
    try:
        return json.loads((cache_dir() / kind / f"{key}.json").read_text("utf-8", "surrogatepass"))
    except (OSError, ValueError):  # The file is missing or damaged.
        return None


def write_json(kind: str, key: str, value: Any) -> None:
    """Stores a value in the cache as the file `kind/key.json`, which is written atomically.

    Raises:
      OSError: The folder cannot be written, or the disk is full.
    """
    path = cache_dir() / kind / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False)
    write_text(path, text, errors="surrogatepass", durable=False, shared=True)


def read_array(kind: str, key: str) -> np.ndarray | None:
    """Returns the memory-mapped array that is stored under a key; None if no array is stored."""
    path = cache_dir() / kind / f"{key}.npy"
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # The file is missing or truncated.
        return None
    # Update the time of the last use. The update fails if another user owns the file.
    with contextlib.suppress(OSError):
        os.utime(path)
    return array


def write_array(kind: str, key: str, array: np.ndarray) -> None:
    """Stores an array in the cache as the file `kind/key.npy`, which is written atomically.

    Raises:
      OSError: The folder cannot be written, or the disk is full.
    """
    path = cache_dir() / kind / f"{key}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    with replacing(path, durable=False, shared=True) as file:
        np.save(file, array)


def open_temporary(folder: pathlib.Path) -> tuple[IO[bytes], pathlib.Path]:
    """Creates a temporary file, which `sweep` removes after this process has been killed.

    The file is locked until it is closed. The operating system also closes the file when the
    process ends for any reason.

    Returns:
      The open file and its path.

    Raises:
      OSError: The file cannot be created.
    """
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_LOCKED, dir=folder)
        with contextlib.suppress(OSError):  # Not all network file systems have locks.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Another process may have removed the file before it was locked.
        if os.fstat(descriptor).st_nlink:
            return os.fdopen(descriptor, "r+b"), pathlib.Path(name)
        os.close(descriptor)


def sweep(folder: pathlib.Path, keep: Collection[pathlib.Path | None] = ()) -> None:
    """Removes files that were unused for 30 days, and temporary files of killed processes.

    Args:
      folder: A folder of arrays (`write_array`) or of rows (`row_cache`).
      keep: Files that are not removed.
    """
    for path in folder.glob(".partial-*"):
        with contextlib.suppress(OSError):
            _remove_abandoned(path)
    for path in (*folder.glob("*.npy"), *folder.glob("*.rows")):
        with contextlib.suppress(OSError):
            if path not in keep and _seconds_unused(path) > SECONDS_KEPT:
                path.unlink()


def _remove_abandoned(path: pathlib.Path) -> None:
    """Removes a temporary file if its process has ended.

    The process has ended if the file should be locked but is not, and was not written for ten
    minutes. A file without this kind of lock is removed one day after it was last written, and so
    is each file on a file system without locks.
    """
    with contextlib.ExitStack() as stack:
        is_abandoned = False
        if path.name.startswith(_LOCKED):
            try:
                # On NFS, only a file that is open for writing can be locked.
                file = stack.enter_context(path.open("r+b"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_abandoned = True
            except BlockingIOError:
                return
            except OSError:  # Another user owns the file, or the file system has no locks.
                pass
        if _seconds_unused(path) > (_SECONDS_WITHOUT_LOCK if is_abandoned else _A_DAY):
            path.unlink()


def _seconds_unused(path: pathlib.Path) -> float:
    return time.time() - path.stat().st_mtime
