"""Functions that create configuration keys with a default value, a meaning and a check."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
      default: The value in `configs/default.py`.
      requirement: The allowed values in words, for messages.
      accepts: A function that returns whether a value is allowed.
      comment: The meaning of the key in one sentence, for `--help`.
      options: All allowed values of a key that `choice` creates; else empty.
    """

    default: Any
    requirement: str
    accepts: Callable[[Any], bool]
    comment: str
    options: Sequence[str] = ()


def integer(default: int, comment: str, low: int, high: int | None = None) -> Key:
    """Creates a key whose value is an integer from `low` to `high`; None means no upper limit."""
    requirement = f"{low} or more" if high is None else f"from {low} to {high}"

    def accepts(value: Any) -> bool:
        return is_int(value) and value >= low and (high is None or value <= high)

    return Key(default, f"an integer, {requirement}", accepts, comment)


def number(default: float, comment: str, requirement: str, accepts: Callable[[float], bool]) -> Key:
    """Creates a key whose value is a finite number; `requirement` describes `accepts` in words."""
    return Key(default, f"a number {requirement}", lambda v: is_number(v) and accepts(v), comment)


def fraction(default: float, comment: str) -> Key:
    """Creates a key whose value is a number from 0 to 1."""
    return number(default, comment, "from 0 to 1", lambda v: 0 <= v <= 1)


def fraction_below_one(default: float, comment: str) -> Key:
    """Creates a key whose value is a number that is at least 0 and below 1."""
    return number(default, comment, "from 0 to below 1", lambda v: 0 <= v < 1)


def positive(default: float, comment: str) -> Key:
    """Creates a key whose value is a number above 0."""
    return number(default, comment, "above 0", lambda v: v > 0)


def numbers(
    default: Sequence[float], comment: str, requirement: str, accepts: Callable[[float], bool]
) -> Key:
    """Creates a key whose value is a sequence of finite numbers; `default` sets the length."""

    def all_accepted(value: Any) -> bool:
        is_sequence = isinstance(value, tuple | list) and len(value) == len(default)
        return is_sequence and all(is_number(v) and accepts(v) for v in value)

    return Key(default, f"{len(default)} numbers {requirement}", all_accepted, comment)


def choice(default: str, comment: str, options: Sequence[str]) -> Key:
    """Creates a key whose value is one of several strings."""
    requirement = f"one of {', '.join(options)}"
    return Key(default, requirement, lambda v: v in options, comment, options)


def boolean(default: bool, comment: str) -> Key:
    """Creates a key whose value is True or False."""
    return Key(default, "True or False", lambda v: isinstance(v, bool), comment)


def text(default: str, comment: str, requirement: str, accepts: Callable[[str], bool]) -> Key:
    """Creates a key whose value is a string; `requirement` describes `accepts` in words."""
    return Key(default, requirement, lambda v: isinstance(v, str) and accepts(v), comment)


def is_int(value: Any) -> bool:
    """Returns whether a value is an integer; True and False do not count as integers."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite integer or float."""
    return (is_int(value) or isinstance(value, float)) and math.isfinite(value)
