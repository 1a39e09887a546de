"""Tests of runs in which only some stages are trained."""

import numpy as np
import pytest
from conftest import require_devices

from cnn_jax.inference.bundle import read_bundle
from cnn_jax.training.loop import train_and_evaluate
from configs import default


def _config(**changes):
    config = default.get_config()
    config.data.source = "shapes:200"
    config.data.image_size = (16, 16)
    config.model.features = (8, 16)
    config.model.dense = 16
    config.train.batch_size = 16
    config.train.epochs = 2
    config.train.from_stage = "conv2"
    config.optimizer.stage_decay = 0.5
    config.optimizer.weight_decay = 0.1
    config.report.detail = "none"
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def _stop_after_one_epoch(history):
    if history:
        raise KeyboardInterrupt


def test_frozen_stages_keep_their_weights_and_statistics(tmp_path):
    """The initial weights are from a trained run, so the batch statistics are not 0 and 1."""
    train_and_evaluate(_config(**{"train.from_stage": ""}), tmp_path / "first")
    changes = {"checkpoint.init_from": str(tmp_path / "first"), "train.epochs": 1}
    train_and_evaluate(_config(**changes), tmp_path / "second")
    first, second = (read_bundle(tmp_path / name / "bundle") for name in ("first", "second"))
    for collection, layer in (("params", "conv1"), ("params", "norm1"), ("batch_stats", "norm1")):
        for name, array in first.variables[collection][layer].items():
            np.testing.assert_array_equal(second.variables[collection][layer][name], array)
    for collection, layer in (("params", "conv2"), ("params", "head"), ("batch_stats", "norm2")):
        for name, array in first.variables[collection][layer].items():
            assert not np.array_equal(second.variables[collection][layer][name], array), name


@pytest.mark.parametrize("model_devices", [1, 4])
def test_a_run_with_frozen_stages_resumes_on_another_mesh(tmp_path, model_devices):
    require_devices(4)
    whole = train_and_evaluate(_config(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(_config(), tmp_path / "parts", on_epoch=_stop_after_one_epoch)
    resumed = train_and_evaluate(_config(**{"mesh.model": model_devices}), tmp_path / "parts")
    assert resumed["validation"]["loss"] == pytest.approx(whole["validation"]["loss"], rel=1e-3)
    bundles = [read_bundle(tmp_path / name / "bundle") for name in ("whole", "parts")]
    tolerance = 0 if model_devices == 1 else 1e-3
    for layer, arrays in bundles[0].variables["params"].items():
        for name, array in arrays.items():
            other = bundles[1].variables["params"][layer][name]
            np.testing.assert_allclose(other, array, rtol=0, atol=tolerance)


def test_a_run_that_ended_before_its_first_checkpoint_starts_from_the_same_weights(tmp_path):
    train_and_evaluate(_config(**{"train.from_stage": ""}), tmp_path / "first")
    changes = {"checkpoint.init_from": str(tmp_path / "first"), "train.epochs": 1}
    train_and_evaluate(_config(**changes), tmp_path / "whole")

    def stop(history):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(_config(**changes), tmp_path / "parts", on_epoch=stop)
    train_and_evaluate(_config(**changes), tmp_path / "parts")
    whole, parts = (
        tmp_path / name / "bundle" / "weights.safetensors" for name in ("whole", "parts")
    )
    assert whole.read_bytes() == parts.read_bytes()
