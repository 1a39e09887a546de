"""Tests of compressed runs: the files, the same splits, resume, and errors."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

from cnn_jax.compress import compressor, prune
from cnn_jax.compress.compressor import compress
from cnn_jax.config import schema
from cnn_jax.inference.bundle import read_bundle, write_bundle
from cnn_jax.inference.evaluation import evaluate, image_batches, open_as_trained
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.system.errors import BundleError, ConfigError, DataError, Interrupted
from cnn_jax.training import run_directory
from cnn_jax.training.loop import train_and_evaluate
from configs import default


@pytest.fixture(scope="module")
def original(image_folder, tmp_path_factory):
    """A run of a network with 16 and 32 channels and 32 hidden units, with the seed 3."""
    config = default.get_config()
    config.seed = 3
    config.data.source = f"folder:{image_folder}"
    config.data.image_size = (16, 16)
    config.model.features = (16, 32)
    config.model.dense = 32
    config.train.batch_size = 8
    config.train.epochs = 2
    config.optimizer.learning_rate = 2e-3
    config.report.detail = "none"
    workdir = tmp_path_factory.mktemp("original") / "run"
    train_and_evaluate(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def compressed(original, tmp_path_factory):
    """The run that compresses the original, and its record."""
    workdir = tmp_path_factory.mktemp("compressed") / "run"
    _, record = compress(original, workdir, 0.7, epochs=2)
    return workdir, record


def test_the_run_has_a_smaller_bundle_and_the_same_splits(original, compressed):
    workdir, record = compressed
    before, after = (read_bundle(run / "bundle") for run in (original, workdir))
    assert after.model["features"] == [16, 16]
    assert after.model["dense"] == 16
    assert record["after"]["flops"] <= 0.7 * record["before"]["flops"]
    assert record["after"]["parameters"] == sum(
        leaf.size for leaf in jax.tree.leaves(after.variables["params"])
    )
    assert after.data == before.data  # The source, the division into splits, the fingerprint.
    assert after.preprocessing == before.preprocessing
    config = json.loads((workdir / "config.json").read_text())
    # The recipe is that of the original run; the dropout is 0.7 times as large.
    assert config["optimizer"]["learning_rate"] == 2e-3
    assert config["optimizer"]["decay_epochs"] == 2
    assert config["model"]["dropout"] == 0.35


def test_the_record_has_the_accuracies_of_all_three_networks(original, compressed):
    workdir, record = compressed
    for name, bundle in (
        ("before", original / "bundle"),
        ("narrowed", workdir / "narrowed"),
        ("after", workdir / "bundle"),
    ):
        predictor = BundlePredictor.load(bundle)
        dataset = open_as_trained(predictor)
        for split in ("validation", "test"):
            assert record[name][split] == evaluate(predictor, dataset, split)["accuracy"]
    written = json.loads((workdir / "compress.json").read_text())
    assert written == {name: value for name, value in record.items() if name != "after"}
    assert compressor.describe(record)[0].startswith("before      ")
    assert "MFLOP an image, validation accuracy " in compressor.describe(record)[2]


def test_the_narrowed_network_has_the_channels_of_the_record(original, compressed):
    workdir, record = compressed
    before = read_bundle(original / "bundle").variables["params"]
    narrowed = read_bundle(workdir / "narrowed").variables["params"]
    first, second = (record["channels"][stage] for stage in ("conv1", "conv2"))
    assert (len(first), len(second)) == (16, 16)
    np.testing.assert_array_equal(
        narrowed["conv2"]["kernel"], before["conv2"]["kernel"][:, :, first][..., second]
    )


def test_the_ranking_uses_training_images_with_their_classes(original, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("cnn_jax.inference.evaluation.BATCH_SIZE", 16)
    monkeypatch.setattr(compressor, "_IMPORTANCE_IMAGES", 24)

    def stop(model, variables, preprocessing, batches):
        found.extend(batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(compressor.prune, "importance", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(original, tmp_path / "run", 0.7)

    dataset = open_as_trained(BundlePredictor.load(original))
    indices = dataset.splits["train"]
    chosen = indices[np.linspace(0, len(indices) - 1, 24).astype(int)]
    assert [len(images) for images, _ in found] == [16, 8]
    images, labels = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    np.testing.assert_array_equal(
        images, np.concatenate(list(image_batches(dataset.loader, chosen)))
    )
    np.testing.assert_array_equal(labels, dataset.source.labels[chosen])


def test_an_interrupted_compression_resumes(original, compressed, tmp_path, monkeypatch):
    """The result is that of the uninterrupted compression, to the bit."""

    def interrupted(*arguments):
        return train_and_evaluate(*arguments, deadline=time.monotonic())

    with monkeypatch.context() as patch:
        patch.setattr(compressor, "train_and_evaluate", interrupted)
        with pytest.raises(Interrupted):
            compress(original, tmp_path / "run", 0.7, epochs=2)
    # The resumed run uses the first ranking, because another machine could rank differently.
    monkeypatch.setattr(compressor.prune, "importance", None)
    _, record = compress(original, tmp_path / "run", 0.7, epochs=2)
    whole, record_of_whole = compressed
    assert record == record_of_whole
    variables, expected = (read_bundle(r / "bundle").variables for r in (tmp_path / "run", whole))
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_more_epochs_extend_a_compression_that_was_moved(original, compressed, tmp_path):
    """The run does not need its initial weights again."""
    shutil.copytree(compressed[0], tmp_path / "run", ignore=shutil.ignore_patterns("narrowed"))
    compress(original, tmp_path / "run", 0.7, epochs=3)
    epochs = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in epochs] == [1, 2, 3]


def test_another_bundle_or_keep_is_refused_in_the_same_folder(original, compressed, tmp_path):
    workdir, _ = compressed
    narrowed = (workdir / "narrowed" / "bundle.json").read_bytes()
    message = "has the compression of another bundle or with another --keep"
    with pytest.raises(ConfigError, match=message):
        compress(original, workdir, 0.9)
    shutil.copytree(workdir / "narrowed", tmp_path / "narrowed")
    with pytest.raises(ConfigError, match=message):
        compress(tmp_path / "narrowed", workdir, 0.7)
    assert (workdir / "narrowed" / "bundle.json").read_bytes() == narrowed


def test_a_folder_that_is_in_use_is_refused(original, tmp_path):
    with (
        run_directory.lock(tmp_path / "run"),
        pytest.raises(ConfigError, match=r"--workdir: .* is in use by process"),
    ):
        compress(original, tmp_path / "run", 0.7)
    with pytest.raises(ConfigError, match="contains the bundle; use another folder"):
        compress(original, original, 0.7)
    with pytest.raises(ConfigError, match="contains the bundle"):
        compress(original / "bundle", original / "bundle", 0.7)
    shutil.copytree(original, tmp_path / "other")
    with pytest.raises(ConfigError, match="has a run that is not a compression"):
        compress(original, tmp_path / "other", 0.7)


def test_too_few_channels_leave_no_folder(original, tmp_path):
    with pytest.raises(ConfigError, match=r"--keep: must be at least 0\.\d\d for this network"):
        compress(original, tmp_path / "run", 0.01)
    assert not (tmp_path / "run").exists()


def test_wrong_values_are_refused_before_the_data_is_opened(original, tmp_path, monkeypatch):
    monkeypatch.setattr(compressor, "open_as_trained", None)
    with pytest.raises(ConfigError, match=r"warmup_epochs: must be below train\.epochs = 2, got 3"):
        compress(
            original, tmp_path / "run", 0.7, epochs=2, overrides={"optimizer.warmup_epochs": "3"}
        )
    with pytest.raises(ConfigError, match=r"config\.model\.dropout: must be"):
        compress(original, tmp_path / "run", 0.7, overrides={"model.dropout": "2"})
    assert not (tmp_path / "run").exists()


def test_a_damaged_record_is_refused(compressed, original, tmp_path):
    shutil.copytree(compressed[0], tmp_path / "run")
    (tmp_path / "run" / "compress.json").write_text("{")
    with pytest.raises(ConfigError, match=r"compress\.json cannot be read"):
        compress(original, tmp_path / "run", 0.7)


def test_keys_that_would_change_the_splits_are_refused(original, tmp_path):
    for key in ("seed", "data.split", "data.stratify", "model.features", "train.epochs"):
        with pytest.raises(ConfigError, match=f"config.{key}: cannot be set, because compress"):
            compress(original, tmp_path / "run", 0.7, overrides={key: "5"})


def test_data_with_other_splits_is_refused(original, tmp_path):
    """Otherwise the network would be trained on its former test images."""
    dataset = open_as_trained(BundlePredictor.load(original))
    source = dataset.source.name.removeprefix("folder:")
    split_of = {i: name for name, indices in dataset.splits.items() for i in indices}
    swapped = {"train": "train", "validation": "test", "test": "validation"}
    paths = sorted(pathlib.Path(source).glob("*/*.png"))
    for name, splits in (
        ("swapped", [swapped[split_of[i]] for i in range(len(paths))]),
        ("test", ["test"] * len(paths)),
    ):
        lines = [f"{p},{p.parent.name},{s}" for p, s in zip(paths, splits, strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["path,label,split", *lines]))
    run, options = tmp_path / "run", {"allow_outside": True}
    original = _copy_with_data(original, tmp_path / "bundle", **options)
    with pytest.raises(ConfigError, match=r"is not the data .*cnn_jax train --config\.checkpoint"):
        compress(original, run, 0.7, epochs=1, source=f"csv:{tmp_path}/swapped.csv")
    with pytest.raises(DataError, match="no image is left for train"):
        compress(original, run, 0.7, epochs=1, source=f"csv:{tmp_path}/test.csv")
    assert not run.exists()


def _copy_with_data(run, path, **data):
    """Writes a copy of a run's bundle with other values in `data`; returns the path."""
    bundle = read_bundle(run / "bundle")
    write_bundle(dataclasses.replace(bundle, data=bundle.data | data), path)
    return path


