import contextlib
import gzip
import itertools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import REPOSITORY, write_images
from PIL import Image

from cnn_jax.config.resolve import resolve
from cnn_jax.data import pipeline
from cnn_jax.data.augment import Augmentation
from cnn_jax.inference import calibration
from cnn_jax.inference.bundle import read_bundle
from cnn_jax.inference.evaluation import open_as_trained, predict_split
from cnn_jax.inference.predictor import BundlePredictor, predict_batch
from cnn_jax.system import signals
from cnn_jax.system.errors import ConfigError, DataError, Interrupted, TrainingError
from cnn_jax.training import loop
from cnn_jax.training.loop import train_and_evaluate
from cnn_jax.training.programs import Programs, default_execution_length
from cnn_jax.training.step import Statistics, TrainStep, update_statistics
from experiments.checks import chaos

EPOCH_KEYS = {
    "epoch",
    "step",
    "seconds",
    "images_per_second",
    "learning_rate",
    *(
        f"{split}_{key}"
        for split in ("train", "validation")
        for key in ("loss", "accuracy", "precision", "recall", "f1")
    ),
}


def _history(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _weights(workdir):
    return (workdir / "bundle" / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder):
    """The folder and configuration of a finished run, and the result of `train_and_evaluate`."""
    config = _tiny(image_folder)
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, config, train_and_evaluate(config, workdir)


def _tiny(image_folder, **changes):
    from configs import default

    config = default.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": f"folder:{image_folder}",
            "data.image_size": (16, 16),
            "model.features": (4, 8),
            "model.dense": 16,
            "train.batch_size": 8,
            "train.epochs": 3,
            "data.stratify": "exact",
            **changes,
        }
    )
    return config


def test_a_run_writes_the_documented_files(finished):
    workdir, config, report = finished
    resolved = json.loads(resolve(config).to_json())
    assert resolved["train"].pop("steps_per_execution") == 0
    # The value 0 (automatic) becomes 1, because the images are not on an accelerator.
    resolved["train"]["steps_per_execution"] = 1
    assert json.loads((workdir / "config.json").read_text()) == resolved
    assert (resolved["precision"], resolved["augment"]["place"]) == ("float32", "host")
    history = _history(workdir)
    assert [set(record) for record in history] == [EPOCH_KEYS] * 3
    assert [record["step"] for record in history] == [6, 12, 18]
    assert history[0]["learning_rate"] > history[2]["learning_rate"] >= 1e-4
    assert list((workdir / "tensorboard").iterdir())
    assert list((workdir / "checkpoints").iterdir())

    assert json.loads((workdir / "report" / "metrics.json").read_text()) == report
    assert {split: metrics["count"] for split, metrics in report.items()} == {
        "train": 42,
        "validation": 12,
        "test": 6,
    }
    keys = {"accuracy", "precision", "recall", "f1", "loss", "per_class", "confusion", "count"}
    keys |= {"confidence_intervals"}
    assert all(set(metrics) == keys for metrics in report.values())

    bundle = read_bundle(workdir / "bundle")
    assert bundle.class_names == ["blue", "green", "red"]
    assert bundle.metrics["test"]["accuracy"] == report["test"]["accuracy"]
    assert {"jax", "flax", "cnn_jax"} <= set(
        json.loads((workdir / "bundle" / "bundle.json").read_text())["versions"]
    )


def test_the_bundle_has_the_parameters_of_the_best_epoch(finished):
    workdir, config, report = finished
    history = _history(workdir)
    best = max(history, key=lambda record: record[config.train.monitor])
    assert report["validation"]["accuracy"] == pytest.approx(best["validation_accuracy"])
    # The loss in the report is computed with calibrated probabilities.
    predictor = BundlePredictor.load(workdir / "bundle")
    dataset = open_as_trained(predictor)
    indices = dataset.splits["validation"]
    calibrated = predict_split(predictor, dataset.loader, indices)
    labels = dataset.source.labels[indices]
    plain = calibration.apply_temperature(calibrated, 1 / predictor.temperature)
    loss = calibration.negative_log_likelihood(plain, labels)
    assert loss == pytest.approx(best["validation_loss"], rel=1e-4)
    assert predictor.temperature == pytest.approx(calibration.fit_temperature(plain, labels), 1e-4)
    assert predictor.temperature != 1
    assert report["validation"]["loss"] < loss


def test_the_bundle_has_the_batch_statistics_of_its_own_parameters(finished):
    """The batch statistics in a bundle are computed with the parameters in the bundle.

    A running average would also contain the batch statistics of earlier parameters.
    """
    workdir, config, _ = finished
    _assert_own_statistics(workdir, config)


def test_an_average_of_the_parameters_has_its_own_batch_statistics(image_folder, tmp_path):
    """The bundle has the average in the checkpoint of the best epoch."""
    config = _tiny(image_folder, **{"train.ema": 0.9, "train.epochs": 2})
    train_and_evaluate(config, tmp_path / "run")
    _assert_own_statistics(tmp_path / "run", config)
    found = read_bundle(tmp_path / "run" / "bundle").variables["params"]
    best = max(_history(tmp_path / "run"), key=lambda record: record["validation_accuracy"])
    saved = ocp.StandardCheckpointer().restore(
        (tmp_path / "run" / "checkpoints" / str(best["step"]) / "state").resolve()
    )
    jax.tree.map(np.testing.assert_array_equal, saved["average"], found)
    assert not np.array_equal(saved["params"]["head"]["kernel"], found["head"]["kernel"])


