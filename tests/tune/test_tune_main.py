"""Tests of the tune command: in this process without training, and once with real training."""

import argparse
import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY
from fakes import Log, install, raising

from cnn_jax.system import cli, compilation_cache, runtime
from cnn_jax.system.errors import ConfigError, DataError, Interrupted, TrainingError, UserError
from cnn_jax.tune import __main__ as command
from cnn_jax.tune import outcome, storage, study

# ml_collections causes this warning.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")

SPACE = """
from optuna.distributions import CategoricalDistribution, FloatDistribution

def get_space():
    return {
        "optimizer.learning_rate": FloatDistribution(1e-3, 3e-2, log=True),
        "model.features": CategoricalDistribution(["(4,)"]),
        "model.dropout": FloatDistribution(0.0, 0.5),
    }
"""


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.py"
    path.write_text(SPACE)
    return path


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("5m", 300),
        ("1h", 3600),
        ("2d", 172800),
        ("1h30m", 5400),
        ("1h30", 3630),
        ("1d2h3m4s", 93784),
        ("0h5m", 300),
    ],
)
def test_durations_are_converted_to_seconds(text, seconds):
    assert cli.duration(text) == seconds
    assert isinstance(cli.duration(text), float)


@pytest.mark.parametrize(
    "text", ["", "0", "0m", "h", "1.5h", "-5m", "5 m", "5min", "30m1h", "1h1h", "1h\n", "soon"]
)
def test_a_wrong_duration_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a time such as 90m or 1h30m"):
        cli.duration(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--study: is required"),
        (["--space=s.py"], "--study: is required"),
        (["--study=a/b"], "--study: must be letters, digits, _, - and ."),
        (["--study=.."], "--study: must be letters"),
        (["--study=-a"], "--study: must be letters"),
        (["--study="], "--study: must be letters"),
        (["--trials=0"], "--trials: must be 1 or more"),
        (["--trials=-3"], "--trials: must be an integer"),
        (["--pruner=median"], "--pruner: there is no 'median'"),
        (["--time_budget=soon"], "--time_budget: must be a time such as"),
        (["--storage_timeout=0"], "--storage_timeout: must be a time"),
        (["--workdir="], "--workdir: must not be empty"),
        (["--storage="], "--storage: must not be empty"),
    ],
)
def test_a_wrong_flag_is_a_usage_error(arguments, message):
    with pytest.raises(ConfigError) as error:
        command.main(arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space=nowhere.py"], "--space: there is no file 'nowhere.py'"),
        (["--config=nowhere.py"], "--config: there is no file 'nowhere.py'"),
        (["--config.train.epoch=3"], "did you mean train.epochs?"),
        (["--trial=3"], "unexpected argument '--trial=3'; did you mean --trials=3?"),
        (["stray"], "unexpected argument 'stray'"),
        (["--storage=nonsense"], "--storage: must be a database's URL"),
        (["--config.train.batch_size=0"], "config.train.batch_size: must be"),
    ],
)
def test_a_usage_error_is_one_line(tmp_path, space, patched, arguments, message):
    flags = [f"--workdir={tmp_path / 's'}", "--study=name", f"--space={space}", *arguments]
    with pytest.raises(ConfigError) as raised:
        command.main(flags)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2
    assert not list(tmp_path.glob("s/trials"))


def test_missing_data_leaves_no_folder(tmp_path, space, patched, monkeypatch):
    def missing(config, track):
        raise DataError("there is no folder")

    monkeypatch.setattr(study, "open_dataset", missing)
    with pytest.raises(DataError):
        command.main([f"--workdir={tmp_path / 's'}", "--study=name", f"--space={space}"])
    assert not (tmp_path / "s").exists()


@pytest.fixture
def patched(monkeypatch):
    """Replaces the training with a fake, and disables the report page and the runtime options."""
    monkeypatch.setattr(compilation_cache, "keep_compiled", lambda: None)
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(outcome, "write_study_page", lambda study, folder: None)
    return install(monkeypatch.setattr)


@pytest.fixture
def tune(tmp_path, space, patched, monkeypatch):
    """A function that runs the command with the flags of a small study and additional flags."""
    monkeypatch.setattr(storage, "open_storage", Log().open)
    usual = ["--study=name", f"--space={space}", f"--workdir={tmp_path / 's'}"]
    usual += ["--config.train.epochs=3", "--trials=4"]
    return lambda *flags: command.main([*usual, *flags])