def test_the_data_can_be_elsewhere_but_must_be_the_same(original, tmp_path):
    source = read_bundle(original / "bundle").data["source"].removeprefix("folder:")
    shutil.copytree(source, tmp_path / "moved")
    moved = f"folder:{tmp_path / 'moved'}"
    overrides = {
        "model.dropout": "0.1",
        "optimizer.learning_rate": "1e-3",
        "report.splits": "('validation',)",
    }
    config, record = compress(
        original, tmp_path / "run", 0.7, epochs=1, source=moved, overrides=overrides
    )
    assert config.data.source == moved
    assert (config.model.dropout, config.optimizer.learning_rate) == (0.1, 1e-3)
    assert read_bundle(tmp_path / "run" / "bundle").model["dropout"] == 0.1
    assert ("validation" in record["after"], "test" in record["after"]) == (True, False)
    (tmp_path / "moved" / "red").rename(tmp_path / "moved" / "scarlet")
    with pytest.raises(ConfigError, match=r"--source: folder:.* is not the data that the bundle"):
        compress(original, tmp_path / "second", 0.7, source=moved)
    with pytest.raises(DataError, match="nowhere"):
        compress(original, tmp_path / "second", 0.7, source="folder:/nowhere")


def test_a_bundle_without_a_run_is_trained_with_the_default_recipe(original, tmp_path):
    shutil.copytree(original / "bundle", tmp_path / "flowers")
    config, _ = compress(
        tmp_path / "flowers", tmp_path / "run", 1.0, epochs=1, overrides={"train.batch_size": "8"}
    )
    assert config.optimizer.learning_rate == default.get_config().optimizer.learning_rate
    assert tuple(config.model.features) == (16, 32)
    before, narrowed = (read_bundle(tmp_path / name) for name in ("flowers", "run/narrowed"))
    jax.tree.map(np.testing.assert_array_equal, narrowed.variables, before.variables)


