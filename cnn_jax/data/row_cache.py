"""A cache of rows: one uint8 array for each image file, stored under the digest of the file.

The rows of a data set are in files called segments. A segment never changes: missing rows are
written to new segments, so one added image writes one row. A segment contains its rows, and then
the digest and the checksum of each row. It gets its name when it is complete, so several processes
may use the cache at the same time. The size of a segment is limited: a killed process loses at most
the rows of one segment.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import math
import os
import pathlib
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import IO

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from cnn_jax.data import cache

logger = logging.getLogger(__name__)

# The second part of a segment: the digest (32 hexadecimal digits) and the CRC-32 of each row.
_INDEX = np.dtype([("digest", "u1", (16,)), ("checksum", "<u4")])
_DIGITS = 32
# A segment is full at this size. A killed process loses at most the rows of one segment.
_SEGMENT_BYTES = 2**32
# The largest number of segments of less than half this size from which a data set is read.
_MAX_SMALL_SEGMENTS = 8
# The number of rows that are copied into memory at a time.
_BLOCK = 256


def stored_bytes(kind: str, key: str) -> int:
    """Returns the size of all segments with a key in the folder `kind` of the cache, in bytes."""
    size = 0
    for path in (cache.cache_dir() / kind).glob(f"{key}-*.rows"):
        with contextlib.suppress(OSError):  # For example, another process deleted the segment.
            size += path.stat().st_size
    return size


class RowCache:
    """Arrays of equal shape, one for each image file, stored under the digest of the file."""

    def __init__(self, kind: str, key: str, shape: tuple[int, ...]):
        """Reads the digests of all segments, and deletes damaged segments.

        Args:
          kind: The folder in the cache.
          key: 32 hexadecimal digits; all rows with this key have the same meaning.
          shape: The shape of a row.
        """
        self._folder = cache.cache_dir() / kind
        self._key = key
        self._shape = shape
        self._segments: list[_Segment] = []
        for path in sorted(self._folder.glob(f"{key}-*.rows")):
            with contextlib.suppress(OSError):  # For example, another process deleted the segment.
                try:
                    self._segments.append(_open_segment(path, shape))
                except ValueError:
                    _delete_damaged(path)

    @functools.cached_property
    def digests(self) -> set[str]:
        """The digests of all rows; `RowWriter` adds the digests of new rows."""
        return {digest for segment in self._segments for digest in segment.digests}

    def writer(self, count: int) -> "RowWriter":
        """Returns a context manager that stores new rows; see `RowWriter`."""
        # The segments of this object may be old, but they are about to be used.
        cache.sweep(self._folder, keep=[segment.path for segment in self._segments])
        return RowWriter(self._folder, self._key, self._shape, count, self._add)

    def _add(self, segment: "_Segment") -> None:
        self._segments.append(segment)
        self.digests.update(segment.digests)

    def rows(
        self, digests: Sequence[str], compute: Callable[[int], UInt8[np.ndarray, "..."]]
    ) -> "CachedRows":
        """Returns the rows of these digests, memory-mapped.

        Rows are copied to a new segment if at most half of their segment is used, or if the rows
        are in too many small segments. A segment that is not used any more is deleted after 30
        days.

        Args:
          digests: The digest of each example; the cache must have a row for each of them.
          compute: Computes the row of the example at a position, in case the stored row is damaged.
        """
        wanted = set(digests)
        counts = {s: sum(digest in wanted for digest in s.digests) for s in self._segments}
        worn = {segment for segment in counts if 2 * counts[segment] <= len(segment.digests)}
        places: dict[str, tuple[_Segment, int]] = {}
        for segment in sorted(counts, key=lambda s: (s in worn, -counts[s])):
            for row, digest in enumerate(segment.digests):
                if digest in wanted:
                    places.setdefault(digest, (segment, row))
        half = _SEGMENT_BYTES // (2 * _stored_bytes(self._shape))
        small = [s for s in _most_used_first(places.values()) if len(s.digests) < half]
        if len(small) > _MAX_SMALL_SEGMENTS:
            worn.update(small[_MAX_SMALL_SEGMENTS // 2 :])
        rows = CachedRows([places[digest] for digest in digests], self._shape, compute)
        if moving := {digest: i for i, digest in enumerate(digests) if places[digest][0] in worn}:
            places.update(self._copy(moving, rows))
            rows = CachedRows([places[digest] for digest in digests], self._shape, compute)
        for segment in {segment for segment, _ in places.values()}:
            segment.touch()
        cache.sweep(self._folder)
        return rows

    def _copy(
        self, positions: dict[str, int], rows: "CachedRows"
    ) -> dict[str, tuple["_Segment", int]]:
        """Copies rows to new segments; returns their new places, or {} without enough space.

        Args:
          positions: The position in `rows` of each digest.
          rows: The rows of all examples.
        """
        # A copy is not necessary, so it may use at most half of the free disk space.
        if len(positions) * _stored_bytes(self._shape) > cache.free_bytes() / 2:
            return {}
        old = len(self._segments)
        try:
            with self.writer(len(positions)) as writer:
                for digest, position in positions.items():
                    writer.write(digest, rows[np.array([position])][0])
                    writer.store_if_full()
        except OSError:
            return {}
        copies = self._segments[old:]
        return {digest: (copy, row) for copy in copies for row, digest in enumerate(copy.digests)}


def _most_used_first(places: Iterable[tuple["_Segment", int]]) -> list["_Segment"]:
    return [s for s, _ in Counter(segment for segment, _ in places).most_common()]


class RowWriter:
    """A context manager that writes rows to new segments.

    The rows that were written are stored when the context ends, also if it ends with an exception
    such as KeyboardInterrupt. After an OSError, only the rows in full segments are stored.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        key: str,
        shape: tuple[int, ...],
        count: int,
        add: Callable[["_Segment"], None],
    ):
        """Creates the file of the first segment.

        Args:
          folder: The folder of the segments.
          key: The key of the rows.
          shape: The shape of a row.
          count: The largest number of rows that will be written.
          add: Receives each new segment, unless it is empty.

        Raises:
          OSError: The folder cannot be written, or the disk has too little space for all rows.
        """
        self._folder, self._key, self._shape = folder, key, shape
        self._count, self._add = count, add
        self._rows: dict[str, int] = {}
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        if count * _stored_bytes(shape) > cache.free_bytes():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._open()

    def _open(self) -> None:
        """Creates the file of a segment, and reserves disk space for its rows."""
        self._checksums: list[int] = []
        self._file, self._path = cache.open_temporary(self._folder)
        size = min(self._count * _stored_bytes(self._shape), _SEGMENT_BYTES)
        # macOS cannot reserve disk space.
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file.fileno(), 0, size)
            except BaseException:
                self._remove()
                raise

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None:
                self._publish()
            elif not isinstance(error, OSError):
                with contextlib.suppress(OSError):
                    self._publish()
        finally:
            self._remove()

    def _remove(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def store_if_full(self) -> None:
        """Stores the segment and starts the next one if the segment has its full size.

        No thread may write at the same time. Processes that write the same rows in the same order,
        and call this function after the same rows, store these rows once.

        Raises:
          OSError: The disk reports an error, or has too little space for the next segment.
        """
        if len(self._rows) * _stored_bytes(self._shape) >= _SEGMENT_BYTES:
            self._publish()
            self._count -= len(self._rows)
            self._rows = {}
            self._remove()
            self._open()

    def write(self, digest: str, row: UInt8[np.ndarray, "..."]) -> None:
        """Writes a row, unless it was written before. Several threads may write at the same time.

        Raises:
          OSError: The disk reports an error.
        """
        rest = np.ascontiguousarray(row).data.cast("B")
        checksum = zlib.crc32(rest)
        with self._lock:
            if digest in self._rows:
                return
            offset = len(self._rows) * len(rest)
            self._rows[digest] = len(self._rows)
            self._checksums.append(checksum)
        while rest:
            written = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[written:], offset + written

    def _publish(self) -> None:
        if not self._rows:
            return
        digests = list(self._rows)
        index = np.zeros(len(digests), _INDEX)
        index["digest"] = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 16)
        index["checksum"] = self._checksums
        self._file.seek(len(digests) * math.prod(self._shape))
        self._file.write(index.tobytes())
        self._file.truncate()
        os.fsync(self._file.fileno())
        os.fchmod(self._file.fileno(), 0o644)
        path = self._path.with_name(f"{self._key}-{_set_digest(digests)}.rows")
        rows = _map(self._file, (len(digests), *self._shape))
        segment = _Segment(path, digests, index["checksum"], lambda: rows)
        # Another process may have written the same rows, in another order, and may read them.
        if not path.exists():
            self._path.replace(path)
        self._add(segment)


