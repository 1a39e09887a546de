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
batches of rows, and a reader sees all complete batches. When the file is complete, its server
converts it to a Parquet file (`.parquet`). The file of a killed server stays an Arrow stream.
"""

import contextlib
import functools
import json
import logging
import math
import os
import pathlib
import re
import secrets
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
        # In a row of a shadow prediction: the request, which another version answered. Else null.
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

# A request id and the index of an image in the request.
Key = tuple[str, int]
# The folders of request logs.
Folders = Sequence[str | os.PathLike[str]]

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

# A file is complete after this number of bytes, batches or seconds.
_SEGMENT_BYTES, _SEGMENT_BATCHES, _SEGMENT_SECONDS = 16_000_000, 2_000, 3600.0
# A request is recorded at most this number of seconds after its id was created.
_MAX_DELAY = 900.0
_FOLDERS = ("requests", "feedback", "failures", "labelled", "models")
# The name of a file: when it was created, in milliseconds since the epoch, and its server. A file
# that is being deleted is renamed to `.claimed`: readers still read it, but it gets no feedback.
_FILE_NAME = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}(\.claimed)?\.(arrows|parquet)")


def make_folders(folder: pathlib.Path) -> None:
    """Creates the folders of a request log; only the owner may read new folders.

    Raises:
      OSError: A folder cannot be created, or files cannot be written to it.
    """
    for path in (folder, *(folder / name for name in _FOLDERS)):
        path.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


class Segments:
    """Appends rows to a file, and starts a new file after `close`.

    Attributes:
      path: The present file; None before the first row of a file.
    """

    def __init__(self, folder: pathlib.Path, schema: pa.Schema, max_bytes: int = _SEGMENT_BYTES):
        """Initializes the writer; the first row creates the first file.

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
        data = pa.record_batch(arrays, schema=self._schema).serialize().to_pybytes()
        if self.path is not None and not self.path.exists():
            self._forget()  # This process was suspended, and another server has deleted the file.
        if self.path is None:
            self._open()
        if not self._bytes:
            data = self._schema.serialize().to_pybytes() + data
        try:
            view = memoryview(data)
            while view:  # `os.write` may write only a part of the bytes.
                view = view[os.write(self._descriptor, view) :]
        except BaseException:
            try:  # Remove the written part of the batch, because readers stop at this part.
                os.ftruncate(self._descriptor, self._bytes)
            except OSError:
                self._forget()  # The next rows go to a new file.
            raise
        self._bytes += len(data)
        self._batches += 1

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
          OSError: A file cannot be read or written. The stream then remains.
          DataError: The stream is damaged, and remains.
        """
        if (path := self.path) is None:
            return
        self._forget()
        with contextlib.suppress(FileNotFoundError):  # Another server has deleted the file.
            if self._bytes:
                table, rest = _read_stream(path)
                if rest:
                    raise DataError(f"{path} is damaged: only {len(table)} rows can be read")
                write_table(table, path.with_suffix(".parquet"))
            path.unlink()

    def _open(self) -> None:
        path = self._folder / f"{time.time_ns() // 1_000_000:012x}-{self._name}.arrows"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self._bytes = self._batches = 0
        self._start = time.monotonic()
        self.path = path

    def _forget(self) -> None:
        self.path = None
        os.close(self._descriptor)


def write_table(table: pa.Table, path: pathlib.Path) -> None:
    """Writes a Parquet file; an existing file is replaced atomically.

    Raises:
      OSError: The file cannot be written.
    """
    with replacing(path, shared=True) as file:
        pq.write_table(table.combine_chunks(), file, compression="zstd")


def read_file(
    path: pathlib.Path,
    columns: Sequence[str] | None = None,
    condition: pc.Expression | None = None,
) -> pa.Table | None:
    """Reads a file of the log; reads an Arrow stream up to its last complete batch.

    Args:
      path: The file. If it is a stream that its server has just converted, the Parquet file is
        read instead.
      columns: The columns to read, if the file has them; by default all columns.
      condition: The rows to read; by default all rows.

    Returns:
      The rows; None if the file was deleted.

    Raises:
      DataError: A later version of this package wrote the file, or the file is damaged.
    """
    try:
        if path.suffix == ".arrows":
            with contextlib.suppress(FileNotFoundError):
                table, _ = _read_stream(path)
                table = table if condition is None else table.filter(condition)
                return table.select(_known(columns, table.schema))
        path = path.with_suffix(".parquet")
        schema = pq.read_schema(path)
        _check_version(path, schema)
        return pq.read_table(path, columns=_known(columns, schema), filters=condition)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _known(columns: Sequence[str] | None, schema: pa.Schema) -> list[str]:
    """Returns the requested columns of a file; the file of an older server may lack some."""
    return [name for name in schema.names if columns is None or name in columns]


def _read_stream(path: pathlib.Path) -> tuple[pa.Table, int]:
    """Reads an Arrow stream whose end may be missing: its server is writing it, or was killed.

    Returns:
      The rows, and the number of bytes behind the last batch that can be read.
    """
    schema = {"feedback": FEEDBACK, "failures": FAILURES}.get(path.parent.name, REQUESTS)
    batches, end = [], 0
    with pa.OSFile(str(path)) as file:
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
        return pa.Table.from_batches(batches, schema), file.size() - end


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
    ids: pa.ChunkedArray | None = None,
) -> pa.Table:
    """Returns the rows that all servers have recorded; the servers may still be writing.

    Args:
      folder: The folder of the request log.
      columns: The columns of `REQUESTS` to read; by default all columns.
      since: In seconds since the epoch; files without later rows are not read.
      with_labelled: Whether to read also the rows of deleted files to which there is feedback.
      ids: The request ids of the rows to read, at least one; by default all rows.

    Raises:
      DataError: The folder is not a request log, or a file cannot be read.
    """
    # A deleted file's rows that have feedback move from the first folder to the second, so this
    # order misses none of them.
    names = ("requests", "labelled") if with_labelled else ("requests",)
    return _read_folders(folder, names, REQUESTS, columns, since, ids)


def read_keys(
    folder: str | os.PathLike[str], keys: Collection[Key], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the rows with given keys; files without such a row are not read.

    Args:
      folder: The folder of the request log.
      keys: The request ids and image indices.
      columns: The columns to read, with "request_id" and "image_index".

    Raises:
      DataError: The folder is not a request log, or a file cannot be read.
    """
    ids = pa.array(sorted({request_id for request_id, _ in keys}), pa.string())
    wanted = set(keys)
    rows = read_requests(folder, columns, ids=pa.chunked_array([ids])).to_pylist() if keys else []
    return [row for row in rows if (row["request_id"], row["image_index"]) in wanted]


