"""The statistics and the near duplicates of a data set, found in one pass over all images.

Chains of near duplicates form one set. Near duplicates are only reported.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64, UInt8, UInt64
from PIL import Image

from cnn_jax.data import Track, no_track, scan
from cnn_jax.data.dataset import join_log
from cnn_jax.data.decode import Header, Pixels
from cnn_jax.data.duplicates import (
    NEAR_DISTANCE,
    THUMBNAIL_VALUES,
    near_components,
    perceptual_hash,
    thumbnail,
)
from cnn_jax.data.findings import (
    Findings,
    count,
    find,
    split_numbers,
    too_unreadable,
    value_ranges,
)
from cnn_jax.data.join import Joined, make_part
from cnn_jax.data.pipeline import load_image
from cnn_jax.data.preprocessing import MAX_PIXELS, Preprocessing
from cnn_jax.data.scan import Record
from cnn_jax.data.source import Source
from cnn_jax.data.splits import SPLITS, Division
from cnn_jax.system.errors import DataError, printable

# The default value of data.max_unreadable.
_MAX_UNREADABLE = 0.01
_LEVELS = 256


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A set of equal images or near duplicates.

    Attributes:
      images: The positions of the images in the readable source, ascending.
      different_labels: Whether the images have different classes.
      different_splits: Whether the images are in different splits.
    """

    images: list[int]
    different_labels: bool
    different_splits: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """The statistics and findings of a data set.

    Attributes:
      findings: The readable source, its splits, and the warnings about them.
      preprocessing: The `max_pixels` and `white_level` with which the images were read.
      headers: The header of each readable image.
      levels: int64 [3, 256], the number of pixels with each grey level, for R, G and B.
      exact: Sets of equal images. Sets with different labels or splits are first.
      near: Sets of near duplicates that are not all equal, sorted in the same way.
      distance: The largest number of bits in which the hashes of near duplicates differ.
    """

    findings: Findings
    preprocessing: Preprocessing
    headers: list[Header]
    levels: Int64[np.ndarray, "3 256"]
    exact: list[Cluster]
    near: list[Cluster]
    distance: int

    @property
    def source(self) -> Source:
        return self.findings.source

    @property
    def division(self) -> Division:
        return self.findings.division

    @property
    def counts(self) -> Int[np.ndarray, "classes 3"]:
        """The number of images of each class in train, validation and test."""
        return np.stack([self.findings.counts[split] for split in SPLITS], axis=1)

    @property
    def warnings(self) -> list[str]:
        """The warnings about the data; each warning is a sentence with a problem and its remedy."""
        findings = self.findings
        found = findings.warnings() if len(self.source) else findings.reading_warnings()
        unreadable = findings.unreadable
        total = len(self.source) + len(unreadable)
        if reason := too_unreadable(unreadable, total, _MAX_UNREADABLE, findings.values):
            found.insert(0, f"training would refuse this: {reason}")
        divided = [cluster for cluster in self.near if cluster.different_splits]
        if not divided or self.division.group:
            return found
        names = ", ".join(printable(self.source.ids[i]) for i in self.varied(divided[0])[:2])
        return [
            *found,
            f"{count(len(divided), 'set')} of images that look alike lie in different splits, such "
            f"as {names}: if they belong together, data.group can keep them together",
        ]

    @property
    def mean(self) -> list[float] | None:
        """The mean of R, G and B over all pixels, in grey levels; None if there are no images."""
        return _mean(self.levels).tolist() if self.levels.any() else None

    @property
    def std(self) -> list[float] | None:
        """The standard deviation of R, G and B over all pixels; None if there are no images."""
        if not self.levels.any():
            return None
        # The formula E[x^2] - E[x]^2 would lose digits.
        deviation = np.arange(_LEVELS) - _mean(self.levels)[:, np.newaxis]
        return np.sqrt((self.levels * deviation**2).sum(axis=1) / self.levels.sum(axis=1)).tolist()

    @property
    def resolutions(self) -> list[tuple[tuple[int, int], int]]:
        """The number of images by (width, height) in pixels, the most common size first."""
        return _commonest([(header.width, header.height) for header in self.headers])

    @property
    def formats(self) -> list[tuple[str, int]]:
        """The number of images by file format, the most common format first."""
        return _commonest([header.format for header in self.headers])

    @property
    def modes(self) -> list[tuple[str, int]]:
        """The number of images by Pillow's colour mode, the most common mode first."""
        return _commonest([header.mode for header in self.headers])

    @property
    def aspect_ratios(self) -> Float[np.ndarray, " n"]:
        """The aspect ratio, width / height, of each readable image."""
        return np.array([header.width / header.height for header in self.headers])

    @functools.cached_property
    def example_splits(self) -> list[str]:
        """The name of the split of each readable image."""
        numbers = split_numbers(self.findings.splits, len(self.source))
        names = list(self.findings.splits)
        return [names[number] for number in numbers]

    @property
    def too_small(self) -> list[str]:
        """The classes that have too few images to be in every split."""
        sizes = self.counts.sum(axis=1)
        return [self.source.class_names[label] for label in np.flatnonzero(sizes < len(SPLITS))]

    def varied(self, cluster: Cluster) -> list[int]:
        """Returns the images of a cluster, ordered so that every label and split appears early."""
        example_splits = self.example_splits
        seen: Counter[tuple[int, str]] = Counter()
        turns = []
        for i in cluster.images:
            kind = (int(self.source.labels[i]), example_splits[i])
            turns.append((seen[kind], i))
            seen[kind] += 1
        return [i for _, i in sorted(turns)]

    def to_dict(self) -> dict[str, Any]:
        """Returns the survey as a dictionary of JSON types."""
        source, findings = self.source, self.findings
        ratios = self.aspect_ratios
        return {
            "source": source.name,
            "images": len(source),
            "division": self.division.to_dict(),
            "max_pixels": self.preprocessing.max_pixels,
            "white_level": self.preprocessing.white_level,
            "classes": [
                {
                    "name": name,
                    **dict(zip(SPLITS, row.tolist(), strict=True)),
                    "all": int(row.sum()),
                }
                for name, row in zip(source.class_names, self.counts, strict=True)
            ],
            "splits": {name: len(indices) for name, indices in findings.splits.items()},
            "too_small": self.too_small,
            "imbalance": findings.imbalance,
            "mean": self.mean,
            "std": self.std,
            "resolutions": [
                {"width": width, "height": height, "images": number}
                for (width, height), number in self.resolutions
            ],
            "aspect_ratio": _quantiles(ratios),
            "formats": dict(self.formats),
            "modes": dict(self.modes),
            "values": [dataclasses.asdict(one) for one in findings.values],
            "unreadable": [dataclasses.asdict(image) for image in findings.unreadable],
            "rotated": [
                {"id": source.ids[i], "orientation": self.headers[i].orientation}
                for i in findings.rotated
            ],
            "near_distance": self.distance,
            "exact_duplicates": self._described(self.exact),
            "near_duplicates": self._described(self.near),
            "ignored": source.ignored,
            "remarks": source.remarks,
            "warnings": self.warnings,
        }

    def _described(self, clusters: Sequence[Cluster]) -> list[dict[str, Any]]:
        source, example_splits = self.source, self.example_splits
        return [
            {
                "different_labels": cluster.different_labels,
                "different_splits": cluster.different_splits,
                "images": [
                    {
                        "id": source.ids[i],
                        "class": source.class_names[source.labels[i]],
                        "split": example_splits[i],
                    }
                    for i in cluster.images
                ],
            }
            for cluster in clusters
        ]


