"""Writes the reference outputs of timm's networks for `tests/models/test_timm.py`.

    python experiments/checks/reference_logits.py [NAME ...]

needs torch and timm. For each network of `NETWORKS` it writes
`tests/models/references/NAME.json.gz`: the shapes of timm's state dict, and the logits and the
mean of a stage for a random image. The state dict is not stored, because `random_state` makes it
again from its shapes. This module therefore imports only NumPy until `main` runs.
"""

import argparse
import dataclasses
import functools
import gzip
import importlib.util
import json
import pathlib
import re
import sys
import unittest.mock
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

REFERENCES = pathlib.Path(__file__).parents[2] / "tests" / "models" / "references"
NUM_CLASSES = 10
_TORCHVISION = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models.feature_extraction",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The input and the compared stage of a network.

    Attributes:
      stage: The name of a module in timm whose output is a feature map [batch, channel, height,
        width], or tokens [batch, token, channel], of which the first is the class token.
      image_size: The height and the width of the image.
      arguments: Arguments of `timm.create_model`.
    """

    stage: str
    image_size: tuple[int, int] = (64, 64)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# The sides of the images are even, because "SAME" and symmetric padding are equal for odd sides if
# the stride is 2.
NETWORKS = {
    "resnet18": Reference("layer2"),
    "resnet34": Reference("layer3", (32, 64)),
    "resnet50": Reference("layer2"),
    "efficientnet_b0": Reference("blocks.2"),
    "tf_efficientnet_b0": Reference("blocks.2"),
    "efficientnet_lite0": Reference("blocks.2"),
    "tf_efficientnet_lite0": Reference("blocks.2"),
    "efficientnet_lite1": Reference("blocks.4", (32, 64)),
    "tf_efficientnet_lite1": Reference("blocks.4", (32, 64)),
    "efficientnet_lite2": Reference("blocks.4", (32, 64)),
    "tf_efficientnet_lite2": Reference("blocks.4", (32, 64)),
    "convnext_tiny": Reference("stages.2"),
    # The position embeddings, a grid of 37 x 37 patches, are interpolated to 4 x 6 patches.
    "vit_small_patch14_dinov2": Reference("blocks.8", (56, 84), {"dynamic_img_size": True}),
}


def random_image(image_size: tuple[int, int]) -> np.ndarray:
    """Returns a normalised random image, float32 [1, height, width, 3]."""
    return np.random.default_rng(0).normal(size=(1, *image_size, 3)).astype(np.float32)


def random_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns random values for a state dict; each array depends only on its name and its shape.

    Kernels keep the order of magnitude of the activations. The statistics of BatchNorm and the
    scales are far from 0 and 1.
    """
    return {name: _random_array(name, tuple(shape)) for name, shape in shapes.items()}


def _random_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("weight"):
        return rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)
    return rng.normal(0, 0.2, shape).astype(np.float32)


def load_reference(name: str) -> dict[str, Any]:
    """Returns the stored result of `make_reference` for a network."""
    return json.loads(gzip.decompress((REFERENCES / f"{name}.json.gz").read_bytes()))


def main() -> None:
    """Writes the references of the networks that the command line names, or of all networks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *NETWORKS])
    for name in parser.parse_args().names or NETWORKS:
        reference = make_reference(name)
        path = REFERENCES / f"{name}.json.gz"
        path.write_bytes(gzip.compress(json.dumps(reference).encode(), mtime=0))
        logits = np.asarray(reference["logits"])
        print(f"{path.name}: {path.stat().st_size} bytes, logits {logits.round(2).tolist()}")


def make_reference(name: str) -> dict[str, Any]:
    """Returns the shapes of a network's state dict, its logits, and the mean of a stage."""
    import torch  # pyright: ignore

    timm = import_timm()
    reference = NETWORKS[name]
    model = timm.create_model(name, num_classes=NUM_CLASSES, **reference.arguments).eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = random_state(shapes)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    outputs: list[torch.Tensor] = []
    stage = model.get_submodule(reference.stage)
    stage.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    image = torch.from_numpy(random_image(reference.image_size)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = model(image)
    (maps,) = outputs
    mean = maps.mean((2, 3)) if maps.ndim == 4 else maps[:, 1:].mean(1)
    return {
        "image_size": reference.image_size,
        "shapes": shapes,
        "logits": logits.tolist(),
        "stage": re.sub(r"\.(\d+)", r"_\1", reference.stage),
        "stage_mean": mean.tolist(),
    }


@functools.cache
def import_timm() -> Any:
    """Imports timm; replaces torchvision by mock modules if torchvision is not installed.

    timm imports torchvision, but none of the compared networks uses torchvision.
    """
    if importlib.util.find_spec("torchvision") is None:
        for name in _TORCHVISION:
            sys.modules[name] = unittest.mock.MagicMock()
        layer = type("FrozenBatchNorm2d", (), {})
        setattr(sys.modules["torchvision.ops.misc"], layer.__name__, layer)
    return importlib.import_module("timm")


if __name__ == "__main__":
    main()
