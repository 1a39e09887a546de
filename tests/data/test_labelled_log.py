import dataclasses
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from request_logs import NAMES, request_id, write_images_to_log, write_labels

from cnn_jax.data import labelled_log
from cnn_jax.data.files import _IN_WORDS
from cnn_jax.data.labelled_log import (
    KnownImage,
    open_log,
    read_examples,
    read_known,
    read_snapshot,
    write_known,
    write_snapshot,
)
from cnn_jax.data.request_log import read_valid_feedback
from cnn_jax.system.errors import DataError


def _pixels(number, size=16):
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)


@pytest.fixture
def log(tmp_path):
    """A request log with four images, of which three have labels."""
    write_images_to_log(tmp_path / "log", {i: _pixels(i) for i in range(4)})
    write_labels(tmp_path / "log", {0: "red", 1: "blue"}, when=20)
    write_labels(tmp_path / "log", {3: "green"}, when=10)
    return tmp_path / "log"


def _names(examples):
    numbers = {f"{request_id(i)}/0": i for i in range(20)}
    return dict(zip((numbers[r] for r in examples.requests), examples.labels, strict=True))


def test_labelled_images_are_examples_in_the_order_of_their_labels(log):
    examples = read_examples([log], NAMES)
    assert list(_names(examples).items()) == [(3, "green"), (0, "red"), (1, "blue")]
    assert not examples.left_out
    source = open_log([log], NAMES)
    assert source.ids[0] == f"log/{request_id(3)}/0"
    np.testing.assert_array_equal(source.labels, [1, 2, 0])
    assert source.read(source.keys[1]) == examples.images[1]


def test_the_latest_label_is_used_and_the_first_decides_the_order(log):
    write_labels(log, {3: "blue"}, when=30)
    write_labels(log, {3: "red"}, when=25)  # An older label that was written later.
    write_labels(log, {0: None}, when=31)  # A reward is no label.
    assert list(_names(read_examples([log], NAMES)).items()) == [
        (3, "blue"),
        (0, "red"),
        (1, "blue"),
    ]


def test_the_valid_feedback_does_not_depend_on_the_order_of_files(log, tmp_path):
    """All commands read labels and rewards with this function."""
    write_labels(log, {0: "green", 1: None}, when=5)
    write_images_to_log(tmp_path / "other", {})
    write_labels(tmp_path / "other", {0: "blue", 1: "red"}, when=20)  # Two labels of one time.
    key = request_id(0), 0
    for folders in ([log, tmp_path / "other"], [tmp_path / "other", log]):
        labels = read_valid_feedback(folders, "label")
        assert labels[key] == ("red", 20.0, 5.0)
        assert labels[request_id(1), 0] == ("red", 20.0, 20.0)
        assert read_valid_feedback(folders, "reward")[request_id(1), 0] == (1.0, 20.0, 5.0)


def test_equal_images_are_one_example_with_the_latest_label(log, tmp_path):
    write_images_to_log(tmp_path / "replica", {5: _pixels(0), 6: _pixels(1)})
    write_labels(tmp_path / "replica", {5: "green", 6: "blue"}, when=40)
    for logs in ([log, tmp_path / "replica"], [tmp_path / "replica", log]):
        examples = read_examples(logs, NAMES)
        assert _names(examples) == {3: "green", 0: "green", 1: "blue"}
        assert examples.left_out == {labelled_log.LOGGED_TWICE: 2}
        assert examples.conflicts == 1
    assert "1 images of the request log have several labels" in open_log(logs, NAMES).remarks[0]
    # A copy of a log changes nothing.
    assert read_examples([log, log], NAMES).digest == read_examples([log], NAMES).digest


