"""Tests of the request log: readers, feedback, deletion, several servers, and errors."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from bundles import make_bundle
from conftest import REPOSITORY
from servers import until

from cnn_jax.data import request_log as files
from cnn_jax.data.request_log import class_names, read_feedback, read_requests
from cnn_jax.serve.feedback import Feedback
from cnn_jax.serve.limits import Refused
from cnn_jax.serve.request_log import RequestLog
from cnn_jax.serve.responses import new_request_id
from cnn_jax.serve.versions import make_version
from cnn_jax.system.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def version():
    return make_version("shapes", 1, make_bundle(), "digest", 10**6, (1,))


def offer(log, version, numbers):
    """Records one image per number, with the number as the `unit`; returns the request ids."""
    rng = np.random.default_rng(0)
    ids = []
    for number in numbers:
        while log._waiting.qsize() > 500:
            time.sleep(0.001)
        ids.append(new_request_id())
        log.record(
            request_id=ids[-1],
            image_index=0,
            unit=str(number),
            arm="champion",
            version=version,
            pixels=rng.integers(0, 256, (16, 16, 3), np.uint8),
            probabilities=np.array([0.2, 0.3, 0.5], np.float32),
            embedding=np.arange(16, dtype=np.float32),
        )
    return ids


def units(folder):
    return [int(unit) for unit in read_requests(folder, ["unit"])["unit"].to_pylist()]


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def give(log, request_id, **fields):
    asyncio.run(log.add_feedback("", Feedback(request_id=request_id, **fields)))


def test_a_row_has_named_columns(version, tmp_path):
    log = RequestLog(tmp_path / "log", with_images=True)
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 100
    before = time.time()
    log.record(
        request_id="0" * 32,
        image_index=3,
        unit=None,
        arm="champion",
        version=version,
        pixels=pixels,
        probabilities=np.array([0.2, 0.5, 0.3], np.float32),
        embedding=np.array([1.5, -2.0], np.float32),
    )
    log.close()
    table = read_requests(tmp_path / "log")
    assert table.schema.equals(files.REQUESTS)
    (row,) = table.to_pylist()
    assert before - 1 < row.pop("time").timestamp() < time.time() + 1
    decoded = __import__("cv2").imdecode(np.frombuffer(row.pop("image"), np.uint8), 1)
    np.testing.assert_array_equal(decoded, pixels)
    sharpness = row.pop("sharpness")
    assert row == {
        "request_id": "0" * 32,
        "image_index": 3,
        "unit": None,
        "arm": "champion",
        "model": "shapes",
        "version": 1,
        "digest": "digest",
        "class": "green",
        "confidence": 0.5,
        "probabilities": pytest.approx([0.2, 0.5, 0.3]),
        "embedding": [1.5, -2.0],
        "brightness": 50.0,
        "contrast": 50.0,
        "milliseconds": None,
        "shadow_of": None,
    }
    # The Laplacian is 100 in column 7, -100 in column 8, and 0 elsewhere.
    assert sharpness == pytest.approx(np.sqrt(2 * 100**2 / 16))
    assert class_names(tmp_path / "log", "digest") == ["blue", "green", "red"]
    metadata = {b"cnn_jax_request_log": b"1"}
    for path in (tmp_path / "log" / "requests").iterdir():
        assert pa.parquet.read_schema(path).metadata == metadata


_READER = """
import contextlib, sys
from cnn_jax.data.request_log import list_files, read_requests
import pathlib
folder = pathlib.Path(sys.argv[1])
held = []
while True:
    units = [int(unit) for unit in read_requests(folder, ["unit"])["unit"].to_pylist()]
    assert units == list(range(units[0], units[0] + len(units))) if units else True, units
    for path in list_files(folder / "requests"):
        with contextlib.suppress(FileNotFoundError):
            held.append(path.open("rb"))
    del held[200:]
    print(len(units), flush=True)
