import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from cnn_jax.data import decode
from cnn_jax.data.files import open_csv, open_folder
from cnn_jax.data.sources import absolute, open_source
from cnn_jax.errors import ConfigError, DataError


def _picture(path: pathlib.Path, level: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (level,) * 3).save(path)


def test_a_folder_has_its_sub_folders_as_classes(tmp_path):
    _picture(tmp_path / "dog" / "b.PNG")
    _picture(tmp_path / "dog" / "deep" / "er" / "a.jpg")
    _picture(tmp_path / "cat" / "ü 猫.png", 200)
    _picture(tmp_path / ".hidden" / "x.png")
    _picture(tmp_path / "dog" / ".thumbnails" / "x.png")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "README").write_text("no class")
    _picture(tmp_path / "stray.png")

    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ["cat", "dog"]
    assert source.ids == ["cat/ü 猫.png", "dog/b.PNG", "dog/deep/er/a.jpg"]
    np.testing.assert_array_equal(source.labels, [0, 1, 1])
    assert source.ignored == {"hidden": 2, "not images": 2, "outside the class folders": 1}
    assert source.remarks == []
    example = source[0]
    assert example["label"] == 0
    assert example["id"] == "cat/ü 猫.png"
    np.testing.assert_array_equal(decode.decode(example["image"]), np.full((4, 4, 3), 200))


def test_the_content_decides_what_is_an_image(tmp_path):
    _picture(tmp_path / "cat" / "a.png")
    os.rename(tmp_path / "cat" / "a.png", tmp_path / "cat" / "a")  # noqa: PTH104
    _picture(tmp_path / "cat" / "b.webp")
    os.rename(tmp_path / "cat" / "b.webp", tmp_path / "cat" / "b.txt")  # noqa: PTH104
    (tmp_path / "cat" / "c.json").write_text("{}")
    assert open_folder(tmp_path).ids == ["cat/a", "cat/b.txt"]


def test_folders_that_are_no_data_sets_are_explained(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="there are no images in it"):
        open_folder(tmp_path)
    _picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="it has images, but no sub-folders"):
        open_folder(tmp_path)


