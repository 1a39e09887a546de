import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from cnn_jax.config.schema import check_value
from cnn_jax.data import decode
from cnn_jax.data.files import check_output, open_csv, open_folder
from cnn_jax.data.sources import absolute, open_source
from cnn_jax.system.errors import ConfigError, DataError


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
    encoded = source.read(source.keys[0])
    np.testing.assert_array_equal(decode.decode(encoded), np.full((4, 4, 3), 200))


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
def test_the_own_splits_of_a_folder_are_kept(tmp_path, validation):
    for path in ("train/b/1.png", "train/c/deep/1.png", f"{validation}/a/1.png", "test/c/1.png"):
        _picture(tmp_path / path)
    _picture(tmp_path / "masks" / "b" / "1.png")
    source = open_folder(tmp_path)
    # The data set has the classes of all splits, even if some splits lack some classes.
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


def test_test_images_outside_the_known_classes_are_left_out(tmp_path):
    for path in ("Training/a/1.png", "Training/b/1.png", "Testing/images/1.png"):
        _picture(tmp_path / path)
    source = open_folder(tmp_path)
    assert source.class_names == ["a", "b"]
    assert set(source.own_splits) == {"train"}
    assert source.ignored == {"outside the class folders": 1}
    assert source.remarks == [
        "the images in Testing (1) are left out, because they have no class folders"
    ]


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


