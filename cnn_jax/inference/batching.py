"""Functions that split many images into batches, and process the batches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

# The default batch size: the number of images that the network processes at once.
BATCH_SIZE = 64


def map_batches(
    function: Callable[[Any], PyTree], batches: Iterable[PyTree], padded_size: int | None = None
) -> Iterator[Any]:
    """Applies a function to each batch of an iterable, and yields the results.

    Each batch is padded by repeating its last row, because XLA compiles a program for each batch
    size. A function that treats rows independently returns the same rows with and without padding.

    Args:
      function: Takes a batch and returns an array, or a tree of arrays, with one row for each row
        of the batch.
      batches: Arrays, or trees of arrays, whose first dimensions are equal and at least 1.
      padded_size: The number of rows that the function receives; by default the next power of
        two, which limits the number of programs.

    Yields:
      For each batch the function's value without the padding, as NumPy arrays.
    """
    for batch in batches:
        count = len(jax.tree.leaves(batch)[0])
        size = padded_size or next_power_of_two(count)
        result = jax.device_get(function(jax.tree.map(lambda array: _pad(array, size), batch)))  # noqa: B023
        yield jax.tree.map(lambda array: np.asarray(array)[:count], result)  # noqa: B023


def split_batches(arrays: PyTree, batch_size: int = BATCH_SIZE) -> Iterator[Any]:
    """Splits an array, or a tree of arrays, into batches along the first dimension.

    Args:
      arrays: Arrays with equal first dimensions.
      batch_size: The number of rows of each batch, except the last, which may have fewer.
    """
    for start in range(0, len(jax.tree.leaves(arrays)[0]), batch_size):
        yield jax.tree.map(lambda array: array[start : start + batch_size], arrays)  # noqa: B023


def join_batches(
    arrays: Iterable[np.ndarray], batch_size: int = BATCH_SIZE
) -> Iterator[np.ndarray]:
    """Splits the rows of several arrays, one array after the other, into batches.

    Args:
      arrays: Arrays that have the same shape except for the first dimension.
      batch_size: The number of rows of each batch, except the last, which may have fewer.
    """
    rows: list[np.ndarray] = []
    for array in arrays:
        for row in array:
            rows.append(row)
            if len(rows) == batch_size:
                yield np.stack(rows)
                rows.clear()
    if rows:
        yield np.stack(rows)


def next_power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`; returns 1 if `count` is 0."""
    return 1 << max(count - 1, 0).bit_length()


def _pad(array: np.ndarray, size: int) -> np.ndarray:
    """Pads an array to `size` rows by repeating its last row."""
    missing = size - len(array)
    if not missing:
        return array
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1), mode="edge")
