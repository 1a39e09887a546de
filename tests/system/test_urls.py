"""Tests that the URL of an object store is refused where a path is expected."""

import pytest

import cnn_jax
from cnn_jax import evaluate, inspect, main, predict
from cnn_jax.config import files, schema
from cnn_jax.system.errors import BundleError, ConfigError

COPY = r"; URLs are not supported here: copy the files to or from a folder \(aws s3 cp"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """No command may create a folder with the name s3: in the working directory."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (
            main,
            ["--config=smoke", "--workdir=s3://b/r"],
            r"--workdir: must be a folder on this machine, got s3://b/r; --backup=s3://b/r keeps a",
        ),
        (
            predict,
            ["--bundle=gs://b/r", "--input=a"],
            rf"--bundle: must be a path, got gs://b/r{COPY}",
        ),
        (
            predict,
            ["--bundle=r", "--input=s3://b/*"],
            rf"--input: must be a path, got s3://b/\*{COPY}",
        ),
        (
            evaluate,
            ["--bundle=r", "--output=az://b/m.json"],
            rf"--output: must be a path.*{COPY}",
        ),
        (
            inspect,
            ["--source=folder:s3://b/d"],
            rf"a source must be .*, got 'folder:s3://b/d'{COPY}",
        ),
    ],
)
def test_a_flag_that_names_a_path_refuses_a_url(command, flags, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        command.main(flags)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("data.source=folder:s3://b/d", rf"got 'folder:s3://b/d'{COPY}"),
        ("data.source=csv:gs://b/d.csv", rf"got 'csv:gs://b/d.csv'{COPY}"),
        ("data.source=shapes+log:s3://b/log", rf"got 'shapes\+log:s3://b/log'{COPY}"),
        (
            "checkpoint.init_from=gs://b/r",
            "must be a path on this machine, or empty, got 'gs://b/r'",
        ),
        ("distill.bundles=a, s3://b/r", "must be paths on this machine .*, got 'a, s3://b/r'"),
    ],
)
def test_a_key_that_names_a_path_refuses_a_url(flag, message):
    config = files.load("smoke", [f"--config.{flag}"])
    with pytest.raises(ConfigError, match=f"^config.{flag.partition('=')[0]}: .*{message}"):
        schema.validate(config, 1)


def test_the_functions_refuse_a_url():
    message = "^workdir: must be a folder, got s3://b/r; backup='s3://b/r' keeps a copy of"
    with pytest.raises(ConfigError, match=message):
        cnn_jax.train("shapes", workdir="s3://b/r")
    with pytest.raises(BundleError, match=rf"^gs:/+b/r is not a folder{COPY}"):
        cnn_jax.load("gs://b/r")
