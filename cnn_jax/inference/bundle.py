"""The bundle: a directory with everything that inference needs.

    bundle.json              everything except the arrays, and the sha256 of the other files
    weights.safetensors      parameters and batch statistics
    reference.safetensors    reference statistics for `cnn_jax monitor`, if the bundle has them

A bundle contains no code, and reading it needs no training code. An ensemble is a directory with
a bundle.json too; in place of the weights it has bundles, its members, in `members/0` and so on.
An exported model has a bundle.json and the files of its format. Importing this module does not
import JAX.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

import cnn_jax
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.inference.bundle_files import file_sha256, listed_files
from cnn_jax.models import NETWORKS
from cnn_jax.quality.reference import Reference
from cnn_jax.system.atomic import sync
from cnn_jax.system.errors import (
    COPY_FIRST,
    BundleError,
    ConfigError,
    MissingBundleError,
    file_errors,
    is_url,
    printable,
)

# The format of a bundle with reference statistics is 3, because earlier versions of this package
# refuse bundles with a file that they do not know. Other bundles and exported models have format 2,
# which these versions read.
FORMAT, _REFERENCE_FORMAT = 2, 3
_DESCRIPTION = "bundle.json"
_WEIGHTS = "weights.safetensors"
_REFERENCE = "reference.safetensors"


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
    variables: Any
    pretrained: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Bundles whose probabilities are averaged over views of each image.

    An ensemble of one member with several views is test-time augmentation.

    Attributes:
      members: The bundles, one or more, whose `preprocessing` may differ in mean and std only.
      flip: The axes along which images are also flipped, one of `schema.FLIPS`.
      shift: If this number of pixels is not 0, images are also shifted by it in four directions.
      class_names, preprocessing, data, metrics: See `Bundle`.
      temperature: The logarithms of the mean probabilities are divided by it before the softmax.
    """

    members: list[Bundle]
    flip: str
    shift: int
    class_names: list[str]
    preprocessing: Preprocessing
    temperature: float
    data: dict[str, Any]
    metrics: dict[str, Any]


def library_versions() -> dict[str, str]:
    """Returns the versions of this package and of the libraries that affect predictions."""
    names = ("jax", "jaxlib", "flax", "numpy", "pillow", "safetensors")
    # The version of this package is read from the code, because a package that is not installed has
    # no metadata.
    own = {"cnn_jax": cnn_jax.__version__}
    return own | {name: importlib.metadata.version(name) for name in names}


def write_bundle(
    bundle: Bundle, path: str | os.PathLike[str], reference: Reference | None = None
) -> None:
    """Writes a bundle to a directory.

    After a crash, the path contains either a complete bundle or no bundle. The written bytes are a
    function of the bundle and the library versions. Two processes must not write the same path at
    the same time.

    Args:
      bundle: The bundle.
      path: The directory for the bundle. An existing directory is replaced.
      reference: The reference statistics of the network.
    """
    import flax.traverse_util

    flat = flax.traverse_util.flatten_dict(bundle.variables, sep="/")
    # safetensors 0.8 scrambles arrays that are not contiguous, so arrays are converted to C
    # order. np.ascontiguousarray is not used, because it would convert a scalar to a vector.
    weights = {name: np.asarray(array, order="C") for name, array in flat.items()}
    files, description = {_WEIGHTS: safetensors.numpy.save(weights)}, describe(bundle)
    if reference is not None:
        files[_REFERENCE] = serialize_reference(reference)
        description["format"] = _REFERENCE_FORMAT
    write_folder(path, files, description)