"""


def test_readers_do_not_disturb_the_writer(version, tmp_path):
    """A reader that holds the files open loses no row, and sees no gap and no row twice."""
    folder, most = tmp_path / "log", 200_000
    log = RequestLog(folder, max_bytes=most, with_images=True)
    offer(log, version, range(10))
    until(lambda: len(units(folder)) == 10)
    reader = subprocess.Popen(
        [sys.executable, "-c", _READER, str(folder)],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
    )
    try:
        assert int(reader.stdout.readline()) == 10
        offer(log, version, range(10, 1_600))
        log.close()
        assert log.lost_rows == 0
        assert reader.poll() is None, "the reader has failed"
    finally:
        reader.kill()
        output = reader.communicate()[0]
    assert output.count("\n") > 2
    kept = units(folder)
    assert kept == list(range(kept[0], 1_600))
    assert 50 < len(kept) < 400
    # The total size may exceed the limit by the size of one file.
    assert bytes_of(folder / "requests") < 1.2 * most


def test_rows_are_visible_while_the_file_is_written(version, tmp_path):
    log = RequestLog(tmp_path / "log")
    offer(log, version, range(5))
    until(lambda: units(tmp_path / "log") == [0, 1, 2, 3, 4])
    assert [path.suffix for path in (tmp_path / "log" / "requests").iterdir()] == [".arrows"]
    log.close()
    assert [path.suffix for path in (tmp_path / "log" / "requests").iterdir()] == [".parquet"]
    assert units(tmp_path / "log") == [0, 1, 2, 3, 4]


def test_an_old_file_is_completed_without_new_rows(version, tmp_path, monkeypatch):
    monkeypatch.setattr("cnn_jax.serve.request_log._IDLE_SECONDS", 0.1)
    monkeypatch.setattr(files, "_SEGMENT_SECONDS", 0.5)
    log = RequestLog(tmp_path / "log")
    (request_id,) = offer(log, version, [0])
    folder = tmp_path / "log" / "requests"
    until(lambda: [path.suffix for path in folder.iterdir()] == [".parquet"])
    give(log, request_id, label="red")
    offer(log, version, [1])
    log.close()
    assert units(tmp_path / "log") == [0, 1]


def test_a_fraction_is_sampled(version, tmp_path):
    log = RequestLog(tmp_path / "log", fraction=0.25)
    offer(log, version, range(800))
    log.close()
    table = read_requests(tmp_path / "log")
    assert 140 < len(table) < 260
    assert table["image"].null_count == len(table)


def test_feedback_names_a_recorded_image(version, tmp_path):
    log = RequestLog(tmp_path / "log")
    first, second = offer(log, version, range(2))
    give(log, first, label="blue")
    give(log, second, reward=0.5)
    give(log, first, label="violet", new_class=True)
    for arguments, reason in (
        ({"request_id": new_request_id(), "label": "blue"}, "no_request"),
        ({"request_id": first, "image_index": 1, "label": "blue"}, "no_request"),
        ({"request_id": first, "label": "Blu"}, "label"),
    ):
        with pytest.raises(Refused) as caught:
            give(log, **arguments)
        assert caught.value.reason == reason
    assert "did you mean 'blue'?" in str(caught.value)
    log.close()
    found = read_feedback(tmp_path / "log").sort_by("time").to_pylist()
    assert [(one["request_id"], one["label"], one["reward"]) for one in found] == [
        (first, "blue", None),
        (second, None, 0.5),
        (first, "violet", None),
    ]


def test_labelled_rows_are_not_deleted(version, tmp_path):
    folder, most = tmp_path / "log", 200_000
    log = RequestLog(folder, max_bytes=most, with_images=True)
    ids = offer(log, version, range(50))
    for number in (3, 40):
        give(log, ids[number], label="red")
    offer(log, version, range(50, 1_600))
    log.close()
    kept = units(folder)
    assert sorted(kept)[:2] == [3, 40]
    assert sorted(kept)[2:] == list(range(sorted(kept)[2], 1_600))
    assert bytes_of(folder / "requests") < 1.2 * most
    # The rows that were moved can still get feedback, and the rows that were deleted cannot.
    log = RequestLog(folder)
    give(log, ids[40], reward=1.0)
    with pytest.raises(Refused, match="it was deleted"):
        give(log, ids[4], label="red")
    log.close()


def test_servers_share_a_folder(version, tmp_path):
    """Two servers fill a log beyond its limit while both accept feedback to rows of the other."""
    folder = tmp_path / "log"
    logs = [RequestLog(folder, max_bytes=400_000, with_images=True) for _ in range(2)]
    labelled = []

    def run(own, other, start):
        for first in range(start, start + 500, 50):
            ids = offer(own, version, range(first, first + 50))
            give(own, ids[7], label="red")
            give(other, ids[9], label="blue")
            labelled.extend((first + 7, first + 9))

    threads = [
        threading.Thread(target=run, args=(*logs[::step], start))
        for step, start in ((1, 0), (-1, 1_000))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    assert [log.lost_rows for log in logs] == [0, 0]
    kept = units(folder)
    assert len(labelled) == 40
    assert set(labelled) <= set(kept)
    assert len(kept) == len(set(kept)) < 500
    assert len(read_feedback(folder)) == 40


def test_a_row_is_found_while_its_file_is_converted(version, tmp_path, monkeypatch):
    """A server completes its file after another server has listed the file to search it."""
    folder = tmp_path / "log"
    one, two = RequestLog(folder), RequestLog(folder)
    ids = offer(one, version, range(3))
    until(lambda: len(units(folder)) == 3)
    list_files = files.list_files

    def list_and_close(path):
        found = list_files(path)
        if one._thread.is_alive():
            one.close()
        return found

    monkeypatch.setattr(files, "list_files", list_and_close)
    give(two, ids[0], label="red")
    two.close()


def test_feedback_is_refused_if_its_row_is_deleted(version, tmp_path, monkeypatch):
    """Another server deletes a row after the row was found, and before its label is written."""
    folder = tmp_path / "log"
    log = RequestLog(folder)
    ids = offer(log, version, range(3))
    log.close()
    log = RequestLog(folder)
    append = log._feedback.append

    def delete_and_append(columns):
        files.delete_oldest(folder, 0)
        append(columns)

    monkeypatch.setattr(log._feedback, "append", delete_and_append)
    with pytest.raises(Refused, match="was deleted"):
        give(log, ids[0], label="red")
    log.close()


@pytest.mark.parametrize(("number", "is_killed"), [(0, False), (1, False), (1, True)])
def test_a_row_labelled_during_its_deletion_is_kept(
    version, tmp_path, monkeypatch, number, is_killed
):
    """Another server accepts a label after the deletion has searched for labels."""
    folder = tmp_path / "log"
    log = RequestLog(folder)
    ids = offer(log, version, range(3))
    give(log, ids[0], label="red")
    log.close()
    other, labelled = RequestLog(folder), files._labelled

    def search_and_label(*arguments, **options):
        found = labelled(*arguments, **options)
        if (folder / "requests" / path.name).exists():
            give(other, ids[number], label="blue")
        elif is_killed:
            raise KeyboardInterrupt
        return found

    (path,) = (folder / "requests").iterdir()
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(files, "_labelled", search_and_label)
        files.delete_oldest(folder, 0)
    if is_killed:  # The renamed file is still read, gets no feedback, and is deleted later.
        assert units(folder) == [0, 1, 2]
        with pytest.raises(Refused, match="was deleted"):
            give(other, ids[2], label="red")
        files.delete_oldest(folder, 0)
    assert not list((folder / "requests").iterdir())
    assert units(folder) == list(range(number + 1))
    other.close()


def test_an_interrupted_deletion_is_finished_later(version, tmp_path, monkeypatch):
    """A server is killed after it has copied the rows with feedback."""
    folder = tmp_path / "log"
    log = RequestLog(folder)
    ids = offer(log, version, range(3))
    give(log, ids[1], label="red")
    log.close()
    with monkeypatch.context() as patch:
        patch.setattr(files.pathlib.Path, "unlink", lambda path, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            files.delete_oldest(folder, 0)
    assert (len(list((folder / "labelled").iterdir())), units(folder)) == (1, [0, 1, 2])
    files.delete_oldest(folder, 0)
    assert units(folder) == [1]


def test_a_killed_server_leaves_readable_rows(version, tmp_path):
    """The end of the last batch is missing, as after a power failure."""
    log = RequestLog(tmp_path / "log")
    offer(log, version, range(5))
    until(lambda: len(units(tmp_path / "log")) == 5)
    offer(log, version, range(5, 9))
    until(lambda: len(units(tmp_path / "log")) == 9)
    (path,) = (tmp_path / "log" / "requests").iterdir()
    os.truncate(path, path.stat().st_size - 100)
    assert units(tmp_path / "log") == [0, 1, 2, 3, 4]
    os.truncate(path, 10)
    assert units(tmp_path / "log") == []
    log.close()


_FULL_DISK = """
import pathlib, resource, sys
import numpy as np
from cnn_jax.data import request_log as files
folder = pathlib.Path(sys.argv[1])
files.make_folders(folder)
segments = files.Segments(folder / "feedback", files.FEEDBACK)
accepted, failed = [], []
# No file may grow beyond the limit: like a full disk, it shortens a write and then fails it.
for number in range(300):
    limit = 100 if number < 2 else 20_000 if number < 150 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    row = {name: [None] for name in files.FEEDBACK.names} | {"reward": [float(number)]}
    try:
        segments.append(row | {"label": ["x" * (number * 37 % 200)]})
    except OSError:
        failed.append(number)
        continue
    accepted.append(number)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
