import base64
import functools
import html.parser
import io
import re
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image
from studies import HOSTILE, all_alike, make_study

from cnn_jax.report import study as study_page
from cnn_jax.report.study import draw_charts, range_edge, write_study_page


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
    """Omits the charts, for tests that do not check charts."""
    monkeypatch.setattr(study_page, "draw_charts", lambda study: {})


MORE = {"history", "curves", "parallel"}
CASES = {
    "typical": (functools.partial(make_study, 40, 8), MORE, 8),
    "one complete": (functools.partial(make_study, 1), {"history", "curves"}, 0),
    "all failed": (functools.partial(make_study, 5, states=("failed",)), set(), 0),
    "all pruned": (functools.partial(make_study, 5, 2, states=("pruned",)), {"curves"}, 0),
    "running": (functools.partial(make_study, 4, 2, states=("running",)), {"curves"}, 0),
    "none": (functools.partial(make_study, 0), set(), 0),
    "no parameters": (functools.partial(make_study, 9, 0), {"history", "curves"}, 0),
    "a loss": (functools.partial(make_study, 30, 3, "validation_loss"), MORE, 3),
    "constant": (lambda: all_alike(make_study(30, 3)), MORE, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_study_charts_are_drawn_for_available_data(name):
    make, expected, slices = CASES[name]
    study = make()
    charts = draw_charts(study)
    assert set(charts) == expected | {f"slice {key}" for key in list(study["space"])[:slices]}
    for chart in charts.values():
        with Image.open(io.BytesIO(base64.b64decode(chart.partition(",")[2]))) as image:
            assert min(image.size) > 100
            assert len(np.unique(np.asarray(image))) > 2


def test_charts_change_no_setting_of_matplotlib():
    pyplot.switch_backend("agg")
    before = dict(matplotlib.rcParams)
    draw_charts(make_study(12, 1))
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []


def test_optuna_gets_all_trials():
    """Optuna's charts get the values, the curves and the parameters of the trials."""
    study = make_study(40, 4)
    study["trials"][0]["curve"][3:5] = [None, float("nan")]
    copied = study_page._in_memory(study)
    assert copied.best_value == study["trials"][study["best"]]["value"]
    assert len(copied.trials) == 40
    for trial, given in zip(copied.trials, study["trials"], strict=True):
        assert trial.state.name.lower() == {"failed": "fail"}.get(given["state"], given["state"])
        assert trial.value == given["value"]
        assert trial.params == given["params"]
        curve = dict(enumerate(given["curve"], 1))
        if given["number"] == 0:
            del curve[4], curve[5]
        assert trial.intermediate_values == curve


def test_unusual_names_and_ranges_are_drawn():
    study = make_study(6, 4, states=("complete", "pruned"))
    names = ["model.猫", "a" * 60, "other.$x^$", "model.rate\n"]
    ranges = [
        {"kind": "categorical", "choices": [f"{HOSTILE} {i}" for i in range(2)]},
        {"kind": "categorical", "choices": [*range(20), None, True]},
        {"kind": "categorical", "choices": [f"{'(1, 2, 3, 4) ' * 4}{i}" for i in range(9)]},
        {"kind": "float", "low": 0.5, "high": 0.5, "log": True},
    ]
    study["space"] = dict(zip(names, ranges, strict=True))
    for trial in study["trials"]:
        firsts = [range_.get("choices", [0.5])[trial["number"] % 2 * -1] for range_ in ranges]
        trial["params"] = dict(zip(names, firsts, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(draw_charts(study)) == 7


def test_values_outside_the_ranges_are_not_drawn():
    """Values outside a parameter's range are not drawn; an earlier range may have been wider."""
    study = make_study(40, 3)
    for trial in study["trials"]:
        trial["params"]["optimizer.learning_rate"] = 1.0
        trial["params"]["train.batch_size"] = 1024
        trial["params"]["other"] = 1
    assert {key for trial in study_page._in_memory(study).trials for key in trial.params} == {
        "model.features"
    }


LOG = {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True}
LINEAR = {"kind": "int", "low": 20, "high": 40, "log": False}


@pytest.mark.parametrize(
    ("range_", "value", "expected"),
    [
        (LOG, 1e-4 * 100**0.05, "lower"),
        (LOG, 1e-4 * 100**0.051, None),
        (LOG, 1e-2 / 100**0.05, "upper"),
        (LINEAR, 21, "lower"),
        (LINEAR, 22, None),
        (LINEAR, 39, "upper"),
        (LINEAR, None, None),
        ({**LINEAR, "low": 40}, 40, None),
        ({"kind": "categorical", "choices": [1, 2]}, 1, None),
    ],
)
def test_a_value_within_5_percent_is_at_the_edge(range_, value, expected):
    assert range_edge(range_, value) == expected


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
        missing = [str(study_page._SORT_FIRST), "\N{EN DASH}"]
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
                assert float(cell[0]) == range_["choices"].index(trial["params"][key])
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
    assert "is 0.0099, at the upper end of its range (0.0001 to 0.01, on the log scale)" in text
    assert text.count("upper end") == 1
    assert "lower end" not in text
    cost = study["cost"]
    assert "20 pruned, 6 failed" in text
    assert f"{cost['epochs_without_pruning']:,} without pruning" in text
    assert "2025-05-01 10:00 to 2025-05-01 13:26" in text
    for expected in ("folder:/data/eurosat", "0f3a" * 8, "configs/eurosat.py", "optuna 4.5.0"):
        assert expected in text
    assert "host0: 20, host1: 20" in text
    assert "optimizer. learning_rate 0.0099 0.0001 to 0.01, on the log scale 50.0 %" in text


def test_page_needs_no_other_file(tmp_path):
    page = _parsed(make_study(12, 1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert len(page.pictures) == 4
    assert all(picture.startswith("data:image/png;base64,") for picture in page.pictures)
    assert page.elements.count("script") == 1
    assert "default-src 'none'; img-src data:" in (tmp_path / "index.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("study", "sentence"),
    [
        (make_study(0), "No trial has been started."),
        (make_study(3, states=("failed",)), "no best trial, because all trials have failed."),
        (make_study(1), "Trial 0 is the only complete trial"),
        (make_study(2, states=("pruned",)), "no best trial, because no trial is complete yet."),
        (make_study(2, states=("running", "failed")), "1 failed, 1 running"),
    ],
)
def test_missing_results_have_a_reason(study, sentence, tmp_path, undrawn):
    text = _parsed(study | {"importance": None, "importance_note": "Too few."}, tmp_path).text
    assert sentence in text
    assert "Too few." in text


def test_choice_none_differs_from_missing_value(tmp_path, undrawn):
    study = make_study(2, 1, states=("complete",))
    study["space"]["model.norm"] = {"kind": "categorical", "choices": ["batch", None]}
    study["space"]["train.steps"] = {"kind": "int", "low": 16, "high": 64, "log": False, "step": 16}
    study["trials"][0]["params"] |= {"model.norm": None, "train.steps": 32}
    rows = _parsed(study, tmp_path).rows[1:]
    first, second = (row[-3:-1] for row in rows)
    assert first == [["1", "None"], ["32", "32"]]
    assert second == [[str(study_page._SORT_FIRST), "\N{EN DASH}"]] * 2
    assert "16 to 64 in steps of 16" in (tmp_path / "index.html").read_text("utf-8")


def test_loss_is_not_a_percentage(tmp_path, undrawn):
    study = make_study(30, 3, "validation_loss")
    best = study["trials"][study["best"]]
    text = _parsed(study, tmp_path).text
    assert f"validation loss {best['value']:.4f}." in text
    assert "the smallest validation loss" in text


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
