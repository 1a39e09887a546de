import re
import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cnn_jax.data.layout import _SPLIT_OF_WORD, _words, find_layout
from cnn_jax.system.errors import DataError


def _images(*folders, number=2):
    """Returns the paths of `number` images in each folder."""
    return [f"{folder}/{i}.png" for folder in folders for i in range(number)]


def _found(paths, form="folder"):
    """Returns the detected class and split of each image folder, and the remarks on the layout."""
    layout = find_layout(paths, f"{form}:DATA")
    return {p.rpartition("/")[0]: layout.classify(p) for p in paths}, layout.remarks


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "val", "test"),
        ("seg_train", "seg_val", "seg_test"),
        ("train_images", "val_images", "test_images"),
        ("images_train", "images_val", "images_test"),
        ("data_train", "data_validation", "data_test"),
        ("training_set", "validation_set", "test_set"),
        ("trainset", "valset", "testset"),
        ("TrainImages", "ValidationImages", "TestImages"),
        ("Train Data", "Valid Data", "Test Data"),
        ("train", "validation_data", "test-set"),
        ("train2017", "val2017", "test2017"),
        ("train_128", "val_128", "test_128"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val", "ILSVRC2012_img_test"),
        ("train", "valid", "test1"),
        ("trainval", "val", "test"),
        ("x_train", "x_val", "X_test"),
        ("train", "dev", "test"),
        ("training", "evaluation", "testing"),
        ("train", "eval", "holdout"),
        ("seg_train", "seg_dev", "seg_hold_out"),
        ("trainset", "devset", "holdoutset"),
        ("train_val", "eval", "test"),
    ],
)
@pytest.mark.parametrize("level", ["", "again", "images"])
def test_folders_that_are_called_as_splits_are_splits(train, validation, test, level):
    names = {train: "train", validation: "validation", test: "test"}
    inner = {top: "/" + {"again": top}.get(level, level) if level else "" for top in names}
    paths = _images(*(f"{top}{inner[top]}/{c}" for top in names for c in ("cat", "dog")))
    found, remarks = _found(paths)
    assert found == {
        f"{top}{inner[top]}/{c}": (c, split) for top, split in names.items() for c in ("cat", "dog")
    }
    assert remarks == []


def test_images_to_be_predicted_are_left_out_and_counted():
    paths = _images(
        *(f"seg_{split}/seg_{split}/{c}" for split in ("train", "test") for c in ("sea", "street")),
        "seg_pred/seg_pred",
    )
    found, remarks = _found(paths)
    assert found == {
        "seg_train/seg_train/sea": ("sea", "train"),
        "seg_train/seg_train/street": ("street", "train"),
        "seg_test/seg_test/sea": ("sea", "test"),
        "seg_test/seg_test/street": ("street", "test"),
        "seg_pred/seg_pred": None,
    }
    assert remarks == [
        "the images in seg_pred (2) are left out, because they have no class folders"
    ]


@pytest.mark.parametrize("flat", ["val", "test", "test1", "unlabelled", "pred"])
def test_a_split_without_class_folders_is_left_out_and_named(flat):
    others = {"val": "test"}.get(flat, "val")
    paths = _images("train/n01440764", "train/n01443537", f"{others}/n01440764", flat, number=5)
    found, remarks = _found(paths)
    assert found["train/n01443537"] == ("n01443537", "train")
    assert found[flat] is None
    assert remarks == [f"the images in {flat} (5) are left out, because they have no class folders"]


def test_other_folders_beside_the_splits_are_left_out_and_named():
    found, remarks = _found(_images("train/a", "test/a", "train_masks/a", "samples"))
    assert found == {
        "train/a": ("a", "train"),
        "test/a": ("a", "test"),
        "train_masks/a": None,
        "samples": None,
    }
    assert remarks == [
        "the images in samples and train_masks (4) are left out, because their folder is no split"
    ]


@pytest.mark.parametrize(
    ("training", "other", "split"),
    [
        ("train", "eval", "validation"),
        ("train", "dev", "validation"),
        ("training", "evaluation", "validation"),
        ("train", "holdout", "test"),
        ("train", "Hold-Out", "test"),
        ("train_val", "test", "test"),
        ("TrainVal", "test", "test"),
        ("train+val", "holdout", "test"),
    ],
)
def test_two_parts_with_one_for_training_are_splits(training, other, split):
    found, remarks = _found(_images(*(f"{top}/{c}" for top in (training, other) for c in "ab")))
    assert found == {
        f"{top}/{c}": (c, part) for top, part in ((training, "train"), (other, split)) for c in "ab"
    }
    assert remarks == []


