"""Request logs with images and labels, for tests."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from bundles import encode_png

from cnn_jax.data import request_log as files

NAMES = ("blue", "green", "red")


def request_id(number: int) -> str:
    """Returns a request id of the form that the server creates."""
    return f"{1_700_000_000_000 + number:012x}{number:020x}"


def write_images_to_log(
    folder: pathlib.Path,
    images: Mapping[int, np.ndarray | bytes | None],
    *,
    class_names: Sequence[str] = NAMES,
    digest: str = "d" * 64,
    model: str = "default",
) -> None:
    """Appends images to a request log.

    Args:
      folder: The log; created if necessary.
      images: The pixels, or the PNG, or None, by number; see `request_id`.
      class_names: The classes of the model that predicted the images.
      digest: The digest of its bundle.
      model: The name of the model.
    """
    folder.mkdir(exist_ok=True)
    files.make_folders(folder)
    files.write_class_names(folder, digest, class_names)
    segments = files.Segments(folder / "requests", files.REQUESTS)
    count = len(images)
    columns = {name: [None] * count for name in files.REQUESTS.names}
    columns |= {
        "time": [10**6 * number for number in images],
        "request_id": [request_id(number) for number in images],
        "image_index": [0] * count,
        "model": [model] * count,
        "digest": [digest] * count,
        "image": [encode_png(i) if isinstance(i, np.ndarray) else i for i in images.values()],
    }
    segments.append(columns)
    segments.close()


def write_labels(folder: pathlib.Path, labels: Mapping[int | str, str | None], when: float) -> None:
    """Appends labels of images to a request log.

    Args:
      folder: The log.
      labels: The labels by number, see `request_id`, or by request id.
      when: The time of the labels, in seconds.
    """
    segments = files.Segments(folder / "feedback", files.FEEDBACK)
    segments.append(
        {
            "time": [round(10**6 * when)] * len(labels),
            "request_id": [one if isinstance(one, str) else request_id(one) for one in labels],
            "image_index": [0] * len(labels),
            "label": list(labels.values()),
            "reward": [1.0] * len(labels),
        }
    )
    segments.close()