assert failed[:2] == [0, 1] and len(failed) > 10, failed
assert sorted(files.read_feedback(folder)["reward"].to_pylist()) == accepted
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
segments.close()
assert sorted(files.read_feedback(folder)["reward"].to_pylist()) == accepted
assert {path.suffix for path in (folder / "feedback").iterdir()} == {".parquet"}
"""


def test_a_full_disk_loses_no_row_that_was_accepted(tmp_path):
    """A limit on the size of files shortens a write and then fails it, like a full disk."""
    subprocess.run([sys.executable, "-c", _FULL_DISK, tmp_path / "log"], cwd=REPOSITORY, check=True)


def test_rows_lost_to_a_full_disk_are_counted(version, tmp_path, monkeypatch):
    folder = tmp_path / "log"
    log = RequestLog(folder)
    offer(log, version, range(5))
    until(lambda: len(units(folder)) == 5)
    write = os.write

    def fail(descriptor, data):
        write(descriptor, data[:30])
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "write", fail)
    offer(log, version, range(5, 8))
    until(lambda: log.lost_rows == 3)
    monkeypatch.undo()
    offer(log, version, range(8, 10))
    log.close()
    assert log.lost_rows == 3
    assert units(folder) == [0, 1, 2, 3, 4, 8, 9]


def test_a_damaged_stream_is_kept(version, tmp_path, caplog):
    log = RequestLog(tmp_path / "log")
    for start in (0, 5):
        offer(log, version, range(start, start + 5))
        until(lambda: len(units(tmp_path / "log")) == start + 5)  # noqa: B023
    (path,) = (tmp_path / "log" / "requests").iterdir()
    os.truncate(path, path.stat().st_size - 8)
    log.close()
    assert "is damaged: only 5 rows can be read" in caplog.text
    assert list((tmp_path / "log" / "requests").iterdir()) == [path]
    assert units(tmp_path / "log") == [0, 1, 2, 3, 4]


def test_a_suspended_server_appends_to_a_new_file(version, tmp_path):
    """Another server has deleted the file, because it seemed to be a killed server's file."""
    folder = tmp_path / "log"
    log = RequestLog(folder)
    offer(log, version, [0])
    until(lambda: units(folder) == [0])
    (path,) = (folder / "requests").iterdir()
    path.unlink()
    offer(log, version, [1])
    log.close()
    assert log.lost_rows == 0
    assert units(folder) == [1]


