"""The certificate of an exported model: a comparison with the bundle on whole splits."""

import io
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from cnn_jax.data import Track, no_track, scan
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.decode import decode
from cnn_jax.export.function import ExportError
from cnn_jax.inference.calibration import log_probabilities
from cnn_jax.inference.evaluation import evenly_spaced, labelled_split, predict_split, score
from cnn_jax.inference.exported import open_session
from cnn_jax.inference.images import preprocess_for_inference
from cnn_jax.inference.predictor import Predictor, predict_pixels
from cnn_jax.system.errors import DataError
from cnn_jax.training.metrics import HEADLINE

# The splits on which an exported model is compared with its bundle.
SPLITS = ("validation", "test")
# A probability of a float32 export may differ by at most this value from the bundle's.
MAX_DIFFERENCE = 1e-4
# A probability of pixels.onnx, which resizes images itself, may differ by at most this value from
# the probability for an image that Pillow has resized.
_PIXELS_LIMIT = 0.05
_IN_FLOAT32 = "largest_difference_in_float32"
_NUM_GOLDEN = 8
_ORIENTATION = 0x0112  # The number of the EXIF tag.
# The longest side of a golden image, in pixels. A larger image is reduced before it is stored.
_MAX_SIDE = 512
_NORMAL_95 = 1.96

Probabilities = Float[np.ndarray, "n classes"]


def compare(
    bundle: Predictor,
    exported: Predictor,
    dataset: Dataset,
    track: Track = no_track,
    float32: Predictor | None = None,
) -> dict[str, Any]:
    """Compares an exported model with its bundle on the validation split and the test split.

    Args:
      bundle: The predictor of the bundle.
      exported: The predictor of the exported model.
      dataset: The data.
      track: Shows progress.
      float32: The predictor of the bundle in float32, if the bundle has another precision.

    Returns:
      For each split: "count"; "agreement", the fraction of images with the same predicted class;
      "largest_difference" of a probability; "before" and "after", the metrics of the bundle and of
      the exported model; "accuracy_lost" and "loss_gained", each with the 95 % interval of the
      difference over the images, which are paired; with `float32` also
      "largest_difference_in_float32", the largest difference from this predictor. A split without
      images is left out.
    """
    result = {}
    for split in SPLITS:
        if not len(dataset.splits[split]):
            continue
        indices, labels = labelled_split(bundle, dataset, split)
        before, after = (
            predict_split(predictor, dataset.loader, indices, track, f"{name} on {split}")
            for name, predictor in (("bundle", bundle), ("exported model", exported))
        )
        result[split] = compare_probabilities(before, after, labels, bundle.class_names)
        if float32 is not None:
            exact = predict_split(float32, dataset.loader, indices, track, f"float32 on {split}")
            result[split][_IN_FLOAT32] = float(np.max(np.abs(exact - after)))
    return result


def compare_probabilities(
    before: Probabilities,
    after: Probabilities,
    labels: Int[np.ndarray, " n"],
    class_names: list[str],
) -> dict[str, Any]:
    """Compares the probabilities of two models for the same images.

    Args:
      before: The probabilities of the bundle.
      after: The probabilities of the exported model.
      labels: The positions of the images' classes in `class_names`.
      class_names: The classes in the order of the probabilities.

    Returns:
      The values of a split; see `compare`.
    """
    rows = np.arange(len(labels))
    is_right_before, is_right_after = (p.argmax(1) == labels for p in (before, after))
    losses = [-log_probabilities(p)[rows, labels] for p in (before, after)]
    reports = [score(p, labels, class_names) for p in (before, after)]
    return {
        "count": len(labels),
        "agreement": float(np.mean(before.argmax(1) == after.argmax(1))),
        "largest_difference": float(np.max(np.abs(before - after))),
        "before": {key: reports[0][key] for key in HEADLINE},
        "after": {key: reports[1][key] for key in HEADLINE},
        "accuracy_lost": _paired(is_right_before.astype(float) - is_right_after.astype(float)),
        "loss_gained": _paired(losses[1] - losses[0]),
    }


