"""Tests of the request log: its size limit, its sampling and its errors."""

import sqlite3

import numpy as np
import pytest
from bundles import make_bundle

from cnn_jax.serve.request_log import RequestLog
from cnn_jax.serve.versions import make_version
from cnn_jax.system.errors import ConfigError


@pytest.fixture(scope="module")
def version():
    return make_version("shapes", 1, make_bundle(), "digest", 10**6, (1,))


def offer(log, version, numbers):
    rng = np.random.default_rng(0)
    for number in numbers:
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        log.record(version, str(number), pixels, np.array([0.2, 0.3, 0.5], np.float32))


def ids_of(path):
    return [int(row[0]) for row in sqlite3.connect(path).execute("select request_id from requests")]


def test_the_log_deletes_its_oldest_rows(version, tmp_path):
    path = tmp_path / "requests.db"
    most = 200_000
    log = RequestLog(path, max_bytes=most, with_images=True)
    for start in range(0, 800, 100):
        offer(log, version, range(start, start + 100))
        while log._waiting.qsize():
            pass
    log.close()
    assert log.lost_rows == 0
    kept = ids_of(path)
    assert kept == list(range(kept[0], 800))
    assert 100 < len(kept) < 300  # A row takes about one kilobyte.
    # One batch of rows and SQLite's write-ahead log may exceed the size limit.
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1.5 * most


def test_a_fraction_is_sampled(version, tmp_path):
    log = RequestLog(tmp_path / "requests.db", fraction=0.25)
    for start in range(0, 800, 100):
        offer(log, version, range(start, start + 100))
        while log._waiting.qsize():
            pass
    log.close()
    assert 140 < len(ids_of(tmp_path / "requests.db")) < 260
    rows = sqlite3.connect(tmp_path / "requests.db").execute("select image from requests")
    assert {row[0] for row in rows} == {None}


def test_rows_lost_to_a_full_disk_are_counted(version, tmp_path, monkeypatch):
    path = tmp_path / "requests.db"
    log = RequestLog(path)
    connect = log._connect

    def full():
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(log, "_connect", full)
    offer(log, version, range(5))
    while log.lost_rows < 5:
        pass
    monkeypatch.setattr(log, "_connect", connect)
    offer(log, version, [5])
    log.close()
    assert log.lost_rows == 5
    assert ids_of(path) == [5]


def test_record_never_waits(version, tmp_path):
    log = RequestLog(tmp_path / "requests.db")
    with sqlite3.connect(tmp_path / "requests.db") as other:
        other.execute("begin exclusive")  # Now no other connection can write.
        offer(log, version, range(1_100))
        assert log.lost_rows >= 90
    log.close()
    assert len(ids_of(tmp_path / "requests.db")) + log.lost_rows == 1_100


def test_an_existing_log_is_continued(version, tmp_path):
    path = tmp_path / "requests.db"
    for number in range(2):
        log = RequestLog(path)
        offer(log, version, [number])
        log.close()
    assert ids_of(path) == [0, 1]


def test_another_file_is_not_changed(tmp_path):
    (tmp_path / "note.txt").write_text("a text that is long enough to be no database" * 20)
    with pytest.raises(ConfigError, match="--request_log: cannot use"):
        RequestLog(tmp_path / "note.txt")
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("create table requests (a integer)")
    with pytest.raises(ConfigError, match="no such column"):
        RequestLog(tmp_path / "other.db")