@pytest.mark.parametrize(
    "name",
    [
        *("@eaDir", "@EADIR", "@tmp", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN"),
        *("$Recycle.Bin", "System Volume Information", "lost+found", "LOST.DIR", "FOUND.000"),
        *("__MACOSX", "Network Trash Folder", "Temporary Items", "~snapshot", "@__thumb"),
    ],
)
def test_folders_of_other_programs_are_left_out_and_counted(tmp_path, name):
    # The names of the folders above the opened folder have no effect.
    root = tmp_path / name / "data"
    _picture(root / "cat" / "a.png")
    _picture(root / "dog" / "a.png")
    _picture(root / "cat" / name / "a.png" / "SYNOPHOTO_THUMB_M.jpg")
    _picture(root / name / "a.png")
    source = open_folder(root)
    assert source.ids == ["cat/a.png", "dog/a.png"]
    assert source.ignored == {"thumbnails, bins and the like of other programs": 2}
    assert source.remarks == []


@pytest.mark.parametrize("name", [".Trash-1000", ".picasaoriginals", ".ipynb_checkpoints"])
def test_hidden_folders_of_other_programs_count_as_hidden(tmp_path, name):
    _picture(tmp_path / "cat" / "a.png")
    _picture(tmp_path / name / "a.png")
    source = open_folder(tmp_path)
    assert source.class_names == ["cat"]
    assert source.ignored == {"hidden": 1}


@pytest.mark.parametrize("name", ["recycled", "trash", "originals", "snapshot", "eaDir"])
def test_classes_may_be_called_much_like_folders_of_other_programs(tmp_path, name):
    _picture(tmp_path / name / "a.png")
    assert open_folder(tmp_path).class_names == [name]


@pytest.mark.parametrize(
    "names",
    [
        ("lock", "heartbeat.json"),
        ("config.json", "metrics.jsonl"),
        ("bundle.json", "weights.safetensors"),
        ("metrics.json", "predictions.csv"),
        ("explanations.json",),
        ("inspection.json",),
        ("study.json", "trials.csv"),
    ],
)
@pytest.mark.parametrize("place", ["out", "deep/out", "cat/out"])
def test_folders_that_this_project_wrote_are_left_out_and_counted(tmp_path, names, place):
    _picture(tmp_path / "cat" / "a.png")
    _picture(tmp_path / "dog" / "a.png")
    _picture(tmp_path / place / "examples" / "a.png")
    for name in names:
        (tmp_path / place / name).touch()
    source = open_folder(tmp_path)
    assert source.ids == ["cat/a.png", "dog/a.png"]
    assert source.ignored == {"folders that cnn_jax wrote": 1}
    assert source.remarks == []
    # An output folder is read if the user opens this folder itself.
    assert open_folder(tmp_path / place).ids == ["examples/a.png"]


def test_a_run_in_a_class_folder_does_not_hide_the_class(tmp_path):
    _picture(tmp_path / "cat" / "a.png")
    _picture(tmp_path / "dog" / "a.png")
    _picture(tmp_path / "cat" / "report" / "chart.png")
    names = ("config.json", "metrics.jsonl", "report/metrics.json", "report/predictions.csv")
    for name in names:
        (tmp_path / "cat" / name).touch()
    source = open_folder(tmp_path)
    assert source.ids == ["cat/a.png", "dog/a.png"]
    assert source.ignored == {"folders that cnn_jax wrote": 1, "not images": 2}


def test_files_of_other_names_make_no_folder_of_this_project(tmp_path):
    for name in ("config.json", "metrics.json", "index.html", "lock", "bundle.json"):
        _picture(tmp_path / name[:3] / "a.png")
        (tmp_path / name[:3] / name).touch()
    assert open_folder(tmp_path).class_names == ["bun", "con", "ind", "loc", "met"]


def test_an_output_folder_must_not_contain_images_of_the_data(tmp_path):
    data = tmp_path / "data"
    _picture(data / "cat" / "deep" / "a.png")
    _picture(data / "maps" / "a.png")
    (data / "maps" / "explanations.json").touch()
    (data / "link").symlink_to("cat")
    for folder in (data, data / "cat", data / "cat" / "deep", data / "cat" / "..", data / "link"):
        with pytest.raises(ConfigError, match=r"--output: .* holds images of the data"):
            check_output("--output", folder, data)
    for folder in (tmp_path, tmp_path / "data2", data / "new", data / "cat" / "new", data / "maps"):
        check_output("--output", folder, data)


def test_paths_do_not_contain_the_folder_of_their_split(tmp_path):
    for path in ("seg_train/seg_train/a/1.png", "seg_train/seg_train/b/1.png", "seg_test/a/1.png"):
        _picture(tmp_path / path)
    source = open_folder(tmp_path)
    assert source.paths == ["a/1.png", "a/1.png", "b/1.png"]
    assert source.ids[0] == "seg_test/a/1.png"
    assert source.select(np.array([2])).paths == ["b/1.png"]


def test_another_spelling_in_a_split_is_the_same_class(tmp_path):
    for path in ("train/Caf\u00e9/1.png", "train/dog/1.png", "test/cafe\u0301/1.png"):
        _picture(tmp_path / path)
    (tmp_path / "test" / "cat").mkdir()
    source = open_folder(tmp_path)
    assert source.class_names == ["Caf\u00e9", "dog"]
    assert [source.class_names[label] for label in source.labels] == [
        "Caf\u00e9",
        "Caf\u00e9",
        "dog",
    ]
    assert len(source.remarks) == 2
    assert "the folder test/cat has no images" in source.remarks[1]


def test_the_form_of_the_source_decides_what_its_folders_are(tmp_path):
    for path in ("old_train/a/1.png", "old_train/b/1.png", "new_test/a/1.png"):
        _picture(tmp_path / path)
    with pytest.raises(DataError, match="new_test and old_train may be classes or splits"):
        open_source(f"folder:{tmp_path}")
    assert open_source(f"classes:{tmp_path}").class_names == ["new_test", "old_train"]
    source = open_source(f"splits:{tmp_path}")
    assert source.class_names == ["a", "b"]
    assert source.own_splits == ["test", "train", "train"]
    assert source.name == f"splits:{tmp_path}"


def test_a_folder_without_classes_is_told_of_its_table_or_archive(tmp_path):
    (tmp_path / "data.tar.gz").touch()
    with pytest.raises(
        DataError, match=r"no images in it; data\.tar\.gz is an archive to be extracted"
    ):
        open_folder(tmp_path)
    _picture(tmp_path / "1.png")
    (tmp_path / "Annotations.csv").touch()
    with pytest.raises(DataError, match=f"no sub-folders; csv:{tmp_path}/Annotations.csv takes"):
        open_folder(tmp_path)


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
    assert decode.decode(source.read(source.keys[2])).shape == (4, 4, 3)
    with pytest.raises(FileNotFoundError):
        source.read(source.keys[3])


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
    assert source.read(source.keys[0])


def test_a_table_may_lead_outside_if_that_is_allowed(tmp_path):
    _picture(tmp_path / "a.png")
    table = tmp_path / "tables" / "t.csv"
    table.parent.mkdir()
    _write_csv(table, f"path,label\n../a.png,x\n{tmp_path}/a.png,y\n")
    source = open_csv(table, allow_outside=True)
    assert source.read(source.keys[0]) == source.read(source.keys[1])


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
        source.read(source.keys[0])


@pytest.mark.parametrize("name", ["", "folder:", "tfds:", "csv:", "shapes:0", "shapes:x", "/data"])
def test_a_source_name_of_unknown_form_is_a_configuration_error(name):
    with pytest.raises(ConfigError, match="a source must be"):
        open_source(name)


@pytest.mark.parametrize("make_error", [open_source, lambda name: check_value("data.source", name)])
def test_the_error_for_a_bare_path_suggests_a_source(make_error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "labels.CSV").touch()
    meant = {"photos": "folder:photos", "/nope": "folder:/nope", "labels.CSV": "csv:labels.CSV"}
    for name, source in meant.items():
        with pytest.raises(ConfigError, match=re.escape(f"got {name!r}; did you mean {source}?")):
            make_error(name)
    with pytest.raises(ConfigError, match=r"got 'nothing'$"):
        make_error("nothing")


def test_images_without_class_folders_are_not_counted_as_outside(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    (tmp_path / "notes.txt").touch()
    message = r"no sub-folders \(left out: 1 file that is not an image\)$"
    with pytest.raises(DataError, match=message):
        open_folder(tmp_path)


def test_shapes_can_be_shortened():
    source = open_source("shapes:20")
    assert source.name == "shapes:20"
    assert len(source) == 20
    assert len(source.class_names) == 10


def test_the_absolute_name_is_that_of_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("folder:a") == f"folder:{tmp_path}/a"
    assert absolute("classes:a") == f"classes:{tmp_path}/a"
    assert absolute("csv:a/t.csv") == f"csv:{tmp_path}/a/t.csv"
    assert absolute("tfds:cifar10") == "tfds:cifar10"
