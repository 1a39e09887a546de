import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.files import open_folder
from cnn_jax.data.findings import range_warnings, too_few_classes, value_ranges
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.scan import examine
from cnn_jax.data.splits import Division
from cnn_jax.system.errors import DataError


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
        "all images are readable; none is rotated by EXIF; no exact copies",
        "the largest class is 1.0 times the smallest; nothing is ignored",
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
    # This file is a copy of train/a/5.png, so the class and the split of the two files differ.
    _write(tmp_path, "test/b/copy.png", 5)
    _write(tmp_path, "train/b/copy of 0.png", 100)
    _write(tmp_path, "train/rare/0.png", 300)
    (tmp_path / "train" / "a" / "bad\n.png").write_bytes(b"")
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("x")

    findings = _find(tmp_path)
    assert findings.summary() == [
        "1 unreadable image is left out; 2 images are rotated by EXIF; 2 exact copies (1 set with "
        "different labels)",
        "the largest class is 40.0 times the smallest; ignored: 1 file that is not an image",
    ]
    warnings = "\n".join(findings.warnings())
    for expected in (
        "the folder train/empty has no images, so there is no such class; add some, or remove",
        "1 image cannot be read and is left out: train/a/bad\\n.png is empty; mend or remove",
        "1 set of equal images with different labels, such as test/b/copy.png, train/a/5.png: "
        "correct or remove them",
        "1 set of equal images in different splits, such as test/b/copy.png, train/a/5.png, so "
        "the metrics are too good: remove the copies",
        "fewer than three images of rare: not every split can have one; add images or remove",
        "no images of a in test: they count 0 there; add some",
        "the largest class has 40 times the images of the smallest: rare has 1 image, too few to",
    ):
        assert expected in warnings
    assert len(findings.warnings()) == 7


def test_balancing_is_advised_only_for_classes_with_enough_images(tmp_path):
    for size, advice in ((20, "train.balance=sampling"), (19, "b has 19 images, too few to learn")):
        root = tmp_path / str(size)
        for i in range(200 + size):
            _write(root, f"{'a' if i < 200 else 'b'}/{i}.png", i)
        (warning,) = [text for text in _find(root).warnings() if "the largest class" in text]
        assert advice in warning


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


def test_the_error_for_a_single_class_suggests_its_folder(tmp_path):
    for name in ("cat", "dog"):
        _write(tmp_path, f"PetImages/{name}/0.png", 0)
    reason = too_few_classes(open_folder(tmp_path))
    assert reason is not None
    assert reason.startswith("there is one class, PetImages, and training needs two or more: the ")
    assert reason.endswith(
        f"folder:{tmp_path}/PetImages takes its sub-folders for classes, cat, dog"
    )
    assert too_few_classes(open_folder(tmp_path / "PetImages")) is None


def _save_values(folder, high, dtype, count=20, file_format="png"):
    """Saves images of two classes with pixel values from 0 to `high`."""
    for i in range(count):
        values = np.random.default_rng(i).random((6, 9)) * high
        values.flat[:2] = 0, high
        path = folder / "ab"[i % 2] / f"{i}.{file_format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(dtype)).save(path)


def _value_warnings(folder, **preprocessing):
    preprocessing = Preprocessing(image_size=(8, 8), **preprocessing)
    dataset = open_dataset(
        open_folder(folder), Division(rule="exact"), preprocessing, max_unreadable=1.0
    )
    return [w for w in dataset.findings.warnings() if "-bit" in w or "float" in w]


@pytest.mark.parametrize(
    ("high", "dtype", "warning"),
    [
        (4095, np.uint16, "20 of 20 16-bit images have no value above 4095 where 65535 is white"),
        (16383, np.uint16, "--config.data.white_level=16383 makes 16383 white"),
        (16384, np.uint16, None),
        (65535, np.uint16, None),
        (1, np.uint8, "--config.data.mean=0.5,0.5,0.5 --config.data.std=0.5,0.5,0.5 spreads"),
        (15, np.uint8, "20 of 20 8-bit images have no value above 15 where 255 is white"),
        (63, np.uint8, "--config.data.mean=31.5,31.5,31.5"),
        (64, np.uint8, None),
    ],
)
def test_dark_images_are_a_warning_with_a_white_level(tmp_path, high, dtype, warning):
    _save_values(tmp_path, high, dtype)
    found = _value_warnings(tmp_path)
    assert len(found) == (warning is not None)
    assert (warning or "") in "".join(found)


def test_what_the_warnings_advise_ends_them(tmp_path):
    _save_values(tmp_path / "16", 4095, np.uint16)
    assert _value_warnings(tmp_path / "16", white_level=4095.0) == []
    _save_values(tmp_path / "8", 1, np.uint8)
    half = (0.5, 0.5, 0.5)
    assert _value_warnings(tmp_path / "8", mean=half, std=half) == []


