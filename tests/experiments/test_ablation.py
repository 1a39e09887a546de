"""Tests of the ablation study: its runs, how the runs are resumed, and its table."""

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

from cnn_jax.config import files, schema
from cnn_jax.system.errors import ConfigError, UserError
from cnn_jax.tune.space import configured
from configs import default
from experiments.studies import ablation
from experiments.studies.ablation_table import paired_difference

DEFAULT = REPOSITORY / "configs" / "default.py"

# This script replaces the training command and writes the files of a training without training.
# The accuracy is a known function of seed and dropout. The script fails if the learning rate is
# 8e-3, and waits if the path of the folder contains "slow".
TRAINING = """
    import json, pathlib, signal, sys, time

    flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
    folder = pathlib.Path(flags["workdir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "starts").open("a").write("x")
    if flags.get("config.optimizer.learning_rate") == "0.008":
        sys.exit("error: the loss is infinite")
    if flags.get("config.train.batch_size") == "16":
        print("error: --workdir: it is in use", file=sys.stderr)
        sys.exit(2)
    if "slow" in str(folder):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        (folder / "ready").touch()
        time.sleep(60)
    seed = int(flags["config.seed"])
    runs = {seed: folder}
    if "members" in flags:
        seeds = range(seed, seed + int(flags["members"]))
        runs = {seed: folder / f"seed-{seed}" for seed in seeds}
    for seed, folder in runs.items():
        accuracy = 0.9 + 0.01 * seed**2 - 0.1 * float(flags.get("config.model.dropout", 0.5))
        of_split = {key: accuracy for key in ("accuracy", "precision", "recall", "f1")}
        figures = json.dumps({"test": of_split, "validation": of_split})
        for name in ("report", "bundle"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "report" / "metrics.json").write_text(figures)
        (folder / "metrics.jsonl").write_text('{"seconds": 2.0}\\n{"seconds": 4.0}\\n')
        bundle = {"data": {"fingerprint": "abc"}, "versions": {"jax": "1"}}
        (folder / "bundle" / "bundle.json").write_text(json.dumps(bundle))
"""


def _table(folder, *flags):
    """Runs the study of the grid "dropout" with three seeds; returns the first columns."""
    ablation.main(["--grid=dropout", f"--workdir={folder}", "--seeds=3", "--jobs=2", *flags])
    lines = (folder / "dropout.md").read_text().splitlines()
    return [line.split(" | ")[:7] for line in lines]


@pytest.fixture(autouse=True)
def training(tmp_path, monkeypatch):
    """Replaces the training command with a fast script, and returns the script's path."""
    script = tmp_path / "training.py"
    script.write_text(textwrap.dedent(TRAINING))
    monkeypatch.setattr(ablation, "TRAIN", (sys.executable, "-S", str(script)))
    return script


def starts(folder):
    """Returns the number of starts of each run, by the name of the run's folder."""
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/starts")}


def test_the_seeds_of_a_variant_can_be_trained_in_one_program(tmp_path):
    separate = _table(tmp_path / "separate")
    assert _table(tmp_path / "together", "--together") == separate
    assert _table(tmp_path / "together", "--together") == separate  # No run is repeated.
    assert set(starts(tmp_path / "together").values()) == {1}
    assert "recipe" in starts(tmp_path / "together")
    found = json.loads((tmp_path / "together" / "results.json").read_text())
    assert [run["seed"] for run in found["recipe"]] == [0, 1, 2]
    run = ablation.Run(tmp_path, "recipe", 2, str(DEFAULT), (), members=3)
    assert run.settings()["data.split_seed"] == 0
    with pytest.raises(ConfigError, match="needs --seeds=2 or more"):
        ablation.main(["--grid=dropout", f"--workdir={tmp_path}", "--seeds=1", "--together"])


def test_every_variant_is_a_valid_configuration():
    for variant, changes in ablation.VARIANTS.items():
        schema.validate(configured(default.get_config(), changes), num_devices=1)
        run = ablation.Run(pathlib.Path("x"), variant, 3, str(DEFAULT), ())
        assert run.settings()["seed"] == 3
    named = {name for grid in ablation.GRIDS.values() for name in grid.variants}
    assert named == set(ablation.VARIANTS)