def test_only_old_files_of_killed_servers_are_deleted(version, tmp_path):
    """The file that a server has just written is kept, because the server may still append."""
    folder = tmp_path / "log"
    for number in range(2):
        log = RequestLog(folder)
        offer(log, version, [number])
        until(lambda: number in units(folder))  # noqa: B023
    oldest, _ = files.list_files(folder / "requests")
    os.utime(oldest, (time.time() - 10_000,) * 2)
    files.delete_oldest(folder, 0)
    assert units(folder) == [1]


def test_old_files_without_rows_are_deleted(tmp_path):
    folder = tmp_path / "log"
    files.make_folders(folder)
    for name in ("requests/.partial-x1", "feedback/0123456789ab-01234567.arrows"):
        for age in (0, 10_000):
            (folder / name).touch()
            os.utime(folder / name, (time.time() - age,) * 2)
            files.delete_oldest(folder, 10**6)
            assert (folder / name).exists() == (age == 0)


def test_a_failed_conversion_loses_no_row(version, tmp_path, monkeypatch, caplog):
    def fail(table, path):
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "write_table", fail)
    log = RequestLog(tmp_path / "log", max_bytes=100_000, with_images=True)
    offer(log, version, range(100))
    log.close()
    assert log.lost_rows == 0
    assert units(tmp_path / "log") == list(range(100))
    assert "stays an Arrow stream: No space left" in caplog.text


