"""Tests of runs that start from pretrained weights."""

import hashlib
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from cnn_jax import models
from cnn_jax.config import schema
from cnn_jax.config.keys import choice
from cnn_jax.inference.bundle import read_bundle
from cnn_jax.models.network import Backbone
from cnn_jax.models.pretrained import PretrainedWeights, convert
from cnn_jax.report.run_report import write_report
from cnn_jax.system.errors import ConfigError
from cnn_jax.training import initial_weights, sharding
from cnn_jax.training.loop import train_and_evaluate
from cnn_jax.training.step import TrainState

CONFIG = ConfigDict(
    {
        "model": {"name": "resnet18", "pretrained": "a/b@0"},
        "checkpoint": {"init_from": ""},
    }
)
STATE_DICT = {
    "conv1.weight": (8, 3, 2, 2),
    "bn1.weight": (8,),
    "bn1.bias": (8,),
    "bn1.running_mean": (8,),
    "bn1.running_var": (8,),
    "bn1.num_batches_tracked": (),
    "fc.weight": (5, 8),
    "fc.bias": (5,),
}


def _state_dict(**changes):
    rng = np.random.default_rng(0)
    shapes = STATE_DICT | {name.replace("__", "."): shape for name, shape in changes.items()}
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
        if shape is not None
    }


def _weights(state_dict, class_names=None):
    variables = convert(state_dict)
    return PretrainedWeights("a/b@0", "0", "", "resnet18", {}, class_names, variables)


def _state(classes, head_inputs=8):
    """A state in which large parameters are split over devices, and small ones are replicated."""
    variables = convert(_state_dict(fc__weight=(classes, head_inputs), fc__bias=(classes,)))
    mesh = sharding.make_mesh(jax.device_count())

    def put(array):
        spec = [None] * (array.ndim - 1) + ["model"] if array.ndim == 4 else []
        return jax.device_put(0 * array, NamedSharding(mesh, PartitionSpec(*spec)))

    variables = jax.tree.map(put, variables)
    return TrainState(jnp.zeros((), jnp.int32), variables["params"], variables["batch_stats"], ())