def test_a_class_without_images_is_left_out_and_said(tmp_path):
    _picture(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    source = open_folder(tmp_path)
    assert source.class_names == ["cat"]
    assert "the folder dog has no images" in source.remarks[0]


@pytest.mark.parametrize("validation", ["val", "valid", "Validation"])
def test_a_folder_that_is_divided_already_is_used_as_it_is(tmp_path, validation):
    for path in ("train/b/1.png", "train/c/deep/1.png", f"{validation}/a/1.png", "test/c/1.png"):
        _picture(tmp_path / path)
    _picture(tmp_path / "masks" / "b" / "1.png")
    source = open_folder(tmp_path)
    # The union of the parts' classes, whichever part lacks some.
    assert source.class_names == ["a", "b", "c"]
    found = dict(zip(source.ids, zip(source.labels, source.own_splits, strict=True), strict=True))
    assert found == {
        "train/b/1.png": (1, "train"),
        "train/c/deep/1.png": (2, "train"),
        f"{validation}/a/1.png": (0, "validation"),
        "test/c/1.png": (2, "test"),
    }
    assert source.ignored == {"outside the class folders": 1}


def test_classes_may_be_called_train_and_test(tmp_path):
    for path in ("train/1.png", "test/1.png", "bus/1.png"):
        _picture(tmp_path / path)
    source = open_folder(tmp_path)
    assert source.class_names == ["bus", "test", "train"]
    assert set(source.own_splits) == {""}


def test_test_images_without_classes_are_no_part(tmp_path):
    for path in ("train/a/1.png", "val/a/1.png", "test/1.png"):
        _picture(tmp_path / path)
    source = open_folder(tmp_path)
    assert sorted(source.own_splits) == ["train", "validation"]
    assert source.ignored == {"outside the class folders": 1}


def test_test_images_in_a_folder_that_is_no_class_are_no_part(tmp_path):
    for path in ("Training/a/1.png", "Training/b/1.png", "Testing/images/1.png"):
        _picture(tmp_path / path)
    source = open_folder(tmp_path)
    assert source.class_names == ["a", "b"]
    assert set(source.own_splits) == {"train"}
    assert source.ignored == {"outside the class folders": 1}
    assert "the folder Testing has a single sub-folder, which is no class" in source.remarks[0]


def test_names_that_a_person_would_read_as_one_are_remarked_on(tmp_path):
    for name in ("cat", "Cat ", "caf\u00e9", "cafe\u0301", "dog"):
        _picture(tmp_path / name / "1.png")
    source = open_folder(tmp_path)
    assert len(source.class_names) == 5
    remarks = sorted(source.remarks)
    assert len(remarks) == 2
    assert remarks[0].startswith("the classes Cat  and cat differ only in case")
    assert remarks[1].startswith("the classes cafe\u0301 and caf\u00e9 differ")


def test_images_of_other_formats_are_counted_and_said(tmp_path):
    _picture(tmp_path / "cat" / "a.png")
    for name in ("b.HEIC", "c.avif", "notes.txt"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    source = open_folder(tmp_path)
    assert source.ignored == {"images of other formats": 2, "not images": 1}
    assert "2 images are of formats that are not read" in source.remarks[0]


@pytest.mark.parametrize(
    ("paths", "own_splits"),
    [
        (["train/a/1.png", "train/b/1.png", "test/1.png", "test/2.png"], {"train"}),
        (["train/a/1.png", "train/montage.png", "test/a/1.png"], {"train", "test"}),
        (["val/a/1.png", "test/a/1.png"], {"validation", "test"}),
        (["test/a/1.png"], {"test"}),
        (["test/a/1.png", "other/1.png"], {""}),
        (["train/deep/1.png", "bus/1.png"], {""}),
        (["training/a/1.png", "testing/a/1.png"], {"train", "test"}),
    ],
)
def test_divided_or_not(tmp_path, paths, own_splits):
    for path in paths:
        _picture(tmp_path / path)
    assert set(open_folder(tmp_path).own_splits) == own_splits


def test_a_link_is_followed_once_and_not_out_of_the_folder(tmp_path):
    root = tmp_path / "data"
    _picture(root / "cat" / "a.png")
    _picture(root / ".store" / "b.png")
    _picture(tmp_path / "elsewhere" / "c.png")
    (root / "cat" / "again.png").symlink_to("a.png")
    (root / "cat" / "stored.png").symlink_to("../.store/b.png")
    (root / "cat" / "stored too.png").symlink_to("../.store/b.png")
    (root / "cat" / "nowhere.png").symlink_to("x.png")
    (root / "cat" / "loop").symlink_to("../cat")
    (root / "cat" / "itself").symlink_to("itself")
    (root / "cat" / "out.png").symlink_to("../../elsewhere/c.png")
    (root / "dog").symlink_to("../elsewhere")
    source = open_folder(root)
    assert source.ids == ["cat/a.png", "cat/stored too.png"]
    assert source.ignored == {
        "hidden": 1,
        "links to what is there already": 3,
        "links that lead nowhere": 2,
        "links out of the folder": 2,
    }
    assert "2 links lead out of the folder" in source.remarks[0]
    _picture(tmp_path / "elsewhere" / "d.png")
    source = open_folder(root, allow_outside=True)
    assert source.ids == ["cat/a.png", "cat/out.png", "cat/stored too.png", "dog/d.png"]
    assert source.ignored["links to what is there already"] == 4


def test_a_link_to_the_data_set_itself_is_followed(tmp_path):
    _picture(tmp_path / "data" / "cat" / "a.png")
    (tmp_path / "link").symlink_to("data")
    assert open_folder(tmp_path / "link").ids == ["cat/a.png"]


def _write_csv(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_names_paths_labels_and_splits(tmp_path):
    for name in ("b.png", "ü 猫, x.png", "sub/a.png"):
        _picture(tmp_path / name)
    _write_csv(
        tmp_path / "t.csv",
        '\ufeffpath,label,split\nb.png,dog,\n"ü 猫, x.png", cat ,Val\nsub/a.png,dog,test\n'
        "gone.png,cat,train\n",
    )
    source = open_source(f"csv:{tmp_path / 't.csv'}")
    assert source.class_names == ["cat", "dog"]
    assert source.ids == ["b.png", "ü 猫, x.png", "sub/a.png", "gone.png"]
    np.testing.assert_array_equal(source.labels, [1, 0, 1, 0])
    assert source.own_splits == ["", "validation", "test", "train"]
    assert decode.decode(source[2]["image"]).shape == (4, 4, 3)
    with pytest.raises(FileNotFoundError):
        source[3]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must name the columns path and label.*it has nothing"),
        ("file,class\na,b\n", "it has file, class"),
        ("path,label\n", "has no rows"),
        ("path,label\na.png\n", "line 2 has no label"),
        ("path,label\n,x\n", "line 2 has no path"),
        ("path,label\na,x\nb,x\na,y\n", "line 4 has a again, as line 2"),
        ("path,label\nd/a,x\nb,x\n./d//a,y\n", "line 4 has d/a again, as line 2"),
        ("path,label\na,salmon, smoked\n", "line 2 has more than 2 columns; a comma within"),
        ("path,label,split\na,x,holdout\n", "line 2: the split must be one of"),
        ("path,label\n../a,x\n", "line 2: ../a lies outside the table's folder"),
        ("path,label\n/etc/passwd,x\n", "/etc/passwd lies outside"),
    ],
)
def test_a_table_that_is_wrong_is_explained(tmp_path, text, reason):
    with pytest.raises(DataError, match=reason):
        open_csv(_write_csv(tmp_path / "t.csv", text))


def test_spaces_and_absolute_paths_in_a_table_do_not_count(tmp_path):
    _picture(tmp_path / "d" / "a.png")
    text = f"path , label\n{tmp_path}/d/a.png ,x \n"
    source = open_csv(_write_csv(tmp_path / "t.csv", text))
    assert (source.ids, source.class_names) == (["d/a.png"], ["x"])
    assert source[0]["image"]


def test_a_table_may_lead_outside_if_that_is_allowed(tmp_path):
    _picture(tmp_path / "a.png")
    table = tmp_path / "tables" / "t.csv"
    table.parent.mkdir()
    _write_csv(table, f"path,label\n../a.png,x\n{tmp_path}/a.png,y\n")
    source = open_csv(table, allow_outside=True)
    assert source[0]["image"] == source[1]["image"]


def test_what_is_no_table_is_explained(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        open_csv(tmp_path / "none.csv")
    (tmp_path / "x.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
    with pytest.raises(DataError, match="not a CSV file in UTF-8"):
        open_csv(tmp_path / "x.csv")


def test_a_pipe_in_a_table_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    source = open_csv(_write_csv(tmp_path / "t.csv", "path,label\npipe.png,x\n"))
    with pytest.raises(OSError, match="is not a regular file"):
        source[0]


@pytest.mark.parametrize("name", ["", "folder:", "tfds:", "csv:", "shapes:0", "shapes:x", "/data"])
def test_a_name_of_no_known_form_is_a_configuration_error(name):
    with pytest.raises(ConfigError, match="a source must be"):
        open_source(name)


def test_shapes_can_be_shortened():
    source = open_source("shapes:20")
    assert source.name == "shapes:20"
    assert len(source) == 20
    assert len(source.class_names) == 10


def test_the_absolute_name_is_that_of_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("folder:a") == f"folder:{tmp_path}/a"
    assert absolute("csv:a/t.csv") == f"csv:{tmp_path}/a/t.csv"
    assert absolute("tfds:cifar10") == "tfds:cifar10"
