"""The bundle: a directory with everything that inference needs.

    bundle.json            everything except the weights, and the sha256 of the weights
    weights.safetensors    parameters and batch statistics

A bundle contains no code, and reading it needs no training code.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

import cnn_jax
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.models import NETWORKS
from cnn_jax.system.atomic import sync
from cnn_jax.system.errors import BundleError, MissingBundleError, file_errors

FORMAT = 2
_DESCRIPTION = "bundle.json"
_WEIGHTS = "weights.safetensors"


# The fields of `Preprocessing` that are missing in bundles from early versions of this package.
_ADDED_KEYS = ("white_level", "resize", "crop_ratio", "interpolation")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A trained network with the meaning of its inputs and outputs.

    Attributes:
      model: The `model` section of the configuration.
      precision: "float32" or "bfloat16", the precision of the computation in training.
      class_names: The classes in the order of the network's outputs.
      preprocessing: The preprocessing from an image to the network's input.
      temperature: The logits are divided by the temperature before the softmax.
      data: The source of the training data, its division into splits, its limits for unreadable
        images and links, and its fingerprint.
      metrics: For each split "accuracy", "precision", "recall", "f1", "loss", and
        "agreement_p_value", the probability that a network which guesses is correct at least
        as often.
      variables: {"params": ..., "batch_stats": ...}, arrays.
      pretrained: The weights with which training started: "source", "sha256", "license",
        "architecture" and "preprocessing", as `PretrainedWeights.record` returns them. None if
        training started with random weights, and in older bundles.
    """

    model: dict[str, Any]
    precision: str
    class_names: list[str]
    preprocessing: Preprocessing
    temperature: float
    data: dict[str, Any]
    metrics: dict[str, Any]
    variables: PyTree
    pretrained: dict[str, Any] | None = None


def library_versions() -> dict[str, str]:
    """Returns the versions of this package and of the libraries that affect predictions."""
    names = ("jax", "jaxlib", "flax", "numpy", "pillow", "safetensors")
    # The version of this package is read from the code, because a package that is not installed has
    # no metadata.
    own = {"cnn_jax": cnn_jax.__version__}
    return own | {name: importlib.metadata.version(name) for name in names}


