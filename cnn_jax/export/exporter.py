"""The export of a bundle: makes the files, compares them with the bundle, writes the folder."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from cnn_jax.data import Track, no_track
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.export import certificate, litert, readme, web
from cnn_jax.export.function import flat_function, stable_hlo
from cnn_jax.inference.bundle import (
    Bundle,
    Ensemble,
    check_output,
    describe,
    digest,
    find_bundle,
    library_versions,
    read_networks,
    write_folder,
)
from cnn_jax.inference.ensemble import EnsemblePredictor, make_predictor
from cnn_jax.inference.evaluation import evenly_spaced, image_batches, open_as_trained
from cnn_jax.inference.exported import ONNX_MODEL, open_session
from cnn_jax.inference.predictor import BundlePredictor, Predictor, check_images
from cnn_jax.system.errors import ConfigError

_STABLEHLO_MODEL = "model.stablehlo"
_LITERT_MODEL = "model.tflite"
_PIXELS_MODEL = "pixels.onnx"
# The number of training images from which the ranges of a quantized model are measured.
_CALIBRATION_IMAGES = 256
# The default of the largest allowed loss of accuracy, from 0 to 1.
MAX_LOSS = 0.005
# The packages that a format needs in this environment.
_PACKAGES = {
    "onnx": ("onnx", "onnxruntime"),
    "litert": (),
    "stablehlo": ("flatbuffers",),
    "web": ("onnx", "onnxruntime"),
}
FORMATS = tuple(_PACKAGES)
# The number of days for which JAX promises to read the files of `jax.export`.
_COMPATIBILITY = {"newer_jax_reads_it_for_days": 180, "older_jax_reads_it_for_days": 30}


class FunctionPredictor(Predictor):
    """A predictor that calls a function of images."""

    def __init__(self, predictor: Predictor, run: Callable[[np.ndarray], Any]):
        self.class_names = predictor.class_names
        self.preprocessing: Preprocessing = predictor.preprocessing
        self._run = run

    def __call__(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> Float[np.ndarray, "batch classes"]:
        check_images(images, self.preprocessing)
        return np.asarray(self._run(np.ascontiguousarray(images)))


@dataclasses.dataclass(frozen=True)
class _Model:
    """An exported model.

    Attributes:
      files: The content of the model files by name; the first file is the model itself.
      predictor: Runs the model.
      runner: The function of `export.measure` that runs the model.
      facts: The facts about the format for the certificate.
    """

    files: dict[str, bytes]
    predictor: Predictor
    runner: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def close(self) -> None:
        """Ends the process that runs the model, if there is one."""
        if isinstance(self.predictor, litert.LitertPredictor):
            self.predictor.close()


def export(
    bundle: str | os.PathLike[str],
    output: str | os.PathLike[str],
    file_format: str = "onnx",
    *,
    int8: bool = False,
    static_ranges: bool = False,
    max_loss: float = MAX_LOSS,
    source: str | None = None,
    npm_package: str | None = None,
    converter_python: str | None = None,
    track: Track = no_track,
) -> dict[str, Any]:
    """Exports a bundle to another format, with a certificate; writes nothing if the check fails.

    Args:
      bundle: A bundle, or a run that has a bundle.
      output: The folder to write. An earlier export in this folder is replaced.
      file_format: One of `FORMATS`.
      int8: Whether to quantize the convolutions to 8 bits; not for the format "stablehlo".
      static_ranges: For the format "litert" with `int8`: whether the ranges of the activations are
        measured on training images. By default, the model measures the ranges of each image.
      max_loss: The largest allowed loss of accuracy on the validation split and on the test
        split, from 0 to 1.
      source: The name of the data for the comparison and the golden images; by default the
        training data. The ranges of a quantized model are always measured on training images.
      npm_package: For the format "web": the file of the npm package; see `web.page_files`.
      converter_python: For the format "litert": the Python of an environment with LiteRT.
      track: Shows progress.

    Returns:
      The certificate.

    Raises:
      ConfigError: A package is not installed, or the output is another folder.
      BundleError: There is no bundle, or the bundle is damaged.
      DataError: The data cannot be used.
      ExportError: The network cannot be exported, or the exported model fails the check.
    """
    check_output(output, "export")
    if int8 and file_format == "stablehlo":
        raise ConfigError(f"--int8: --format={file_format} has no 8-bit models; use --format=onnx")
    python, versions = sys.executable, _package_versions(file_format)
    if static_ranges and not (int8 and file_format == "litert"):
        raise ConfigError("--static_ranges: needs --format=litert --int8; onnx has static ranges")
    page = web.page_files(npm_package) if file_format == "web" else {}
    if file_format == "litert":
        python, versions = litert.check_python(converter_python)
    path = find_bundle(bundle)
    bundle_sha256 = digest(path)
    contents = read_networks(path)
    predictor = bundle_predictor = make_predictor(contents)
    if (in_float32 := _to_float32(contents)) is not contents:
        # The exported model computes in float32, even if training used bfloat16.
        predictor = make_predictor(in_float32)
    dataset = open_as_trained(predictor, source, track)
    is_training_data = dataset.fingerprint == contents.data["fingerprint"]
    preprocessing = predictor.preprocessing
    golden = certificate.golden_images(dataset, preprocessing.max_pixels, preprocessing.white_level)
    facts, batches = {}, None
    if int8 and (file_format != "litert" or static_ranges):
        training_data = dataset
        if source is not None and not is_training_data:
            training_data = open_as_trained(predictor, track=track)
        batches = _calibration_batches(training_data, track)
        facts["calibration_data"] = training_data.source.name
    if file_format in ("onnx", "web"):
        model = _make_onnx(predictor, batches)
    elif file_format == "litert":
        model = _make_litert(predictor, python, batches, int8=int8)
    else:
        model = _make_stablehlo(predictor)
    with contextlib.closing(model):
        comparison = certificate.compare(
            bundle_predictor,
            model.predictor,
            dataset,
            track,
            float32=None if predictor is bundle_predictor else predictor,
        )
        certificate.check(comparison, max_loss, is_exact=not int8)
        golden_records = certificate.golden_records(golden, model.predictor)
    facts |= model.facts
    if (pixels_model := model.files.get(_PIXELS_MODEL)) is not None:
        largest = certificate.check_pixels(pixels_model, golden, golden_records)
        facts["pixels_largest_difference"] = largest
    main_file = next(iter(model.files))
    statement = {
        "format": file_format,
        "int8": int8,
        "static_ranges": batches is not None,
        "bundle_sha256": bundle_sha256,
        "model": main_file,
        "sha256": {name: _sha256(content) for name, content in model.files.items()},
        "bytes": {name: len(content) for name, content in model.files.items()},
        **facts,
        "data": dataset.source.name,
        "comparison": comparison,
        "max_loss": max_loss,
        "golden": golden_records,
        "versions": library_versions() | versions,
        "measured": certificate.measure(
            model.runner, model.files[main_file], preprocessing.image_size, python
        ),
    }
    measured = {split: values["after"] for split, values in comparison.items()}
    description = describe(contents) | {
        # Metrics on other data must not replace the metrics of the run.
        "metrics": measured if is_training_data else contents.metrics,
        "precision": "float32",
        "export": {"format": file_format, "int8": int8, "bundle": bundle_sha256},
    }
    files = {
        **model.files,
        **page,
        **golden,
        "README.md": readme.text(statement, predictor).encode(),
        "certificate.json": (json.dumps(statement, indent=1) + "\n").encode(),
    }
    write_folder(output, files, description)
    return statement


def _to_float32(contents: Bundle | Ensemble) -> Bundle | Ensemble:
    """Returns networks that compute in float32; the same object if all of them do so already."""
    bundles = contents.members if isinstance(contents, Ensemble) else [contents]
    if all(bundle.precision == "float32" for bundle in bundles):
        return contents
    changed = [dataclasses.replace(bundle, precision="float32") for bundle in bundles]
    if isinstance(contents, Ensemble):
        return dataclasses.replace(contents, members=changed)
    return changed[0]


def _calibration_batches(dataset: Dataset, track: Track) -> Iterator[np.ndarray]:
    """Yields batches of training images.

    Raises:
      ConfigError: The data has no training images.
    """
    chosen = evenly_spaced(dataset.splits["train"], _CALIBRATION_IMAGES)
    if not len(chosen):
        raise ConfigError("--int8: the data has no training images to measure the ranges with")
    return image_batches(dataset.loader, chosen, track, "measuring ranges")


def _make_onnx(
    predictor: BundlePredictor | EnsemblePredictor, batches: Iterable[np.ndarray] | None
) -> _Model:
    """Makes the ONNX models, with 8 bits if `batches` has images from which the ranges come."""
    from cnn_jax.export.onnx_model import images_model, pixels_model
    from cnn_jax.export.quantize import quantize

    model = images_model(flat_function(predictor), predictor)
    if batches is not None:
        model = quantize(model, batches)
    content = model.SerializeToString(deterministic=True)
    session = open_session(content)
    pixels = pixels_model(model, predictor).SerializeToString(deterministic=True)
    return _Model(
        {ONNX_MODEL: content, _PIXELS_MODEL: pixels},
        FunctionPredictor(predictor, lambda images: session.run(None, {"images": images})[0]),
        "onnx",
    )


def _make_litert(
    predictor: BundlePredictor | EnsemblePredictor,
    python: str,
    batches: Iterable[np.ndarray] | None,
    *,
    int8: bool,
) -> _Model:
    size = predictor.preprocessing.image_size
    content = litert.convert(flat_function(predictor), size, python, int8=int8, batches=batches)
    return _Model(
        {_LITERT_MODEL: content},
        litert.LitertPredictor(predictor, content, python),
        "litert",
    )


def _make_stablehlo(predictor: BundlePredictor | EnsemblePredictor) -> _Model:
    import jax

    exported = stable_hlo(flat_function(predictor), predictor.preprocessing.image_size)
    facts = {
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "compatibility": _COMPATIBILITY,
    }
    return _Model(
        {_STABLEHLO_MODEL: bytes(exported.serialize())},
        FunctionPredictor(predictor, jax.jit(exported.call)),
        "stablehlo",
        facts,
    )


def _package_versions(file_format: str) -> dict[str, str]:
    """Returns the versions of the packages that a format needs in this environment.

    Raises:
      ConfigError: A package is not installed.
    """
    versions = {}
    for name in _PACKAGES[file_format]:
        try:
            # The module onnxruntime may come from another package, such as onnxruntime-gpu.
            versions[name] = importlib.import_module(name).__version__
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--format={file_format}: the package {name} is not installed: pip install "
                f"'cnn_jax[{file_format.replace('web', 'onnx')}]'"
            ) from error
    return versions


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
