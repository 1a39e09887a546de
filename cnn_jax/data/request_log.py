"""The files of a request log: the columns, and the functions that write and read them.

A request log is a folder. One or several servers append to it, and other processes may read it at
the same time:

    requests/    one row for each recorded image, with its prediction
    feedback/    one row for each label or reward that a client has sent
    failures/    one row for each request that an arm of an experiment has not answered
    labelled/    rows of deleted request files to which there is feedback
    models/      the class names of each bundle, in a JSON file that the digest names

Each server writes only to its own files. Therefore servers need no lock, and the folder may be on a
network file system. A file that is still written is an Arrow stream (`.arrows`): it grows by whole
batches of rows, and a reader sees all complete batches. A file that is complete is a Parquet file
(`.parquet`).
"""

import contextlib
import json
import logging
import os
import pathlib
import re
import secrets
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cnn_jax.system.atomic import replacing, write_text
from cnn_jax.system.errors import DataError

logger = logging.getLogger(__name__)

# The version of the columns. It is stored in the metadata of each file. A change of the meaning or
# of the type of a column needs a new version; a new column does not.
SCHEMA_VERSION = 1
_VERSION_KEY = b"cnn_jax_request_log"
_METADATA = {_VERSION_KEY: str(SCHEMA_VERSION).encode()}
_TIME = pa.timestamp("us", tz="UTC")

REQUESTS = pa.schema(
    [
        ("time", _TIME),
        ("request_id", pa.string()),
        ("image_index", pa.int32()),  # Index of the image in its request.
        ("unit", pa.string()),  # The client's X-Unit-Id, such as a user; null without this header.
        # The alias that selected the version, or EXPERIMENT/ARM; null if a number selected it.
        ("arm", pa.string()),
        ("model", pa.string()),
        ("version", pa.int32()),
        ("digest", pa.string()),  # The digest of the bundle.
        ("class", pa.string()),  # The predicted class.
        ("confidence", pa.float32()),  # The probability of the predicted class.
        ("probabilities", pa.list_(pa.float32())),  # In the order of `class_names`.
        ("embedding", pa.list_(pa.float32())),  # The input of the network's last layer.
        ("brightness", pa.float32()),  # Mean grey level, 0 to 255.
        ("sharpness", pa.float32()),  # Standard deviation of the Laplacian of the grey levels.
        ("contrast", pa.float32()),  # Standard deviation of the grey levels.
        ("milliseconds", pa.float32()),  # The time to decode the image, to wait and to compute.
        # The request that another version has answered, if this answer was dropped; else null.
        ("shadow_of", pa.string()),
        ("image", pa.binary()),  # PNG in the size of the network's input; null if not enabled.
    ],
    metadata=_METADATA,
)
FEEDBACK = pa.schema(
    [
        ("time", _TIME),
        ("request_id", pa.string()),
        ("image_index", pa.int32()),
        ("label", pa.string()),  # The true class; null if there is only a reward.
        ("reward", pa.float64()),  # null if there is only a label.
    ],
    metadata=_METADATA,
)

FAILURES = pa.schema(
    [
        ("time", _TIME),
        ("request_id", pa.string()),
        ("unit", pa.string()),
        ("arm", pa.string()),
        ("model", pa.string()),
        ("reason", pa.string()),  # The reason of the error response.
    ],
    metadata=_METADATA,
)

# A file is complete after this number of bytes, batches or seconds. From these seconds, `find_row`
# computes which files can have a row.
_SEGMENT_BYTES, _SEGMENT_BATCHES, _SEGMENT_SECONDS = 16_000_000, 2_000, 3600.0
# A request is recorded at most this number of seconds after its id was created. This includes the
# difference between the clocks of the servers.
_MAX_DELAY = 900.0
_FOLDERS = ("requests", "feedback", "failures", "labelled", "models")
# The name of a file: when it was created, in milliseconds since the epoch, and its server.
_FILE_NAME = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}(\.claimed)?\.(arrows|parquet)")
# The first bytes of each message of an Arrow stream, the type of a message that is a batch, and a
# bound of the size of its metadata.
_MARKER, _RECORD_BATCH, _MAX_METADATA = b"\xff\xff\xff\xff", 3, 65_536
# The suffix of a stream with unreadable parts. Readers ignore such files, and nothing deletes them.
_DAMAGED = ".damaged"
# The middle part of the name of a file that a server is deleting.
_CLAIMED = ".claimed"
# A claimed file of this age, in seconds, was left by a server that ended while deleting the file.
_ABANDONED_SECONDS = 600.0


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


