"""Pretrained weights for the networks that timm publishes."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

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
