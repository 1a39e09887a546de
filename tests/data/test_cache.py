import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from cnn_jax import cache as command
from cnn_jax.data import cache
from cnn_jax.data.cache import PixelFile, open_pixels


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _fill(file, count):
    for row in range(count):
        file.write(row, np.full((2, 3, 3), row, np.uint8))


def test_what_is_published_can_be_opened(folder):
    assert open_pixels("k", 5, (2, 3)) is None
    with PixelFile(5, (2, 3)) as file:
        _fill(file, 5)
        assert open_pixels("k", 5, (2, 3)) is None
        published = file.publish("k")
    for pixels in (published, open_pixels("k", 5, (2, 3))):
        assert isinstance(pixels, np.memmap)
        assert pixels.shape == (5, 2, 3, 3)
        np.testing.assert_array_equal(pixels[:, 0, 0, 0], range(5))
    assert [path.name for path in (folder / "pixels").iterdir()] == ["k.npy"]


def test_what_is_not_published_leaves_nothing(folder):
    with pytest.raises(KeyboardInterrupt), PixelFile(5, (2, 3)) as file:  # noqa: PT012
        _fill(file, 3)
        raise KeyboardInterrupt
    assert list((folder / "pixels").iterdir()) == []


def test_two_writers_at_once_do_not_mix():
    def write(value):
        with PixelFile(50, (16, 16)) as file:
            for row in range(50):
                file.write(row, np.full((16, 16, 3), value, np.uint8))
            file.publish("k")

    threads = [threading.Thread(target=write, args=[value]) for value in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pixels = open_pixels("k", 50, (16, 16))
    assert pixels is not None
    assert len(np.unique(pixels)) == 1


@pytest.mark.parametrize("size", [0, 100, 217])
def test_a_file_cut_short_is_as_good_as_none(folder, size):
    with PixelFile(5, (2, 3)) as file:
        file.publish("k")
    os.truncate(folder / "pixels" / "k.npy", size)
    assert open_pixels("k", 5, (2, 3)) is None


def test_an_array_of_another_form_is_as_good_as_none(folder):
    with PixelFile(5, (2, 3)) as file:
        file.publish("k")
    assert open_pixels("k", 6, (2, 3)) is None
    np.save(folder / "pixels" / "k.npy", np.zeros((5, 2, 3, 3)))
    assert open_pixels("k", 5, (2, 3)) is None


def test_what_killed_processes_left_is_swept_away_after_a_day(folder):
    (folder / "pixels").mkdir(parents=True)
    for name, age in (("old", 2 * 86400), ("new", 3600)):
        path = folder / "pixels" / f".partial-{name}"
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    with PixelFile(1, (2, 3)):
        pass
    assert [path.name for path in (folder / "pixels").iterdir()] == [".partial-new"]


def test_pixels_that_nobody_opens_any_more_are_swept_away(folder):
    for key in "ab":
        with PixelFile(1, (2, 3)) as file:
            file.publish(key)
        os.utime(folder / "pixels" / f"{key}.npy", (time.time() - 31 * 86400,) * 2)
    assert open_pixels("b", 1, (2, 3)) is not None
    with PixelFile(1, (2, 3)):
        assert {path.name for path in (folder / "pixels").glob("*.npy")} == {"b.npy"}


def test_without_fallocate_the_free_room_is_asked_for(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with PixelFile(5, (2, 3)) as file:
        _fill(file, 5)
        np.testing.assert_array_equal(file.publish("k")[:, 0, 0, 0], range(5))
    monkeypatch.setattr(cache, "free_bytes", lambda: 89)
    with pytest.raises(OSError, match="No space left on device"):
        PixelFile(5, (2, 3))


def test_a_full_disk_is_found_out_before_anything_is_written(folder):
    """A limit on the file size of a process makes a write fail, as a full disk does."""
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from cnn_jax.data.cache import PixelFile\n"
        "try: PixelFile(1000, (16, 16))\n"
        "except OSError as error: print(error.strerror)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "File too large\n"
    assert list((folder / "pixels").iterdir()) == []


def test_what_is_kept_as_json_comes_back_with_any_name(folder):
    cache.write_json("scans", "k", {"ü\udcff\n": [1, None]})
    assert cache.read_json("scans", "k") == {"ü\udcff\n": [1, None]}
    (folder / "scans" / "k.json").write_bytes(b"\xff{")
    assert cache.read_json("scans", "k") is None
    assert cache.read_json("scans", "absent") is None


def test_free_bytes_are_those_of_the_disk(tmp_path):
    assert cache.free_bytes() == pytest.approx(os.statvfs(tmp_path).f_bavail * 4096, rel=0.5)


def test_one_command_shows_and_removes_all_of_it(folder, capsys):
    with PixelFile(1000, (32, 32)) as file:
        file.publish("0" * 32)
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
    assert (folder / "pixels" / f"{'0' * 32}.npy").exists()
    command.main(["--clear"])
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert left == ["scans", "scans/patient", "scans/patient/mri.npy", "wedding.jpg"]
    command.main(["--clear"])  # Clearing an empty cache is no error.