def find_images(folders: Folders, since: float) -> set[Key]:
    """Returns the request ids and image indices of the images whose pixels were logged.

    The files are read one after the other, because a log may be larger than the memory.

    Args:
      folders: The folders of request logs.
      since: In seconds since the epoch; files without later rows are not read.

    Raises:
      DataError: A file cannot be read.
    """
    found: set[Key] = set()
    paths = (path for one in folders for path in _files_since(pathlib.Path(one, "requests"), since))
    for path in paths:
        table = read_file(path, ("request_id", "image_index", "image"))
        if table is not None and "image" in table.column_names:
            table = table.filter(pc.field("image").is_valid())
            columns = (table[name].to_pylist() for name in ("request_id", "image_index"))
            found.update(zip(*columns, strict=True))
    return found


def read_images(folders: Folders, keys: Collection[Key]) -> dict[Key, bytes]:
    """Returns the logged PNG image of each key; leaves out images whose pixels were not logged.

    Args:
      folders: The folders of request logs.
      keys: The request ids and image indices.

    Raises:
      DataError: A folder is not a request log, or a file cannot be read.
    """
    columns = ("request_id", "image_index", "image")
    rows = (row for folder in folders for row in read_keys(folder, keys, columns))
    return {
        (row["request_id"], row["image_index"]): row["image"]
        for row in rows
        if row["image"] is not None
    }


def read_feedback(folder: str | os.PathLike[str]) -> pa.Table:
    """Returns all labels and rewards, with the columns of `FEEDBACK`, in no particular order.

    See `read_valid_feedback` for images with several labels.

    Raises:
      DataError: The folder is not a request log, or a file cannot be read.
    """
    return _read_folders(folder, ("feedback",), FEEDBACK)


class ValidFeedback(NamedTuple):
    """The feedback to an image that is valid: the latest label, or the latest reward.

    Attributes:
      value: The label or the reward.
      time: The time at which the value arrived, in seconds since the epoch.
      first: The time at which the first value of the image arrived.
    """

    value: Any
    time: float
    first: float


