"""The common interface of all sources of labelled images."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

# The usual names of splits in data sets, and the split that each name means.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A source of labelled images with random access.

    Attributes:
      name: The source's name, for `open_source`.
      class_names: Class names in the order of their labels.
      ids: A unique id of each example, the same on every machine.
      labels: int32 [n], positions in `class_names`.
      read: Returns the encoded bytes of an example, given its key; raises OSError.
      keys: The argument of `read` for each example.
      sizes: The number of bytes of each encoded image.
      versions: A text for each example that changes when the example changes, as far as a
        change is visible without reading the example.
      own_splits: "train", "validation" or "test" for each example that the data set itself
        assigns to a split; else "".
      ignored: The number of ignored files and folders, by kind.
      remarks: Warnings about the data, one sentence each.
      split_folders: The split of each folder that contains the classes of a split, such as
        {"train": "train", "seg_test/seg_test": "test"}.
      log: The labelled images of request logs that belong to the source and are not yet among
        its examples; `join.join` adds them.
      known_splits: The split of images that were in a split before, by the digest of their pixels
        at the size of the network's input; see `labelled_log.KnownImage`.
      logged: Whether each example is an image of a request log, which already has the size of
        the network's input; None if no example is.
    """

    name: str
    class_names: list[str]
    ids: list[str]
    labels: Int[np.ndarray, " n"]
    read: Callable[[Any], bytes]
    keys: Sequence[Any]
    sizes: list[int]
    versions: list[str]
    own_splits: list[str]
    ignored: dict[str, int] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)
    split_folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    log: "Source | None" = None
    known_splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    logged: Bool[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def paths(self) -> list[str]:
        """The ids of the examples, without the leading folder of a split, such as "train/"."""

        def without_split(example_id: str, own: str) -> str:
            for folder, split in self.split_folders.items():
                if split == own and example_id.startswith(f"{folder}/"):
                    return example_id[len(folder) + 1 :]
            return example_id

        return list(map(without_split, self.ids, self.own_splits))

    def select(self, indices: Int[np.ndarray, " m"]) -> "Source":
        """Returns a source with only the examples at these positions, and with all classes."""

        def pick(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in indices]

        return dataclasses.replace(
            self,
            ids=pick(self.ids),
            labels=self.labels[indices],
            keys=pick(self.keys),
            sizes=pick(self.sizes),
            versions=pick(self.versions),
            own_splits=pick(self.own_splits),
            logged=None if self.logged is None else self.logged[indices],
        )

    def without_empty_classes(self) -> "Source":
        """Returns a source with only the classes that have examples; keeps the classes' order."""
        used_labels, labels = np.unique(self.labels, return_inverse=True)
        if len(used_labels) == len(self.class_names):
            return self
        names = [self.class_names[label] for label in used_labels]
        absent = sorted(set(self.class_names) - set(names))
        remark = (
            f"{', '.join(absent)}: no readable images, so these classes are left out; add images"
        )
        return dataclasses.replace(
            self,
            class_names=names,
            labels=labels.astype(np.int32),
            remarks=[*self.remarks, remark],
        )


def named_splits(ids: Iterable[str]) -> dict[str, str]:
    """Returns the split of each top-level folder that is named after a split, such as "val".

    The folders are taken from the ids.
    """
    folders = {example_id.partition("/")[0] for example_id in ids if "/" in example_id}
    return {name: SPLIT_NAMES[name.lower()] for name in folders if name.lower() in SPLIT_NAMES}


def fingerprint(
    source: Source, digests: Sequence[str], splits: Mapping[str, Int[np.ndarray, " _"]]
) -> str:
    """Returns the sha256 of the ids, classes, contents and splits of all examples.

    The hash does not depend on the order of the examples.

    Args:
      source: The examples.
      digests: The digest of the encoded bytes of each example; see `scan.Record`.
      splits: The positions of the examples by split; each example is in one split.

    Returns:
      64 hexadecimal digits.
    """
    example_splits = {i: split for split, indices in splits.items() for i in indices}
    lines = sorted(
        f"{source.ids[i]}\t{source.class_names[source.labels[i]]}\t{digests[i]}\t{example_splits[i]}"
        for i in range(len(source))
    )
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
