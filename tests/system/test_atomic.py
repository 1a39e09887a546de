"""Tests that a file has its old or new content after a write, and no temporary file remains."""

import os
import stat

import pytest

from cnn_jax.system import atomic


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced(tmp_path, shared, durable):
    path = tmp_path / "file.txt"
    for text in ("grün 猫\n", "new"):
        atomic.write_text(path, text, shared=shared, durable=durable)
        assert path.read_text("utf-8") == text
    atomic.write_bytes(path, b"\x00\xff", shared=shared, durable=durable)
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_name_that_is_not_utf_8_is_escaped(tmp_path):
    atomic.write_text(tmp_path / "file", os.fsdecode(b"\xff"))
    assert (tmp_path / "file").read_bytes() == rb"\udcff"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_content(tmp_path, shared, kind):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write():
        with atomic.replacing(path, shared=shared) as file:
            file.write(b"new")
            raise kind(28, "No space left")

    with pytest.raises(kind) as raised:
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    if isinstance(raised.value, OSError):
        assert raised.value.filename == str(path)


def test_the_temporary_file_of_a_killed_process_is_replaced(tmp_path):
    path = tmp_path / "file.txt"
    (tmp_path / ".file.txt.partial").write_text("longer than the new content")
    atomic.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_all_users_may_read_a_shared_file(tmp_path):
    atomic.write_text(tmp_path / "file", "text", shared=True)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


@pytest.mark.parametrize("durable", [False, True])
def test_a_durable_file_is_on_the_disk_before_its_name(tmp_path, monkeypatch, durable):
    calls = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(path.exists()) or fsync(file))
    path = tmp_path / "file"
    atomic.write_text(path, "text", durable=durable)
    assert calls == [False] * durable
