"""Functions that scan a data set, divide it into splits and cache the pixels of the images."""

import contextlib
import dataclasses
import errno
import functools
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt8

from cnn_jax.data import Track, cache, no_track, row_cache, scan
from cnn_jax.data.decode import Pixels
from cnn_jax.data.findings import (
    Findings,
    ValueRange,
    find,
    too_few_classes,
    too_unreadable,
    value_ranges,
)
from cnn_jax.data.join import OTHER_SIZE, Joined, Part, join, make_part
from cnn_jax.data.pipeline import Loader, choose_workers, load_image
from cnn_jax.data.preprocessing import Preprocessing, unscaled
from cnn_jax.data.row_cache import CachedRows, RowCache, RowWriter
from cnn_jax.data.scan import Record, Unreadable
from cnn_jax.data.source import Source, fingerprint
from cnn_jax.data.splits import Division
from cnn_jax.system.errors import DataError

logger = logging.getLogger(__name__)

_CONTAINER_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """The readable examples of a source, divided into splits.

    Attributes:
      loader: Loads examples of the source.
      splits: The positions in the source of each name in `SPLITS`.
      fingerprint: A hash of the id, class, content and split of all examples.
      contents: The digest of the decoded pixels of each example; see `scan.Record`.
      findings: The findings of the scan.
      residency: The place where the pixels are kept, one of `schema.RESIDENCIES`.
      digests: The digest of the resized pixels of each example; see `open_dataset`.
    """

    loader: Loader
    splits: Mapping[str, Int[np.ndarray, " _"]]
    fingerprint: str
    contents: Sequence[str]
    findings: Findings
    residency: str = "none"
    digests: list[str] | None = None

    @property
    def source(self) -> Source:
        return self.loader.source


def open_dataset(
    listing: Source,
    division: Division,
    preprocessing: Preprocessing,
    *,
    max_unreadable: float = 0.01,
    residency: str = "none",
    workers: int = 0,
    with_digests: bool = False,
    track: Track = no_track,
) -> Dataset:
    """Scans a source, omits unreadable images, divides the source into splits and caches pixels.

    Args:
      listing: A source from `open_source`.
      division: How to divide the source into splits.
      preprocessing: How images are decoded and resized.
      max_unreadable: The largest fraction of images that may be unreadable, 0 to 1.
      residency: One of `schema.RESIDENCIES`; "none": no pixels are cached.
      workers: The number of worker processes if images are decoded each time; -1: automatic.
      with_digests: Whether to compute the digests of the resized pixels, which are cached. They
        are always computed for a source with a request log.
      track: Shows progress.

    Raises:
      DataError: Too many images cannot be read, or the data cannot be divided.
    """
    # Check data.group before the scan, because the scan may take a long time.
    division.check(listing)
    records, stored = _scan(listing, preprocessing, residency, track)
    if stored is None and residency != "none":
        # The pixels could not be cached, for example because the disk is full. A warning was
        # logged.
        residency = "none"
    source, rows, unreadable = scan.readable(listing, records)
    values = value_ranges(records, preprocessing)
    _check_readable(listing, unreadable, max_unreadable, values)
    records = [records[row] for row in rows]
    splits = division.divide(source, [record.pixels for record in records])
    pixels = _pixels(stored, rows, source, records, preprocessing, residency)
    part = digests = None
    if with_digests or listing.log is not None:
        base, base_pixels = source, pixels

        def load(position: int) -> Pixels:
            if base_pixels is None:
                return load_image(base, position, preprocessing)
            return base_pixels[np.array([position])][0]

        part = make_part(source, records, preprocessing, load, track)
        digests = part.digests
    if listing.log is not None:
        assert part is not None
        joined, more_pixels = join_log(part, listing.log, splits, division, preprocessing, track)
        source, records, splits = joined.source, joined.records, joined.splits
        digests = joined.digests
        if isinstance(pixels, CachedRows):
            pixels = pixels.extended(more_pixels[joined.rows])
        elif pixels is not None:
            pixels = np.concatenate([pixels, more_pixels[joined.rows]])
    return Dataset(
        loader=Loader(
            source,
            preprocessing,
            pixels=pixels,
            on_device=residency == "device",
            workers=choose_workers(workers) if pixels is None else 0,
        ),
        splits=splits,
        fingerprint=fingerprint(source, [record.digest for record in records], splits),
        contents=[record.pixels for record in records],
        findings=find(source, records, division, splits, unreadable, values),
        residency=residency,
        digests=digests,
    )


