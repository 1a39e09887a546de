"""Small bundles for tests."""

import dataclasses
import json

import jax
import jax.numpy as jnp

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.splits import Division
from cnn_jax.inference.bundle import Bundle
from cnn_jax.models.network import make_model

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
