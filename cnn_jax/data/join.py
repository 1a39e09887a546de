"""Adds the labelled images of request logs to the examples of a source.

The examples of the source are divided as they would be without the log. An image of the log goes to
the split of its nearest near duplicate in the source or earlier in the log, and otherwise to a
split that only its content determines. So no example changes its split when the log grows.

If the log is a snapshot with known images, they keep their splits, and only the others are divided.
So no example changes its split when the source changes either.
"""

import contextlib
import dataclasses
import functools
import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from cnn_jax.config.schema import SPLITS
from cnn_jax.data import Track, no_track, scan
from cnn_jax.data.decode import Pixels, pixel_digest
from cnn_jax.data.duplicates import THUMBNAIL_VALUES, Looks, perceptual_hash, thumbnail
from cnn_jax.data.labelled_log import Examples, KnownImage
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.row_cache import RowCache
from cnn_jax.data.scan import Record
from cnn_jax.data.source import Source
from cnn_jax.data.splits import Division

# The part of the cache key that changes when the meaning of a cached row changes.
_VERSION = 1
_DIGEST_BYTES, _HASH_BYTES = 16, 8
_ROW_BYTES = _DIGEST_BYTES + _HASH_BYTES + THUMBNAIL_VALUES

# The kinds of logged images that are left out.
KNOWN_COPY = "copies of images of the data"
NEW_CLASS = "logged images of a class that the data lacks"
OTHER_SIZE = "logged images of another size"


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Readable examples, and what is known of their pixels at the size of the network's input.

    Attributes:
      source: The examples.
      records: The record of each example.
      digests: The digest of each resized image; see `decode.pixel_digest`.
      looks: The hash and the thumbnail of each resized image.
    """

    source: Source
    records: list[Record]
    digests: list[str]
    looks: Looks


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """The examples of a source and of a request log, divided into splits.

    Attributes:
      source: The examples; the examples of the log are last.
      records: The record of each example.
      digests: The digest of each resized image.
      splits: The positions of the examples by split.
      rows: The positions in the log of the examples that come from it.
    """

    source: Source
    records: list[Record]
    digests: list[str]
    splits: dict[str, Int[np.ndarray, " _"]]
    rows: Int[np.ndarray, " m"]


def make_part(
    source: Source,
    records: list[Record],
    preprocessing: Preprocessing,
    load: Callable[[int], Pixels],
    track: Track = no_track,
    *,
    cached: bool = True,
) -> Part:
    """Computes the digest, the hash and the thumbnail of each resized image, or reads the cache.

    Args:
      source: Readable examples.
      records: The record of each example.
      preprocessing: How images are resized.
      load: Returns the resized pixels of the example at a position.
      track: Shows progress.
      cached: Whether to use the cache.

    Raises:
      DataError: An image cannot be read any more.
    """
    import imagehash  # noqa: F401  Threads must not import it at the same time.

    def compute(position: int) -> UInt8[np.ndarray, " bytes"]:
        return _row(load(position))

    table = None
    if cached:
        with contextlib.suppress(OSError):  # The cache cannot be written, or the disk is full.
            table = _cached_rows(
                [record.digest for record in records], preprocessing, compute, track
            )
    if table is None:
        positions = range(len(source))
        rows = track(scan.on_all_cores(compute, positions), "comparing images", len(source))
        table = np.array(list(rows), np.uint8).reshape(len(source), _ROW_BYTES)
    digests, hashes, thumbnails = np.split(table, (_DIGEST_BYTES, _DIGEST_BYTES + _HASH_BYTES), 1)
    hashes = np.ascontiguousarray(hashes).view(np.uint64).ravel()
    looks = Looks(hashes, np.ascontiguousarray(thumbnails))
    return Part(source, records, [row.tobytes().hex() for row in digests], looks)


def _cached_rows(
    digests: Sequence[str],
    preprocessing: Preprocessing,
    compute: Callable[[int], UInt8[np.ndarray, " bytes"]],
    track: Track,
) -> UInt8[np.ndarray, "n bytes"]:
    """Reads the rows of images from the cache; computes missing rows and adds them to the cache."""
    key = hashlib.sha256(f"{_VERSION} {scan.pixels_key(preprocessing)}".encode()).hexdigest()[:32]
    stored = RowCache("looks", key, (_ROW_BYTES,))
    missing = [i for i, digest in enumerate(digests) if digest not in stored.digests]
    if missing:
        found = scan.on_all_cores(compute, missing)
        with stored.writer(len(missing)) as writer:
            rows = track(found, "comparing images", len(missing))
            for position, row in zip(missing, rows, strict=True):
                writer.write(digests[position], row)
                writer.store_if_full()
    return np.asarray(stored.rows(digests, compute))


def _row(pixels: Pixels) -> UInt8[np.ndarray, " bytes"]:
    """Returns the digest, the hash and the thumbnail of an image as one row of bytes."""
    digest = np.frombuffer(bytes.fromhex(pixel_digest(pixels)), np.uint8)
    hash_bytes = np.array([perceptual_hash(pixels)], np.uint64).view(np.uint8)
    return np.concatenate([digest, hash_bytes, thumbnail(pixels)])


def divide_log(
    digests: Sequence[str],
    looks: Looks,
    base_splits: Int[np.ndarray, " base"],
    division: Division,
    known_splits: Mapping[str, str],
) -> Int[np.ndarray, " n"]:
    """Assigns logged images to splits.

    The split of an image is a function of the source and of the images that stand before it, so
    images that are appended later have no influence. An image follows only its nearest near
    duplicate: images of a fixed camera are near duplicates of images in all splits, and are thus
    divided in about the same fractions as these.

    Args:
      digests: The digest of each logged image.
      looks: The hashes and the thumbnails: first of the images of the source, then of the logged
        images.
      base_splits: The position in `SPLITS` of each image of the source.
      division: The fractions and the seed of the splits.
      known_splits: The splits of known images by digest.

    Returns:
      The position in `SPLITS` of each image of the source and of the log.
    """
    splits = np.concatenate([base_splits, division.assign(digests)])
    for position, known in enumerate(_positions(digests, known_splits), len(base_splits)):
        if known >= 0:
            splits[position] = known
        elif (nearest := looks.nearest_before(position)) is not None:
            splits[position] = splits[nearest]
    return splits


def _positions(digests: Sequence[str], splits: Mapping[str, str]) -> Int[np.ndarray, " n"]:
    """Returns the position in `SPLITS` of each known image, and -1 for the others."""
    positions = {name: position for position, name in enumerate(SPLITS)}
    return np.array([positions.get(splits.get(digest, ""), -1) for digest in digests], int)


def count_usable(
    examples: Examples,
    class_names: Collection[str],
    image_size: tuple[int, int],
    known: Mapping[str, KnownImage],
) -> tuple[int, int, Counter[str]]:
    """Counts the logged images that a training would use, without opening the source.

    Args:
      examples: The labelled images of request logs.
      class_names: The classes of the source.
      image_size: The height and the width of the network's input.
      known: The images of earlier trainings. If it lacks images of the source, their copies in the
        log are counted as usable.

    Returns:
      The number of usable images; how many of them are not in `known`, or have another label there;
      and the numbers of the other images, by kind.
    """
    left_out: Counter[str] = Counter()
    new = 0
    for label, digest, image in zip(
        examples.labels, examples.digests, examples.images, strict=True
    ):
        earlier = known.get(digest)
        if _png_size(image) != image_size:
            left_out[OTHER_SIZE] += 1
        elif earlier and not earlier.is_logged:
            left_out[KNOWN_COPY] += 1
        elif label not in class_names:
            left_out[NEW_CLASS] += 1
        else:
            new += earlier is None or earlier.label != label
    return len(examples) - left_out.total(), new, left_out


def _png_size(image: bytes) -> tuple[int, int]:
    """Returns the height and the width of a PNG, which its first chunk has."""
    width, height = struct.unpack(">II", image[16:24])
    return height, width


def join(
    base: Part, log: Part, splits: Mapping[str, Int[np.ndarray, " _"]], division: Division
) -> Joined:
    """Adds the examples of a request log to the examples of a source.

    Left out, and counted, are copies of images of the source, and images of a class that the source
    does not have.

    Args:
      base: The examples of the source.
      log: The examples of the log.
      splits: The positions of the examples of the source, by split.
      division: How the source was divided.
    """
    source = base.source
    known = dict(zip(reversed(base.digests), reversed(range(len(source))), strict=True))
    copies = {row: known[digest] for row, digest in enumerate(log.digests) if digest in known}
    new = np.array([row for row in range(len(log.source)) if row not in copies], int)
    base_splits = np.empty(len(source), int)
    for position, name in enumerate(SPLITS):
        base_splits[splits[name]] = position
    known_splits = log.source.known_splits
    if known_splits:
        known_positions = _positions(base.digests, known_splits)
        base_splits = division.keep(source, base.digests, base_splits, known_positions)
    looks = Looks(
        np.concatenate([base.looks.hashes, log.looks.hashes[new]]),
        np.concatenate([base.looks.thumbnails, log.looks.thumbnails[new]]),
    )
    new_digests = [log.digests[row] for row in new]
    example_splits = divide_log(new_digests, looks, base_splits, division, known_splits)
    # Images of an unknown class also decide the splits of their near duplicates, so that a class
    # that is added later moves no image.
    positions = {name: position for position, name in enumerate(source.class_names)}
    names = log.source.class_names
    labels = np.array([positions.get(names[i], -1) if i >= 0 else -1 for i in log.source.labels])
    is_known = np.array([labels[row] >= 0 for row in new], bool)
    example_splits = np.concatenate(
        [example_splits[: len(source)], example_splits[len(source) :][is_known]]
    )
    rows = new[is_known]
    ignored = Counter(source.ignored) + Counter(log.source.ignored)
    ignored[KNOWN_COPY] += len(copies)
    ignored[NEW_CLASS] += int((~is_known).sum())
    remarks = [*source.remarks, *log.source.remarks]
    wrong = [row for row, position in copies.items() if labels[row] != source.labels[position]]
    if wrong:
        remarks.append(
            f"{len(wrong):,} logged images are copies of images of the data with another label, "
            f"such as {log.source.ids[wrong[0]]} of {source.ids[copies[wrong[0]]]}: the class in "
            "the data is used; correct it if it is wrong"
        )
    return Joined(
        source=_join_sources(
            dataclasses.replace(source, ignored=dict(+ignored), remarks=remarks),
            log.source.select(rows),
            labels[rows].astype(np.int32),
        ),
        records=base.records + [log.records[row] for row in rows],
        digests=base.digests + [log.digests[row] for row in rows],
        splits={name: np.flatnonzero(example_splits == i) for i, name in enumerate(SPLITS)},
        rows=rows,
    )


def _join_sources(base: Source, log: Source, labels: Int[np.ndarray, " m"]) -> Source:
    """Returns the examples of both sources as one source."""
    return dataclasses.replace(
        base,
        name=base.name + log.name,
        ids=base.ids + log.ids,
        labels=np.concatenate([base.labels, labels]),
        read=functools.partial(_read, (base.read, log.read)),
        keys=[*((0, key) for key in base.keys), *((1, key) for key in log.keys)],
        sizes=base.sizes + log.sizes,
        versions=base.versions + log.versions,
        own_splits=base.own_splits + log.own_splits,
        log=None,
        logged=np.repeat([False, True], [len(base), len(log)]),
    )


def _read(readers: Sequence[Callable[[Any], bytes]], key: tuple[int, Any]) -> bytes:
    """Reads an image from one of several sources; the key is the source and the source's key."""
    number, own_key = key
    return readers[number](own_key)
