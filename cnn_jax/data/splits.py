"""Which example belongs to which split."""

import hashlib
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "validation", "test")


def _rank(example_id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{example_id}".encode("utf-8", "surrogatepass")).digest()


def split_by_id(
    ids: list[str], labels: np.ndarray, fractions: Sequence[float], seed: int
) -> dict[str, np.ndarray]:
    """Divides examples into train, validation and test, stratified by class.

    Within a class the examples are ordered by a hash of (seed, id) and cut at
    the fractions, so that an example's split depends neither on the order in
    which examples are listed nor on the other classes.

    Args:
      ids: A different identity for each example.
      labels: int [n].
      fractions: Share of each split; they sum to 1.
      seed: Another seed gives another division.

    Returns:
      For each name in `SPLITS`, the positions of its examples, ascending. A class of
      three or more has an example in each split; apart from that its count is
      its share, rounded.
    """
    cuts = np.cumsum(fractions)[:-1]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    order = np.array(sorted(range(len(ids)), key=lambda i: _rank(ids[i], seed)), dtype=np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        # The tiny term keeps 0.7 + 0.2 = 0.8999... from cutting one too early.
        bounds = np.floor(cuts * len(members) + 0.5 + 1e-9).astype(int)
        if len(members) >= len(SPLITS):
            bounds = np.clip(bounds, [1, 2], [len(members) - 2, len(members) - 1])
            bounds[1] = max(bounds[1], bounds[0] + 1)
        for name, part in zip(SPLITS, np.split(members, bounds), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}