@pytest.mark.parametrize(
    ("tops", "splits"),
    [
        (["training", "validation", "evaluation"], ["train", "validation", "validation"]),
        (["train", "test", "test2"], ["train", "test", "test"]),
        (["train", "trainval", "test"], ["train", "train", "test"]),
        (["train", "test", "seg_test"], ["train", "test", "test"]),
        (["train", "test", "extra"], ["train", "test", None]),
        (["train", "final"], ["train", None]),
        (["test", "final"], ["test", None]),
        (["x_val", "y_test"], ["validation", "test"]),
        (["train_test", "test"], [None, "test"]),
    ],
)
def test_labelled_images_are_left_out_only_if_the_source_says_so(tops, splits):
    paths = _images(*(f"{top}/{c}" for top in tops for c in "ab"))
    with pytest.raises(DataError, match=r"^folder:DATA: .* may be classes or splits") as error:
        _found(paths)
    left_out = [top for top, split in zip(tops, splits, strict=True) if split is None]
    without = f" and leaves out {left_out[0]}" if left_out else ""
    assert str(error.value).endswith(f", splits:DATA for splits{without}")
    found, remarks = _found(paths, "splits")
    assert found == {
        f"{top}/{c}": split and (c, split)
        for top, split in zip(tops, splits, strict=True)
        for c in "ab"
    }
    assert remarks == [
        f"the images in {top} (4) are left out, because their folder is no split"
        for top in left_out
    ]


def test_predictions_in_class_folders_are_no_labels():
    found, (remark,) = _found(_images("train/a", "train/b", "test/a", "test/b", "pred/a", "pred/b"))
    assert found["pred/a"] is None
    assert remark == (
        "the images in pred (4) are left out, because their names say that they have no labels"
    )


@pytest.mark.parametrize(
    "folders",
    [
        ["plane", "train", "car"],
        ["train", "test", "bus"],
        ["train", "car"],
        ["train/steam", "car/red"],
        ["bullet_train", "freight_train", "test_tube"],
        ["freight_train", "test_tube"],
        ["freight_train/day", "freight_train/night", "test_tube/full"],
        ["pregnancy_test", "blood_test"],
        ["trains", "tests", "values"],
        ["trainer", "tester", "validator"],
        ["train_1", "train_2", "train_3"],
        ["training", "sleeping", "eating"],
        ["train_station", "bus_station"],
        ["train/1", "train/2", "plane/3", "car/4"],
        ["mask", "no_mask"],
        ["pred", "cat"],
        ["valid", "invalid"],
        ["valid/a", "invalid/b"],
        ["train/day", "train/night", "car/day", "car/night", "bus"],
        ["household_outdoor/a", "train/b"],
    ],
)
def test_classes_may_be_called_as_splits_are(folders):
    found, _ = _found(_images(*folders))
    assert found == {folder: (folder.partition("/")[0], "") for folder in folders}


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        # In the first two cases, each class has one folder for training and one for testing.
        (["cats_train", "cats_test", "dogs_train", "dogs_test"], "may be classes or splits"),
        (["a_train/x", "a_test/x", "b_train/x", "b_test/x"], "may be classes or splits"),
        (["old_train/a", "old_train/b", "new_test/a", "new_test/b"], "in new_test are the same"),
        (["train/a", "train/b", "new_test"], "in new_test are no sub-folders"),
        (["seg_train/a", "seg_train/b", "seg_test/c", "seg_test/d"], "in seg_test are other"),
        (["train_images/a", "train_images/b", "test_images/c", "test_images/d"], "other"),
        (["seg_train/a", "seg_test/a", "car/a"], "in car are the same"),
        (["train", "test"], "no class folders in the training part"),
        (["train", "val", "test"], "no class folders"),
        (["train/train", "test/test"], "no class folders"),
        (["train/images", "val/images"], "no class folders"),
        (["seg_train", "seg_test", "bus"], "no class folders"),
        (["train", "test/a", "test/b"], "no class folders"),
        (["val", "test"], "no class folders"),
        (["val/a", "val/b", "test"], "no class folders"),
        (["images", "masks"], "images and masks are kinds of files"),
        (["train/images", "train/labels", "val/images", "val/labels"], "kinds of files"),
    ],
)
def test_ambiguous_folders_are_refused_until_the_source_decides(folders, reason):
    paths = _images(*folders)
    with pytest.raises(DataError, match=f"^folder:DATA: .*{reason}.*classes:DATA") as error:
        _found(paths)
    assert "\n" not in str(error.value)
    found, _ = _found(paths, "classes")
    assert found == {folder: (folder.partition("/")[0], "") for folder in folders}


def test_the_source_may_say_that_folders_are_splits():
    paths = _images("old_train/a", "old_train/b", "new_test/a", "train/c", "car/a", "pred")
    found, remarks = _found(paths, "splits")
    assert found == {
        "old_train/a": ("a", "train"),
        "old_train/b": ("b", "train"),
        "new_test/a": ("a", "test"),
        "train/c": ("c", "train"),
        "car/a": None,
        "pred": None,
    }
    assert len(remarks) == 2
    with pytest.raises(DataError, match="no class folders in the training part"):
        _found(_images("cat", "dog"), "splits")


def test_classes_that_are_called_as_splits_are_remarked_on():
    for folders, named in (
        (["train", "test", "bus"], "test and train are"),
        (["train/a", "train/b", "bus"], "train is"),
        (["cat", "dog", "unlabelled"], "unlabelled is"),
    ):
        _, (remark,) = _found(_images(*folders))
        assert f", {named} taken for " in remark
        assert "splits:DATA" in remark
    assert _found(_images("plane", "train", "car"))[1] == []