def test_the_ladder_adds_one_thing_at_a_time():
    recipe = schema.flat(default.get_config())
    steps = list(ablation.GRIDS["ladder"].variants)
    changed = [
        {key for key, value in ablation.VARIANTS[name].items() if value != recipe[key]}
        for name in ablation.GRIDS["ladder"].variants
    ]
    assert [ablation.VARIANTS[name].get("model.dropout") for name in steps[:3]] == [0, 0, 0.5]
    augmentation = {f"augment.{name}" for name in ("flip", "rotation", "zoom", "contrast")}
    schedule = {"optimizer.final_learning_rate"}
    assert changed[0] - changed[1] == {"model.batch_norm"}
    assert changed[1] - changed[2] == {"model.dropout"}
    assert changed[2] - changed[3] == augmentation | schedule
    assert changed[3] == set()
    # In these variants the learning rate is constant after the warm-up.
    for name in ("plain", "rate_1e-3", "rate_1e-4"):
        rates = recipe | dict(ablation.VARIANTS[name])
        assert rates["optimizer.learning_rate"] == rates["optimizer.final_learning_rate"]


def test_the_interval_equals_a_paired_t_test():
    rng = np.random.default_rng(0)
    values, base = rng.normal(0.9, 0.01, 5), rng.normal(0.89, 0.01, 5)
    mean, half = paired_difference(dict(enumerate(values)), dict(enumerate(base)))
    interval = scipy.stats.ttest_rel(values, base).confidence_interval(0.95)
    assert np.allclose([mean - half, mean + half], [interval.low, interval.high])
    # Only the seed 1 occurs in both variants. One pair gives a difference, but no confidence
    # interval.
    assert paired_difference({0: 0.5, 1: 0.7}, {1: 0.6, 2: 0.9}) == (
        pytest.approx(0.1),
        None,
    )


def test_a_grid_is_run_once_and_written_as_a_table(tmp_path, capsys):
    arguments = ["--grid=dropout", f"--workdir={tmp_path}", "--seeds=3", "--jobs=2"]
    arguments.append("--config.data.source=folder:/nowhere/to/be/seen")
    ablation.main(arguments)
    table = capsys.readouterr().out
    assert (tmp_path / "dropout.md").read_text() in table
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in table.splitlines()}
    # The seeds 0, 1 and 2 add 0, 1 and 4 points to the accuracy. The mean of these points is 5 / 3,
    # and their standard deviation is 2.08.
    assert rows["0"][1] == "91.67 ± 2.08 %"
    assert rows["0.5"][1] == "86.67 ± 2.08 %"
    assert rows["0"][6] == "+5.00 (+5.00 to +5.00)"
    assert rows["0.5"][6] == ""  # This row is the recipe, with which the other rows are compared.
    assert rows["0.7"][6] == "-2.00 (-2.00 to -2.00)"
    assert rows["0"][7:] == ["2", "3", "1.00", "3 |"]
    assert (tmp_path / "dropout.png").stat().st_size > 5000
    found = json.loads((tmp_path / "results.json").read_text())
    one = found["dropout_0.3"][1]
    assert (one["seed"], one["fingerprint"], one["versions"]) == (1, "abc", {"jax": "1"})
    assert re.fullmatch(r"[0-9a-f]{10}\+?", one["commit"])
    assert one["cores"] == (len(os.sched_getaffinity(0)) + 1) // 2
    # The results are meant to be published, so they must not contain the path of the data.
    assert "nowhere" not in (tmp_path / "results.json").read_text()

    expected = tmp_path / "results.json"
    ablation.main([*arguments, f"--expect={expected}"])
    output = capsys.readouterr().out.removeprefix(table)
    assert output.count("the same") == 12
    found["dropout_0"][2]["test"]["f1"] += 1e-9
    (tmp_path / "other.json").write_text(json.dumps(found))
    with pytest.raises(Exception, match="1 runs differ"):
        ablation.main([*arguments, f"--expect={tmp_path / 'other.json'}"])
    assert "dropout_0, seed 2: test differ" in capsys.readouterr().out
    empty = tmp_path / "empty.json"
    for text, message in [("", "is no results.json"), ("{}", "has no dropout_0 of seed 0")]:
        empty.write_text(text)
        with pytest.raises(ConfigError, match=f"^--expect: .*{message}"):
            ablation.main([*arguments, f"--expect={empty}"])
    assert set(starts(tmp_path).values()) == {1}
    # A call with another grid (set of variants) does not repeat finished runs, even without the
    # flag for the path of the data.
    ablation.main(["--grid=label_smoothing", *arguments[1:-1]])
    assert starts(tmp_path)["recipe-2"] == 1
    # Two runs start at the same time, so either run may fail first.
    with pytest.raises(
        ConfigError, match=r"/(dropout_\S+|recipe)-\d holds a run of other train\.epochs;"
    ):
        ablation.main([*arguments, "--config.train.epochs=7"])