def _stored_bytes(shape: tuple[int, ...]) -> int:
    """Returns the number of bytes of a row in a segment, with its digest and its checksum."""
    return math.prod(shape) + _INDEX.itemsize


class CachedRows:
    """The rows of examples, memory-mapped. A row is checked when it is read for the first time."""

    def __init__(
        self,
        places: Sequence[tuple["_Segment", int]],
        shape: tuple[int, ...],
        compute: Callable[[int], UInt8[np.ndarray, "..."]],
    ):
        """Finds the rows of examples.

        Args:
          places: The segment of each example, and its row there.
          shape: The shape of a row.
          compute: See `RowCache.rows`.
        """
        self._shape, self._compute = shape, compute
        # The first segment is the one with the most rows.
        self._segments = _most_used_first(places)
        numbers = {segment: number for number, segment in enumerate(self._segments)}
        self._numbers = np.array([numbers[segment] for segment, _ in places], int)
        self._rows = np.array([row for _, row in places], int)
        self._is_checked = np.array([segment.path is None for segment, _ in places], bool)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """The number of bytes of all rows."""
        return len(self) * math.prod(self._shape)

    def __getitem__(self, indices: Int[np.ndarray, " k"]) -> UInt8[np.ndarray, "k ..."]:
        """Returns the rows of the examples at these positions, as a new array."""
        numbers, rows = self._numbers.take(indices), self._rows.take(indices)
        if not numbers.any():
            result = self._segments[0].rows.take(rows, axis=0)
        else:
            result = np.empty((len(indices), *self._shape), np.uint8)
            places = zip(numbers.tolist(), rows.tolist(), strict=True)
            for i, (number, row) in enumerate(places):
                result[i] = self._segments[number].rows[row]
        if not (is_checked := self._is_checked.take(indices)).all():
            for i in np.flatnonzero(~is_checked).tolist():
                self._check(int(indices[i]), result[i])
        return result

    def _check(self, index: int, row: UInt8[np.ndarray, "..."]) -> None:
        """Compares a row with its checksum, and computes the row again if it is damaged."""
        segment = self._segments[self._numbers[index]]
        if zlib.crc32(row.data) == segment.checksums[self._rows[index]]:
            self._is_checked[index] = True
        else:
            segment.delete_damaged()
            row[:] = self._compute(index)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        """Returns all rows in memory, for `np.asarray`."""
        result = np.empty((len(self), *self._shape), np.uint8)
        for start in range(0, len(self), _BLOCK):
            stop = min(start + _BLOCK, len(self))
            result[start:stop] = self[np.arange(start, stop)]
        return result

    def extended(self, rows: UInt8[np.ndarray, "m ..."]) -> "CachedRows":
        """Returns these rows and, after them, rows that are in memory."""
        segment = _Segment(None, [], np.zeros(0, np.uint32), lambda: rows)
        pairs = zip(self._numbers.tolist(), self._rows.tolist(), strict=True)
        places = [(self._segments[number], row) for number, row in pairs]
        places += [(segment, row) for row in range(len(rows))]
        return CachedRows(places, self._shape, self._compute)


