"""Compares compressed networks with their originals in ONNX Runtime: accuracy, bytes and time.

    pip install -e '.[onnx]'
    cnn_jax train --workdir=runs/first
    cnn_jax compress --bundle=runs/first --keep=0.3 --workdir=runs/small
    python experiments/benchmarks/bench_compress.py --pairs runs/first:runs/small ...
        [--size=224] [--repeats=15] [--converter_python=PYTHON]

The time is CPU time of one thread in milliseconds for one image of --size pixels, for the first
pair. All models take turns, and the median counts. "80 % zeros" is the original network with the
smallest 80 % of the weights of each kernel set to zero. The last rows are networks with random
weights and other numbers of channels in the first convolution.

The accuracies are those of the test split. The bytes are those of the models for the image size of
the bundles. LiteRT's 8-bit model needs --converter_python; see docs/export.md.
"""

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import one_thread_session, seconds_in_turns

from cnn_jax.compress.prune import with_widths
from cnn_jax.export.exporter import export
from cnn_jax.export.function import flat_function
from cnn_jax.export.onnx_model import images_model
from cnn_jax.export.quantize import quantize
from cnn_jax.inference.bundle import Bundle, find_bundle, read_bundle
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.models.network import make_model

_ZEROS = 0.8
# The channels of the first convolution of the networks with random weights.
_WIDTHS = (16, 20, 24, 28, 32)


def show_models(path: str, converter_python: str | None) -> None:
    """Prints the test accuracy and the bytes of a bundle and of its exported models."""
    bundle = read_bundle(find_bundle(path))
    print(f"{path}: widths {bundle.model['features']} and {bundle.model['dense']}")
    print(f"  bundle: accuracy {bundle.metrics['test']['accuracy']:.2%}")
    forms: list[tuple[str, dict[str, Any]]] = [("onnx", {}), ("onnx", {"int8": True})]
    if converter_python is not None:
        forms.append(("litert", {"int8": True, "converter_python": converter_python}))
    for file_format, options in forms:
        with tempfile.TemporaryDirectory() as folder:
            certificate = export(path, folder, file_format, max_loss=1.0, **options)
        comparison = certificate["comparison"]["test"]
        print(
            f"  {file_format}{' int8' * certificate['int8']}: "
            f"{certificate['bytes'][certificate['model']]:,} bytes, "
            f"accuracy {comparison['after']['accuracy']:.2%}, "
            f"agreement {comparison['agreement']:.2%}"
        )


def with_zeros(bundle: Bundle) -> Bundle:
    """Returns a bundle in which most of the weights of each kernel are zero."""

    def prune(path: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
        if path[-1].key != "kernel":
            return leaf
        return np.where(np.abs(leaf) < np.quantile(np.abs(leaf), _ZEROS), 0, leaf)

    return dataclasses.replace(bundle, variables=jax.tree.map_with_path(prune, bundle.variables))


def with_random_weights(bundle: Bundle, widths: Mapping[str, int], size: int) -> Bundle:
    """Returns a copy of a bundle with the given numbers of channels and random weights."""
    section = with_widths(bundle.model, widths)
    model = make_model(section, len(bundle.class_names), "float32")
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    return dataclasses.replace(bundle, model=section, variables=variables)


def make_sessions(bundle: Bundle, size: int) -> list[Any]:
    """Returns sessions of the float32 and the 8-bit model of a bundle for another image size."""
    preprocessing = dataclasses.replace(bundle.preprocessing, image_size=(size, size))
    predictor = BundlePredictor(dataclasses.replace(bundle, preprocessing=preprocessing))
    model = images_model(flat_function(predictor), predictor)
    images = np.random.default_rng(0).integers(0, 256, (8, size, size, 3), np.uint8)
    models = (model, quantize(model, [images]))
    return [one_thread_session(model.SerializeToString()) for model in models]


def show_times(bundles: Mapping[str, Bundle], size: int, repeats: int) -> None:
    """Prints the CPU time of each bundle's models, and the ratio to the first bundle's models."""
    images = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    actions = {
        (name, kind): functools.partial(session.run, None, {"images": images})
        for name, bundle in bundles.items()
        for kind, session in enumerate(make_sessions(bundle, size))
    }
    seconds = seconds_in_turns(actions, repeats, time.process_time)
    medians = 1000 * np.median(list(seconds.values()), axis=1).reshape(-1, 2)
    print(f"{size} pixels | float32 ms | ratio | int8 ms | ratio", flush=True)
    for name, own in zip(bundles, medians, strict=True):
        ratios = medians[0] / own
        print(f"{name} | {own[0]:.2f} | {ratios[0]:.2f} | {own[1]:.2f} | {ratios[1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", required=True, metavar="ORIGINAL:COMPRESSED")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--converter_python")
    flags = parser.parse_args()
    pairs = [pair.split(":") for pair in flags.pairs]
    original, compressed = (read_bundle(find_bundle(path)) for path in pairs[0])
    bundles = {
        "original": original,
        "80 % zeros": with_zeros(original),
        "compressed": compressed,
        **{
            f"channels {width}, 32, 64": with_random_weights(
                original, {"conv1": width, "conv2": 32, "conv3": 64, "embedding": 128}, flags.size
            )
            for width in _WIDTHS
        },
    }
    show_times(bundles, flags.size, flags.repeats)
    for pair in pairs:
        for path in pair:
            show_models(path, flags.converter_python)


if __name__ == "__main__":
    main()