def test_titles_of_rows_fit_the_recipe():
    """The titles contain the batch size and the learning rate of the recipe, here `fast.py`."""
    overrides = ("--config.augment.cutmix_probability=0.4", "--config.train.epochs=2")
    of = {
        variant: ablation.Run(
            pathlib.Path("x"), variant, 0, str(DEFAULT.with_name("fast.py")), overrides
        ).settings()
        for variant in ablation.VARIANTS
    }
    for variant in ("plain", "batch_norm", "dropout", "no_augmentation"):
        assert of[variant]["augment.cutmix_probability"] == 0
    for variant in ("plain", "rate_1e-3"):
        assert of[variant]["optimizer.learning_rate"] == 1e-3
        assert of[variant]["optimizer.final_learning_rate"] == 1e-3
    assert of["mixup"]["augment.cutmix_probability"] == 0
    assert of["recipe"]["train.batch_size"] == 256
    config = files.load(str(DEFAULT.with_name("fast.py")), overrides)
    values = schema.flat(config)
    assert ablation.GRIDS["batch_size"].named(values).variants["recipe"] == "256"
    assert ablation.GRIDS["learning_rate"].named(values).variants["recipe"] == (
        "from 0.008 to 0.0001, cosine"
    )


def test_precisions_are_compared_with_each_other_in_time_too(tmp_path, capsys):
    ablation.main(["--grid=precision", f"--workdir={tmp_path}", "--seeds=2"])
    lines = capsys.readouterr().out.splitlines()
    head, _, first, second = (line for line in lines if line.startswith("|"))
    assert "| test accuracy against float32 |" in head
    assert first.split(" | ")[6:10:3] == ["", "1.00"]
    assert second.split(" | ")[6:10:3] == ["+0.00 (+0.00 to +0.00)", "1.00"]


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


def test_a_failed_run_is_in_the_table(tmp_path, capsys):
    with pytest.raises(Exception, match="2 of 10 runs failed"):
        ablation.main(["--grid=large_batch", f"--workdir={tmp_path}", "--seeds=2"])
    output = capsys.readouterr().out
    assert "0; 0: error: the loss is infinite; 1: error: the loss is infinite" in output
    assert starts(tmp_path)["batch_512_root-1"] == 1
    assert (tmp_path / "large_batch.png").exists()
    # The second call starts only the failed runs again.
    with pytest.raises(Exception, match="2 of 10 runs failed"):
        ablation.main(["--grid=large_batch", f"--workdir={tmp_path}", "--seeds=2"])
    again = starts(tmp_path)
    assert again.pop("batch_256_linear-0") == again.pop("batch_256_linear-1") == 2
    assert set(again.values()) == {1}


def test_a_wrong_command_line_ends_all_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"^--workdir: it is in use$"):
        ablation.main(["--grid=batch_size", f"--workdir={tmp_path}", "--seeds=2"])
    before = starts(tmp_path)
    for flags, message in [
        (["--config.x=1"], r"^config\.x: there is no such key"),
        (["--config.train.accumulation_steps=32"], r"^batch_16: config\.train\.batch_size: "),
    ]:
        with pytest.raises(ConfigError, match=message):
            ablation.main(["--grid=batch_size", f"--workdir={tmp_path}", *flags])
    assert starts(tmp_path) == before
    with pytest.raises(ConfigError, match="--grid: there is no stairs; there are ladder"):
        ablation.main(["--grid=stairs", f"--workdir={tmp_path}"])
    with pytest.raises(ConfigError, match="--variants: cake is none of plain"):
        ablation.main(["--grid=ladder", "--variants=cake", f"--workdir={tmp_path}"])


