"""Tests of the wheel, installed outside the repository and used in an empty directory."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import REPOSITORY

setuptools = pytest.importorskip("setuptools", reason="the build backend is not installed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} cannot read pyproject.toml")
    folder = tmp_path_factory.mktemp("wheel")
    # The test builds a copy of the source, because a build leaves files in the source folder.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("cnn_jax", "configs", "experiments/spaces"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    _pip("wheel", "--no-build-isolation", f"--wheel-dir={folder}", str(source))
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """A function that runs Python in an empty directory, with the installed wheel."""
    site = tmp_path_factory.mktemp("site")
    _pip("install", f"--target={site}", str(wheel))
    here = tmp_path_factory.mktemp("an empty directory")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=here,
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )

    run.here = here
    run.site = site
    return run


def _pip(*arguments):
    flags = ("--no-deps", "--no-index", "--disable-pip-version-check", "-q")
    command = [sys.executable, "-m", "pip", arguments[0], *flags, *arguments[1:]]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel):
    expected = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "cnn_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for name, folder in (("configs", "configs"), ("spaces", "experiments/spaces")):
        expected |= {f"cnn_jax/{name}/{p.name}" for p in (REPOSITORY / folder).glob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert b"cnn_jax = cnn_jax.commands:main" in archive.read(entry_points)
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_an_installed_wheel_trains_in_an_empty_directory(run, image_folder):
    tiny = [
        f"--config.data.source=folder:{image_folder}",
        *("--config.data.image_size=16", "--config.model.features=4,8", "--config.model.dense=8"),
        *("--config.train.batch_size=8", "--config.train.epochs=1", "--config.report.detail=none"),
    ]
    result = run("-m", "cnn_jax.main", "--config=folder", "--workdir=runs/first", *tiny)
    assert result.returncode == 0, result.stderr
    workdir = run.here / "runs" / "first"
    assert json.loads((workdir / "config.json").read_text())["data"]["image_size"] == [16, 16]
    assert (workdir / "bundle" / "bundle.json").exists()

    # The console script accepts a configuration file in any folder, here an edited copy of
    # configs/folder.py.
    copy = run.here / "my configs" / "mine.py"
    copy.parent.mkdir()
    text = (REPOSITORY / "configs" / "folder.py").read_text()
    copy.write_text(text.replace("config.train.epochs = 45", "config.seed = 5"))
    script = run.site / "bin" / "cnn_jax"
    result = run(script, "train", f"--config={copy}", "--workdir=runs/copy", *tiny)
    assert result.returncode == 0, result.stderr
    assert json.loads((run.here / "runs" / "copy" / "config.json").read_text())["seed"] == 5

    result = run("-m", "cnn_jax", "train", f"--config={workdir / 'config.json'}", "--workdir=again")
    assert result.returncode == 0, result.stderr
    first, again = (
        (folder / "metrics.jsonl").read_text() for folder in (workdir, run.here / "again")
    )
    assert json.loads(first)["train_loss"] == json.loads(again)["train_loss"]


def test_a_study_finds_the_shipped_space(run, image_folder):
    pytest.importorskip("optuna", reason="optuna is not installed")
    result = run(
        *("-m", "cnn_jax", "tune", "--config=folder", "--study=s", "--space=fine"),
        f"--config.data.source=folder:{image_folder}",
    )
    assert result.returncode == 2
    assert result.stderr.endswith(
        "--space: there is no file 'fine'; the shipped files are default, finetune, recipe\n"
    )
    assert not (run.here / "studies").exists()
