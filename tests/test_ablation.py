"""The table of an ablation: what is run, how it goes on, and its arithmetic."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import scipy.stats
from conftest import REPOSITORY

from cnn_jax import configuration
from cnn_jax.errors import ConfigError
from cnn_jax.tune.space import configured
from configs import default
from experiments import ablation

# Leaves what a training leaves, at once. The accuracy is the seed's and the dropout's, so that
# it is known; at a rate of 8e-3 it fails, and "slow" in the folder's path makes it wait.
TRAINING = """
    import json, pathlib, signal, sys, time

    flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
    folder = pathlib.Path(flags["workdir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "starts").open("a").write("x")
    if flags.get("config.optimizer.learning_rate") == "0.008":
        sys.exit("error: the loss is infinite")
    if flags.get("config.train.batch_size") == "16":
        print("error: config.train.batch_size: is wrong", file=sys.stderr)
        sys.exit(2)
    if "slow" in str(folder):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        (folder / "ready").touch()
        time.sleep(60)
    seed = int(flags["config.seed"])
    accuracy = 0.9 + 0.01 * seed**2 - 0.1 * float(flags.get("config.model.dropout", 0.5))
    of_split = {key: accuracy for key in ("accuracy", "precision", "recall", "f1")}
    figures = json.dumps({"test": of_split, "validation": of_split})
    for name in ("report", "bundle"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "report" / "metrics.json").write_text(figures)
    (folder / "metrics.jsonl").write_text('{"seconds": 2.0}\\n{"seconds": 4.0}\\n')
    bundle = {"data": {"fingerprint": "abc"}, "versions": {"jax": "1"}}
    (folder / "bundle" / "bundle.json").write_text(json.dumps(bundle))
"""


@pytest.fixture(autouse=True)
def training(tmp_path, monkeypatch):
    """A training command of no time, instead of the real one."""
    script = tmp_path / "training.py"
    script.write_text(textwrap.dedent(TRAINING))
    monkeypatch.setattr(ablation, "TRAIN", (sys.executable, "-S", str(script)))
    return script


def starts(folder):
    """How often each run was started."""
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/starts")}


def test_every_variant_is_a_possible_configuration():
    for variant, changes in ablation.VARIANTS.items():
        configuration.validate(configured(default.get_config(), changes), num_devices=1)
        flags = ablation.Run(pathlib.Path("x"), variant, 3, ()).flags()
        config = configuration.load(str(REPOSITORY / "configs" / "default.py"), flags)
        assert config.seed == 3
    named = {name for grid in ablation.GRIDS.values() for name in grid.variants}
    assert named == set(ablation.VARIANTS)


def test_the_ladder_adds_one_thing_at_a_time():
    recipe = dict(configuration.leaves(default.get_config()))
    changed = [
        {key for key, value in ablation.VARIANTS[name].items() if value != recipe[key]}
        for name in ablation.GRIDS["ladder"].variants
    ]
    augmentation = {f"augment.{name}" for name in ("flip", "rotation", "zoom", "contrast")}
    schedule = {"optimizer.final_learning_rate"}
    assert changed[0] - changed[1] == {"model.batch_norm"}
    assert changed[1] - changed[2] == {"model.dropout"}
    assert changed[2] - changed[3] == augmentation | schedule
    assert changed[3] == set()
    # And constant means constant.
    for name in ("plain", "rate_1e-3", "rate_1e-4"):
        rates = recipe | dict(ablation.VARIANTS[name])
        assert rates["optimizer.learning_rate"] == rates["optimizer.final_learning_rate"]


def test_the_interval_of_a_paired_difference_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    values, base = rng.normal(0.9, 0.01, 5), rng.normal(0.89, 0.01, 5)
    mean, half = ablation.paired_difference(dict(enumerate(values)), dict(enumerate(base)))
    interval = scipy.stats.ttest_rel(values, base).confidence_interval(0.95)
    assert np.allclose([mean - half, mean + half], [interval.low, interval.high])
    # Seeds that one of them lacks do not count.
    assert ablation.paired_difference({0: 0.5, 1: 0.7}, {1: 0.6, 2: 0.9}) == (
        pytest.approx(0.1),
        None,
    )


def test_a_grid_is_run_once_and_its_table_says_what_came_of_it(tmp_path, capsys):
    arguments = ["--grid=dropout", f"--workdir={tmp_path}", "--seeds=3", "--jobs=2", "--config.x=1"]
    ablation.main(arguments)
    table = capsys.readouterr().out
    assert (tmp_path / "dropout.md").read_text() in table
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in table.splitlines()}
    # Seeds 0, 1 and 2 add 0, 1 and 4 points: a mean of 5 / 3, a deviation of 2.08.
    assert rows["0"][1] == "91.67 ± 2.08 %"
    assert rows["0.5"][1] == "86.67 ± 2.08 %"
    assert rows["0"][6] == "+5.00 (+5.00 to +5.00)"
    assert rows["0.5"][6] == ""  # Of the recipe itself.
    assert rows["0.7"][6] == "-2.00 (-2.00 to -2.00)"
    assert rows["0"][7:10] == ["2", "3", "3 |"]
    assert (tmp_path / "dropout.png").stat().st_size > 5000
    found = json.loads((tmp_path / "results.json").read_text())
    one = found["dropout_0.3"][1]
    assert (one["seed"], one["fingerprint"], one["versions"]) == (1, "abc", {"jax": "1"})
    assert re.fullmatch(r"[0-9a-f]{10}\+?", one["commit"])
    # Where the data lies is nobody's business.
    assert "config.x" not in (tmp_path / "results.json").read_text()

    expected = tmp_path / "results.json"
    ablation.main([*arguments, f"--expect={expected}"])
    told = capsys.readouterr().out.removeprefix(table)
    assert told.count("the same") == 12
    found["dropout_0"][2]["test"]["f1"] += 1e-9
    (tmp_path / "other.json").write_text(json.dumps(found))
    with pytest.raises(Exception, match="1 runs differ"):
        ablation.main([*arguments, f"--expect={tmp_path / 'other.json'}"])
    assert "dropout_0, seed 2: test differ" in capsys.readouterr().out
    assert set(starts(tmp_path).values()) == {1}
    # Another grid adds what it does not share.
    ablation.main(["--grid=label_smoothing", *arguments[1:]])
    assert starts(tmp_path)["recipe-2"] == 1
    with pytest.raises(ConfigError, match=r"holds a run of .*--config\.x=1"):
        ablation.main([*arguments[:-1], "--config.x=2"])


def test_the_ladder_compares_with_the_row_before(tmp_path, capsys):
    ablation.main(["--grid=ladder", f"--workdir={tmp_path}", "--seeds=2"])
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines() if "± " in row]
    assert [row[6] for row in rows] == [
        "",
        "+0.00 (+0.00 to +0.00)",
        "-5.00 (-5.00 to -5.00)",
        "+0.00 (+0.00 to +0.00)",
    ]
    assert [row[10].strip(" |") for row in rows] == ["87.2 %", "89.1 %", "90.3 %", "92.1 %"]


def test_a_run_that_fails_is_in_the_table_and_the_others_go_on(tmp_path, capsys):
    with pytest.raises(Exception, match="2 of 10 runs failed"):
        ablation.main(["--grid=large_batch", f"--workdir={tmp_path}", "--seeds=2"])
    told = capsys.readouterr().out
    assert "0; 0: error: the loss is infinite; 1: error: the loss is infinite" in told
    assert starts(tmp_path)["batch_512_root-1"] == 1
    assert (tmp_path / "large_batch.png").exists()
    # It is tried again, and nothing else is.
    with pytest.raises(Exception, match="2 of 10 runs failed"):
        ablation.main(["--grid=large_batch", f"--workdir={tmp_path}", "--seeds=2"])
    again = starts(tmp_path)
    assert again.pop("batch_256_linear-0") == again.pop("batch_256_linear-1") == 2
    assert set(again.values()) == {1}


def test_a_wrong_call_ends_all_of_it(tmp_path):
    with pytest.raises(ConfigError, match=r"^config\.train\.batch_size: is wrong$"):
        ablation.main(["--grid=batch_size", f"--workdir={tmp_path}", "--seeds=2"])
    with pytest.raises(ConfigError, match="--grid: there is no stairs; there are ladder"):
        ablation.main(["--grid=stairs", f"--workdir={tmp_path}"])
    with pytest.raises(ConfigError, match="--variants: cake is none of plain"):
        ablation.main(["--grid=ladder", "--variants=cake", f"--workdir={tmp_path}"])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_all_runs_save(tmp_path, training, signum):
    folder = tmp_path / "slow"
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from experiments import ablation\n"
        f"ablation.TRAIN = (sys.executable, '-S', {str(training)!r})\n"
        "ablation.cli.run(ablation.main, if_interrupted=ablation.cli.START_AGAIN)\n"
    )
    command = [sys.executable, "-c", code, f"--workdir={folder}", "--jobs=2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(list(folder.glob("*/ready"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    assert starts(folder) == {"plain-0": 1, "batch_norm-0": 1}


def test_each_job_has_its_share_of_the_cores(tmp_path, training):
    training.write_text(
        training.read_text()
        + "\nimport os\n(folder / 'cores').write_text(str(sorted(os.sched_getaffinity(0))))\n"
    )
    ablation.main(["--grid=ladder", f"--workdir={tmp_path}", "--seeds=1", "--jobs=2"])
    cores = sorted(os.sched_getaffinity(0))
    shares = {str(cores[0::2] or cores), str(cores[1::2] or cores)}
    assert {path.read_text() for path in tmp_path.glob("*/cores")} <= shares
