"""Sources, splits, decoding, augmentation and the pipeline that joins them."""

from collections.abc import Callable, Iterable

# Passes items on and shows how many of a total have come: (items, description, total).
Track = Callable[[Iterable, str, int], Iterable]


def no_track(items: Iterable, description: str, total: int) -> Iterable:
    """Shows nothing."""
    return items
