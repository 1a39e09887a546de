"""Tests of the output of all commands on any terminal, of error messages and of exit codes."""

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
from cnn_jax.system.errors import ConfigError, closest, did_you_mean
from cnn_jax.system.text import table

NAMES = ("grün", "œuvre d'art", "猫 und Hund")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run whose class names need Unicode; the folder `images` has the data of the run."""
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
    """Runs a command, and returns its stdout as bytes."""
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
    """Runs `body` as a command that has no slow imports; returns its stdout as bytes."""
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


def test_the_garbage_collector_runs_in_a_command():
    code = (
        "import gc; gc.disable(); from cnn_jax.system import cli\n"
        "cli.run(lambda argv: print(gc.isenabled()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY) == b"True\n"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYTHONIOENCODING": "utf-8"}, "grün 猫".encode() + b"\xff\n"),
        ({"PYTHONIOENCODING": "latin-1"}, b"gr\xfcn \\u732b\xff\n"),
        ({"PYTHONIOENCODING": "ascii:strict"}, b"gr\\xfcn \\u732b\xff\n"),
        # These variables simulate a host without a locale.
        (
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            b"gr\\xfcn \\u732b\xff\n",
        ),
    ],
)
def test_characters_outside_the_encoding_are_escaped(environment, expected):
    assert _run_main(r"print('gr\xfcn \u732b\udcff')", **environment) == expected


def test_files_are_utf_8_and_json_is_valid_on_ascii_terminals(run_folder, tmp_path):
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
def test_every_command_can_print_ascii(run_folder, tmp_path, arguments):
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
    """Runs a command on a terminal; returns the output and the exit code."""
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
    except OSError:  # Linux raises this error when the other side of the terminal is closed.
        pass
    os.close(terminal)
    return output.decode(), process.wait()


def test_errors_and_warnings_are_wrapped_between_words():
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
    # Only the line with the path is longer, because the path has no spaces to break at.
    assert all(len(line) <= 60 or line.startswith("/a/long/path") for line in lines)


def _parser():
    parser = cli.Parser(prog="tool")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add = commands.add_parser("add")
    add.add_argument("--note")
    add.add_argument("--split", choices=("train", "test"), required=True)
    add.add_argument("name")
    commands.add_parser("list")
    return parser


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND: is required; see --help"),
        (["ad"], "there is no command 'ad'; did you mean add?; there are add, list"),
        (["xyz"], "there is no command 'xyz'; there are add, list"),
        (["--nte=x", "add"], "unexpected argument '--nte=x'; see --help"),
        (["add", "--nte=x"], "unexpected argument '--nte=x'; did you mean --note=x?"),
        (["add", "--not=x"], "unexpected argument '--not=x'; did you mean --note=x?"),
        (["add", "--zzz"], "unexpected argument '--zzz'; see --help"),
        (["add", "--split=tset"], "--split: there is no 'tset'; did you mean test?; there are"),
        (["add", "n"], "--split: is required"),
        (["add", "n", "more", "--split=test"], "unexpected argument 'more'"),
        (["add", "--note"], "--note: expected one argument"),
    ],
)
def test_a_usage_error_is_one_line_with_a_suggestion(arguments, message, capsys):
    with pytest.raises(ConfigError) as error:
        _parser().parse_args(arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    assert capsys.readouterr() == ("", "")


def test_arguments_after_two_dashes_are_not_flags():
    flags = _parser().parse_args(["add", "--split=test", "--", "--name"])
    assert (flags.name, flags.split) == ("--name", "test")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("Flowers", "flowers"), ("flower", "flowers"), ("flwres", "flowers"), ("cars", None)],
)
def test_only_a_similar_name_is_suggested(name, suggestion):
    assert closest(name, ["flowers", "birds"]) == suggestion
    hint = f"; did you mean {suggestion}?" if suggestion else ""
    assert did_you_mean(name, ["flowers", "birds"]) == hint