@pytest.mark.parametrize(
    "below",
    [["day", "night"], ["train", "test"], ["images", "masks"], ["monday"]],
)
def test_the_same_folders_in_every_class_are_remarked_on(below):
    folders = [f"{top}/{name}" for top in ("ana", "ben", "carl") for name in below]
    found, (remark,) = _found(_images(*folders))
    assert {class_name for class_name, _ in found.values()} == {"ana", "ben", "carl"}
    assert remark.startswith("every class has the same sub-folders, ")
    for name in below:
        assert name in remark
    assert _found(_images(*folders, "dora"))[1] == []


def test_a_folder_images_in_every_class_needs_no_remark():
    assert _found(_images("n01/images", "n02/images"))[1] == []


def test_a_second_copy_of_the_data_in_itself_is_remarked_on():
    _, (remark,) = _found(_images("cat", "dog", "data/cat", "data/dog"))
    assert "the class data has sub-folders that are called as the classes cat and dog" in remark


@pytest.mark.parametrize(
    ("trained", "tested"),
    [("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("cat", "cat "), ("big cat", "BigCat")],
)
def test_one_class_may_be_spelt_in_two_ways_in_two_splits(trained, tested):
    found, (remark,) = _found(_images(f"train/{trained}", "train/dog", f"test/{tested}"))
    assert found[f"test/{tested}"] == (trained, "test")
    assert f"test/{tested} is taken for the class {trained}" in remark


def test_a_class_that_is_in_no_training_part_stays():
    found, _ = _found(_images("train/a", "train/b", "val/c", "Train/B"))
    assert found["val/c"] == ("c", "validation")
    assert found["Train/B"] == ("B", "train")


_NAMES = st.text(string.ascii_lowercase + "äé猫", min_size=2, max_size=8).filter(
    lambda name: not any(word in name for word in _SPLIT_OF_WORD)
)


def _says_nothing(name):
    """Returns whether a folder name contains no word for a split or for a kind of file."""
    return not any(word in _SPLIT_OF_WORD for word in _words(name))


@settings(deadline=None)
@given(
    classes=st.sets(_NAMES, min_size=2, max_size=6),
    affix=_NAMES,
    separator=st.sampled_from(["_", "-", " ", "."]),
    is_prefix=st.booleans(),
    upper=st.booleans(),
    splits=st.sets(st.sampled_from(["val", "valid", "validation", "test", "testing"]), min_size=1),
    is_doubled=st.booleans(),
)
def test_any_affix_that_the_splits_share_is_recognised(
    classes, affix, separator, is_prefix, upper, splits, is_doubled
):
    assume(_says_nothing(affix))
    assume(affix not in classes)

    def folder(split):
        words = [affix, split] if is_prefix else [split, affix]
        name = separator.join(words)
        return name.upper() if upper else name

    tops = [folder(split) for split in ("train", *splits)]
    paths = _images(*(f"{t}/{t}/{c}" if is_doubled else f"{t}/{c}" for t in tops for c in classes))
    layout = find_layout(paths, "folder:DATA")
    assert len(layout.parts) == len(tops)
    for path in paths:
        class_name, split = layout.classify(path)
        assert class_name == path.split("/")[-2]
        assert (
            split
            == _SPLIT_OF_WORD[
                re.sub(f"{affix}|{re.escape(separator)}", "", path.split("/")[0].lower())
            ]
        )


@settings(deadline=None)
@given(
    classes=st.sets(_NAMES, min_size=2, max_size=6),
    vehicle=st.sampled_from(["train", "Train", "test", "validation", "training", "bullet train"]),
)
def test_a_class_with_images_stays_a_class_whatever_it_is_called(classes, vehicle):
    assume(not any(name in ("images", "masks", "labels") for name in classes))
    paths = _images(*classes, vehicle)
    layout = find_layout(paths, "folder:DATA")
    assert layout.parts == {"": ""}
    assert {layout.classify(path) for path in paths} == {(c, "") for c in {*classes, vehicle}}
    assert layout.remarks == []


@settings(deadline=None)
@given(
    st.lists(
        st.lists(
            st.sampled_from(["train", "test", "seg_test", "a", "b", "pred"]), min_size=1, max_size=3
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_tree_is_read_or_refused_in_one_line(folders):
    paths = _images(*{"/".join(parts) for parts in folders})
    try:
        layout = find_layout(paths, "folder:DATA")
    except DataError as refused:
        message = str(refused)
        layout = find_layout(paths, "classes:DATA")
        # The pattern matches only a message of one line, because `.` matches no line break.
        assert re.fullmatch(".*classes:DATA.*", message)
    counted = sum(int(n) for r in layout.remarks for n in re.findall(r"\((\d+)\) are left out", r))
    stray = sum(
        layout.classify(path) is None
        and any(path.startswith(f"{folder}/") for folder in layout.parts if folder)
        for path in paths
    )
    assert counted + stray == sum(layout.classify(path) is None for path in paths)