def survey(
    listing: Source,
    division: Division,
    max_pixels: int = MAX_PIXELS,
    distance: int = NEAR_DISTANCE,
    track: Track = no_track,
    white_level: float = 0.0,
) -> Survey:
    """Reads every image of a source once and collects statistics and findings.

    Args:
      listing: A source from `open_source`; any number of its images may be unreadable.
      division: How to divide the source.
      max_pixels: Images with more pixels are unreadable.
      distance: The largest number of bits in which the hashes of near duplicates differ, at
        most `MAX_DISTANCE`.
      track: Shows progress.
      white_level: See `Preprocessing`.

    Raises:
      ConfigError: The division's group is not a pattern.
      DataError: A path does not match the pattern.
    """
    # Check the pattern for group names before the images are read, because reading may take a long
    # time.
    division.check(listing)
    preprocessing = Preprocessing(max_pixels=max_pixels, white_level=white_level)
    records, hashes, thumbnails, levels = _pass(listing, preprocessing, track)
    values = value_ranges(records, preprocessing)
    source, rows, unreadable = scan.readable(listing, records)
    records = [records[row] for row in rows]
    splits = division.divide(source, [record.pixels for record in records])
    hashes, thumbnails = hashes[rows], thumbnails[rows]
    if listing.log is not None and len(listing.log):
        joined = _join(source, records, listing.log, splits, division, preprocessing, track)
        source, records, splits = joined.source, joined.records, joined.splits
        _, *more, log_levels = _pass(listing.log.select(joined.rows), preprocessing, track)
        hashes, thumbnails = (
            np.concatenate([hashes, more[0]]),
            np.concatenate([thumbnails, more[1]]),
        )
        levels += log_levels
    findings = find(source, records, division, splits, unreadable, values)
    alike = _groups(near_components(hashes, thumbnails, distance))
    return Survey(
        findings=findings,
        preprocessing=preprocessing,
        headers=[record.header for record in records if record.header is not None],
        levels=levels,
        exact=_clusters(findings.copies, source, splits),
        near=_clusters(
            [group for group in alike if len({records[i].pixels for i in group}) > 1],
            source,
            splits,
        ),
        distance=distance,
    )