def read_valid_feedback(
    folders: Folders, column: str, until: Mapping[Key, float] | None = None
) -> dict[Key, ValidFeedback]:
    """Returns the valid label or reward of each image that has one.

    The result does not depend on the order of the folders and files: of values with the same time,
    the largest is valid.

    Args:
      folders: The folders of request logs.
      column: "label" or "reward".
      until: For each image, the latest time of a value that counts, in seconds since the epoch;
        by default, all values count.

    Raises:
      DataError: A folder is not a request log, or a file cannot be read.
    """
    found: dict[Key, ValidFeedback] = {}
    for folder in folders:
        table = read_feedback(folder).filter(pc.field(column).is_valid())
        times = table["time"].cast(pa.int64()).to_pylist()
        columns = (table[name].to_pylist() for name in ("request_id", "image_index", column))
        for microseconds, request_id, index, value in zip(times, *columns, strict=True):
            time, key = microseconds / 1e6, (request_id, index)
            if until is not None and time > until.get(key, math.inf):
                continue
            one = found.get(key, ValidFeedback(value, time, time))
            latest, value = max((one.time, one.value), (time, value))
            found[key] = ValidFeedback(value, latest, min(one.first, time))
    return found


def read_failures(folder: str | os.PathLike[str]) -> pa.Table:
    """Returns the requests that arms of experiments have not answered, as in `FAILURES`.

    Raises:
      DataError: The folder is not a request log, or a file cannot be read.
    """
    # The logs of earlier versions do not have this folder.
    names = ("failures",) if (pathlib.Path(folder) / "failures").exists() else ()
    return _read_folders(folder, names, FAILURES)


def _read_folders(
    folder: str | os.PathLike[str],
    names: Sequence[str],
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
    since: float = 0.0,
    ids: pa.ChunkedArray | None = None,
) -> pa.Table:
    """Reads the rows of folders, or the rows with some request ids.

    Of files with the same rows, only the first is read.

    A stream and a Parquet file have the same rows for a moment during the conversion, and for good
    if the server is killed in it.
    """
    folder = pathlib.Path(folder)
    if not (folder / "requests").is_dir():
        raise DataError(f"{folder} is not a request log: it has no folder requests/")
    condition = bounds = None
    if ids is not None:
        condition = pc.field("request_id").isin(ids.unique())
        bounds = min(ids.to_pylist()), max(ids.to_pylist())
    tables: dict[str, pa.Table] = {}
    for name in names:
        for path in _files_since(folder / name, since):
            if bounds and not _may_have(path, *bounds):
                continue
            if _stem(path) not in tables:
                table = read_file(path, columns, condition)
                if table is not None:
                    tables[_stem(path)] = table
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns], metadata=_METADATA)
    return pa.concat_tables([schema.empty_table(), *tables.values()], promote_options="default")


