"""The request log, which records predictions for drift detection and for comparing versions.

The log is an SQLite file with one row per recorded image: time, request id, version, predicted
class, confidence, probabilities, embedding, and, if enabled, the image itself.
"""

import contextlib
import dataclasses
import io
import logging
import os
import pathlib
import queue
import random
import sqlite3
import threading
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from cnn_jax.data.decode import Pixels
from cnn_jax.explain.features import embeddings
from cnn_jax.serve.versions import Version
from cnn_jax.system.errors import ConfigError

logger = logging.getLogger(__name__)

# Maximum number of rows that wait to be written. Further rows are dropped and counted.
_MAX_WAITING = 1_000
# The batch size for computing embeddings.
_BATCH_SIZE = 8
# The fraction of rows that are deleted, oldest rows first, when the file is too large.
_DELETED_FRACTION = 0.1
_TABLE = """
create table if not exists requests (
  time real not null,          -- seconds since the epoch
  request_id text not null,
  model text not null,
  version integer not null,
  class text not null,         -- the predicted class
  confidence real not null,    -- probability of the predicted class
  probabilities blob not null, -- float32, little endian, of all classes
  embedding blob not null,     -- float32, little endian
  image blob                   -- PNG in the size of the network's input; null if not enabled
)
"""

_COLUMNS = (
    *("time", "request_id", "model", "version", "class", "confidence"),
    *("probabilities", "embedding", "image"),
)


@dataclasses.dataclass(frozen=True)
class _Row:
    time: float
    request_id: str
    version: Version
    pixels: Pixels
    probabilities: np.ndarray


class RequestLog:
    """A request log that writes rows on a separate thread, so that responses are not delayed."""

    def __init__(
        self,
        path: pathlib.Path,
        fraction: float = 1.0,
        max_bytes: int = 1_000_000_000,
        with_images: bool = False,
    ):
        """Opens the file of the log, or creates a new file.

        Args:
          path: The file, in an existing folder.
          fraction: The fraction of images to record, 0 to 1, chosen at random.
          max_bytes: Maximum size of the file. The oldest rows of a larger file are deleted.
          with_images: Whether to record the images.

        Raises:
          ConfigError: The file cannot be used.
        """
        self._path = path
        self._fraction = fraction
        self._max_bytes = max_bytes
        self._with_images = with_images
        # Only one thread changes each counter: `record` changes the first counter, and the thread
        # of the log changes the second counter.
        self._num_dropped, self._num_failed = 0, 0
        self._random = random.Random()
        self._waiting: queue.Queue[_Row | None] = queue.Queue(_MAX_WAITING)
        try:
            # Only the owner may read the file, because it may contain images.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            with contextlib.closing(self._connect()) as connection:
                # Set auto_vacuum before the table exists, because a later change would make SQLite
                # rewrite the whole file.
                connection.execute("pragma auto_vacuum = incremental")
                connection.execute("pragma journal_mode = wal")
                connection.execute(_TABLE)
                connection.execute(f"select {', '.join(_COLUMNS)} from requests limit 1")
                connection.commit()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"--request_log: cannot use {path}: {error}") from error
        self._thread = threading.Thread(target=self._write_all, name="request log", daemon=True)
        self._thread.start()

    def record(
        self, version: Version, request_id: str, pixels: Pixels, probabilities: np.ndarray
    ) -> None:
        """Adds an image and its prediction to the write queue, if the image is randomly selected.

        Args:
          version: The version that answered.
          request_id: The id of the request.
          pixels: The network's input, uint8 [height, width, 3].
          probabilities: float32 [classes].
        """
        if self._random.random() >= self._fraction:
            return
        try:
            row = _Row(time.time(), request_id, version, pixels, probabilities)
            self._waiting.put_nowait(row)
        except queue.Full:
            self._num_dropped += 1

    @property
    def lost_rows(self) -> int:
        """The number of rows that could not be written."""
        return self._num_dropped + self._num_failed

    def close(self) -> None:
        """Writes the waiting rows and ends the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=5.0)

    def _write_all(self) -> None:
        is_over = False
        while not is_over:
            rows, is_over = self._next_rows()
            try:
                self._write(rows)
            except Exception as error:  # Writing fails, for example, if the disk is full.
                logger.error("%d rows of the request log are lost: %s", len(rows), error)
                self._num_failed += len(rows)

    def _next_rows(self) -> tuple[list[_Row], bool]:
        """Waits for rows; returns at most `_BATCH_SIZE` rows, and whether the log was closed."""
        rows: list[_Row] = []
        while len(rows) < _BATCH_SIZE:
            try:
                row = self._waiting.get(block=not rows)
            except queue.Empty:
                break
            if row is None:
                return rows, True
            rows.append(row)
        return rows, False

    def _write(self, rows: Sequence[_Row]) -> None:
        with contextlib.closing(self._connect()) as connection:
            for version in dict.fromkeys(row.version for row in rows):
                batch = [row for row in rows if row.version is version]
                pixels = np.stack([row.pixels for row in batch])
                # Pad every batch to the same size, so that JAX compiles only once.
                missing = _BATCH_SIZE - len(pixels)
                padded = np.pad(pixels, [(0, missing), (0, 0), (0, 0), (0, 0)], mode="edge")
                vectors = embeddings(version.predictor, padded)
                connection.executemany(
                    "insert into requests values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [self._values(*pair) for pair in zip(batch, vectors, strict=False)],
                )
            connection.commit()
            self._shrink(connection)

    def _values(self, row: _Row, embedding: np.ndarray) -> tuple[object, ...]:
        best = int(np.argmax(row.probabilities))
        image = _png(row.pixels) if self._with_images else None
        return (
            *(row.time, row.request_id, row.version.model, row.version.number),
            *(row.version.class_names[best], float(row.probabilities[best])),
            *(row.probabilities.astype("<f4").tobytes(), embedding.astype("<f4").tobytes(), image),
        )

    def _shrink(self, connection: sqlite3.Connection) -> None:
        """Deletes the oldest rows if the file is too large."""
        pages = "(select page_count - freelist_count from pragma_page_count, pragma_freelist_count)"
        size = f"select {pages} * (select page_size from pragma_page_size)"
        if connection.execute(size).fetchone()[0] <= self._max_bytes:
            return
        connection.execute(
            "delete from requests where rowid in (select rowid from requests order by rowid "
            "limit max(1, cast(? * (select count(*) from requests) as integer)))",
            (_DELETED_FRACTION,),
        )
        connection.commit()
        connection.execute("pragma incremental_vacuum").fetchall()
        connection.execute("pragma wal_checkpoint(truncate)").fetchall()


def _png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
