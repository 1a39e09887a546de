"""Data: sources, splits, decoding, augmentation and batches."""

from collections.abc import Callable, Iterable

# Yields the items and shows the progress: track(items, description, total).
Track = Callable[[Iterable, str, int], Iterable]


def no_track(items: Iterable, description: str, total: int) -> Iterable:
    """Returns the items and shows no progress."""
    return items
