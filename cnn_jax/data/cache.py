"""Where generated data, decoded images, what is known of files and programs are kept.

Everything here can be made again, so that all of it may be removed at any time:
`cnn_jax cache --clear`.
"""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from typing import Any

import numpy as np

from cnn_jax.data.decode import Pixels
from cnn_jax.system.atomic import write_text

# What this package puts into the folder, which may hold other things: whole folders of
# these names, and in three folders files of these names.
_OWN_FOLDER = re.compile(r"\.?shapes-v\d+-seed.*")
_OWN_FILE = re.compile(r"[0-9a-f]{32}\.(npy|json)|\.partial-.*")
COMPILED = "compiled"  # Where JAX keeps programs; see `cnn_jax.system.compilation_cache`.
_OWN_FILES = {
    "pixels": _OWN_FILE,
    "scans": _OWN_FILE,
    COMPILED: re.compile(r".+-[0-9a-f]{64}-cache"),
}
_A_DAY = 24 * 60 * 60  # Seconds.
# Pixels and programs are kept so long after they were last used.
SECONDS_KEPT = 30 * _A_DAY


def cache_dir() -> pathlib.Path:
    """`$CNN_JAX_CACHE`, else `cnn_jax` in the user's cache folder."""
    if path := os.environ.get("CNN_JAX_CACHE"):
        return pathlib.Path(path).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "cnn_jax"


def free_bytes() -> int:
    """Room on the disk of the cache folder."""
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def own_entries() -> dict[str, list[pathlib.Path]]:
    """Files and folders of this package in the cache folder, by the kind of thing they are."""
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
    """Removes what this package has made in the cache folder, and nothing else.

    Raises:
      OSError: Something cannot be removed.
    """
    for path in itertools.chain(*own_entries().values()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for kind in _OWN_FILES:
        with contextlib.suppress(OSError):  # Something else is in it.
            (cache_dir() / kind).rmdir()


def read_json(kind: str, key: str) -> Any:
    """What `write_json` wrote, or None."""
    try:
        return json.loads((cache_dir() / kind / f"{key}.json").read_text("utf-8", "surrogatepass"))
    except (OSError, ValueError):  # A damaged file is as good as none.
        return None


def write_json(kind: str, key: str, value: Any) -> None:
    """Writes `kind/key.json`: the old content or the new, never a part.

    Raises:
      OSError: The folder cannot be written, or the disk is full.
    """
    path = cache_dir() / kind / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False)
    write_text(path, text, errors="surrogatepass", durable=False, shared=True)


def open_pixels(key: str, count: int, image_size: tuple[int, int]) -> np.ndarray | None:
    """The array that `PixelFile` published under this key, memory-mapped, or None."""
    try:
        pixels = np.load(_pixels_path(key), mmap_mode="r")
    except (OSError, ValueError, EOFError):  # Not there, or cut short by a crash of the machine.
        return None
    with contextlib.suppress(OSError):  # It may be somebody else's.
        os.utime(_pixels_path(key))
    is_whole = pixels.dtype == np.uint8 and pixels.shape == (count, *image_size, 3)
    return pixels if is_whole else None


def _pixels_path(key: str) -> pathlib.Path:
    return cache_dir() / "pixels" / f"{key}.npy"


def _sweep(folder: pathlib.Path) -> None:
    """Removes what killed processes have left, and pixels that nobody opens any more."""
    for pattern, seconds in ((".partial-*", _A_DAY), ("*.npy", SECONDS_KEPT)):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > seconds:
                    path.unlink()


def _take_room(descriptor: int, start: int, length: int) -> None:
    """Raises OSError if the disk has no room for so many bytes more."""
    if not length:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, start, length)
        return
    if length > free_bytes():  # macOS can only ask.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, start + length)


class PixelFile:
    """uint8 [n, height, width, 3] on disk, while it is being written.

    A context manager; what is not published by its end is removed.
    """

    def __init__(self, count: int, image_size: tuple[int, int]):
        """Takes the room on the disk, so that no later write can fail for want of it.

        Raises:
          OSError: The folder cannot be written, or the disk is too full.
        """
        self._row_bytes = image_size[0] * image_size[1] * 3
        folder = cache_dir() / "pixels"
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        self._descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=folder)
        self._path = pathlib.Path(name)
        try:
            description = {
                "descr": "|u1",
                "fortran_order": False,
                "shape": (count, *image_size, 3),
            }
            with os.fdopen(os.dup(self._descriptor), "wb") as file:
                np.lib.format.write_array_header_2_0(file, description)
                self._start = file.tell()
            _take_room(self._descriptor, self._start, count * self._row_bytes)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "PixelFile":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)

    def write(self, row: int, pixels: Pixels) -> None:
        """Writes one image; threads may write different rows at once.

        Raises:
          OSError: The disk fails.
        """
        rest = np.ascontiguousarray(pixels).data.cast("B")
        offset = self._start + row * self._row_bytes
        while rest:
            written = os.pwrite(self._descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def publish(self, key: str) -> np.ndarray:
        """Makes the file the one of this key, and maps it.

        Raises:
          OSError: The disk fails.
        """
        os.fsync(self._descriptor)
        os.fchmod(self._descriptor, 0o644)
        self._path.replace(_pixels_path(key))
        return np.load(_pixels_path(key), mmap_mode="r")
