"""Which example belongs to which split."""

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
    """What decides which example is in which split, apart from the examples.

    Attributes:
      fractions: Shares of train, validation and test.
      seed: Of the division.
      rule: One of `schema.SPLIT_RULES`.
      group: A pattern of `group_names` on the source's paths, or "".
      keep_splits: Whether the splits that a data set has already are kept.
    """

    fractions: tuple[float, float, float] = (0.7, 0.2, 0.1)
    seed: int = 0
    rule: str = "stable"
    group: str = ""
    keep_splits: bool = True

    @classmethod
    def from_config(cls, data: Any, seed: int) -> "Division":
        """From the `data` section of a configuration and the run's seed."""
        return cls(tuple(data.split), seed, data.stratify, data.group, data.keep_splits)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Division":
        """From what `dataclasses.asdict` made of it, by way of JSON."""
        return cls(**{**fields, "fractions": tuple(fields["fractions"])})

    def check(self, source: Source) -> None:
        """Raises DataError if the pattern of groups does not describe every path."""
        self.groups(source)

    def groups(self, source: Source) -> list[str] | None:
        """The group of each example; None if there are no groups.

        Raises:
          DataError: The pattern does not describe a path.
        """
        return group_names(source.paths, self.group, source.name) if self.group else None

    def of(self, source: Source, contents: list[str]) -> dict[str, Int[np.ndarray, " _"]]:
        """The positions of each split.

        Args:
          source: The examples.
          contents: Of each example, the same for equal images.

        Raises:
          DataError: The pattern does not describe a path.
        """
        return divide(
            source.ids,
            source.labels,
            self.fractions,
            self.seed,
            rule=self.rule,
            groups=self.groups(source),
            contents=contents,
            own_splits=source.own_splits if self.keep_splits else None,
        )


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

    What belongs together is a unit: an example, or all examples of one group,
    or all of equal content. Each unit has a number in [0, 1), a hash of the seed
    and its identity (its id, its group, or the shortest id of equal examples).

    - "stable": the number alone decides, so that a unit keeps its split whatever
      is added or removed. The shares hold as closely as chance lets them.
    - "exact": the units of each class are sorted by the number and cut where the
      shares are met to within one unit. When examples are added, some units
      next to a cut change sides.

    (No rule can do both: one that never moves a unit can look at nothing but
    the unit.) Either way a class of three units or more has one in each split. If
    the numbers leave a split empty, the stable rule lends it the nearest unit,
    until one comes whose number is right. That, and a group or an equal image
    with a shorter name, is all that can move a unit.

    Args:
      ids: A different identity for each example.
      labels: The classes. A unit of several classes counts for the commonest.
      fractions: Share of each split; they sum to 1.
      seed: Another seed gives another division.
      rule: One of `schema.SPLIT_RULES`.
      groups: The group of each example.
      contents: Equal for equal images.
      own_splits: The split that each example has already, or "" if none. What
        belongs to an example that has one goes there too. A validation or test
        split that some examples have gets no others. If no example has a certain
        split, it is cut out of those that have none, or else out of the training
        part, in the proportions of `fractions`.

    Returns:
      For each name in `SPLITS`, the positions of its examples, ascending.
    """
    own = np.array(own_splits if own_splits is not None else [""] * len(ids))
    given = [name for name in SPLITS if (own == name).any()]
    split_of = np.full(len(ids), -1)
    for position, name in enumerate(SPLITS):
        split_of[own == name] = position
    shares = np.array(fractions, np.float64)
    free = own == ""
    if given and not free.any() and len(given) < len(SPLITS):
        # A split that is missing is cut out of the training part.
        free = own == "train"
    # What is given for validation or test is all of it.
    shares[[name in given and name != "train" for name in SPLITS]] = 0
    units = _units(len(ids), groups, contents)
    # What belongs to something that has its split goes there.
    split_of_unit = np.full(len(ids), -1)
    np.maximum.at(split_of_unit, units[~free], split_of[~free])
    is_bound = split_of_unit[units] >= 0
    split_of = np.where(is_bound & (own == ""), split_of_unit[units], split_of)
    rest = np.flatnonzero(free & ~is_bound)
    if len(rest):
        names = ids if groups is None else groups
        _, own_units = np.unique(units[rest], return_inverse=True)
        numbers = _numbers(own_units, [names[i] for i in rest], seed)
        split_of[rest] = _assign(own_units, numbers, labels[rest], shares / shares.sum(), rule)
    return {name: np.flatnonzero(split_of == position) for position, name in enumerate(SPLITS)}


def _units(
    size: int, groups: list[str] | None, contents: list[str] | None
) -> Int[np.ndarray, " size"]:
    """The number of the unit of each example, below `size`."""
    units = np.arange(size)
    for keys in (groups, contents):
        if keys is not None:
            number_of: dict[str, int] = {}
            key = np.array([number_of.setdefault(key, len(number_of)) for key in keys], int)
            # Units and keys are the nodes of a graph, whose parts are the new units.
            edges = (np.ones(size), (units, key + size))
            shape = (size + len(number_of),) * 2
            _, part = connected_components(coo_array(edges, shape=shape), directed=False)
            units = np.unique(part[units], return_inverse=True)[1]
    return units


def _numbers(
    units: Int[np.ndarray, " m"], names: list[str], seed: int
) -> Float[np.ndarray, " units"]:
    """A number in [0, 1) for each unit, from the shortest of its names.

    Copies tend to have longer names, and so do not move the original.
    """
    identity: dict[int, tuple[int, str]] = {}
    for unit, name in zip(units.tolist(), names, strict=True):
        identity[unit] = min(identity.get(unit, (len(name), name)), (len(name), name))
    return np.array([_number(identity[unit][1], seed) for unit in range(len(identity))])


def _number(identity: str, seed: int) -> float:
    """A hash in [0, 1)."""
    text = f"{seed}:{identity}".encode("utf-8", "surrogatepass")
    return (int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 11) / 2**53


def _assign(
    units: Int[np.ndarray, " m"],
    numbers: Float[np.ndarray, " units"],
    labels: Int[np.ndarray, " m"],
    shares: Float[np.ndarray, "3"],
    rule: str,
) -> Int[np.ndarray, " m"]:
    """The position in `SPLITS` of each example."""
    split_of_unit = np.zeros(len(numbers), np.int64)
    class_of_unit = _commonest_label(units, labels)
    sizes = np.bincount(units, minlength=len(numbers))
    # Only splits with a share take part, in the order of SPLITS.
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
            split_of_unit[part] = position
    return split_of_unit[units]


def _commonest_label(
    units: Int[np.ndarray, " m"], labels: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " units"]:
    """Of each unit, the label that most of its examples have; of several, the first."""
    pairs, counts = np.unique(np.stack([units, labels]), axis=1, return_counts=True)
    order = np.lexsort((-pairs[1], counts, pairs[0]))
    commonest = np.empty(units.max() + 1, np.int64)
    commonest[pairs[0][order]] = pairs[1][order]  # The last of each unit stays.
    return commonest


def _exact_bounds(
    sizes: Int[np.ndarray, " members"], cuts: Float[np.ndarray, " cuts"]
) -> Int[np.ndarray, " cuts"]:
    """Where to cut units of these sizes so that examples are shared nearest to `cuts`."""
    before = np.concatenate([[0], np.cumsum(sizes)])
    # The tiny term keeps 0.7 + 0.2 = 0.8999... from cutting one too early.
    wanted = cuts * before[-1] + 1e-9
    after = np.searchsorted(before, wanted)
    nearer_before = wanted - before[after - 1] < before[after] - wanted
    return after - nearer_before


def _none_empty(bounds: Int[np.ndarray, " cuts"], count: int) -> Int[np.ndarray, " cuts"]:
    """Moves cuts as little as makes every part hold one of `count` or more."""
    bounds = bounds.copy()
    for i in range(len(bounds)):
        bounds[i] = max(bounds[i], bounds[i - 1] + 1 if i else 1)
    for i in reversed(range(len(bounds))):
        bounds[i] = min(bounds[i], bounds[i + 1] - 1 if i + 1 < len(bounds) else count - 1)
    return bounds


def group_names(paths: Sequence[str], pattern: str, name: str = "the source") -> list[str]:
    """The group of each example, by a pattern on its path.

    `{word}` stands for a part of the path that belongs to the group's name and `*`
    for one that does not; neither holds a "/". The pattern describes the
    beginning of the path. A `{word}` at its end is a run of letters and digits: on
    `stop/0012_7.jpg`, `{class}/{track}` gives the group of `stop` and `0012`.

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
    """The regular expression of a pattern of `group_names`.

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
