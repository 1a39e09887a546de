"""The request log of a server: records predictions and feedback in the background.

`cnn_jax.data.request_log` describes the files.
"""

import asyncio
import concurrent.futures
import dataclasses
import logging
import pathlib
import queue
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from cnn_jax.data import request_log as files
from cnn_jax.data.decode import Pixels
from cnn_jax.quality.image_statistics import image_statistics
from cnn_jax.serve.fairness import Quota
from cnn_jax.serve.limits import Refused
from cnn_jax.serve.versions import Version
from cnn_jax.system.errors import ConfigError, closest

logger = logging.getLogger(__name__)

# Limits on the rows that wait to be written: their number, and the bytes of their images. Further
# rows are dropped and counted.
_MAX_WAITING, _MAX_WAITING_BYTES = 1_000, 50_000_000
# Maximum number of requests that wait until their feedback is written.
_MAX_FEEDBACK = 200
# Maximum seconds that the shutdown of the server waits until all rows are written.
_CLOSE_SECONDS = 10.0
# A batch of rows takes less time and space than single rows. A batch has the rows that arrive
# within this number of seconds, but at most this number of rows.
_BATCH_SECONDS, _BATCH_ROWS = 0.2, 128
# If no row arrives for this number of seconds, the files that are old enough are completed.
_IDLE_SECONDS = 60.0
# A file has at most this fraction of the maximum size of all files.
_SEGMENT_FRACTION = 1 / 16


@dataclasses.dataclass(frozen=True)
class _Row:
    """The prediction for an image; see `cnn_jax.data.request_log.REQUESTS`."""

    request_id: str
    image_index: int
    unit: str | None
    arm: str | None
    version: Version
    pixels: Pixels  # The network's input, uint8 [height, width, 3].
    probabilities: np.ndarray  # float32 [classes].
    embedding: np.ndarray  # float32 [features].
    milliseconds: float | None = None
    shadow_of: str | None = None
    time: float = dataclasses.field(default_factory=time.time)  # Seconds since the epoch.


