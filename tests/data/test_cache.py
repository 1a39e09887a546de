import os

import numpy as np
import pytest

from cnn_jax import cache as command
from cnn_jax.data import cache
from cnn_jax.data.row_cache import RowCache


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_kept_as_json_comes_back_with_any_name(folder):
    cache.write_json("scans", "k", {"ü\udcff\n": [1, None]})
    assert cache.read_json("scans", "k") == {"ü\udcff\n": [1, None]}
    (folder / "scans" / "k.json").write_bytes(b"\xff{")
    assert cache.read_json("scans", "k") is None
    assert cache.read_json("scans", "absent") is None


def test_free_bytes_are_those_of_the_disk(tmp_path):
    assert cache.free_bytes() == pytest.approx(os.statvfs(tmp_path).f_bavail * 4096, rel=0.5)


def test_one_command_shows_and_removes_all_of_it(folder, capsys):
    row = np.zeros((1000, 1024, 3), np.uint8)
    with RowCache("pixels", "0" * 32, row.shape).writer(1) as writer:
        writer.write("1" * 32, row)
    cache.write_json("scans", "f" * 32, {})
    (folder / "shapes-v1-seed0-10").mkdir()
    (folder / "compiled").mkdir()
    (folder / "compiled" / f"jit_f-{'0' * 64}-cache").write_text("x")
    # The flag --clear must not remove files of the user in the cache folder and its sub-folders.
    (folder / "wedding.jpg").write_text("x")
    (folder / "scans" / "patient").mkdir()
    (folder / "scans" / "patient" / "mri.npy").write_text("x")
    command.main([])
    assert f"3.1 MB  {folder}/pixels" in capsys.readouterr().out
    assert len(list((folder / "pixels").iterdir())) == 1
    command.main(["--clear"])
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert left == ["scans", "scans/patient", "scans/patient/mri.npy", "wedding.jpg"]
    command.main(["--clear"])  # Clearing an empty cache is no error.