def list_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files with rows in a folder, the oldest first."""
    return sorted(path for path in folder.iterdir() if _FILE_NAME.fullmatch(path.name))


def _files_since(folder: pathlib.Path, since: float) -> Iterator[pathlib.Path]:
    """Yields the files of `list_files` that were written at the time `since` or later.

    A stream that is converted at this moment is yielded too; `read_file` then reads the new file.
    """
    for path in list_files(folder):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < since:
                continue
        yield path


def _stem(path: pathlib.Path) -> str:
    return path.name.partition(".")[0]


def _creation_time(path: pathlib.Path) -> float:
    """Returns when a file was created, in seconds since the epoch."""
    return int(path.name[:12], 16) / 1000


def find_row(folder: pathlib.Path, request_id: str, image_index: int) -> str | None:
    """Returns the digest of the bundle that predicted an image; None if the log lacks the image.

    The first 12 hexadecimal digits of a request id are the time at which the id was created, in
    milliseconds since the epoch. Only files of about this time are read, the nearest first.
    """
    created = int(request_id[:12], 16) / 1000
    condition = (pc.field("request_id") == request_id) & (pc.field("image_index") == image_index)
    for name in ("requests", "labelled"):
        delays = {path: created - _creation_time(path) for path in list_files(folder / name)}
        for path in sorted(delays, key=lambda path: abs(delays[path])):
            if ".claimed" in path.name:
                continue
            is_near = -_MAX_DELAY <= delays[path] <= _SEGMENT_SECONDS + _MAX_DELAY
            if is_near and _may_have(path, request_id, request_id):
                rows = read_file(path, ("digest",), condition)
                if rows:
                    return rows["digest"][0].as_py()
    return None


def _may_have(path: pathlib.Path, first: str, last: str) -> bool:
    """Returns whether a file may have request ids from `first` to `last`, by its statistics."""
    if path.suffix != ".parquet" or path.parent.name == "labelled":
        return True  # A stream, or a file of labelled rows, can still change.
    try:
        least, largest = _first_and_last_id(path)
    except (OSError, pa.ArrowException):  # The file was deleted or is damaged; see `read_file`.
        return True
    except (AttributeError, ValueError):  # The file has no statistics.
        return True
    return least <= last and first <= largest


@functools.lru_cache(10_000)
def _first_and_last_id(path: pathlib.Path) -> tuple[str, str]:
    metadata = pq.read_metadata(path)
    column = metadata.schema.names.index("request_id")
    groups = [metadata.row_group(n).column(column) for n in range(metadata.num_row_groups)]
    found = [group.statistics for group in groups]
    return min(one.min for one in found), max(one.max for one in found)


def delete_oldest(folder: pathlib.Path, max_bytes: int) -> None:
    """Deletes the oldest request files until their total size is at most `max_bytes`.

    Temporary files and empty streams of killed servers are deleted too.
    Rows to which there is feedback are first copied to `labelled/`. A file that cannot be read is
    kept and logged. Several servers may call this function at the same time.

    Raises:
      OSError: A file cannot be read or written.
      DataError: A file with feedback cannot be read.
    """
    # No server still writes to a file that is older than this.
    limit = time.time() - 2 * _SEGMENT_SECONDS
    for path in [*folder.glob("*/.partial-*"), *folder.glob("*/*.arrows")]:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if status.st_mtime < limit and not (path.suffix == ".arrows" and status.st_size):
                path.unlink()  # A killed server has left the file without rows.
    files = []
    for path in list_files(folder / "requests"):
        with contextlib.suppress(FileNotFoundError):
            files.append((path, path.stat()))
    total = sum(status.st_size for _, status in files)
    for path, status in files:
        if total <= max_bytes:
            return
        if path.suffix == ".arrows" and status.st_mtime >= limit:
            continue  # A server may still append to the file.
        try:
            rows = read_file(path)
        except DataError as error:
            logger.error("a file of the request log is not deleted: %s", error)
            continue
        claimed = path.with_name(f"{_stem(path)}.claimed{path.suffix}")
        # Other servers accept feedback to the rows until the file is renamed, so look for feedback
        # again afterwards. If this server is killed, a later deletion finds the renamed file.
        for _ in range(2):
            labelled = rows and _labelled(folder, rows, since=_creation_time(path) - _MAX_DELAY)
            if labelled:
                write_table(labelled, folder / "labelled" / f"{_stem(path)}.parquet")
            with contextlib.suppress(FileNotFoundError):  # Another server deletes the file.
                path = path.rename(claimed)
        claimed.unlink(missing_ok=True)
        total -= status.st_size


def _labelled(folder: pathlib.Path, rows: pa.Table, since: float) -> pa.Table:
    """Returns the rows to which there is feedback."""
    names = ("request_id", "image_index")
    feedback = _read_folders(folder, ("feedback",), FEEDBACK, names, since, rows["request_id"])
    labelled = {(row["request_id"], row["image_index"]) for row in feedback.to_pylist()}
    keys = zip(*(rows[name].to_pylist() for name in names), strict=True)
    return rows.filter(pa.array([key in labelled for key in keys]))


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


def model_classes(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Returns the class names of all bundles that have predicted images of a log, by digest.

    Raises:
      DataError: A file cannot be read.
    """
    paths = (pathlib.Path(folder) / "models").glob("[!.]*.json")
    return {path.stem: class_names(folder, path.stem) for path in sorted(paths)}


def write_class_names(folder: pathlib.Path, digest: str, names: Sequence[str]) -> None:
    """Writes the class names of a bundle, unless the log has them already.

    Raises:
      OSError: The file cannot be written.
    """
    path = folder / "models" / f"{digest}.json"
    if not path.exists():
        write_text(path, json.dumps({"class_names": list(names)}) + "\n", shared=True)