def _assert_own_statistics(workdir, config):
    predictor = BundlePredictor.load(workdir / "bundle")
    dataset = open_as_trained(predictor)
    found = predictor.variables
    statistics = Statistics.empty(found["batch_stats"])
    stream = pipeline.training_batches(
        dataset.loader,
        dataset.splits["train"],
        batch_size=config.train.batch_size,
        augmentation=Augmentation(),
        place="host",
        seed=config.seed,
    )
    with stream as batches:
        # An epoch has six steps.
        for batch in itertools.islice(batches, 6):
            statistics = update_statistics(
                statistics,
                found,
                jax.tree.map(jnp.asarray, batch),
                model=predictor.model,
                preprocessing=predictor.preprocessing,
            )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found["batch_stats"],
        statistics.batch_stats,
    )


def test_validation_is_correct_in_the_first_epochs(image_folder, tmp_path):
    """The validation accuracy is at least 0.9 after two epochs of six steps.

    After twelve steps, a running average of statistics would still be near its initial value.
    """
    changes = {"seed": 2, "optimizer.learning_rate": 1e-2, "train.epochs": 2}
    config = _tiny(image_folder, **changes)
    train_and_evaluate(config, tmp_path / "run")
    assert _history(tmp_path / "run")[1]["validation_accuracy"] >= 0.9