def make_folders(folder: pathlib.Path) -> None:
    """Creates the folders of a request log; only the owner may read new folders.

    Raises:
      OSError: A folder cannot be created.
    """
    for path in (folder, *(folder / name for name in _FOLDERS)):
        path.mkdir(mode=0o700, exist_ok=True)


def check_writable(folder: pathlib.Path) -> None:
    """Raises OSError if files cannot be written to the folders of a request log."""
    for name in _FOLDERS:
        with tempfile.TemporaryFile(dir=folder / name):
            pass


class Segments:
    """Appends rows to a file, and starts a new file after `close`.

    Attributes:
      path: The present file; None before the first row of a file.
    """

    def __init__(self, folder: pathlib.Path, schema: pa.Schema, max_bytes: int = _SEGMENT_BYTES):
        """Creates the object without creating a file.

        Args:
          folder: The folder of the files.
          schema: The columns.
          max_bytes: A file is complete after this number of bytes.
        """
        self._folder = folder
        self._schema = schema
        self._max_bytes = min(max_bytes, _SEGMENT_BYTES)
        # Part of the names of all files, so that servers that share the folder use other names.
        self._name = secrets.token_hex(4)
        self.path: pathlib.Path | None = None

    def append(self, columns: Mapping[str, Sequence[object]]) -> None:
        """Appends rows to the present file, or to a new file.

        Args:
          columns: The values of each column.

        Raises:
          OSError: The rows cannot be written. The earlier rows are not affected.
        """
        arrays = [pa.array(columns[field.name], field.type) for field in self._schema]
        batch = pa.record_batch(arrays, schema=self._schema)
        if self.path is not None and not self.path.exists():
            self._forget()  # This process was suspended, and another server completed the file.
        data = batch.serialize().to_pybytes()
        if self.path is None:
            self._open()
            data = self._schema.serialize().to_pybytes() + data
        try:
            _write(self._descriptor, data)
        except BaseException:
            self._undo()
            raise
        self._bytes += len(data)
        self._rows += batch.num_rows
        self._batches += 1

    def _undo(self) -> None:
        """Removes the written part of a failed batch, because readers stop at this part."""
        assert self.path is not None
        try:
            os.ftruncate(self._descriptor, self._bytes)
        except OSError:
            self._forget()  # The next rows go to a new file.
            return
        if not self._rows:
            self.path.unlink(missing_ok=True)
            self._forget()

    @property
    def is_complete(self) -> bool:
        """Returns whether the present file is so large or old that the caller should close it."""
        return self.path is not None and (
            self._bytes >= self._max_bytes
            or self._batches >= _SEGMENT_BATCHES
            or time.monotonic() - self._start >= _SEGMENT_SECONDS
        )

    def close(self) -> None:
        """Completes the present file: converts the Arrow stream to a Parquet file.

        Raises:
          OSError: The Parquet file cannot be written. The Arrow stream then remains.
          DataError: The stream cannot be read, or the Parquet file lacks rows. The stream remains.
        """
        if (path := self.path) is None:
            return
        self._forget()
        with contextlib.suppress(FileNotFoundError):  # Another server has deleted the file.
            complete(path, self._rows)

    def _open(self) -> None:
        path = self._folder / f"{_milliseconds():012x}-{self._name}.arrows"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self._bytes = self._rows = self._batches = 0
        self._start = time.monotonic()
        self.path = path

    def _forget(self) -> None:
        self.path = None
        os.close(self._descriptor)


