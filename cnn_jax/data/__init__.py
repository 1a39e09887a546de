"""The data of a run: sources, splits, decoding, augmentation and batches."""

from collections.abc import Callable, Iterable

# The type of functions track(items, description, total) that yield the items and show the progress.
Track = Callable[[Iterable, str, int], Iterable]


def no_track(items: Iterable, description: str, total: int) -> Iterable:
    """Returns the items unchanged, without showing progress; the default `Track` function."""
    return items
