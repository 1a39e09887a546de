"""Data: sources, splits, decoding, augmentation and batches."""

from collections.abc import Callable, Iterable

# A function track(items, description, total) that yields the items and shows the progress.
Track = Callable[[Iterable, str, int], Iterable]


def no_track(items: Iterable, description: str, total: int) -> Iterable:
    """Returns the items and shows no progress."""
    return items