def test_evaluate_in_a_new_process_reproduces_the_written_probabilities(
    finished, image_folder, tmp_path
):
    """The command `evaluate` finds the data and the split with information from the bundle."""
    workdir, _, report = finished
    output = tmp_path / "test.json"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "cnn_jax.evaluate",
            f"--bundle={workdir / 'bundle'}",
            f"--output={output}",
        ],
        check=True,
        cwd=REPOSITORY,
    )
    assert json.loads(output.read_text()) == report["test"]

    predictor = BundlePredictor.load(workdir / "bundle")
    dataset = open_as_trained(predictor)
    source, indices = dataset.source, dataset.splits["test"]
    assert source.name == f"folder:{image_folder}"
    probabilities = predict_split(predictor, dataset.loader, indices)
    rows = (workdir / "report" / "predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [source.ids[i] for i in indices]
    written = np.array([row.split(",")[3] for row in rows], np.float32)
    np.testing.assert_array_equal(written, probabilities.max(axis=1))


def test_a_repeated_command_changes_no_result(finished):
    workdir, config, report = finished
    files = ["bundle/weights.safetensors", "bundle/bundle.json", "report/metrics.json"]
    before = [(workdir / file).read_bytes() for file in [*files, "metrics.jsonl"]]
    assert train_and_evaluate(config, workdir) == report
    assert [(workdir / file).read_bytes() for file in [*files, "metrics.jsonl"]] == before


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_a_second_run_is_bitwise_the_same_for_each_cache(finished, tmp_path, cache):
    """Training is bitwise identical whether images are cached in memory, on disk, or not at all."""
    workdir, config, report = finished
    other = config.copy_and_resolve_references()
    other.data.cache = cache
    shown = []

    def show(metrics):
        # The metrics are known before the bundle is written.
        shown.append((metrics, (tmp_path / "run" / "bundle").exists()))

    assert train_and_evaluate(other, tmp_path / "run", on_metrics=show) == report
    assert shown == [(report, False)]
    assert _weights(tmp_path / "run") == _weights(workdir)


def test_a_run_learns_the_classes_of_coloured_images(image_folder, tmp_path):
    config = _tiny(
        image_folder,
        **{"train.epochs": 20, "optimizer.learning_rate": 1e-2, "train.patience": 20},
    )
    assert train_and_evaluate(config, tmp_path / "run")["train"]["accuracy"] > 0.9


def test_another_configuration_in_the_same_folder_is_refused(finished):
    workdir, config, _ = finished
    other = config.copy_and_resolve_references()
    other.optimizer.l2 = 0.5
    with pytest.raises(ConfigError, match=r"optimizer\.l2: 0\.0001 -> 0\.5"):
        train_and_evaluate(other, workdir)


def test_changed_data_is_refused(tmp_path):
    write_images(tmp_path / "images", per_class=10)
    config = _tiny(tmp_path / "images", **{"train.epochs": 1})
    train_and_evaluate(config, tmp_path / "run")
    (tmp_path / "images" / "red" / "000.png").rename(tmp_path / "images" / "red" / "new.png")
    with pytest.raises(TrainingError, match="the data has changed"):
        train_and_evaluate(config, tmp_path / "run")


def test_patience_stops_the_run_and_keeps_the_best_epoch(image_folder, tmp_path):
    # With this high learning rate, the network does not learn and the accuracy stays low.
    config = _tiny(
        image_folder,
        **{
            "train.epochs": 30,
            "train.patience": 2,
            "optimizer.learning_rate": 0.5,
            "optimizer.final_learning_rate": 0.5,
        },
    )
    report = train_and_evaluate(config, tmp_path / "run")
    history = _history(tmp_path / "run")
    accuracies = [record["validation_accuracy"] for record in history]
    best = int(np.argmax(accuracies))
    assert len(history) == best + 1 + 2 < 30
    assert report["validation"]["accuracy"] == pytest.approx(accuracies[best])
    # A repeated call trains no further epoch.
    assert train_and_evaluate(config, tmp_path / "run") == report
    assert len(_history(tmp_path / "run")) == len(history)


def test_an_infinite_loss_stops_the_run_and_keeps_checkpoints(image_folder, tmp_path, monkeypatch):
    config = _tiny(image_folder)
    real_step = TrainStep.__call__

    def poisoned(self, state, batch, extra):
        state, metrics = real_step(self, state, batch, extra)
        bad = state.step == 9  # Step 9 is in the second epoch.
        return state, metrics.replace(
            loss_sum=jax.numpy.where(bad, jax.numpy.nan, metrics.loss_sum)
        )

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    message = r"the loss is infinite or not a number at step 9, where .* 0\.000\d+\. Try a lower"
    with pytest.raises(TrainingError, match=message):
        train_and_evaluate(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["6"]
    # The second start, in which the error does not occur, resumes from the checkpoint.
    monkeypatch.setattr(TrainStep, "__call__", real_step)
    train_and_evaluate(config, tmp_path / "run")
    assert len(_history(tmp_path / "run")) == 3


@pytest.mark.parametrize("epochs", [1, 4])
def test_parameters_that_diverge_are_never_saved(image_folder, tmp_path, epochs):
    """Parameters that are not finite are never saved, even if the loss of the step is finite."""
    config = _tiny(
        image_folder,
        **{
            "train.batch_size": 64,
            "train.epochs": epochs,
            "optimizer.learning_rate": 1e38,
            "optimizer.final_learning_rate": 1e38,
        },
    )
    with pytest.raises(TrainingError, match="infinite or not a number at step 1"):
        train_and_evaluate(config, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert _history(tmp_path / "run") == []


def test_an_interruption_after_divergence_saves_nothing(image_folder, tmp_path, monkeypatch):
    real_step = TrainStep.__call__

    def diverge(self, state, batch, extra):
        # The loss of a step is computed before the update, so the loss stays finite.
        state, metrics = real_step(self, state, batch, extra)
        return state.replace(params=jax.tree.map(lambda leaf: leaf / 0, state.params)), metrics

    @contextlib.contextmanager
    def interrupted_at_once(deadline):
        request = signals.Interruption()
        request.request()
        yield request

    monkeypatch.setattr(TrainStep, "__call__", diverge)
    monkeypatch.setattr(signals, "listen", interrupted_at_once)
    with pytest.raises(TrainingError, match="a parameter is infinite or not a number at step 1"):
        train_and_evaluate(_tiny(image_folder), tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_run_can_start_in_the_folder_of_a_failed_start(image_folder, tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        train_and_evaluate(_tiny(tmp_path / "typo"), tmp_path / "run")
    train_and_evaluate(_tiny(image_folder, **{"train.epochs": 1}), tmp_path / "run")


def test_a_run_resumes_with_images_in_a_moved_folder(tmp_path):
    write_images(tmp_path / "here", per_class=10)
    config = _tiny(tmp_path / "here", **{"train.epochs": 1})
    report = train_and_evaluate(config, tmp_path / "run")
    (tmp_path / "here").rename(tmp_path / "there")
    moved = _tiny(tmp_path / "there", **{"train.epochs": 1})
    assert train_and_evaluate(moved, tmp_path / "run") == report


def test_file_and_class_names_may_be_no_utf_8(tmp_path):
    write_images(tmp_path / "images", per_class=10)
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / "images" / "red").rename(tmp_path / "images" / odd)
    image = tmp_path / "images" / odd / "000.png"
    image.rename(image.with_name(os.fsdecode(b"\xff.png")))
    train_and_evaluate(_tiny(tmp_path / "images", **{"train.epochs": 1}), tmp_path / "run")
    assert read_bundle(tmp_path / "run" / "bundle").class_names == ["blue", odd, "green"]
    report = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    assert odd in report["test"]["per_class"]


def test_augmentation_on_the_device_trains_like_on_the_host(image_folder, tmp_path):
    """The losses of the two runs differ only by rounding."""
    host = _tiny(image_folder, **{"augment.place": "host"})
    device = _tiny(image_folder, **{"augment.place": "device"})
    train_and_evaluate(host, tmp_path / "host")
    train_and_evaluate(device, tmp_path / "device")
    for a, b in zip(_history(tmp_path / "host"), _history(tmp_path / "device"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=0.01)


_ON_THE_DEVICE = {"augment.place": "device", "data.cache": "device"}


def test_several_steps_in_one_execution_train_the_same(image_folder, tmp_path, monkeypatch):
    """The results agree if six steps are run as 4 + 1 + 1, as 2 + 2 + 2, or one at a time."""
    executed = []
    real = Programs.send

    def spy(programs, batches):
        executed.append(len(batches))
        return real(programs, batches)

    monkeypatch.setattr(Programs, "send", spy)
    histories = {}
    for count in (1, 2, 4, 7):
        config = _tiny(image_folder, **_ON_THE_DEVICE, **{"train.steps_per_execution": count})
        executed.clear()
        train_and_evaluate(config, tmp_path / str(count))
        if count == 4:
            # The program of a single step is compiled before an epoch needs it.
            assert executed.pop(1) == 1
        assert executed == 3 * {1: 6 * [1], 2: 3 * [2], 4: [4, 1, 1], 7: 6 * [1]}[count]
        histories[count] = _history(tmp_path / str(count))
    for records in zip(*histories.values(), strict=True):
        first, *others = ({k: r[k] for k in r if "second" not in k} for r in records)
        for other in others:
            assert other == pytest.approx(first, rel=1e-4)
    assert _weights(tmp_path / "7") == _weights(tmp_path / "1")


def test_executions_of_several_steps_are_saved_and_resumed(image_folder, tmp_path, monkeypatch):
    changes = {"train.steps_per_execution": 4, "checkpoint.every_steps": 3, "checkpoint.keep": 9}
    config = _tiny(image_folder, **changes)
    train_and_evaluate(config, tmp_path / "whole")
    steps = sorted(int(path.name) for path in (tmp_path / "whole" / "checkpoints").iterdir())
    # A checkpoint is saved after the first call of a compiled program that reaches or passes step
    # 3, 6, 9, ...
    assert steps == [4, 6, 10, 12, 16, 18]
    real, prepared = Programs.send, []

    def interrupt(programs, batches):
        prepared.append(len(batches))
        # The first 1 in this list is no training step: the program of a single step is compiled
        # early.
        if prepared == [4, 1, 1, 1, 4]:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(programs, batches)

    monkeypatch.setattr(Programs, "send", interrupt)
    with pytest.raises(Interrupted, match="saved after step 10"):
        train_and_evaluate(config, tmp_path / "parts")
    monkeypatch.setattr(Programs, "send", real)
    train_and_evaluate(config, tmp_path / "parts")
    assert _weights(tmp_path / "parts") == _weights(tmp_path / "whole")


def test_several_steps_are_the_default_on_accelerators_only():
    assert default_execution_length(on_device=True, platform="cpu") == 1
    assert default_execution_length(on_device=True, platform="gpu") == 8
    assert default_execution_length(on_device=False, platform="gpu") == 1


def test_the_train_step_is_compiled_once(image_folder, tmp_path, monkeypatch):
    # Without this call, the counts below would include the programs of other tests.
    jax.clear_caches()
    made = []
    real = loop.make_programs

    def spy(*args):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(loop, "make_programs", spy)
    train_and_evaluate(_tiny(image_folder), tmp_path / "run")
    (compiled,) = made
    assert compiled.train_step._cache_size() == 1
    assert compiled.eval_step._cache_size() == 1
    assert compiled.merge._cache_size() == 1


# Tests of runs that are killed or interrupted, in new processes.

SMOKE = [
    *(sys.executable, "-m", "cnn_jax.main", "--config=configs/smoke.py"),
    "--config.report.detail=none",
]


def _start(workdir, *flags, **options):
    return subprocess.Popen(
        [*SMOKE, f"--workdir={workdir}", *flags],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """An uninterrupted run of configs/smoke.py."""
    workdir = tmp_path_factory.mktemp("smoke") / "run"
    process = _start(workdir)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return types.SimpleNamespace(workdir=workdir, stdout=stdout, stderr=stderr)


def _assert_same_except_times(first, second):
    """Checks that two runs have bitwise equal state, metrics, log, bundle and report."""
    ends = chaos.read_results(first), chaos.read_results(second)
    assert ends[0].keys() == ends[1].keys()
    assert any("opt_state" in name for name in ends[0])
    differing = {name: chaos.differing_bits(ends[0][name], ends[1][name]) for name in ends[0]}
    assert not any(differing.values()), differing


def test_a_run_killed_at_random_moments_ends_bitwise_the_same(tmp_path):
    """Kills a run at three random moments, one of which is during a save."""
    outcome = chaos.kill_repeatedly(tmp_path, kills=3, epochs=6, rng=random.Random())
    assert outcome.kills == {"anywhere": 2, "save": 1, "bundle": 0}
    assert outcome.compared > 500_000
    assert not any(outcome.differing.values()), outcome.differing


def _interrupt(workdir, signum):
    """Starts a run and interrupts it with a signal after epoch 1; returns the saved step."""
    process = _start(workdir)
    while not (workdir / "metrics.jsonl").exists() or not _history(workdir):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signum)
    _, stderr = process.communicate()
    assert process.returncode == 75
    assert "saved after step" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


def test_a_run_interrupted_within_an_epoch_saves_and_resumes(smoke, tmp_path):
    """The run is interrupted by SIGINT; test_faults.py also tests SIGTERM."""
    for attempt in range(5):
        workdir = tmp_path / str(attempt)
        step = _interrupt(workdir, signal.SIGINT)
        # An epoch has 22 steps. At a multiple of 22, the signal arrived between two epochs, and the
        # test tries again.
        if step % 22:
            break
    else:
        pytest.fail("no signal came within an epoch")
    process = _start(workdir)
    _, stderr = process.communicate()
    assert process.returncode == 0
    assert f"continues from step {step}" in stderr
    _assert_same_except_times(smoke.workdir, workdir)


@pytest.mark.parametrize("delay", [0.0, 0.7, 3.0])
def test_ctrl_c_that_also_reaches_worker_processes_saves_the_run(tmp_path, delay):
    """A run is saved on Ctrl-C, although the terminal also sends SIGINT to the worker processes."""
    write_images(tmp_path / "images", per_class=40)
    workdir = tmp_path / "run"
    flags = [
        f"--config.data.source=folder:{tmp_path / 'images'}",
        "--config.data.image_size=16",
        "--config.model.features=(4,8)",
        "--config.train.epochs=400",
        "--config.train.patience=400",
        "--config.data.workers=2",
        "--config.data.cache=none",
    ]
    process = _start(workdir, *flags, start_new_session=True)
    while not (workdir / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 75, stderr
    assert "saved after step" in stderr
    assert "Traceback" not in stderr


def test_ctrl_c_during_compilation_saves_the_run(tmp_path):
    process = _start(tmp_path / "run", env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"})
    for line in process.stderr:
        if line.startswith("results"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 75
    assert "saved after step 1;" in stderr


def test_the_output_is_plain_text_in_a_file(smoke):
    stdout, stderr = smoke.stdout, smoke.stderr
    assert "\x1b" not in stdout + stderr
    assert "\r" not in stdout + stderr
    for fact in ("float32", "train 693, validation 200, test 107", "129,290 parameters", "MFLOP"):
        assert fact in stderr
    epochs = [
        line for line in stderr.splitlines() if line.strip().startswith(("1/3", "2/3", "3/3"))
    ]
    assert len(epochs) == 3
    assert epochs[0].endswith("best")
    assert not [x for x in stderr.splitlines() if len(x) > 80 and str(REPOSITORY) not in x]
    assert "cnn_jax predict --bundle=" in stdout
    assert math.isfinite(float(stdout.split("accuracy ")[1].split("%")[0]))


def test_images_on_the_device_train_bitwise_the_same(image_folder, tmp_path):
    changes = {"augment.place": "device", "train.epochs": 2}
    streamed = _tiny(image_folder, **changes, **{"data.cache": "none"})
    resident = _tiny(image_folder, **changes, **{"data.cache": "device"})
    report = train_and_evaluate(streamed, tmp_path / "streamed")
    assert train_and_evaluate(resident, tmp_path / "resident") == report
    assert _weights(tmp_path / "resident") == _weights(tmp_path / "streamed")


@pytest.fixture
def imbalanced_folder(tmp_path):
    """A folder with 60 images of class red, 20 of class green and 6 of class blue."""
    write_images(tmp_path / "images", per_class=60)
    for name, keep in (("green", 20), ("blue", 6)):
        for path in sorted((tmp_path / "images" / name).iterdir())[keep:]:
            path.unlink()
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("balance", "expected_line"),
    [
        ("loss", "weights of losses are from 0.475 (red) to 4.75 (blue); metrics are unweighted"),
        ("sampling", "each image of blue 4.75 times and of red 0.475 times"),
    ],
)
def test_balancing_improves_rare_classes_and_is_described(
    imbalanced_folder, tmp_path, capfd, balance, expected_line
):
    # The seed is not 0, because with seed 0 the initial weights already separate the three colours.
    changes = {"seed": 2, "train.epochs": 6, "data.split": (0.67, 0.17, 0.16)}
    changes |= {"optimizer.learning_rate": 2e-3, "optimizer.final_learning_rate": 2e-3}
    recalls = {}
    for mode in ("none", balance):
        config = _tiny(imbalanced_folder, **changes, **{"train.balance": mode})
        report = train_and_evaluate(config, tmp_path / mode)
        recalls[mode] = np.mean(
            [report["train"]["per_class"][c]["recall"] for c in ("blue", "green")]
        )
        # The report contains each image once, with and without balancing.
        assert report["train"]["count"] == 57
    assert expected_line in capfd.readouterr().err
    assert recalls[balance] > recalls["none"]


@pytest.mark.parametrize(("balance", "expected"), [("none", None), ("sampling", [4, 14, 42])])
def test_training_metrics_are_reweighted_if_classes_are_sampled(
    imbalanced_folder, tmp_path, monkeypatch, balance, expected
):
    class_counts_of_calls = []
    compute = loop.Metrics.compute

    def spy(metrics, class_counts=None):
        class_counts_of_calls.append(class_counts)
        return compute(metrics, class_counts)

    monkeypatch.setattr(loop.Metrics, "compute", spy)
    changes = {"train.balance": balance, "train.epochs": 1, "data.stratify": "exact"}
    train_and_evaluate(_tiny(imbalanced_folder, **changes), tmp_path / "run")
    validation_counts, train_counts = class_counts_of_calls
    assert validation_counts is None
    assert (None if train_counts is None else train_counts.tolist()) == expected


def test_a_run_reports_the_findings_of_dirty_data(tmp_path, capfd):
    write_images(tmp_path / "images", per_class=20)
    for i in range(3):
        content = (tmp_path / "images" / "red" / f"{i:03d}.png").read_bytes()
        (tmp_path / "images" / "blue" / f"copy{i}.png").write_bytes(content)
    (tmp_path / "images" / "green" / "bad\x1b[31m.jpg").write_bytes(b"")
    (tmp_path / "images" / "green" / "Thumbs.db").write_bytes(b"x")
    config = _tiny(tmp_path / "images", **{"data.max_unreadable": 0.02, "train.epochs": 1})
    train_and_evaluate(config, tmp_path / "run")
    shown = capfd.readouterr().err
    assert (
        "checked     1 unreadable image is left out; no image is rotated by EXIF; 3 exact copies "
        "(3 sets with different labels)\n"
    ) in shown
    assert "ignored: 1 file or folder of another program" in shown
    assert (
        "warning     3 sets of equal images with different labels, such as blue/copy0.png" in shown
    )
    assert "\x1b" not in shown
    listed = (tmp_path / "run" / "report" / "unreadable.csv").read_text()
    assert listed == "id,reason\ngreen/bad\x1b[31m.jpg,is empty\n"


def test_a_run_with_images_in_other_splits_is_refused(image_folder, tmp_path):
    rows = [f"{path},{path.parent.name}" for path in sorted(image_folder.rglob("*.png"))]
    splits = ["train"] * 16 + ["validation"] * 2 + ["test"] * 2
    table = tmp_path / "t.csv"

    def write(splits):
        lines = [f"{row},{split}" for row, split in zip(rows, splits * 3, strict=True)]
        table.write_text("\n".join(["path,label,split", *lines]))

    changes = {"data.source": f"csv:{table}", "data.allow_outside": True, "train.epochs": 1}
    write(splits)
    train_and_evaluate(_tiny(image_folder, **changes), tmp_path / "run")
    write(splits[::-1])
    with pytest.raises(TrainingError, match="the data has changed"):
        train_and_evaluate(_tiny(image_folder, **changes), tmp_path / "run")


def test_a_refused_resume_does_not_change_the_run(finished, tmp_path):
    workdir, config, _ = finished
    write_images(tmp_path / "other", per_class=20, seed=1)
    (tmp_path / "other" / "red" / "bad.png").write_bytes(b"x")
    before = {
        name: (workdir / name).read_bytes() for name in ("config.json", "report/unreadable.csv")
    }
    changed = config.copy_and_resolve_references()
    changed.data.source, changed.data.max_unreadable = f"folder:{tmp_path / 'other'}", 0.5
    with pytest.raises(TrainingError, match="the data has changed"):
        train_and_evaluate(changed, workdir)
    assert {name: (workdir / name).read_bytes() for name in before} == before


def test_images_on_a_cpu_device_need_augmentation_on_it(image_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"set augment\.place=device too"):
        train_and_evaluate(_tiny(image_folder, **{"data.cache": "device"}), tmp_path / "run")


# Tests of runs that continue: with more epochs, from an earlier checkpoint, or from the weights of
# another run.


def test_a_finished_run_can_be_extended(finished, image_folder, tmp_path, capfd):
    """An extended run equals a run that was planned with 5 epochs and 3 decay epochs."""
    first, _, _ = finished
    workdir = tmp_path / "run"
    shutil.copytree(first, workdir)
    train_and_evaluate(_tiny(image_folder, **{"train.epochs": 5}), workdir)
    shown = capfd.readouterr().err
    assert "changed     train.epochs: 3 -> 5" in shown
    assert "learning rate reaches its final value, 0.0001, after 3 epochs" in shown
    history = _history(workdir)
    assert history[:3] == _history(first)
    rates = [record["learning_rate"] for record in history]
    assert rates[3:] == pytest.approx([1e-4, 1e-4])
    planned = {"train.epochs": 5, "optimizer.decay_epochs": 3}
    train_and_evaluate(_tiny(image_folder, **planned), tmp_path / "planned")
    _assert_same_except_times(workdir, tmp_path / "planned")
    assert json.loads((workdir / "config.json").read_text())["train"]["epochs"] == 5
    with pytest.raises(
        ConfigError,
        match=r"train\.epochs: must be at least 5, the number of finished epochs, got 4",
    ):
        train_and_evaluate(_tiny(image_folder, **{"train.epochs": 4}), workdir)


def test_a_run_stopped_early_resumes_with_more_patience(image_folder, tmp_path):
    too_high = {
        "train.epochs": 8,
        "optimizer.learning_rate": 0.5,
        "optimizer.final_learning_rate": 0.5,
    }
    config = _tiny(image_folder, **too_high, **{"train.patience": 1})
    train_and_evaluate(config, tmp_path / "run")
    stopped = len(_history(tmp_path / "run"))
    assert stopped < 8
    config = _tiny(image_folder, **too_high, **{"train.patience": 8})
    train_and_evaluate(config, tmp_path / "run")
    assert len(_history(tmp_path / "run")) == 8


def test_a_run_is_rewound_to_a_checkpoint_once(finished, tmp_path, capfd):
    first, config, _ = finished
    workdir = tmp_path / "run"
    shutil.copytree(first, workdir)
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    back = config.copy_and_resolve_references()
    back.checkpoint.restore_step = kept[0]
    train_and_evaluate(back, workdir)
    assert f"continues from step {kept[0]}\n" in capfd.readouterr().err
    _assert_same_except_times(workdir, first)
    # If a scheduler repeats the command, the run is not rewound again, and no epoch is lost.
    train_and_evaluate(back, workdir)
    printed = capfd.readouterr().err
    assert "training is finished already, after step 18\n" in printed
    epochs = [line for line in printed.splitlines() if line.startswith(("   1/", "   2/", "   3/"))]
    values = [record[config.train.monitor] for record in _history(workdir)]
    assert [line.endswith("best") for line in epochs] == [
        value > max(values[:i], default=-1) for i, value in enumerate(values)
    ]
    back.checkpoint.restore_step = 7
    with pytest.raises(ConfigError, match=r"restore_step: there is no checkpoint of step 7 in"):
        train_and_evaluate(back, workdir)


STILL = {
    "train.epochs": 1,
    "optimizer.learning_rate": 1e-12,
    "optimizer.final_learning_rate": 1e-12,
}


@pytest.mark.parametrize("part", ["", "bundle"])
def test_a_run_starts_from_the_weights_of_another_run(
    finished, image_folder, tmp_path, capfd, part
):
    """`init_from` is a run or a bundle; the optimizer state and the epochs are not copied."""
    first, _, report = finished
    config = _tiny(image_folder, **STILL, **{"checkpoint.init_from": str(first / part)})
    after = train_and_evaluate(config, tmp_path / "run")
    assert f"starts from {first / part}".rstrip("/") in capfd.readouterr().err
    old, new = (
        read_bundle(run / "bundle").variables["params"] for run in (first, tmp_path / "run")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), old, new)
    assert after["test"]["count"] == report["test"]["count"]
    assert [record["epoch"] for record in _history(tmp_path / "run")] == [1]


def test_the_head_is_not_copied_for_other_classes(finished, tmp_path, capfd):
    first, _, _ = finished
    write_images(tmp_path / "images", per_class=10)
    (tmp_path / "images" / "red").rename(tmp_path / "images" / "scarlet")
    changes = {"checkpoint.init_from": str(first), "seed": 1}
    config = _tiny(tmp_path / "images", **STILL, **changes)
    train_and_evaluate(config, tmp_path / "run")
    assert "all weights except head: new classes" in capfd.readouterr().err
    old, new = (
        read_bundle(run / "bundle").variables["params"] for run in (first, tmp_path / "run")
    )
    np.testing.assert_allclose(old["conv1"]["kernel"], new["conv1"]["kernel"], atol=1e-6)
    assert not np.allclose(old["head"]["kernel"], new["head"]["kernel"], atol=1e-2)


def test_the_split_seed_keeps_the_splits_of_another_training_seed(image_folder, tmp_path):
    changes = {"train.epochs": 1, "data.stratify": "stable", "report.detail": "none"}
    for name, seeds in (
        ("first", {"seed": 1}),
        ("same_splits", {"seed": 2, "data.split_seed": 1}),
        ("other_splits", {"seed": 2}),
    ):
        train_and_evaluate(_tiny(image_folder, **changes, **seeds), tmp_path / name)
    first, same, other = (
        read_bundle(tmp_path / name / "bundle") for name in ("first", "same_splits", "other_splits")
    )
    assert same.data == first.data
    assert same.data["division"]["seed"] == 1
    assert other.data["fingerprint"] != first.data["fingerprint"]
    kernels = [bundle.variables["params"]["conv1"]["kernel"] for bundle in (first, same, other)]
    assert not np.array_equal(kernels[0], kernels[1])
    assert np.array_equal(*(report_ids(tmp_path / name) for name in ("first", "same_splits")))
    with pytest.raises(ConfigError, match=r"another configuration \(data.split_seed: 1 -> -1"):
        train_and_evaluate(_tiny(image_folder, **changes, seed=2), tmp_path / "same_splits")


def report_ids(run):
    """Returns the ids of a run's test examples."""
    lines = (run / "report" / "predictions.csv").read_text().splitlines()[1:]
    return [line.partition(",")[0] for line in lines]


def test_weights_of_another_network_are_refused(finished, image_folder, tmp_path):
    first, _, _ = finished
    config = _tiny(
        image_folder, **{"model.dense": 12, "checkpoint.init_from": str(first), "train.epochs": 1}
    )
    message = "init_from: .* does not fit the network cnn: .*dense/bias is 16 instead of 12"
    with pytest.raises(ConfigError, match=message):
        train_and_evaluate(config, tmp_path / "run")
    config = _tiny(image_folder, **{"checkpoint.init_from": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match=r"init_from: .*nowhere has no bundle\.json"):
        train_and_evaluate(config, tmp_path / "other")
    # The refused run left no folder `other`. A run without a bundle is also refused as the source.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    config = _tiny(image_folder, **{"checkpoint.init_from": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match="is a run without a bundle"):
        train_and_evaluate(config, tmp_path / "third")
    config = _tiny(image_folder, **STILL, **{"checkpoint.init_from": str(first)})
    train_and_evaluate(config, tmp_path / "other")


def test_the_result_is_a_finished_epoch_after_a_rewind(image_folder, tmp_path):
    """A run rewound from epoch 3, and limited to two epochs, gives the result of epoch 2.

    The restored step, 16, is in the middle of epoch 3.
    """
    always_better = {"train.monitor": "validation_loss", "optimizer.decay_epochs": 3}
    saved = {"checkpoint.every_steps": 4, "checkpoint.keep": 9, **always_better}
    train_and_evaluate(_tiny(image_folder, **saved), tmp_path / "run")
    changes = saved | {"train.epochs": 2, "checkpoint.restore_step": 16}
    train_and_evaluate(_tiny(image_folder, **changes), tmp_path / "run")
    train_and_evaluate(
        _tiny(image_folder, **always_better, **{"train.epochs": 2}), tmp_path / "planned"
    )
    assert _weights(tmp_path / "run") == _weights(tmp_path / "planned")


def test_without_the_best_checkpoint_the_next_best_is_used(image_folder, tmp_path, capfd):
    workdir = tmp_path / "run"
    # With this high learning rate, the run stops two epochs after the best epoch.
    rate = {"optimizer.learning_rate": 0.5, "optimizer.final_learning_rate": 0.5}
    config = _tiny(image_folder, **rate, **{"train.epochs": 30, "train.patience": 2})
    train_and_evaluate(config, workdir)
    best = _history(workdir)[-3]["step"]
    shutil.rmtree(workdir / "checkpoints" / str(best))
    train_and_evaluate(config, workdir)
    assert "the checkpoint of that epoch is missing; the result is the best epoch with a" in (
        capfd.readouterr().err
    )


def test_checkpoints_without_a_configuration_are_refused(finished, image_folder, tmp_path):
    first, config, _ = finished
    shutil.copytree(first, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has checkpoints but no config\.json"):
        train_and_evaluate(config, tmp_path / "run")


def test_automatic_values_stay_the_same_when_a_run_resumes(finished, tmp_path, monkeypatch, capfd):
    """The run continues on a machine with another type of device."""
    first, config, report = finished
    workdir = tmp_path / "run"
    shutil.copytree(first, workdir)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    again = _tiny(pathlib.Path(config.data.source.removeprefix("folder:")))
    assert train_and_evaluate(again, workdir) == report
    assert "changed" not in capfd.readouterr().err


def test_checkpoints_within_epochs_change_no_result(finished, image_folder, tmp_path):
    first, _, _ = finished
    changes = {"checkpoint.every_steps": 4, "checkpoint.keep": 9}
    train_and_evaluate(_tiny(image_folder, **changes), tmp_path / "run")
    _assert_same_except_times(tmp_path / "run", first)
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == [4, 6, 8, 12, 16, 18]


def test_a_trace_of_a_few_steps_opens_in_perfetto(image_folder, tmp_path, capfd):
    train_and_evaluate(_tiny(image_folder), tmp_path / "run", profile=True)
    assert f"a trace of 5 steps is in {tmp_path / 'run' / 'profile'}" in capfd.readouterr().err
    (file,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert steps == {str(step) for step in range(10, 15)}
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_short_run_reports_that_there_is_no_trace(image_folder, tmp_path, capfd):
    config = _tiny(image_folder, **{"train.epochs": 1})
    train_and_evaluate(config, tmp_path / "run", profile=True)
    assert "no trace: there were too few steps" in capfd.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()


def test_the_plan_describes_a_batch_in_parts(image_folder, tmp_path, capfd):
    config = _tiny(
        image_folder, **{"train.batch_size": 16, "train.accumulation_steps": 2, "train.epochs": 1}
    )
    train_and_evaluate(config, tmp_path / "run")
    line = "each batch in 2 parts of 8 images; BatchNorm uses the statistics of each part"
    assert line in capfd.readouterr().err


def test_images_are_mixed_if_a_probability_is_set(finished, image_folder, tmp_path, capfd):
    changes = {"augment.mixup_probability": 0.5, "augment.cutmix_probability": 0.5}
    report = train_and_evaluate(_tiny(image_folder, **changes), tmp_path / "run")
    line = "MixUp of 50% (alpha 0.2), CutMix of 50% (alpha 1); train metrics are of mixed images"
    assert line in capfd.readouterr().err
    # The report is computed on images that are not mixed.
    assert report["train"]["count"] == 42
    workdir, _, _ = finished
    mixed, plain = (_history(folder)[0]["train_loss"] for folder in (tmp_path / "run", workdir))
    assert mixed != plain


def test_the_last_heartbeat_is_done(finished):
    workdir, config, _ = finished
    train_and_evaluate(config, workdir)
    beat = json.loads((workdir / "heartbeat.json").read_text())
    assert (beat["step"], beat["activity"]) == (18, "done")


def test_on_epoch_and_a_deadline_may_stop_a_run_that_resumes(
    finished, image_folder, tmp_path, capfd
):
    calls = []

    def stop_after_two(history):
        calls.append([record["epoch"] for record in history])
        if len(history) == 2:
            raise KeyError("enough")

    config, workdir = _tiny(image_folder), tmp_path / "run"
    with pytest.raises(KeyError, match="enough"):
        train_and_evaluate(config, workdir, on_epoch=stop_after_two)
    assert calls == [[], [1], [1, 2]]
    # The deadline has already passed, but the run still trains one step and saves a checkpoint.
    with pytest.raises(Interrupted, match="saved after step 13"):
        train_and_evaluate(config, workdir, on_epoch=calls.append, deadline=time.monotonic())
    assert [record["epoch"] for record in calls[3]] == [1, 2]

    # A study measures only the validation split; the train and test splits can be measured later.
    config.report.detail, config.report.splits = "none", ("validation",)
    capfd.readouterr()
    report = train_and_evaluate(config, workdir, on_epoch=calls.append)
    assert set(report) == {"validation"} == set(read_bundle(workdir / "bundle").metrics)
    assert json.loads((workdir / "report" / "metrics.json").read_text()) == report
    assert not (workdir / "report" / "predictions.csv").exists()
    assert capfd.readouterr().out == ""
    config.report.splits = ("train", "validation", "test")
    before = _history(workdir)
    assert train_and_evaluate(config, workdir) == finished[2]
    assert _history(workdir) == before
    assert _weights(workdir) == _weights(finished[0])


def test_training_evaluation_and_prediction_use_the_same_preprocessing(tmp_path):
    """The classes of these float images can be distinguished only with white level 1."""
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = (np.indices((16, 16))[i % 2] % 4 < 2) * 0.6 + rng.uniform(0, 0.4, (16, 16))
        Image.fromarray(wave.astype(np.float32)).save(path)
    changes = {"train.epochs": 1, "report.detail": "none"}
    with pytest.raises(DataError, match=r"float images .* set --config.data.white_level=1, or"):
        train_and_evaluate(_tiny(tmp_path / "data", **changes), tmp_path / "run")
    changes |= {"data.white_level": 1.0, "data.interpolation": "bicubic"}
    changes |= {"data.resize": "crop", "data.crop_ratio": 0.8}
    train_and_evaluate(_tiny(tmp_path / "data", **changes), tmp_path / "run")
    predictor = BundlePredictor.load(tmp_path / "run" / "bundle")
    preprocessing = predictor.preprocessing
    assert (preprocessing.white_level, preprocessing.interpolation) == (1, "bicubic")
    assert (preprocessing.resize, preprocessing.crop_ratio) == ("crop", 0.8)
    dataset = open_as_trained(predictor, f"folder:{tmp_path / 'data'}")
    paths = [tmp_path / "data" / example_id for example_id in dataset.source.ids]
    probabilities = predict_split(predictor, dataset.loader, np.arange(len(paths)))
    arrays = [np.asarray(Image.open(path)) for path in paths]
    for images in (paths, [path.read_bytes() for path in paths], arrays):
        rows = [prediction.probabilities for prediction in predict_batch(predictor, images)]
        np.testing.assert_allclose(rows, probabilities, atol=1e-6)
