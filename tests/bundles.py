"""Small bundles for tests, and registries of them."""

import dataclasses
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.splits import Division
from cnn_jax.inference.bundle import Bundle, write_bundle
from cnn_jax.models.network import make_model
from cnn_jax.registry.registry import Registry

MODEL = {"name": "cnn", "features": [4, 8], "dense": 16, "dropout": 0.5, "batch_norm": True}


def make_bundle(seed: int = 0, class_names: tuple[str, ...] = ("blue", "green", "red")) -> Bundle:
    """Returns a bundle with an untrained network for images of 16 x 16 pixels."""
    model = make_model(MODEL, len(class_names), "float32")
    return Bundle(
        model=MODEL,
        precision="float32",
        class_names=list(class_names),
        preprocessing=Preprocessing(image_size=(16, 16)),
        temperature=1.0,
        data={
            "source": "shapes",
            "division": json.loads(json.dumps(dataclasses.asdict(Division(rule="exact")))),
            "max_unreadable": 0.01,
            "allow_outside": False,
            "fingerprint": "0",
        },
        metrics={"test": {"accuracy": 0.5}},
        variables=model.init(jax.random.key(seed), jnp.zeros((1, 16, 16, 3))),
    )


def make_registry(folder: pathlib.Path, model: str) -> Registry:
    """Returns a registry with two versions of a model; version 1 is the champion."""
    registry = Registry(folder / "registry")
    for seed in (0, 1):
        write_bundle(make_bundle(seed), folder / str(seed))
        registry.add(model, folder / str(seed))
    registry.promote(model, 1)
    return registry


def encode_png(pixels: np.ndarray) -> bytes:
    """Returns an image, uint8 [height, width, 3], as the content of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
