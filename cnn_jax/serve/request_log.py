"""What was asked and answered, for those who look for drift or compare versions.

An SQLite file with a row for each sampled image: when, by which version, what it said and how
sure it was, the embedding by which images can be compared, and, if that is allowed, the image.
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

# Rows that may wait to be written; more are lost, and counted.
_MOST_WAITING = 1_000
# Images whose embeddings are computed at once.
_TOGETHER = 8
# The share of rows that goes when the file has become too large.
_SHARE_REMOVED = 0.1
_TABLE = """
create table if not exists requests (
  time real not null,          -- seconds since the epoch
  request_id text not null,
  model text not null,
  version integer not null,
  class text not null,         -- the most probable one
  confidence real not null,    -- its probability
  probabilities blob not null, -- float32, little endian, of all classes
  embedding blob not null,     -- float32, little endian
  image blob                   -- PNG of the size that the network sees; null if not allowed
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
    """Writes rows on a thread of its own; whoever offers one never waits."""

    def __init__(
        self,
        path: pathlib.Path,
        share: float = 1.0,
        max_bytes: int = 1_000_000_000,
        with_images: bool = False,
    ):
        """Opens the file, which may be there already.

        Args:
          path: Of the file; its folder must be there.
          share: Of the images, 0 to 1, chosen at random.
          max_bytes: Of the file; beyond it the oldest rows go.
          with_images: Whether images are kept.

        Raises:
          ConfigError: The file cannot be used.
        """
        self._path = path
        self._share = share
        self._max_bytes = max_bytes
        self._with_images = with_images
        # Each is counted on one thread alone.
        self._too_many, self._failed = 0, 0
        self._random = random.Random()
        self._waiting: queue.Queue[_Row | None] = queue.Queue(_MOST_WAITING)
        try:
            # What it holds is nobody else's business.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            with contextlib.closing(self._connect()) as connection:
                # Before there is a table: later it would take a rewriting of the file.
                connection.execute("pragma auto_vacuum = incremental")
                connection.execute("pragma journal_mode = wal")
                connection.execute(_TABLE)
                connection.execute(f"select {', '.join(_COLUMNS)} from requests limit 1")
                connection.commit()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"--request_log: cannot use {path}: {error}") from error
        self._thread = threading.Thread(target=self._write_all, name="request log", daemon=True)
        self._thread.start()

    def offer(
        self, version: Version, request_id: str, pixels: Pixels, probabilities: np.ndarray
    ) -> None:
        """Notes an answered image, if it is among the sampled ones."""
        if self._random.random() >= self._share:
            return
        try:
            row = _Row(time.time(), request_id, version, pixels, probabilities)
            self._waiting.put_nowait(row)
        except queue.Full:
            self._too_many += 1

    @property
    def lost(self) -> int:
        """Rows that could not be written."""
        return self._too_many + self._failed

    def close(self) -> None:
        """Writes what waits, and ends."""
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
            except Exception as error:  # Such as a full disk; answers do not depend on it.
                logger.error("%d rows of the request log are lost: %s", len(rows), error)
                self._failed += len(rows)

    def _next_rows(self) -> tuple[list[_Row], bool]:
        """What waits, a few rows of any versions; and whether nothing more will come."""
        rows: list[_Row] = []
        while len(rows) < _TOGETHER:
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
                of_version = [row for row in rows if row.version is version]
                pixels = np.stack([row.pixels for row in of_version])
                # Of one size, which is compiled.
                missing = _TOGETHER - len(pixels)
                padded = np.pad(pixels, [(0, missing), (0, 0), (0, 0), (0, 0)], mode="edge")
                found = embeddings(version.predictor, padded)
                connection.executemany(
                    "insert into requests values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [self._values(row, own) for row, own in zip(of_version, found, strict=False)],
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
        """Removes the oldest rows of a file that has become too large."""
        pages = "(select page_count - freelist_count from pragma_page_count, pragma_freelist_count)"
        size = f"select {pages} * (select page_size from pragma_page_size)"
        if connection.execute(size).fetchone()[0] <= self._max_bytes:
            return
        connection.execute(
            "delete from requests where rowid in (select rowid from requests order by rowid "
            "limit max(1, cast(? * (select count(*) from requests) as integer)))",
            (_SHARE_REMOVED,),
        )
        connection.commit()
        connection.execute("pragma incremental_vacuum").fetchall()
        connection.execute("pragma wal_checkpoint(truncate)").fetchall()


def _png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
