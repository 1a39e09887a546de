"""Sources from TensorFlow Datasets, with random access and without TensorFlow."""

import functools
import os
import re
from typing import Any

import numpy as np

from cnn_jax.data import Track, no_track
from cnn_jax.data.source import SPLIT_NAMES, Source, named_splits
from cnn_jax.system.errors import DataError

# Matches a name of the form dataset[/config][:version][:split]. A split may be a slice such as
# train[:50%].
_NAME = re.compile(r"(?P<dataset>[^:]+(:[\d*]+\.[\d*]+\.[\d*]+)?)(:(?P<split>.+))?", re.DOTALL)


def open_tfds(name: str, track: Track = no_track) -> Source:
    """Opens the labelled examples of a data set from TensorFlow Datasets.

    Args:
      name: `NAME[/CONFIG][:VERSION][:SPLIT]`. With a split, only its examples are used.
        Without a split: if the data set has train and at least one of validation and test,
        these are the splits and all others are left out; else all examples are joined.
      track: Shows progress.

    Raises:
      DataError: The data set does not exist, has no "image" and "label", or
        cannot be downloaded.
    """
    # TensorFlow Datasets is slow to import, and not always installed.
    import tensorflow_datasets as tfds

    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(f"tfds:{name}: must be tfds:NAME[/CONFIG][:VERSION][:SPLIT]")
    builder = _prepared_builder(match["dataset"])
    class_names = _class_names(builder.info.features)
    if class_names is None:
        found = " ".join(str(builder.info.features).split())
        raise DataError(
            f'tfds:{name} is not for classification: it needs an Image "image" and a '
            f'ClassLabel "label", and has {found}'
        )
    split_names = [match["split"]] if match["split"] else sorted(builder.info.splits)
    known = {SPLIT_NAMES[split] for split in split_names if split in SPLIT_NAMES}
    is_divided = not match["split"] and "train" in known and len(known) > 1
    undecoded = {"image": tfds.decode.SkipDecoding()}
    parts = []
    ids, sizes, labels, keys, own_splits = [], [], [], [], []
    ignored = {"without a label": 0, "in other splits": 0}
    for split in split_names:
        if is_divided and split not in SPLIT_NAMES:
            ignored["in other splits"] += builder.info.splits[split].num_examples
            continue
        try:
            part = builder.as_data_source(split, decoders=undecoded)
            listing = track(part, f"listing {split}", len(part))
            ids_of_part = _ids(builder, split)
        except (ValueError, KeyError, AssertionError) as error:
            raise DataError(
                f"tfds:{name} has no split {split!r}; it has {', '.join(builder.info.splits)}"
            ) from error
        for position, (example_id, example) in enumerate(zip(ids_of_part, listing, strict=True)):
            if example["label"] < 0:  # TFDS marks withheld labels with -1.
                ignored["without a label"] += 1
                continue
            ids.append(example_id)
            sizes.append(len(example["image"]))
            labels.append(example["label"])
            keys.append((len(parts), position))
            own_splits.append(SPLIT_NAMES[split] if is_divided else "")
        parts.append(part)
    return Source(
        name=f"tfds:{name}",
        class_names=class_names,
        ids=ids,
        labels=np.array(labels, np.int32),
        read=functools.partial(_read, parts),
        keys=keys,
        sizes=sizes,
        versions=[f"{builder.data_path}-{builder.info.version}-{size}" for size in sizes],
        own_splits=own_splits,
        ignored={kind: count for kind, count in ignored.items() if count},
        split_folders=named_splits(ids),
    )


def _read(parts: list[Any], key: tuple[int, int]) -> bytes:
    """Reads the encoded image of an example; the key is its part and its position in the part."""
    part, position = key
    return parts[part][position]["image"]


def _ids(builder: Any, split: str) -> list[str]:
    """Returns an id SPLIT/POSITION for each example in a split, or in a slice such as train[:50%].

    POSITION is the position in the whole split. So an example has the same id in train[:50%] and
    in train.
    """
    import tensorflow_datasets as tfds

    splits = builder.info.splits
    ids = []
    for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(splits):
        end = splits[part.splitname].num_examples if part.to is None else part.to
        ids += [f"{part.splitname}/{position}" for position in range(part.from_ or 0, end)]
    return ids


def _class_names(features: Any) -> list[str] | None:
    """Returns the class names; None if the data set is not meant for image classification."""
    import tensorflow_datasets as tfds

    if not isinstance(features, tfds.features.FeaturesDict):
        return None
    if not {"image", "label"} <= set(features):
        return None
    image, label = features["image"], features["label"]
    if isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel):
        return [str(name) for name in label.names]
    return None


def _prepared_builder(dataset: str) -> Any:
    import tensorflow_datasets as tfds

    name = f"tfds:{dataset}"
    try:
        # Only array_record files allow random access.
        builder = tfds.builder(dataset, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"{name}: TensorFlow Datasets knows no such data set, and none is prepared under "
            f"{_folder()}"
        ) from error
    except (ValueError, RuntimeError, AssertionError) as error:
        raise DataError(f"{name}: {_first_line(error)}") from error
    try:
        builder.download_and_prepare()
    except Exception as error:  # A download may raise errors from many libraries.
        raise DataError(
            f"{name} is not prepared under {_folder()} and could not be downloaded and "
            f"prepared ({type(error).__name__}: {_first_line(error)}). Run `tfds build "
            f"{dataset} --file_format=array_record` where there is a network, copy the "
            "folder here, and set TFDS_DATA_DIR to it"
        ) from error
    return builder


def _folder() -> str:
    return os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
