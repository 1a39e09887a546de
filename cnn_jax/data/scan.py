"""One pass over all images: what is in them, and their pixels for the cache.

What is known of an image is kept between runs, for as long as its version stays,
so that a second run starts at once.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
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

# Raise it when a record means something else.
_VERSION = 3
# An image file has at most this many bytes for each pixel that is allowed, and for
# all that is no pixel. A larger one is not even read.
_BYTES_A_PIXEL, _OTHER_BYTES = 4, 2**20
# Bytes from which on a file is read and decoded while no other such file is.
_LARGE_FILE = 2**23
_LARGE_FILE_TURN = threading.Lock()

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of one image.

    Attributes:
      digest: Of the encoded bytes, hexadecimal; "" if they cannot be read.
      pixels: Digest of the decoded pixels and their shape; "" after an error.
      header: None after an error.
      error: Why the image cannot be read, or None.
      values: None after an error, unless the error is that the values are known and
        not what they mean.
      other_format: The image's format if that is known and is not read; else "".
    """

    digest: str
    pixels: str
    header: Header | None
    error: str | None
    values: Values | None = None
    other_format: str = ""


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A file that should be an image and is none, and why.

    Attributes:
      id: Of the example.
      reason: A phrase such as "is empty".
      other_format: As in `Record`.
    """

    id: str
    reason: str
    other_format: str = ""


def examine(encoded: bytes, preprocessing: Preprocessing) -> tuple[Record, Pixels | None]:
    """Returns the record of an encoded image, and its pixels in full size if it can be decoded."""
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
    shape = f"{pixels.shape[0]}x{pixels.shape[1]}"
    return Record(digest, _digest(pixels.data, shape.encode()), header, None, values), pixels


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def read_example(source: Source, index: int, max_pixels: int) -> bytes:
    """The encoded bytes of an example.

    Raises:
      DataError: They cannot be read, or are more than an image can have.
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
    """Holds back the other threads' large files, so that memory does not grow with cores."""
    is_large = source.sizes[index] > _LARGE_FILE
    return _LARGE_FILE_TURN if is_large else contextlib.nullcontext()


@runtime_checkable
class PixelSink(Protocol):
    """Where a scan leaves the resized images."""

    def write(self, row: int, pixels: Pixels) -> None: ...


def scan(
    source: Source,
    preprocessing: Preprocessing,
    sink: PixelSink | None = None,
    track: Track = no_track,
    known: Sequence[Record | None] | None = None,
) -> list[Record]:
    """Examines every image that is not known yet.

    Args:
      source: The images.
      preprocessing: Their size in the sink, `max_pixels` and `white_level`.
      sink: Gets row i for every example i that can be decoded; None if the pixels
        are not wanted.
      track: Shows progress.
      known: What `known_records` gave, if it has been asked already.

    Returns:
      A record for each example.

    Raises:
      OSError: The sink cannot be written.
    """
    if known is None:
        known = known_records(source, preprocessing)
    records = list(known)
    rows = [i for i, record in enumerate(records) if record is None or sink is not None]

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
        if sink is not None and record.header is not None:
            if pixels is None:
                pixels = decode.decode(encoded, preprocessing.max_pixels, preprocessing.white_level)
            sink.write(row, resize(pixels, preprocessing))

    if rows:
        try:
            for _ in track(on_all_cores(work, rows), "reading images", len(rows)):
                pass
        finally:  # Also after Ctrl-C: what is known need not be found out again.
            _remember(source, preprocessing, records)
    return [record for record in records if record is not None]


def on_all_cores(work: Callable[[int], _Result], rows: Sequence[int]) -> Iterator[_Result]:
    """work(row) for each row, in order, by as many threads as there are cores.

    Decoders and hashes work outside Python's lock.
    """
    with ThreadPoolExecutor(num_cores()) as pool:
        for chunk in _chunks(rows, 64 * num_cores()):
            yield from pool.map(work, chunk)


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS knows no affinity.


def _chunks(rows: Iterable[int], size: int) -> Iterator[list[int]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def known_records(source: Source, preprocessing: Preprocessing) -> list[Record | None]:
    """The records of an earlier scan, None where an example is new or has changed."""
    remembered = cache.read_json("scans", _key(source, preprocessing))
    records: list[Record | None] = [None] * len(source)
    # What is not of the right form is as good as nothing.
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        for i, (example_id, version) in enumerate(zip(source.ids, source.versions, strict=True)):
            if (values := remembered.get(example_id)) and values[0] == version:
                _, digest, pixels, header, error, of_values, other_format = values
                records[i] = Record(
                    digest,
                    pixels,
                    Header(*header) if header else None,
                    error,
                    Values(*of_values) if of_values else None,
                    other_format,
                )
    return records


def _remember(
    source: Source, preprocessing: Preprocessing, records: Sequence[Record | None]
) -> None:
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
        # Whoever could not read a file may be allowed to the next time.
        if record is not None and record.digest
    }
    try:
        cache.write_json("scans", _key(source, preprocessing), values)
    except OSError as error:
        logger.warning("what was found in the images cannot be kept: %s", error)


def _key(source: Source, preprocessing: Preprocessing) -> str:
    limits = f"{preprocessing.max_pixels} {preprocessing.white_level}"
    text = f"{_VERSION} {decode.VERSION} {limits} {source.name}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def readable(
    listing: Source, records: Sequence[Record]
) -> tuple[Source, Int[np.ndarray, " n"], list[Unreadable]]:
    """The examples that can be read, their positions in the listing, and the others."""
    unreadable = [
        Unreadable(example_id, record.error, record.other_format)
        for example_id, record in zip(listing.ids, records, strict=True)
        if record.error is not None
    ]
    rows = np.flatnonzero([record.error is None for record in records])
    source = listing.select(rows)
    if len(rows):  # Else there would be no class at all.
        source = source.without_empty_classes()
    return source, rows, unreadable


def pixels_key(records: Sequence[Record], preprocessing: Preprocessing) -> str:
    """The name of the decoded images of these records, of one size: changes with any of them."""
    height, width = preprocessing.image_size
    limits = f"{preprocessing.max_pixels} {preprocessing.white_level}"
    shape = f"{preprocessing.resize} {preprocessing.crop_ratio} {preprocessing.interpolation}"
    start = f"{decode.VERSION} {height} {width} {limits} {shape}".encode()
    return _digest(start, "".join(f"{record.digest:<32}" for record in records).encode())
