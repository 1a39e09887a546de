"""Tests of the pretrained weights in a resolved configuration."""

import json

import numpy as np
import pytest
import safetensors.numpy

from cnn_jax.config import files, resolve, schema
from cnn_jax.models import pretrained
from cnn_jax.models.pretrained import PretrainedWeights
from cnn_jax.system.errors import ConfigError

TAKEN_OVER = {
    "image_size": (288, 288),
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
    "resize": "crop",
    "crop_ratio": 0.95,
    "interpolation": "bicubic",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def weights_file(tmp_path):
    config = {
        "architecture": "resnet18",
        "pretrained_cfg": {
            "input_size": [3, 288, 288],
            "interpolation": "bicubic",
            "crop_pct": 0.95,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"fc.bias": np.zeros(3, np.float32)}, path)
    return path


def _config(pretrained_name, network="resnet18", **changes):
    config = schema.default_config(network)
    config.model.pretrained = str(pretrained_name)
    for key, value in changes.items():
        with config.ignore_type():
            config.data[key] = value
    schema.validate(config, num_devices=1)
    return config


def _preprocessing(config):
    return {key: config.data[key] for key in TAKEN_OVER}


def test_the_preprocessing_of_the_weights_is_taken_over(weights_file, monkeypatch):
    monkeypatch.chdir(weights_file.parent)
    resolved = resolve.resolve(_config("./model.safetensors"))
    assert resolved.model.pretrained == str(weights_file)
    assert _preprocessing(resolved) == TAKEN_OVER
    # Resolving a resolved configuration changes nothing.
    again = files.load(_written(resolved, weights_file.parent / "resolved.json"))
    assert resolve.resolve(again).to_json() == resolved.to_json()


def _written(config, path):
    path.write_text(config.to_json())
    return str(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image_size": (64, 48)}, {"image_size": (64, 48)}),
        # The user sets the default explicitly, as a single number.
        ({"image_size": 32}, {"image_size": (32, 32)}),
        ({"mean": (1.0, 2.0, 3.0)}, {"mean": (1.0, 2.0, 3.0)}),
        ({"resize": "pad"}, {"resize": "pad", "crop_ratio": 1.0}),
        ({"resize": "crop"}, {}),
        ({"resize": "crop", "crop_ratio": 0.5}, {"crop_ratio": 0.5}),
    ],
)
def test_keys_that_were_set_stay(weights_file, changes, expected):
    resolved = resolve.resolve(_config(weights_file, **changes))
    assert _preprocessing(resolved) == TAKEN_OVER | expected


def test_the_preprocessing_of_the_configuration_can_be_kept(weights_file):
    resolved = resolve.resolve(_config(weights_file, preprocessing="config"))
    default = schema.default_config()
    assert _preprocessing(resolved) == {key: default.data[key] for key in TAKEN_OVER}


def test_only_the_normalisation_of_the_weights_can_be_taken_over(weights_file):
    resolved = resolve.resolve(_config(weights_file, preprocessing="mean_std"))
    default = schema.default_config()
    expected = {key: default.data[key] for key in TAKEN_OVER}
    expected |= {key: TAKEN_OVER[key] for key in ("mean", "std")}
    assert _preprocessing(resolved) == expected


def test_a_run_that_resumes_does_not_read_the_weights(weights_file, monkeypatch):
    started = resolve.resolve(_config(weights_file))
    previous = schema.flat(json.loads(started.to_json()))
    weights_file.unlink()
    assert resolve.resolve(_config(weights_file), previous).to_json() == started.to_json()
    with pytest.raises(ConfigError, match="there is no file"):
        resolve.resolve(_config(weights_file))


def test_a_model_of_the_hub_keeps_its_revision(monkeypatch):
    opened = []

    def open_weights(name):
        opened.append(name)
        preprocessing = {"image_size": (64, 64)}
        return PretrainedWeights(f"a/b@{COMMIT}", "0", "mit", "resnet18", preprocessing, None, {})

    monkeypatch.setattr(resolve, "open_weights", open_weights)
    started = resolve.resolve(_config("a/b"))
    assert started.model.pretrained == f"a/b@{COMMIT}"
    assert started.data.image_size == (64, 64)
    previous = schema.flat(json.loads(started.to_json()))
    for name in ("a/b", f"a/b@{COMMIT}"):
        assert resolve.resolve(_config(name), previous).to_json() == started.to_json()
    assert opened == ["a/b"]
    resolve.resolve(_config("auto"))
    assert opened.pop() == schema.NETWORKS["resnet18"].weights
    # If the configuration names another model, that model is opened, so that the change can be
    # reported.
    resolve.resolve(_config("a/c"), previous)
    assert opened == ["a/b", "a/c"]


def test_contradictions_are_one_line(weights_file, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.name: must be resnet18 for .*, got resnet50"):
        resolve.resolve(_config(weights_file, "resnet50"))
    with pytest.raises(ConfigError, match=r"no file resnet18\.a1_in1k; did you mean timm/resnet18"):
        resolve.resolve(_config("resnet18.a1_in1k"))
    config = _config(weights_file)
    config.checkpoint.init_from = "runs/first"
    with pytest.raises(ConfigError, match=r"init_from: must be empty if model\.pretrained"):
        schema.validate(config, num_devices=1)
    message = "pretrained: the network cnn has no pretrained weights; set model.name to .*resnet18"
    with pytest.raises(ConfigError, match=message):
        files.load("default", ["--config.model.pretrained=timm/resnet18.a1_in1k"])


def test_the_image_size_is_checked_after_it_is_known(weights_file, monkeypatch):
    network = schema.NETWORKS["resnet18"]
    patches = pretrained.NETWORKS | {
        "resnet18": network.__class__(network.path, network.keys, lambda section: 9)
    }
    monkeypatch.setattr(schema, "NETWORKS", patches)
    # The image size of the weights, 288, is a multiple of 9. The default image size, 32, is not.
    assert resolve.resolve(_config(weights_file)).data.image_size == (288, 288)
    with pytest.raises(ConfigError, match=r"must be a multiple of 9 for the network resnet18, got"):
        resolve.resolve(_config(weights_file, image_size=(30, 30)))
    with pytest.raises(ConfigError, match="must be a multiple of 9"):
        _config(weights_file, preprocessing="config")
