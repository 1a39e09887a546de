import contextlib
import errno
import os
import pathlib
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest

from cnn_jax.data import cache, row_cache
from cnn_jax.data.row_cache import RowCache

KEY = "a" * 32
SHAPE = (2, 3, 3)
# The bytes of a row and of its digest and checksum.
ROW_BYTES, INDEX_BYTES = 18, 20


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of the rows in an empty cache."""
    monkeypatch.setenv("CNN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pixels"


def _open():
    return RowCache("pixels", KEY, SHAPE)


def _digest(number):
    return f"{number:032x}"


def _row(number):
    return np.random.default_rng(number).integers(0, 256, SHAPE, np.uint8)


def _write(*numbers, count=None, rows=None):
    """Writes the rows of these numbers in one segment."""
    rows = rows or _open()
    with rows.writer(len(numbers) if count is None else count) as writer:
        for number in numbers:
            writer.write(_digest(number), _row(number))


def _read(*numbers, rows=None):
    """Checks the rows of these numbers; returns the positions that had to be computed."""
    computed = []

    def compute(position):
        computed.append(position)
        return _row(numbers[position])

    found = (rows or _open()).rows(list(map(_digest, numbers)), compute)
    assert len(found) == len(numbers)
    assert found.nbytes == len(numbers) * ROW_BYTES
    expected = np.array([_row(number) for number in numbers])
    np.testing.assert_array_equal(np.asarray(found), expected)
    order = np.random.default_rng(0).permutation(len(numbers))
    np.testing.assert_array_equal(found[order], expected[order])
    return computed[: len(computed) // 2]  # Both loops above compute a damaged row.


def _not_computed(position):
    raise AssertionError(position)


def _files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".rows")


def _age(path, days):
    os.utime(path, (time.time() - days * 86400,) * 2)


def test_rows_are_found_in_any_order_and_number(folder):
    assert not _open().digests
    _write(4, 2, 7, count=10)
    assert _open().digests == {_digest(4), _digest(2), _digest(7)}
    assert _read(7, 4, 2, 4, 4) == []
    assert _read(2, 7) == []
    (path,) = _files(folder)
    assert path.stat().st_size == 3 * (ROW_BYTES + INDEX_BYTES)
    assert list(folder.iterdir()) == [path]


def test_another_key_has_other_rows():
    _write(1)
    assert not RowCache("pixels", "b" * 32, SHAPE).digests
    assert not RowCache("looks", KEY, SHAPE).digests


def test_new_rows_are_written_without_the_old_ones(folder):
    _write(*range(20))
    (old,) = _files(folder)
    rows = _open()
    _write(20, rows=rows)
    (new,) = set(_files(folder)) - {old}
    assert new.stat().st_size == ROW_BYTES + INDEX_BYTES
    for numbers in (range(21), [20], [3, 20, 20, 5]):
        assert _read(*numbers, rows=rows) == []
        assert _read(*numbers) == []
    assert len(_files(folder)) == 3  # Few rows of the first segment were copied.


def test_a_row_is_stored_once(folder):
    _write(1, 1, 2)
    (path,) = _files(folder)
    assert path.stat().st_size == 2 * (ROW_BYTES + INDEX_BYTES)


def test_writers_of_the_same_rows_at_the_same_time_store_them_once(folder):
    first, second = _open(), _open()
    with first.writer(3) as writer, second.writer(3) as other:
        for one, two in ((1, 3), (2, 1), (3, 2)):
            writer.write(_digest(one), _row(one))
            other.write(_digest(two), _row(two))
    assert len(_files(folder)) == 1
    for rows in (first, second, _open()):
        assert _read(3, 2, 1, rows=rows) == []


def test_a_segment_is_not_replaced_by_the_same_rows_in_another_order():
    _write(1, 2)
    rows = _open()
    _write(2, 1)
    assert _read(1, 2, rows=rows) == []


def test_threads_may_write_to_one_segment():
    rows = _open()
    with rows.writer(400) as writer:

        def work(start):
            for number in range(start, start + 100):
                writer.write(_digest(number), _row(number))

        threads = [threading.Thread(target=work, args=[start]) for start in range(0, 250, 50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert _read(*range(300)) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_rows_are_kept_after_an_interruption_but_not_after_an_error_of_the_disk(folder, error):
    with contextlib.suppress(error), _open().writer(5) as writer:
        writer.write(_digest(1), _row(1))
        raise error
    assert _open().digests == ({_digest(1)} if error is KeyboardInterrupt else set())
    assert len(list(folder.iterdir())) == (error is KeyboardInterrupt)


def test_an_empty_segment_is_not_stored(folder):
    _write(count=3)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 38, 113])
def test_a_file_that_is_cut_is_deleted(folder, size, caplog):
    _write(1, 2, 3)
    (path,) = _files(folder)
    os.truncate(path, size)
    assert not _open().digests
    assert "is damaged" in caplog.text
    assert list(folder.iterdir()) == []


def _flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def test_a_file_with_a_changed_digest_is_deleted(folder):
    _write(1, 2, 3)
    (path,) = _files(folder)
    _flip(path, 3 * ROW_BYTES + 3)
    assert not _open().digests
    assert not path.exists()


@pytest.mark.parametrize("position", [ROW_BYTES, 2 * ROW_BYTES - 1, 3 * ROW_BYTES + 37])
def test_a_changed_row_is_computed_and_its_file_deleted(folder, position, caplog):
    """A byte of the second row is changed, or its checksum."""
    _write(1, 2, 3)
    (path,) = _files(folder)
    _flip(path, position)
    assert _read(1, 2, 3) == [1]
    assert caplog.text.count("is damaged") == 1
    assert not path.exists()
    assert not _open().digests


def test_a_row_is_checked_once(monkeypatch):
    _write(1, 2, 3)
    checked = []
    original = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda row: checked.append(row) or original(row))
    found = _open().rows(list(map(_digest, (1, 2, 3))), _not_computed)
    for indices in ([0], [2, 0], [1, 1], [0, 1, 2]):
        found[np.array(indices)]
    assert len(checked) == 4  # The third batch checks its row twice.


def test_a_changed_row_is_computed_before_it_is_copied(folder):
    _write(*range(8))
    (path,) = _files(folder)
    _flip(path, 2 * ROW_BYTES)
    assert len(_read(1, 2)) == 0
    assert not path.exists()
    assert _open().digests == {_digest(1), _digest(2)}


def test_a_file_that_disappears_is_computed(folder):
    _write(*range(3))
    rows = _open()
    (path,) = _files(folder)
    path.unlink()
    assert _read(*range(3), rows=rows) == [0, 1, 2]


def test_a_file_that_is_in_use_may_be_deleted(folder):
    _write(*range(3))
    found = _open().rows([_digest(1)] * 3, _not_computed)
    found[np.array([0])]
    cache.clear()
    np.testing.assert_array_equal(found[np.array([0, 2])], [_row(1)] * 2)


def test_rows_of_a_segment_that_is_mostly_unused_are_copied(folder):
    _write(*range(10))
    (old,) = _files(folder)
    assert _read(*range(6)) == []
    assert _files(folder) == [old]
    assert _read(*range(5)) == []
    (new,) = set(_files(folder)) - {old}
    assert new.stat().st_size == 5 * (ROW_BYTES + INDEX_BYTES)
    # From now on, nothing is written, and only the new segment is used.
    for path in (old, new):
        _age(path, 20)
    assert _read(*range(5)) == []
    assert set(_files(folder)) == {old, new}
    assert new.stat().st_mtime > time.time() - 86400 > old.stat().st_mtime
    # Another data set may use the other rows.
    assert _read(*range(10)) == []
    assert set(_files(folder)) == {old, new}


def test_only_rows_that_no_other_segment_has_are_copied(folder):
    _write(*range(20))
    _write(0, 1)
    old = _files(folder)
    assert _read(0, 1, 2) == []
    (new,) = set(_files(folder)) - set(old)
    assert new.stat().st_size == ROW_BYTES + INDEX_BYTES


def test_rows_in_many_segments_are_joined(folder):
    _write(*range(100))
    for number in range(100, 108):
        _write(number)
        assert _read(*range(number + 1)) == []
        assert len(_files(folder)) == number - 98 + (number == 107)
    sizes = [path.stat().st_size for path in _files(folder)]
    # The five segments of one row that were copied are not used any more.
    assert sizes.count(5 * (ROW_BYTES + INDEX_BYTES)) == 1
    assert _read(*range(108)) == []
    assert len(_files(folder)) == len(sizes)


def test_without_space_rows_are_not_copied(folder, monkeypatch):
    _write(*range(10))
    needed = 2 * (ROW_BYTES + INDEX_BYTES)
    monkeypatch.setattr(cache, "free_bytes", lambda: needed - 1)
    assert _read(1) == []
    monkeypatch.setattr(cache, "free_bytes", lambda: needed)
    assert len(_files(folder)) == 1
    assert _read(1) == []
    assert len(_files(folder)) == 2


def test_unused_files_are_deleted(folder):
    for numbers in ([1, 2, 3], [4], [5]):
        _write(*numbers)
    (folder / ".partial-new").touch()
    (folder / ".partial-old").touch()
    for path in _files(folder):
        _age(path, 31)
    _age(folder / ".partial-old", 2)
    # The process that opened the cache is about to use its segments.
    rows = _open()
    _write(6, rows=rows)
    assert len(_files(folder)) == 4
    assert _read(1, 2, 3, 4, 6, rows=rows) == []
    assert len(list(folder.iterdir())) == 4
    assert _open().digests == {_digest(number) for number in (1, 2, 3, 4, 6)}


def test_rows_in_memory_follow_the_rows_of_files(folder):
    _write(1, 2)
    found = (
        _open().rows([_digest(2), _digest(1)], _not_computed).extended(np.array([_row(8), _row(9)]))
    )
    expected = np.array([_row(number) for number in (2, 1, 8, 9)])
    np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_array_equal(found[np.array([3, 0, 2])], expected[[3, 0, 2]])


@pytest.fixture
def small_segments(monkeypatch):
    """A segment is full when it has ten rows."""
    monkeypatch.setattr(row_cache, "_SEGMENT_BYTES", 10 * (ROW_BYTES + INDEX_BYTES))


@pytest.mark.usefixtures("small_segments")
def test_rows_are_stored_in_segments_of_a_limited_size(folder):
    sizes = []
    with _open().writer(100) as writer:
        for number in range(34):
            writer.write(_digest(number), _row(number))
            writer.store_if_full()
            sizes += [path.stat().st_size for path in folder.glob(".partial-*")]
    # The file of a segment has its full size from the beginning.
    assert set(sizes) == {10 * (ROW_BYTES + INDEX_BYTES)}
    assert sorted(len(segment.digests) for segment in _open()._segments) == [4, 10, 10, 10]
    assert _read(*range(34)) == []
    assert len(list(folder.iterdir())) == 4


@pytest.mark.usefixtures("small_segments")
def test_only_small_segments_are_joined(folder):
    with _open().writer(120) as writer:
        for number in range(120):
            writer.write(_digest(number), _row(number))
            writer.store_if_full()
    assert len(_files(folder)) == 12
    assert _read(*range(120)) == []
    assert len(_files(folder)) == 12
    for number in range(120, 147, 3):
        _write(*range(number, number + 3))
    assert len(_files(folder)) == 21
    assert _read(*range(147)) == []
    assert len(_files(folder)) == 23  # Fifteen rows were copied.
    assert _read(*range(147)) == []
    assert len(_files(folder)) == 23


@pytest.mark.usefixtures("small_segments")
def test_rows_are_copied_to_several_segments(folder):
    _write(*range(60))  # Without a call of `store_if_full`, all rows are in one segment.
    found = _open().rows(list(map(_digest, range(25))), _not_computed)
    assert sorted(len(segment.digests) for segment in found._segments) == [5, 10, 10]
    assert _read(*range(25)) == []
    sizes = [path.stat().st_size / (ROW_BYTES + INDEX_BYTES) for path in _files(folder)]
    assert sorted(sizes) == [5, 10, 10, 60]


@pytest.mark.usefixtures("small_segments")
def test_full_segments_are_kept_after_an_error_of_the_disk(folder, monkeypatch):
    def write_until_the_disk_is_full():
        with _open().writer(30) as writer:
            for number in range(10):
                writer.write(_digest(number), _row(number))
            monkeypatch.setattr(os, "posix_fallocate", _no_space)
            writer.store_if_full()

    with pytest.raises(OSError, match="full"):
        write_until_the_disk_is_full()
    assert [path.suffix for path in folder.iterdir()] == [".rows"]
    assert _read(*range(10)) == []


def _no_space(*_):
    raise OSError(errno.ENOSPC, "full")


def test_too_little_space_for_all_segments_is_noticed_at_once(folder, monkeypatch):
    needed = 1000 * (ROW_BYTES + INDEX_BYTES)
    monkeypatch.setattr(cache, "free_bytes", lambda: needed - 1)
    with pytest.raises(OSError, match="No space left on device"):
        _open().writer(1000)
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(cache, "free_bytes", lambda: needed)
    with _open().writer(1000):
        pass


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EIO])
def test_an_error_of_the_system_does_not_damage_a_segment(folder, monkeypatch, number):
    _write(1, 2)

    def fail(*_args, **_options):
        raise OSError(number, "failed")

    monkeypatch.setattr(np, "memmap", fail)
    with pytest.raises(OSError, match="failed"):
        _read(1, 2)
    monkeypatch.undo()
    assert len(_files(folder)) == 1


# Writes 101 rows in segments of ten rows, and then waits.
_WRITE = """
import sys, numpy as np
from cnn_jax.data import row_cache
row_cache._SEGMENT_BYTES = 380
with row_cache.RowCache("pixels", "a" * 32, (2, 3, 3)).writer(10**6) as writer:
    for number in range(2, 103):
        row = np.random.default_rng(number).integers(0, 256, (2, 3, 3), "u1")
        writer.write(f"{number:032x}", row)
        writer.store_if_full()
    print(flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def _process_that_writes():
    """Runs a process that has written rows and has not finished; kills it at the end."""
    command = [sys.executable, "-c", _WRITE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        try:
            assert process.stdout.readline()
            yield
        finally:
            process.kill()


def test_only_the_temporary_file_of_a_killed_process_is_removed(folder):
    _write(1)
    with _process_that_writes():
        (partial,) = folder.glob(".partial-*")
        _age(partial, 2)
        assert _read(1) == []
        assert partial.exists()
    _age(partial, 0)
    # All full segments of the killed process remain.
    assert _open().digests == set(map(_digest, range(1, 102)))
    assert _read(1, *range(2, 102)) == []
    assert partial.exists()  # Perhaps a process of another machine has a lock.
    _age(partial, 1 / 100)
    assert _read(1) == []
    assert not partial.exists()


def test_without_locks_a_temporary_file_is_removed_after_a_day(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(cache.fcntl, "flock", fail)
    with _open().writer(1):
        (partial,) = folder.glob(".partial-*")
        cache.sweep(folder)
        assert partial.exists()
        _age(partial, 2)
        cache.sweep(folder)
        assert not partial.exists()


def test_a_file_that_is_removed_before_it_is_locked_is_created_again(folder, monkeypatch):
    """`sweep` of another process may find the new file without a lock."""
    original = cache.fcntl.flock

    def flock(descriptor, operation):
        monkeypatch.undo()
        monkeypatch.setenv("CNN_JAX_CACHE", str(folder.parent))
        cache.sweep(folder)
        original(descriptor, operation)

    monkeypatch.setattr(cache.fcntl, "flock", flock)
    _write(1)
    assert _read(1) == []


def test_without_fallocate_the_free_space_is_checked(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    _write(1, 2)
    assert _read(2, 1) == []
    monkeypatch.setattr(cache, "free_bytes", lambda: ROW_BYTES + INDEX_BYTES - 1)
    with pytest.raises(OSError, match="No space left on device"):
        _write(3)


def test_a_full_disk_is_noticed_before_anything_is_written(folder):
    """A limit on the file size of a process makes a write fail, as a full disk does."""
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from cnn_jax.data.row_cache import RowCache\n"
        "try: RowCache('pixels', 'a' * 32, (16, 16, 3)).writer(1000)\n"
        "except OSError as error: print(error.strerror)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "File too large\n"
    assert list(pathlib.Path(folder).iterdir()) == []
