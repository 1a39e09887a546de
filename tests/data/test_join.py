import dataclasses
import pathlib

import numpy as np
import pytest
from bundles import encode_png
from conftest import write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from request_logs import NAMES, request_id, write_images_to_log, write_labels

from cnn_jax.data import row_cache
from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.decode import load, pixel_digest
from cnn_jax.data.duplicates import THUMBNAIL_VALUES, Looks, perceptual_hash, thumbnail
from cnn_jax.data.join import KNOWN_COPY, NEW_CLASS, OTHER_SIZE, Part, join
from cnn_jax.data.labelled_log import KnownImage, read_examples, write_known, write_snapshot
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.scan import Record
from cnn_jax.data.source import Source
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
    assert all(text.startswith("by chance a split") for text in after.findings.warnings())


@pytest.mark.parametrize("residency", ["none", "disk", "memory", "device"])
def test_pixels_of_the_log_follow_those_of_the_data(folder, log, residency):
    # The crop would cut the border of an image off; logged images were cropped by the server.
    preprocessing = dataclasses.replace(PREPROCESSING, resize="crop", crop_ratio=0.8)
    (folder / "red" / "broken.png").write_bytes(b"")
    write_labels(log, {5: "purple"}, when=2)  # An image of an unknown class is left out.
    dataset = _open(
        f"folder:{folder}+log:{log}", None, preprocessing, residency=residency, max_unreadable=0.1
    )
    assert dataset.residency == residency
    loader = dataclasses.replace(dataset.loader, on_device=False)
    images = loader.load(np.arange(98, -1, -1))["image"][::-1]
    encoded = (folder / dataset.source.ids[59]).read_bytes()
    np.testing.assert_array_equal(images[59], load(encoded, preprocessing))
    for i, number in enumerate([*range(5), *range(6, 40)]):
        np.testing.assert_array_equal(images[60 + i], _pixels(number))
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
    (remark,) = dataset.source.remarks
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


def test_a_survey_says_why_no_logged_image_can_be_read(folder, tmp_path):
    write_images_to_log(tmp_path / "log", {0: _pixels(0, size=99)})
    write_labels(tmp_path / "log", {0: "red"}, when=1)
    listing = open_source(f"folder:{folder}+log:{tmp_path / 'log'}")
    with pytest.raises(
        DataError, match=r"no logged image can be read; \S+ has 99 x 99 pixels, mor"
    ):
        survey(listing, Division(), max_pixels=9_000)


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
    reader = type(listing.read)
    read, keys = reader.__call__, []
    monkeypatch.setattr(reader, "__call__", lambda self, key: keys.append(key) or read(self, key))
    assert len(open_dataset(listing, Division(), PREPROCESSING, residency="memory").source) == 101
    assert not keys
    monkeypatch.setenv("CNN_JAX_CACHE", str(folder.parent / "empty"))
    open_dataset(listing, Division(), PREPROCESSING, residency="memory")
    assert len(keys) == 60


def test_images_of_the_log_are_not_written_to_the_cache(folder, log, monkeypatch):
    _open(f"folder:{folder}", residency="memory")
    cached = {path for path in (folder.parent / "cache").rglob("*") if path.parent.name != "scans"}
    assert any(path.suffix == ".rows" for path in cached)
    monkeypatch.setattr(row_cache, "_SEGMENT_BYTES", 25 * (216 + 20))
    for residency in ("memory", "none"):
        _open(f"folder:{folder}+log:{log}", residency=residency)
    looks = [path for path in (folder.parent / "cache").rglob("*.rows") if path not in cached]
    assert sorted(path.stat().st_size / (216 + 20) for path in looks) == [10, 25, 25]


def _known_images(dataset):
    return {
        pixel_digest(dataset.loader.load(np.array([i]))["image"][0]): KnownImage(
            name, dataset.source.class_names[dataset.source.labels[i]], dataset.source.logged[i]
        )
        for name in SPLITS
        for i in dataset.splits[name]
    }