def test_record_never_waits(version, tmp_path, monkeypatch):
    log = RequestLog(tmp_path / "log")
    gate = threading.Event()
    write = log._write
    monkeypatch.setattr(log, "_write", lambda rows: (gate.wait(20), write(rows)))
    fields = {"image_index": 0, "unit": None, "arm": None, "version": version}
    fields |= {"pixels": np.zeros((16, 16, 3), np.uint8)}
    fields |= {"probabilities": np.ones(3, np.float32), "embedding": np.ones(4, np.float32)}
    for _ in range(1_300):
        log.record(request_id=new_request_id(), **fields)
    assert log.lost_rows > 100
    gate.set()
    log.close()
    assert len(read_requests(tmp_path / "log")) + log.lost_rows == 1_300


def test_waiting_images_are_limited_by_their_bytes(version, tmp_path, monkeypatch):
    monkeypatch.setattr("cnn_jax.serve.request_log._MAX_WAITING_BYTES", 10_000)
    log = RequestLog(tmp_path / "log")
    gate = threading.Event()
    write = log._write
    monkeypatch.setattr(log, "_write", lambda rows: (gate.wait(20), write(rows)))
    offer(log, version, range(300))  # Each image has 768 bytes.
    assert log.lost_rows >= 300 - 13
    gate.set()
    until(lambda: len(units(tmp_path / "log")) + log.lost_rows == 300)
    offer(log, version, [300])
    log.close()
    assert 300 in units(tmp_path / "log")


def test_only_the_file_of_a_row_is_read(tmp_path, monkeypatch):
    folder, ids = tmp_path / "log", []
    files.make_folders(folder)
    for _ in range(30):
        segments = files.Segments(folder / "requests", files.REQUESTS)
        ids.append([new_request_id() for _ in range(3)])
        columns = {name: [None] * 3 for name in files.REQUESTS.names}
        columns |= {"request_id": ids[-1], "image_index": [0] * 3, "digest": ["d"] * 3}
        segments.append(columns)
        segments.close()
        time.sleep(0.002)
    read, read_file = [], files.read_file
    monkeypatch.setattr(files, "read_file", lambda *a: read.append(a[0]) or read_file(*a))
    assert files.find_row(folder, ids[0][1], 0) == "d"
    assert files.find_row(folder, ids[17][2], 0) == "d"
    assert files.find_row(folder, ids[0][0], 1) is None
    assert len(read) == 3
    assert files.find_row(folder, "0" * 32, 0) is None
    assert len(read) == 3


def test_deletion_reads_only_feedback_to_its_rows(version, tmp_path, monkeypatch):
    folder = tmp_path / "log"
    for number in range(6):
        log = RequestLog(folder)
        (request_id,) = offer(log, version, [number])
        until(lambda: number in units(folder))  # noqa: B023
        give(log, request_id, reward=number)
        log.close()
    read, read_file = [], files.read_file
    monkeypatch.setattr(files, "read_file", lambda *a: read.append(a[0]) or read_file(*a))
    files.delete_oldest(folder, bytes_of(folder / "requests") - 1)
    assert len(files.list_files(folder / "requests")) == 5
    assert sum(path.parent.name == "feedback" for path in read) == 2  # It is read twice.
    assert sorted(units(folder)) == list(range(6))


def test_feedback_is_read_once_after_a_killed_conversion(version, tmp_path):
    log = RequestLog(tmp_path / "log")
    (request_id,) = offer(log, version, [0])
    until(lambda: units(tmp_path / "log"))
    give(log, request_id, reward=1.0)
    (stream,) = files.list_files(tmp_path / "log" / "feedback")
    pyarrow.parquet.write_table(files.read_file(stream), stream.with_suffix(".parquet"))
    assert read_feedback(tmp_path / "log")["reward"].to_pylist() == [1.0]
    log.close()


def test_an_unreadable_file_does_not_stop_deletion(version, tmp_path, caplog):
    folder = tmp_path / "log"
    for number in range(4):
        log = RequestLog(folder)
        offer(log, version, [number])
        log.close()
    oldest, *_ = files.list_files(folder / "requests")
    oldest.write_bytes(b"damaged")
    files.delete_oldest(folder, 0)
    assert f"{oldest.name} cannot be read" in caplog.text
    assert files.list_files(folder / "requests") == [oldest]


def test_a_damaged_file_of_feedback_stops_deletion(version, tmp_path):
    folder = tmp_path / "log"
    log = RequestLog(folder)
    (request_id,) = offer(log, version, [0])
    until(lambda: units(folder))
    give(log, request_id, reward=1.0)
    log.close()
    before = files.list_files(folder / "requests")
    files.list_files(folder / "feedback")[0].write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read"):
        files.delete_oldest(folder, 0)
    assert files.list_files(folder / "requests") == before


