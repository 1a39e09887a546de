import dataclasses
import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from cnn_jax.data import dataset as datasets
from cnn_jax.data import row_cache, scan
from cnn_jax.data.dataset import check_classes, check_trainable, choose_residency, open_dataset
from cnn_jax.data.files import open_csv, open_folder
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.splits import Division
from cnn_jax.system.errors import DataError

PREPROCESSING = Preprocessing(image_size=(12, 16))
RESIDENCIES = ("none", "disk", "memory", "device")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with 60 images of three classes, and an empty cache."""
    monkeypatch.setenv("CNN_JAX_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "images", per_class=20)
    return tmp_path / "images"


def _open(folder, **options):
    return open_dataset(open_folder(folder), Division(), PREPROCESSING, **options)


def _all_images(dataset):
    loader = dataclasses.replace(dataset.loader, on_device=False)
    return loader.load(np.arange(len(dataset.source)))["image"]


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_the_pixels_are_the_same_wherever_they_are(folder, residency):
    expected = _all_images(_open(folder))
    for _ in range(2):  # In the second round, the pixels come from the cache.
        dataset = _open(folder, residency=residency)
        assert dataset.residency == residency
        assert (dataset.loader.pixels is None) == (residency == "none")
        assert isinstance(dataset.loader.pixels, np.ndarray) == (residency == "memory")
        assert dataset.loader.on_device == (residency == "device")
        np.testing.assert_array_equal(_all_images(dataset), expected)


def test_a_file_that_cannot_be_read_does_not_spoil_the_cache(folder, monkeypatch):
    with (folder / "red" / "huge.jpg").open("wb") as file:
        file.truncate(10**10)
    _open(folder, residency="disk", max_unreadable=0.1)
    monkeypatch.setattr(datasets.scan.decode, "load", lambda *a: pytest.fail("decoded again"))
    monkeypatch.setattr(datasets.scan.decode, "resize", lambda *a: pytest.fail("decoded again"))
    assert _open(folder, residency="disk", max_unreadable=0.1).residency == "disk"


def test_a_disk_that_would_be_filled_is_left_alone(folder, monkeypatch, caplog):
    monkeypatch.setattr(datasets.cache, "free_bytes", lambda: 2 * 34_560 - 1)
    assert _open(folder, residency="memory").residency == "memory"
    assert "they would take more than half of the free space" in caplog.text
    # If the user chooses residency="disk" explicitly, the pixels are stored on disk without a
    # warning.
    caplog.clear()
    assert _open(folder, residency="disk").residency == "disk"
    assert not caplog.text


def test_a_container_may_have_less_memory_than_the_machine(tmp_path, monkeypatch):
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for text, expected in (("1000\n", 1000), ("max\n", installed)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(datasets, "_CONTAINER_LIMIT", tmp_path / "limit")
        assert datasets.memory_bytes() == expected
    monkeypatch.setattr(datasets, "_CONTAINER_LIMIT", tmp_path / "none")
    assert datasets.memory_bytes() == installed


def test_images_are_decoded_once(folder, monkeypatch):
    _open(folder, residency="disk")
    monkeypatch.setattr(datasets.scan.decode, "decode", lambda *a: pytest.fail("decoded again"))
    _open(folder, residency="disk")
    _open(folder, residency="memory")


def test_a_changed_image_is_decoded_again(folder):
    before = _all_images(_open(folder, residency="disk"))
    Image.new("RGB", (9, 9), "white").save(folder / "blue" / "000.png")
    after = _all_images(_open(folder, residency="disk"))
    assert (after[0] == 255).all()
    np.testing.assert_array_equal(after[1:], before[1:])


@pytest.fixture
def decoded(monkeypatch):
    """A list that gets an element whenever an image is decoded."""
    calls = []
    for name in ("decode", "decode_with_header"):
        original = getattr(datasets.scan.decode, name)
        wrapper = lambda *a, original=original: calls.append(a) or original(*a)  # noqa: E731
        monkeypatch.setattr(datasets.scan.decode, name, wrapper)
    return calls


def _cached_files(folder):
    return {path: path.stat().st_size for path in (folder.parent / "cache").rglob("*.rows")}


@pytest.mark.parametrize("residency", ["disk", "memory", "device"])
def test_only_new_images_are_decoded_and_written(folder, decoded, monkeypatch, residency):
    _open(folder, residency=residency)
    assert len(decoded) == 60
    old = _cached_files(folder)
    removed = (folder / "green" / "003.png").read_bytes()
    (folder / "green" / "003.png").unlink()
    assert len(_open(folder, residency=residency).source) == 59
    assert len(decoded) == 60
    Image.new("RGB", (9, 9), "white").save(folder / "blue" / "0.png")
    Image.new("RGB", (9, 9), "black").save(folder / "red" / "005.png")
    dataset = _open(folder, residency=residency)
    assert len(decoded) == 62
    assert [size for path, size in _cached_files(folder).items() if path not in old] == [2 * 596]
    (folder / "green" / "003.png").write_bytes(removed)
    again = _open(folder, residency=residency)
    assert len(decoded) == 63  # A record is computed for each file with a new time.
    assert len(_cached_files(folder)) == 2

    monkeypatch.setenv("CNN_JAX_CACHE", str(folder.parent / "fresh"))
    fresh = _open(folder, residency=residency)
    assert again.fingerprint == fresh.fingerprint
    np.testing.assert_array_equal(_all_images(again), _all_images(fresh))
    np.testing.assert_array_equal(np.asarray(again.loader.pixels), _all_images(fresh))
    (folder / "green" / "003.png").unlink()
    np.testing.assert_array_equal(
        _all_images(_open(folder, residency=residency)), _all_images(dataset)
    )


@pytest.mark.parametrize("residency", ["disk", "memory", "device"])
def test_a_damaged_file_of_the_cache_changes_no_image(folder, decoded, caplog, residency):
    expected = _all_images(_open(folder, residency=residency))
    ((path, _),) = _cached_files(folder).items()
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        np.testing.assert_array_equal(_all_images(_open(folder, residency=residency)), expected)
    assert len(decoded) == 60 + 1 + 60
    assert caplog.text.count("is damaged") == 1


def test_an_untouched_copy_of_a_folder_shares_its_pixels(folder, tmp_path):
    import shutil

    _open(folder, residency="disk")
    shutil.copytree(folder, tmp_path / "copy")
    _open(tmp_path / "copy", residency="disk")
    assert len(list((tmp_path / "cache" / "pixels").iterdir())) == 1


# Opens a folder with the segments of the cache and the intervals of the scan as small as possible,
# and is killed when 40 images have been read.
_KILLED = """
import os, pathlib, signal, sys
from cnn_jax.data import row_cache, scan
from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.files import open_folder
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.splits import Division
row_cache._SEGMENT_BYTES = 5 * 596
scan._SECONDS_UNTIL_STORED = 0
scan.time.monotonic = lambda: 0  # The next interval depends on the time that storing took.
scan._chunks = lambda rows, size: [[row] for row in rows]