def join_log(
    base: Part,
    listing: Source,
    splits: Mapping[str, Int[np.ndarray, " _"]],
    division: Division,
    preprocessing: Preprocessing,
    track: Track = no_track,
) -> tuple[Joined, UInt8[np.ndarray, "rows height width 3"]]:
    """Scans the labelled images of request logs, and adds them to the examples of a source.

    Args:
      base: The examples of the source.
      listing: The labelled images, from `open_source`.
      splits: The positions of the examples of the source, by split.
      division: How the source was divided.
      preprocessing: How images are resized; logged images are resized already.
      track: Shows progress.

    Returns:
      The examples, and the pixels of all logged images.

    Raises:
      DataError: No image has the size of the network's input.
    """
    height, width = preprocessing.image_size
    preprocessing = unscaled(preprocessing)
    records: list[Record] = []
    pixels = np.zeros((0, height, width, 3), np.uint8)
    if len(listing):
        # Images of users must not be written to the cache, which other users may read.
        sink = _InMemory(len(listing), (height, width))
        records, pixels = scan.scan(listing, preprocessing, sink, track), sink.pixels
    sizes = [(r.header.height, r.header.width) if r.header else None for r in records]
    rows = np.array([row for row, size in enumerate(sizes) if size == (height, width)], int)
    if len(listing) and not len(rows):
        other = next((f"{size[1]} x {size[0]} pixels" for size in sizes if size), "unreadable")
        raise DataError(
            f"{listing.name}: the logged images are {other}, and the network's input is {width} x "
            f"{height} pixels; set data.image_size to the size of the network that was served"
        )
    source = listing.select(rows)
    if left_out := len(listing) - len(rows):
        source = dataclasses.replace(source, ignored={**source.ignored, OTHER_SIZE: left_out})
    records = [records[row] for row in rows]
    log = make_part(source, records, preprocessing, lambda i: pixels[rows[i]], track, cached=False)
    joined = join(base, log, splits, division)
    return dataclasses.replace(joined, rows=rows[joined.rows]), pixels


def choose_residency(
    requested: str, listing: Source, preprocessing: Preprocessing, device_bytes: int
) -> str:
    """Resolves the value of `data.cache`, which may be "auto", to the place where pixels are kept.

    "auto" is the first place that is large enough: the device, if the images need at most a
    quarter of its memory; the host's memory, with the same limit; the disk, if the images that
    are not yet in the cache need at most half of its free space. If no place is large enough,
    images are decoded each time.

    Args:
      requested: "auto" or one of `schema.RESIDENCIES`.
      listing: The source.
      preprocessing: The size of the images.
      device_bytes: The accelerator's memory in bytes; 0 if the device is a CPU, which has no
        memory of its own.

    Returns:
      One of `schema.RESIDENCIES`.
    """
    if requested != "auto":
        return requested
    decoded = _decoded_bytes(listing, preprocessing)
    if decoded <= device_bytes / 4:
        return "device"
    if decoded <= memory_bytes() / 4:
        return "memory"
    # Images of other data sets are counted too. If space is missing, the scan notices it.
    stored = row_cache.stored_bytes("pixels", scan.pixels_key(preprocessing))
    return "disk" if decoded - stored <= cache.free_bytes() / 2 else "none"


def _decoded_bytes(listing: Source, preprocessing: Preprocessing) -> int:
    images = len(listing) + (len(listing.log) if listing.log is not None else 0)
    return images * math.prod(preprocessing.image_size) * 3


