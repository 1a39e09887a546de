"""Tests of the compilation cache, in new processes because JAX has global settings."""

import os
import subprocess
import sys
import time

import pytest
from bundles import make_bundle
from conftest import REPOSITORY
from PIL import Image

from cnn_jax.inference.bundle import write_bundle
from cnn_jax.system import compilation_cache


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    write_bundle(make_bundle(), folder / "bundle")
    Image.new("RGB", (20, 20), "red").save(folder / "image.png")
    return [f"--bundle={folder / 'bundle'}", f"--input={folder / 'image.png'}"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "compiled"


# A command that compiles one program.
_SORT = """
import jax
from cnn_jax.system.compilation_cache import keep_compiled
keep_compiled()
def sort(x):
    return jax.numpy.sort(x) @ x
print(jax.jit(sort)(jax.numpy.arange(8.0)))
"""


def _predict(arguments, folder):
    return _run(folder, ["-m", "cnn_jax.predict", *arguments])


def _sort(folder, environment=None, before=""):
    return _run(folder, ["-c", _SORT], environment, before)


def _run(folder, arguments, environment=None, before=""):
    """Returns the output of a command, which must print nothing on stderr."""
    own = {k: v for k, v in os.environ.items() if "_CACHE" not in k}
    own |= {"CNN_JAX_CACHE": str(folder.parent)} | (environment or {})
    command = [sys.executable, *arguments]
    if before:
        command = ["bash", "-c", f'{before}; exec "$@"', "bash", *command]
    result = subprocess.run(
        command, env=own, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not result.stderr
    return result.stdout


def _written(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_second_prediction_compiles_nothing(arguments, folder):
    cold = _predict(arguments, folder)
    kept = _written(folder)
    # From JAX 0.11 on, other programs use oneDNN, and XLA cannot store programs with oneDNN.
    assert any(name.startswith("jit__probabilities-") for name in kept)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert _predict(arguments, folder) == cold
    # The second prediction added no compiled program to the cache.
    assert _written(folder) == kept


def test_an_incomplete_file_is_replaced(folder):
    first = _sort(folder)
    (path,) = folder.glob("jit_sort-*")
    size = path.stat().st_size
    os.truncate(path, size // 2)
    assert _sort(folder) == first
    assert path.stat().st_size > size // 2
    kept = _written(folder)
    assert _sort(folder) == first
    assert _written(folder) == kept


def test_a_full_disk_leaves_no_incomplete_file(folder):
    """A limit on the file size simulates a full disk: the write fails, and no file remains."""
    assert _sort(folder, before="ulimit -f 1")  # The limit is one kilobyte.
    assert not list(folder.glob("jit_sort-*"))


@pytest.mark.parametrize("hindrance", ["a file", "others may write"])
def test_an_unusable_folder_is_ignored(folder, hindrance):
    folder.parent.mkdir()
    if hindrance == "a file":
        folder.write_text("x")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    assert _sort(folder)
    assert folder.read_text() == "x" if hindrance == "a file" else not list(folder.iterdir())


@pytest.mark.parametrize("wish", ["", "elsewhere"])
def test_the_users_setting_has_priority(folder, tmp_path, wish):
    path = str(tmp_path / wish) if wish else ""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": path,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    _sort(folder, environment=environment)
    assert not folder.exists()
    programs = list(tmp_path.rglob("jit_sort-*"))
    assert [path.parent for path in programs] == ([tmp_path / wish] if wish else [])


def test_old_and_surplus_programs_are_removed(folder, monkeypatch):
    monkeypatch.setenv("CNN_JAX_CACHE", str(folder.parent))
    monkeypatch.setattr(compilation_cache, "_MAX_BYTES", 250)
    folder.mkdir(parents=True)
    names = [f"jit_f-{i:064x}-cache" for i in range(5)]
    for days, name in zip((1, 2, 3, 31), names, strict=False):
        (folder / name).write_bytes(b"x" * 100)
        os.utime(folder / name, (time.time() - days * 86400,) * 2)
    (folder / "notes.txt").write_text("not ours")
    os.utime(folder / "notes.txt", (0, 0))
    compilation_cache._sweep()
    assert {path.name for path in folder.iterdir()} == {*names[:2], "notes.txt"}
    monkeypatch.setattr(compilation_cache, "_MAX_BYTES", 10_000)
    os.utime(folder / names[0], (time.time() - 31 * 86400,) * 2)
    compilation_cache._sweep()
    assert {path.name for path in folder.iterdir()} == {names[1], "notes.txt"}