def _write(descriptor: int, data: bytes) -> None:
    """Writes all bytes, or raises OSError: `os.write` may write only a part of them."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def complete(path: pathlib.Path, rows: int = 0) -> None:
    """Replaces an Arrow stream with a Parquet file of its rows.

    A stream without rows is deleted. A damaged stream is renamed instead, because it may have rows
    that cannot be read. A stream is not damaged if only its last batch is incomplete.

    Args:
      path: The stream; no process may write to it.
      rows: The number of rows that the stream must have at least.

    Raises:
      OSError: A file cannot be read or written. The stream then remains.
      DataError: The stream cannot be read, or the Parquet file lacks rows. The stream then remains.
    """
    table, rest = _read_stream(path)
    if table.num_rows:
        parquet = path.with_suffix(".parquet")
        write_table(table, parquet)
        if (written := read_file(parquet, ("request_id",)).num_rows) < table.num_rows:
            raise DataError(f"{parquet} has only {written} of {table.num_rows} rows of {path}")
    if table.num_rows >= rows and _is_incomplete_batch(rest):
        path.unlink()
        return
    path.rename(damaged := path.with_suffix(_DAMAGED))
    expected = f" of {rows}" if rows else ""
    logger.error(
        "%s was damaged: %d%s rows could be read; the damaged file is kept as %s",
        path,
        table.num_rows,
        expected,
        damaged.name,
    )


def write_table(table: pa.Table, path: pathlib.Path) -> None:
    """Writes a Parquet file; an existing file is replaced atomically.

    Raises:
      OSError: The file cannot be written.
    """
    with replacing(path, shared=True) as file:
        pq.write_table(table.combine_chunks(), file, compression="zstd")


def read_file(path: pathlib.Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a file of the log; reads an Arrow stream up to its last complete batch.

    Args:
      path: The file.
      columns: The columns to read; by default all columns.

    Raises:
      FileNotFoundError: The file does not exist.
      DataError: A later version of this package wrote the file, or the file is damaged.
    """
    if path.suffix == ".parquet":
        with _converted_errors(path):
            schema = pq.read_schema(path)
            _check_version(path, schema)
            return pq.read_table(path, columns=None if columns is None else list(columns))
    table, _ = _read_stream(path)
    known = table.column_names
    return table.select(known if columns is None else [c for c in columns if c in known])


