import dataclasses
import multiprocessing

import numpy as np
import pytest

from cnn_jax.data import pipeline
from cnn_jax.data.augment import Augmentation
from cnn_jax.data.files import open_folder
from cnn_jax.data.pipeline import Loader, evaluation_batches, training_batches
from cnn_jax.data.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(image_size=(12, 16))
AUGMENTATION = Augmentation("horizontal", 0.2, 0.2, 0.2)
# The number of examples, 42, is not a multiple of the batch size 8.
INDICES = np.arange(3, 45)


@pytest.fixture(scope="module")
def source(image_folder):
    return open_folder(image_folder)


def _batches(
    source,
    count,
    *,
    start=0,
    seed=5,
    workers=0,
    place="host",
    augmentation=AUGMENTATION,
    loader=None,
    balanced=False,
    rows=None,
):
    loader = loader or Loader(source, PREPROCESSING, workers=workers)
    stream = training_batches(
        loader,
        INDICES,
        batch_size=8,
        augmentation=augmentation,
        place=place,
        seed=seed,
        start=start,
        balanced=balanced,
        rows=rows,
    )
    with stream as batches:
        # The arrays are copied, because the arrays of worker processes are views of shared memory.
        return [{key: rows.copy() for key, rows in next(batches).items()} for _ in range(count)]


def _assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_is_what_the_step_takes(source):
    (batch,) = _batches(source, 1)
    assert {key: (rows.shape, rows.dtype.name) for key, rows in batch.items()} == {
        "image": ((8, 12, 16, 3), "uint8"),
        "label": ((8,), "int32"),
        "mask": ((8,), "bool"),
    }
    (batch,) = _batches(source, 1, place="device")
    assert batch["matrix"].shape == (8, 2, 3)
    assert batch["contrast"].shape == (8,)


def test_no_number_of_workers_changes_a_batch(source):
    in_threads = _batches(source, 7)
    _assert_equal(in_threads, _batches(source, 7, workers=2))


def _decoded(source):
    """Returns a loader of decoded images."""
    pixels = Loader(source, PREPROCESSING).load(np.arange(len(source)))["image"]
    return Loader(source, PREPROCESSING, pixels)


def test_decoded_once_or_each_time_is_the_same(source):
    _assert_equal(_batches(source, 7), _batches(source, 7, loader=_decoded(source)))


def test_pixels_on_the_device_are_named_by_their_rows(source):
    loader = _decoded(source)
    on_device = dataclasses.replace(loader, on_device=True)
    streamed = _batches(source, 7, place="device")
    row_pixels = _batches(source, 7, place="device", loader=on_device)
    for batch, expected in zip(row_pixels, streamed, strict=True):
        assert batch["row"].dtype == np.int32
        batch["image"] = loader.pixels[batch.pop("row")]
        _assert_equal([batch], [expected])