def write_bundle(bundle: Bundle, path: str | os.PathLike[str]) -> None:
    """Writes a bundle to a directory.

    After a crash, the path contains either a complete bundle or no bundle. The written bytes are a
    function of the bundle and the library versions. Two processes must not write the same path at
    the same time.

    Args:
      bundle: The bundle.
      path: The directory for the bundle. An existing directory is replaced.
    """
    path = pathlib.Path(path)
    partial, replaced = (path.with_name(f".{path.name}.{name}") for name in ("partial", "replaced"))
    for remains_of_a_crash in (partial, replaced):
        shutil.rmtree(remains_of_a_crash, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        flat = flax.traverse_util.flatten_dict(bundle.variables, sep="/")
        # safetensors 0.8 scrambles arrays that are not contiguous, so arrays are converted to C
        # order. np.ascontiguousarray is not used, because it would convert a scalar to a vector.
        weights = {name: np.asarray(array, order="C") for name, array in flat.items()}
        with file_errors(partial / _WEIGHTS):
            (partial / _WEIGHTS).write_bytes(safetensors.numpy.save(weights))
        description = {"format": FORMAT} | {
            field.name: getattr(bundle, field.name)
            for field in dataclasses.fields(bundle)
            if field.name != "variables"
        }
        if bundle.pretrained is None:
            del description["pretrained"]
        description["preprocessing"] = dataclasses.asdict(bundle.preprocessing)
        description["versions"] = library_versions()
        description["files"] = {_WEIGHTS: {"sha256": file_sha256(partial / _WEIGHTS)}}
        text = json.dumps(description, indent=1, ensure_ascii=False, allow_nan=False)
        # Names may contain surrogates for bytes that are not UTF-8. Surrogates are written as JSON
        # escapes.
        with file_errors(partial / _DESCRIPTION):
            (partial / _DESCRIPTION).write_text(text + "\n", "utf-8", "backslashreplace")
        for file in (partial / _WEIGHTS, partial / _DESCRIPTION, partial):
            sync(file)  # Flush each file before the rename, so that a crash leaves no partial file.
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Reads a bundle and verifies the sha256 of its weights.

    Raises:
      BundleError: There is no bundle, or it is damaged, or it has another format.
    """
    path = pathlib.Path(path)
    try:
        description = json.loads((path / _DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise BundleError(
                f"{path} is a bundle of format {description['format']}, and this version of "
                f"cnn_jax reads format {FORMAT}"
            )
        if description["files"].keys() != {_WEIGHTS}:
            raise ValueError(f"its only file must be {_WEIGHTS}")
        if file_sha256(path / _WEIGHTS) != description["files"][_WEIGHTS]["sha256"]:
            raise BundleError(
                f"{path / _WEIGHTS} is damaged: its sha256 differs from the recorded value"
            )
        _check_network(path, description["model"])
        weights = safetensors.numpy.load_file(path / _WEIGHTS)
        preprocessing = description["preprocessing"]
        return Bundle(
            model=description["model"],
            precision=description["precision"],
            class_names=description["class_names"],
            preprocessing=Preprocessing(
                image_size=tuple(preprocessing["image_size"]),
                mean=tuple(preprocessing["mean"]),
                std=tuple(preprocessing["std"]),
                max_pixels=preprocessing["max_pixels"],
                # Older bundles lack some keys of the preprocessing. The default value of each key
                # is the behaviour of older versions of this package.
                **{key: preprocessing[key] for key in _ADDED_KEYS if key in preprocessing},
            ),
            temperature=description["temperature"],
            data=description["data"],
            metrics=description["metrics"],
            variables=flax.traverse_util.unflatten_dict(weights, sep="/"),
            pretrained=description.get("pretrained"),
        )
    except FileNotFoundError as error:
        raise MissingBundleError(f"{path} is not a bundle: there is no {error.filename}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise BundleError(f"{path} is not a bundle: {error!r}") from error


def _check_network(path: pathlib.Path, model: dict[str, Any]) -> None:
    """Raises BundleError if this version does not know a bundle's network or a key of the network.

    Args:
      path: The bundle.
      model: The `model` section of the configuration.
    """
    own = f"cnn_jax {cnn_jax.__version__}"
    name = model["name"]
    if name not in NETWORKS:
        raise BundleError(
            f"{path} has the network {name}, which {own} does not know; install the version of "
            "cnn_jax that wrote the bundle, or a later one"
        )
    if unknown := sorted(model.keys() - NETWORKS[name].keys.keys() - {"name"}):
        raise BundleError(
            f"{path} has the network {name} with model.{unknown[0]}, which {own} does not know; "
            "install the version of cnn_jax that wrote the bundle, or a later one"
        )


def find_bundle(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the directory of a bundle: the path itself, or `bundle/` in a run's directory.

    Raises:
      BundleError: The path is a run without a bundle.
    """
    path = pathlib.Path(path)
    with contextlib.suppress(OSError):  # `read_bundle` reports an unreadable path.
        if not (path / _DESCRIPTION).exists():
            if (path / "bundle").is_dir():
                return path / "bundle"
            if (path / "config.json").exists():
                raise BundleError(
                    f"{path} is a run without a bundle, which is written when training ends; start "
                    "the same training command again"
                )
    return path


def digest(path: str | os.PathLike[str]) -> str:
    """Returns the digest that identifies a bundle: the sha256 of its bundle.json.

    bundle.json contains the sha256 of the weights.

    Returns:
      64 hexadecimal digits. Two bundles with the same digest are equal bit for bit.

    Raises:
      BundleError: There is no bundle, or it cannot be read.
    """
    path = pathlib.Path(path)
    try:
        return file_sha256(path / _DESCRIPTION)
    except FileNotFoundError as error:
        raise MissingBundleError(f"{path} is not a bundle: there is no {error.filename}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def weights_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the sha256 of a bundle's weights, in hexadecimal.

    Raises:
      BundleError: There is no bundle, or it cannot be read.
    """
    path = pathlib.Path(path)
    try:
        return file_sha256(path / _WEIGHTS)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def file_sha256(path: pathlib.Path) -> str:
    """Returns the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