def test_waiting_feedback_is_limited_and_skipped_if_nobody_waits(version, tmp_path, monkeypatch):
    monkeypatch.setattr("cnn_jax.serve.request_log._MAX_FEEDBACK", 6)
    log = RequestLog(tmp_path / "log")
    (request_id,) = offer(log, version, [0])
    until(lambda: units(tmp_path / "log"))
    release, stored = threading.Event(), []

    def store(feedback):
        release.wait()
        stored.append(feedback.reward)

    monkeypatch.setattr(log, "_store", store)

    def send(client, reward):
        feedback = Feedback(request_id=request_id, reward=reward)
        return asyncio.create_task(log.add_feedback(client, feedback))

    async def flood():
        tasks = [send("a", n) for n in range(3)]
        await asyncio.sleep(0.2)
        with pytest.raises(Refused) as refused:
            await send("a", 3)
        assert refused.value.status == 429
        tasks.append(send("b", 4))
        tasks.pop(1).cancel()
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*tasks)

    asyncio.run(flood())
    assert stored == [0, 2, 4]
    log.close()


def test_the_end_does_not_wait_for_a_folder_that_hangs(version, tmp_path, monkeypatch, caplog):
    log = RequestLog(tmp_path / "log")
    release = threading.Event()
    monkeypatch.setattr(log, "_write", lambda rows: release.wait())
    monkeypatch.setattr("cnn_jax.serve.request_log._CLOSE_SECONDS", 0.2)
    offer(log, version, [0])
    assert log.close() is False
    assert "the folder of the request log does not answer" in caplog.text
    release.set()


def test_an_existing_log_is_continued(version, tmp_path):
    for number in range(2):
        log = RequestLog(tmp_path / "log")
        offer(log, version, [number])
        log.close()
    assert units(tmp_path / "log") == [0, 1]


def test_old_files_are_not_read(version, tmp_path):
    for number in range(2):
        log = RequestLog(tmp_path / "log")
        offer(log, version, [number])
        log.close()
    oldest = files.list_files(tmp_path / "log" / "requests")[0]
    now = time.time()
    os.utime(oldest, (now - 100, now - 100))
    found = read_requests(tmp_path / "log", ["unit"], since=now - 50)
    assert found["unit"].to_pylist() == ["1"]


def test_a_file_without_a_newer_column_is_read(tmp_path):
    """The column is null, in a stream as in a Parquet file."""
    files.make_folders(tmp_path / "log")
    schema = files.REQUESTS.remove(files.REQUESTS.get_field_index("contrast"))
    segments = files.Segments(tmp_path / "log" / "requests", schema)
    segments.append({name: [None] for name in schema.names} | {"unit": ["a"]})
    for _ in range(2):
        rows = read_requests(tmp_path / "log", ["unit", "contrast"])
        assert rows.to_pylist() == [{"unit": "a", "contrast": None}]
        segments.close()


def test_a_later_version_of_the_columns_is_refused(version, tmp_path):
    log = RequestLog(tmp_path / "log")
    offer(log, version, [0])
    log.close()
    (path,) = (tmp_path / "log" / "requests").iterdir()
    table = pa.parquet.read_table(path).replace_schema_metadata({"cnn_jax_request_log": "2"})
    pa.parquet.write_table(table, path)
    with pytest.raises(DataError, match="version 2 of the request log's columns"):
        read_requests(tmp_path / "log")
    table = table.replace_schema_metadata({"cnn_jax_request_log": "none"})
    pa.parquet.write_table(table, path)
    with pytest.raises(DataError, match="version none of the request log's columns"):
        read_requests(tmp_path / "log")


def test_a_folder_that_is_no_log_is_an_error(tmp_path):
    (tmp_path / "requests.db").write_text("a file")
    with pytest.raises(ConfigError, match="--request_log: cannot use"):
        RequestLog(tmp_path / "requests.db")
    assert (tmp_path / "requests.db").read_text() == "a file"
    with pytest.raises(ConfigError, match="--request_log: cannot use"):
        RequestLog(tmp_path / "none" / "log")
    with pytest.raises(DataError, match="is not a request log"):
        read_requests(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        class_names(tmp_path, json.dumps("x"))
