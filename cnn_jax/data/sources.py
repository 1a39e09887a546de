"""Sources: random-access sequences of labelled images.

`open_source` understands

    shapes[:N]      the embedded generated data set, or its first N images
    folder:PATH     a folder with one sub-folder of images for each class
    tfds:NAME       a TensorFlow Datasets name
"""

import hashlib
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cnn_jax.data import Track, decode, no_track, shapes
from cnn_jax.data.decode import Pixels
from cnn_jax.errors import ConfigError, DataError
from cnn_jax.preprocessing import Preprocessing


@runtime_checkable
class Source(Protocol):
    """Labelled images with random access.

    Attributes:
      name: As `open_source` understands it.
      class_names: Class names in the order of their labels.
      ids: A different identity for each example, the same on every machine.
      labels: int32 [n], positions in `class_names`.
      sizes: Bytes of each encoded image.
      num_ignored: Files or records that were found and are not examples.
    """

    name: str
    class_names: list[str]
    ids: list[str]
    labels: np.ndarray
    sizes: list[int]
    num_ignored: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An example: "image", encoded or uint8 [h, w, 3], "label", an int, and "id"."""
        ...


class FolderSource:
    """`class/**/image` files under one folder; a class is a sub-folder's name."""

    def __init__(self, path: str | os.PathLike[str], name: str = ""):
        """Lists the folder; no image is opened.

        Raises:
          DataError: No such folder, fewer than two classes, or a class without images.
        """
        self.name = name or f"folder:{path}"
        self._root = pathlib.Path(path).expanduser()
        if not self._root.is_dir():
            raise DataError(f"{self.name}: there is no folder {self._root}")
        self.class_names = sorted(
            entry.name
            for entry in self._root.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        if len(self.class_names) < 2:
            raise DataError(
                f"{self.name}: {self._root} needs a sub-folder of images for each of two or "
                f"more classes, and has {len(self.class_names)}"
            )
        self.ids: list[str] = []
        self.sizes: list[int] = []
        self.num_ignored = sum(
            not entry.name.startswith(".") and entry.is_file() for entry in self._root.iterdir()
        )
        labels = []
        for label, class_name in enumerate(self.class_names):
            images = self._images_below(self._root / class_name)
            if not images:
                raise DataError(
                    f"{self.name}: the class folder {self._root / class_name} has no images; "
                    "add some or remove it"
                )
            self.ids += [path.relative_to(self._root).as_posix() for path in images]
            self.sizes += [path.stat().st_size for path in images]
            labels += [label] * len(images)
        self.labels = np.array(labels, np.int32)

    def _images_below(self, folder: pathlib.Path) -> list[pathlib.Path]:
        files = decode.files_below(folder)
        images = [path for path in files if decode.is_image_file(path)]
        self.num_ignored += len(files) - len(images)
        return images

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            encoded = (self._root / self.ids[index]).read_bytes()
        except OSError as error:
            raise DataError(f"{self._root / self.ids[index]}: {error.strerror}") from error
        return {"image": encoded, "label": int(self.labels[index]), "id": self.ids[index]}


class TfdsSource:
    """All labelled examples of all splits of a TensorFlow Datasets data set."""

    def __init__(self, dataset_name: str):
        """Opens the data set, and downloads and prepares it first if need be.

        Raises:
          DataError: The data set does not exist, has no "image" and "label", or
            cannot be downloaded.
        """
        import tensorflow_datasets as tfds  # Slow to import, and not always there.

        self.name = f"tfds:{dataset_name}"
        self.num_ignored = 0
        builder = _prepared_builder(dataset_name)
        features = builder.info.features
        class_names = _class_names(features)
        if class_names is None:
            found = " ".join(str(features).split())
            raise DataError(
                f'{self.name} is not for classification: it needs an Image "image" and a '
                f'ClassLabel "label", and has {found}'
            )
        self.class_names = class_names
        split_names = sorted(builder.info.splits)
        undecoded = {"image": tfds.decode.SkipDecoding()}
        self._parts = [builder.as_data_source(name, decoders=undecoded) for name in split_names]
        self.ids = []
        self.sizes = []
        labels = []
        self._positions: list[tuple[int, int]] = []
        for part, split_name in enumerate(split_names):
            for i, example in enumerate(self._parts[part]):
                if example["label"] < 0:  # How TFDS marks withheld labels.
                    self.num_ignored += 1
                    continue
                self.ids.append(f"{split_name}/{i}")
                self.sizes.append(len(example["image"]))
                labels.append(example["label"])
                self._positions.append((part, i))
        self.labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, i = self._positions[index]
        image = self._parts[part][i]["image"]
        return {"image": image, "label": int(self.labels[index]), "id": self.ids[index]}


def _class_names(features: Any) -> list[str] | None:
    """The class names, or None if these are not the features of classification."""
    import tensorflow_datasets as tfds

    if not isinstance(features, tfds.features.FeaturesDict):
        return None
    if not {"image", "label"} <= set(features):
        return None
    image, label = features["image"], features["label"]
    if isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel):
        return [str(name) for name in label.names]
    return None


