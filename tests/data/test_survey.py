import hashlib
import io

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cnn_jax.data import duplicates
from cnn_jax.data import survey as survey_module
from cnn_jax.data.duplicates import near_components, near_pairs, perceptual_hash
from cnn_jax.data.files import open_folder
from cnn_jax.data.sources import open_source
from cnn_jax.data.splits import Division
from cnn_jax.data.survey import survey
from cnn_jax.system.errors import ConfigError, DataError


def _photo(seed, size=(60, 40)):
    """Returns a smooth picture, because a resize hardly changes the hash of a smooth picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def _save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@st.composite
def _hashes(draw):
    """Draws an array of 64-bit hashes, many of which differ in only a few bits."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
    flips = st.lists(st.integers(0, 63), max_size=8)
    chosen = draw(st.lists(st.tuples(st.sampled_from(centres), flips), max_size=30))
    values = [*centres]
    for value, bits in chosen:
        for bit in bits:
            value ^= 1 << bit
        values.append(value)
    return np.array(values, np.uint64)


def _near_by_brute_force(hashes, distance):
    values = [int(value) for value in hashes]
    return {
        (i, j)
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= distance
    }


def _no_thumbnails(hashes):
    """Returns identical thumbnails, so that only the hashes decide which images are similar."""
    return np.zeros((len(hashes), 192), np.uint8)


@settings(deadline=None)
@given(_hashes(), st.integers(0, 12))
def test_near_pairs_are_those_of_brute_force(hashes, distance):
    hashes = np.unique(hashes)
    found = set()
    for first, second in near_pairs(hashes, distance):
        found |= {tuple(sorted(pair)) for pair in zip(first.tolist(), second.tolist(), strict=True)}
    assert found == _near_by_brute_force(hashes, distance)


@settings(deadline=None)
@given(_hashes(), st.integers(0, 12))
def test_components_are_those_of_brute_force(hashes, distance):
    pairs = np.array(sorted(_near_by_brute_force(hashes, distance)), int).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(hashes),) * 2)
    _, expected = connected_components(graph, directed=False)
    found = near_components(hashes, _no_thumbnails(hashes), distance)
    np.testing.assert_array_equal(
        found[:, np.newaxis] == found, expected[:, np.newaxis] == expected
    )


def test_blocks_change_nothing(monkeypatch):
    hashes = np.random.default_rng(0).integers(0, 2**12, 500).astype(np.uint64) << np.uint64(30)
    whole = near_components(hashes, _no_thumbnails(hashes), 1)
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    np.testing.assert_array_equal(near_components(hashes, _no_thumbnails(hashes), 1), whole)


def test_no_hashes_have_no_components():
    none = np.zeros(0, np.uint64)
    assert len(near_components(none, _no_thumbnails(none), 4)) == 0


def test_images_of_near_hashes_are_near_if_they_look_alike():
    rng = np.random.default_rng(0)
    rich = rng.integers(60, 200, 192)
    flat = np.full(192, 40)
    looks = [rich, rich + 8, rich[::-1], flat, flat + 1, flat + 8]
    thumbnails = np.array(looks, np.uint8)
    parts = near_components(np.zeros(len(looks), np.uint64), thumbnails, 4)
    np.testing.assert_array_equal(parts[:, np.newaxis] == parts, _blocks([2, 1, 2, 1]))


def _blocks(sizes):
    parts = np.repeat(np.arange(len(sizes)), sizes)
    return parts[:, np.newaxis] == parts


def test_the_hash_is_that_of_imagehash():
    image = _photo(1)
    assert f"{perceptual_hash(np.asarray(image)):016x}" == str(imagehash.phash(image))


def test_channels_are_those_of_all_pixels(image_folder):
    found = survey(open_source(f"folder:{image_folder}"), Division())
    paths = sorted(image_folder.rglob("*.png"))
    pixels = np.concatenate([np.asarray(Image.open(path)).reshape(-1, 3) for path in paths])
    pixels = pixels.astype(np.float64)
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(found.levels.sum(axis=1), len(pixels))


def test_channels_of_a_flat_image_do_not_vary(tmp_path):
    for name in ("a", "b"):
        _save(Image.new("RGB", (7, 5), (3, 128, 255)), tmp_path / name / "x.png")
    found = survey(open_folder(tmp_path), Division())
    assert (found.mean, found.std) == ([3, 128, 255], [0, 0, 0])