def test_a_few_dark_or_a_few_bright_images_change_nothing(tmp_path):
    _save_values(tmp_path, 40, np.uint8, count=10)
    (tmp_path / "a").rename(tmp_path / "dark")
    _save_values(tmp_path, 255, np.uint8, count=20)
    assert _value_warnings(tmp_path) == []
    _save_values(tmp_path / "16", 4095, np.uint16)
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "16" / "a" / "saturated.png")
    assert "20 of 21 16-bit images have no value above 4095" in _value_warnings(tmp_path / "16")[0]


def test_values_above_white_are_a_warning(tmp_path):
    _save_values(tmp_path, 4095, np.uint16)
    (warning,) = _value_warnings(tmp_path, white_level=1.0)
    assert "20 of 20 16-bit images have values above 1, up to 4095, which all become" in warning
    assert "--config.data.white_level=4095 keeps them apart" in warning


def test_floats_without_a_white_level_are_refused_with_that_of_all(tmp_path):
    _save_values(tmp_path, 0.2, np.float32, file_format="tif")
    _save_values(tmp_path, 700, np.float32, count=4, file_format="tiff")
    with pytest.raises(DataError) as error:
        _find(tmp_path, max_unreadable=0.5)
    assert "24 float images have values from 0 to 700, none of which is known" in str(error.value)
    assert "cannot suit" not in str(error.value)
    assert "set --config.data.white_level=1023, or" in str(error.value)
    assert _value_warnings(tmp_path, white_level=700.0) == []


def test_values_that_resizing_made_exceed_white_are_no_warning(tmp_path):
    _save_values(tmp_path, 1.05, np.float32, file_format="tif")
    assert _value_warnings(tmp_path, white_level=1.0) == []
    (warning,) = _value_warnings(tmp_path, white_level=0.9)
    assert "--config.data.white_level=1 keeps" in warning


def test_images_darker_than_the_likely_white_level_get_their_own(tmp_path):
    _save_values(tmp_path, 0.125, np.float32, file_format="tif")
    (warning,) = _value_warnings(tmp_path, white_level=1.0)
    assert "--config.data.white_level=0.125 makes 0.125 white" in warning
    assert _value_warnings(tmp_path, white_level=0.125) == []


@pytest.mark.parametrize(
    ("kinds", "white_level", "named"),
    [
        # `kinds` has the highest value, the dtype and the format of each kind of file.
        ([(4095, np.uint16, "png"), (1, np.float32, "tif")], 0, "4095 .* 16-bit .* 1 for .* float"),
        ([(4095, np.uint16, "png"), (1, np.float32, "tif")], 1, "4095 .* 16-bit .* 1 for .* float"),
        ([(4095, np.uint16, "png"), (1, np.float32, "tif")], 4095, "4095 .* 1 for the float"),
        ([(65535, np.uint16, "png"), (1, np.float32, "tif")], 0, "65535 .* 1 for the float"),
        ([(4095, np.int32, "tif"), (1, np.float32, "tiff")], 0, "4095 .* signed .* 1 for"),
        ([(4095, np.uint16, "png"), (4095, np.float32, "tif")], 0, None),
        ([(4095, np.uint16, "png"), (4095, np.float32, "tif")], 4095, None),
        ([(255, np.uint8, "bmp"), (1, np.float32, "tif")], 0, None),
        ([(255, np.uint8, "bmp"), (65535, np.uint16, "png")], 0, None),
    ],
)
def test_kinds_that_need_different_white_levels_must_be_converted(
    tmp_path, kinds, white_level, named
):
    for high, dtype, file_format in kinds:
        _save_values(tmp_path, high, dtype, file_format=file_format)
    preprocessing = Preprocessing(image_size=(8, 8), white_level=white_level)
    records = [
        examine(path.read_bytes(), preprocessing)[0] for path in sorted(tmp_path.glob("*/*"))
    ]
    found = [one for one in range_warnings(value_ranges(records, preprocessing)) if "suit" in one]
    assert len(found) == (named is not None)
    if named:
        assert re.search(rf"one data.white_level cannot suit .*\({named}.*\): convert", found[0])
        assert "\n" not in found[0]


def test_a_refusal_says_that_no_white_level_suits_all(tmp_path):
    _save_values(tmp_path, 4095, np.int32, file_format="tif")
    _save_values(tmp_path, 1, np.float32, file_format="tiff")
    with pytest.raises(DataError, match="cannot suit all images") as error:
        _find(tmp_path)
    assert "\n" not in str(error.value)


def test_other_formats_under_wrong_names_are_counted(tmp_path):
    _save_values(tmp_path, 255, np.uint8)
    for i in range(3):
        (tmp_path / "a" / f"phone{i}.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(i))
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "new.png", "AVIF")
    warnings = "\n".join(_find(tmp_path).warnings())
    assert "4 images cannot be read and are left out: a/phone0.jpg is HEIC, which is" in warnings
    assert (
        "4 images of formats that are not read have the names of others (3 HEIC, 1 AVIF): convert"
    ) in warnings
