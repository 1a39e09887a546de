import hashlib

import numpy as np
import pytest

from cnn_jax.data import shapes

GOLDEN = ["c1c91ae51c144796", "a6be152b30eeb71e", "19e25a434d87e3f0"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_JAX_CACHE", str(tmp_path))
    return tmp_path


def _digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.*")
    }


def test_images_depend_on_seed_and_index_alone(cache):
    twenty = _digests(shapes.generate(20))
    thirty = _digests(shapes.generate(30))
    assert len(twenty) == 40
    # A small data set consists of the first images of a larger data set with the same seed.
    assert twenty.items() <= thirty.items()
    other = _digests(shapes.generate(20, seed=1))
    assert twenty.keys() == other.keys()
    assert not set(twenty.values()) & set(other.values())


def test_what_is_there_is_not_made_again(cache):
    folder = shapes.generate(10)
    # The temporary folder, in which the images were generated, no longer exists.
    assert [path.name for path in cache.iterdir()] == [folder.name]
    marker = folder / "marker"
    marker.touch()
    assert shapes.generate(10) == folder
    assert marker.exists()


def test_a_failure_leaves_nothing_behind(cache):
    def fail(items, description, total):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        shapes.generate(10, track=fail)
    assert list(cache.iterdir()) == []


def test_classes_are_balanced_and_resolutions_various():
    labels, sizes = [], set()
    for index in range(50):
        image, mask, label = shapes.render(0, index)
        assert image.size == mask.size
        labels.append(label)
        sizes.add(image.size)
    assert np.bincount(labels).tolist() == [5] * 10
    assert len(sizes) > 40


def test_the_mask_lies_on_an_object_that_differs_from_its_surroundings():
    contrasts = []
    for index in range(50):
        image, mask, _ = shapes.render(0, index)
        pixels, inside = np.asarray(image, float), np.asarray(mask) == 255
        assert 0.02 < inside.mean() < 0.6
        contrasts.append(np.linalg.norm(pixels[inside].mean(0) - pixels[~inside].mean(0)))
    assert np.median(contrasts) > 80


@pytest.mark.parametrize("name", shapes.CLASS_NAMES)
def test_outlines_lie_in_the_unit_disc(name):
    rng = np.random.default_rng(0)
    for _ in range(20):
        outline, hole = shapes._outlines(name, rng)
        assert np.linalg.norm(outline, axis=1).max() <= 1.15
        assert (hole is not None) == (name == "ring")


def test_golden_images():
    """Images may change only together with VERSION, so that no cache mixes old and new images."""
    digests = []
    for index in (0, 1234, 11999):
        image, mask, _ = shapes.render(0, index)
        digests.append(hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()[:16])
    assert digests == GOLDEN, f"raise shapes.VERSION and put GOLDEN = {digests} here"