class _Segment:
    """A complete file of rows, or rows in memory.

    Attributes:
      path: The file; None if the rows are in memory.
      digests: The digest of each row.
      checksums: The CRC-32 of each row.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        digests: list[str],
        checksums: Shaped[np.ndarray, " n"],
        open_rows: Callable[[], UInt8[np.ndarray, "m ..."]],
    ):
        """Stores the arguments.

        Args:
          path: See above.
          digests: See above.
          checksums: See above.
          open_rows: Returns the rows. It is called when a row is read for the first time, so that
            only the files that are used stay open.
        """
        self.path = path
        self.digests = digests
        self.checksums = checksums
        self._open_rows = open_rows
        self._is_deleted = False

    @functools.cached_property
    def rows(self) -> UInt8[np.ndarray, "m ..."]:
        return self._open_rows()

    def touch(self) -> None:
        """Updates the time of the last use. This fails if another user owns the file."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def delete_damaged(self) -> None:
        """Deletes the file, with a warning. Later calls do nothing."""
        if self.path is not None and not self._is_deleted:
            self._is_deleted = True
            _delete_damaged(self.path)


def _open_segment(path: pathlib.Path, shape: tuple[int, ...]) -> _Segment:
    """Reads the digests and the checksums of a segment.

    Raises:
      OSError: The file cannot be read.
      ValueError: The file is damaged.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(size // _stored_bytes(shape) * math.prod(shape))
        index = np.frombuffer(file.read(), _INDEX)
    text = index["digest"].tobytes().hex()
    digests = [text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS)]
    if size % _stored_bytes(shape) or not path.stem.endswith(_set_digest(digests)):
        raise ValueError
    open_rows = functools.partial(_map, path, (len(digests), *shape))
    return _Segment(path, digests, index["checksum"], open_rows)


def _map(file: pathlib.Path | IO[bytes], shape: tuple[int, ...]) -> UInt8[np.ndarray, "n ..."]:
    """Returns the rows of a segment, memory-mapped."""
    try:
        return np.asarray(np.memmap(file, np.uint8, "r", shape=shape))
    except (FileNotFoundError, ValueError):
        # The file was deleted or cut after its digests were read. With zeros, rows are damaged.
        # After other errors, such as too many open files, the file itself is not damaged.
        return np.broadcast_to(np.uint8(0), shape)


def _set_digest(digests: Collection[str]) -> str:
    """Returns a digest of digests that does not depend on their order."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:_DIGITS]


def _delete_damaged(path: pathlib.Path) -> None:
    logger.warning("%s is damaged or missing; its images are decoded again", path)
    with contextlib.suppress(OSError):
        path.unlink()