def test_known_images_keep_their_splits_when_the_source_changes(folder, tmp_path):
    rng = np.random.default_rng(0)
    originals = [encode_png(_pixels(i, size=32)) for i in range(40)]
    served = {i: load(original, PREPROCESSING) for i, original in enumerate(originals)}
    write_images_to_log(tmp_path / "log", served)
    write_labels(tmp_path / "log", dict.fromkeys(served, "red"), when=1)
    snapshot = tmp_path / "snapshot"
    write_snapshot(read_examples([tmp_path / "log"], NAMES), snapshot)
    source = f"folder:{folder}+log:{snapshot}"
    before = _known_images(_open(source))
    write_known(before, snapshot)
    assert _known_images(_open(source)) == before
    # Files get other names and classes, and some are deleted.
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        if number % 10 == 0:
            path.unlink()
        else:
            path.rename(folder / NAMES[number % 3] / f"new-{number}.png")
    # The source gets the originals of logged images, and near duplicates of them.
    for i, original in enumerate(originals):
        (folder / "red" / f"original-{i}.png").write_bytes(original)
        near = (served[i] + rng.integers(-1, 2, (16, 16, 3))).clip(0, 255).astype(np.uint8)
        (folder / "red" / f"near-{i}.png").write_bytes(encode_png(near))
    for residency in ("none", "memory"):
        images = _known_images(_open(source, residency=residency))
        assert len(images) == 54 + 40 + 40
        splits = {digest: image.split for digest, image in images.items()}
        assert not [d for d, image in before.items() if splits.get(d, image.split) != image.split]
        assert set(splits.values()) == set(SPLITS)


def test_new_images_of_a_known_group_follow_it(folder, log, tmp_path):
    snapshot = tmp_path / "snapshot"
    write_snapshot(read_examples([log], NAMES), snapshot)
    division = Division(group="{class}/{track}_*")
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.rename(path.with_name(f"{number // 4}_{number % 4}.png"))
    source = f"folder:{folder}+log:{snapshot}"
    write_known(_known_images(_open(source, division)), snapshot)
    tracks = {}
    for name, split in _splits(_open(source, division)).items():
        if not name.startswith("log/"):
            tracks.setdefault(name.partition("_")[0], split)
    renamed = {name: name.replace("/", "/moved") for name in tracks}
    for number, (name, new) in enumerate(renamed.items()):
        for path in folder.glob(f"{name}_*"):
            path.rename(folder / f"{new}_{path.name.partition('_')[2]}")
        Image.fromarray(_pixels(1000 + number)).save(folder / f"{new}_9.png")
    after = _splits(_open(source, division))
    assert {name: after[f"{new}_9.png"] for name, new in renamed.items()} == tracks


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


def test_the_most_similar_near_duplicate_counts():
    looks = Looks(
        np.array([0, 1, 1, 0, 2**32 - 1], np.uint64),
        np.repeat([[40], [41], [41], [41], [41]], THUMBNAIL_VALUES, axis=1).astype(np.uint8),
    )
    assert [looks.nearest_before(position) for position in range(5)] == [None, 0, 1, 1, None]


def _part(rows, known_splits=None, looks=None):
    """Returns a part of examples with a name, a class and an image each."""
    digests = [repr(image) for _, _, image in rows]
    source = Source(
        name="folder:x",
        class_names=list(NAMES),
        ids=[name for name, _, _ in rows],
        labels=np.array([label for _, label, _ in rows], np.int32),
        read=bytes,
        keys=range(len(rows)),
        sizes=[1] * len(rows),
        versions=digests,
        own_splits=[""] * len(rows),
        known_splits=known_splits or {},
    )
    # The files are larger than the network's input, and may differ although the input does not.
    contents = [digest + name[0] for name, digest in zip(source.ids, digests, strict=True)]
    records = [Record("", content, None, None) for content in contents]
    return Part(source, records, digests, looks or _looks([image for _, _, image in rows]))


