"""Tests of the training of several networks in one program."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from conftest import make_tiny_config

from cnn_jax import main as command
from cnn_jax.data.mix import Mixing
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.models.cnn import CNN
from cnn_jax.report import run_report
from cnn_jax.system import signals
from cnn_jax.system.errors import ConfigError, Interrupted, TrainingError
from cnn_jax.training import loop, members
from cnn_jax.training.loop import train_and_evaluate
from cnn_jax.training.members import train_members
from cnn_jax.training.programs import Programs
from cnn_jax.training.step import TrainStep

SEEDS = (3, 4)


def _config(image_folder, **changes):
    fixed = {"train.epochs": 4, "report.reference": False, "report.detail": "none"}
    return make_tiny_config(image_folder, **(fixed | changes))


def _history(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _weights(folder):
    return safetensors.numpy.load_file(folder / "bundle" / "weights.safetensors")


@pytest.fixture(scope="module")
def separate():
    """The functions and the batches of two networks, and the results of training them separately.

    The results are the state and the metrics after two executions of two steps.
    """
    step = TrainStep(
        model=CNN(num_classes=3, features=(4, 8), dense=16, dropout=0.5),
        optimizer=optax.sgd(0.1, momentum=0.9),
        preprocessing=Preprocessing((8, 8)),
        mixing=Mixing(mixup_probability=0.5, cutmix_probability=0.5),
        ema=0.9,
    )
    programs = Programs(step, batch_size=8, devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    batches = {
        "image": rng.integers(0, 256, (2, len(SEEDS), 2, 8, 8, 8, 3), np.uint8),
        "label": rng.integers(0, 3, (2, len(SEEDS), 2, 8)).astype(np.int32),
        "mask": np.ones((2, len(SEEDS), 2, 8), bool),
    }
    expected = []
    for member, seed in enumerate(SEEDS):
        own = programs.with_seed(seed)
        state = own.init_state()
        for execution in range(2):
            arrays = {name: array[execution, member] for name, array in batches.items()}
            arrays = own.layout.to_devices(arrays, stacked=1)
            state, metrics = own.train_steps(state, arrays, None, None)
        expected.append(jax.device_get((state, metrics)))
    return programs, batches, expected


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_steps_of_members_are_those_of_separate_networks(separate, vectorize):
    """Compares all arrays of the states and of the metrics."""
    programs, batches, expected = separate
    states = [programs.with_seed(seed).init_state() for seed in SEEDS]
    states = programs.gather(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    train = programs.member_steps(SEEDS, vectorize=vectorize)
    for execution in range(2):
        arrays = {name: array[execution] for name, array in batches.items()}
        arrays = programs.layout.to_devices(arrays, stacked=2)
        states, metrics = train(states, arrays, None, None)
    found = jax.tree.leaves(jax.device_get((states, metrics)))
    for member, one in enumerate(expected):
        for (path, wanted), array in zip(jax.tree.leaves_with_path(one), found, strict=True):
            np.testing.assert_allclose(
                array[member], wanted, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path)
            )
    kernels = [one[0].params["head"]["kernel"] for one in expected]
    assert not np.allclose(*kernels, atol=1e-3)  # The seeds make a difference.


@pytest.fixture(scope="module")
def recipe(image_folder):
    """A configuration with early stopping, with which the seeds stop at different epochs."""
    changes = {"train.monitor": "validation_loss", "train.patience": 1, "seed": SEEDS[0]}
    return _config(image_folder, **changes, **{"optimizer.learning_rate": 0.05})


@pytest.fixture(scope="module")
def together(recipe, tmp_path_factory):
    """The folder of two members that were trained without an interruption."""
    folder = tmp_path_factory.mktemp("together") / "members"
    train_members(recipe, folder, 2)
    return folder


@pytest.mark.parametrize("seed", SEEDS)
def test_a_member_is_the_run_of_its_seed(recipe, together, tmp_path, seed):
    config = recipe.copy_and_resolve_references()
    config.seed, config.data.split_seed = seed, SEEDS[0]
    report = train_and_evaluate(config, tmp_path / "run")
    own, member = tmp_path / "run", together / f"seed-{seed}"
    assert (member / "config.json").read_text() == (own / "config.json").read_text()
    lengths = [len(_history(together / f"seed-{one}")) for one in SEEDS]
    assert lengths[0] != lengths[1]  # One member stops earlier than the other.
    for expected, found in zip(_history(own), _history(member), strict=True):
        for key in expected.keys() - {"seconds", "images_per_second"}:
            assert found[key] == pytest.approx(expected[key], rel=1e-3), key
    for name, weights in _weights(own).items():
        np.testing.assert_allclose(_weights(member)[name], weights, atol=1e-4, err_msg=name)
    found = json.loads((member / "report" / "metrics.json").read_text())
    assert found["test"]["loss"] == pytest.approx(report["test"]["loss"], rel=1e-3)


def test_members_that_were_stopped_and_killed_end_bitwise_the_same(
    recipe, together, tmp_path, monkeypatch
):
    folder = tmp_path / "members"
    monkeypatch.setattr(signals.Interruption, "is_due", lambda self, count: count == 2)
    with pytest.raises(Interrupted, match="saved after step 3"):
        train_members(recipe, folder, 2)
    monkeypatch.undo()
    real_save, saved = loop.save, []

    def killed(run, progress):
        saved.append((run.config.seed, progress.step))
        # The process ends after the first member has saved its second epoch.
        if len(saved) == 4:
            raise KeyboardInterrupt
        real_save(run, progress)

    monkeypatch.setattr(loop, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train_members(recipe, folder, 2)
    monkeypatch.undo()
    first, second = (folder / f"seed-{seed}" / "checkpoints" for seed in SEEDS)
    assert (first / "12").exists()
    assert not (second / "12").exists()
    train_members(recipe, folder, 2)
    for seed in SEEDS:
        own, member = folder / f"seed-{seed}", together / f"seed-{seed}"
        for name in ("bundle/weights.safetensors", "report/metrics.json", "config.json"):
            assert (own / name).read_bytes() == (member / name).read_bytes()
        for expected, found in zip(_history(member), _history(own), strict=True):
            keys = expected.keys() - {"seconds", "images_per_second"}
            assert {key: found[key] for key in keys} == {key: expected[key] for key in keys}


def test_a_repeated_command_changes_no_result(recipe, together, capfd):
    before = _weights(together / "seed-3")
    train_members(recipe, together, 2)
    assert "training is finished already" in capfd.readouterr().err
    for name, weights in _weights(together / "seed-3").items():
        np.testing.assert_array_equal(weights, before[name])


def test_more_members_delete_no_checkpoints(recipe, together, tmp_path):
    folder = shutil.copytree(together, tmp_path / "copy")
    checkpoints = sorted(folder.glob("seed-*/checkpoints/[0-9]*"))
    config = recipe.copy_and_resolve_references()
    config.train.epochs += 1  # Otherwise the first two members are finished.
    with pytest.raises(ConfigError, match="the members have no checkpoint of the same step"):
        train_members(config, folder, 3)
    assert checkpoints
    assert sorted(folder.glob("seed-*/checkpoints/[0-9]*")) == checkpoints


def test_a_loss_that_is_not_finite_names_the_member(image_folder, tmp_path):
    config = _config(image_folder, **{"optimizer.learning_rate": 1e30})
    with pytest.raises(TrainingError, match=r"the loss of seed 0 is infinite or not a number"):
        train_members(config, tmp_path / "members", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.model": 2}, "--members: needs mesh.model=1"),
        ({"checkpoint.restore_step": 6}, "use it in the run of one member"),
        ({}, "is the folder of a single run"),
    ],
)
def test_what_members_cannot_do_is_refused(image_folder, tmp_path, changes, message):
    if not changes:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=message):
        train_members(_config(image_folder, **changes), tmp_path, 2)
    assert not list(tmp_path.glob("seed-*"))


@pytest.mark.parametrize(
    "flags", [["--members=1"], ["--members=2", "--profile"], ["--members=2", "--backup=copy"]]
)
def test_wrong_flags_are_refused(tmp_path, flags):
    with pytest.raises(ConfigError, match="--members: "):
        command.main(["--config=smoke", f"--workdir={tmp_path / 'new'}", *flags])
    assert not (tmp_path / "new").exists()


def test_the_command_prints_the_command_for_the_ensemble(tmp_path, monkeypatch, capsys):
    def train(config, workdir, count):
        return {pathlib.Path(workdir) / f"seed-{number}": {} for number in range(count)}

    monkeypatch.setattr(members, "train_members", train)
    monkeypatch.setattr(run_report, "report_after_training", lambda folder, *_: f"{folder}/page")
    # With --process_count=1, the command does not look for other processes.
    command.main(["--config=smoke", "--workdir=runs", "--members=2", "--process_count=1"])
    assert capsys.readouterr().out.splitlines() == [
        "report      runs/seed-0/page",
        "report      runs/seed-1/page",
        "ensemble    cnn_jax ensemble --bundles runs/seed-0 runs/seed-1 --output=runs/ensemble",
    ]
