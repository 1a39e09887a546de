"""What all commands share: what they print on any terminal, and how they end."""

import csv
import io
import json
import os
import pty
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from bundles import make_bundle
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len

from cnn_jax.inference.bundle import write_bundle
from cnn_jax.system import cli
from cnn_jax.system.text import table

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


def _run_main(body, **environment):
    """Runs a command of one line, which imports nothing slow."""
    code = f"import sys, logging; from cnn_jax.system import cli; cli.run(lambda argv: {body})"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        env=os.environ | environment,
    )
    assert process.stderr == b""
    assert process.returncode == 0
    return process.stdout


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYTHONIOENCODING": "utf-8"}, "grün 猫".encode() + b"\xff\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"gr\xfcn \\u732b\xff\n"),
        ({"PYTHONIOENCODING": "ascii:strict"}, b"gr\\xfcn \\u732b\xff\n"),
        (  # A host without any locale.
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            b"gr\\xfcn \\u732b\xff\n",
        ),
    ],
)
def test_what_an_encoding_lacks_is_escaped_and_bytes_of_file_names_stay(environment, expected):
    assert _run_main(r"print('gr\xfcn \u732b\udcff')", **environment) == expected


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


@settings(deadline=None, max_examples=30)
@given(st.text('aü€猫😀"\\\n\u2028'), st.sampled_from(["ascii", "latin-1", "cp1252", "utf-8"]))
def test_json_is_the_same_in_any_encoding(text, encoding):
    with tempfile.TemporaryFile("w+", encoding=encoding) as file:
        cli.write_json({text: [1.5]}, file)
        file.seek(0)
        assert json.loads(file.read()) == {text: [1.5]}


@settings(deadline=None, max_examples=50)
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
        [sys.executable, *arguments],
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


def test_errors_and_warnings_are_broken_between_words():
    message = "one of many words, longer than the terminal is wide, with /a/long/path/" + "x" * 60
    code = (
        "import logging; from cnn_jax.system import cli, errors\n"
        "def main(argv):\n"
        f"    logging.warning({message!r})\n"
        f"    raise errors.DataError({message!r})\n"
        "cli.run(main)"
    )
    text, exit_code = _on_a_terminal("-c", code)
    assert exit_code == 1
    lines = text.splitlines()
    assert " ".join(lines) == f"WARNING: {message} error: {message}"
    assert len(lines) > 4
    # Only a path, which has no place to break it, is longer.
    assert all(len(line) <= 60 or line.startswith("/a/long/path") for line in lines)
