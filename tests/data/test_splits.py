import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.config.schema import SPLIT_RULES, SPLITS, default_config
from cnn_jax.data.source import Source
from cnn_jax.data.splits import Division, divide, group_names
from cnn_jax.system.errors import ConfigError, DataError

FRACTIONS = (0.7, 0.2, 0.1)


def _source(ids, labels, own_splits=None):
    return Source(
        name="x",
        class_names=["a", "b", "c"],
        ids=ids,
        labels=labels,
        read=str.encode,
        keys=ids,
        sizes=[1] * len(ids),
        versions=ids,
        own_splits=own_splits or [""] * len(ids),
    )


@st.composite
def _labelled_ids(draw):
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    ids = [f"{label}/{i}" for i, label in enumerate(labels)]
    return ids, labels


def _splits_by_id(ids, splits):
    return {ids[i]: name for name, indices in splits.items() for i in indices}


@settings(deadline=None, max_examples=80)
@given(_labelled_ids(), st.integers(0, 5), st.sampled_from(SPLIT_RULES))
def test_splits_are_disjoint_and_complete_and_none_lacks_a_class(case, seed, rule):
    ids, labels = case
    splits = divide(ids, labels, FRACTIONS, seed, rule=rule)
    assert tuple(splits) == SPLITS
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(ids)))
    for indices in splits.values():
        assert list(indices) == sorted(indices)
        for label in np.unique(labels):
            assert np.sum(labels == label) < 3 or np.sum(labels[indices] == label) >= 1


@settings(deadline=None, max_examples=80)
@given(_labelled_ids(), st.integers(0, 5))
def test_exact_splits_are_stratified_within_one(case, seed):
    ids, labels = case
    splits = divide(ids, labels, FRACTIONS, seed, rule="exact")
    for name, fraction in zip(SPLITS, FRACTIONS, strict=True):
        for label in np.unique(labels):
            count, size = np.sum(labels[splits[name]] == label), np.sum(labels == label)
            assert size <= 3 or abs(count - fraction * size) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_stable_splits_are_stratified_as_closely_as_chance_lets_them(seed):
    labels = np.repeat(np.arange(5), 2000)
    ids = [str(i) for i in range(len(labels))]
    splits = divide(ids, labels, FRACTIONS, seed)
    for name, fraction in zip(SPLITS, FRACTIONS, strict=True):
        counts = np.bincount(labels[splits[name]])
        deviation = np.sqrt(2000 * fraction * (1 - fraction))
        assert np.abs(counts - 2000 * fraction).max() < 4 * deviation


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10**6)), unique=True, max_size=150),
    st.integers(0, 120),
    st.integers(0, 5),
)
def test_the_stable_rule_keeps_splits_when_images_are_added(images, before, seed):
    def assign(some):
        ids = [f"{label}/{i}" for label, i in some]
        labels = np.array([label for label, _ in some], int)
        return _splits_by_id(ids, divide(ids, labels, FRACTIONS, seed))

    was, is_now = assign(images[:before]), assign(images)
    # If a split has no image of a class by chance, `divide` moves one image to this split.
    lent = _lent(was, seed) | _lent(is_now, seed)
    assert all(is_now[i] == was[i] for i in was if i not in lent)
    # Each of the 2 assignments moves at most one image to each of 2 splits, for each of 4 classes.
    assert len(lent) <= 2 * 2 * 4


def _lent(example_splits, seed):
    """Returns the examples that are not in the split determined by their ID and the seed."""
    return {
        example_id
        for example_id, split in example_splits.items()
        if not len(divide([example_id], np.zeros(1, int), FRACTIONS, seed)[split])
    }


def test_ten_thousand_images_keep_their_splits_when_as_many_come():
    labels = np.repeat(np.arange(4), 5000)
    ids = [f"{label}/{i}" for i, label in enumerate(labels)]
    every_other = slice(None, None, 2)
    was = _splits_by_id(
        ids[every_other], divide(ids[every_other], labels[every_other], FRACTIONS, seed=3)
    )
    is_now = _splits_by_id(ids, divide(ids, labels, FRACTIONS, seed=3))
    assert all(is_now[i] == split for i, split in was.items())


