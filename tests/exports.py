"""Predictors and exports for the tests."""

import dataclasses
import functools
import json
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import onnxruntime
from bundles import make_bundle
from jax.extend import core
from networks import random_variables

from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.files import open_folder
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.splits import Division
from cnn_jax.export import exporter
from cnn_jax.export.function import flat_function
from cnn_jax.inference.bundle import write_bundle
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.models import NETWORKS
from cnn_jax.models.network import make_model
from cnn_jax.registry.registry import Registry

# The field values of a small network, by class name.
_SMALL = {
    "ResNet": {"blocks": (1, 1, 1, 1)},
    "EfficientNet": {"width": 0.2, "depth": 0.1},
    "ConvNeXt": {"blocks": (1, 1, 2, 1), "features": (8, 12, 16, 20)},
    "VisionTransformer": {"features": 24, "depth": 3},
}


def small_predictor(name, image_size=None, **section):
    """Returns the predictor of a small network with random variables."""
    section = {key: value.default for key, value in NETWORKS[name].keys.items()} | section
    section["name"] = name
    model = make_model(section, 3, "float32")
    model = model.clone(**_SMALL.get(type(model).__name__, {}))
    divisor = NETWORKS[name].size_divisor(section)
    size = image_size or 2 * (max(24 // divisor * divisor, divisor),)
    preprocessing = Preprocessing(size, (120.0, 110.0, 100.0), (60.0, 50.0, 55.0))
    bundle = dataclasses.replace(make_bundle(), preprocessing=preprocessing, temperature=1.7)
    predictor = BundlePredictor.__new__(BundlePredictor)
    for field in ("class_names", "preprocessing", "temperature", "data", "metrics"):
        setattr(predictor, field, getattr(bundle, field))
    predictor.model = model
    predictor.variables = random_variables(model, jnp.zeros((1, *size, 3)))
    return predictor


class Case(NamedTuple):
    """A small network, its flat function, seven images, and the probabilities of the predictor."""

    predictor: BundlePredictor
    function: core.ClosedJaxpr
    images: np.ndarray
    expected: np.ndarray


@functools.cache
def network_case(name):
    """Returns the `Case` of a network; the result is cached, because several tests use it."""
    predictor = small_predictor(name)
    images = random_images(predictor, 7)
    return Case(predictor, flat_function(predictor), images, predictor(images))


def random_images(predictor, count):
    """Returns random images of the predictor's size."""
    shape = (count, *predictor.preprocessing.image_size, 3)
    return np.random.default_rng(count).integers(0, 256, shape, np.uint8)


def check_rounded(probabilities, expected, limit=0.25):
    """Checks that the error of an 8-bit model is small beside the differences between images.

    For ranges of half the right size, the error of every network is above the limit.
    """
    logs = np.log(expected)
    error = np.sqrt(np.mean((np.log(np.maximum(probabilities, 1e-9)) - logs) ** 2))
    assert 0 < error < limit * np.sqrt(np.mean((logs - logs.mean(0)) ** 2)) + 0.003


def run_onnx(model, **inputs):
    """Returns the first output of an ONNX model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)[0]


def write_export(folder, images):
    """Exports a test bundle to ONNX, and returns the folder of the export."""
    exporter.export(write_test_bundle(folder / "bundle", images), folder / "onnx")
    return folder / "onnx"


def registry_with(exported, folder):
    """Returns a registry in which an export is version 1 of the model "shapes"."""
    registry = Registry(folder / "registry")
    registry.add("shapes", exported)
    return registry


def write_test_bundle(path, folder, **changes):
    """Writes a bundle with an untrained network for the images of a folder."""
    bundle = make_bundle()
    division = Division(rule="exact")
    dataset = open_dataset(open_folder(folder), division, bundle.preprocessing)
    data = {
        **bundle.data,
        "source": f"folder:{folder}",
        "division": json.loads(json.dumps(dataclasses.asdict(division))),
        "fingerprint": dataset.fingerprint,
    }
    write_bundle(dataclasses.replace(bundle, **{"data": data, **changes}), path)
    return path
