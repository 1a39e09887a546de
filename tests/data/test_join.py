import dataclasses
import pathlib

import numpy as np
import pytest
from conftest import write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from request_logs import NAMES, request_id, write_images_to_log, write_labels

from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.decode import load
from cnn_jax.data.duplicates import THUMBNAIL_VALUES, Looks
from cnn_jax.data.join import KNOWN_COPY, NEW_CLASS, OTHER_SIZE, divide_log
from cnn_jax.data.labelled_log import read_examples, write_snapshot
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.sources import absolute, listed_folder, open_source
from cnn_jax.data.splits import SPLITS, Division
from cnn_jax.data.survey import survey
from cnn_jax.system.errors import ConfigError, DataError

PREPROCESSING = Preprocessing(image_size=(16, 16))


def _pixels(number, size=16):
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)


def _photo(number):
    """Returns an image with so much structure that noise of one level gives a near duplicate."""
    noise = np.random.default_rng(number).integers(0, 256, (10, 10, 3), np.uint8)
    return np.array(Image.fromarray(noise).resize((16, 16), Image.Resampling.BICUBIC))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with 60 images of three classes, and an empty cache."""
    monkeypatch.setenv("CNN_JAX_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "images", per_class=20)
    return tmp_path / "images"


@pytest.fixture
def log(tmp_path):
    """A request log with 40 labelled images."""
    write_images_to_log(tmp_path / "log", {i: _pixels(i) for i in range(40)})
    write_labels(tmp_path / "log", {i: NAMES[i % 3] for i in range(40)}, when=1)
    return tmp_path / "log"


def _open(source, division=None, preprocessing=PREPROCESSING, **options):
    return open_dataset(open_source(source), division or Division(), preprocessing, **options)


def _splits(dataset):
    """Returns the split of each example by its id."""
    return {dataset.source.ids[i]: name for name in SPLITS for i in dataset.splits[name]}


@pytest.mark.parametrize(
    "division",
    [
        Division(),
        Division(rule="exact", seed=3),
        Division(folds=4, fold=2),
        Division(group="{class}/{number}"),
    ],
)
def test_the_data_is_divided_as_without_the_log(folder, log, division):
    before, after = (
        _open(name, division) for name in (f"folder:{folder}", f"folder:{folder}+log:{log}")
    )
    assert len(after.source) == 100
    assert {i: s for i, s in _splits(after).items() if not i.startswith("log/")} == _splits(before)
    assert set(_splits(after).values()) == set(SPLITS)
    np.testing.assert_array_equal(after.source.labels[60:], np.arange(40) % 3)
    assert after.source.name == f"folder:{folder}+log:{log}"
    assert after.fingerprint != before.fingerprint
    assert not after.findings.warnings() or "fraction" in after.findings.warnings()[0]


@pytest.mark.parametrize("residency", ["none", "disk", "memory", "device"])
def test_pixels_of_the_log_follow_those_of_the_data(folder, log, residency):
    # The crop would cut the border of an image off; logged images were cropped by the server.
    preprocessing = dataclasses.replace(PREPROCESSING, resize="crop", crop_ratio=0.8)
    (folder / "red" / "broken.png").write_bytes(b"")
    dataset = _open(
        f"folder:{folder}+log:{log}", None, preprocessing, residency=residency, max_unreadable=0.1
    )
    assert dataset.residency == residency
    loader = dataclasses.replace(dataset.loader, on_device=False)
    images = loader.load(np.arange(99, -1, -1))["image"][::-1]
    encoded = (folder / dataset.source.ids[59]).read_bytes()
    np.testing.assert_array_equal(images[59], load(encoded, preprocessing))
    for i in range(40):
        np.testing.assert_array_equal(images[60 + i], _pixels(i))
    np.testing.assert_array_equal(loader.load(np.array([3]))["image"], images[3:4])


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_copies_of_images_of_the_data_are_left_out(folder, tmp_path, resize):
    preprocessing = dataclasses.replace(PREPROCESSING, resize=resize)
    served = {
        i: load((folder / "red" / f"{i:03d}.png").read_bytes(), preprocessing) for i in range(20)
    }
    write_images_to_log(tmp_path / "log", {**served, 30: _pixels(30)})
    write_labels(tmp_path / "log", dict.fromkeys((*served, 30), "red"), when=1)
    write_labels(tmp_path / "log", {7: "blue"}, when=2)
    dataset = _open(f"folder:{folder}+log:{tmp_path / 'log'}", None, preprocessing)
    assert dataset.source.ids[60:] == [f"log/{request_id(30)}/0"]
    assert dataset.source.ignored == {KNOWN_COPY: 20}
    (remark,) = dataset.findings.remarks
    assert f"log/{request_id(7)}/0 of red/007.png: the class in the data is used" in remark
    assert "ignored: 20 copies of images of the data" in dataset.findings.summary()[1]


def test_near_duplicates_take_the_split_of_the_earlier_image(folder, tmp_path):
    rng = np.random.default_rng(0)

    def alike(number):
        noise = rng.integers(-1, 2, (16, 16, 3))
        return np.clip(_photo(number).astype(int) + noise, 0, 255).astype(np.uint8)

    for number in range(10):
        Image.fromarray(_photo(number)).save(folder / "red" / f"photo{number}.png")
    images = {10 * number + i: alike(number) for number in range(20) for i in range(5)}
    write_images_to_log(tmp_path / "log", images)
    write_labels(tmp_path / "log", dict.fromkeys(images, "red"), when=1)
    splits = _splits(_open(f"folder:{folder}+log:{tmp_path / 'log'}"))
    found = []
    for number in range(20):
        own = {splits[f"log/{request_id(10 * number + i)}/0"] for i in range(5)}
        assert len(own) == 1
        if number < 10:
            assert own == {splits[f"red/photo{number}.png"]}
        found += own
    assert set(found[10:]) != {"train"}


def test_classes_that_the_data_lacks_are_left_out_and_move_nothing(folder, tmp_path):
    write_images_to_log(tmp_path / "log", {i: _photo(i) for i in range(6)})
    labels = {0: "red", 1: "pink", 2: "blue"}
    write_labels(tmp_path / "log", labels, when=1)
    source = f"folder:{folder}+log:{tmp_path / 'log'}"
    dataset = _open(source)
    assert [i.split("/")[1] for i in dataset.source.ids[60:]] == [request_id(0), request_id(2)]
    assert dataset.source.ignored == {NEW_CLASS: 1}
    summary = " ".join(dataset.findings.summary())
    assert "ignored: 1 logged image of a class that the data lacks" in summary
    before = _splits(dataset)
    write_labels(tmp_path / "log", {0: "pink"}, when=2)
    assert _splits(_open(source)).items() <= before.items()


def test_images_of_another_size_are_left_out_or_refused(folder, log, tmp_path):
    write_images_to_log(log, {50: _pixels(50, size=20)})
    write_labels(log, {50: "red"}, when=3)
    dataset = _open(f"folder:{folder}+log:{log}")
    assert len(dataset.source) == 100
    assert dataset.source.ignored == {OTHER_SIZE: 1}
    larger = Preprocessing(image_size=(24, 32))
    with pytest.raises(DataError, match=r"logged images are 16 x 16 pixels, and .* 32 x 24 pixels"):
        _open(f"folder:{folder}+log:{log}", None, larger)


def test_an_empty_log_adds_nothing(folder, tmp_path):
    write_images_to_log(tmp_path / "log", {0: _pixels(0)})
    before, after = _open(f"folder:{folder}"), _open(f"folder:{folder}+log:{tmp_path / 'log'}")
    assert after.fingerprint == before.fingerprint
    survey(open_source(f"folder:{folder}+log:{tmp_path / 'log'}"), Division())


def test_a_snapshot_is_the_same_data_as_its_log(folder, log, tmp_path):
    write_snapshot(read_examples([log], NAMES), tmp_path / "snapshot")
    live = _open(f"folder:{folder}+log:{log}")
    assert _open(f"folder:{folder}+log:{tmp_path / 'snapshot'}").fingerprint == live.fingerprint
    # Servers append to the log, and the snapshot stays.
    write_labels(log, {0: "red"}, when=9)
    write_labels(log, {0: "blue"}, when=10)
    write_labels(log, {1: "red"}, when=10)
    assert _open(f"folder:{folder}+log:{log}").fingerprint != live.fingerprint
    assert _open(f"folder:{folder}+log:{tmp_path / 'snapshot'}").fingerprint == live.fingerprint


def test_the_survey_divides_as_training_does(folder, log):
    source = f"folder:{folder}+log:{log}"
    found = survey(open_source(source), Division())
    dataset = _open(source)
    assert found.source.ids == dataset.source.ids
    for name in SPLITS:
        np.testing.assert_array_equal(found.findings.splits[name], dataset.splits[name])
    assert len(found.headers) == 100
    assert found.to_dict()["source"] == source


def test_the_data_is_not_decoded_again_when_the_log_grows(folder, log, monkeypatch):
    source = f"folder:{folder}+log:{log}"
    _open(f"folder:{folder}", residency="memory")
    _open(source, residency="memory")
    write_images_to_log(log, {60: _pixels(60)})
    write_labels(log, {60: "red"}, when=3)
    listing = open_source(source)
    read = type(listing.read).__call__
    monkeypatch.setattr(type(listing.read), "__call__", lambda *a: pytest.fail("read again"))
    assert read
    assert len(open_dataset(listing, Division(), PREPROCESSING, residency="memory").source) == 101


def test_names_of_sources_with_logs_are_parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("folder:a+log:b+log:/c") == f"folder:{tmp_path}/a+log:{tmp_path}/b+log:/c"
    assert absolute("shapes:30+log:b") == f"shapes:30+log:{tmp_path}/b"
    assert absolute("shapes+log:") == "shapes+log:"
    assert listed_folder("folder:a+log:b") == pathlib.Path("a")
    assert listed_folder("csv:a+log:b") is None
    for name in ("+log:a", "folder:+log:a", "folder:a+log:", "shapes:x+log:a", "a+log:b"):
        with pytest.raises(ConfigError, match="must be shapes, "):
            open_source(name)


# The hash, the brightness and the content of an image; few values give many near duplicates.
_IMAGES = st.tuples(st.sampled_from([0, 1, 3, 255, 2**63]), st.integers(0, 2), st.integers(0, 99))


def _looks(images):
    hashes = np.array([image[0] for image in images], np.uint64)
    thumbnails = np.array([[40 * image[1]] * THUMBNAIL_VALUES for image in images], np.uint8)
    return Looks(hashes, thumbnails.reshape(-1, THUMBNAIL_VALUES))


@settings(deadline=None)
@given(
    st.lists(st.tuples(_IMAGES, st.integers(0, 2)), max_size=8),
    st.lists(_IMAGES, max_size=12),
    st.lists(_IMAGES, max_size=12),
    st.integers(0, 5),
    st.sampled_from([0, 3, 5]),
)
def test_no_example_changes_its_split_when_the_log_grows(base, log, more, seed, folds):
    division = Division(seed=seed, folds=folds)
    base_splits = np.array([split for _, split in base], int)

    def divide(log):
        looks = _looks([image for image, _ in base] + log)
        return divide_log([str(image[2]) for image in log], looks, base_splits, division)

    before, after = divide(log), divide(log + more)
    np.testing.assert_array_equal(before[: len(base)], base_splits)
    np.testing.assert_array_equal(after[: len(before)], before)
    # No image of the log is in train if it looks like an earlier image in another split.
    looks = _looks([image for image, _ in base] + log + more)
    for position in range(len(base), len(after)):
        near = looks.earlier_duplicates(position)
        assert (after[near] <= after[position]).all()


def test_images_are_assigned_in_the_given_fractions():
    contents = [f"{i:032x}" for i in range(4000)]
    for division in (Division(seed=4), Division((0.5, 0.3, 0.2)), Division(folds=4, fold=1)):
        if division.folds:
            division = dataclasses.replace(division, fractions=(0.5, 0.25, 0.25))
        counts = np.bincount(division.assign(contents)) / 4000
        np.testing.assert_allclose(counts, division.fractions, atol=0.03)
    folds = [Division(folds=4, fold=fold).assign(contents) == 2 for fold in range(4)]
    np.testing.assert_array_equal(np.sum(folds, axis=0), 1)
