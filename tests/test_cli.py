"""What all commands share: what they print on any terminal, and how they end."""

import csv
import io
import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len
from test_bundle import make_bundle

from cnn_jax import cli
from cnn_jax.bundle import write_bundle
from cnn_jax.console import table

NAMES = ("grün", "œuvre d'art", "猫 und Hund")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run whose classes have names that few encodings can write, and its data in `images`."""
    folder = tmp_path_factory.mktemp("names")
    rng = np.random.default_rng(0)
    for name in NAMES:
        (folder / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (17, 18, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"é{i}.png")
    bundle = make_bundle(class_names=NAMES)
    bundle.data["source"] = f"folder:{folder / 'images'}"
    write_bundle(bundle, folder / "bundle")
    return folder


def _run(*arguments, **environment):
    """Runs a command; its stdout as bytes."""
    process = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        env=os.environ | environment,
    )
    assert b"Traceback" not in process.stderr, process.stderr.decode(errors="replace")
    assert process.returncode == 0, process.stderr.decode(errors="replace")
    return process.stdout


# On a host without any locale; of a terminal with another encoding; of one with none of them.
ENVIRONMENTS = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii:strict"},
]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_predictions_are_printed_in_any_encoding(run_folder, environment):
    flags = [f"--bundle={run_folder}", f"--input={run_folder / 'images'}", "--top=3"]
    printed = _run("cnn_jax.predict", *flags, **environment)
    assert printed.count(b"\n") == 19
    assert b"\\u732b und Hund" in printed
    assert (b"gr\xfcn" if environment == ENVIRONMENTS[1] else b"gr\\xfcn") in printed


def test_files_are_utf_8_and_json_is_json_on_a_terminal_of_ascii(run_folder, tmp_path):
    flags, ascii_only = [f"--bundle={run_folder}"], {"PYTHONIOENCODING": "ascii"}
    output = tmp_path / "out.csv"
    inputs = [f"--input={run_folder / 'images'}", f"--output={output}"]
    _run("cnn_jax.predict", *flags, *inputs, **ascii_only)
    rows = list(csv.DictReader(io.StringIO(output.read_text("utf-8"))))
    assert {row["predicted"] for row in rows} <= set(NAMES)
    assert len(rows) == 18
    assert "é0.png" in output.read_text("utf-8")

    flags += ["--split=all", f"--output={tmp_path / 'all.json'}"]
    printed = _run("cnn_jax.evaluate", *flags, "--json", **ascii_only)
    assert tuple(json.loads(printed)["per_class"]) == NAMES
    text = (tmp_path / "all.json").read_text("utf-8")
    assert "猫 und Hund" in text
    assert json.loads(text) == json.loads(printed)


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--bundle={run}", "--split=all"],
        ["explain", "--bundle={run}", "--input={run}/images", "--output={out}"],
        ["inspect", "--source=folder:{run}/images"],
        ["robustness", "--bundle={run}", "--split=all", "--sample=1"],
        ["registry", "add", "m", "{run}", "--registry={out}", "--note=猫"],
    ],
)
def test_every_command_prints_on_a_terminal_of_ascii(run_folder, tmp_path, arguments):
    module, *flags = (text.format(run=run_folder, out=tmp_path / "ü") for text in arguments)
    printed = _run(f"cnn_jax.{module}", *flags, PYTHONIOENCODING="ascii:strict")
    assert printed.isascii()
    assert printed


def test_a_file_name_that_is_not_utf_8_is_printed_as_it_is(run_folder, tmp_path):
    picture = next((run_folder / "images" / NAMES[0]).iterdir()).read_bytes()
    name = os.fsencode(tmp_path) + "/猫 ".encode() + b"\xff.png"
    with open(name, "wb") as file:  # noqa: PTH123  (a name of bytes)
        file.write(picture)
    flags = ["cnn_jax.predict", f"--bundle={run_folder}", f"--input={tmp_path}"]
    assert b"\\u732b \xff.png," in _run(*flags, PYTHONIOENCODING="ascii")


@given(st.text(st.characters(codec="utf-8")), st.sampled_from(["ascii", "latin-1", "cp1252"]))
def test_json_is_the_same_in_any_encoding(text, encoding):
    file = io.TextIOWrapper(io.BytesIO(), encoding)
    cli.write_json({text: [1.5]}, file)
    file.seek(0)
    assert json.loads(file.read()) == {text: [1.5]}


@given(
    st.lists(st.text("ab猫 ", max_size=30).map(str.strip), min_size=1, max_size=5),
    st.integers(20, 80),
)
def test_a_table_fits_the_terminal_and_keeps_its_words(names, width):
    text = table(("name", "value"), [(name, "12.5 %") for name in names], width)
    words = " ".join(text.split()).replace("12.5 %", "").split()
    assert words == " ".join(["name value", *names]).split()
    longest = max((cell_len(word) for name in names for word in name.split()), default=0)
    for line in text.splitlines():
        assert line == line.rstrip()
        assert len(line) <= max(width, longest)


def _on_a_terminal(*arguments, columns=60):
    """What a command shows on a terminal, and its exit code."""
    terminal, its_side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"COLUMNS": str(columns), "LINES": "24", "TERM": "dumb"},
        stdin=its_side,
        stdout=its_side,
        stderr=its_side,
    )
    os.close(its_side)
    output = b""
    try:
        while chunk := os.read(terminal, 65536):
            output += chunk
    except OSError:  # How Linux says that the other side has closed.
        pass
    os.close(terminal)
    return output.decode(), process.wait()


def test_errors_and_warnings_are_broken_between_words(run_folder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"nonsense")
    flags = ["cnn_jax.predict", f"--bundle={run_folder}", "--top=2"]
    for name, words in (
        ("a.png", "error: 1 of 1 images could not be read"),
        ("none.png", "error: --input: there is no file or folder"),
    ):
        text, code = _on_a_terminal(*flags, f"--input={tmp_path / name}")
        assert code == 1
        assert words in " ".join(text.split())
        for line in text.splitlines():
            # Only a path, which has no place to break it, may be longer.
            assert len(line) <= 60 or len(line.split()) == 1 or "," in line, text
