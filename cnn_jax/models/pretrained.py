"""Reads pretrained weights from the Hugging Face hub, a safetensors file, a bundle or a run."""

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from cnn_jax.config.schema import PREPROCESSING_KEYS
from cnn_jax.data.preprocessing import INTERPOLATIONS
from cnn_jax.inference.bundle import (
    file_sha256,
    find_bundle,
    read_bundle,
    weights_sha256,
)
from cnn_jax.models import NETWORKS, hub
from cnn_jax.system.errors import (
    BundleError,
    ConfigError,
    MissingBundleError,
    WeightsError,
    printable,
)

# A mapping from the values of timm's `crop_mode` to the equivalent values of `data.resize`.
_CROP_MODES = {"center": "crop", "squash": "stretch", "border": "pad"}
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")


@dataclasses.dataclass(frozen=True)
class PretrainedWeights:
    """The pretrained weights of a network and their metadata.

    Attributes:
      source: A name that always means these weights: OWNER/NAME@COMMIT for a model on the hub,
        else an absolute path.
      sha256: The sha256 of the file with the weights.
      license: The licence, such as "apache-2.0"; empty if it is unknown.
      architecture: The name of the network, as in `NETWORKS` and in timm; empty if it is unknown.
      preprocessing: The preprocessing with which the network was trained: the known values of
        `PREPROCESSING_KEYS`.
      class_names: The classes of the head in their order; None if they are unknown.
      variables: {"params", "batch_stats"} of the network, arrays on the host.
    """

    source: str
    sha256: str
    license: str
    architecture: str
    preprocessing: dict[str, Any]
    class_names: list[str] | None
    variables: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Returns the metadata that a run and its bundle store, as JSON types."""
        names = ("source", "sha256", "license", "architecture", "preprocessing")
        return json.loads(json.dumps({name: getattr(self, name) for name in names}))


def open_weights(name: str, key: str = "model.pretrained") -> PretrainedWeights:
    """Reads pretrained weights, and downloads them if necessary.

    Args:
      name: A model on the Hugging Face hub (OWNER/NAME or OWNER/NAME@REVISION), the path of a
        safetensors file, or the path of a bundle or of a run with a bundle. An existing path is
        not searched on the hub. The file config.json beside a safetensors file is read if it
        exists; it has the form of those on the hub.
      key: The configuration key that has this value, for messages. Only "model.pretrained" may
        have a model on the hub.

    Raises:
      ConfigError: There are no such weights, or they have another form.
      WeightsError: The weights cannot be downloaded now, or are damaged.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_dir() and (path / "model.safetensors").is_file():
        path = path / "model.safetensors"  # The folder is a copy of a model on the hub.
    if path.is_dir() or key != "model.pretrained":
        return _open_bundle(path.resolve(), key)
    if path.suffix.lower() in _PICKLES:
        raise ConfigError(
            f"config.{key}: {name} is a pickle of PyTorch, which can run code when it is read; "
            "convert it where PyTorch is installed: safetensors.torch.save_file(torch.load"
            f"({path.name!r}, weights_only=True), 'model.safetensors')"
        )
    if path.is_file():
        return _open_file(path.resolve())
    if hub.is_model_id(name):
        return _open_hub_model(name)
    advice = f"; did you mean timm/{name}?" if re.fullmatch(r"\w+\.\w+", name) else ""
    raise ConfigError(
        f"config.{key}: there is no file {name}{advice or ', and it is not OWNER/NAME'}"
    )


def _open_hub_model(name: str) -> PretrainedWeights:
    model = hub.download(name)
    return PretrainedWeights(
        source=model.name,
        sha256=model.sha256,
        variables=_read_state_dict(model.weights),
        **_read_description(model.config, model.license),
    )


def _open_file(path: pathlib.Path) -> PretrainedWeights:
    config: Any = {}
    if (path.parent / "config.json").is_file():
        try:
            config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"config.model.pretrained: {path.parent / 'config.json'} cannot be read: {error}"
            ) from error
    variables = _read_state_dict(path)
    return PretrainedWeights(
        source=str(path),
        sha256=file_sha256(path),
        variables=variables,
        **_read_description(config if isinstance(config, dict) else {}),
    )


def _open_bundle(path: pathlib.Path, key: str) -> PretrainedWeights:
    """Reads the weights of a bundle; the path is a bundle or a run with a bundle.

    Raises:
      ConfigError: There is no bundle at the path, or it is damaged.
    """
    try:
        folder = find_bundle(path)
        bundle = read_bundle(folder)
        sha256 = weights_sha256(folder)
    except MissingBundleError as error:
        others = "model.safetensors or " if key == "model.pretrained" else ""
        raise ConfigError(f"config.{key}: {path} has no {others}bundle.json") from error
    except BundleError as error:
        raise ConfigError(f"config.{key}: {error}") from error
    values = dataclasses.asdict(bundle.preprocessing)
    return PretrainedWeights(
        source=str(path),
        sha256=sha256,
        license=(bundle.pretrained or {}).get("license", ""),
        architecture=bundle.model["name"],
        preprocessing={name: values[name] for name in PREPROCESSING_KEYS},
        class_names=bundle.class_names,
        variables=bundle.variables,
    )