@pytest.mark.parametrize("name", ["optuna", "sqlalchemy"])
def test_the_error_for_a_missing_library_says_how_to_install_it(monkeypatch, space, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as raised:
        command.main(["--study=name", f"--space={space}"])
    assert (
        str(raised.value)
        == f"{name} is not installed: install it with: pip install 'cnn_jax[tune]'"
    )


def test_the_result_is_on_stdout_and_progress_on_stderr(tune, tmp_path, capsys):
    tune("--config.model.dense=8")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == [
        *("trial", "state", "validation_accuracy", "epochs", "seconds"),
        *("dropout", "features", "learning_rate"),
    ]
    assert len([line for line in lines if " complete  " in line or " pruned  " in line]) == 4
    assert lines[-3].startswith("best        trial ")
    assert "4 trials of at most 3 epochs, best by validation_accuracy" in err
    assert "shapes; the test split is not used" in err
    assert "optimizer.learning_rate  0.001 to 0.03, logarithmic" in err
    assert "model.features           (4,)" in err
    assert "pruning     hyperband, judged after epochs 1; or never" in err
    assert f"results     {tmp_path}/s" in err
    assert [line.split()[1] for line in err.splitlines() if line.startswith("trial ")] == [
        *"00112233"
    ]
    assert "complete after 3 epochs" in err
    assert not any(line in err for line in lines if line)


def test_a_study_has_a_default_folder(tune, tmp_path, monkeypatch, space):
    monkeypatch.chdir(tmp_path)
    command.main(
        [
            "--study=name",
            f"--space={space}",
            f"--config={REPOSITORY}/configs/default.py",
            "--config.train.epochs=1",
            "--trials=1",
        ]
    )
    assert (tmp_path / "studies/name/best.py").exists()


def test_flags_reach_the_study(tune, patched):
    tune("--pruner=none", "--config.model.dense=8", "--trials=2")
    assert patched.configs.keys() == {0, 1}
    assert patched.configs[0].model.dense == 8
    with pytest.raises(ConfigError, match=r"another definition \(pruner: none -> hyperband\)"):
        tune("--config.model.dense=8")


def test_a_time_budget_ends_the_study_normally(tune, patched, capsys):
    """After the time budget, the study ends without an error, and the next start continues it."""

    def take_long(number, epoch):
        if (number, epoch) == (2, 2):
            time.sleep(1)

    patched.before_epoch = take_long
    tune("--pruner=none", "--time_budget=1")
    assert "2 complete, 0 pruned, 0 failed, 1 running" in capsys.readouterr().out
    tune("--pruner=none")
    assert "0 running" in capsys.readouterr().out


def test_a_time_budget_without_a_finished_trial_exits_with_75(tune, patched):
    patched.before_epoch = lambda number, epoch: time.sleep(1)
    with pytest.raises(Interrupted, match="the time is over and no trial has finished"):
        tune("--pruner=none", "--time_budget=1")


def test_the_errors_are_shown_if_no_trial_finished(tune, patched, capsys):
    patched.before_epoch = raising(TrainingError("the loss is not finite"), 0, 1)
    with pytest.raises(UserError) as raised:
        tune("--trials=1")
    assert raised.value.exit_code == 1
    assert str(raised.value) == ("no trial has finished; trial 0: the loss is not finite")
    assert "0 complete, 0 pruned, 1 failed" in capsys.readouterr().out


def begin(module, workdir, *flags):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", f"cnn_jax.{module}", f"--workdir={workdir}"),
            *flags,
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    process.stdout, process.stderr = process.communicate(timeout=300)
    assert "Traceback" not in process.stderr
    return process


def epochs(folder):
    log = folder / "metrics.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def test_a_study_with_real_trainings(image_folder, tmp_path, space):
    """A study is interrupted and resumed; its best trial is measured on the test split."""
    workdir = tmp_path / "s"
    flags = [
        *("--study=real", f"--space={space}", "--trials=3", "--config=configs/folder.py"),
        *("--config.data.image_size=16", "--config.model.dense=0", "--config.train.batch_size=8"),
        *("--config.train.epochs=2", "--config.report.detail=none"),
        f"--config.data.source=folder:{image_folder}",
    ]
    first = begin("tune", workdir, *flags)
    while len(epochs(workdir / "trials/0000")) < 1:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert end(first).returncode == 75
    assert first.stderr.splitlines()[-1].startswith("interrupted")
    assert first.stdout == ""

    second = end(begin("tune", workdir, *flags))
    assert second.returncode == 0, second.stderr
    study = json.loads((workdir / "study.json").read_text())
    assert [trial["number"] for trial in study["trials"]] == [0, 1, 2]
    for trial in study["trials"]:
        folder = workdir / trial["folder"]
        config = json.loads((folder / "config.json").read_text())
        assert config["optimizer"]["learning_rate"] == trial["params"]["optimizer.learning_rate"]
        assert config["report"]["splits"] == ["validation"]
        records = list(map(json.loads, epochs(folder)))
        assert [record["validation_accuracy"] for record in records] == trial["curve"]
        is_complete = trial["state"] == "complete"
        assert (folder / "bundle").exists() == is_complete
        assert len(records) == 2 or trial["state"] == "pruned"
        if is_complete:
            assert json.loads((folder / "report/metrics.json").read_text()).keys() == {"validation"}
            assert not (folder / "report/predictions.csv").exists()
    assert (workdir / "index.html").stat().st_size > 10_000

    best = workdir / study["trials"][study["best"]]["folder"]
    assert f"--workdir={best}" in second.stdout.splitlines()[-1]
    before = epochs(best)
    validation = json.loads((best / "report/metrics.json").read_text())["validation"]
    measured = end(begin("main", best, f"--config={workdir}/best.py"))
    assert measured.returncode == 0, measured.stderr
    assert epochs(best) == before
    metrics = json.loads((best / "report/metrics.json").read_text())
    assert metrics.keys() == {"train", "validation", "test"}
    assert metrics["validation"] == validation
