"""The division of a data set into training, validation and test splits."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cnn_jax.config.schema import SPLITS
from cnn_jax.data.source import Source
from cnn_jax.system.errors import ConfigError, DataError

_PLACEHOLDER = re.compile(r"\{\w+\}|\*")


@dataclasses.dataclass(frozen=True)
class Division:
    """The parameters that determine how a data set is divided into splits.

    Attributes:
      fractions: The fractions of train, validation and test; their sum is 1.
      seed: The seed of the division.
      rule: One of `schema.SPLIT_RULES`; see `divide`.
      group: A pattern for the source's paths, see `group_names`; "" for no groups.
      keep_splits: Whether the data set's own splits are kept.
      folds: The number of folds (parts) of a cross-validation; 0 for no cross-validation.
      fold: The fold that is the test split, from 0; the next fold is the validation split.
    """

    fractions: tuple[float, float, float] = (0.7, 0.2, 0.1)
    seed: int = 0
    rule: str = "stable"
    group: str = ""
    keep_splits: bool = True
    folds: int = 0
    fold: int = 0

    @classmethod
    def from_config(cls, data: Any, seed: int) -> "Division":
        """Creates a `Division` from the section `data` of a configuration and a run's seed."""
        folds = data.folds
        return cls(
            # The fractions of a cross-validation are for descriptions and warnings.
            fractions=((folds - 2) / folds, 1 / folds, 1 / folds) if folds else tuple(data.split),
            seed=seed if data.split_seed < 0 else data.split_seed,
            rule=data.stratify,
            group=data.group,
            keep_splits=data.keep_splits,
            folds=folds,
            fold=data.fold,
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Division":
        """Creates a `Division` from a dictionary of its fields, such as a JSON object."""
        return cls(**{**fields, "fractions": tuple(fields["fractions"])})

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON types.

        The fields of a cross-validation are omitted if there is none, because earlier versions of
        this package do not know these fields.
        """
        fields = dataclasses.asdict(self) | {"fractions": list(self.fractions)}
        if not self.folds:
            del fields["folds"], fields["fold"]
        return fields

    def check(self, source: Source) -> None:
        """Raises DataError if the source cannot be divided in this way.

        A path does not match the pattern `group`, or a cross-validation would divide data that
        already has splits.
        """
        self.groups(source)
        if self.folds and self.keep_splits and any(source.own_splits):
            raise DataError(
                f"data.folds: {source.name} has splits of its own, which a cross-validation cannot "
                "keep; set data.keep_splits=False to divide all its images"
            )

    def groups(self, source: Source) -> list[str] | None:
        """Returns the name of each example's group; None if the examples have no groups.

        Raises:
          DataError: A path does not match the pattern.
        """
        if not self.group:
            return None
        if source.logged is None:
            return group_names(source.paths, self.group, source.name)
        # The pattern describes the paths of files; each image of a request log is a group.
        files = np.flatnonzero(~source.logged)
        groups = np.array(source.ids, object)
        groups[files] = group_names([source.paths[i] for i in files], self.group, source.name)
        return groups.tolist()

    def divide(self, source: Source, contents: list[str]) -> dict[str, Int[np.ndarray, " _"]]:
        """Divides the examples of a source into splits, class by class; see the function `divide`.

        A cross-validation divides the units of `divide` into folds, by the same rules.

        Args:
          source: The examples.
          contents: A text for each example that is the same for equal images.

        Returns:
          For each name in `SPLITS`, the positions of its examples, ascending.

        Raises:
          DataError: A path does not match the pattern of groups.
        """
        groups = self.groups(source)
        if self.folds:
            # The folds of a class have equal sizes only if the rule is "exact". A class that has at
            # least as many units as there are folds has a unit in each fold.
            units = _units(len(source), groups, contents)
            numbers = _numbers(units, groups or source.ids, self.seed)
            shares = np.full(self.folds, 1 / self.folds)
            folds = _assign(units, numbers, source.labels, shares, self.rule)
            # The distance of each example's fold from the fold of the test split.
            distances = (folds - self.fold) % self.folds
            example_splits = self._splits_by_distance[distances]
            return {name: np.flatnonzero(example_splits == i) for i, name in enumerate(SPLITS)}
        return divide(
            source.ids,
            source.labels,
            self.fractions,
            self.seed,
            rule=self.rule,
            groups=groups,
            contents=contents,
            own_splits=source.own_splits if self.keep_splits else None,
        )

    def keep(
        self,
        source: Source,
        contents: list[str],
        splits: Int[np.ndarray, " n"],
        known: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " n"]:
        """Returns the splits of a source whose examples with a known split keep it.

        The other examples of the same group follow the known ones, so that no group is divided
        after its folder was renamed. Equal images get the same split.

        Args:
          source: The examples.
          contents: A text for each example that is the same for equal images.
          splits: The position in `SPLITS` of each example, from `divide`.
          known: The known position in `SPLITS` of each example; -1 if there is none.
        """
        units = _units(len(source), self.groups(source), contents)
        known_units = np.full(len(source), -1)
        np.maximum.at(known_units, units, known)
        # Images that are equal only at the size of the network's input may have several splits. An
        # image of the training split must not be in another split too.
        new_units = np.full(len(source), len(SPLITS))
        np.minimum.at(new_units, units, splits)
        followed = np.where(known_units < 0, new_units, known_units)[units]
        return np.where(known < 0, followed, known)

    @property
    def _splits_by_distance(self) -> Int[np.ndarray, " folds"]:
        """The split of each fold, by the distance of the fold from the fold of the test split."""
        return np.array([2, 1, *[0] * (self.folds - 2)])

    def assign(self, contents: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Returns the position in `SPLITS` of each image, as a function of its content only.

        No class and no other image has an influence, so an image never changes its split.

        Args:
          contents: A text for each image that is the same for equal images.
        """
        numbers = np.array([_number(content, self.seed) for content in contents])
        if self.folds:
            distances = (np.floor(numbers * self.folds).astype(int) - self.fold) % self.folds
            return self._splits_by_distance[distances]
        return np.searchsorted(np.cumsum(self.fractions)[:-1], numbers, side="right")


def divide(
    ids: list[str],
    labels: Int[np.ndarray, " n"],
    fractions: Sequence[float],
    seed: int,
    *,
    rule: str = "stable",
    groups: list[str] | None = None,
    contents: list[str] | None = None,
    own_splits: Sequence[str] | None = None,
) -> dict[str, Int[np.ndarray, " _"]]:
    """Divides examples into train, validation and test, class by class.

    A unit is an example, or all examples of a group, or all equal images. A unit is never
    divided. Each unit has a number in [0, 1): a hash of the seed and of the unit's name (its
    id, its group, or the shortest id of equal images).

    - "stable": the unit's number decides, so a unit keeps its split when other examples are
      added or removed. The fractions vary by chance.
    - "exact": the units of each class are sorted by their numbers and cut at the fractions,
      to within one unit. When examples are added, some units next to a cut change their split.

    With both rules a class of three units or more has a unit in each split. If the numbers
    leave a split empty, the stable rule moves the nearest unit into it; that unit moves back
    when another unit of that split is added. A unit also moves when it gets a group or an
    equal image with a shorter name.

    Args:
      ids: A unique id of each example.
      labels: The class of each example. The class of a unit is its most common class.
      fractions: The fraction of each split; their sum is 1.
      seed: The seed of the division.
      rule: One of `schema.SPLIT_RULES`.
      groups: The group of each example.
      contents: A text for each example that is the same for equal images.
      own_splits: The split that the data set assigns to each example, or "". The other
        examples of the same unit go to the same split. If the data set has a validation or
        test split, no other examples are added to it. A split that the data set lacks is cut
        from the examples without a split, or else from its training part, in the proportions
        of `fractions`.

    Returns:
      For each name in `SPLITS`, the positions of its examples, ascending.
    """
    own = np.array(own_splits if own_splits is not None else [""] * len(ids))
    given = [name for name in SPLITS if (own == name).any()]
    example_splits = np.full(len(ids), -1)
    for position, name in enumerate(SPLITS):
        example_splits[own == name] = position
    shares = np.array(fractions, np.float64)
    free = own == ""
    if given and not free.any() and len(given) < len(SPLITS):
        # A split that the data set lacks is taken from the data set's training split.
        free = own == "train"
    # No examples are added to the data set's own validation and test splits.
    shares[[name in given and name != "train" for name in SPLITS]] = 0
    units = _units(len(ids), groups, contents)
    # A unit is, for example, a group or a set of equal images. If one example of a unit already has
    # a split, the whole unit goes to this split.
    unit_splits = np.full(len(ids), -1)
    np.maximum.at(unit_splits, units[~free], example_splits[~free])
    is_bound = unit_splits[units] >= 0
    example_splits = np.where(is_bound & (own == ""), unit_splits[units], example_splits)
    rest = np.flatnonzero(free & ~is_bound)
    if len(rest):
        names = ids if groups is None else groups
        _, own_units = np.unique(units[rest], return_inverse=True)
        numbers = _numbers(own_units, [names[i] for i in rest], seed)
        example_splits[rest] = _assign(
            own_units, numbers, labels[rest], shares / shares.sum(), rule
        )
    return {
        name: np.flatnonzero(example_splits == position) for position, name in enumerate(SPLITS)
    }


def _units(
    size: int, groups: list[str] | None, contents: list[str] | None
) -> Int[np.ndarray, " size"]:
    """Returns the index of each example's unit; all examples of a unit stay in one split."""
    units = np.arange(size)
    for keys in (groups, contents):
        if keys is not None:
            key_numbers: dict[str, int] = {}
            key = np.array([key_numbers.setdefault(key, len(key_numbers)) for key in keys], int)
            # In this graph, an edge connects the unit of each example to the example's group or
            # content. The connected components are the new units.
            edges = (np.ones(size), (units, key + size))
            shape = (size + len(key_numbers),) * 2
            _, part = connected_components(coo_array(edges, shape=shape), directed=False)
            units = np.unique(part[units], return_inverse=True)[1]
    return units


def _numbers(
    units: Int[np.ndarray, " m"], names: list[str], seed: int
) -> Float[np.ndarray, " units"]:
    """Returns a number in [0, 1) for each unit: a hash of the shortest name in the unit.

    The copy of an image usually has a longer name than its original, so adding the copy does not
    change the number.
    """
    identity: dict[int, tuple[int, str]] = {}
    for unit, name in zip(units.tolist(), names, strict=True):
        identity[unit] = min(identity.get(unit, (len(name), name)), (len(name), name))
    return np.array([_number(identity[unit][1], seed) for unit in range(len(identity))])


def _number(identity: str, seed: int) -> float:
    """Returns a hash of a name and a seed as a number in [0, 1)."""
    text = f"{seed}:{identity}".encode("utf-8", "surrogatepass")
    return (int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 11) / 2**53


def _assign(
    units: Int[np.ndarray, " m"],
    numbers: Float[np.ndarray, " units"],
    labels: Int[np.ndarray, " m"],
    shares: Float[np.ndarray, " parts"],
    rule: str,
) -> Int[np.ndarray, " m"]:
    """Assigns each example to a part, such as a split, and returns the position of the part."""
    unit_splits = np.zeros(len(numbers), np.int64)
    class_of_unit = _commonest_label(units, labels)
    sizes = np.bincount(units, minlength=len(numbers))
    # Only parts with a fraction above 0 get examples.
    wanted = np.flatnonzero(shares > 0)
    cuts = np.cumsum(shares[wanted])[:-1]
    for label in np.unique(class_of_unit):
        members = np.flatnonzero(class_of_unit == label)
        members = members[np.argsort(numbers[members], kind="stable")]
        if rule == "stable":
            bounds = np.searchsorted(numbers[members], cuts)
        else:
            bounds = _exact_bounds(sizes[members], cuts)
        if len(members) >= len(wanted):
            bounds = _none_empty(bounds, len(members))
        for position, part in zip(wanted, np.split(members, bounds), strict=True):
            unit_splits[part] = position
    return unit_splits[units]


def _commonest_label(
    units: Int[np.ndarray, " m"], labels: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " units"]:
    """Returns the most common label of each unit; in case of a tie, the smallest label."""
    pairs, counts = np.unique(np.stack([units, labels]), axis=1, return_counts=True)
    order = np.lexsort((-pairs[1], counts, pairs[0]))
    commonest = np.empty(units.max() + 1, np.int64)
    # NumPy keeps the last label that is assigned to a unit. The most common label is assigned last.
    commonest[pairs[0][order]] = pairs[1][order]
    return commonest


def _exact_bounds(
    sizes: Int[np.ndarray, " members"], cuts: Float[np.ndarray, " cuts"]
) -> Int[np.ndarray, " cuts"]:
    """Returns the boundaries between splits: the number of units before each boundary.

    The fractions of examples before the boundaries are as near as possible to `cuts`.
    """
    before = np.concatenate([[0], np.cumsum(sizes)])
    # Without 1e-9, a rounding error such as 0.7 + 0.2 = 0.8999... would move the boundary between
    # two splits by one unit (an example, or examples that stay together).
    wanted = cuts * before[-1] + 1e-9
    after = np.searchsorted(before, wanted)
    nearer_before = wanted - before[after - 1] < before[after] - wanted
    return after - nearer_before


def _none_empty(bounds: Int[np.ndarray, " cuts"], count: int) -> Int[np.ndarray, " cuts"]:
    """Moves the boundaries between splits as little as possible, so that no split is empty."""
    bounds = bounds.copy()
    for i in range(len(bounds)):
        bounds[i] = max(bounds[i], bounds[i - 1] + 1 if i else 1)
    for i in reversed(range(len(bounds))):
        bounds[i] = min(bounds[i], bounds[i + 1] - 1 if i + 1 < len(bounds) else count - 1)
    return bounds


def group_names(paths: Sequence[str], pattern: str, name: str = "the source") -> list[str]:
    """Returns the names of the examples' groups; a pattern extracts each name from a path.

    `{word}` matches a part of the path that belongs to the group's name, and `*` a part that
    does not; neither matches a "/". The pattern matches the beginning of the path. A `{word}`
    at the pattern's end matches letters and digits only: for `stop/0012_7.jpg`,
    `{class}/{track}` gives the group `stop/0012`.

    Args:
      paths: The paths of the examples, with "/" between their parts.
      pattern: The value of `data.group`.
      name: The name of the source, for messages.

    Raises:
      ConfigError: The pattern has no `{word}`.
      DataError: A path does not match.
    """
    expression = group_expression(pattern)
    groups = []
    for path in paths:
        match = expression.match(path)
        if match is None:
            raise DataError(
                f"data.group: {pattern!r} does not describe {path!r} of {name}; a {{word}} "
                'stands for a part of the path without "/"'
            )
        groups.append("/".join(match.groups()))
    return groups


def group_expression(pattern: str) -> re.Pattern[str]:
    """Converts a pattern of `group_names` to a regular expression.

    Raises:
      ConfigError: The pattern has no `{word}`.
    """
    if not re.search(r"\{\w+\}", pattern):
        raise ConfigError(f"data.group: {pattern!r} has no part like {{track}} in it")
    expression, end = "", 0
    for placeholder in _PLACEHOLDER.finditer(pattern):
        expression += re.escape(pattern[end : placeholder.start()])
        end = placeholder.end()
        if placeholder[0] == "*":
            expression += "[^/]*?" if end < len(pattern) else "[^/]*"
        else:
            expression += "([^/]+?)" if end < len(pattern) else r"([^\W_]+)"
    return re.compile(expression + re.escape(pattern[end:]), re.DOTALL)