def _divide(base, log, division, known_splits):
    """Returns the split of each digest; train comes first among several splits."""
    part = _part(base)
    splits = division.divide(part.source, [record.pixels for record in part.records])
    other = _part(log, known_splits)
    joined = join(part, other, splits, division)
    digests = [*part.digests, *(other.digests[row] for row in joined.rows)]
    found = {}
    for name in reversed(SPLITS):
        for i in joined.splits[name]:
            assert found.setdefault(digests[i], name) == name or not known_splits
            found[digests[i]] = name
    return found


# Names of files, with a class and an image each; and images of the log.
_BASES = st.dictionaries(
    st.text("ab", min_size=1, max_size=4),
    st.tuples(st.integers(0, 2), _IMAGES),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(
    st.lists(_BASES, min_size=2, max_size=4),
    st.lists(st.lists(_IMAGES, max_size=8, unique=True), min_size=4, max_size=4),
    st.integers(0, 5),
    st.sampled_from([("stable", 0), ("exact", 0), ("stable", 3), ("exact", 5)]),
)
def test_no_example_changes_its_split_when_the_data_changes(bases, logs, seed, rule):
    """The source grows, shrinks and gets other names and classes; the log grows."""
    division = Division(seed=seed, rule=rule[0], folds=rule[1])
    known, logged = {}, []
    for base, more in zip(bases, logs[: len(bases)], strict=True):
        # The first data is that of the champion, without a log.
        logged += [image for image in more if image not in logged] if known else []
        rows = [(name, label, image) for name, (label, image) in base.items()]
        log = [(f"log/{i}", i % 3, image) for i, image in enumerate(logged)]
        splits = _divide(rows, log, division, known)
        assert {d: known.get(d, split) for d, split in splits.items()} == splits
        known |= splits
        if len(logged):  # The log of this moment without the known images.
            assert _divide(rows, log, division, known) == splits


def test_the_log_alone_may_grow_without_known_splits():
    images = [(0, brightness, content) for content in range(30) for brightness in (0, 2)]
    base = [(f"a{i}", i % 3, image) for i, image in enumerate(images[:20])]
    log = [(f"log/{i}", i % 3, image) for i, image in enumerate(images[20:])]
    division = Division()
    before, after = (_divide(base, log[:count], division, {}) for count in (15, 40))
    assert before.items() <= after.items()


def test_images_of_a_fixed_camera_are_in_all_splits():
    """All are near duplicates; if test came before train, all would be in test."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (7, 7, 3), np.uint8)
    scene = np.array(Image.fromarray(scene).resize((16, 16), Image.Resampling.BICUBIC))
    photos = [
        (scene * rng.uniform(0.95, 1.05) + rng.normal(0, 4, scene.shape)).clip(0, 255)
        for _ in range(300)
    ]
    photos = [photo.astype(np.uint8) for photo in photos]
    hashes = np.array([perceptual_hash(photo) for photo in photos], np.uint64)
    thumbnails = np.stack([thumbnail(photo) for photo in photos])
    base, log = (
        _part([(f"a{i}", 0, i) for i in rows], looks=Looks(hashes[rows], thumbnails[rows]))
        for rows in (np.arange(200), np.arange(200, 300))
    )
    assert Looks(hashes, thumbnails).nearest_before(299) is not None
    joined = join(base, log, Division().divide(base.source, base.digests), Division())
    counts = [int((joined.splits[name] >= 200).sum()) for name in SPLITS]
    assert sum(counts) == 100
    assert counts[0] > 50
    assert counts[2] > 0


def test_images_are_assigned_in_the_given_fractions():
    contents = [f"{i:032x}" for i in range(4000)]
    for division in (Division(seed=4), Division((0.5, 0.3, 0.2)), Division(folds=4, fold=1)):
        if division.folds:
            division = dataclasses.replace(division, fractions=(0.5, 0.25, 0.25))
        counts = np.bincount(division.assign(contents)) / 4000
        np.testing.assert_allclose(counts, division.fractions, atol=0.03)
    folds = [Division(folds=4, fold=fold).assign(contents) == 2 for fold in range(4)]
    np.testing.assert_array_equal(np.sum(folds, axis=0), 1)