def test_the_exact_rule_moves_at_most_one_image_per_cut():
    ids = [str(i) for i in range(201)]
    before = _splits_by_id(ids, divide(ids[:200], np.zeros(200, int), FRACTIONS, 0, rule="exact"))
    after = _splits_by_id(ids, divide(ids, np.zeros(201, int), FRACTIONS, 0, rule="exact"))
    assert sum(after[i] != split for i, split in before.items()) <= 2


@settings(deadline=None, max_examples=40)
@given(_labelled_ids(), st.randoms(use_true_random=False), st.sampled_from(SPLIT_RULES))
def test_an_examples_split_does_not_depend_on_the_order(case, random, rule):
    ids, labels = case
    order = list(range(len(ids)))
    random.shuffle(order)
    split = divide(ids, labels, FRACTIONS, 0, rule=rule)
    shuffled_ids = [ids[i] for i in order]
    shuffled = divide(shuffled_ids, labels[order], FRACTIONS, 0, rule=rule)
    assert _splits_by_id(ids, split) == _splits_by_id(shuffled_ids, shuffled)


def test_exact_shares_are_exact():
    labels = np.repeat(np.arange(3), 1000)
    splits = divide([str(i) for i in range(3000)], labels, FRACTIONS, 0, rule="exact")
    assert [len(splits[name]) for name in SPLITS] == [2100, 600, 300]


def test_the_seed_decides():
    ids, labels = [str(i) for i in range(100)], np.zeros(100, int)
    first, second = (divide(ids, labels, FRACTIONS, seed)["test"] for seed in (0, 1))
    assert set(first) != set(second)


@pytest.mark.parametrize("rule", SPLIT_RULES)
def test_another_class_changes_nothing(rule):
    ids = [str(i) for i in range(50)]
    alone = divide(ids, np.zeros(50, int), FRACTIONS, 0, rule=rule)
    more_ids = ids + [f"new{i}" for i in range(30)]
    more = divide(more_ids, np.repeat([0, 1], [50, 30]), FRACTIONS, 0, rule=rule)
    for name in SPLITS:
        assert set(alone[name]) == {i for i in more[name] if i < 50}


@pytest.mark.parametrize("name", ["plain.jpg", "ümläut/猫.png", "bad\udcff.jpg"])
def test_any_file_name_has_a_split(name):
    splits = divide([name], np.zeros(1, int), FRACTIONS, 0)
    assert sum(map(len, splits.values())) == 1


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 40)),
        min_size=1,
        max_size=80,
    ),
    st.integers(0, 3),
    st.sampled_from(SPLIT_RULES),
)
def test_groups_and_equal_images_stay_together(images, seed, rule):
    labels = np.array([label for label, _, _ in images])
    ids = [str(i) for i in range(len(images))]
    groups = [f"{label}/{group}" for label, group, _ in images]
    contents = [str(content) for _, _, content in images]
    splits = divide(ids, labels, FRACTIONS, seed, rule=rule, groups=groups, contents=contents)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(ids)))
    example_splits = _splits_by_id(ids, splits)
    for keys in (groups, contents):
        group_splits = {}
        for i, key in zip(ids, keys, strict=True):
            assert group_splits.setdefault(key, example_splits[i]) == example_splits[i]


def test_exact_shares_of_groups_are_met_within_a_group():
    # The images form 40 groups of 1 to 9 images.
    sizes = np.random.default_rng(0).integers(1, 10, 40)
    groups = [f"g{group}" for group in np.repeat(np.arange(40), sizes)]
    ids = [str(i) for i in range(len(groups))]
    splits = divide(ids, np.zeros(len(ids), int), FRACTIONS, 0, rule="exact", groups=groups)
    for name, fraction in zip(SPLITS, FRACTIONS, strict=True):
        assert abs(len(splits[name]) - fraction * len(ids)) <= sizes.max()


def test_a_copy_goes_where_the_original_is():
    ids = [f"{i:03d}.jpg" for i in range(200)]
    copies = [f"{i:03d} (copy).jpg" for i in range(200)]
    contents = [str(i) for i in range(200)]
    was = _splits_by_id(ids, divide(ids, np.zeros(200, int), FRACTIONS, 0, contents=contents))
    both = ids + copies
    is_now = _splits_by_id(
        both, divide(both, np.zeros(400, int), FRACTIONS, 0, contents=contents + contents)
    )
    for original, copy in zip(ids, copies, strict=True):
        assert is_now[copy] == is_now[original] == was[original]


