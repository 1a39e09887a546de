"""The labelled images of request logs as a source of examples, and snapshots of them.

An image of a request log is an example if the log has the image (`serve --request_log_images`) and
a label. Equal images are one example, which has the latest of their labels. A request log grows
while a network is trained, so a run needs a snapshot: a folder with the examples of one moment.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cnn_jax.data.decode import decode, pixel_digest
from cnn_jax.data.request_log import (
    Folders,
    Key,
    model_classes,
    read_keys,
    read_valid_feedback,
)
from cnn_jax.data.source import Source
from cnn_jax.system.atomic import replacing, sync
from cnn_jax.system.errors import DataError, MissingDataError, printable

_FILE = "examples.parquet"
_VERSION_KEY, _VERSION = b"cnn_jax_examples", b"1"
_SCHEMA = pa.schema(
    [
        ("request", pa.string()),  # REQUEST_ID/IMAGE_INDEX of the copy that was labelled first.
        ("label", pa.string()),
        ("digest", pa.string()),
        ("image", pa.binary()),
    ],
    metadata={_VERSION_KEY: _VERSION},
)
# The known images of an attempt to retrain, beside its examples.
_KNOWN_FILE = "splits.parquet"
_KNOWN_SCHEMA = pa.schema(
    # A class may be named after a folder whose name is not UTF-8.
    [
        ("digest", pa.string()),
        ("split", pa.string()),
        ("label", pa.binary()),
        ("is_logged", pa.bool_()),
    ],
    metadata={_VERSION_KEY: _VERSION},
)
_COLUMNS = ("request_id", "image_index", "model", "digest", "image")

# The kinds of labelled images that are left out.
NO_IMAGE = "labels of images that were not stored"
NO_REQUEST = "labels of images that no log has"
OTHER_MODEL = "labelled images of models with other classes"
DAMAGED = "damaged labelled images"
LOGGED_TWICE = "copies of other logged images"


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Labelled images of request logs, in the order in which they were first labelled.

    Attributes:
      requests: REQUEST_ID/IMAGE_INDEX of each image.
      labels: The class of each image, which may be a class that no network knows yet.
      digests: The digest of the pixels of each image; see `decode.pixel_digest`.
      images: Each image as PNG, in the size of the network's input.
      left_out: The number of labelled images that are left out, by kind.
      conflicts: The number of images whose copies have different labels.
    """

    requests: list[str]
    labels: list[str]
    digests: list[str]
    images: list[bytes]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    conflicts: int = 0

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def digest(self) -> str:
        """The sha256 of the order, the labels and the pixels of the examples, hexadecimal."""
        text = json.dumps([self.requests, self.labels, self.digests])
        return hashlib.sha256(text.encode()).hexdigest()

    def without(self, requests: Collection[str]) -> "Examples":
        """Returns the examples whose REQUEST_ID/IMAGE_INDEX is not one of `requests`."""
        rows = [row for row, request in enumerate(self.requests) if request not in requests]
        return Examples(
            requests=[self.requests[row] for row in rows],
            labels=[self.labels[row] for row in rows],
            digests=[self.digests[row] for row in rows],
            images=[self.images[row] for row in rows],
        )


class KnownImage(NamedTuple):
    """The use of an image in earlier trainings.

    Attributes:
      split: The split of the image, which never changes.
      label: The class of the image, in the last training.
      is_logged: Whether the last training took the image from a request log.
    """

    split: str
    label: str
    is_logged: bool


