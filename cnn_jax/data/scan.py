"""A scan reads every image once, records the properties of the images and caches their pixels.

The record of an image is kept between runs until the image's version changes, so a second
run starts at once.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int

from cnn_jax.data import Track, cache, decode, no_track
from cnn_jax.data.decode import Header, Pixels, UnknownFormatError, UnknownWhiteError, Values
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.resize import resize
from cnn_jax.data.source import Source
from cnn_jax.system.errors import DataError

logger = logging.getLogger(__name__)

# This version is part of the cache key. Increase the version when the meaning of a record changes.
_VERSION = 3
# The largest allowed size of an image file is a number of bytes for each allowed pixel, plus a
# number of bytes for metadata. A larger file is not read.
_BYTES_A_PIXEL, _OTHER_BYTES = 4, 2**20
# The records are stored when this number of seconds has passed, and at the end.
_SECONDS_UNTIL_STORED = 60.0
# To limit the memory use, files with more bytes than this number are read and decoded one at a
# time.
_LARGE_FILE = 2**23
_LARGE_FILE_TURN = threading.Lock()

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Record:
    """The record of one image file: the properties that a scan stores.

    Attributes:
      digest: The sha256 of the encoded bytes, hexadecimal, 32 digits; "" if the bytes cannot
        be read.
      pixels: The digest of the decoded pixels and their shape; "" after an error.
      header: The file's header; None after an error.
      error: The reason why the image cannot be read; None if the image can be read.
      values: The range of the file's values; None after an error, unless the error is that the
        white level is unknown.
      other_format: The image's format if it is known but not supported; else "".
    """

    digest: str
    pixels: str
    header: Header | None
    error: str | None
    values: Values | None = None
    other_format: str = ""


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An example that cannot be read.

    Attributes:
      id: The example's id.
      reason: A phrase such as "is empty".
      other_format: See `Record`.
    """

    id: str
    reason: str
    other_format: str = ""


def examine(encoded: bytes, preprocessing: Preprocessing) -> tuple[Record, Pixels | None]:
    """Returns the record and the pixels of an encoded image; the pixels are None after an error."""
    digest = _digest(encoded)
    try:
        header, values, pixels = decode.decode_with_header(
            encoded, preprocessing.max_pixels, preprocessing.white_level
        )
    except UnknownWhiteError as error:
        return Record(digest, "", None, str(error), error.values), None
    except UnknownFormatError as error:
        return Record(digest, "", None, str(error), None, error.format), None
    except DataError as error:
        return Record(digest, "", None, str(error)), None
    return Record(digest, decode.pixel_digest(pixels), header, None, values), pixels


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def read_example(source: Source, index: int, max_pixels: int) -> bytes:
    """Reads the encoded bytes of an example.

    Args:
      source: The images.
      index: The position of the image in the source.
      max_pixels: The largest number of pixels of an image. A file with more than four bytes for
        each of these pixels, and 1 MiB, is not read.

    Raises:
      DataError: The bytes cannot be read, or are too many for an image of `max_pixels`.
    """
    if source.sizes[index] > _BYTES_A_PIXEL * max_pixels + _OTHER_BYTES:
        size = f"{source.sizes[index]:,} bytes"
        raise DataError(f"has {size}, more than an image of max_pixels = {max_pixels}")
    try:
        return source.read(source.keys[index])
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error


def one_large_file_at_a_time(
    source: Source, index: int
) -> contextlib.AbstractContextManager[object]:
    """Returns a context manager that lets only one thread at a time handle a large file.

    Without this limit, the memory used would grow with the number of cores.
    """
    is_large = source.sizes[index] > _LARGE_FILE
    return _LARGE_FILE_TURN if is_large else contextlib.nullcontext()


@runtime_checkable
class PixelSink(Protocol):
    """A destination to which a scan writes the resized images."""

    def needs(self, digest: str) -> bool:
        """Returns whether the image with this `Record.digest` must be written."""
        ...

    def write(self, row: int, digest: str, pixels: Pixels) -> None:
        """Writes the image of the example at position `row`."""
        ...

    def store(self) -> None:
        """Is called now and then while no thread writes, to protect the images from a crash."""
        ...


