"""Tests of the commands in separate processes, as users run them."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from bundles import make_bundle
from conftest import REPOSITORY

from cnn_jax.inference.bundle import write_bundle


def _run(module, *arguments, cwd=REPOSITORY):
    return subprocess.run(
        [sys.executable, "-m", f"cnn_jax.{module}", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )


def _tiny_flags(image_folder, workdir, epochs=2):
    return [
        "--config=configs/folder.py",
        f"--workdir={workdir}",
        f"--config.data.source=folder:{image_folder}",
        "--config.data.image_size=16",
        "--config.model.features=(4,8)",
        "--config.train.batch_size=8",
        f"--config.train.epochs={epochs}",
        "--config.report.detail=none",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.py", "--workdir", "=x"], "--config: there is no file 'nowhere.py'"),
        (["--workdir=x", "--confg=configs/smoke.py"], "unexpected argument '--confg=configs"),
        (["--workdir=x", "stray"], "unexpected argument 'stray'"),
        (["--workdir=x", "--config.train.epoch=3"], "did you mean train.epochs?"),
        (
            ["--workdir=x", "--config.train.epochs=many"],
            "config.train.epochs: must be an integer, 0 or more, got 'many'",
        ),
        (["--workdir=x", "--config.data.split=(0.7,0.2,0.2)"], "config.data.split: must be"),
        (["--workdir=x", "--config.data=3"], "config.data: is a section"),
        (["--workdir=x", "--config.data.source=pictures"], "config.data.source: must be"),
        (["--workdir=/dev/null/x"], "--workdir: cannot use"),
        (["--workdir=file"], "--workdir: cannot use file: it is a file"),
        (["--workdir=x", "."], "unexpected argument '.'; write --config.data.source=folder:."),
    ],
)
def test_a_usage_error_is_one_line_and_exits_with_2(arguments, message, tmp_path):
    (tmp_path / "file").touch()
    arguments = [argument.replace("=x", f"={tmp_path / 'x'}") for argument in arguments]
    result = _run("main", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("arguments", [[], ["--workdir="]])
def test_the_folder_of_the_run_is_required(arguments):
    result = _run("main", *arguments)
    assert result.returncode == 2
    assert "--workdir" in result.stderr.splitlines()[-1]


def test_flags_and_values_may_be_separated_by_a_space(image_folder, tmp_path):
    flags = _tiny_flags(image_folder, tmp_path / "run", 1)
    flags = ["--config", "configs/folder.py", "--workdir", str(tmp_path / "run"), *flags[2:]]
    assert _run("main", *flags).returncode == 0


def test_the_reader_of_the_output_may_stop(image_folder, tmp_path):
    write_bundle(make_bundle(), tmp_path / "bundle")
    command = f"{sys.executable} -m cnn_jax.predict --bundle={tmp_path / 'bundle'} "
    command += f"--input={image_folder}"
    for tail in ("| head -n 1", "> /dev/full", ">&-"):
        result = subprocess.run(
            ["bash", "-c", f"{command} {tail}"], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert "Traceback" not in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) <= 1


def test_a_config_file_that_fails_is_explained(tmp_path):
    config = tmp_path / "broken.py"
    config.write_text("def get_config():\n    return undefined_name\n")
    result = _run("main", f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "undefined_name" in result.stderr.splitlines()[-1]


def test_missing_data_exits_with_2(tmp_path):
    source = f"--config.data.source=folder:{tmp_path / 'nowhere'}"
    result = _run("main", "--config=configs/folder.py", f"--workdir={tmp_path / 'run'}", source)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "there is no folder" in line


def test_help_shows_the_values_of_the_configuration():
    result = _run("main", "--config=folder", "--help")
    assert "with the values of folder.py" in " ".join(result.stdout.split())
    assert "  data.source = 'folder:" in result.stdout
    assert "  data.source = 'folder:" not in _run("main", "--help").stdout


@pytest.mark.parametrize(
    ("module", "command"),
    [("main", "train"), ("evaluate", "evaluate"), ("predict", "predict"), ("explain", "explain")],
)
def test_help_names_the_command(module, command):
    result = _run(module, "--help")
    assert result.returncode == 0
    assert f"usage: cnn_jax {command} " in result.stdout


def test_a_missing_bundle_exits_with_2(tmp_path):
    image = tmp_path / "x.png"
    image.touch()
    for module, flag in (("evaluate", "--split=test"), ("predict", f"--input={image}")):
        result = _run(module, f"--bundle={tmp_path}", flag)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert "is not a bundle" in line


def test_train_evaluate_and_predict_from_the_command_line(image_folder, tmp_path):
    workdir = tmp_path / "run"
    result = _run("main", *_tiny_flags(image_folder, workdir))
    assert result.returncode == 0, result.stderr
    metrics = json.loads((workdir / "report" / "metrics.json").read_text())

    result = _run("evaluate", f"--bundle={workdir}", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == metrics["test"]

    result = _run("predict", f"--bundle={workdir}", f"--input={image_folder}")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 61


def test_a_narrow_terminal_shows_a_progress_bar(image_folder, tmp_path):
    """The progress bar is shown in a pseudo-terminal of 40 columns."""
    terminal, its_side = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cnn_jax.main"),
            *_tiny_flags(image_folder, tmp_path / "run", epochs=20),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"COLUMNS": "40", "LINES": "24", "TERM": "xterm"},
        stdin=its_side,
        stdout=its_side,
        stderr=its_side,
    )
    os.close(its_side)
    output = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # Linux raises this error when the other side of the terminal is closed.
            break
        if not chunk:
            break
        output += chunk
    os.close(terminal)
    text = output.decode()
    assert process.wait() == 0, text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"epoch \d+/20", plain)
    assert "loss" in plain
    assert "━" in plain
    assert "accuracy" in plain
    assert "Traceback" not in plain


def test_training_needs_neither_opencv_nor_tfds(image_folder, tmp_path):
    """Training works without OpenCV and TensorFlow Datasets, which many GPU hosts do not have."""
    code = (
        "import sys; sys.modules |= {'cv2': None, 'tensorflow_datasets': None}\n"
        "from cnn_jax.main import main; main(sys.argv[1:])"
    )
    flags = [*_tiny_flags(image_folder, tmp_path / "run"), "--config.augment.place=device"]
    result = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "bundle" / "bundle.json").exists()
    assert "OpenCV is not installed, so the bundle has no reference statistics" in result.stderr


def test_a_finished_run_is_logged_to_mlflow(image_folder, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("pandas", reason="pandas is not installed")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    flags = _tiny_flags(image_folder, tmp_path / "run")
    # MLflow stores the artifacts below the current folder.
    code = (
        "import os, sys; os.chdir(sys.argv[1])\nfrom cnn_jax.main import main; main(sys.argv[2:])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *flags, f"--mlflow={uri}"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for line in (f"mlflow      {uri} run ", f"mlflow      {uri} already has this run as "):
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        last = result.stdout.splitlines()[-1]
        assert last.startswith(line)
    client = mlflow.MlflowClient(uri, uri)
    run = client.get_run(last.split()[-1])
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    history = client.get_metric_history(run.info.run_id, "validation_loss")
    assert [metric.step for metric in history] == [json.loads(line)["epoch"] for line in records]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert run.data.params["model.name"] == config["model"]["name"]
    metrics = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    assert run.data.metrics["test_accuracy"] == pytest.approx(metrics["test"]["accuracy"])


def test_a_run_ends_with_the_path_of_its_report(image_folder, tmp_path):
    flags = [f for f in _tiny_flags(image_folder, tmp_path / "run") if "report.detail" not in f]
    result = _run("main", *flags, "--config.report.detail=figures")
    assert result.returncode == 0, result.stderr
    page = tmp_path / "run" / "report" / "index.html"
    assert result.stdout.splitlines()[-1] == f"report      {page}"
    assert page.exists()
    figures = json.loads(page.with_name("metrics.json").read_text())
    assert figures["run"]["trained_on"]["device"] == "1 x cpu"
    assert set(figures["missing"]) == {"explanations", "robustness"}
    # The command `report` adds the missing sections of a finished run.
    again = _run("main", *flags, "--config.report.detail=none")
    assert again.returncode == 0, again.stderr
    command = f"cnn_jax report --run={tmp_path / 'run'}"
    assert again.stdout.splitlines()[-1] == f"report      {command}"
    result = _run("report", f"--run={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    figures = json.loads(page.with_name("metrics.json").read_text())
    assert figures["missing"] == {}
    assert {"explanations", "robustness"} <= set(figures)