def read_examples(
    folders: Folders,
    class_names: Collection[str],
    *,
    model: str | None = None,
    previous: Examples | None = None,
) -> Examples:
    """Reads the labelled images of request logs, while servers may be writing to the logs.

    The result does not depend on the order of the folders and files. New examples are appended to
    the earlier ones, as long as the clocks of the servers agree; `previous` makes this certain.

    Args:
      folders: The folders of the request logs.
      class_names: The classes of the data. Images that a model with other classes predicted are
        left out.
      model: Only images that were predicted under this name; by default the images of all models.
      previous: Earlier examples, which stay, in their order, also if the logs lack them now. A
        label in the logs replaces their label.

    Raises:
      DataError: A folder is not a request log, or only models with other classes wrote to it.
    """
    labels = read_valid_feedback(folders, "label")
    images: dict[Key, bytes] = {}
    kinds: dict[Key, str] = dict.fromkeys(labels, NO_REQUEST)
    for folder in folders:
        fitting = _fitting_models(folder, class_names)
        for row in read_keys(folder, labels, _COLUMNS):
            key = row["request_id"], row["image_index"]
            if model not in (None, row["model"]):
                kinds.pop(key, None)
            elif row["digest"] not in fitting:
                kinds[key] = OTHER_MODEL
            elif row["image"] is None:
                kinds[key] = NO_IMAGE
            else:
                images[key] = row["image"]
    keys = sorted(images, key=lambda key: (labels[key].first, key))
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(keys, pool.map(_digest, map(images.__getitem__, keys)), strict=True))
    for key in keys:
        kinds.pop(key, None)
        if not digests[key]:
            kinds[key] = DAMAGED
    copies: dict[str, list[Key]] = {}
    for key in keys:
        if digests[key]:
            copies.setdefault(digests[key], []).append(key)
    rows: dict[str, tuple[str, str, bytes]] = {}
    if previous is not None:
        values = zip(previous.requests, previous.labels, previous.images, strict=True)
        rows = dict(zip(previous.digests, values, strict=True))
    conflicts = 0
    for digest, group in copies.items():
        conflicts += len({labels[key].value for key in group}) > 1
        _, label = max((labels[key].time, labels[key].value) for key in group)
        request = f"{group[0][0]}/{group[0][1]}"
        request, _, image = rows.get(digest, (request, label, images[group[0]]))
        rows[digest] = request, label, image
    left_out = Counter(kinds.values())
    left_out[LOGGED_TWICE] = sum(len(group) - 1 for group in copies.values())
    return Examples(
        requests=[request for request, _, _ in rows.values()],
        labels=[label for _, label, _ in rows.values()],
        digests=list(rows),
        images=[image for _, _, image in rows.values()],
        left_out=+left_out,
        conflicts=conflicts,
    )


def _fitting_models(folder: str | os.PathLike[str], class_names: Collection[str]) -> set[str]:
    """Returns the digests of the models in a request log whose classes are classes of the data.

    Raises:
      DataError: The log has predictions, but none of such a model.
    """
    models = model_classes(folder)
    fitting = {digest for digest, names in models.items() if set(names) <= set(class_names)}
    if models and not fitting:
        unknown = sorted(set.union(*map(set, models.values())) - set(class_names))
        raise DataError(
            f"{folder} is the request log of another model: the data has no class "
            f"{printable(unknown[0])!r}; name the log of a model that was trained on this data"
        )
    return fitting


def _digest(image: bytes) -> str:
    """Returns the digest of the pixels of an image file; "" if the file is damaged."""
    try:
        return pixel_digest(decode(image))
    except DataError:
        return ""


def write_snapshot(examples: Examples, folder: pathlib.Path) -> None:
    """Writes labelled images of a request log to a folder, which `+log:FOLDER` in a source reads.

    The same examples give the same bytes. The folder has either no snapshot or the complete one,
    also after a power failure. Only the owner may read a new folder, because it contains images.

    Raises:
      OSError: The folder cannot be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    columns = [examples.requests, examples.labels, examples.digests, examples.images]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    with replacing(folder / _FILE) as file:
        pq.write_table(pa.table(arrays, schema=_SCHEMA), file, compression="zstd")
    sync(folder)


def delete_images(folder: pathlib.Path) -> None:
    """Deletes the examples of a snapshot; its known images stay.

    Raises:
      OSError: The file cannot be deleted.
    """
    (folder / _FILE).unlink(missing_ok=True)


def read_snapshot(folder: pathlib.Path) -> Examples | None:
    """Returns the examples of a snapshot; None if the folder has no complete snapshot.

    Raises:
      DataError: The file is damaged, or a later version of this package wrote it.
    """
    table = _read_table(folder / _FILE)
    if table is None:
        return None
    return Examples(*(table[name].to_pylist() for name in _SCHEMA.names))


def _read_table(path: pathlib.Path) -> pa.Table | None:
    """Returns a table of a snapshot; None if the file does not exist."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if (table.schema.metadata or {}).get(_VERSION_KEY) != _VERSION:
        raise DataError(f"{path} is not a snapshot that this version of cnn_jax reads")
    return table