@pytest.fixture
def folds_training(training):
    """Adds predictions to the fast script: each fold tests every third of 30 images of 2 classes.

    The predictions of the images whose number is divisible by 10 are wrong.
    """
    script = """
    fold = int(flags["config.data.fold"])
    assert flags["config.data.folds"] == "3"
    assert flags["config.report.splits"] == "('train', 'validation', 'test')"
    counts = {"train": {"count": 10}, "validation": {"count": 10 + fold % 2}, "test": {"count": 10}}
    figures = json.loads(figures)
    for split in counts:
        figures[split] = figures.get(split, {}) | counts[split]
    figures["train"]["count"] -= fold % 2
    (folder / "report" / "metrics.json").write_text(json.dumps(figures))
    rows = ["id,label,predicted,confidence"]
    for i in range(fold, 30, 3):
        label = "ab"[i % 2]
        predicted = "ba"[i % 2] if i % 10 == 0 else label
        rows.append(f"image {i},{label},{predicted},0.9")
    (folder / "report" / "predictions.csv").write_text("\\n".join(rows) + "\\n")
    """
    training.write_text(
        training.read_text() + textwrap.dedent(script).replace("\\\\\\\\n", "\\\\n")
    )
    return training


def test_a_cross_validation_pools_the_test_predictions(tmp_path, folds_training, capsys):
    arguments = ["--grid=label_smoothing", f"--workdir={tmp_path}", "--seeds=1", "--folds=3"]
    ablation.main(arguments)
    table = capsys.readouterr().out
    assert set(starts(tmp_path)) == {
        f"{variant}-0-{fold}of3" for variant in ("no_smoothing", "recipe") for fold in range(3)
    }
    found = json.loads((tmp_path / "cross_validation.json").read_text())["recipe"]["0"]
    # The images 0, 10 and 20 of class a are predicted as b: 12 of 15 and 15 of 15 are correct.
    assert (found["count"], found["accuracy"], found["recall"]) == (30, 0.9, pytest.approx(0.9))
    assert found["precision"] == pytest.approx((1 + 15 / 18) / 2)
    low, high = found["confidence_intervals"]["accuracy"]
    expected = scipy.stats.binomtest(27, 30).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert f"90.00 % ({100 * low:.2f} to {100 * high:.2f})" in table
    assert "| runs | pooled test accuracy (95 % interval) |" in table
    lines = (tmp_path / "recipe-0-3.csv").read_text().splitlines()
    assert lines[0] == "id,label,predicted,confidence,fold"
    assert sorted(lines[1:])[0] == "image 0,a,b,0.9,0of3"
    assert len({line.partition(",")[0] for line in lines[1:]}) == 30
    # A second call starts no run again, and gives the same results.
    before = (tmp_path / "cross_validation.json").read_text()
    ablation.main([*arguments, f"--expect={tmp_path / 'results.json'}"])
    assert "recipe, seed 0, fold 2of3: the same" in capsys.readouterr().out
    assert set(starts(tmp_path).values()) == {1}
    assert (tmp_path / "cross_validation.json").read_text() == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("image {i},", "image {i % 4},", "was tested in another fold too"),
        ("range(fold, 30, 3)", "range(fold, 27, 3)", "27 of 30 images were tested"),
    ],
)
def test_an_image_must_be_tested_once(tmp_path, folds_training, old, new, message):
    text = folds_training.read_text()
    assert old in text
    folds_training.write_text(text.replace(old, new))
    arguments = [f"--workdir={tmp_path}", "--seeds=1", "--folds=3", "--variants=recipe"]
    with pytest.raises(UserError, match=message):
        ablation.main(arguments)


def test_two_folds_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--folds: must be 3 or more, or 0, got 2"):
        ablation.main([f"--workdir={tmp_path}", "--folds=2"])


