import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from bundles import make_bundle

from cnn_jax.inference.bundle import read_bundle, write_bundle
from cnn_jax.models import pretrained
from cnn_jax.models.pretrained import PREPROCESSING_KEYS, check_network, open_weights
from cnn_jax.system.errors import BundleError, ConfigError, WeightsError

# A part of the config.json of timm's model resnet50.a1_in1k.
RESNET50 = {
    "architecture": "resnet50",
    "num_classes": 1000,
    "pretrained_cfg": {
        "tag": "a1_in1k",
        "input_size": [3, 224, 224],
        "test_input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "test_crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}


def _write_file(folder, config=None, **arrays):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    arrays = arrays or {"fc.weight": np.eye(3, 4, dtype=np.float16)}
    safetensors.numpy.save_file(arrays, path)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return path


def test_a_file_with_the_config_of_the_hub(tmp_path, monkeypatch):
    path = _write_file(tmp_path / "net", RESNET50)
    monkeypatch.chdir(tmp_path)
    weights = open_weights("net/model.safetensors")
    assert weights.source == str(path)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (weights.architecture, weights.license, weights.class_names) == ("resnet50", "", None)
    kernel = weights.variables["params"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel, np.eye(4, 3, dtype=np.float32), strict=True)
    # The mean and the standard deviation are converted from fractions to grey levels.
    assert weights.preprocessing == {
        "image_size": (224, 224),
        "mean": (123.675, 116.28, 103.53),
        "std": (58.395, 57.12, 57.375),
        "resize": "crop",
        "crop_ratio": 0.95,
        "interpolation": "bicubic",
    }
    # The path of the folder also selects the file.
    assert open_weights("net").source == str(path)
    record = weights.record()
    assert json.loads(json.dumps(record)) == record
    assert set(record) == {"source", "sha256", "license", "architecture", "preprocessing"}


def test_a_file_without_config_has_unknown_properties(tmp_path):
    weights = open_weights(str(_write_file(tmp_path)))
    assert (weights.architecture, weights.license) == ("", "")
    assert (weights.preprocessing, weights.class_names) == ({}, None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"crop_mode": "squash", "crop_pct": 1.0}, {"resize": "stretch", "crop_ratio": 1.0}),
        ({"crop_mode": "border", "crop_pct": 0.9}, {"resize": "pad", "crop_ratio": 1.0}),
        ({"crop_mode": "unknown", "crop_pct": 0.9}, {}),
        ({"interpolation": "lanczos", "input_size": None, "mean": [0.5]}, {}),
        ({"input_size": [3, 240, 320]}, {"image_size": (240, 320)}),
    ],
)
def test_other_values_of_the_preprocessing(changes, expected):
    assert pretrained._read_preprocessing(changes) == expected


