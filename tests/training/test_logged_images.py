import csv

import numpy as np
import pytest
from conftest import write_images
from request_logs import NAMES, request_id, write_images_to_log, write_labels

from cnn_jax.data.decode import load
from cnn_jax.data.labelled_log import read_examples, write_snapshot
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.inference.bundle import read_bundle
from cnn_jax.inference.evaluation import open_as_trained
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.registry.evidence import compare_versions
from cnn_jax.registry.registry import Registry
from cnn_jax.system.errors import TrainingError
from cnn_jax.training.loop import train_and_evaluate


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A request log with 60 labelled images of 16 x 16 pixels that differ from the data."""
    folder = tmp_path_factory.mktemp("log")
    write_images(folder / "new", per_class=20, seed=5)
    images, labels = {}, {}
    for number, path in enumerate(sorted((folder / "new").rglob("*.png"))):
        images[number] = load(path.read_bytes(), Preprocessing(image_size=(16, 16)))
        labels[number] = path.parent.name
    write_images_to_log(folder / "log", images)
    write_labels(folder / "log", labels, when=1)
    return folder / "log"


def _changed(config, changes):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    return changed


def test_a_champion_is_retrained_on_logged_images(tiny_config, log, tmp_path, capfd):
    base = tiny_config.data.source
    changes = {
        "train.epochs": 1,
        "report.detail": "none",
        "report.reference": False,
        "data.split_seed": 3,
    }
    first = train_and_evaluate(_changed(tiny_config, changes), tmp_path / "first")
    write_snapshot(read_examples([log], NAMES), tmp_path / "snapshot")
    source = f"{base}+log:{tmp_path / 'snapshot'}"
    changes |= {"data.source": source, "checkpoint.init_from": str(tmp_path / "first" / "bundle")}
    second = train_and_evaluate(_changed(tiny_config, changes), tmp_path / "second")
    assert "all weights" in capfd.readouterr().err
    assert second["train"]["count"] > first["train"]["count"]
    assert second["test"]["count"] > first["test"]["count"]

    predictors = [BundlePredictor.load(tmp_path / name) for name in ("first", "second")]
    old, new = open_as_trained(predictors[0]), open_as_trained(predictors[1])
    for name, indices in old.splits.items():
        ids = {new.source.ids[i] for i in new.splits[name]}
        assert {old.source.ids[i] for i in indices} == {i for i in ids if i[:4] != "log/"}
    with (tmp_path / "second" / "report" / "predictions.csv").open() as file:
        written = {row["id"] for row in csv.DictReader(file)}
    assert written == {new.source.ids[i] for i in new.splits["test"]}
    assert written & {f"log/{request_id(number)}/0" for number in range(60)}
    assert read_bundle(tmp_path / "second" / "bundle").data["source"] == source

    registry = Registry(tmp_path / "registry")
    for name in ("first", "second"):
        registry.add("colours", tmp_path / name / "bundle")
    registry.promote("colours", 1)
    candidate = registry.resolve("colours", 2)
    evidence = compare_versions(registry, candidate, "champion", source, 0.5)
    assert evidence.images == second["test"]["count"]


def test_a_run_does_not_resume_after_its_log_has_grown(tiny_config, log, tmp_path):
    changes = {"train.epochs": 1, "report.detail": "none", "report.reference": False}
    changes |= {"data.source": f"{tiny_config.data.source}+log:{log}"}
    train_and_evaluate(_changed(tiny_config, changes), tmp_path / "run")
    write_images_to_log(log, {70: np.zeros((16, 16, 3), np.uint8)})
    longer = _changed(tiny_config, changes | {"train.epochs": 2})
    write_labels(log, {70: "red"}, when=2)
    with pytest.raises(TrainingError, match="the data has changed since the checkpoints"):
        train_and_evaluate(longer, tmp_path / "run")