class RequestLog:
    """A request log that writes on a separate thread, so that responses are not delayed.

    Attributes:
      lost_rows: The number of rows that could not be written.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        fraction: float = 1.0,
        max_bytes: int = 1_000_000_000,
        with_images: bool = False,
    ):
        """Opens the log, or creates a new log.

        Args:
          folder: The folder of the log, in an existing folder. Several servers may share it.
          fraction: The fraction of images to record, 0 to 1, chosen at random.
          max_bytes: Maximum size of the rows without feedback, of all servers. The oldest rows of a
            larger log are deleted.
          with_images: Whether to record the images.

        Raises:
          ConfigError: The folder cannot be used.
        """
        self._folder = folder
        self._fraction = fraction
        self._max_bytes = max_bytes
        self._with_images = with_images
        self._lock = threading.Lock()  # Guards the two numbers below.
        self.lost_rows = 0
        self._waiting_bytes = 0
        self._feedback_quota = Quota(_MAX_FEEDBACK)
        # If too many rows wait, new rows of predictions are not added. Feedback is always added.
        # None is added last, to end the thread.
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # The digest of the bundle that predicted each row of the current file; and this file.
        self._recent: dict[tuple[str, int], str] = {}
        self._recent_path: pathlib.Path | None = None
        try:
            files.make_folders(folder)
        except OSError as error:
            raise ConfigError(f"--request_log: cannot use {folder}: {error}") from error
        segment_bytes = round(_SEGMENT_FRACTION * max_bytes)
        self._requests = files.Segments(folder / "requests", files.REQUESTS, segment_bytes)
        self._feedback = files.Segments(folder / "feedback", files.FEEDBACK)
        self._failures = files.Segments(folder / "failures", files.FAILURES)
        self._thread = threading.Thread(target=self._write_all, name="request log", daemon=True)
        self._thread.start()

    def record(self, **fields: Any) -> None:
        """Adds an image and its prediction to the write queue, if the image is randomly selected.

        Args:
          **fields: The fields of `_Row`, except `time`.
        """
        if random.random() >= self._fraction:
            return
        row = _Row(**fields)
        self._put(row, row.pixels.nbytes)

    def record_failure(self, fields: Mapping[str, str | None]) -> None:
        """Adds a failed request of an experiment to the write queue.

        Args:
          fields: The columns of `FAILURES`, except `time`.
        """
        self._put({"time": round(1e6 * time.time()), **fields}, 0)

    def _put(self, item: "_Row | dict[str, Any]", size: int) -> None:
        """Adds an item to the write queue, unless too many rows or bytes wait."""
        with self._lock:
            if (
                self._waiting.qsize() >= _MAX_WAITING
                or self._waiting_bytes + size > _MAX_WAITING_BYTES
            ):
                self.lost_rows += 1
                return
            self._waiting_bytes += size
        self._waiting.put(item)

    async def add_feedback(self, client: str, feedback: Any) -> None:
        """Stores the true class or the reward of an image, and waits until it is written.

        Args:
          client: The client that has sent the feedback.
          feedback: The body of the request; see `cnn_jax.serve.feedback.Feedback`.

        Raises:
          Refused: The log does not have the image, the label is not one of the classes, the log
            cannot be written, or too much feedback waits.
        """
        if not self._feedback_quota.fits(client, 1):
            raise Refused(429, "busy", "too much feedback waits to be written", retry_after="1")
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._feedback_quota.add(client, 1)
        try:
            self._waiting.put((feedback, future))
            await asyncio.wrap_future(future)
        finally:
            self._feedback_quota.add(client, -1)

    def close(self) -> bool:
        """Writes what waits to be written, completes the files, and ends the thread.

        Returns:
          Whether the thread has ended; False if, for example, a network folder does not answer.
        """
        self._waiting.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.error("the folder of the request log does not answer; rows may be lost")
        return not self._thread.is_alive()

    # The methods below run on the thread of the log.

    def _write_all(self) -> None:
        item: object = self
        while item is not None:
            rows, item = self._next_rows()
            num_lost = 0
            try:
                if rows:
                    self._write(rows)
            except Exception as error:  # Writing fails, for example, if the disk is full.
                logger.error("%d rows of the request log are lost: %s", len(rows), error)
                num_lost = len(rows)
            with self._lock:
                self.lost_rows += num_lost
                self._waiting_bytes -= sum(row.pixels.nbytes for row in rows)
            if isinstance(item, tuple):
                self._answer_feedback(*item)
            elif isinstance(item, dict):
                self._write_failure(item)
            for segments in (self._requests, self._feedback, self._failures):
                if item is None or segments.is_complete:
                    self._complete(segments)

    def _write_failure(self, row: Mapping[str, object]) -> None:
        try:
            self._failures.append({name: [value] for name, value in row.items()})
        except Exception as error:
            logger.error("a failed request is not in the request log: %s", error)
            with self._lock:
                self.lost_rows += 1

    def _complete(self, segments: files.Segments) -> None:
        """Completes a file, and deletes the oldest rows if the log is too large."""
        try:
            segments.close()
        except Exception as error:
            logger.error("a file of the request log stays an Arrow stream: %s", error)
        try:
            files.delete_oldest(self._folder, self._max_bytes)
        except Exception as error:
            logger.error("old rows of the request log cannot be deleted: %s", error)

    def _next_rows(self) -> tuple[list[_Row], object]:
        """Waits for rows; returns the rows of a batch, and the item that ended the batch.

        The item is feedback with its future, a failure, None if the log was closed, or something
        else. If no row arrives for a while, the batch is empty.
        """
        rows: list[_Row] = []
        end = time.monotonic() + _IDLE_SECONDS
        while len(rows) < _BATCH_ROWS:
            try:
                item = self._waiting.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if not isinstance(item, _Row):
                return rows, item
            if not rows:
                end = time.monotonic() + _BATCH_SECONDS
            rows.append(item)
        return rows, self

    def _write(self, rows: Sequence[_Row]) -> None:
        for version in {row.version for row in rows}:
            files.write_class_names(self._folder, version.digest, version.class_names)
        records = [self._record(row) for row in rows]
        columns = {name: [record[name] for record in records] for name in files.REQUESTS.names}
        self._requests.append(columns)
        if self._requests.path != self._recent_path:
            self._recent, self._recent_path = {}, self._requests.path
        self._recent |= {(row.request_id, row.image_index): row.version.digest for row in rows}

    def _record(self, row: _Row) -> dict[str, object]:
        best = int(np.argmax(row.probabilities))
        brightness, sharpness, contrast = image_statistics(row.pixels)
        return {
            "time": round(1e6 * row.time),
            "request_id": row.request_id,
            "image_index": row.image_index,
            "unit": row.unit,
            "arm": row.arm,
            "model": row.version.model,
            "version": row.version.number,
            "digest": row.version.digest,
            "class": row.version.class_names[best],
            "confidence": row.probabilities[best],
            "probabilities": row.probabilities,
            "embedding": row.embedding,
            "brightness": brightness,
            "sharpness": sharpness,
            "contrast": contrast,
            "milliseconds": row.milliseconds,
            "shadow_of": row.shadow_of,
            # The row of the version that answered has the image.
            "image": _png(row.pixels) if self._with_images and not row.shadow_of else None,
        }

    def _answer_feedback(self, feedback: Any, future: "concurrent.futures.Future[None]") -> None:
        if not future.set_running_or_notify_cancel():
            return  # The client has left.
        try:
            future.set_result(self._store(feedback))
        except Refused as refused:
            future.set_exception(refused)
        except Exception as error:  # Catch every error, because the client must get a response.
            logger.error("feedback to request %s is lost: %s", feedback.request_id, error)
            message = "the request log cannot be written; the log says why"
            future.set_exception(Refused(503, "log", message))

    def _store(self, feedback: Any) -> None:
        digest = self._find(feedback)
        if feedback.label is not None and not feedback.new_class:
            self._check_label(feedback.label, digest)
        columns: dict[str, list[object]] = {"time": [round(1e6 * time.time())]}
        columns |= {n: [getattr(feedback, n)] for n in files.FEEDBACK.names if n != "time"}
        self._feedback.append(columns)
        # Another server may have deleted the row before the feedback was written. Then the row is
        # lost, and the client must know.
        self._find(feedback)

    def _find(self, feedback: Any) -> str:
        """Returns the digest of the bundle that predicted an image.

        Raises:
          Refused: The log does not have the image.
        """
        request_id, index = feedback.request_id, feedback.image_index
        path = self._recent_path
        digest = self._recent.get((request_id, index)) if path and path.exists() else None
        digest = digest or files.find_row(self._folder, request_id, index)
        if digest is None:
            raise Refused(
                404,
                "no_request",
                f"the log has no image {index} of request {request_id}: it was not recorded, or it "
                "was deleted",
            )
        return digest

    def _check_label(self, label: str, digest: str) -> None:
        names = files.class_names(self._folder, digest)
        if label not in names:
            close = closest(label, names)
            hint = f"did you mean {close!r}? " if close else ""
            raise Refused(
                400,
                "label",
                f"the model has no class {label[:100]!r}; {hint}for a class that the model does "
                'not know, add "new_class": true',
            )


def _png(pixels: Pixels) -> bytes:
    # OpenCV takes 1.6 ms for an image of 224 x 224 pixels, and Pillow 7.6 ms.
    return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