def check_network(weights: PretrainedWeights, network: str, key: str = "model.pretrained") -> None:
    """Raises ConfigError if weights are known to belong to another network.

    Args:
      weights: The weights.
      network: The value of `model.name`.
      key: The configuration key that names the weights, for messages.

    Raises:
      ConfigError: The weights are weights of another network; the message names it.
    """
    architecture = weights.architecture
    if architecture in ("", network):
        return
    if architecture in NETWORKS:
        raise ConfigError(
            f"config.model.name: must be {architecture} for the weights in {key}, "
            f"{weights.source}, got {network}"
        )
    known = ", ".join(name for name in NETWORKS if "pretrained" in NETWORKS[name].keys)
    raise ConfigError(
        f"config.{key}: {weights.source} has weights of the network {architecture}, which "
        f"cnn_jax does not have; it has {known}"
    )


def current_sha256(source: str) -> str | None:
    """Returns the current sha256 of the file that contains the weights.

    Args:
      source: `PretrainedWeights.source`.

    Returns:
      The sha256 in hexadecimal. None for a model on the hub, which a commit identifies, and for
      a path without weights.
    """
    path = pathlib.Path(source)
    if not path.is_absolute():
        return None
    with contextlib.suppress(BundleError, FileNotFoundError):
        return file_sha256(path) if path.is_file() else weights_sha256(find_bundle(path))
    return None


def _read_state_dict(path: pathlib.Path) -> dict[str, Any]:
    """Reads a safetensors file with the state dict of a network.

    Raises:
      WeightsError: The file is damaged, or is not a safetensors file.
    """
    try:
        state = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"config.model.pretrained: {path} is damaged, or not a safetensors file: "
            f"{printable(str(error))}; copy or download it again"
        ) from error
    return convert(state)


def _read_description(config: Mapping[str, Any], card_license: str = "") -> dict[str, Any]:
    """Extracts the metadata from the content of a model's config.json.

    Args:
      config: The content of config.json, as timm writes it. Older files have the values of
        "pretrained_cfg" at the top.
      card_license: The licence in the model card, which is used if config.json has none.

    Returns:
      The fields "architecture", "license", "preprocessing" and "class_names" of
      `PretrainedWeights`.
    """
    details = config.get("pretrained_cfg")
    details = details if isinstance(details, dict) else config
    names: Any = config.get("label_names") or details.get("label_names")
    has_names = isinstance(names, list) and len(names) == config.get("num_classes")
    return {
        "architecture": str(config.get("architecture") or details.get("architecture") or ""),
        "license": str(card_license or details.get("license") or ""),
        "preprocessing": _read_preprocessing(details),
        "class_names": [str(name) for name in names] if has_names else None,
    }


def _read_preprocessing(details: Mapping[str, Any]) -> dict[str, Any]:
    """Converts timm's `pretrained_cfg` to values of `PREPROCESSING_KEYS`; skips unknown values.

    timm divides grey levels by 255 before it subtracts the mean.
    """
    values: dict[str, Any] = {}
    size: Any = details.get("input_size")
    if _is_numbers(size, 3):
        values["image_size"] = tuple(size[1:])
    for name in ("mean", "std"):
        if _is_numbers(details.get(name), 3):
            values[name] = tuple(round(255 * value, 4) for value in details[name])
    resize = _CROP_MODES.get(details.get("crop_mode", "center"))
    if "crop_pct" in details and resize is not None:
        values["resize"] = resize
        values["crop_ratio"] = float(details["crop_pct"]) if resize == "crop" else 1.0
    if details.get("interpolation") in INTERPOLATIONS:
        values["interpolation"] = details["interpolation"]
    return values


def _is_numbers(value: Any, length: int) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) == length
    return is_list and all(isinstance(number, int | float) for number in value)


_STATISTICS = {"running_mean": "mean", "running_var": "var"}


def convert(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts a state dict of timm or torchvision to the variables of a network.

    A number in a name joins the name before it, and the last name says which array it is:
    "layer1.0.conv1.weight" becomes ["params"]["layer1_0"]["conv1"]["kernel"]. The classifier
    ("fc", "classifier" or "head.fc") becomes "head", and "head.norm" becomes "norm".

    Args:
      state: Arrays by name. Kernels have the shape [out, in] or [out, in, height, width].

    Returns:
      {"params", "batch_stats"} as nested dictionaries of float32 arrays; "batch_stats" only if
      there are statistics. Kernels have the shape [in, out] or [height, width, in, out].
    """
    variables: dict[tuple[str, ...], np.ndarray] = {}
    for name, array in state.items():
        name = re.sub(r"^(fc|classifier|head\.fc)\.", "head.", name)
        name = re.sub(r"^head\.norm\.", "norm.", name)
        *layers, last = re.sub(r"\.(\d+)(?=\.)", r"_\1", name).split(".")
        array = np.asarray(array, np.float32)
        if last == "num_batches_tracked":
            continue
        if last == "weight" and array.ndim > 1:
            last, array = "kernel", array.transpose(*range(2, array.ndim), 1, 0)
        elif last == "weight":
            last = "scale"
        collection = "batch_stats" if last in _STATISTICS else "params"
        variables[(collection, *layers, _STATISTICS.get(last, last))] = array
    return unflatten_dict(variables)
