"""Tests of printed lines on terminals of any width, also with characters two columns wide."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from cnn_jax.system.console import Console
from cnn_jax.system.text import shorten, table, terminal_width, wrap
from cnn_jax.training import summary

_RECORD = {
    f"{split}_{metric}": 1.0
    for split in ("train", "validation")
    for metric in ("loss", "accuracy", "f1")
} | {"epoch": 100, "images_per_second": 12345.6}


def _shown(width, monkeypatch, capsys, show):
    """Returns the lines that `show` prints to stderr, on a terminal that has `width` columns.

    If `width` is None, stderr is a file.
    """
    monkeypatch.delenv("COLUMNS", raising=False)
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    show(Console())
    return capsys.readouterr().err.splitlines()


def _train(console):
    with console.training(1000, 10) as training:
        training.start([_RECORD], {100}, 0)


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (None, ["loss", "accuracy", "F1", "loss", "accuracy", "F1", "images/s"]),
        (80, ["loss", "accuracy", "F1", "loss", "accuracy", "F1", "images/s"]),
        (66, ["loss", "accuracy", "F1", "loss", "accuracy", "F1"]),
        (60, ["loss", "accuracy", "loss", "accuracy", "F1"]),
        (50, ["loss", "accuracy", "loss", "accuracy"]),
        (40, ["loss", "loss", "accuracy"]),
        (32, ["loss", "accuracy"]),
    ],
)
def test_the_table_of_epochs_has_the_columns_that_fit(width, columns, monkeypatch, capsys):
    titles, head, epoch = _shown(width, monkeypatch, capsys, _train)
    assert head.split() == ["epoch", *columns]
    assert epoch.split()[0] == "100/1000"
    assert len(epoch.split()) == len(columns) + 2
    assert epoch.endswith("  best")
    assert max(map(len, (titles, head, epoch))) <= (width or 80)
    # A number ends where the title of its column ends.
    assert head.find("loss") + 4 == epoch.find("1.000") + 5
    assert len(head) == len(epoch.removesuffix("  best"))
    assert ("train" in titles) == (columns.count("loss") == 2)


def test_facts_and_warnings_are_wrapped_between_words(monkeypatch, capsys):
    words = "an unbreakable-word and 1,234 numbers of many kinds that go on for a while"

    def show(console):
        console.facts({"data": f"{words}\nshort"})
        console.warn(words)
        console.print(words)

    lines = _shown(60, monkeypatch, capsys, show)
    assert max(map(len, lines)) <= 60
    assert " ".join(" ".join(lines).split()) == f"data {words} short warning {words} {words}"
    assert lines[1].startswith(" " * 12)
    assert _shown(None, monkeypatch, capsys, show)[0] == f"data        {words}"


@given(
    st.lists(st.text("abü蓝-", min_size=1, max_size=30), min_size=1, max_size=30),
    st.integers(20, 100),
    st.integers(0, 12),
)
def test_a_word_is_never_broken(words, width, indent):
    line = " ".join(words)
    parts = wrap(line, width, indent)
    assert " ".join(parts).split() == words
    for part in parts:
        assert cell_len(part) <= width or len(part.split()) == 1
    assert wrap(line, None) == [line]


@pytest.mark.parametrize("name", ["plain", "Grün", "красный", "蓝色的花" * 9, "a-long-name-" * 9])
@pytest.mark.parametrize("width", [8, 12, 24])
def test_class_names_fill_their_columns(name, width):
    short = shorten(name, width)
    assert cell_len(short) <= width
    assert short == name or short.endswith("...")
    head, row = table(("class", "n"), [(short, "1")], None, min_column=10).splitlines()
    assert cell_len(row) == cell_len(head) == max(cell_len(short), 5) + 12


def test_wrapped_commands_can_be_copied(monkeypatch, capsys, tmp_path):
    test = dict.fromkeys(("accuracy", "precision", "recall", "f1", "loss"), 0.5) | {"count": 1234}
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(summary.sys.stdout, "isatty", lambda: True, raising=False)
    summary.show_metrics(tmp_path / "my run", {"test": test})
    summary.show_commands(tmp_path / "my run")
    shown = capsys.readouterr().out
    (command,) = re.findall(r"use +(.+ \\\n +.+ \\\n +.+)", shown)
    expected = f"cnn_jax predict --bundle='{tmp_path}/my run/bundle' --input=FILE_OR_FOL"
    assert re.sub(r" \\\n +", " ", command).startswith(expected)
    assert max(map(len, shown.splitlines()[:4])) <= 60


@pytest.mark.parametrize("file", [io.StringIO(), None])
def test_only_a_terminal_has_a_width(monkeypatch, file):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal_width(file) is None
    monkeypatch.setenv("COLUMNS", "57")
    assert terminal_width(file) == 57