def test_equal_images_of_two_classes_stay_together():
    ids = [f"{i}" for i in range(60)]
    labels = np.repeat([0, 1], 30)
    contents = [f"{i % 30}" for i in range(60)]
    for rule in SPLIT_RULES:
        example_splits = _splits_by_id(
            ids, divide(ids, labels, FRACTIONS, 0, rule=rule, contents=contents)
        )
        assert all(example_splits[str(i)] == example_splits[str(i + 30)] for i in range(30))


def test_own_splits_are_kept():
    own = ["test"] * 5 + ["train"] * 60 + ["validation"] * 7
    ids = [str(i) for i in range(72)]
    splits = divide(ids, np.zeros(72, int), FRACTIONS, 0, own_splits=own)
    assert {name: len(indices) for name, indices in splits.items()} == {
        "train": 60,
        "validation": 7,
        "test": 5,
    }
    assert list(splits["test"]) == [0, 1, 2, 3, 4]


def test_own_splits_get_no_other_images():
    ids, labels = [str(i) for i in range(1000)], np.zeros(1000, int)
    own = ["test"] * 100 + [""] * 900
    splits = divide(ids, labels, FRACTIONS, 0, rule="exact", own_splits=own)
    assert list(splits["test"]) == list(range(100))
    assert (len(splits["train"]), len(splits["validation"])) == (700, 200)
    own[100:150] = ["validation"] * 50
    splits = divide(ids, labels, FRACTIONS, 0, own_splits=own)
    assert list(splits["validation"]) == list(range(100, 150))
    assert list(splits["train"]) == list(range(150, 1000))


def test_what_belongs_to_an_image_with_a_split_goes_there():
    ids = [str(i) for i in range(90)]
    own = ["test"] * 20 + [""] * 60 + ["train"] * 10
    groups = [str(i % 30) for i in range(90)]
    splits = divide(ids, np.zeros(90, int), FRACTIONS, 0, groups=groups, own_splits=own)
    example_splits = _splits_by_id(ids, splits)
    assert all(
        example_splits[str(i)] == "test" for i in (*range(50), *range(60, 80)) if i % 30 < 20
    )
    assert all(example_splits[str(i)] == "train" for i in range(80, 90))


def test_a_unit_with_a_test_image_stays_in_test():
    ids = [str(i) for i in range(120)]
    own = ["test"] * 20 + ["train"] * 100
    contents = [str(i % 40) for i in range(120)]
    splits = divide(ids, np.zeros(120, int), FRACTIONS, 0, contents=contents, own_splits=own)
    assert list(splits["test"]) == list(range(20))
    assert len(splits["validation"])
    assert all(i % 40 >= 20 for i in splits["validation"])
    validation = {contents[i] for i in splits["validation"]}
    assert validation.isdisjoint(contents[i] for i in splits["train"])


def test_a_missing_split_is_cut_out_of_the_training_part():
    own = ["test"] * 50 + ["train"] * 900
    ids = [str(i) for i in range(950)]
    splits = divide(ids, np.zeros(950, int), FRACTIONS, 0, rule="exact", own_splits=own)
    assert list(splits["test"]) == list(range(50))
    assert len(splits["train"]) == 700
    assert len(splits["validation"]) == 200


def test_examples_without_a_split_are_divided():
    own = ["test"] * 10 + [""] * 100
    splits = divide(
        [str(i) for i in range(110)], np.zeros(110, int), FRACTIONS, 0, rule="exact", own_splits=own
    )
    assert [len(splits[name]) for name in SPLITS] == [78, 22, 10]