@contextlib.contextmanager
def _converted_errors(path: pathlib.Path) -> Iterator[None]:
    """Converts errors of reading a file, except FileNotFoundError, to DataError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_stream(path: pathlib.Path) -> tuple[pa.Table, bytes]:
    """Reads an Arrow stream whose end may be missing: its server is writing it, or was killed.

    Returns:
      The rows, and the bytes behind the last batch that can be read.
    """
    schema = {"feedback": FEEDBACK, "failures": FAILURES}.get(path.parent.name, REQUESTS)
    batches, end = [], 0
    with _converted_errors(path), pa.OSFile(str(path)) as file:
        try:
            stream = pa.ipc.open_stream(file)
            _check_version(path, stream.schema)
            schema, end = stream.schema, file.tell()
            for batch in stream:
                batches.append(batch)
                end = file.tell()
        except (pa.ArrowInvalid, OSError) as error:
            if getattr(error, "errno", None):  # Arrow's errors about a missing end have no number.
                raise
        file.seek(end)
        return pa.Table.from_batches(batches, schema), file.read()


def _is_incomplete_batch(data: bytes) -> bool:
    """Returns whether bytes of a stream are empty, or are one batch whose end is missing."""
    if len(data) < 8:  # A batch is longer.
        return True
    starts = [m.start() for m in re.finditer(_MARKER, data) if not m.start() % 8]
    sizes = [size for start in starts if (size := _batch_bytes(data[start:])) is not None]
    return starts[:1] == [0] and len(sizes) == 1 and sizes[0] > len(data)


def _batch_bytes(data: bytes) -> int | None:
    """Returns the size of the batch that starts with `data`, or None if it is not a batch.

    If the metadata of the batch are incomplete, the returned size is only larger than `data`. The
    format is https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format; the
    metadata are a flatbuffer.
    """
    try:
        size = 8 + struct.unpack_from("<i", data, 4)[0]
        if not 8 < size <= _MAX_METADATA:
            return None
        if size > len(data):
            return size
        table = 8 + struct.unpack_from("<I", data, 8)[0]
        fields = table - struct.unpack_from("<i", data, table)[0]
        # The offsets of the fields: the version, the type of the message, the message, the size of
        # the values.
        _, kind, _, values = struct.unpack_from("<4H", data, fields + 4)
        if data[table + kind] != _RECORD_BATCH:
            return None
        return size + struct.unpack_from("<q", data, table + values)[0]
    except (struct.error, IndexError):
        return None


def _check_version(path: pathlib.Path, schema: pa.Schema) -> None:
    text = (schema.metadata or {}).get(_VERSION_KEY, b"0").decode(errors="replace")[:20]
    if not re.fullmatch("[0-9]+", text) or not 0 < int(text) <= SCHEMA_VERSION:
        raise DataError(
            f"{path} has version {text} of the request log's columns, and this version of "
            f"cnn_jax reads versions up to {SCHEMA_VERSION}; upgrade cnn_jax"
        )


def read_requests(
    folder: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    since: float = 0.0,
    *,
    with_labelled: bool = True,
) -> pa.Table:
    """Returns the recorded images of all servers, while the servers may be writing.

    Args:
      folder: The folder of the request log.
      columns: The columns of `REQUESTS` to read; by default all columns.
      since: In seconds since the epoch; files without later rows are not read.
      with_labelled: Whether to read also the rows of deleted files to which there is feedback.

    Raises:
      DataError: The folder is not a request log, or a file cannot be read.
    """
    folder = _checked(folder)
    # A deleted file's rows that have feedback move from the first folder to the second, so this
    # order misses none of them.
    names = ("requests", "labelled") if with_labelled else ("requests",)
    paths = (path for name in names for path in list_files(folder / name))
    return _join(_read_all(paths, columns, since), REQUESTS, columns)


def read_feedback(folder: str | os.PathLike[str]) -> pa.Table:
    """Returns all labels and rewards, with the columns of `FEEDBACK`, in no particular order.

    If there are several labels of an image, the latest by `time` is valid.

    Raises:
      DataError: The folder is not a request log, or a file cannot be read.
    """
    tables = _read_all(list_files(_checked(folder) / "feedback"))
    return _join(tables, FEEDBACK, None)


def read_failures(folder: str | os.PathLike[str]) -> pa.Table:
    """Returns the requests that arms of experiments have not answered, as in `FAILURES`.

    Raises:
      DataError: The folder is not a request log, or a file cannot be read.
    """
    path = _checked(folder) / "failures"  # The logs of earlier versions do not have this folder.
    return _join(_read_all(list_files(path) if path.exists() else ()), FAILURES, None)


def class_names(folder: str | os.PathLike[str], digest: str) -> list[str]:
    """Returns the classes of a bundle in the order of its probabilities; `digest` names it.

    Raises:
      DataError: The log has no bundle with this digest.
    """
    path = pathlib.Path(folder) / "models" / f"{digest}.json"
    try:
        return json.loads(path.read_text("utf-8"))["class_names"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def list_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files with rows in a folder, the oldest first."""
    return sorted(path for path in folder.iterdir() if _FILE_NAME.fullmatch(path.name))


def is_claimed(path: pathlib.Path) -> bool:
    """Returns whether a server has begun to delete a file."""
    return _CLAIMED in path.suffixes


def _read_all(
    paths: Iterable[pathlib.Path], columns: Sequence[str] | None = None, since: float = 0.0
) -> list[pa.Table]:
    """Reads files; if a stream and a Parquet file have the same rows, reads only one of them.

    Both exist for a moment during the conversion, and for good if the server is killed in it.
    """
    tables: dict[str, pa.Table] = {}
    for path in paths:
        stem = path.name.partition(".")[0]
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < since:
                continue
        if stem not in tables and (table := _read_moving(path, columns)) is not None:
            tables[stem] = table
    return list(tables.values())


