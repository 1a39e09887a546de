import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from cnn_jax import inspect
from cnn_jax.data.files import is_output
from cnn_jax.data.sources import open_source
from cnn_jax.data.splits import Division
from cnn_jax.data.survey import survey
from cnn_jax.system.errors import ConfigError


def _run(*arguments):
    command = [sys.executable, "-m", "cnn_jax.inspect", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def _image(path, seed, size=(9, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(noise).resize(size).save(path)


def test_the_defaults_are_those_of_training():
    from configs import default

    config = default.get_config()
    flags = inspect.parser().parse_args(["--source=shapes"])
    assert flags.seed == config.seed
    assert flags.split == config.data.split
    assert flags.stratify == config.data.stratify
    assert flags.group == config.data.group
    assert flags.keep_splits == config.data.keep_splits
    assert flags.max_pixels == config.data.max_pixels
    assert flags.allow_outside == config.data.allow_outside
    assert Division() == Division.from_config(config.data, config.seed)


def test_json_has_the_numbers_of_the_library(image_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inspect.main([f"--source=folder:{image_folder}", "--json", "--seed=5", "--split=0.5,0.3,0.2"])
    result = json.loads(capsys.readouterr().out)
    division = Division((0.5, 0.3, 0.2), seed=5)
    assert result == inspect.inspect_source(f"folder:{image_folder}", division).to_dict()
    assert result["images"] == 60
    assert result["division"]["seed"] == 5
    assert not list(tmp_path.iterdir()), "it wrote something"


def test_every_flag_has_an_effect(image_folder, tmp_path, capsys):
    root = tmp_path / "data"
    for split in ("train", "test"):
        for i in range(6):
            _image(root / split / "a" / f"{i // 2}_{i}.png", i)
    _image(root / "train" / "a" / "9_9.png", 9, (20, 20))
    (root / "train" / "red").symlink_to(image_folder / "red")
    flags = (
        "--json --stratify=exact --group={class}/{track} --no-keep_splits --max_pixels=399 "
        "--allow_outside --distance=7"
    )
    inspect.main([f"--source=folder:{root}", *flags.split()])
    result = json.loads(capsys.readouterr().out)
    assert result["division"] == {
        "fractions": [0.7, 0.2, 0.1],
        "seed": 0,
        "rule": "exact",
        "group": "{class}/{track}",
        "keep_splits": False,
    }
    assert (result["max_pixels"], result["near_distance"]) == (399, 7)
    assert "train/a/9_9.png" in [image["id"] for image in result["unreadable"]]
    assert [row["name"] for row in result["classes"]] == ["a"]
    # The symbolic link was followed, and the 20 images in its target are too large.
    assert sum(image["id"].startswith("train/red/") for image in result["unreadable"]) == 20


def test_nothing_is_written_without_output(image_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CNN_JAX_CACHE", str(tmp_path / "cache"))
    inspect.main([f"--source=folder:{image_folder}"])
    assert not list(tmp_path.iterdir())


def test_the_text_has_the_numbers_of_the_survey(image_folder, capsys):
    inspect.main([f"--source=folder:{image_folder}"])
    lines = capsys.readouterr().out.splitlines()
    result = survey(open_source(f"folder:{image_folder}"), Division())
    assert lines[0].endswith("60 images of 3 classes")
    for name, row in zip(("blue", "green", "red"), result.counts, strict=True):
        words = [name, *map(str, row), "20"]
        assert any(line.split()[-5:] == words for line in lines)
    red, green, blue = result.mean
    assert any(f"mean {red:.2f} {green:.2f} {blue:.2f}" in line for line in lines)
    assert any(line.split() == ["unreadable", "none"] for line in lines)


def test_every_unreadable_file_has_its_own_line(tmp_path, capsys):
    for name in ("a", "b"):
        _image(tmp_path / name / "good.png", 0)
    for i in range(30):
        (tmp_path / "a" / f"bad \x1b[31m\n{i}.png").write_bytes(b"nothing")
    inspect.main([f"--source=folder:{tmp_path}"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for i in range(30):
        assert rf"a/bad \x1b[31m\n{i}.png is not an image of a known format" in lines


def test_with_many_classes_the_smallest_and_largest_are_shown(tmp_path, capsys):
    for label in range(70):
        for i in range(1 + label // 35):
            _image(tmp_path / f"class {label:02d}" / f"{i}.png", 2 * label + i)
    inspect.main([f"--source=folder:{tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert any("... 10 classes between" in line for line in lines)
    assert sum("class " in line for line in lines if line.startswith(" ")) == 60


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_breaks_lines_between_words(width, tmp_path, capsys, monkeypatch):
    for name in ("a", "a class with a name that is longer than a narrow terminal"):
        for i in range(3):
            _image(tmp_path / name / f"{i}.png", 0)
    inspect.main([f"--source=folder:{tmp_path}"])
    wide = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(width))
    inspect.main([f"--source=folder:{tmp_path}"])
    narrow = capsys.readouterr().out
    assert narrow.split() == wide.split()
    too_wide = [line for line in narrow.splitlines() if len(line) > width]
    assert all(len(line.split()) <= 2 for line in too_wide)  # A long path is not broken into lines.
    assert max(map(len, wide.splitlines())) > width
    assert all(line[11:12] in (" ", "") for line in narrow.splitlines())


def test_a_page_is_written(image_folder, tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    inspect.main([f"--source=folder:{image_folder}", f"--output={output}", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((output / "inspection.json").read_text()) == printed
    assert (output / "index.html").is_file()
    # Other commands recognise the output folder, and do not read its images as data.
    assert is_output([path.name for path in output.iterdir()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=nothing"], "a source must be"),
        (["--source=folder:{data}", "--output={data}"], "holds images of the data"),
        (["--source=folder:{data}", "--output={data}/red"], "holds images of the data"),
        (["--source=folder:{data}", "--output={data}/red/000.png/page"], "cannot create"),
        (["--source=folder:{data}", "--output={file}"], "cannot create"),
        (["--source=folder:{data}", "--group=track"], "has no part like"),
        (["--source=folder:{data}", "--split=0.7,0.3"], "three fractions"),
        (["--source=folder:{data}", "--split=0.7,0.3,0"], "three fractions"),
        (["--source=folder:{data}", "--split=0.7,nan,0.1"], "three fractions"),
        (["--source=folder:{data}", "--seed=-1"], "from 0 to 4294967295"),
        (["--source=folder:{data}", "--distance=13"], "from 0 to 12"),
        (["--source=folder:{data}", "--max_pixels=0"], "1 or more"),
        ([], "--source"),
    ],
)
def test_a_wrong_flag_is_reported(arguments, message, image_folder, tmp_path):
    file = tmp_path / "file"
    file.touch()
    argv = [text.format(data=image_folder, file=file) for text in arguments]
    with pytest.raises(ConfigError) as error:
        inspect.main(argv)
    assert message in str(error.value)


def test_the_command_has_exit_codes_and_clean_output(tmp_path):
    """Exit codes and output are correct, even if names contain HTML or invalid UTF-8."""
    missing = _run(f"--source=folder:{tmp_path}/nowhere", f"--output={tmp_path}/page")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ")
    assert not (tmp_path / "page").exists()

    for name in ("<b>", os.fsdecode(b"\xff")):
        _image(tmp_path / "data" / name / "x.png", 0)
        (tmp_path / "data" / name / "bad.png").write_bytes(b"")
    done = _run(f"--source=folder:{tmp_path}/data", "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert [row["name"] for row in result["classes"]] == ["<b>", "\udcff"]
    text = _run(f"--source=folder:{tmp_path}/data")
    assert text.returncode == 0
    assert r"\udcff/bad.png is empty" in text.stdout


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, cnn_jax.inspect\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a device was touched'\n"
        "heavy = {'matplotlib', 'jinja2', 'imagehash', 'pywt', 'cv2', 'tensorflow_datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_value_ranges_are_printed_with_a_suggested_white_level(tmp_path, capsys):
    values = np.random.default_rng(0).integers(0, 4096, (20, 9, 9)).astype(np.uint16)
    values[:, 0, :2] = 0, 4095
    for i, image in enumerate(values):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    source = f"--source=folder:{tmp_path / 'data'}"
    described = "16-bit: 20 images from 0 to 4095, white is 65535; data.white_level=4095 would suit"
    inspect.main([source, f"--output={tmp_path / 'page'}"])
    out = capsys.readouterr().out
    assert f"\nvalues      {described}" in out
    assert "--config.data.white_level=4095 makes 4095 white" in out
    assert described in (tmp_path / "page" / "index.html").read_text("utf-8")

    inspect.main([source, "--json", "--white_level=4095"])
    result = json.loads(capsys.readouterr().out)
    assert result["white_level"] == 4095
    (one,) = result["values"]
    assert (one["kind"], one["images"], one["low"], one["high"]) == ("16-bit", 20, 0, 4095)
    assert (one["white"], one["white_level"]) == (4095, None)
    assert not any("white" in warning for warning in result["warnings"])


def test_floats_without_a_white_level_are_described(tmp_path, capsys):
    for i in range(6):
        path = tmp_path / "ab"[i % 2] / f"{i}.tif"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)).save(path)
    inspect.main([f"--source=folder:{tmp_path}"])
    out = capsys.readouterr().out
    assert "float: 6 images from 0 to 1, white is unknown; data.white_level=1 would suit" in out
    assert "set --config.data.white_level=1, or" in out


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "white"])
def test_a_white_level_is_a_number(value):
    with pytest.raises(ConfigError, match="must be a number, 0 or more"):
        inspect.main(["--source=shapes", f"--white_level={value}"])