def test_images_that_are_no_examples_are_counted(log):
    write_images_to_log(log, {10: None, 11: b"no image", 12: _pixels(12)})
    write_images_to_log(log, {13: _pixels(13)}, class_names=("cat", "dog"), digest="e" * 64)
    write_labels(log, {10: "red", 11: "red", 12: "pink", 13: "dog", 14: "red"}, when=50)
    examples = read_examples([log], NAMES)
    assert examples.left_out == {
        labelled_log.NO_IMAGE: 1,
        labelled_log.DAMAGED: 1,
        labelled_log.OTHER_MODEL: 1,
        labelled_log.NO_REQUEST: 1,
    }
    assert _names(examples)[12] == "pink"
    assert (
        len(_IN_WORDS.keys() & {v for v in vars(labelled_log).values() if isinstance(v, str)}) == 5
    )
    assert open_log([log], NAMES).labels[-1] == -1


def test_the_log_of_another_model_is_refused(tmp_path):
    write_images_to_log(tmp_path / "log", {0: _pixels(0)}, class_names=("cat", "red"))
    write_labels(tmp_path / "log", {0: "red"}, when=1)
    with pytest.raises(DataError, match=r"log is the request log of another model: .* 'cat'; name"):
        read_examples([tmp_path / "log"], NAMES)


def test_examples_can_be_limited_to_one_model(log):
    write_images_to_log(log, {10: _pixels(10), 11: None}, model="other")
    write_labels(log, {10: "red", 11: "red"}, when=50)
    assert len(read_examples([log], NAMES)) == 4
    examples = read_examples([log], NAMES, model="default")
    assert len(examples) == 3
    assert not examples.left_out
    assert _names(read_examples([log], NAMES, model="other")) == {10: "red"}


def test_a_log_without_labels_has_no_examples(tmp_path):
    write_images_to_log(tmp_path / "log", {0: _pixels(0)})
    assert len(read_examples([tmp_path / "log"], NAMES)) == 0
    assert len(open_log([tmp_path / "log"], NAMES)) == 0
    assert len(read_examples([], NAMES)) == 0


def test_a_folder_that_is_no_log_is_refused(tmp_path):
    with pytest.raises(DataError, match="is neither a request log nor a complete snapshot"):
        open_log([tmp_path], NAMES)


def test_a_snapshot_holds_the_examples_and_has_the_same_bytes(log, tmp_path):
    examples = read_examples([log], NAMES)
    for name in ("one", "two"):
        write_snapshot(examples, tmp_path / name)
    one, two = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert one[0].read_bytes() == two[0].read_bytes()
    read = read_snapshot(tmp_path / "one")
    assert read.digest == examples.digest
    assert read.images == examples.images
    assert (tmp_path / "one").stat().st_mode & 0o77 == 0
    assert open_log([tmp_path / "one"], NAMES).ids == open_log([log], NAMES).ids
    empty = read_examples([], NAMES)
    write_snapshot(empty, tmp_path / "empty")
    assert len(open_log([tmp_path / "empty"], NAMES)) == 0


def test_examples_without_an_image_have_all_others(log):
    examples = read_examples([log], NAMES)
    others = examples.without({examples.requests[1]})
    assert others.requests == examples.requests[:1] + examples.requests[2:]
    assert others.images == examples.images[:1] + examples.images[2:]


def test_known_images_are_read_as_written(tmp_path):
    images = {
        "b" * 32: KnownImage("test", "a\tb", is_logged=True),
        "a" * 32: KnownImage("train", "\udcff", is_logged=False),
    }
    assert read_known(tmp_path) is None
    write_known(images, tmp_path)
    assert read_known(tmp_path) == images
    before = (tmp_path / "splits.parquet").read_bytes()
    write_known(dict(reversed(images.items())), tmp_path)
    assert (tmp_path / "splits.parquet").read_bytes() == before
    (tmp_path / "splits.parquet").write_bytes(before[:-9])
    with pytest.raises(DataError, match=r"splits\.parquet cannot be read"):
        read_known(tmp_path)


def test_the_digest_depends_on_labels_and_pixels_only(log):
    digest = read_examples([log], NAMES).digest
    write_labels(log, {0: "red"}, when=90)  # The same label again.
    write_images_to_log(log, {12: _pixels(12)})  # An image without a label.
    assert read_examples([log], NAMES).digest == digest
    write_labels(log, {0: "blue"}, when=91)
    assert read_examples([log], NAMES).digest != digest