def memory_bytes() -> int:
    """Returns the smaller of the machine's memory and the container's memory limit, in bytes."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Reading the limit fails if the system is not Linux, or if there is no limit.
    with contextlib.suppress(OSError, ValueError):
        return min(installed, int(_CONTAINER_LIMIT.read_text()))
    return installed


class _InMemory:
    """An array in memory to which a scan writes the resized images: uint8 [n, height, width, 3]."""

    def __init__(self, count: int, image_size: tuple[int, int]):
        self.pixels = np.zeros((count, *image_size, 3), np.uint8)

    def needs(self, digest: str) -> bool:
        return True

    def write(self, row: int, digest: str, pixels: Pixels) -> None:
        self.pixels[row] = pixels

    def store(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _ToCache:
    """A sink that writes the images that the cache lacks."""

    stored: RowCache
    writer: RowWriter

    def needs(self, digest: str) -> bool:
        return digest not in self.stored.digests

    def write(self, row: int, digest: str, pixels: Pixels) -> None:
        self.writer.write(digest, pixels)

    def store(self) -> None:
        self.writer.store_if_full()


def _scan(
    listing: Source, preprocessing: Preprocessing, residency: str, track: Track
) -> tuple[list[Record], RowCache | UInt8[np.ndarray, "n height width 3"] | None]:
    """Returns the records of all examples, and the cache of their pixels.

    Only the images that the cache lacks are decoded. If they cannot be written, for example because
    the disk is full, the result has an array of the pixels of all examples in place of the cache;
    or None if `residency` is "disk", as if it were "none".
    """
    if residency == "none":
        return scan.scan(listing, preprocessing, None, track), None
    known = scan.known_records(listing, preprocessing)
    shape = (*preprocessing.image_size, 3)
    try:
        stored = RowCache("pixels", scan.pixels_key(preprocessing), shape)
        missing = sum(
            record is None or (record.header is not None and record.digest not in stored.digests)
            for record in known
        )
        if not missing:
            return scan.scan(listing, preprocessing, None, track, known), stored
        # If `residency` is "disk", this run needs the cache. Otherwise only later runs benefit from
        # the cache, so new images may use at most half of the free disk space.
        if residency != "disk" and missing * math.prod(shape) > cache.free_bytes() / 2:
            raise OSError(errno.ENOSPC, "they would take more than half of the free space")
        with stored.writer(missing) as writer:
            return scan.scan(listing, preprocessing, _ToCache(stored, writer), track, known), stored
    except OSError as error:
        hint = "; cnn_jax cache --clear makes room" * (error.errno == errno.ENOSPC)
        logger.warning(
            "decoded images cannot be kept in %s: %s%s",
            cache.cache_dir(),
            error.strerror or error,
            hint,
        )
        known = scan.known_records(listing, preprocessing)  # The scan may have stored records.
    if residency == "disk":
        return scan.scan(listing, preprocessing, None, track, known), None
    sink = _InMemory(len(listing), preprocessing.image_size)
    return scan.scan(listing, preprocessing, sink, track, known), sink.pixels


def _pixels(
    stored: RowCache | UInt8[np.ndarray, "rows height width 3"] | None,
    rows: Int[np.ndarray, " n"],
    source: Source,
    records: Sequence[Record],
    preprocessing: Preprocessing,
    residency: str,
) -> CachedRows | UInt8[np.ndarray, "n height width 3"] | None:
    """Returns the pixels of the readable examples, given the second result of `_scan`.

    Args:
      stored: The second result of `_scan`.
      rows: The positions of the readable examples in the listing.
      source: The readable examples.
      records: The records of the readable examples.
      preprocessing: How damaged images are decoded again.
      residency: The place where the pixels are kept.
    """
    if not isinstance(stored, RowCache):
        return stored if stored is None or len(rows) == len(stored) else stored[rows]
    decode_again = functools.partial(load_image, source, preprocessing=preprocessing)
    pixels = stored.rows([record.digest for record in records], decode_again)
    return np.asarray(pixels) if residency == "memory" else pixels


def _check_readable(
    listing: Source,
    unreadable: Sequence[Unreadable],
    max_unreadable: float,
    values: Sequence[ValueRange],
) -> None:
    """Raises DataError if too many examples cannot be read."""
    if reason := too_unreadable(unreadable, len(listing), max_unreadable, values):
        raise DataError(
            f"{listing.name}: {reason} (`cnn_jax inspect --source={listing.name}` lists them all)"
        )


def check_classes(listing: Source) -> None:
    """Raises DataError if a source has fewer than two classes."""
    if reason := too_few_classes(listing):
        raise DataError(f"{listing.name}: {reason}")


def check_trainable(dataset: Dataset) -> None:
    """Raises DataError if a data set has fewer than two classes, or if a split has no images."""
    if reason := dataset.findings.untrainable():
        raise DataError(f"{dataset.source.name}: {reason}")
