import functools
import html.parser
import re
import warnings

import numpy as np
import pytest
from PIL import Image
from studies import HOSTILE, all_alike, make_study

from cnn_jax.report import study as study_page
from cnn_jax.report import style
from cnn_jax.report.study import make_charts, write_study_page
from cnn_jax.report.study_values import MISSING, range_position


class _Parser(html.parser.HTMLParser):
    """An HTML parser that collects elements, visible text, pictures, and the table's rows."""

    def __init__(self):
        super().__init__()
        self.elements, self.pictures, self.words, self.rows, self.ids = [], [], [], [], []
        self.links, self.bests = [], 0
        self._hidden, self._in_table = False, False

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append(tag)
        self._hidden = tag in ("style", "script")
        if tag == "img":
            assert attributes["alt"]
        self.pictures += [attributes[name] for name in ("src", "srcset") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if tag == "a" else []
        assert not any(name.startswith("on") for name in attributes)
        if tag == "table":
            self._in_table = attributes.get("class") == "sortable"
        elif self._in_table and tag == "tr":
            self.rows.append([])
            self.bests += attributes.get("class") == "best"
        elif self._in_table and tag in ("th", "td"):
            self.rows[-1].append([attributes.get("data-value"), ""])

    def handle_endtag(self, tag):
        self._hidden = False
        if tag == "table":
            self._in_table = False

    def handle_data(self, data):
        if self._hidden:
            return
        self.words.append(data)
        if self._in_table and self.rows and self.rows[-1]:
            self.rows[-1][-1][1] += data.strip("\n")

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def _parsed(study, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_study_page(study, folder)
    assert page == folder / "index.html"
    parser = _Parser()
    parser.feed(page.read_text("utf-8"))
    return parser


@pytest.fixture
def undrawn(monkeypatch):
    """Replaces charts with images of one pixel, for tests that do not check charts."""

    def draw(path, *_):
        for theme in style.THEMES:
            Image.new("RGBA", (1, 1)).save(path.with_stem(path.stem + theme.suffix))

    monkeypatch.setattr(style, "draw", draw)


# Tests of the charts of a study.


CASES = {
    "typical": (make_study, {"history", "curves", "parallel", "importance"}, 8),
    "large": (
        functools.partial(make_study, 300, 14),
        {"history", "curves", "parallel", "importance"},
        14,
    ),
    "one complete": (functools.partial(make_study, 1), {"history", "curves"}, 0),
    "all failed": (functools.partial(make_study, 5, states=("failed",)), set(), 0),
    "all pruned": (
        functools.partial(make_study, 5, 2, states=("pruned",)),
        {"history", "curves", "parallel"},
        2,
    ),
    "running": (
        functools.partial(make_study, 4, 2, states=("running", "failed")),
        {"history", "curves", "parallel"},
        2,
    ),
    "none": (functools.partial(make_study, 0), set(), 0),
    "a loss": (
        functools.partial(make_study, 30, 3, "validation_loss"),
        {"history", "curves", "parallel", "importance"},
        3,
    ),
    "constant": (
        lambda: all_alike(make_study(30, 3)),
        {"history", "curves", "parallel", "importance"},
        3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_study_charts_are_drawn_for_available_data(name, tmp_path):
    make, expected, slices = CASES[name]
    charts = make_charts(make())
    assert set(charts) == expected | {f"slice_{number:02d}" for number in range(slices)}
    # The slice charts that are left out here are also drawn in the case "typical".
    if name == "large":
        charts = dict(list(charts.items())[:4] + list(charts.items())[-3:])
    for file, chart in charts.items():
        path = tmp_path / f"{file}.png"
        with warnings.catch_warnings():
            # Matplotlib warns, for example, about a character that the font lacks.
            warnings.simplefilter("error")
            style.draw(path, chart.plot, chart.size, 40)
        with Image.open(path) as image:
            assert np.asarray(image)[..., 3].any()
            assert image.size == (int(chart.size[0] * 40), int(chart.size[1] * 40))


def test_unusual_names_and_ranges_are_drawn(tmp_path):
    study = make_study(6, 4, states=("complete", "pruned"))
    names = ["model.猫", "a" * 60, "other.$x^$", "model.rate\n"]
    ranges = [
        {"kind": "categorical", "choices": [f"{HOSTILE} {i}" for i in range(2)]},
        {"kind": "categorical", "choices": list(range(60))},
        {
            "kind": "categorical",
            "choices": [f"{'(1, 2, 3, 4) ' * 4}{i}" for i in range(9)],
        },
        {"kind": "float", "low": 0.5, "high": 0.5, "log": True},
    ]
    study["space"] = dict(zip(names, ranges, strict=True))
    study["importance"] = dict.fromkeys(names, 0.0)
    for trial in study["trials"]:
        firsts = [range_.get("choices", [0.5])[0] for range_ in ranges]
        trial["params"] = dict(zip(names, firsts, strict=True))
    for name, chart in make_charts(study).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            style.draw(tmp_path / f"{name}.png", chart.plot, chart.size, 40)


# Tests of the page of a study.


def test_table_of_trials_has_all_numbers(tmp_path, undrawn):
    study = make_study()
    page = _parsed(study, tmp_path)
    headings, *rows = page.rows
    assert [text for _, text in headings[5:-1]] == list(study["space"])
    assert len(rows) == 40
    assert page.bests == 1
    for row, trial in zip(rows, study["trials"], strict=True):
        number, state, value, epochs, seconds, *params, error = row
        is_best = trial["number"] == study["best"]
        assert number[1] == f"{trial['number']}" + " (best)" * is_best
        assert (state[1], error[1]) == (trial["state"], trial["error"])
        missing = [str(study_page._SORT_FIRST), MISSING]
        if trial["value"] is None:
            assert value == missing
        else:
            shown = f"{100 * trial['value']:.2f}\N{NO-BREAK SPACE}%"
            assert value == [str(trial["value"]), shown]
        assert epochs == [str(trial["epochs"])] * 2
        assert float(seconds[0]) == trial["seconds"]
        for cell, (key, range_) in zip(params, study["space"].items(), strict=True):
            if key not in trial["params"]:
                assert cell == missing
            elif range_["kind"] == "categorical":
                assert cell[1] == str(trial["params"][key])
                assert float(cell[0]) == range_position(range_, trial["params"][key])
            else:
                assert float(cell[0]) == trial["params"][key]
                assert float(cell[1]) == pytest.approx(trial["params"][key], rel=1e-3)


def test_page_shows_best_trial_and_cost(tmp_path, undrawn):
    study = make_study(40, 2)
    best = study["trials"][study["best"]]
    best["params"] = {"optimizer.learning_rate": 0.0099, "train.batch_size": 64}
    text = _parsed(study, tmp_path).text
    assert f"Trial {study['best']} is the best of 14 complete trials" in text
    assert f"validation accuracy {100 * best['value']:.2f} %." in text
    assert f"cnn_jax train --config={tmp_path}/best.py --workdir=..." in text
    assert (
        "The study did not use the test split. The command below measures the test metrics once."
        in text
    )
    assert "is 0.0099, at the upper end of its range (0.0001 to 0.01, on the log scale)" in text
    # The words "upper end" are in the warning and in the table.
    assert text.count("upper end") == 2
    assert "lower end" not in text
    cost = study["cost"]
    saved = 1 - cost["epochs"] / cost["epochs_without_pruning"]
    assert "Of 50 planned trials, 40 were started: 14 complete, 20 pruned, 6" in text
    assert f"trained for {cost['epochs']:,} epochs" in text
    assert f"they would have trained for {cost['epochs_without_pruning']:,} epochs" in text
    assert f"pruning saved {100 * saved:.0f} % of these" in text
    assert "began 2025-05-01 10:00 and ended 2025-05-01 13:26" in text.replace("  ", " ")
    for expected in ("folder:/data/eurosat", "0f3a" * 8, "configs/eurosat.py", "optuna 4.5.0"):
        assert expected in text
    assert "host0 (20 trials), host1 (20 trials)" in text


def test_page_needs_no_other_file(tmp_path):
    page = _parsed(make_study(12, 1), tmp_path)
    names = {"history", "curves", "parallel", "importance", "slice_00"}
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        "index.html",
        *(f"{name}{theme.suffix}.png" for name in names for theme in style.THEMES),
    }
    assert len(page.pictures) == 2 * len(names)
    assert all(picture.startswith("data:image/png;base64,") for picture in page.pictures)
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert page.elements.count("script") == 1
    assert "default-src 'none'; img-src data:" in (tmp_path / "index.html").read_text("utf-8")


def test_two_processes_may_write_the_page_at_once(tmp_path, monkeypatch):
    """While the first writer draws, a second writer writes the whole page; charts are not mixed."""
    study, pages = make_study(12, 1), {}

    def write(colour, meanwhile=lambda: None):
        def draw(path, *_):
            if path.name == "slice_00.png":  # This is the last chart.
                meanwhile()
            for theme in style.THEMES:
                Image.new("RGB", (1, 1), colour).save(path.with_stem(path.stem + theme.suffix))

        monkeypatch.setattr(style, "draw", draw)
        pages[colour] = _parsed(study, tmp_path)

    write("red", meanwhile=lambda: write("blue"))
    for colour, page in pages.items():
        Image.new("RGB", (1, 1), colour).save(tmp_path / "one.png")
        assert set(page.pictures) == {style.data_uri(tmp_path / "one.png")}


@pytest.mark.parametrize(
    ("study", "sentences"),
    [
        (make_study(0), ["No trial has been started.", "There is no best trial"]),
        (make_study(3, states=("failed",)), ["No trial has a value: all trials have failed."]),
        (make_study(1), ["Trial 0 is the only complete trial", "Only one trial has a value"]),
        (
            make_study(2, states=("pruned",)),
            ["There is no best trial, because no trial is complete"],
        ),
        (make_study(2, states=("running", "failed")), ["1 failed, 1 still running"]),
        (make_study(3, 0), ["The study has no parameters."]),
    ],
)
def test_missing_sections_have_a_reason(study, sentences, tmp_path, undrawn):
    text = _parsed(study | {"importance": None, "importance_note": "Too few."}, tmp_path).text
    for sentence in [*sentences, "Too few."]:
        assert sentence in text


def test_loss_is_not_a_percentage(tmp_path, undrawn):
    study = make_study(30, 3, "validation_loss")
    best = study["trials"][study["best"]]
    text = _parsed(study, tmp_path).text
    assert f"validation loss {best['value']:.4f}." in text
    assert "the smallest validation loss" in text


def test_choice_none_differs_from_missing_value(tmp_path, undrawn):
    study = make_study(2, 1, states=("complete",))
    study["space"]["model.norm"] = {"kind": "categorical", "choices": ["batch", None]}
    study["space"]["train.steps"] = {"kind": "int", "low": 16, "high": 64, "log": False, "step": 16}
    study["trials"][0]["params"] |= {"model.norm": None, "train.steps": 32}
    rows = _parsed(study, tmp_path).rows[1:]
    first, second = (row[-3:-1] for row in rows)
    assert first == [["1.0", "None"], ["32", "32"]]
    assert second == [[str(study_page._SORT_FIRST), MISSING]] * 2
    assert "16 to 64 in steps of 16" in (tmp_path / "index.html").read_text("utf-8")


def test_hostile_texts_are_escaped(tmp_path, undrawn):
    study = make_study(6, 2)
    study |= {"name": HOSTILE, "config_file": HOSTILE, "best_config": HOSTILE}
    study["data"] = {"source": HOSTILE, "fingerprint": HOSTILE}
    study["space"][HOSTILE] = {"kind": "categorical", "choices": [HOSTILE, "b"]}
    study["importance"] = {HOSTILE: 1.0}
    for trial in study["trials"]:
        trial |= {"error": HOSTILE, "host": HOSTILE, "folder": HOSTILE}
        trial["params"][HOSTILE] = HOSTILE
    page = _parsed(study, tmp_path)
    assert page.elements.count("script") == 1
    shown = HOSTILE.replace("\n", r"\n").replace("\udcff", r"\udcff")
    assert page.text.count(shown) > 20
    assert [row[-1][1] for row in page.rows[1:]] == [shown] * 6