def test_earlier_examples_stay_and_new_ones_follow(log, tmp_path):
    earlier = read_examples([log], NAMES)
    write_snapshot(earlier, tmp_path / "snapshot")
    # The labels in this log are older than all others.
    write_images_to_log(tmp_path / "late", {8: _pixels(8), 9: _pixels(1)})
    write_labels(tmp_path / "late", {8: "red", 9: "green"}, when=1)
    both = read_examples([tmp_path / "late"], NAMES, previous=earlier)
    assert both.requests[:3] == earlier.requests
    assert list(_names(both).items()) == [(3, "green"), (0, "red"), (1, "green"), (8, "red")]
    source = open_log([tmp_path / "late", tmp_path / "snapshot"], NAMES)
    assert source.ids == [f"log/{request}" for request in both.requests]
    write_snapshot(both, tmp_path / "second")
    with pytest.raises(DataError, match="second is a second snapshot; name only the latest one"):
        open_log([tmp_path / "snapshot", tmp_path / "second"], NAMES)


@pytest.mark.parametrize("content", [b"", b"PAR1 damaged PAR1"])
def test_a_damaged_snapshot_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "examples.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"examples\.parquet cannot be read"):
        open_log([tmp_path], NAMES)


def test_a_later_version_of_a_snapshot_is_refused(log, tmp_path, monkeypatch):
    schema = labelled_log._SCHEMA.with_metadata({b"cnn_jax_examples": b"3"})
    monkeypatch.setattr(labelled_log, "_SCHEMA", schema)
    write_snapshot(read_examples([log], NAMES), tmp_path / "later")
    with pytest.raises(DataError, match="is not a snapshot that this version of cnn_jax reads"):
        read_snapshot(tmp_path / "later")


_KILLED = """
import os, pathlib, signal, sys
import pyarrow.parquet
from cnn_jax.data.labelled_log import read_examples, write_snapshot
log, folder, moment = sys.argv[1:]
examples = read_examples([log], ("blue", "green", "red"))
def die(*arguments, **options): os.kill(os.getpid(), signal.SIGKILL)
write = pyarrow.parquet.write_table
def write_and_die(table, file, **options):
    write(table, file, **options)
    file.flush()
    die()
if moment == "write":
    pyarrow.parquet.write_table = write_and_die
else:
    pathlib.Path.replace = die
write_snapshot(examples, pathlib.Path(folder))
"""


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_killed_writer_leaves_no_partial_snapshot(log, tmp_path, moment):
    folder = tmp_path / "snapshot"
    command = [sys.executable, "-c", _KILLED, str(log), str(folder), moment]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert list(folder.iterdir())  # The writer was killed after it had begun.
    assert read_snapshot(folder) is None
    write_snapshot(read_examples([log], NAMES), folder)
    (file,) = folder.iterdir()
    write_snapshot(read_examples([log], NAMES), tmp_path / "other")
    assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5), st.sampled_from(NAMES))),
    st.integers(0, 8),
    st.randoms(use_true_random=False),
)
def test_later_labels_append_examples_in_any_order_of_logs(events, cut, random):
    # Each event is (image, content, label): request `image` of content `content` gets a label.
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        folders = [pathlib.Path(directory) / name for name in ("one", "two")]
        for number, folder in enumerate(folders):
            images = {i: _pixels(i % 5) for i in range(8) if i % 2 == number}
            write_images_to_log(folder, images)
        before = None
        for when, (image, _, label) in enumerate(events):
            if when == cut:
                before = read_examples(folders, NAMES)
            write_labels(folders[image % 2], {image: label}, when=when)
        random.shuffle(folders)
        after = read_examples(folders, NAMES)
        assert after.digest == read_examples(folders[::-1], NAMES).digest
        if before is not None:
            assert after.requests[: len(before)] == before.requests
            assert after.digests[: len(before)] == before.digests


def test_examples_are_compared_by_pixels_and_not_by_bytes(log):
    examples = read_examples([log], NAMES)
    other = dataclasses.replace(examples, images=[b""] * len(examples))
    assert other.digest == examples.digest