def write_known(images: Mapping[str, KnownImage], folder: pathlib.Path) -> None:
    """Writes the known images of a snapshot, with the same guarantees as `write_snapshot`.

    When the snapshot is opened, the images keep their splits, whatever their names and classes are
    then, and whether they are images of the source or of the log.

    Args:
      images: The known images, by the digest of their pixels at the size of the network's input.
      folder: The folder of a snapshot.

    Raises:
      OSError: The folder cannot be written.
    """
    digests = sorted(images)
    columns = [
        digests,
        [images[digest].split for digest in digests],
        [images[digest].label.encode("utf-8", "surrogatepass") for digest in digests],
        [images[digest].is_logged for digest in digests],
    ]
    with replacing(folder / _KNOWN_FILE) as file:
        pq.write_table(pa.table(columns, schema=_KNOWN_SCHEMA), file, compression="zstd")
    sync(folder)


def read_known(folder: pathlib.Path) -> dict[str, KnownImage] | None:
    """Returns the known images of a snapshot; None if the snapshot has none.

    Raises:
      DataError: The file is damaged, or a later version of this package wrote it.
    """
    table = _read_table(folder / _KNOWN_FILE)
    if table is None:
        return None
    labels = (label.decode("utf-8", "surrogatepass") for label in table["label"].to_pylist())
    images = map(KnownImage, table["split"].to_pylist(), labels, table["is_logged"].to_pylist())
    return dict(zip(table["digest"].to_pylist(), images, strict=True))


def open_log(folders: Sequence[pathlib.Path], class_names: Sequence[str]) -> Source:
    """Creates a source from the labelled images of request logs, or of a snapshot and logs.

    The label of an image is -1 if its class is not one of the classes.

    Args:
      folders: The request logs, and at most one snapshot.
      class_names: The classes of the data.

    Raises:
      DataError: A folder is neither a request log nor a snapshot, or belongs to another model.
    """
    examples, known, logs = None, {}, []
    for folder in folders:
        snapshot = read_snapshot(folder)
        if snapshot is None:
            logs.append(folder)
            if not (folder / "requests").is_dir():
                raise MissingDataError(
                    f"+log:{folder}: the folder is neither a request log nor a complete snapshot"
                )
        elif examples is not None:
            raise DataError(f"+log:{folder} is a second snapshot; name only the latest one")
        else:
            examples, known = snapshot, read_known(folder) or {}
    if logs or examples is None:
        examples = read_examples(logs, class_names, previous=examples)
    positions = {name: position for position, name in enumerate(class_names)}
    remarks = []
    if examples.conflicts:
        remarks.append(
            f"{examples.conflicts:,} images of the request log have several labels that differ: "
            "the latest is used"
        )
    return Source(
        name="".join(f"+log:{folder}" for folder in folders),
        class_names=list(class_names),
        ids=[f"log/{request}" for request in examples.requests],
        labels=np.array([positions.get(label, -1) for label in examples.labels], np.int32),
        read=examples.images.__getitem__,
        keys=range(len(examples)),
        sizes=list(map(len, examples.images)),
        versions=examples.digests,
        own_splits=[""] * len(examples),
        ignored=dict(examples.left_out),
        remarks=remarks,
        known_splits={digest: image.split for digest, image in known.items()},
        logged=np.ones(len(examples), bool),
    )
