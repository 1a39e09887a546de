import dataclasses
import json

import jax
import numpy as np
import pytest
from test_distillation import _config
from test_step import assert_trees_equal

from cnn_jax.inference.bundle import read_bundle
from cnn_jax.inference.evaluation import open_as_trained
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.system.errors import ConfigError
from cnn_jax.training import soup
from cnn_jax.training.loop import train_and_evaluate
from cnn_jax.training.soup import make_soup


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_folder):
    workdir = tmp_path_factory.mktemp("soup") / "run"
    train_and_evaluate(_config(image_folder, **{"train.epochs": 1, "seed": 3}), workdir)
    return workdir


def test_the_average_of_continuations_is_kept_if_it_is_better(run, tmp_path, monkeypatch):
    """The run's weights and the average are the two possible results."""
    for is_better in (True, False):
        scores = iter([0.5, 0.6 if is_better else 0.5])
        monkeypatch.setattr(soup, "_validate", lambda *_, s=scores: next(s))
        record = make_soup(run, tmp_path / "soup", members=2, epochs=1)
        assert record["is_kept"] == is_better
        assert json.loads((tmp_path / "soup" / "soup.json").read_text()) == record
        bundle = read_bundle(tmp_path / "soup" / "bundle")
        if not is_better:
            assert_trees_equal(bundle.variables, read_bundle(run / "bundle").variables)
            continue
        first, second = (
            read_bundle(tmp_path / "soup" / f"continuation-{number}" / "bundle").variables
            for number in (1, 2)
        )
        expected = jax.tree.map(
            lambda a, b: (a.astype(np.float64) + b) / 2, first["params"], second["params"]
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            bundle.variables["params"],
            expected,
        )
        assert not np.array_equal(first["params"]["head"]["bias"], second["params"]["head"]["bias"])
        # The statistics of the first layer, in NumPy: it has a 3 x 3 kernel and zero padding.
        predictor = BundlePredictor.load(tmp_path / "soup")
        dataset = open_as_trained(predictor)
        images = dataset.loader.load(dataset.splits["train"])["image"]
        inputs = np.pad((images / 127.5 - 1.0), ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = bundle.variables["params"]["conv1"]["kernel"].astype(np.float64)
        outputs = sum(
            inputs[:, y : y + 16, x : x + 16] @ kernel[y, x] for y in range(3) for x in range(3)
        )
        outputs = np.maximum(outputs + bundle.variables["params"]["conv1"]["bias"], 0)
        statistics = bundle.variables["batch_stats"]["norm1"]
        np.testing.assert_allclose(statistics["mean"], outputs.mean(axis=(0, 1, 2)), rtol=1e-4)
        np.testing.assert_allclose(statistics["var"], outputs.var(axis=(0, 1, 2)), rtol=1e-4)


def test_continuations_have_the_splits_of_the_run_and_resume(run, tmp_path, capsys):
    first = make_soup(run, tmp_path / "soup", members=2, epochs=1)
    folders = [tmp_path / "soup" / f"continuation-{number}" for number in (1, 2)]
    for number, folder in enumerate(folders, start=1):
        config = json.loads((folder / "config.json").read_text())
        assert (config["seed"], config["data"]["split_seed"]) == (3 + number, 3)
        assert (
            read_bundle(folder / "bundle").data["fingerprint"]
            == read_bundle(run / "bundle").data["fingerprint"]
        )
    written = (tmp_path / "soup" / "bundle" / "weights.safetensors").read_bytes()
    # The second call finds the finished continuations.
    assert make_soup(run, tmp_path / "soup", members=2, epochs=1) == first
    assert (tmp_path / "soup" / "bundle" / "weights.safetensors").read_bytes() == written
    assert set(first["validation"]) == {"run", "soup"}
    assert "average of 2 continuations" in soup.describe(first)


def test_a_soup_of_another_run_or_with_a_fixed_key_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="nowhere is not the folder of a run"):
        make_soup(tmp_path / "nowhere", tmp_path / "soup", 2, 1)
    with pytest.raises(ConfigError, match=r"config\.seed: cannot be set, because soup"):
        make_soup(run, tmp_path / "soup", 2, 1, {"seed": "4"})


def test_the_soup_is_compared_without_calibration(run):
    """The calibrated loss of a bundle depends on its temperature, and the result does not."""
    bundle = read_bundle(run / "bundle")
    dataset = open_as_trained(BundlePredictor(bundle))
    losses = [
        soup._validate(
            dataclasses.replace(bundle, temperature=temperature),
            dataset,
            "validation_loss",
            lambda items, *_: items,
        )
        for temperature in (1.0, 3.0)
    ]
    assert losses[0] == losses[1]
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(history[-1]["validation_loss"], rel=1e-4)