def _read_moving(path: pathlib.Path, columns: Sequence[str] | None) -> pa.Table | None:
    """Reads a file that its server may be converting; returns None if the file was deleted."""
    stem = path.name.partition(".")[0]
    names = (path.name, f"{stem}.parquet", f"{stem}{_CLAIMED}.parquet", f"{stem}{_CLAIMED}.arrows")
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            return read_file(path.with_name(name), columns)
    return None


def _join(tables: Sequence[pa.Table], schema: pa.Schema, columns: Sequence[str] | None) -> pa.Table:
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns], metadata=_METADATA)
    return pa.concat_tables([schema.empty_table(), *tables], promote_options="default")


def _checked(folder: str | os.PathLike[str]) -> pathlib.Path:
    folder = pathlib.Path(folder)
    if not (folder / "requests").is_dir():
        raise DataError(f"{folder} is not a request log: it has no folder requests/")
    return folder


class LogFolder:
    """Finds rows in a request log, and deletes old rows; remembers the ids of complete files.

    A request id begins with a time, so the ids of a file lie between two values that are close to
    each other. Only files that may have an id are read.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        # The smallest and the largest request id of each Parquet file.
        self._ids: dict[pathlib.Path, tuple[str, str]] = {}

    def find_row(self, key: tuple[str, int]) -> str | None:
        """Returns the digest of the bundle that predicted an image; None without such an image.

        Files that are being deleted are not searched.

        Args:
          key: The id of the request and the index of the image. The first 12 hexadecimal digits of
            the id are the time at which the id was created, in milliseconds since the epoch.
        """
        created = int(key[0][:12], 16) / 1000
        for name in ("requests", "labelled"):
            for path in reversed(self._list(name)):
                start = int(path.name[:12], 16) / 1000
                end = start + _SEGMENT_SECONDS
                if is_claimed(path) or not start - _MAX_DELAY <= created <= end + _MAX_DELAY:
                    continue
                # The server that writes a stream may replace it with a Parquet file at any moment.
                for file in (path, path.with_suffix(".parquet")):
                    with contextlib.suppress(FileNotFoundError):
                        if not self._may_have(file, key[0], key[0]):
                            break
                        rows = read_file(file, ("request_id", "image_index", "digest"))
                        rows = _between(rows, key[0], key[0])
                        if (index := _keys(rows).get(key)) is not None:
                            return rows["digest"][index].as_py()
                        break
        return None

    def delete_oldest(self, max_bytes: int) -> None:
        """Deletes the oldest request files until their total size is at most `max_bytes`.

        Rows to which there is feedback are first copied to `labelled/`. A file that cannot be read
        is kept. Several servers may call this method at the same time.

        Raises:
          OSError: A file cannot be read or written.
          DataError: A file with requests cannot be read, and the readable files were deleted; or a
            file with feedback cannot be read, and no further file was deleted.
        """
        now = time.time()
        problem: DataError | None = None
        files = []
        for path in self._list("requests"):
            with contextlib.suppress(FileNotFoundError):
                files.append((path, path.stat()))
        total = sum(status.st_size for path, status in files if not is_claimed(path))
        for path, status in files:
            claimed = path
            if is_claimed(path):
                if now - status.st_ctime <= _ABANDONED_SECONDS:
                    continue
            elif total <= max_bytes or _may_be_open(path, status.st_mtime, now):
                continue
            else:
                claimed = path.with_suffix(_CLAIMED + path.suffix)
            with contextlib.suppress(FileNotFoundError):  # Another server was faster.
                try:
                    rows = read_file(path)
                except DataError as error:
                    problem = error
                    continue
                self._delete(path, claimed, rows)
            if claimed != path:
                total -= status.st_size
        if problem is not None:
            raise problem

    def _delete(self, path: pathlib.Path, claimed: pathlib.Path, rows: pa.Table) -> None:
        """Deletes a file with the rows `rows`; meanwhile its name is `claimed`."""
        self._labelled_positions(rows)  # If this fails, the file is not claimed.
        if claimed != path:
            # The new name tells `find_row` to ignore the file. Feedback that is accepted before
            # this moment is already in a file, so the next lines read it.
            path.rename(claimed)
            os.utime(claimed)
        if positions := self._labelled_positions(rows):
            stem = claimed.name.partition(".")[0]
            write_table(rows.take(positions), self._folder / "labelled" / f"{stem}.parquet")
        claimed.unlink()

    def _labelled_positions(self, rows: pa.Table) -> list[int]:
        """Returns the positions of the rows to which there is feedback."""
        positions = _keys(rows)
        if not positions:
            return []
        first, last = min(positions)[0], max(positions)[0]
        paths = [p for p in self._list("feedback") if self._may_have(p, first, last)]
        labelled: set[tuple[str, int]] = set()
        for table in _read_all(paths, ("request_id", "image_index")):
            labelled |= _keys(_between(table, first, last)).keys()
        return [position for key, position in positions.items() if key in labelled]

    def _list(self, name: str) -> list[pathlib.Path]:
        """Returns the files of a folder, the oldest first; forgets the files that were deleted."""
        folder = self._folder / name
        paths = list_files(folder)
        for path in self._ids.keys() - set(paths):
            if path.parent == folder:
                del self._ids[path]
        return paths

    def _may_have(self, path: pathlib.Path, first: str, last: str) -> bool:
        """Returns whether a file may have rows with request ids from `first` to `last`.

        Raises:
          FileNotFoundError: The file does not exist.
        """
        if path.suffix != ".parquet" or path.parent.name == "labelled":
            return True  # A stream or a file of feedback can still change.
        if path not in self._ids:
            self._ids[path] = _first_and_last_id(path)
        smallest, largest = self._ids[path]
        return smallest <= last and first <= largest

    def clean(self) -> None:
        """Completes the streams of servers that were killed, and deletes their temporary files.

        Several servers may call this method at the same time.

        Raises:
          OSError: A file cannot be read or written.
          DataError: A stream cannot be read, and was kept.
        """
        problem: DataError | None = None
        for path in (path for name in _FOLDERS for path in (self._folder / name).iterdir()):
            is_stream = path.suffix == ".arrows" and not is_claimed(path)
            if not is_stream and not path.name.startswith(".partial-"):
                continue
            try:
                with contextlib.suppress(FileNotFoundError):  # Another server was faster.
                    if time.time() - path.stat().st_mtime > 2 * _SEGMENT_SECONDS:
                        complete(path) if is_stream else path.unlink()
            except DataError as error:
                problem = error
        if problem is not None:
            raise problem


def _may_be_open(path: pathlib.Path, modified: float, now: float) -> bool:
    """Returns whether a server may still append to a file; times in seconds since the epoch."""
    return path.suffix == ".arrows" and now - modified < 2 * _SEGMENT_SECONDS


def _first_and_last_id(path: pathlib.Path) -> tuple[str, str]:
    """Returns the smallest and the largest request id of a Parquet file, from its statistics."""
    try:
        metadata = pq.read_metadata(path)
        column = metadata.schema.names.index("request_id")
        groups = [metadata.row_group(n).column(column) for n in range(metadata.num_row_groups)]
        found = [group.statistics for group in groups]
        if all(one is not None and one.has_min_max for one in found):
            return min((s.min for s in found), default="~"), max((s.max for s in found), default="")
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return "", "~"


def _between(rows: pa.Table, first: str, last: str) -> pa.Table:
    """Returns the rows with request ids from `first` to `last`."""
    return rows.filter((pc.field("request_id") >= first) & (pc.field("request_id") <= last))


def _keys(rows: pa.Table) -> dict[tuple[str, int], int]:
    """Returns the positions of rows by request id and image index."""
    ids, indices = rows["request_id"].to_pylist(), rows["image_index"].to_pylist()
    return {key: position for position, key in enumerate(zip(ids, indices, strict=True))}


def write_class_names(folder: pathlib.Path, digest: str, names: Sequence[str]) -> None:
    """Writes the class names of a bundle, unless the log has them already.

    Raises:
      OSError: The file cannot be written.
    """
    path = folder / "models" / f"{digest}.json"
    if not path.exists():
        write_text(path, json.dumps({"class_names": list(names)}) + "\n", shared=True)