@pytest.fixture
def mixed_folder(tmp_path):
    """A folder of two classes, with one example of each kind of problem that a survey finds."""
    for i in range(4):
        _save(_photo(i), tmp_path / "cat" / f"{i}.png")
        _save(_photo(10 + i, (30, 30)), tmp_path / "dog" / f"{i}.jpg")
    _save(_photo(0), tmp_path / "cat" / "copy.bmp")
    _save(_photo(1), tmp_path / "dog" / "cat.png")
    _save(_photo(2).resize((120, 80)), tmp_path / "cat" / "large.webp", lossless=True)
    _save(_photo(20).convert("L"), tmp_path / "dog" / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    _save(_photo(21, (64, 32)), tmp_path / "dog" / "turned.jpg", exif=exif)
    (tmp_path / "cat" / "0 empty.png").write_bytes(b"")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    return tmp_path


def test_everything_is_counted(mixed_folder):
    found = survey(open_folder(mixed_folder), Division()).to_dict()
    assert found["images"] == 13
    sizes = {row["name"]: row["all"] for row in found["classes"]}
    assert sizes == {"cat": 6, "dog": 7}
    for row in found["classes"]:
        assert row["train"] + row["validation"] + row["test"] == row["all"]
    for split, number in found["splits"].items():
        assert number == sum(row[split] for row in found["classes"])
    assert found["imbalance"] == pytest.approx(7 / 6)
    assert found["resolutions"] == [
        {"width": 60, "height": 40, "images": 7},
        {"width": 30, "height": 30, "images": 4},
        {"width": 32, "height": 64, "images": 1},
        {"width": 120, "height": 80, "images": 1},
    ]
    assert found["aspect_ratio"]["min"] == 0.5
    assert found["aspect_ratio"]["max"] == 1.5
    assert found["formats"] == {"PNG": 6, "JPEG": 5, "BMP": 1, "WEBP": 1}
    assert found["modes"] == {"RGB": 12, "L": 1}
    assert found["unreadable"] == [
        {"id": "cat/0 empty.png", "reason": "is empty", "other_format": ""}
    ]
    assert found["rotated"] == [{"id": "dog/turned.jpg", "orientation": 6}]
    assert found["ignored"] == {"not images": 1}


def test_duplicates_are_grouped_and_conflicts_come_first(mixed_folder):
    found = survey(open_folder(mixed_folder), Division()).to_dict()
    exact = found["exact_duplicates"]
    assert [[image["id"] for image in row["images"]] for row in exact] == [
        ["cat/1.png", "dog/cat.png"],
        ["cat/0.png", "cat/copy.bmp"],
    ]
    assert [row["different_labels"] for row in exact] == [True, False]
    assert not any(row["different_splits"] for row in exact)
    # Sets of equal images are reported as exact duplicates, and not again as near duplicates.
    near = found["near_duplicates"]
    assert [[i["id"] for i in row["images"]] for row in near] == [["cat/2.png", "cat/large.webp"]]


def test_equal_images_in_splits_of_their_own_are_told(tmp_path):
    for split in ("train", "test"):
        for i in range(3):
            for name in ("a", "b"):
                seed = f"{name} {i if i == 0 else (split, i)}"
                digest = hashlib.sha256(seed.encode()).digest()
                image = _photo(int.from_bytes(digest[:4], "big"))
                _save(image, tmp_path / split / name / f"{i}.png")
    found = survey(open_folder(tmp_path), Division())
    assert [cluster.different_splits for cluster in found.exact] == [True, True]
    assert [found.source.ids[i] for i in found.exact[0].images] == [
        "test/a/0.png",
        "train/a/0.png",
    ]
    anew = survey(open_folder(tmp_path), Division(keep_splits=False))
    assert [cluster.different_splits for cluster in anew.exact] == [False, False]


def test_varied_images_show_each_class_first(mixed_folder):
    found = survey(open_folder(mixed_folder), Division(), distance=12)
    everything = survey_module.Cluster(list(range(len(found.source))), True, True)
    shown = found.varied(everything)
    assert sorted(shown) == everything.images
    kinds = {(found.source.labels[i], found.example_splits[i]) for i in shown}
    first = [(found.source.labels[i], found.example_splits[i]) for i in shown[: len(kinds)]]
    assert len(set(first)) == len(kinds)


def test_the_division_is_that_of_training(image_folder):
    source = open_source(f"folder:{image_folder}")
    found = survey(source, Division(seed=3))
    expected = Division(seed=3).divide(source, [str(i) for i in range(len(source))])
    for split, indices in expected.items():
        np.testing.assert_array_equal(found.findings.splits[split], indices)


def test_a_source_of_nothing_readable_is_described(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"nothing")
    found = survey(open_folder(tmp_path), Division(group="{class}/{name}")).to_dict()
    assert found["images"] == 0
    assert [row["id"] for row in found["unreadable"]] == ["a/x.png", "b/x.png"]
    assert found["mean"] is found["std"] is found["aspect_ratio"] is None
    assert [row["name"] for row in found["classes"]] == found["too_small"] == ["a", "b"]


def test_a_group_that_does_not_fit_is_told_before_the_pass(image_folder):
    def never(items, description, total):
        raise AssertionError("it began to read")

    source = open_source(f"folder:{image_folder}")
    with pytest.raises(DataError, match="does not describe"):
        survey(source, Division(group="{class}/{track}_x"), track=never)
    with pytest.raises(ConfigError, match="has no part like"):
        survey(source, Division(group="track"), track=never)


def test_an_image_of_too_many_pixels_is_unreadable(tmp_path):
    encoded = io.BytesIO()
    _photo(0, (30, 30)).save(encoded, "PNG")
    for name in ("a", "b"):
        _save(_photo(5, (20, 20)), tmp_path / name / "small.png")
    (tmp_path / "a" / "large.png").write_bytes(encoded.getvalue())
    found = survey(open_folder(tmp_path), Division(), max_pixels=400)
    assert [image.id for image in found.findings.unreadable] == ["a/large.png"]
