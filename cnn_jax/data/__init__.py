"""The data of a run: sources, splits, decoding, augmentation and batches."""

from collections.abc import Callable, Iterable

# The type of a function track(items, description, total), which yields the items and shows the
# progress of the iteration.
Track = Callable[[Iterable, str, int], Iterable]


def no_track(items: Iterable, description: str, total: int) -> Iterable:
    """Returns the items unchanged, without showing progress; the default `Track` function."""
    return items
