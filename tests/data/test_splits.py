import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.data.splits import SPLITS, split_by_id

FRACTIONS = (0.7, 0.2, 0.1)


@st.composite
def _labelled_ids(draw):
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    ids = [f"{label}/{i}" for i, label in enumerate(labels)]
    return ids, labels


@settings(deadline=None, max_examples=80)
@given(_labelled_ids(), st.integers(0, 5))
def test_splits_are_disjoint_complete_and_stratified_within_one(case, seed):
    ids, labels = case
    splits = split_by_id(ids, labels, FRACTIONS, seed)
    assert tuple(splits) == SPLITS
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(ids)))
    for name, fraction in zip(SPLITS, FRACTIONS, strict=True):
        assert list(splits[name]) == sorted(splits[name])
        for label in np.unique(labels):
            count, size = np.sum(labels[splits[name]] == label), np.sum(labels == label)
            if size > 3:
                assert abs(count - fraction * size) <= 1
            if size >= 3:
                assert count >= 1


@settings(deadline=None, max_examples=40)
@given(_labelled_ids(), st.randoms(use_true_random=False))
def test_an_examples_split_does_not_depend_on_the_order(case, random):
    ids, labels = case
    order = list(range(len(ids)))
    random.shuffle(order)
    split = split_by_id(ids, labels, FRACTIONS, 0)
    shuffled = split_by_id([ids[i] for i in order], labels[order], FRACTIONS, 0)
    for name in SPLITS:
        assert {ids[i] for i in split[name]} == {ids[order[i]] for i in shuffled[name]}


def test_exact_shares_are_exact():
    labels = np.repeat(np.arange(3), 1000)
    splits = split_by_id([str(i) for i in range(3000)], labels, FRACTIONS, 0)
    assert [len(splits[name]) for name in SPLITS] == [2100, 600, 300]


def test_the_seed_decides():
    labels = np.zeros(100, int)
    ids = [str(i) for i in range(100)]
    first, second = (split_by_id(ids, labels, FRACTIONS, seed)["test"] for seed in (0, 1))
    assert set(first) != set(second)


def test_another_class_changes_nothing():
    ids = [str(i) for i in range(50)]
    alone = split_by_id(ids, np.zeros(50, int), FRACTIONS, 0)
    more = split_by_id(
        ids + [f"new{i}" for i in range(30)], np.repeat([0, 1], [50, 30]), FRACTIONS, 0
    )
    for name in SPLITS:
        assert set(alone[name]) == {i for i in more[name] if i < 50}


@pytest.mark.parametrize("name", ["plain.jpg", "ümläut/猫.png", "bad\udcff.jpg"])
def test_any_file_name_has_a_split(name):
    splits = split_by_id([name], np.zeros(1, int), FRACTIONS, 0)
    assert sum(map(len, splits.values())) == 1
