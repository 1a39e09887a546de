import errno
import json
import os

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cnn_jax.data import cache
from cnn_jax.inference.evaluation import evaluate, open_as_trained
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.system.errors import ConfigError
from cnn_jax.training import probe
from cnn_jax.training.loop import train_and_evaluate
from configs import default


def _features(counts=(120, 60), classes=3, size=7, seed=0):
    """Returns random features and labels; means and deviations of the features differ widely."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1, (classes, size))
    names = ("train", "validation")
    labels = {
        name: rng.integers(0, classes, count).astype(np.int32)
        for name, count in zip(names, counts, strict=True)
    }
    scale, offset = 10.0 ** rng.uniform(-2, 2, size), rng.normal(0, 50, size)
    features = {
        name: ((centres[y] + rng.normal(0, 1, (len(y), size))) * scale + offset).astype(np.float32)
        for name, y in labels.items()
    }
    return features, labels


@pytest.mark.parametrize("l2", [0.1, 0.003])
@pytest.mark.parametrize("weights", [None, np.array([1.0, 3.0, 0.5])])
def test_the_probe_equals_the_logistic_regression_of_scikit_learn(monkeypatch, l2, weights):
    features, labels = _features()
    # Each fit starts from the result of the previous fit, so the last fit has converged.
    monkeypatch.setattr(probe, "PENALTIES", (l2,) * 4)
    fitted = probe.fit(features, labels, 3, weights)
    x, y = features["train"].astype(np.float64), labels["train"]
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    # scikit-learn minimises the sum of the losses plus the squared norm divided by (2 * C).
    model = LogisticRegression(C=1 / (l2 * len(y)), tol=1e-8, max_iter=1000)
    model.fit((x - mean) / deviation, y, None if weights is None else weights[y])
    expected = model.predict_proba((features["validation"] - mean) / deviation)
    logits = features["validation"].astype(np.float64) @ fitted.kernel + fitted.bias
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=2e-3)
    accuracy = (expected.argmax(1) == labels["validation"]).mean()
    assert fitted.metrics["validation"]["accuracy"] == pytest.approx(accuracy)
    assert fitted.l2 == l2


def test_the_penalty_with_the_best_validation_accuracy_is_chosen():
    """With few examples and many random features, the accuracy depends on the penalty."""
    features, labels = _features(counts=(30, 600), size=200)
    for name in features:
        features[name][:, 5:] = np.random.default_rng(1).normal(0, 1, features[name][:, 5:].shape)
    chosen = probe.fit(features, labels, 3)
    accuracies = {}
    for l2 in probe.PENALTIES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "PENALTIES", (l2,))
            accuracies[l2] = probe.fit(features, labels, 3).metrics["validation"]["accuracy"]
    # A fit with several penalties starts from the result for the next stronger penalty, so the
    # accuracies differ slightly.
    best = max(accuracies.values())
    assert chosen.metrics["validation"]["accuracy"] == pytest.approx(best, abs=0.02)
    assert min(accuracies.values()) < best - 0.03


def test_constant_features_do_no_harm():
    features, labels = _features()
    for name in features:
        features[name][:, 0] = 3.0
    fitted = probe.fit(features, labels, 3)
    assert np.isfinite(fitted.kernel).all()
    assert np.isfinite(fitted.bias).all()


def _config(epochs=0):
    config = default.get_config()
    config.data.source = "shapes:200"
    config.data.image_size = (16, 16)
    config.model.features = (4, 8)
    config.model.dense = 0
    config.train.batch_size = 16
    config.train.epochs = epochs
    config.train.probe = True
    config.report.detail = "none"
    if not epochs:
        config.train.from_stage = "head"
    return config


def _records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_without_epochs_has_the_bundle_of_the_probe(tmp_path, monkeypatch):
    report = train_and_evaluate(_config(), tmp_path / "run")
    (record,) = _records(tmp_path / "run")
    assert (record["epoch"], record["step"]) == (0, 0)
    assert record["validation_accuracy"] == report["validation"]["accuracy"]
    # The second run must read the features from the cache.
    monkeypatch.setattr(probe, "map_split", None)
    again = train_and_evaluate(_config(), tmp_path / "again")
    assert again == report
    # On the test images, the bundle has the metrics that the run computed from the features.
    predictor = BundlePredictor.load(tmp_path / "run")
    rows = (tmp_path / "run" / "report" / "predictions.csv").read_text().splitlines()[1:]
    measured = evaluate(predictor, open_as_trained(predictor), "test")
    assert measured["accuracy"] == report["test"]["accuracy"]
    assert measured["loss"] == pytest.approx(report["test"]["loss"], abs=1e-5)
    assert len(rows) == np.sum(report["test"]["confusion"])


def test_other_weights_before_the_head_have_other_features(tmp_path):
    folder = cache.cache_dir() / "features"
    before = set(folder.iterdir()) if folder.exists() else set()
    for seed, precision in ((0, "float32"), (1, "float32"), (0, "bfloat16")):
        config = _config()
        config.precision = precision
        config.data.source = "shapes:150"
        with config.ignore_type():
            config.seed = seed
        train_and_evaluate(config, tmp_path / f"{seed}{precision}")
    assert len(set(folder.iterdir()) - before) == 3


def test_keys_that_change_only_training_share_the_features(tmp_path, monkeypatch):
    train_and_evaluate(_config(), tmp_path / "first")
    monkeypatch.setattr(probe, "map_split", None)
    config = _config()
    config.model.dropout = 0.1
    train_and_evaluate(config, tmp_path / "second")


def test_a_run_needs_no_cache_for_its_features(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "write_array", full)
    config = _config()
    config.data.source = "shapes:160"
    assert train_and_evaluate(config, tmp_path)["test"]["loss"] > 0


def test_training_continues_from_the_probe_and_keeps_it_if_it_is_best(tmp_path):
    config = _config(epochs=2)
    # With this learning rate, training makes the network worse.
    config.optimizer.learning_rate = 0.5
    config.optimizer.final_learning_rate = 0.5
    config.train.monitor = "validation_loss"
    report = train_and_evaluate(config, tmp_path)
    records = _records(tmp_path)
    assert [record["epoch"] for record in records] == [0, 1, 2]
    best = min(records, key=lambda record: record["validation_loss"])
    assert best["epoch"] == 0
    assert report["validation"]["accuracy"] == best["validation_accuracy"]


@pytest.mark.parametrize("finished", [0, 1])
def test_a_run_with_a_probe_resumes_bit_for_bit(tmp_path, finished):
    """An interruption before the first step or after an epoch does not change the result."""
    whole = train_and_evaluate(_config(epochs=2), tmp_path / "whole")

    def stop(history):
        if history[-1]["epoch"] == finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(_config(epochs=2), tmp_path / "parts", on_epoch=stop)
    assert train_and_evaluate(_config(epochs=2), tmp_path / "parts") == whole
    weights = [tmp_path / name / "bundle" / "weights.safetensors" for name in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [record["epoch"] for record in _records(tmp_path / "parts")] == [0, 1, 2]


def test_no_epochs_need_the_probe(tmp_path):
    config = _config()
    config.train.probe = False
    with pytest.raises(ConfigError, match=r"train\.epochs: must be at least 1 unless train\.probe"):
        train_and_evaluate(config, tmp_path)