def serialize_reference(reference: Reference, metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns the content of a safetensors file with reference statistics, and with metadata."""
    arrays = {name: np.asarray(array, order="C") for name, array in reference.arrays().items()}
    return safetensors.numpy.save(arrays, None if metadata is None else dict(metadata))


def write_ensemble(
    ensemble: Ensemble,
    members: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
) -> None:
    """Writes an ensemble to a directory, with exact copies of its members; see `write_bundle`.

    Args:
      ensemble: The ensemble.
      members: The directories of its members.
      path: The directory for the ensemble. An existing directory is replaced.
    """
    names = [f"members/{number}" for number in range(len(members))]
    files = {}
    for name, member in zip(names, map(pathlib.Path, members), strict=True):
        with reading(member):
            for file in (_DESCRIPTION, *listed_files(read_description(member))):
                files[f"{name}/{file}"] = (member / file).read_bytes()
    settings = {"members": names, "flip": ensemble.flip, "shift": ensemble.shift}
    write_folder(path, files, describe(ensemble) | {"ensemble": settings})


def describe(bundle: Bundle | Ensemble) -> dict[str, Any]:
    """Returns the content of a bundle.json, except its keys for the files and the members."""
    description = {"format": FORMAT} | {
        field.name: getattr(bundle, field.name)
        for field in dataclasses.fields(bundle)
        if field.name not in ("variables", "members", "flip", "shift")
    }
    if description.get("pretrained", True) is None:
        del description["pretrained"]
    description["preprocessing"] = dataclasses.asdict(bundle.preprocessing)
    description["versions"] = library_versions()
    return description


def _restore(replaced: pathlib.Path, path: pathlib.Path) -> None:
    """Moves a replaced folder back if its replacement was not completed."""
    if replaced.exists() and not path.exists():
        replaced.rename(path)


def write_folder(
    path: str | os.PathLike[str], files: Mapping[str, bytes], description: Mapping[str, Any]
) -> None:
    """Writes the folder of a bundle or an exported model; see `write_bundle`.

    Args:
      path: The folder. An existing folder is replaced.
      files: The content of each file, by its path in the folder, with "/" between folders.
      description: The content of bundle.json, without the sha256 of the files.
    """
    path = pathlib.Path(path).absolute()  # The path "." has no name.
    partial, replaced = (path.with_name(f".{path.name}.{name}") for name in ("partial", "replaced"))
    _restore(replaced, path)
    for remains_of_a_crash in (partial, replaced):
        shutil.rmtree(remains_of_a_crash, ignore_errors=True)
    sums = {name: {"sha256": hashlib.sha256(files[name]).hexdigest()} for name in files}
    text = json.dumps({**description, "files": sums}, indent=1, ensure_ascii=False, allow_nan=False)
    # Names may contain surrogates for bytes that are not UTF-8. Surrogates are written as JSON
    # escapes.
    encoded = (text + "\n").encode("utf-8", "backslashreplace")
    try:
        partial.mkdir(parents=True)
        for name, content in {**files, _DESCRIPTION: encoded}.items():
            file = partial / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file_errors(file):
                file.write_bytes(content)
            # Flush each file before the rename, so that a crash leaves no partial file.
            sync(file)
            sync(file.parent)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    finally:
        _restore(replaced, path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the bundle.json of a bundle or an exported model, and verifies the sha256 of all files.

    Raises:
      BundleError: There is no bundle.json, a file is damaged, or the format is another one.
    """
    path = pathlib.Path(path)
    with reading(path):
        description = json.loads((path / _DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] not in (FORMAT, _REFERENCE_FORMAT):
            raise BundleError(
                f"{path} is a bundle of format {description['format']}, and this version of "
                f"cnn_jax reads formats {FORMAT} and {_REFERENCE_FORMAT}; install the version of "
                "cnn_jax that wrote the bundle, or a later one"
            )
        for name, sha256 in listed_files(description).items():
            if file_sha256(path / name) != sha256:
                raise BundleError(
                    f"{path / name} is damaged: its sha256 differs from the recorded value"
                )
        return description


def read_preprocessing(description: Mapping[str, Any]) -> Preprocessing:
    """Returns the preprocessing in the content of a bundle.json."""
    preprocessing = description["preprocessing"]
    return Preprocessing(
        image_size=tuple(preprocessing["image_size"]),
        mean=tuple(preprocessing["mean"]),
        std=tuple(preprocessing["std"]),
        max_pixels=preprocessing["max_pixels"],
        # Older bundles lack some keys of the preprocessing. The default value of each key
        # is the behaviour of older versions of this package.
        **{key: preprocessing[key] for key in _ADDED_KEYS if key in preprocessing},
    )


def _common_fields(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that `Bundle` and `Ensemble` share, from the content of a bundle.json."""
    return {
        "class_names": description["class_names"],
        "preprocessing": read_preprocessing(description),
        "temperature": description["temperature"],
        "data": description["data"],
        "metrics": description["metrics"],
    }


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Reads a bundle and verifies the sha256 of its weights.

    Raises:
      BundleError: There is no bundle, or it is damaged, or it has another format.
    """
    path = pathlib.Path(path)
    description = read_description(path)
    with reading(path):
        if "export" in description:
            raise BundleError(
                f"{path} is an exported model, which has no weights for this purpose; name the "
                "bundle from which it was exported"
            )
        if "ensemble" in description:
            raise BundleError(
                f"{path} is an ensemble, which has several networks; name the bundle of a member, "
                f"such as {path / description['ensemble']['members'][0]}"
            )
        if description["files"].keys() - {_REFERENCE} != {_WEIGHTS}:
            raise ValueError(f"its files must be {_WEIGHTS} and, if it has one, {_REFERENCE}")
        _check_network(path, description["model"])
        # Flax imports JAX, which the server of an exported model does not need.
        import flax.traverse_util

        weights = safetensors.numpy.load_file(path / _WEIGHTS)
        return Bundle(
            model=description["model"],
            precision=description["precision"],
            **_common_fields(description),
            variables=flax.traverse_util.unflatten_dict(weights, sep="/"),
            pretrained=description.get("pretrained"),
        )


def read_networks(path: str | os.PathLike[str]) -> Bundle | Ensemble:
    """Reads a bundle or an ensemble, and verifies the sha256 of all weights.

    Raises:
      BundleError: There is neither, or it is damaged, or it has another format.
    """
    path = pathlib.Path(path)
    description = read_description(path)
    if "ensemble" not in description or "export" in description:
        return read_bundle(path)
    with reading(path):
        settings = description["ensemble"]
        if not settings["members"]:
            raise ValueError("its list of members is empty")
        for name in settings["members"]:
            if f"{name}/{_DESCRIPTION}" not in description["files"]:
                raise ValueError(f"its files do not include the member {name}")
        return Ensemble(
            members=[read_bundle(path / name) for name in settings["members"]],
            flip=settings["flip"],
            shift=settings["shift"],
            **_common_fields(description),
        )


def check_output(output: str | os.PathLike[str], kind: str) -> None:
    """Checks that a new export or ensemble would not overwrite other files in its folder.

    The report of an earlier ensemble may be replaced.

    Args:
      output: The folder to write.
      kind: The key of bundle.json that an earlier folder of the same kind has: "export" or
        "ensemble".

    Raises:
      ConfigError: The output is a file, or a folder with files of another kind.
    """
    output = pathlib.Path(output)
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"--output: {output} is a file; name a folder")
    if not any(output.iterdir()):
        return
    names = {str(path.relative_to(output)) for path in output.rglob("*") if not path.is_dir()}
    try:
        description = json.loads((output / _DESCRIPTION).read_text("utf-8"))
        known = {*listed_files(description), _DESCRIPTION} if kind in description else set()
        if kind == "ensemble" and known:
            known |= {name for name in names if pathlib.PurePath(name).parts[0] == "report"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = set()
    if foreign := sorted(names - known):
        wanted = {"export": "an exported model", "ensemble": "an ensemble"}[kind]
        raise ConfigError(
            f"--output: {output} has files that are not of {wanted}, such as "
            f"{printable(foreign[0])}; name another folder"
        )


def read_reference(path: str | os.PathLike[str]) -> Reference | None:
    """Returns the reference statistics of a bundle; None if the bundle has none.

    Raises:
      BundleError: There is no bundle, or it is damaged, or it has another format.
    """
    path = pathlib.Path(path)
    description = read_description(path)
    if _REFERENCE not in description["files"]:
        return None
    with reading(path):
        return Reference.from_arrays(safetensors.numpy.load_file(path / _REFERENCE))


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Converts the errors of reading a bundle to BundleError."""
    try:
        yield
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
      BundleError: The path is a URL, or a run without a bundle.
    """
    if is_url(os.fspath(path)):
        raise MissingBundleError(f"{path} is not a folder; {COPY_FIRST}")
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
    with reading(path):
        return file_sha256(path / _DESCRIPTION)


def weights_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the sha256 of a bundle's weights, in hexadecimal.

    Raises:
      BundleError: There is no bundle, or it cannot be read.
    """
    path = pathlib.Path(path)
    with reading(path):
        return file_sha256(path / _WEIGHTS)