def track(items, *_):
    for number, item in enumerate(items):
        if number == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

preprocessing = Preprocessing(image_size=(12, 16))
listing = open_folder(pathlib.Path(sys.argv[1]))
open_dataset(listing, Division(), preprocessing, residency="disk", track=track)
"""


def test_a_killed_scan_keeps_what_it_decoded(folder, decoded):
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(folder)])
    assert killed.returncode == -signal.SIGKILL
    dataset = _open(folder, residency="disk")
    assert len(decoded) == 20  # The records and the pixels of 40 images were stored.
    np.testing.assert_array_equal(_all_images(dataset), _all_images(_open(folder)))


def test_a_disk_that_becomes_full_during_the_scan_keeps_the_records(folder, decoded, monkeypatch):
    reserve, count = os.posix_fallocate, 0

    def no_space(*arguments):
        nonlocal count
        count += 1
        if count > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    monkeypatch.setattr(row_cache, "_SEGMENT_BYTES", 5 * 596)
    monkeypatch.setattr(scan, "_chunks", lambda rows, size: [[row] for row in rows])
    assert _open(folder, residency="disk").residency == "none"
    # The images before the full disk were examined once, and so were the others.
    assert len(decoded) == 60


@pytest.mark.parametrize(("residency", "then"), [("disk", "none"), ("memory", "memory")])
def test_a_full_disk_is_only_a_warning(folder, monkeypatch, caplog, residency, then):
    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = _all_images(_open(folder))
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    dataset = _open(folder, residency=residency)
    assert dataset.residency == then
    assert "No space left on device; cnn_jax cache --clear" in caplog.text
    np.testing.assert_array_equal(_all_images(dataset), expected)


def test_unreadable_images_are_left_out_and_listed(folder):
    whole = _all_images(_open(folder))
    (folder / "green" / "007.png").write_bytes(b"")
    (folder / "red" / "new.jpg").write_text("no image")
    for residency in RESIDENCIES:
        dataset = _open(folder, max_unreadable=0.04, residency=residency)
        assert [(u.id, u.reason) for u in dataset.findings.unreadable] == [
            ("green/007.png", "is empty"),
            ("red/new.jpg", "is not an image of a known format"),
        ]
        assert len(dataset.source) == 59
        np.testing.assert_array_equal(_all_images(dataset), np.delete(whole, 27, axis=0))
        assert sorted(np.concatenate(list(dataset.splits.values()))) == list(range(59))


def test_too_many_unreadable_images_are_refused(folder):
    for i in range(2):
        (folder / "green" / f"00{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    _open(folder, max_unreadable=2 / 60)
    with pytest.raises(DataError, match=r"2 of 60 images cannot be read, more than data.max_unrea"):
        _open(folder, max_unreadable=0.033)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match="60 of 60 images"):
        _open(folder, max_unreadable=1.0)


def test_a_class_of_which_nothing_is_readable_is_no_class(folder):
    for path in (folder / "green").iterdir():
        path.write_bytes(b"x")
    dataset = _open(folder, max_unreadable=0.5, residency="memory")
    assert dataset.source.class_names == ["blue", "red"]
    assert np.bincount(dataset.source.labels).tolist() == [20, 20]
    assert "green: no readable images" in dataset.findings.warnings()[0]


def test_the_fingerprint_changes_with_identity_class_and_content(folder):
    def fingerprint():
        return _open(folder).fingerprint

    before = fingerprint()
    path = folder / "blue" / "000.png"
    content = path.read_bytes()
    path.write_bytes(content + b"x")  # Pillow ignores trailing bytes, so the pixels do not change.
    assert fingerprint() != before
    path.write_bytes(content)
    assert fingerprint() == before
    path.rename(folder / "red" / "999.png")
    assert fingerprint() != before


def test_the_fingerprint_changes_with_the_division(folder):
    listing = open_folder(folder)
    divisions = [Division(), Division(rule="exact"), Division(seed=1)]
    prints = {open_dataset(listing, each, PREPROCESSING).fingerprint for each in divisions}
    assert len(prints) == 3


def test_images_that_changed_places_are_seen_to_have_changed(folder):
    """The fingerprint changes if two files of equal size and modification time swap their names."""
    first, second = folder / "blue" / "000.png", folder / "blue" / "001.png"
    second.write_bytes(first.read_bytes()[:-1] + b"?")
    for path in (first, second):
        os.utime(path, (1, 1))
    before = _open(folder, residency="disk").fingerprint
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    assert _open(folder, residency="disk").fingerprint != before


def test_equal_images_stay_in_one_split(folder):
    for i in range(20):
        content = (folder / "blue" / f"{i:03d}.png").read_bytes()
        (folder / "blue" / f"{i:03d} (2).png").write_bytes(content)
    dataset = _open(folder)
    assert len(dataset.findings.copies) == 20
    assert dataset.findings.leaks == []


def test_groups_stay_in_one_split(folder):
    division = Division(group="{class}/{tens}")
    for path in sorted(folder.rglob("*.png")):
        path.rename(path.with_name(f"{int(path.stem) // 4}_{path.stem}.png"))
    dataset = open_dataset(open_folder(folder), division, PREPROCESSING)
    tracks = [example_id.split("_")[0] for example_id in dataset.source.ids]
    splits = [{tracks[i] for i in indices} for indices in dataset.splits.values()]
    assert all(splits)
    assert sum(map(len, splits)) == len(set.union(*splits)) == 15


def test_a_pattern_describes_the_path_within_the_folder_of_a_split(folder, tmp_path):
    for split, kept in (("train", range(16)), ("val", range(16, 20))):
        for path in sorted(folder.rglob("*.png")):
            if (frame := int(path.stem)) in kept:
                place = tmp_path / split / path.parent.name / f"{frame // 2}_{frame}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                path.rename(place)
    dataset = open_dataset(open_folder(tmp_path), Division(group="{class}/{track}"), PREPROCESSING)
    tracks = [example_id.split("_")[0] for example_id in dataset.source.ids]
    splits = {name: {tracks[i] for i in rows} for name, rows in dataset.splits.items()}
    assert len(splits["validation"]) == 6
    assert all(name.startswith("val/") for name in splits["validation"])
    # The folder has no test split, so whole tracks (groups of images) of the training split are
    # moved to a new test split.
    assert 3 <= len(splits["test"]) <= 12
    assert len(splits["test"] | splits["train"]) == len(splits["test"]) + len(splits["train"]) == 24


def test_own_splits_are_kept_or_not(folder, tmp_path):
    rows = [
        f"{path.relative_to(folder)},{path.parent.name},{'test' if int(path.stem) < 4 else 'train'}"
        for path in sorted(folder.rglob("*.png"))
    ]
    table = folder / "t.csv"
    table.write_text("\n".join(["path,label,split", *rows]))
    kept = open_dataset(open_csv(table), Division(), PREPROCESSING)
    assert [int(kept.source.ids[i][-7:-4]) for i in kept.splits["test"]] == [0, 1, 2, 3] * 3
    assert 3 <= len(kept.splits["validation"]) <= 20
    anew = open_dataset(open_csv(table), Division(keep_splits=False), PREPROCESSING)
    assert list(anew.splits["test"]) != list(kept.splits["test"])


def test_what_cannot_be_trained_on_is_explained(folder, tmp_path):
    for name in ("green", "red"):
        for path in (folder / name).iterdir():
            path.unlink()
    with pytest.raises(DataError, match="there is one class, blue"):
        check_trainable(_open(folder))
    write_images(tmp_path / "few", per_class=2)
    with pytest.raises(DataError, match=r"no image is left for \w+; each class needs three"):
        check_trainable(_open(tmp_path / "few"))


def test_what_can_be_refused_before_the_scan_is(folder, monkeypatch):
    monkeypatch.setattr(datasets.scan, "scan", lambda *a: pytest.fail("it was scanned"))
    with pytest.raises(DataError, match="does not describe"):
        open_dataset(open_folder(folder), Division(group="{class}/x{n}"), PREPROCESSING)
    with pytest.raises(DataError, match="there is one class"):
        check_classes(open_folder(folder).select(np.arange(20)).without_empty_classes())


def test_where_pixels_live_depends_on_what_fits(folder, monkeypatch):
    listing = open_folder(folder)  # The 60 images of 576 bytes take 34,560 bytes.

    def choose(requested="auto", *, device=0, memory=10**6, disk=10**6):
        monkeypatch.setattr(datasets, "memory_bytes", lambda: memory)
        monkeypatch.setattr(datasets.cache, "free_bytes", lambda: disk)
        return choose_residency(requested, listing, PREPROCESSING, device)

    assert choose(device=4 * 34_560) == "device"
    assert choose(device=4 * 34_560 - 1) == "memory"
    assert choose(memory=4 * 34_560 - 1) == "disk"
    assert choose(memory=0, disk=2 * 34_560 - 1) == "none"
    for residency in RESIDENCIES:
        assert choose(residency) == residency
    _open(folder, residency="disk")
    assert choose(memory=0, disk=0) == "disk"  # All images are in the cache already.
    for path in _cached_files(folder):
        os.truncate(path, 34_000)
    assert choose(memory=0, disk=2 * 560) == "disk"
    assert choose(memory=0, disk=2 * 560 - 1) == "none"
