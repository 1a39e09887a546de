import dataclasses

import numpy as np
from PIL import Image

from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.files import open_folder
from cnn_jax.data.findings import too_few_classes
from cnn_jax.data.splits import Division
from cnn_jax.preprocessing import Preprocessing


def _find(folder, **options):
    options = {"max_unreadable": 1.0} | options
    dataset = open_dataset(
        open_folder(folder), Division(), Preprocessing(image_size=(8, 8)), **options
    )
    return dataset.findings


def _write(folder, name, seed, *, exif=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)


def test_nothing_to_say_is_said_in_two_lines(tmp_path):
    for i in range(60):
        _write(tmp_path, f"{'ab'[i % 2]}/{i}.png", i)
    findings = _find(tmp_path)
    assert findings.summary() == [
        "all readable, none turned by EXIF, no exact copies",
        "largest class 1.0 times the smallest; ignored: nothing",
    ]
    assert findings.warnings() == []


def test_what_endangers_the_result_is_a_warning_that_names_the_fix(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(40):
        _write(tmp_path, f"train/a/{i}.png", i, exif=exif if i < 2 else None)
    for i in range(4):
        _write(tmp_path, f"train/b/{i}.png", 100 + i)
        _write(tmp_path, f"test/b/{i}.png", 200 + i)
    _write(tmp_path, "test/b/copy.png", 5)  # Of another class, in another split.
    _write(tmp_path, "train/b/copy of 0.png", 100)
    _write(tmp_path, "train/rare/0.png", 300)
    (tmp_path / "train" / "a" / "bad\n.png").write_bytes(b"")
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("x")

    findings = _find(tmp_path)
    assert findings.summary() == [
        "1 unreadable and left out, 2 turned by EXIF, 2 exact copies (1 set with different labels)",
        "largest class 40.0 times the smallest; ignored: 1 not images",
    ]
    warnings = "\n".join(findings.warnings())
    for expected in (
        "the folder train/empty has no images, so there is no such class; add some, or remove",
        "1 image cannot be read and is left out: train/a/bad\\n.png is empty; mend or remove",
        "1 set of equal images with different labels, such as test/b/copy.png, train/a/5.png: "
        "correct or remove them",
        "1 set of equal images in different splits, such as test/b/copy.png, train/a/5.png, so "
        "that figures are too good: remove the copies",
        "fewer than three images of rare: not every split can have one; add images or remove",
        "no images of a in test: they count 0 there; add some",
        "the largest class has 40 times the images of the smallest: train.balance=",
    ):
        assert expected in warnings
    assert len(findings.warnings()) == 7


def test_equal_images_that_the_division_keeps_together_are_no_leak(tmp_path):
    for i in range(60):
        _write(tmp_path, f"{'ab'[i % 2]}/{i}.png", i // 2 * 2 if i > 40 else i)
    findings = _find(tmp_path)
    assert len(findings.conflicts) == len(findings.copies) > 0
    assert findings.leaks == []


def test_groups_that_the_own_splits_tear_apart_are_a_warning(tmp_path):
    for i in range(40):
        _write(tmp_path, f"train/{'ab'[i % 2]}/{i // 4}_{i}.png", i)
        _write(tmp_path, f"test/{'ab'[i % 2]}/{i // 4}_{i}.png", 100 + i)
    division = Division(group="{class}/{track}")
    preprocessing = Preprocessing(image_size=(8, 8))
    findings = open_dataset(open_folder(tmp_path), division, preprocessing).findings
    assert any(
        "20 groups in several of the data's own splits, such as" in warning
        for warning in findings.warnings()
    )
    anew = dataclasses.replace(division, keep_splits=False)
    findings = open_dataset(open_folder(tmp_path), anew, preprocessing).findings
    assert not any("own splits" in warning for warning in findings.warnings())


def test_equal_images_that_tie_groups_together_are_named(tmp_path):
    for i in range(40):
        _write(tmp_path, f"{'ab'[i % 2]}/{i // 2}_black.png", 0)
        _write(tmp_path, f"{'ab'[i % 2]}/{i // 2}_{i}.png", 1 + i)
    dataset = open_dataset(
        open_folder(tmp_path), Division(group="{class}/{video}"), Preprocessing((8, 8))
    )
    said = "1 set of equal images, such as a/0_black.png, b/0_black.png, "
    assert any(warning.startswith(said) for warning in dataset.findings.warnings())
    reason = dataset.findings.untrainable()
    assert reason is not None
    assert "ties 40 groups together" in reason


def test_what_training_would_refuse_is_said_before(tmp_path):
    for i in range(8):
        _write(tmp_path, f"only/{i}.png", i)
    warnings = _find(tmp_path).warnings()
    assert warnings[0].startswith("training would refuse this: there is one class, only")


def test_names_of_folders_are_printable(tmp_path):
    for i in range(8):
        _write(tmp_path, f"{'ab'[i % 2]}/{i}.png", i)
    (tmp_path / "e\x1b[31m\nX").mkdir()
    assert "the folder e\\x1b[31m\\nX has no images" in _find(tmp_path).warnings()[0]


def test_shares_that_chance_made_uneven_are_a_warning(tmp_path):
    for i in range(80):
        _write(tmp_path, f"{'ab'[i % 2]}/{i}.png", i)
    listing = open_folder(tmp_path)

    def warnings(**options):
        preprocessing = Preprocessing(image_size=(8, 8))
        return open_dataset(listing, Division(**options), preprocessing).findings.warnings()

    said = {seed: warnings(seed=seed) for seed in range(12)}
    assert any(said.values())
    assert not all(said.values())
    for seed, found in said.items():
        assert all("data.stratify=exact divides evenly" in warning for warning in found)
        assert warnings(seed=seed, rule="exact") == []


def test_a_single_class_with_sub_folders_names_the_folder_that_is_meant(tmp_path):
    for name in ("cat", "dog"):
        _write(tmp_path, f"PetImages/{name}/0.png", 0)
    reason = too_few_classes(open_folder(tmp_path))
    assert reason is not None
    assert reason.startswith("there is one class, PetImages, and training needs two or more: the ")
    assert reason.endswith(
        f"folder:{tmp_path}/PetImages takes its sub-folders for classes, cat, dog"
    )
    assert too_few_classes(open_folder(tmp_path / "PetImages")) is None