def test_automatic_values_of_another_machine_are_not_copied(original, tmp_path):
    (tmp_path / "run").mkdir()
    config = json.loads((original / "config.json").read_text())
    config["precision"], config["augment"]["place"] = "bfloat16", "device"
    config["train"]["steps_per_execution"] = 8
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    bundle = tmp_path / "run" / "bundle"
    loaded = compressor._load_recipe(None, bundle, {"augment.place": "device"})
    assert (loaded.precision, loaded.augment.place) == ("auto", "device")
    assert (loaded.train.steps_per_execution, loaded.train.batch_size) == (0, 8)
    named = compressor._load_recipe(str(tmp_path / "run" / "config.json"), bundle, {})
    assert (named.precision, named.train.steps_per_execution) == ("bfloat16", 8)


def test_the_operations_are_counted_in_the_precision_of_the_bundle(original, tmp_path, monkeypatch):
    bundle = read_bundle(original / "bundle")
    write_bundle(dataclasses.replace(bundle, precision="bfloat16"), tmp_path / "half")

    def stop(section, num_classes, image_size, keep, precision="float32"):
        assert precision == "bfloat16"
        raise KeyboardInterrupt

    monkeypatch.setattr(compressor.prune, "choose_widths", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "half", tmp_path / "run", 0.7)