def test_a_run_from_before_a_key_existed_is_kept(tmp_path):
    arguments = ["--grid=ladder", f"--workdir={tmp_path}", "--seeds=1", "--variants=recipe"]
    ablation.main(arguments)
    record = tmp_path / "recipe-0" / "ablation.json"
    found = json.loads(record.read_text())
    del found["settings"]["data.split_seed"]
    record.write_text(json.dumps(found))
    ablation.main(arguments)
    assert starts(tmp_path) == {"recipe-0": 1}
    with pytest.raises(ConfigError, match=r"holds a run of other data\.split_seed"):
        ablation.main([*arguments, "--config.data.split_seed=0"])


@pytest.mark.parametrize("folder", ["studies", "benchmarks", "checks"])
def test_the_folder_of_a_program_hides_no_module_of_a_library(folder):
    """Python searches the folder of a program first; JAX tries to import `compression`."""
    names = {path.stem for path in (REPOSITORY / "experiments" / folder).glob("*.py")}
    assert not names & (sys.stdlib_module_names | {"compression", "annotationlib"})


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_all_runs_are_saved_after_a_signal(tmp_path, training, signum):
    folder = tmp_path / "slow"
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from experiments.studies import ablation\n"
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


def test_each_job_has_an_equal_part_of_the_cores(tmp_path, training):
    training.write_text(
        training.read_text()
        + "\nimport os\n(folder / 'cores').write_text(str(sorted(os.sched_getaffinity(0))))\n"
    )
    ablation.main(["--grid=ladder", f"--workdir={tmp_path}", "--seeds=1", "--jobs=2"])
    cores = sorted(os.sched_getaffinity(0))
    shares = {str(cores[0::2] or cores), str(cores[1::2] or cores)}
    assert {path.read_text() for path in tmp_path.glob("*/cores")} <= shares


@pytest.fixture
def reproduce(tmp_path):
    """Returns a function that runs reproduce.sh with a fake Python that prints its arguments."""
    programs = tmp_path / "programs"
    programs.mkdir()
    python = programs / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$1" in -) exec {sys.executable} "$@";; *) printf "%s\\n" "$@";; esac\n'
    )
    python.chmod(0o755)

    def run(*arguments, **variables):
        return subprocess.run(
            [REPOSITORY / "experiments" / "studies" / "reproduce.sh", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"} | variables,
            capture_output=True,
            text=True,
        )

    return run


def test_a_row_is_repeated_by_its_name(tmp_path, reproduce):
    images = tmp_path / "my images"
    images.mkdir()
    for row, variants in (("plain", "plain"), ("", "batch_norm,dropout,plain,recipe")):
        done = reproduce(f"eurosat32/{row}".rstrip("/"), EUROSAT=str(images))
        assert done.returncode == 0, done.stderr
        output = done.stdout.splitlines()
        assert {
            f"--variants={variants}",
            "--seeds=3",
            f"--jobs={len(os.sched_getaffinity(0))}",  # Each core trains one run at a time.
            f"--workdir={tmp_path}/runs/reproduce/eurosat32",
            f"--expect={REPOSITORY}/experiments/results/eurosat32.json",
            f"--config={REPOSITORY}/experiments/../configs/eurosat.py",
            f"--config.data.source=folder:{images}",
            "--config.data.image_size=32",
        } <= set(output)


@pytest.mark.parametrize("file", sorted((REPOSITORY / "experiments" / "results").glob("*.json")))
def test_every_table_can_be_repeated(tmp_path, reproduce, file):
    (tmp_path / "images").mkdir()
    done = reproduce(file.stem, EUROSAT=str(tmp_path / "images"))
    assert done.returncode == 0, done.stderr
    output = done.stdout.splitlines()
    assert f"--expect={file}" in output
    flags = [flag for flag in output if flag.startswith("--config")]
    config = files.load(flags[0].removeprefix("--config="), flags[1:])
    epochs = {run["epochs"] for runs in json.loads(file.read_text()).values() for run in runs}
    assert max(epochs) == config.train.epochs


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("", "a row is TABLE or TABLE/VARIANT, of the tables"),
        ("nix", "a row is TABLE or TABLE/VARIANT, of the tables"),
        ("shapes/cake", "shapes.json has no cake"),
        ("eurosat32/plain", "EUROSAT must be the folder of its images"),
    ],
)
def test_an_unknown_row_is_an_error(reproduce, row, message):
    done = reproduce(row)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
