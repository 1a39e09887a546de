"""The commands keep what XLA compiles; each is a process of its own, as JAX's settings are."""

import os
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY
from PIL import Image
from test_bundle import make_bundle

from cnn_jax import compiled
from cnn_jax.bundle import write_bundle


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    write_bundle(make_bundle(), folder / "bundle")
    Image.new("RGB", (20, 20), "red").save(folder / "image.png")
    return [f"--bundle={folder / 'bundle'}", f"--input={folder / 'image.png'}"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "compiled"


def _predict(arguments, folder, environment=None, before=""):
    """The rows that are printed; the command must do so without a word of anything else."""
    own = {k: v for k, v in os.environ.items() if "_CACHE" not in k}
    own |= {"CNN_JAX_CACHE": str(folder.parent)} | (environment or {})
    command = [sys.executable, "-m", "cnn_jax.predict", *arguments]
    if before:
        command = ["bash", "-c", f'{before}; exec "$@"', "bash", *command]
    result = subprocess.run(
        command, env=own, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not result.stderr
    return result.stdout


def _written(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_second_call_finds_what_the_first_has_compiled(arguments, folder):
    cold = _predict(arguments, folder)
    kept = _written(folder)
    assert any(name.startswith("jit_probabilities-") for name in kept)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert _predict(arguments, folder) == cold
    assert _written(folder) == kept  # No other program, and none written again.


def test_an_incomplete_file_is_replaced(arguments, folder):
    first = _predict(arguments, folder)
    (path,) = folder.glob("jit_probabilities-*")
    size = path.stat().st_size
    os.truncate(path, size // 2)
    assert _predict(arguments, folder) == first
    assert path.stat().st_size > size // 2
    kept = _written(folder)
    assert _predict(arguments, folder) == first
    assert _written(folder) == kept


def test_a_full_disk_leaves_no_incomplete_file(arguments, folder):
    """The kernel refuses files above a limit as it refuses them on a full disk."""
    assert _predict(arguments, folder, before="ulimit -f 4")  # Kilobytes.
    assert not list(folder.glob("jit_probabilities-*"))


@pytest.mark.parametrize("hindrance", ["a file", "others may write"])
def test_a_folder_that_cannot_be_used_is_not(arguments, folder, hindrance):
    folder.parent.mkdir()
    if hindrance == "a file":
        folder.write_text("x")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    assert _predict(arguments, folder)
    assert folder.is_file() or not list(folder.iterdir())


@pytest.mark.parametrize("wish", ["", "elsewhere"])
def test_the_users_wish_comes_first(arguments, folder, tmp_path, wish):
    path = str(tmp_path / wish) if wish else ""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": path,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    _predict(arguments, folder, environment=environment)
    assert not folder.exists()
    assert not wish or list((tmp_path / wish).iterdir())


def test_the_old_and_the_too_much_are_swept_away(folder, monkeypatch):
    monkeypatch.setenv("CNN_JAX_CACHE", str(folder.parent))
    monkeypatch.setattr(compiled, "_MOST_BYTES", 250)
    folder.mkdir(parents=True)
    names = [f"jit_f-{i:064x}-cache" for i in range(5)]
    for days, name in zip((1, 2, 3, 31), names, strict=False):
        (folder / name).write_bytes(b"x" * 100)
        os.utime(folder / name, (time.time() - days * 86400,) * 2)
    (folder / "notes.txt").write_text("not ours")
    os.utime(folder / "notes.txt", (0, 0))
    compiled._sweep()
    assert {path.name for path in folder.iterdir()} == {*names[:2], "notes.txt"}
    monkeypatch.setattr(compiled, "_MOST_BYTES", 10_000)
    os.utime(folder / names[0], (time.time() - 31 * 86400,) * 2)
    compiled._sweep()
    assert {path.name for path in folder.iterdir()} == {names[1], "notes.txt"}