def test_a_balanced_stream_shows_each_class_equally_often(source):
    labels = source.labels
    # The three classes have 17, 20 and 5 examples.
    counts = np.bincount(labels[INDICES])
    index_of = {source.ids[i]: i for i in range(len(source))}
    assert len(index_of) == len(labels)
    stream = training_batches(
        dataclasses.replace(_decoded(source), on_device=True),
        INDICES,
        batch_size=6,
        augmentation=Augmentation(),
        place="device",
        seed=0,
        balanced=True,
    )
    with stream as batches:
        seen = [next(batches) for _ in range(int(counts.max()) * 3 // 6)]
    assert all(np.bincount(batch["label"]).tolist() == [2, 2, 2] for batch in seen)
    rows = np.concatenate([batch["row"] for batch in seen])
    for label in range(3):
        members = [i for i in INDICES if labels[i] == label]
        times = [int(np.sum(rows == i)) for i in members]
        assert max(times) - min(times) <= 1
        assert sum(times) == counts.max()


def test_neighbouring_classes_do_not_make_up_batches():
    """Each round of two batches contains each class once, in a new random order."""
    labels = np.arange(64).repeat(3)
    order = pipeline._ClassesInTurn(labels, seed=0)
    seen = labels[order(np.arange(64 * 30))].reshape(30, 2, 32)
    for one_round in seen:
        assert sorted(one_round.ravel()) == list(range(64))
    halves = (seen[:, 0] < 32).mean(axis=1)
    assert halves.min() > 0.3
    assert halves.max() < 0.7
    assert len({tuple(batch) for batch in seen[:, 0]}) == 30


def test_a_balanced_stream_can_be_entered_anywhere(source):
    whole = _batches(source, 9, balanced=True)
    _assert_equal(whole[6:], _batches(source, 3, balanced=True, start=6))
    _assert_equal(whole[:3], _batches(source, 3, balanced=True, workers=2))
    assert not np.array_equal(whole[0]["image"], _batches(source, 1)[0]["image"])


def test_workers_end_with_the_stream(source):
    _batches(source, 1, workers=1)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("start", [1, 6, 50])
def test_the_stream_can_be_entered_anywhere(source, start):
    _assert_equal(_batches(source, start + 3)[start:], _batches(source, 3, start=start))


def test_no_image_is_read_after_the_last_batch_that_is_wanted(source, monkeypatch):
    loads = []
    load = Loader.load
    own_loader = Loader(source, PREPROCESSING)

    def counting_load(loader, indices):
        # Threads of earlier tests may still read images with other loaders.
        if loader is own_loader:
            loads.append(len(indices))
        return load(loader, indices)

    monkeypatch.setattr(Loader, "load", counting_load)
    stream = training_batches(
        own_loader,
        INDICES,
        batch_size=8,
        augmentation=AUGMENTATION,
        place="host",
        seed=5,
        start=1,
        stop=4,
    )
    with stream as batches:
        assert len(list(batches)) == 3
    assert loads == [8] * 3


def test_the_seed_decides_order_and_draws(source):
    first, second = _batches(source, 1)[0], _batches(source, 1, seed=6)[0]
    assert not np.array_equal(first["image"], second["image"])


def test_each_pass_has_every_example_once_and_its_own_order(source):
    loader = Loader(source, PREPROCESSING)
    index_of = {loader.load(np.array([i]))["image"].tobytes(): i for i in INDICES}
    # The test identifies images by their pixels, so all images must be different.
    assert len(index_of) == len(INDICES)
    # 21 batches of 8 are four passes over the 42 examples.
    batches = _batches(source, 21, augmentation=Augmentation())
    indices = [index_of[image.tobytes()] for batch in batches for image in batch["image"]]
    passes = np.reshape(indices, (4, len(INDICES)))
    for one_pass in passes:
        assert sorted(one_pass) == list(INDICES)
        assert list(one_pass) != list(INDICES)
    assert len({tuple(one_pass) for one_pass in passes}) == 4


def test_draws_differ_between_passes(source):
    batches = _batches(source, 12, place="device")
    matrices = np.concatenate([batch["matrix"] for batch in batches]).reshape(96, 6)
    assert len(np.unique(matrices, axis=0)) == 96


def test_host_and_device_see_the_same_draws(source):
    host, device = _batches(source, 3), _batches(source, 3, place="device")
    plain = _batches(source, 3, augmentation=Augmentation())
    for moved, unmoved, original in zip(host, device, plain, strict=True):
        np.testing.assert_array_equal(unmoved["image"], original["image"])
        np.testing.assert_array_equal(moved["label"], unmoved["label"])
        assert not np.array_equal(moved["image"], unmoved["image"])


@pytest.mark.parametrize("batch_size", [1, 8, 21, 42, 64])
def test_evaluation_has_every_example_once_in_order(source, batch_size):
    loader = Loader(source, PREPROCESSING)
    with evaluation_batches(loader, INDICES, batch_size) as batches:
        batches = list(batches)
    masks = np.concatenate([batch["mask"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    images = np.concatenate([batch["image"] for batch in batches])
    assert all(len(batch["image"]) == batch_size for batch in batches)
    assert masks.sum() == len(INDICES)
    np.testing.assert_array_equal(labels[masks], source.labels[INDICES])
    np.testing.assert_array_equal(images[masks], loader.load(INDICES)["image"])


@pytest.mark.parametrize(("cores", "expected"), [(2, 0), (8, 7), (64, 16)])
def test_workers_are_as_many_as_help(monkeypatch, cores, expected):
    monkeypatch.setattr(pipeline.scan, "num_cores", lambda: cores)
    assert pipeline.choose_workers(-1) == expected
    assert pipeline.choose_workers(3) == 3


@pytest.mark.parametrize("place", ["host", "device"])
def test_processes_that_share_a_batch_make_up_the_whole(source, place):
    """Each process gets its rows of a batch, with the values that a single process would get."""
    whole = _batches(source, 3, place=place)
    shares = [np.array([0, 1, 2]), np.array([3, 6]), np.array([4, 5, 7])]
    for rows in shares:
        part = _batches(source, 3, place=place, rows=rows)
        _assert_equal(part, [{key: values[rows] for key, values in b.items()} for b in whole])


def test_processes_that_share_an_evaluation_see_each_example_once(source):
    loader = Loader(source, PREPROCESSING)
    indices = np.arange(5, 24)  # The 19 examples make two full batches and a partial batch.
    with evaluation_batches(loader, indices, 8) as batches:
        whole = list(batches)
    for rows in (np.array([0, 1, 5]), np.array([2, 3, 4, 6, 7])):
        with evaluation_batches(loader, indices, 8, rows) as batches:
            part = list(batches)
        _assert_equal(part, [{key: values[rows] for key, values in b.items()} for b in whole])


def test_other_errors_of_grain_are_not_reported_as_dead_workers():
    with pytest.raises(RuntimeError, match="something else"), pipeline._workers_that_die():
        raise RuntimeError("something else")


def test_each_class_has_an_order_of_its_own():
    labels = np.arange(2).repeat(50)
    seen = pipeline._ClassesInTurn(labels, seed=0)(np.arange(100))
    assert seen[seen < 50].tolist() != (seen[seen >= 50] - 50).tolist()