def _prepared_builder(dataset_name: str) -> Any:
    import tensorflow_datasets as tfds

    name = f"tfds:{dataset_name}"
    try:
        # Random access needs array_record files.
        builder = tfds.builder(dataset_name, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"{name}: TensorFlow Datasets knows no such data set, and none is prepared under "
            f"{_tfds_folder()}"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise DataError(f"{name}: {_first_line(error)}") from error
    try:
        builder.download_and_prepare()
    except Exception as error:  # Its downloaders raise whatever their libraries raise.
        raise DataError(
            f"{name} is not prepared under {_tfds_folder()} and could not be downloaded and "
            f"prepared ({type(error).__name__}: {_first_line(error)}). Run `tfds build "
            f"{dataset_name} --file_format=array_record` where there is a network, copy the "
            "folder here, and set TFDS_DATA_DIR to it"
        ) from error
    return builder


def _tfds_folder() -> str:
    return os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


class DecodedSource:
    """A source's examples, decoded and resized once and kept in memory."""

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        track: Track = no_track,
    ):
        """Decodes everything, on all cores.

        Raises:
          DataError: An image cannot be decoded.
        """
        self.name = source.name
        self.num_ignored = source.num_ignored
        self.class_names, self.labels = source.class_names, source.labels
        self.ids, self.sizes = source.ids, source.sizes
        self._images = np.empty((len(source), *preprocessing.image_size, 3), np.uint8)

        def fill(index: int) -> None:
            self._images[index] = load_image(source, index, preprocessing)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in track(pool.map(fill, range(len(source))), "decoding", len(source)):
                pass

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": self._images[index],
            "label": int(self.labels[index]),
            "id": self.ids[index],
        }


def load_image(source: Source, index: int, preprocessing: Preprocessing) -> Pixels:
    """Reads, decodes and resizes one image of a source: uint8 [height, width, 3].

    Raises:
      DataError: It cannot be decoded; the message names it.
    """
    image = source[index]["image"]
    if isinstance(image, bytes):
        try:
            image = decode.decode(image, preprocessing.max_pixels)
        except DataError as error:
            raise DataError(f"{source.name}: {source.ids[index]} {error}") from error
    return decode.resize(image, preprocessing.image_size)


def absolute(name: str) -> str:
    """The name of a source, the same from any working directory."""
    kind, _, path = name.partition(":")
    return f"folder:{pathlib.Path(path).expanduser().absolute()}" if kind == "folder" else name


def open_source(name: str, track: Track = no_track) -> Source:
    """Opens a source by the name given in `data.source` or `--source`.

    Raises:
      ConfigError: No source has a name of this form.
      DataError: The source is not there or is not a set of labelled images.
    """
    kind, _, rest = name.partition(":")
    if kind == "folder" and rest:
        return FolderSource(rest)
    if kind == "tfds" and rest:
        return TfdsSource(rest)
    if kind == "shapes" and (not rest or (rest.isdecimal() and int(rest) > 0)):
        num_images = int(rest) if rest else shapes.NUM_IMAGES
        return FolderSource(shapes.generate(num_images, track=track) / "images", name)
    raise ConfigError(f"a source must be shapes, shapes:N, folder:PATH or tfds:NAME, got {name!r}")


def fingerprint(source: Source) -> str:
    """sha256 over id, class and size of all examples, whatever their order."""
    lines = sorted(
        f"{example_id}\t{source.class_names[label]}\t{size}"
        for example_id, label, size in zip(source.ids, source.labels, source.sizes, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
