"""Findings about a data set: its properties, and problems that affect training or metrics."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from cnn_jax.data.decode import (
    DARK,
    OVERSHOOT,
    format_number,
    likely_white,
    span,
    unknown_white,
)
from cnn_jax.data.files import count_ignored
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.scan import Record, Unreadable
from cnn_jax.data.source import Source
from cnn_jax.data.sources import listed_folder
from cnn_jax.data.splits import SPLITS, Division
from cnn_jax.system.errors import printable

# Class balancing may be recommended if the largest class is at least this many times as large as
# the smallest class.
_IMBALANCE = 10
# Balancing does not help a class with fewer images than this number, because so few images have too
# little variety.
_TOO_FEW = 20
_MAX_NAMED = 3
# A class with too few images in a split is reported only if the intended number is at least this
# value, because smaller numbers vary much by chance.
_SHARE_TO_SPEAK_OF = 3
# A warning is given if at least this fraction of the images is dark (see `decode.DARK`).
_MIN_DARK_FRACTION = 0.9


@dataclasses.dataclass(frozen=True)
class ValueRange:
    """The range of the values in all images that have the same value type, such as "12-bit".

    Attributes:
      kind: The type, such as "8-bit", "16-bit" or "float"; see `decode.Values`.
      images: The number of images with this type.
      low: The smallest value in all images.
      high: The largest value in all images.
      white: The value that is read as white; 0 if it is unknown, and the images cannot be
        read.
      dark: The number of images whose values are at most a quarter of white.
      dark_high: The largest value of the dark images.
      clipped: The number of images with values clearly above white.
      white_level: A `data.white_level` that suits the images better; None if the present
        value is suitable, or if the images do not depend on it.
    """

    kind: str
    images: int
    low: float
    high: float
    white: float
    dark: int
    dark_high: float
    clipped: int
    white_level: float | None

    @property
    def is_dark(self) -> bool:
        """Whether nearly all images use only a small part of the range from black to white."""
        return self.dark >= _MIN_DARK_FRACTION * self.images

    def describe(self) -> str:
        """Describes the range, for example as "12-bit: 40 images from 0 to 4000, white is 4095"."""
        white = f"white is {format_number(self.white)}" if self.white else "white is unknown"
        better = self.white_level
        advice = f"; data.white_level={format_number(better)} would suit them" if better else ""
        return f"{self.kind}: {count(self.images, 'image')} {span(self)}, {white}{advice}"

    def warning(self) -> str | None:
        """Returns a warning that states a problem and its remedy; None if there is no problem."""
        images = count(self.images, f"{self.kind} image")
        white = format_number(self.white)
        if not self.white:
            return f"{images} {'has' if self.images == 1 else 'have'} {unknown_white(self)}"
        better = format_number(self.white_level or 0)
        if self.clipped:
            return (
                f"{self.clipped:,} of {images} have values above {white}, up to "
                f"{format_number(self.high)}, which all become white: "
                f"--config.data.white_level={better} keeps them apart"
            )
        if not self.is_dark:
            return None
        used = (
            f"{self.dark:,} of {images} have no value above {format_number(self.dark_high)} where "
            f"{white} is white, so that the network sees them almost black"
        )
        if self.white_level:
            return f"{used}: --config.data.white_level={better} makes {better} white"
        halves = ",".join([format_number(max(self.dark_high, 1) / 2)] * 3)
        return f"{used}: --config.data.mean={halves} --config.data.std={halves} spreads them"


def value_ranges(
    records: Sequence[Record], preprocessing: Preprocessing | None = None
) -> list[ValueRange]:
    """Returns the value range of each value type, such as "12-bit"; the most common type first.

    Args:
      records: The records of all images, including the unreadable ones.
      preprocessing: The white level and the normalization; by default those of
        `Preprocessing()`.
    """
    preprocessing = preprocessing or Preprocessing()
    values_by_type = defaultdict(list)
    for record in records:
        if record.values is not None:
            values_by_type[record.values.kind, record.values.white].append(record.values)
    ranges = []
    for (kind, own_white), values in values_by_type.items():
        highs = np.array([one.high for one in values], np.float64)
        is_plain = kind == "8-bit"
        white = own_white if is_plain else preprocessing.white_level or own_white
        # `bright` is the grey level that normalization maps to 1; the largest level of the three
        # channels is used. For example, `bright` is 128 if the mean and the standard deviation are
        # 64.
        bright = min(max(map(sum, zip(preprocessing.mean, preprocessing.std, strict=True))), 255)
        is_dark = highs <= DARK * (bright if is_plain else white)
        found = ValueRange(
            kind=kind,
            images=len(values),
            low=min(one.low for one in values),
            high=float(highs.max()),
            white=white,
            dark=int(is_dark.sum()),
            dark_high=float(highs[is_dark].max(initial=0)),
            clipped=0 if is_plain or not white else int((highs > OVERSHOOT * white).sum()),
            white_level=None,
        )
        if not white or found.clipped:
            found = dataclasses.replace(found, white_level=likely_white(found.high))
        elif not is_plain and found.is_dark and found.dark_high > 0:
            better = likely_white(found.dark_high)
            better = better if better < white else found.dark_high
            found = dataclasses.replace(found, white_level=better)
        ranges.append(found)
    return sorted(ranges, key=lambda found: (-found.images, found.kind))


def range_warnings(ranges: Sequence[ValueRange]) -> list[str]:
    """Returns the warnings about ranges of pixel values, and about conflicting white levels."""
    found = [warning for one in ranges if (warning := one.warning())]
    return found + _conflicts(ranges)


def _conflicts(ranges: Sequence[ValueRange]) -> list[str]:
    """Returns one warning if image types need different white levels; else an empty list."""
    wanted = {one.kind: one.white_level or one.white for one in ranges if one.kind != "8-bit"}
    if not any(one.white_level for one in ranges) or len(set(wanted.values())) < 2:
        return []
    named = " and ".join(
        f"{format_number(white)} for the {kind} images" for kind, white in wanted.items()
    )
    return [
        f"one data.white_level cannot suit all images ({named}): convert the images of all kinds "
        "except one, for example to 8 bits"
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """The findings about a data set that was scanned and divided into splits.

    Attributes:
      source: The readable examples.
      division: The division of the examples into splits.
      splits: The positions of the examples by split.
      unreadable: The examples that are left out.
      rotated: The positions of images that EXIF rotates.
      copies: The sets of equal images; each is a list of positions.
      values: The ranges of the values in the files, by type.
    """

    source: Source
    division: Division
    splits: Mapping[str, Int[np.ndarray, " _"]]
    unreadable: list[Unreadable]
    rotated: list[int]
    copies: list[list[int]]
    values: list[ValueRange]

    @property
    def counts(self) -> dict[str, Int[np.ndarray, " classes"]]:
        """The number of images of each class, by split."""
        size = len(self.source.class_names)
        return {
            name: np.bincount(self.source.labels[indices], minlength=size)
            for name, indices in self.splits.items()
        }

    @property
    def conflicts(self) -> list[list[int]]:
        """The sets of equal images that have different labels."""
        labels = self.source.labels
        return [group for group in self.copies if len({int(labels[i]) for i in group}) > 1]

    @property
    def leaks(self) -> list[list[int]]:
        """The sets of equal images that belong to more than one split."""
        example_splits = split_numbers(self.splits, len(self.source))
        return [group for group in self.copies if len({int(example_splits[i]) for i in group}) > 1]

    @property
    def imbalance(self) -> float:
        """The size of the largest class divided by the size of the smallest class."""
        sizes = np.bincount(self.source.labels, minlength=len(self.source.class_names))
        return float(sizes.max() / max(sizes.min(), 1))

    def summary(self) -> list[str]:
        """Returns a summary of the data set as two lines of text."""
        bad = len(self.unreadable)
        unreadable, rotated = "all images are readable", "none is rotated by EXIF"
        if bad:
            unreadable = f"{count(bad, 'unreadable image')} {_is_or_are(bad)} left out"
            rotated = "no image is rotated by EXIF"
        if turned := len(self.rotated):
            rotated = f"{count(turned, 'image')} {_is_or_are(turned)} rotated by EXIF"
        extra = sum(len(group) - 1 for group in self.copies)
        copies = f"{count(extra, 'exact copy', 'exact copies')}" if extra else "no exact copies"
        if self.conflicts:
            copies += f" ({count(len(self.conflicts), 'set')} with different labels)"
        ignored = count_ignored(self.source.ignored)
        return [
            f"{unreadable}; {rotated}; {copies}",
            f"the largest class is {self.imbalance:.1f} times the smallest; "
            + (f"ignored: {ignored}" if ignored else "nothing is ignored"),
        ]

    def warnings(self) -> list[str]:
        """Returns a warning for each problem that may affect training or metrics.

        Each warning is a sentence with the problem and its remedy.
        """
        found = [printable(remark) for remark in self.source.remarks]
        if reason := self.untrainable():
            found.append(f"training would refuse this: {reason}")
        found += self.reading_warnings()
        if self.conflicts:
            found.append(
                f"{count(len(self.conflicts), 'set')} of equal images with different labels, such "
                f"as {self._names(self.conflicts[0])}: correct or remove them"
            )
        if ties := self._ties():
            found.append(f"{ties}: remove the copies, or let these groups be one")
        if self.leaks:
            found.append(
                f"{count(len(self.leaks), 'set')} of equal images in different splits, such as "
                f"{self._names(self.leaks[0])}, so the metrics are too good: remove the copies "
                "from one split, or divide the data again with data.keep_splits=False"
            )
        if torn := self._torn_groups():
            found.append(
                f"{count(len(torn), 'group')} in several of the data's own splits, such as "
                f"{printable(torn[0])}, so the metrics are too good: data.keep_splits=False "
                "divides the data again"
            )
        sizes = sum(self.counts.values())
        small = [self._class(label) for label in np.flatnonzero(np.asarray(sizes) < len(SPLITS))]
        if small:
            found.append(
                f"fewer than three images of {_some(small)}: not every split can have one; add "
                "images or remove the class"
            )
        for split, counts in self.counts.items():
            absent = [
                self._class(label)
                for label in np.flatnonzero((counts == 0) & (np.asarray(sizes) >= len(SPLITS)))
            ]
            if absent:
                found.append(
                    f"no images of {_some(absent)} in {split}: "
                    + ("they cannot be learned" if split == "train" else "they count 0 there")
                    + "; add some, from other groups if data.group is set"
                )
        if uneven := self._uneven():
            found.append(
                f"by chance a split has less than half of its fraction of {_some(uneven)}: "
                "data.stratify=exact divides evenly"
            )
        if self.imbalance >= _IMBALANCE:
            found.append(
                f"the largest class has {self.imbalance:.0f} times the images of the smallest: "
                f"{self._imbalance_advice()}"
            )
        return found

    def _imbalance_advice(self) -> str:
        """Returns advice for a data set whose classes have very different sizes."""
        sizes = np.bincount(self.source.labels, minlength=len(self.source.class_names))
        smallest = sizes.argmin()
        if sizes[smallest] >= _TOO_FEW:
            return "train.balance=sampling or train.balance=loss gives all classes equal weight"
        return (
            f"{self._class(smallest)} has {count(int(sizes[smallest]), 'image')}, too few to learn "
            "from: add images or remove the class"
        )

    def reading_warnings(self) -> list[str]:
        """Returns the warnings about unreadable files and about unsuitable image values."""
        found = []
        if self.unreadable:
            found.append(
                f"{count(len(self.unreadable), 'image')} cannot be read and "
                f"{_is_or_are(len(self.unreadable))} left out: "
                + _some([f"{printable(u.id)} {u.reason}" for u in self.unreadable])
                + "; mend or remove them"
            )
        if formats := Counter(u.other_format for u in self.unreadable if u.other_format):
            named = ", ".join(f"{number:,} {name}" for name, number in formats.most_common())
            found.append(
                f"{count(formats.total(), 'image')} of formats that are not read have the names "
                f"of others ({named}): convert them to JPEG or PNG"
            )
        return found + range_warnings(self.values)

    def untrainable(self) -> str | None:
        """Returns the reason why the data is too small for training; None if it is large enough."""
        source = self.source
        if reason := too_few_classes(source):
            return reason
        for name, indices in self.splits.items():
            if not len(indices):
                ties = self._ties()
                return (
                    f"no image is left for {name}; each class needs three images (or groups) or "
                    f"more, and there are {len(source)} images of {len(source.class_names)} classes"
                    + (f"; {ties}" if ties else "")
                )
        return None

    def _ties(self) -> str:
        """Describes equal images that are in different groups; returns "" if there are none.

        Groups that share equal images must be in the same split.
        """
        groups = self.division.groups(self.source)
        if groups is None:
            return ""
        tying = [copies for copies in self.copies if len({groups[i] for i in copies}) > 1]
        if not tying:
            return ""
        tied = {groups[i] for copies in tying for i in copies}
        return (
            f"{count(len(tying), 'set')} of equal images, such as {self._names(tying[0])}, "
            f"{'ties' if len(tying) == 1 else 'tie'} {len(tied):,} groups together, which then "
            "lie in the same split"
        )

    def _torn_groups(self) -> list[str]:
        """Returns the groups that have images in several splits."""
        groups = self.division.groups(self.source) or []
        example_splits = split_numbers(self.splits, len(self.source)).tolist()
        group_splits: dict[str, set[int]] = defaultdict(set)
        for group, split in zip(groups, example_splits, strict=False):
            group_splits[group].add(split)
        return [group for group, splits in group_splits.items() if len(splits) > 1]

    def _uneven(self) -> list[str]:
        """Returns the classes that have fewer than half of the intended images in a split.

        Only the random variation of the rule "stable" is considered. With another rule, with groups
        or with the data's own splits, the result is empty.
        """
        if self.division.rule != "stable" or self.division.group or any(self.source.own_splits):
            return []
        counts = np.stack([self.counts[split] for split in SPLITS], axis=1)
        shares = counts.sum(axis=1, keepdims=True) * np.array(self.division.fractions)
        is_uneven = ((counts < shares / 2) & (shares >= _SHARE_TO_SPEAK_OF)).any(axis=1)
        return [self._class(label) for label in np.flatnonzero(is_uneven)]

    def _class(self, label: np.intp) -> str:
        return printable(self.source.class_names[label])

    def _names(self, group: Sequence[int]) -> str:
        """Formats the ids of a few examples as text; prefers examples of different classes."""
        labels = self.source.labels
        first_images = {int(labels[i]): i for i in reversed(group)}.values()
        order = [*sorted(first_images), *(i for i in group if i not in first_images)]
        return _some([printable(self.source.ids[i]) for i in order])


def find(
    source: Source,
    records: Sequence[Record],
    division: Division,
    splits: Mapping[str, Int[np.ndarray, " _"]],
    unreadable: list[Unreadable],
    values: list[ValueRange],
) -> Findings:
    """Collects the findings about a source of readable examples.

    Args:
      source: The readable examples.
      records: The record of each example.
      division: How the examples were divided.
      splits: The positions of the examples by split.
      unreadable: The examples that are left out.
      values: The ranges of the values in all files, also in unreadable ones.
    """
    equal: dict[str, list[int]] = defaultdict(list)
    rotated = []
    for position, record in enumerate(records):
        equal[record.pixels].append(position)
        if record.header is not None and record.header.orientation != 1:
            rotated.append(position)
    copies = [group for group in equal.values() if len(group) > 1]
    return Findings(source, division, splits, unreadable, rotated, copies, values)


def too_few_classes(source: Source) -> str | None:
    """Returns an error message if a source has fewer than two classes; else None."""
    if len(source.class_names) >= 2:
        return None
    (name,) = source.class_names
    hint = "is each class a sub-folder of this folder?"
    root = listed_folder(source.name)
    below = sorted({path.split("/")[1] for path in source.ids if path.count("/") > 1})
    if root is not None and not source.split_folders and len(below) > 1:
        hint = f"the source folder:{root / name} takes its sub-folders for classes, {_some(below)}"
    return printable(f"there is one class, {name}, and training needs two or more: {hint}")


def too_unreadable(
    unreadable: Sequence[Unreadable],
    total: int,
    max_unreadable: float,
    values: Sequence[ValueRange] = (),
) -> str | None:
    """Returns an error message if more images are unreadable than training allows; else None."""
    if max_unreadable * total >= len(unreadable) < total:
        return None
    refused = [one for one in values if not one.white]
    if len(unreadable) == sum(one.images for one in refused):
        # If the white level is unknown for all unreadable images, advice on the white level is more
        # useful than the errors of the first few images.
        return "; ".join([one.warning() or "" for one in refused] + _conflicts(values))
    shown = "; ".join(f"{printable(u.id)} {u.reason}" for u in unreadable[:_MAX_NAMED])
    return (
        f"{len(unreadable):,} of {total:,} images cannot be read, more than data.max_unreadable = "
        f"{max_unreadable:g} allows: {shown}{'; ...' if len(unreadable) > _MAX_NAMED else ''}"
    )


def split_numbers(
    splits: Mapping[str, Int[np.ndarray, " _"]], size: int
) -> Int[np.ndarray, " size"]:
    """Returns the index in `splits` of each example's split."""
    numbers = np.full(size, -1)
    for number, indices in enumerate(splits.values()):
        numbers[indices] = number
    return numbers


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Returns a number with its noun, such as "1 image" or "2,000 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _is_or_are(number: int) -> str:
    return "is" if number == 1 else "are"


def _some(names: Sequence[str]) -> str:
    """Joins the first few names to text, and adds the number of the remaining names."""
    rest = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")