def test_a_pretrained_network_starts_from_the_narrowed_one(original, tmp_path, monkeypatch):
    """Otherwise training would start with the pretrained weights, or pull weights to zero."""
    section = schema.default_config("resnet18").model.to_dict() | {"pretrained": "weights"}
    bundle = read_bundle(original / "bundle")
    write_bundle(dataclasses.replace(bundle, model=section), tmp_path / "bundle")
    narrowed = {"parameters": 1, "flops": 1.0}
    kept = {name: [0] * 16 for name in prune.widths(section)}
    record = {"before": narrowed, "narrowed": narrowed, "channels": kept}
    monkeypatch.setattr(compressor, "_narrow", lambda *_: record)
    configs = []

    def train(config, workdir, console):
        configs.append(config.copy_and_resolve_references())
        return {}

    monkeypatch.setattr(compressor, "train_and_evaluate", train)
    for number, overrides in enumerate(({}, {"optimizer.l2": "0.5"})):
        compress(tmp_path / "bundle", tmp_path / str(number), 0.5, overrides=overrides)
    assert [config.optimizer.l2 for config in configs] == [0.0, 0.5]
    for config in configs:
        assert config.model.pretrained == ""
        assert list(config.model.inner_features) == [16, 16, 16, 16]
        assert config.checkpoint.init_from.endswith("narrowed")


def test_other_networks_and_missing_bundles_are_refused(original, tmp_path):
    bundle = read_bundle(original / "bundle")
    section = {"name": "efficientnet_b0"}
    write_bundle(dataclasses.replace(bundle, model=section), tmp_path / "efficientnet")
    with pytest.raises(ConfigError, match="the network efficientnet_b0 cannot be pruned; cnn, re"):
        compress(tmp_path / "efficientnet", tmp_path / "run", 0.7)
    with pytest.raises(BundleError, match="is not a bundle"):
        compress(tmp_path / "nowhere", tmp_path / "run", 0.7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--keep=0",), "--keep: must be above 0, at most 1, got '0'"),
        (("--keep=1.5",), "--keep: must be above 0, at most 1, got '1.5'"),
        (("--keep=half",), "--keep: must be above 0, at most 1, got 'half'"),
        ((), "--keep: is required; see --help"),
        (("--keep=1", "--epochs=0"), "--epochs: must be 1 or more"),
        (("--keep=1", "--config=nothing"), "--config: there is no file 'nothing'"),
        (("--keep=1", "--config.train.epoch=1"), "config.train.epoch: there is no such key"),
        (("--keep=1", "--bundle=/nowhere"), "/nowhere is not a bundle"),
    ],
)
def test_a_wrong_flag_is_one_line(tmp_path, flags, message):
    result = _command("--bundle=b", f"--workdir={tmp_path / 'run'}", *flags)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_command_prints_all_three_networks(original, tmp_path):
    """The other commands take the new run: here `report`."""
    flags = ("--keep=0.7", "--epochs=1", "--config.report.detail=figures")
    result = _command(f"--bundle={original}", f"--workdir={tmp_path / 'run'}", *flags)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["before", "narrowed", "after", "report"]
    assert (tmp_path / "run" / "report" / "index.html").is_file()


def _command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "cnn_jax", "compress", *flags],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