def test_everything_but_the_head_is_copied_with_the_shardings_of_the_state():
    state, weights = _state(classes=2), _weights(_state_dict())
    new, description = initial_weights.start_from(weights, CONFIG, state, ["cat", "dog"])
    expected = weights.variables
    for part in ("conv1", "bn1"):
        jax.tree.map(np.testing.assert_array_equal, new.params[part], expected["params"][part])
    jax.tree.map(np.testing.assert_array_equal, new.batch_stats, expected["batch_stats"])
    assert jax.tree.map(lambda a: a.sharding, new) == jax.tree.map(lambda a: a.sharding, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert not np.any(new.params["head"]["kernel"])
    assert description == (
        "a/b@0, all weights except head: new classes (the weights have 5 classes without names)"
    )


def test_the_head_is_copied_if_the_classes_are_the_same():
    names = ["a", "b", "c", "d", "e"]
    weights = _weights(_state_dict(), names)
    new, description = initial_weights.start_from(weights, CONFIG, _state(5), names)
    assert description == "a/b@0, all weights"
    kernel = new.params["head"]["kernel"]
    np.testing.assert_array_equal(kernel, weights.variables["params"]["head"]["kernel"])
    # Class names in a different order are treated as new classes.
    new, description = initial_weights.start_from(weights, CONFIG, _state(5), names[::-1])
    assert description.endswith("except head: new classes (the weights have 5 classes)")
    assert not np.any(new.params["head"]["kernel"])
    # This head has 24 inputs instead of 8, as if it received the features of all stages.
    _, description = initial_weights.start_from(weights, CONFIG, _state(5, 24), names)
    assert description.endswith("except head: another embedding")


def test_weights_without_a_head():
    weights = _weights(_state_dict(fc__weight=None, fc__bias=None))
    _, description = initial_weights.start_from(weights, CONFIG, _state(2), ["cat", "dog"])
    assert description.endswith("except head: the weights have no head")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn1__bias": None}, "a/b@0 does not fit the network resnet18: 1 missing (bn1/bias)"),
        (
            {"bn1__running_mean": None, "bn1__running_var": None, "bn1__weight": (4,)},
            "2 missing (bn1/mean, bn1/var); 1 of another shape (bn1/scale is 4 instead of 8)",
        ),
        (
            {f"layer1__{i}__conv1__weight": (8, 8, 1, 1) for i in range(9)},
            "9 unused (layer1_0/conv1/kernel, layer1_1/conv1/kernel, ...)",
        ),
        (
            {"conv1__weight": (8, 1, 2, 2)},
            "its images have 1 channel (conv1/kernel is 2 x 2 x 1 x 8), and cnn_jax trains on "
            "images with 3 channels; choose other weights",
        ),
        (
            {"conv1__weight": (8, 12, 2, 2)},
            "its images have 12 channels (conv1/kernel is 2 x 2 x 12 x 8)",
        ),
        (
            {"conv1__weight": (8, 3, 7, 7)},
            "1 of another shape (conv1/kernel is 7 x 7 x 3 x 8 instead of 2 x 2 x 3 x 8)",
        ),
    ],
)
def test_weights_of_another_network_are_one_line(changes, message):
    weights = _weights(_state_dict(**changes))
    with pytest.raises(ConfigError) as caught:
        initial_weights.start_from(weights, CONFIG, _state(2), ["cat", "dog"])
    assert str(caught.value).startswith("config.model.pretrained: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class Tiny(Backbone):
    """A backbone with one convolution."""

    first_layer = ("conv1",)
    embedding_is_mean_map = True

    @property
    def stage_names(self):
        return ("conv1", "embedding", "logits")

    @nn.nowrap
    def find_stage(self, layer):
        return {"head": "logits"}.get(layer, "conv1")

    @nn.nowrap
    def add_stages(self, x, stages, *, train):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv1")(x))
        self.classify(stages, stages.add("conv1", x).mean((1, 2)), train=train)


@pytest.fixture
def tiny_network(monkeypatch):
    """Registers `Tiny` as the network "tiny" during a test."""
    tiny = models.NetworkEntry(f"{__name__}:Tiny", models._BACKBONE_KEYS)
    monkeypatch.setitem(models.NETWORKS, "tiny", tiny)
    names = choice("cnn", "The network.", tuple(models.NETWORKS))
    monkeypatch.setitem(schema._SECTIONS["model"], "name", names)
    schema.keys.cache_clear()
    yield
    monkeypatch.undo()
    schema.keys.cache_clear()


def _run_config(image_folder, weights, **changes):
    config = schema.default_config("tiny")
    config.update_from_flattened_dict(
        {
            "data.source": f"folder:{image_folder}",
            "model.pretrained": str(weights),
            "train.epochs": 1,
            "train.batch_size": 8,
            "optimizer.learning_rate": 1e-12,
            "optimizer.final_learning_rate": 1e-12,
            **changes,
        }
    )
    return config


def test_a_run_from_a_file_records_the_weights(tiny_network, image_folder, tmp_path, capfd):
    kernel = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    state_dict = {"conv1.weight": kernel, "conv1.bias": np.zeros(4, np.float32)}
    details = {"input_size": [3, 24, 24], "crop_pct": 0.875, "mean": [0.2, 0.2, 0.2]}
    details |= {"std": [0.1, 0.2, 0.3], "license": "mit"}
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "tiny", "pretrained_cfg": details})
    )
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(state_dict, file)
    config, workdir = _run_config(image_folder, file), tmp_path / "run"
    train_and_evaluate(config, workdir)

    text = capfd.readouterr().err
    assert f"{file}, licence: mit" in text
    assert "image_size 24" in text
    assert "std 25.5, 51, 76.5; resize crop; crop_ratio 0.875" in text
    assert f"starts from {file}, all weights except head: the weights have no head" in text
    record = json.loads((workdir / "pretrained.json").read_text())
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    bundle = read_bundle(workdir / "bundle")
    assert bundle.pretrained == record
    assert (bundle.preprocessing.image_size, bundle.preprocessing.crop_ratio) == ((24, 24), 0.875)
    trained = bundle.variables["params"]["conv1"]["kernel"]
    np.testing.assert_allclose(trained, kernel.transpose(2, 3, 1, 0), atol=1e-6)
    page = write_report(workdir, detail="figures").read_text()
    assert re.search(
        r"pretrained weights</dt><dd><code>.*model\.safetensors</code>, licence: mit", page
    )

    # The run resumes if the file is missing, but not if the file has changed.
    config.train.epochs = 2
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(ConfigError, match=r"model\.safetensors has changed since the run started"):
        train_and_evaluate(config, workdir)
    file.unlink()
    train_and_evaluate(config, workdir)
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2

    # A run that starts from the weights of the first run also records their licence.
    config = _run_config(image_folder, workdir, **{"data.image_size": (16, 16)})
    capfd.readouterr()
    train_and_evaluate(config, tmp_path / "second")
    text = capfd.readouterr().err
    assert f"starts from {workdir}, all weights\n" in text
    assert "other than theirs: image_size 16, not 24" in text
    assert read_bundle(tmp_path / "second" / "bundle").pretrained["license"] == "mit"