def _paired(differences: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """Returns the mean of paired differences, and its 95 % interval by the normal distribution."""
    mean = float(np.mean(differences))
    half = _NORMAL_95 * float(np.std(differences)) / np.sqrt(len(differences))
    return {"mean": mean, "interval": [mean - half, mean + half]}


def check(comparison: Mapping[str, Any], max_loss: float, is_exact: bool) -> None:
    """Raises ExportError if an exported model is not accurate enough to be written.

    Args:
      comparison: The result of `compare`.
      max_loss: The largest allowed loss of accuracy on each split, from 0 to 1.
      is_exact: Whether the model must also have the same probabilities, because it is not
        quantized.

    Raises:
      ExportError: The model fails the check.
    """
    if not comparison:
        raise ExportError(
            "the data has no validation images and no test images, so the exported model cannot be "
            "compared with the bundle; nothing was written"
        )
    for split, values in comparison.items():
        lost = values["accuracy_lost"]["mean"]
        if not lost <= max_loss:
            raise ExportError(
                f"the exported model loses {100 * lost:.2f} points of accuracy on the {split} "
                f"split ({100 * values['before']['accuracy']:.2f} % to "
                f"{100 * values['after']['accuracy']:.2f} %), {100 * (lost - max_loss):.2f} more "
                f"than --max_loss={max_loss:g} allows; nothing was written"
            )
        difference = values.get(_IN_FLOAT32, values["largest_difference"])
        if is_exact and not difference <= MAX_DIFFERENCE:
            raise ExportError(
                f"a probability of the exported model differs by {difference:.1e} from the bundle "
                f"on the {split} split, and {MAX_DIFFERENCE:.0e} is allowed; nothing was written"
            )


def golden_images(dataset: Dataset, max_pixels: int, white_level: float) -> dict[str, bytes]:
    """Returns images of the test split, as files in their original size, by file name.

    There are up to eight PNG files, a JPEG file that an EXIF orientation turns by 90 degrees, and a
    PNG file with transparent pixels. Images with a side of more than 512 pixels are reduced. If the
    test split is empty, the images are of all splits.

    Args:
      dataset: The data.
      max_pixels: The largest number of pixels of an image.
      white_level: The value of white in the images, or 0; see the key `data.white_level`.

    Raises:
      DataError: An image cannot be read.
    """
    indices = dataset.splits["test"]
    if not len(indices):
        indices = np.arange(len(dataset.source))
    images = []
    for index in evenly_spaced(indices, _NUM_GOLDEN):
        try:
            encoded = scan.read_example(dataset.source, int(index), max_pixels)
            pixels = decode(encoded, max_pixels, white_level)
        except DataError as error:
            name = f"{dataset.source.name}: {dataset.source.ids[index]}"
            raise DataError(f"{name} {error}") from error
        images.append(Image.fromarray(pixels))
        images[-1].thumbnail((_MAX_SIDE, _MAX_SIDE))
    files = {f"golden/{i}.png": _encode(image, "PNG") for i, image in enumerate(images)}
    exif = Image.Exif()
    exif[_ORIENTATION] = 6  # To show the image upright, turn it clockwise by 90 degrees.
    turned = images[0].transpose(Image.Transpose.ROTATE_90)
    files["golden/orientation.jpg"] = _encode(turned, "JPEG", exif=exif, quality=95, subsampling=0)
    alpha = np.linspace(0, 255, images[-1].width).astype(np.uint8)
    images[-1].putalpha(Image.fromarray(np.tile(alpha, (images[-1].height, 1))))
    files["golden/alpha.png"] = _encode(images[-1], "PNG")
    return files


def _encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def golden_records(files: Mapping[str, bytes], exported: Predictor) -> list[dict[str, Any]]:
    """Returns the predictions for golden images, for the certificate.

    Args:
      files: The golden images; see `golden_images`.
      exported: The predictor of the exported model.

    Returns:
      For each image its "file", the "predicted" class and the "probabilities".
    """
    pixels = [preprocess_for_inference(file, exported.preprocessing) for file in files.values()]
    probabilities = predict_pixels(exported, np.stack(pixels))
    return [
        {
            "file": name,
            "predicted": exported.class_names[int(row.argmax())],
            "probabilities": [round(float(value), 7) for value in row],
        }
        for name, row in zip(files, probabilities, strict=True)
    ]


def check_pixels(
    model: bytes, files: Mapping[str, bytes], records: Sequence[Mapping[str, Any]]
) -> float:
    """Checks the ONNX model that resizes images itself, with the golden images.

    Args:
      model: The ONNX model with the input "pixels".
      files: The golden images; see `golden_images`.
      records: The probabilities that the images have with Pillow's resizing; see `golden_records`.

    Returns:
      The largest difference of a probability.

    Raises:
      ExportError: The largest difference is above 0.05.
    """
    session = open_session(model)
    largest = 0.0
    for record in records:
        pixels = decode(files[record["file"]])
        probabilities = session.run(None, {"pixels": pixels})[0][0]
        largest = max(largest, float(np.abs(probabilities - record["probabilities"]).max()))
    if not largest <= _PIXELS_LIMIT:
        raise ExportError(
            "the model that resizes images itself has other probabilities for the golden images: "
            f"they differ by up to {largest:.2g}, more than {_PIXELS_LIMIT}; nothing was written"
        )
    return largest


def measure(
    runner: str, model: bytes, image_size: tuple[int, int], python: str = sys.executable
) -> dict[str, Any]:
    """Measures the latency and the peak memory of a model in a new process with one thread.

    Args:
      runner: The name of a function in `export.measure`.
      model: The content of the model file.
      image_size: The height and the width of the images.
      python: The Python that runs the model.

    Returns:
      "milliseconds_per_image" by batch size, "peak_memory_bytes" (None if the system does not
      report it), and "machine".

    Raises:
      ExportError: The model cannot be run.
    """
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(model)
        file.flush()
        script = str(pathlib.Path(__file__).with_name("measure.py"))
        result = subprocess.run(
            [python, "-P", script, runner, file.name, *map(str, image_size)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"},
        )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise ExportError(f"the exported model cannot be run in a new process: {lines[-1]}")
    return json.loads(result.stdout.splitlines()[-1]) | {"machine": describe_machine()}


def describe_machine() -> dict[str, Any]:
    """Returns the processor, the number of its cores, and the operating system."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return {"processor": name, "cores": os.cpu_count(), "system": platform.platform()}
