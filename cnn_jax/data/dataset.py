"""A data set, ready to be read: scanned, rid of what cannot be read, divided, and decoded once."""

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
    """A source, divided.

    Attributes:
      loader: Loads from the source.
      splits: For each name in `SPLITS`, positions in the source.
      fingerprint: Changes with any example's identity, class, content or split.
      findings: What is to be said of the data.
      residency: One of `schema.RESIDENCIES`; where the pixels are read from.
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
    """Scans a source, leaves out what cannot be read, divides it, and decodes it if wanted.

    Args:
      listing: A source as `open_source` gives it.
      division: How to divide it.
      preprocessing: The size of the images.
      max_unreadable: The largest share of images that may be unreadable.
      residency: One of `schema.RESIDENCIES`.
      workers: Worker processes if images are decoded each time, -1 for as many as help.
      track: Shows progress.

    Raises:
      DataError: Too many images cannot be read, or the data cannot be divided.
    """
    division.check(listing)  # Rather now than after the scan.
    records, pixels = _scan(listing, preprocessing, residency, track)
    if pixels is None and residency != "none":
        residency = "none"  # The disk is full, and a warning has said so.
    source, rows, unreadable = scan.readable(listing, records)
    values = value_ranges(records, preprocessing)
    _check_readable(listing, unreadable, max_unreadable, values)
    records = [records[row] for row in rows]
    splits = division.of(source, [record.pixels for record in records])
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
    """One of `schema.RESIDENCIES`, for `data.cache`, which may be "auto".

    Auto means on the device if the images take at most a quarter of its memory,
    else in memory if they take at most a quarter of that, else on disk if they
    take at most half of what is free there, else decoded each time.

    Args:
      requested: "auto" or one of `schema.RESIDENCIES`.
      listing: The source.
      preprocessing: The size of the images.
      device_bytes: Memory of an accelerator; 0 if the device is the CPU, whose
        memory is this process's.
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
    """Memory of the machine, or of the container if that is less."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # Not Linux, or not limited.
        return min(installed, int(_CONTAINER_LIMIT.read_text()))
    return installed


class _InMemory:
    """Images [n, height, width, 3] in memory, while they are being decoded."""

    def __init__(self, count: int, image_size: tuple[int, int]):
        self.pixels = np.zeros((count, *image_size, 3), np.uint8)

    def write(self, row: int, pixels: Pixels) -> None:
        self.pixels[row] = pixels


def _scan(
    listing: Source, preprocessing: Preprocessing, residency: str, track: Track
) -> tuple[list[Record], UInt8[np.ndarray, "n height width 3"] | None]:
    """Records of all examples, and all their pixels unless these are decoded each time.

    The pixels come from the cache on disk, or are left there, if there is room.
    """
    if residency == "none":
        return scan.scan(listing, preprocessing, None, track), None
    known = scan.known_records(listing, preprocessing)
    if 2 * known.count(None) < len(known):
        # With a few looked at first, all the pixels may turn out to be there.
        records = scan.scan(listing, preprocessing, None, track, known)
        key, size = scan.pixels_key(records, preprocessing), preprocessing.image_size
        pixels = cache.open_pixels(key, len(listing), size)
        if pixels is not None:
            return records, _in_its_place(pixels, residency)
        known = records
    return _decode_all(listing, preprocessing, residency, track, known)


def _decode_all(
    listing: Source,
    preprocessing: Preprocessing,
    residency: str,
    track: Track,
    known: Sequence[Record | None],
) -> tuple[list[Record], UInt8[np.ndarray, "n height width 3"] | None]:
    """As `_scan`, when the pixels are not in the cache."""
    try:
        # On disk they are wanted; else they are only kept for the next time.
        if residency != "disk" and _decoded_bytes(listing, preprocessing) > cache.free_bytes() / 2:
            raise OSError(errno.ENOSPC, "they would take more than half of what is free")
        with cache.PixelFile(len(listing), preprocessing.image_size) as file:
            records = scan.scan(listing, preprocessing, file, track, known)
            pixels = file.publish(scan.pixels_key(records, preprocessing))
            return records, _in_its_place(pixels, residency)
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


def _in_its_place(mapped: np.ndarray, residency: str) -> np.ndarray:
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
