"""Functions that open a data set: scan, leave out unreadable images, divide, cache pixels."""

import contextlib
import dataclasses
import errno
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt8

from cnn_jax.data import Track, cache, no_track, scan
from cnn_jax.data.decode import Pixels
from cnn_jax.data.findings import (
    Findings,
    ValueRange,
    find,
    too_few_classes,
    too_unreadable,
    value_ranges,
)
from cnn_jax.data.pipeline import Loader, choose_workers
from cnn_jax.data.preprocessing import Preprocessing
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
      findings: The findings of the scan.
      residency: The place where the pixels are kept, one of `schema.RESIDENCIES`.
    """

    loader: Loader
    splits: Mapping[str, Int[np.ndarray, " _"]]
    fingerprint: str
    findings: Findings
    residency: str = "none"

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
    track: Track = no_track,
) -> Dataset:
    """Scans a source, leaves out unreadable images, divides it, and caches its pixels.

    Args:
      listing: A source from `open_source`.
      division: How to divide the source.
      preprocessing: How images are decoded and resized.
      max_unreadable: The largest fraction of images that may be unreadable, 0 to 1.
      residency: One of `schema.RESIDENCIES`; "none": no pixels are cached.
      workers: The number of worker processes if images are decoded each time; -1: automatic.
      track: Shows progress.

    Raises:
      DataError: Too many images cannot be read, or the data cannot be divided.
    """
    division.check(listing)  # Before the scan, which may take long.
    records, pixels = _scan(listing, preprocessing, residency, track)
    if pixels is None and residency != "none":
        residency = "none"  # The disk is full; a warning was logged.
    source, rows, unreadable = scan.readable(listing, records)
    values = value_ranges(records, preprocessing)
    _check_readable(listing, unreadable, max_unreadable, values)
    records = [records[row] for row in rows]
    splits = division.divide(source, [record.pixels for record in records])
    return Dataset(
        loader=Loader(
            source,
            preprocessing,
            pixels=pixels,
            rows=rows if pixels is not None else None,
            on_device=residency == "device",
            workers=choose_workers(workers) if pixels is None else 0,
        ),
        splits=splits,
        fingerprint=fingerprint(source, [record.digest for record in records], splits),
        findings=find(source, records, division, splits, unreadable, values),
        residency=residency,
    )


def choose_residency(
    requested: str, listing: Source, preprocessing: Preprocessing, device_bytes: int
) -> str:
    """Chooses where pixels are kept, from the value of `data.cache`, which may be "auto".

    "auto" is the first place that is large enough: the device, if the images need at most a
    quarter of its memory; the host's memory, with the same limit; the disk, if they need at
    most half of its free space. Otherwise images are decoded each time.

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
    return "disk" if decoded <= cache.free_bytes() / 2 else "none"


def _decoded_bytes(listing: Source, preprocessing: Preprocessing) -> int:
    return len(listing) * math.prod(preprocessing.image_size) * 3


def memory_bytes() -> int:
    """Returns the memory in bytes of the machine, or of the container if that is smaller."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # Not Linux, or no limit.
        return min(installed, int(_CONTAINER_LIMIT.read_text()))
    return installed


class _InMemory:
    """A destination in memory for the resized images of a scan: uint8 [n, height, width, 3]."""

    def __init__(self, count: int, image_size: tuple[int, int]):
        self.pixels = np.zeros((count, *image_size, 3), np.uint8)

    def write(self, row: int, pixels: Pixels) -> None:
        self.pixels[row] = pixels


def _scan(
    listing: Source, preprocessing: Preprocessing, residency: str, track: Track
) -> tuple[list[Record], UInt8[np.ndarray, "n height width 3"] | None]:
    """Returns the records of all examples, and their pixels unless `residency` is "none".

    The pixels are read from the cache on disk. If they are not in it, they are written to it,
    provided that there is enough space.
    """
    if residency == "none":
        return scan.scan(listing, preprocessing, None, track), None
    known = scan.known_records(listing, preprocessing)
    if 2 * known.count(None) < len(known):
        # Few examples lack a record. When they have records too, the cache may have all pixels.
        records = scan.scan(listing, preprocessing, None, track, known)
        key, size = scan.pixels_key(records, preprocessing), preprocessing.image_size
        pixels = cache.open_pixels(key, len(listing), size)
        if pixels is not None:
            return records, _copy_to_memory(pixels, residency)
        known = records
    return _decode_all(listing, preprocessing, residency, track, known)


def _decode_all(
    listing: Source,
    preprocessing: Preprocessing,
    residency: str,
    track: Track,
    known: Sequence[Record | None],
) -> tuple[list[Record], UInt8[np.ndarray, "n height width 3"] | None]:
    """Decodes all images and returns their records and pixels, as `_scan` does.

    It is used if the pixels are not in the cache.
    """
    try:
        # Unless the user asked for the disk, a file is only useful to the next run.
        if residency != "disk" and _decoded_bytes(listing, preprocessing) > cache.free_bytes() / 2:
            raise OSError(errno.ENOSPC, "they would take more than half of the free space")
        with cache.PixelFile(len(listing), preprocessing.image_size) as file:
            records = scan.scan(listing, preprocessing, file, track, known)
            pixels = file.publish(scan.pixels_key(records, preprocessing))
            return records, _copy_to_memory(pixels, residency)
    except OSError as error:
        hint = "; cnn_jax cache --clear makes room" * (error.errno == errno.ENOSPC)
        logger.warning(
            "decoded images cannot be kept in %s: %s%s",
            cache.cache_dir(),
            error.strerror or error,
            hint,
        )
    if residency == "disk":
        return scan.scan(listing, preprocessing, None, track, known), None
    sink = _InMemory(len(listing), preprocessing.image_size)
    return scan.scan(listing, preprocessing, sink, track, known), sink.pixels


def _copy_to_memory(mapped: np.ndarray, residency: str) -> np.ndarray:
    """Copies a memory-mapped array to memory if `residency` is "memory"; else returns it."""
    return np.array(mapped) if residency == "memory" else mapped


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
    """Raises DataError if there are fewer than two classes."""
    if reason := too_few_classes(listing):
        raise DataError(f"{listing.name}: {reason}")


def check_trainable(dataset: Dataset) -> None:
    """Raises DataError if there are fewer than two classes, or a split is empty."""
    if reason := dataset.findings.untrainable():
        raise DataError(f"{dataset.source.name}: {reason}")
