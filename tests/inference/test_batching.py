import numpy as np
import pytest

from cnn_jax.inference.batching import (
    join_batches,
    map_batches,
    next_power_of_two,
    split_batches,
)


def test_rows_are_those_of_the_function_in_order():
    numbers, signs = np.arange(10.0), np.resize([1.0, -1.0], 10)
    batches = split_batches((numbers, signs), 4)
    rows = list(map_batches(lambda batch: batch[0] * batch[1], batches))
    assert [len(part) for part in rows] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(rows), numbers * signs)


@pytest.mark.parametrize(
    ("padded_size", "sizes"), [(None, [4, 4, 1]), (4, [4, 4, 4]), (8, [8, 8, 8])]
)
def test_each_batch_is_padded_with_its_last_row(padded_size, sizes):
    seen = []

    def function(batch):
        seen.append(batch.copy())
        return {"row": batch[:, 0]}

    images = np.arange(18).reshape(9, 2)
    rows = list(map_batches(function, split_batches(images, 4), padded_size))
    assert [len(batch) for batch in seen] == sizes
    for batch, part in zip(seen, split_batches(images, 4), strict=True):
        np.testing.assert_array_equal(
            batch[len(part) :], np.resize(part[-1], (len(batch), 2))[len(part) :]
        )
    np.testing.assert_array_equal(np.concatenate([part["row"] for part in rows]), images[:, 0])


def test_batches_are_requested_one_at_a_time():
    requested = []

    def batches():
        for number in range(3):
            requested.append(number)
            yield np.array([number])

    results = map_batches(lambda batch: batch, batches())
    assert next(results).tolist() == [0]
    assert requested == [0]


def test_no_batches_give_no_rows():
    assert list(map_batches(lambda batch: batch, split_batches(np.empty((0, 3))))) == []


@pytest.mark.parametrize(("count", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_two(count, power):
    assert next_power_of_two(count) == power


@pytest.mark.parametrize("sizes", [(3, 0, 1, 5), (4, 4), (1,), ()])
def test_joined_batches_have_the_rows_of_all_arrays(sizes):
    rows = np.arange(2 * sum(sizes)).reshape(-1, 2)
    arrays = iter(np.split(rows, np.cumsum(sizes)[:-1]) if sizes else [])
    batches = list(join_batches(arrays, 4))
    assert all(len(batch) == 4 for batch in batches[:-1])
    assert [row.tolist() for batch in batches for row in batch] == rows.tolist()
    assert not batches or 1 <= len(batches[-1]) <= 4