def scan(
    source: Source,
    preprocessing: Preprocessing,
    sink: PixelSink | None = None,
    track: Track = no_track,
    known: Sequence[Record | None] | None = None,
) -> list[Record]:
    """Examines every image that has no record yet.

    Args:
      source: The images.
      preprocessing: How to decode the images, and how to resize them for the sink.
      sink: Receives the images that it needs and that can be decoded; None if only the records
        are needed.
      track: Shows progress.
      known: The result of `known_records`; None: this function calls it.

    Returns:
      A record for each example.

    Raises:
      OSError: The sink cannot be written.
    """
    if known is None:
        known = known_records(source, preprocessing)
    records = list(known)

    def is_needed(record: Record) -> bool:
        return sink is not None and record.header is not None and sink.needs(record.digest)

    rows = [i for i, record in enumerate(records) if record is None or is_needed(record)]

    def work(row: int) -> None:
        with one_large_file_at_a_time(source, row):
            look_at(row)

    def look_at(row: int) -> None:
        try:
            encoded = read_example(source, row, preprocessing.max_pixels)
        except DataError as error:
            records[row] = Record("", "", None, str(error))
            return
        record, pixels = records[row], None
        if record is None or record.digest != _digest(encoded):
            record, pixels = examine(encoded, preprocessing)
        records[row] = record
        if sink is not None and is_needed(record):
            if pixels is None:
                pixels = decode.decode(encoded, preprocessing.max_pixels, preprocessing.white_level)
            sink.write(row, record.digest, resize(pixels, preprocessing))

    due = time.monotonic() + _SECONDS_UNTIL_STORED

    def store() -> None:
        nonlocal due
        if sink is not None:
            sink.store()
        if (start := time.monotonic()) >= due:
            _remember(source, preprocessing, records)
            # The records of millions of images take a while. This time must stay a small fraction.
            due = start + max(_SECONDS_UNTIL_STORED, 20 * (time.monotonic() - start))

    if rows:
        try:
            # At an interruption, `closing` waits until no thread uses the sink any more.
            with contextlib.closing(on_all_cores(work, rows, store)) as finished:
                for _ in track(finished, "reading images", len(rows)):
                    pass
        finally:  # The records of the finished images are kept even after Ctrl-C.
            _remember(source, preprocessing, records)
    return [record for record in records if record is not None]


def on_all_cores(
    work: Callable[[int], _Result],
    rows: Sequence[int],
    pause: Callable[[], None] = lambda: None,
) -> Generator[_Result, None, None]:
    """Yields work(row) for each row, in order; one thread per core computes the results.

    Threads are fast because decoders and hashes release Python's global lock.

    Args:
      work: Computes the result of a row.
      rows: The rows.
      pause: Is called from time to time while no thread works.
    """
    with ThreadPoolExecutor(num_cores()) as pool:
        for chunk in _chunks(rows, 64 * num_cores()):
            yield from pool.map(work, chunk)
            pause()


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS does not support CPU affinity.


def _chunks(rows: Iterable[int], size: int) -> Iterator[list[int]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def known_records(source: Source, preprocessing: Preprocessing) -> list[Record | None]:
    """Returns the records of an earlier scan; None for examples that are new or have changed."""
    remembered = cache.read_json("scans", _key(source, preprocessing))
    records: list[Record | None] = [None] * len(source)
    # A cache file with unexpected content is ignored.
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        for i, (example_id, version) in enumerate(zip(source.ids, source.versions, strict=True)):
            if (values := remembered.get(example_id)) and values[0] == version:
                _, digest, pixels, header, error, value_range, other_format = values
                records[i] = Record(
                    digest,
                    pixels,
                    Header(*header) if header else None,
                    error,
                    Values(*value_range) if value_range else None,
                    other_format,
                )
    return records


def _remember(
    source: Source, preprocessing: Preprocessing, records: Sequence[Record | None]
) -> None:
    """Stores the records; an unfinished scan also keeps the stored records of other scans."""
    if any(record is None for record in records):
        stored = known_records(source, preprocessing)
        pairs = zip(records, stored, strict=True)
        records = [old if record is None else record for record, old in pairs]
    values = {
        example_id: (
            version,
            record.digest,
            record.pixels,
            dataclasses.astuple(record.header) if record.header else None,
            record.error,
            dataclasses.astuple(record.values) if record.values else None,
            record.other_format,
        )
        for example_id, version, record in zip(source.ids, source.versions, records, strict=True)
        # A record has no digest if the file could not be read. Such a record is not stored, so that
        # the next run reads the file again.
        if record is not None and record.digest
    }
    try:
        cache.write_json("scans", _key(source, preprocessing), values)
    except OSError as error:
        logger.warning("the records of the images cannot be cached: %s", error)


def _key(source: Source, preprocessing: Preprocessing) -> str:
    limits = f"{preprocessing.max_pixels} {preprocessing.white_level}"
    text = f"{_VERSION} {decode.VERSION} {limits} {source.name}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def readable(
    listing: Source, records: Sequence[Record]
) -> tuple[Source, Int[np.ndarray, " n"], list[Unreadable]]:
    """Returns the readable examples, their positions in the listing, and unreadable examples."""
    unreadable = [
        Unreadable(example_id, record.error, record.other_format)
        for example_id, record in zip(listing.ids, records, strict=True)
        if record.error is not None
    ]
    rows = np.flatnonzero([record.error is None for record in records])
    source = listing.select(rows)
    # If no example is readable, all classes are empty, and none of the classes is removed.
    if len(rows):
        source = source.without_empty_classes()
    return source, rows, unreadable


def pixels_key(preprocessing: Preprocessing) -> str:
    """Returns the cache key of resized images, a hash of everything except the image itself."""
    height, width = preprocessing.image_size
    limits = f"{preprocessing.max_pixels} {preprocessing.white_level}"
    shape = f"{preprocessing.resize} {preprocessing.crop_ratio} {preprocessing.interpolation}"
    return _digest(f"{decode.VERSION} {height} {width} {limits} {shape}".encode())