def _join(
    source: Source,
    records: list[Record],
    log: Source,
    splits: Mapping[str, Int[np.ndarray, " _"]],
    division: Division,
    preprocessing: Preprocessing,
    track: Track,
) -> Joined:
    """Adds the labelled images of request logs, as training at their size would add them.

    The other parameters of the network's preprocessing are not known, and have their defaults.

    Raises:
      DataError: No image of the log can be read.
    """
    logged = scan.scan(log, preprocessing, None, track)
    headers = [record.header for record in logged if record.header]
    if not headers:
        raise DataError(
            f"{log.name}: no logged image can be read; {log.ids[0]} {logged[0].error}; use a "
            "larger --max_pixels, or leave the log out"
        )
    (size, _), *_ = _commonest([(header.height, header.width) for header in headers])
    preprocessing = dataclasses.replace(preprocessing, image_size=size)

    def load(position: int) -> Pixels:
        return load_image(source, position, preprocessing)

    part = make_part(source, records, preprocessing, load, track)
    return join_log(part, log, splits, division, preprocessing, track)[0]


def _pass(
    listing: Source, preprocessing: Preprocessing, track: Track
) -> tuple[
    list[Record],
    UInt64[np.ndarray, " n"],
    UInt8[np.ndarray, "n 192"],
    Int64[np.ndarray, "3 256"],
]:
    """Reads all images once, and computes their records, hashes, thumbnails and histogram.

    Returns:
      The record, the hash and the thumbnail of each example (hash and thumbnail are 0 if it is
      unreadable), and the histogram of grey levels of all images.
    """
    import imagehash  # noqa: F401  Threads must not import it at the same time.

    def work(row: int) -> tuple[Record, int, np.ndarray, np.ndarray] | Record:
        with scan.one_large_file_at_a_time(listing, row):
            return look_at(row)

    def look_at(row: int) -> tuple[Record, int, np.ndarray, np.ndarray] | Record:
        try:
            encoded = scan.read_example(listing, row, preprocessing.max_pixels)
        except DataError as error:
            return Record("", "", None, str(error))
        record, pixels = scan.examine(encoded, preprocessing)
        if pixels is None:
            return record
        # Pillow computes a histogram much faster than NumPy, and releases the global interpreter
        # lock (GIL), so the threads run in parallel.
        levels = np.array(Image.fromarray(pixels).histogram(), np.int64)
        return record, perceptual_hash(pixels), thumbnail(pixels), levels

    rows = range(len(listing))
    records: list[Record] = []
    hashes = np.zeros(len(listing), np.uint64)
    thumbnails = np.zeros((len(listing), THUMBNAIL_VALUES), np.uint8)
    levels = np.zeros(3 * _LEVELS, np.int64)
    results = track(scan.on_all_cores(work, rows), "reading images", len(rows))
    for row, result in enumerate(results):
        if isinstance(result, Record):
            records.append(result)
            continue
        record, hashes[row], thumbnails[row], levels_of_image = result
        records.append(record)
        levels += levels_of_image
    return records, hashes, thumbnails, levels.reshape(3, _LEVELS)


def _groups(parts: Int[np.ndarray, " n"]) -> list[list[int]]:
    """Returns the positions of the images of each set; sets of a single image are left out."""
    order = np.argsort(parts, kind="stable")
    cuts = np.flatnonzero(np.diff(parts[order])) + 1
    return [group.tolist() for group in np.split(order, cuts) if len(group) > 1]


def _clusters(
    groups: Sequence[Sequence[int]],
    source: Source,
    splits: Mapping[str, Int[np.ndarray, " _"]],
) -> list[Cluster]:
    """Creates clusters, with the most serious clusters first.

    Clusters with different labels come first, then clusters with different splits, then large
    clusters.
    """
    example_splits = split_numbers(splits, len(source))
    clusters = [
        Cluster(
            images=list(group),
            different_labels=len({int(source.labels[i]) for i in group}) > 1,
            different_splits=len({int(example_splits[i]) for i in group}) > 1,
        )
        for group in groups
    ]
    return sorted(
        clusters,
        key=lambda cluster: (
            not cluster.different_labels,
            not cluster.different_splits,
            -len(cluster.images),
            source.ids[cluster.images[0]],
        ),
    )


def _mean(levels: Int64[np.ndarray, "3 256"]) -> Float[np.ndarray, "3"]:
    return levels @ np.arange(_LEVELS) / levels.sum(axis=1)


def _commonest(values: Sequence[Any]) -> list[tuple[Any, int]]:
    """Returns the distinct values and their counts, sorted by decreasing count, then by value."""
    return sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))


def _quantiles(values: Float[np.ndarray, " n"]) -> dict[str, float] | None:
    if not len(values):
        return None
    names = ("min", "p05", "median", "p95", "max")
    quantiles = np.quantile(values, (0, 0.05, 0.5, 0.95, 1)).tolist()
    return dict(zip(names, quantiles, strict=True))