@pytest.mark.parametrize(
    ("pattern", "example_id", "group"),
    [
        ("{class}/{track}", "00000/00012_00029.jpg", "00000/00012"),
        ("{class}/{track}", "stop sign_2/a-1.jpg", "stop sign_2/a"),
        ("{class}/{patient}/", "sick/p_7/scan_1.png", "sick/p_7"),
        ("*/{patient}/", "sick/p_7/scan_1.png", "p_7"),
        ("{class}/{track}_", "a/b-c_7_1.jpg", "a/b-c"),
        ("*/*_{day}", "a/x_monday_3.jpg", "monday"),
        ("{class}/猫{n}", "ü/猫7.jpg", "ü/7"),
    ],
)
def test_a_pattern_names_the_group(pattern, example_id, group):
    assert group_names([example_id], pattern) == [group]


def test_a_pattern_that_does_not_fit_is_explained():
    with pytest.raises(DataError, match=r"'\{class\}/\{track\}_' does not describe 'a/7.jpg'"):
        group_names(["a/7.jpg"], "{class}/{track}_")
    with pytest.raises(ConfigError, match=r"has no part like"):
        group_names(["a/7.jpg"], "class/track")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 60)),
        min_size=1,
        max_size=120,
    ),
    st.integers(3, 6),
    st.sampled_from(SPLIT_RULES),
)
def test_each_example_is_tested_in_exactly_one_fold(images, folds, rule):
    labels = np.array([label for label, _, _ in images])
    paths = [f"{label}/g{group}x/{i}.jpg" for i, (label, group, _) in enumerate(images)]
    contents = [str(content) for _, _, content in images]
    source = _source(paths, labels)
    division = Division(rule=rule, group="{class}/{group}x/*", folds=folds)
    divided = [
        dataclasses.replace(division, fold=fold).divide(source, contents) for fold in range(folds)
    ]
    for splits in divided:
        assert sorted(np.concatenate(list(splits.values()))) == list(range(len(paths)))
        example_splits = _splits_by_id(paths, splits)
        groups = group_names(paths, division.group)
        for keys in (groups, contents):
            together = {}
            for i, key in zip(paths, keys, strict=True):
                assert together.setdefault(key, example_splits[i]) == example_splits[i]
    for split, times in (("test", 1), ("validation", 1), ("train", folds - 2)):
        tested = np.concatenate([splits[split] for splits in divided])
        assert list(np.bincount(tested, minlength=len(paths))) == [times] * len(paths)


def test_exact_folds_have_equal_parts_of_each_class():
    labels = np.repeat([0, 1], [50, 25])
    ids = [str(i) for i in range(75)]
    for fold in range(5):
        division = Division(rule="exact", folds=5, fold=fold)
        splits = division.divide(_source(ids, labels), ids)
        assert np.bincount(labels[splits["test"]]).tolist() == [10, 5]


@pytest.mark.parametrize("rule", SPLIT_RULES)
def test_folds_depend_on_the_names_and_the_seed_but_not_on_the_order(rule):
    ids, labels = [str(i) for i in range(60)], np.arange(60) % 2

    def tested(order, seed):
        source = _source([ids[i] for i in order], labels[order])
        splits = Division(rule=rule, folds=3, seed=seed).divide(source, source.ids)
        return {source.ids[i] for i in splits["test"]}

    ascending = np.arange(60)
    assert tested(ascending, 0) == tested(ascending[::-1], 0)
    assert tested(ascending, 0) != tested(ascending, 1)


def test_the_seed_of_the_splits_is_apart_from_the_training_seed():
    config = default_config()
    assert Division.from_config(config.data, 7).seed == 7
    config.data.split_seed = 0
    assert Division.from_config(config.data, 7) == Division(seed=0)
    config.data.folds, config.data.fold = 5, 2
    division = Division.from_config(config.data, 7)
    assert (division.folds, division.fold, division.fractions) == (5, 2, (0.6, 0.2, 0.2))
    assert Division.from_dict(division.to_dict()) == division


def test_earlier_versions_can_read_a_division_without_folds():
    fields = {"fractions": [0.7, 0.2, 0.1], "seed": 3, "rule": "stable", "group": ""}
    assert Division(seed=3).to_dict() == fields | {"keep_splits": True}


def test_a_cross_validation_refuses_splits_of_the_data():
    source = _source(["1", "2", "3"], np.zeros(3, int), own_splits=["train", "test", ""])
    with pytest.raises(DataError, match=r"data.folds: x has splits of its own.*keep_splits=False"):
        Division(folds=3).check(source)
    Division(folds=3, keep_splits=False).check(source)