def test_older_configs_and_class_names_and_licences():
    old = pretrained._read_description({**RESNET50["pretrained_cfg"], "architecture": "resnet50"})
    new = pretrained._read_description(RESNET50)
    assert old == new
    config = {"num_classes": 2, "label_names": ["cat", "dog"], "license": "cc-by-nc-4.0"}
    described = pretrained._read_description(config)
    assert (described["class_names"], described["license"]) == (["cat", "dog"], "cc-by-nc-4.0")
    assert pretrained._read_description(config, "mit")["license"] == "mit"
    assert pretrained._read_description({**config, "num_classes": 3})["class_names"] is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "old.pth",
            r"is a pickle of PyTorch.*torch\.save_file\(torch\.load\('old.pth'",
        ),
        ("dir/pytorch_model.BIN", "is a pickle of PyTorch"),
        ("nowhere/model.safetensors", "there is no file nowhere/model.safetensors"),
        ("resnet50.a1_in1k", "there is no file resnet50.a1_in1k; did you mean timm/resnet50.a1"),
        ("resnet50", "there is no file resnet50, and it is not OWNER/NAME"),
        ("empty", r"empty has no model\.safetensors or bundle\.json"),
        ("run", "run is a run without a bundle"),
    ],
)
def test_wrong_paths_are_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=message) as caught:
        open_weights(name)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_one_line(tmp_path):
    path = _write_file(tmp_path / "cut", **{"a.weight": np.ones(100, np.float32)})
    path.write_bytes(path.read_bytes()[:-7])
    text = tmp_path / "text.safetensors"
    text.write_text("<html>Not found</html>")
    for file in (path, text):
        with pytest.raises(WeightsError, match="is damaged, or not a safetensors file") as caught:
            open_weights(str(file))
        assert "\n" not in str(caught.value)
    path = _write_file(tmp_path / "config", {})
    (path.parent / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        open_weights(str(path))


def test_bfloat16_becomes_float32(tmp_path):
    header = b'{"bn1.bias":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\xc0\x3f")
    (bias,) = jax.tree.leaves(open_weights(str(path)).variables)
    np.testing.assert_array_equal(bias, np.array([1.5], np.float32), strict=True)


def test_a_bundle_and_a_run(tmp_path):
    record = {"source": "a", "sha256": "0", "license": "mit", "architecture": "cnn"}
    bundle = dataclasses.replace(make_bundle(), pretrained=record)
    write_bundle(bundle, tmp_path / "run" / "bundle")
    assert read_bundle(tmp_path / "run" / "bundle").pretrained == record
    for path in (tmp_path / "run", tmp_path / "run" / "bundle"):
        weights = open_weights(str(path), "checkpoint.init_from")
        assert weights.source == str(path)
        assert (weights.architecture, weights.license) == ("cnn", "mit")
        assert weights.class_names == ["blue", "green", "red"]
        assert weights.preprocessing.keys() == set(PREPROCESSING_KEYS)
        assert weights.preprocessing["image_size"] == (16, 16)
        jax.tree.map(np.testing.assert_array_equal, weights.variables, dict(bundle.variables))
        content = (tmp_path / "run" / "bundle" / "weights.safetensors").read_bytes()
        assert weights.sha256 == hashlib.sha256(content).hexdigest()
        assert pretrained.current_sha256(weights.source) == weights.sha256
    shutil.rmtree(tmp_path / "run" / "bundle")
    assert pretrained.current_sha256(str(tmp_path / "run")) is None
    assert pretrained.current_sha256("timm/resnet50.a1_in1k@0") is None
    # Only `model.pretrained` accepts the path of a safetensors file.
    with pytest.raises(ConfigError, match=r"config\.checkpoint\.init_from: .* cannot be read"):
        open_weights(str(_write_file(tmp_path)), "checkpoint.init_from")


def test_a_bundle_without_pretrained_weights_is_written_as_before(tmp_path):
    write_bundle(make_bundle(), tmp_path / "bundle")
    assert "pretrained" not in json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert read_bundle(tmp_path / "bundle").pretrained is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "mixer"}, "has the network mixer, which cnn_jax .* does not know; install"),
        ({"name": "cnn", "width": 2}, r"network cnn with model\.width, which cnn_jax .* does not"),
        ({"features": [4]}, "is not a bundle"),
    ],
)
def test_a_bundle_of_an_unknown_network_is_refused(tmp_path, model, message):
    write_bundle(make_bundle(), tmp_path)
    description = json.loads((tmp_path / "bundle.json").read_text())
    (tmp_path / "bundle.json").write_text(json.dumps(description | {"model": model}))
    with pytest.raises(BundleError, match=message):
        read_bundle(tmp_path)


def test_weights_of_another_network(tmp_path):
    weights = open_weights(str(_write_file(tmp_path, RESNET50)))
    check_network(weights, "resnet50")
    with pytest.raises(ConfigError, match=r"config\.model\.name: must be resnet50 for .*, got cnn"):
        check_network(weights, "cnn")
    unknown = open_weights(str(_write_file(tmp_path, {"architecture": "vgg16"})))
    with pytest.raises(ConfigError, match="network vgg16, which cnn_jax does not have; it has res"):
        check_network(unknown, "resnet50")
    check_network(open_weights(str(_write_file(tmp_path, {}))), "cnn")
