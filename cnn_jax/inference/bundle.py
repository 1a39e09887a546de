"""The bundle: a directory that holds all that inference needs.

    bundle.json            everything but the weights, and a sha256 of each other file
    weights.safetensors    parameters and running statistics

Nothing in it is executable, and reading it needs no training code.
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
from cnn_jax.system.atomic import sync
from cnn_jax.system.errors import BundleError, MissingBundleError, file_errors

FORMAT = 2
_DESCRIPTION = "bundle.json"
_WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A trained network with everything that gives its outputs a meaning.

    Attributes:
      model: The `model` section of the configuration.
      precision: "float32" or "bfloat16": the arithmetic it was trained with.
      class_names: In the order of the network's outputs.
      preprocessing: How an image becomes an input.
      temperature: The logits are divided by it before the softmax.
      data: Source, split fractions, split seed and fingerprint of the data the
        network was trained on.
      metrics: Accuracy, precision, recall, F1 and loss by split.
      variables: {"params": ..., "batch_stats": ...}, arrays.
    """

    model: dict[str, Any]
    precision: str
    class_names: list[str]
    preprocessing: Preprocessing
    temperature: float
    data: dict[str, Any]
    metrics: dict[str, Any]
    variables: PyTree


def library_versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "numpy", "pillow", "safetensors")
    # Its own is asked of the package: it need not be installed to be run.
    own = {"cnn_jax": cnn_jax.__version__}
    return own | {name: importlib.metadata.version(name) for name in names}


def write_bundle(bundle: Bundle, path: str | os.PathLike[str]) -> None:
    """Writes a bundle: complete or, after a crash, not at all.

    The bytes are a function of the bundle and the library versions. No two
    processes may write the same bundle at the same time.
    """
    path = pathlib.Path(path)
    aside, replaced = (path.with_name(f".{path.name}.{name}") for name in ("partial", "replaced"))
    for left_by_a_crash in (aside, replaced):
        shutil.rmtree(left_by_a_crash, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        flat = flax.traverse_util.flatten_dict(bundle.variables, sep="/")
        # safetensors 0.8 writes the memory of other arrays as it lies there. (Not
        # ascontiguousarray, which makes a vector of a scalar.)
        weights = {name: np.asarray(array, order="C") for name, array in flat.items()}
        with file_errors(aside / _WEIGHTS):
            (aside / _WEIGHTS).write_bytes(safetensors.numpy.save(weights))
        description = {"format": FORMAT} | {
            field.name: getattr(bundle, field.name)
            for field in dataclasses.fields(bundle)
            if field.name != "variables"
        }
        description["preprocessing"] = dataclasses.asdict(bundle.preprocessing)
        description["versions"] = library_versions()
        description["files"] = {_WEIGHTS: {"sha256": _sha256(aside / _WEIGHTS)}}
        text = json.dumps(description, indent=1, ensure_ascii=False, allow_nan=False)
        # A name that is not UTF-8 has surrogates, which become JSON's own escapes.
        with file_errors(aside / _DESCRIPTION):
            (aside / _DESCRIPTION).write_text(text + "\n", "utf-8", "backslashreplace")
        for file in (aside / _WEIGHTS, aside / _DESCRIPTION, aside):
            sync(file)  # A rename may come to the disk before what is renamed.
        if path.exists():
            path.rename(replaced)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Reads a bundle and verifies the sha256 of each of its files.

    Raises:
      BundleError: No bundle is there, it is damaged, or of a later format.
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
            raise ValueError(f"its files must be {_WEIGHTS} alone")
        if _sha256(path / _WEIGHTS) != description["files"][_WEIGHTS]["sha256"]:
            raise BundleError(f"{path / _WEIGHTS} is damaged: its sha256 is not the recorded one")
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
                # Bundles written before this key have none.
                white_level=preprocessing.get("white_level", 0.0),
            ),
            temperature=description["temperature"],
            data=description["data"],
            metrics=description["metrics"],
            variables=flax.traverse_util.unflatten_dict(weights, sep="/"),
        )
    except FileNotFoundError as error:
        raise MissingBundleError(f"{path} is not a bundle: there is no {error.filename}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise BundleError(f"{path} is not a bundle: {error!r}") from error


def find_bundle(path: str | os.PathLike[str]) -> pathlib.Path:
    """The bundle that a path names: the directory itself, or `bundle/` in a run's directory.

    Raises:
      BundleError: The path is a run that has no bundle yet.
    """
    path = pathlib.Path(path)
    with contextlib.suppress(OSError):  # `read_bundle` says what is wrong.
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
    """What a bundle is known by: the sha256 of its description, which has that of its weights.

    Returns:
      64 hexadecimal digits. Two bundles with the same are the same to the bit.

    Raises:
      BundleError: No bundle is there, or it cannot be read.
    """
    path = pathlib.Path(path)
    try:
        return _sha256(path / _DESCRIPTION)
    except FileNotFoundError as error:
        raise MissingBundleError(f"{path} is not a bundle: there is no {error.filename}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
