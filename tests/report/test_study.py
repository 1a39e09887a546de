import functools
import html.parser
import math
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from cnn_jax.report import study as study_page
from cnn_jax.report import style
from cnn_jax.report.study import charts_of, edge, place, places, write_study_page

HOSTILE = "<script>alert('1')</script> \"&amp; {{ 7 * 7 }}\nline 猫 \udcff $x^$"

# A study has the first few of these.
SPACE = {
    "optimizer.learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "train.batch_size": {"kind": "categorical", "choices": [16, 32, 64]},
    "model.features": {"kind": "categorical", "choices": ["(16, 32, 64)", "(32, 64, 128)"]},
    "model.dense": {"kind": "int", "low": 64, "high": 512, "log": True},
    "model.dropout": {"kind": "float", "low": 0.0, "high": 0.6, "log": False},
    "loss.label_smoothing": {"kind": "float", "low": 0.0, "high": 0.2, "log": False},
    "optimizer.weight_decay": {"kind": "float", "low": 1e-6, "high": 1e-2, "log": True},
    "augment.rotation": {"kind": "float", "low": 0.0, "high": 0.25, "log": False},
    "augment.flip": {"kind": "categorical", "choices": ["none", "horizontal", "both"]},
    "augment.zoom": {"kind": "float", "low": 0.0, "high": 0.5, "log": False},
    "augment.dropout": {"kind": "float", "low": 0.0, "high": 0.5, "log": False},
    "optimizer.warmup_epochs": {"kind": "int", "low": 0, "high": 5, "log": False},
    "model.normalize": {"kind": "categorical", "choices": [False, True]},
    "optimizer.name": {"kind": "categorical", "choices": ["adamw", "sgd", "lion", "lamb"]},
}


def _drawn(rng, range_):
    if range_["kind"] == "categorical":
        return range_["choices"][rng.integers(len(range_["choices"]))]
    low, high = range_["low"], range_["high"]
    share = rng.random()
    value = low * (high / low) ** share if range_["log"] else low + (high - low) * share
    return round(value) if range_["kind"] == "int" else value


def make_study(
    trials=40,
    parameters=8,
    monitor="validation_accuracy",
    states=("complete", "pruned", "pruned", "complete", "pruned", "failed"),
):
    """A study as the command leaves it; the learning rate decides most."""
    rng = np.random.default_rng(0)
    space = dict(list(SPACE.items())[:parameters])
    is_loss = monitor.endswith("loss")
    made = []
    for number in range(trials):
        state = states[number % len(states)]
        params = {key: _drawn(rng, range_) for key, range_ in space.items()}
        rate = abs(math.log10(params.get("optimizer.learning_rate", 1e-3) / 2e-3))
        end = 0.97 - 0.06 * rate**2 - 0.02 * rng.random() - 0.5 * (rng.random() < 0.05)
        epochs = {"complete": 15, "failed": 0}.get(state, int(rng.choice([1, 1, 3, 5])))
        curve = [
            round(end * (1 - math.exp(-0.7 * e)) + 0.005 * rng.normal(), 6)
            for e in range(1, epochs + 1)
        ]
        if is_loss:
            curve = [-2 * math.log(min(max(value, 0.01), 0.999)) for value in curve]
        made.append(
            {
                "number": number,
                "state": state,
                "value": (min if is_loss else max)(curve) if curve else None,
                "epochs": epochs,
                "seconds": 8.3 * epochs + 2,
                "params": params if state != "failed" else dict(list(params.items())[:1]),
                "curve": curve,
                "error": "TrainingError: the loss is not finite" if state == "failed" else "",
                "host": f"host{number % 2}",
                "folder": f"trials/{number:04d}",
            }
        )
    complete = [trial for trial in made if trial["state"] == "complete"]
    best = (min if is_loss else max)(complete, key=lambda trial: trial["value"], default=None)
    shares = {key: 0.5 ** (i + 1) for i, key in enumerate(space)}
    return {
        "name": "eurosat",
        "monitor": monitor,
        "direction": "minimize" if is_loss else "maximize",
        "max_epochs": 15,
        "trials_wanted": 50,
        "data": {"source": "folder:/data/eurosat", "fingerprint": "0f3a" * 8},
        "versions": {"cnn_jax": "0.1.0", "jax": "0.10.0", "optuna": "4.5.0"},
        "config_file": "configs/eurosat.py",
        "space": space,
        "trials": made,
        "best": best["number"] if best else None,
        "best_config": "best.py",
        "importance": shares if len(complete) > 3 else None,
        "importance_note": "" if len(complete) > 3 else "There are too few complete trials.",
        "cost": {
            **{
                state: sum(trial["state"] == state for trial in made)
                for state in ("complete", "pruned", "failed", "running")
            },
            "epochs": sum(trial["epochs"] for trial in made),
            "epochs_without_pruning": 15 * sum(trial["state"] != "failed" for trial in made),
            "seconds": sum(trial["seconds"] for trial in made),
            "started": "2025-05-01T10:00:00+00:00",
            "ended": "2025-05-01T13:26:10+00:00",
        },
    }


class _Parser(html.parser.HTMLParser):
    """Collects the elements, the text that is shown, the pictures, and the rows of the table."""

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
    """Charts of one pixel, where they are not the point."""
    monkeypatch.setattr(
        study_page.style, "draw", lambda path, *_: Image.new("RGBA", (1, 1)).save(path)
    )


def _all_alike(study):
    """Every trial with the same value in every epoch."""
    for trial in study["trials"]:
        if trial["curve"]:
            trial["value"] = 0.9
            trial["curve"] = [0.9] * len(trial["curve"])
    return study


# The ranges.


LINEAR = {"kind": "float", "low": 0.0, "high": 0.5, "log": False}
LOG = {"kind": "float", "low": 1e-4, "high": 1.0, "log": True}
INT = {"kind": "int", "low": 0, "high": 40, "log": False}
LOG_INT = {"kind": "int", "low": 1, "high": 1024, "log": True}
CHOICE = {"kind": "categorical", "choices": [16, "a", False]}


@pytest.mark.parametrize(
    ("range_", "value", "expected"),
    [
        *((LINEAR, 0.0, "lower"), (LINEAR, 0.025, "lower"), (LINEAR, 0.026, None)),
        *((LINEAR, 0.25, None), (LINEAR, 0.474, None), (LINEAR, 0.475, "upper")),
        # A twentieth of four decades is a fifth of one.
        *((LOG, 1.5e-4, "lower"), (LOG, 1.6e-4, None), (LOG, 0.02, None)),
        *((LOG, 0.63, None), (LOG, 0.64, "upper"), (LOG, 1.0, "upper")),
        *((INT, 2, "lower"), (INT, 3, None), (INT, 37, None), (INT, 38, "upper")),
        # A twentieth of ten doublings is half of one.
        *((LOG_INT, 1, "lower"), (LOG_INT, 2, None), (LOG_INT, 700, None), (LOG_INT, 730, "upper")),
        *((CHOICE, 16, None), (CHOICE, False, None), (LINEAR, math.nan, None)),
        # With nothing to choose from, nothing is at the edge.
        ({"kind": "float", "low": 0.1, "high": 0.1, "log": False}, 0.1, None),
    ],
)
def test_the_edge_is_a_twentieth_of_the_range(range_, value, expected):
    assert edge(range_, value) == expected


def test_places_on_the_axes_are_those_worked_out_by_hand():
    space = {"rate": LOG, "size": CHOICE, "dropout": LINEAR, "layers": LOG_INT}
    parameters = [
        {"rate": 1e-3, "size": 16, "dropout": 0.1, "layers": 32},
        {"rate": 1.0, "size": False, "dropout": 0.5, "layers": 1},
        {"layers": 1024, "dropout": 0.0, "size": "a", "rate": 1e-4},  # In another order.
        {"size": "gone"},
    ]
    trials = [
        {"number": i, "state": "complete", "value": value, "params": params}
        for i, (value, params) in enumerate(zip((0.8, 0.9, 0.7, 0.8), parameters, strict=True))
    ]
    study = {
        "space": space,
        "trials": trials,
        "direction": "maximize",
        "monitor": "validation_accuracy",
    }
    nan = math.nan
    expected = [
        [0.25, 0.0, 0.2, 0.5, 0.5],
        [1.0, 1.0, 1.0, 0.0, 1.0],
        [0.0, 0.5, 0.0, 1.0, 0.0],
        [nan, nan, nan, nan, 0.5],
    ]
    np.testing.assert_allclose(places(study, trials), expected, atol=1e-12)
    assert place({"kind": "categorical", "choices": ["one"]}, "one") == 0.5


def test_an_axis_of_values_leaves_out_what_is_far_worse():
    """Median 0.9 and best 0.95: it reaches down to 0.8."""
    values = [0.1, 0.9, 0.9, 0.95, 0.94]
    rising = study_page.scale_of({"direction": "maximize", "monitor": "validation_f1"}, values)
    assert (rising.low, rising.high) == pytest.approx((0.8, 0.95))
    assert rising.at_edge([0.1, 0.9]) == pytest.approx([0.8, 0.9])
    assert rising.place(0.1) == 0
    assert (rising.name, rising.text(0.95)) == ("validation F1", "95.00 %")
    falling = study_page.scale_of(
        {"direction": "minimize", "monitor": "validation_loss"}, [9.0, 0.3, 0.3, 0.2, 0.25]
    )
    assert (falling.low, falling.high) == pytest.approx((0.2, 0.5))
    assert falling.text(0.25) == "0.2500"


def test_the_best_so_far_is_of_complete_trials_in_their_order():
    states = ("complete", "pruned", "complete", "complete", "failed", "complete")
    values = (0.5, 0.9, 0.4, 0.7, None, 0.6)
    trials = [
        {"number": i, "state": state, "value": value}
        for i, (state, value) in enumerate(zip(states, values, strict=True))
    ]
    study = {"trials": trials[::-1], "direction": "maximize"}
    assert study_page.best_so_far(study) == ([0, 2, 3, 5], [0.5, 0.5, 0.7, 0.7])
    study["direction"] = "minimize"
    assert study_page.best_so_far(study) == ([0, 2, 3, 5], [0.5, 0.4, 0.4, 0.4])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((0, "0"), (512, "512"), (1024, "1,024"), (1e-4, "0.0001"), (0.0012345678, "0.001235")),
        *((3.21e-5, "3.21e-5"), (2e8, "2e8"), (12345.6, "12,346"), (-0.5, "-0.5")),
    ],
)
def test_numbers_are_short(value, expected):
    assert study_page.number(value) == expected


# The charts.


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
        lambda: _all_alike(make_study(30, 3)),
        {"history", "curves", "parallel", "importance"},
        3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_there_is_something_to_draw_of_is_drawn(name, tmp_path):
    make, expected, slices = CASES[name]
    charts = charts_of(make())
    assert set(charts) == expected | {f"slice_{number:02d}" for number in range(slices)}
    if name == "large":  # Its first slices are like those of the typical study.
        charts = dict(list(charts.items())[:4] + list(charts.items())[-3:])
    for number, (chart, (plot, size)) in enumerate(charts.items()):
        path = tmp_path / f"{chart}.png"
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Such as of a character that the font lacks.
            style.draw(path, style.THEMES[number % 2], plot, size, 40)
        with Image.open(path) as image:
            assert np.asarray(image)[..., 3].any()
            assert image.size == (int(size[0] * 40), int(size[1] * 40))


def test_odd_names_and_ranges_are_drawn(tmp_path):
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
    for chart, (plot, size) in charts_of(study).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            style.draw(tmp_path / f"{chart}.png", style.THEMES[0], plot, size, 40)


def test_names_of_an_axis_keep_their_distance():
    assert study_page._some(5, 1) == [0, 1, 2, 3, 4]
    assert study_page._some(10, 2) == [0, 2, 4, 6, 9]
    assert study_page._some(1, 3) == [0]
    assert study_page._cut("(16, 32, 64, 128)", 9) == "(16,…128)"
    assert study_page._cut("short", 5) == "short"


def test_an_axis_has_the_last_part_of_a_key_where_it_is_no_others():
    names = study_page._axis_names(["a.rate", "model.dropout", "augment.dropout", "b.猫"])
    assert names == ["rate", "model.dropout", "augment.dropout", "#3"]


# The page.


def test_every_number_of_the_table_is_in_the_page(tmp_path, undrawn):
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
        missing = [str(study_page._SORTS_FIRST), study_page._NOTHING]
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
                assert float(cell[0]) == place(range_, trial["params"][key])
            else:
                assert float(cell[0]) == trial["params"][key]
                assert float(cell[1]) == pytest.approx(trial["params"][key], rel=1e-3)


def test_the_page_says_what_is_best_and_what_it_cost(tmp_path, undrawn):
    study = make_study(40, 2)
    best = study["trials"][study["best"]]
    best["params"] = {"optimizer.learning_rate": 0.0099, "train.batch_size": 64}
    text = _parsed(study, tmp_path).text
    assert f"Trial {study['best']} is the best of 14 complete trials" in text
    assert f"validation accuracy {100 * best['value']:.2f} %." in text
    assert f"python -m cnn_jax.main --config={tmp_path}/best.py --workdir=..." in text
    assert "The test split was not looked at: the command measures it, once." in text
    assert "is 0.0099, at the upper end of its range (0.0001 to 0.01, on the log scale)" in text
    assert text.count("upper end") == 2  # In the warning, and in the table.
    assert "lower end" not in text
    cost = study["cost"]
    saved = 1 - cost["epochs"] / cost["epochs_without_pruning"]
    assert "Of 50 trials that were wanted, 40 were started: 14 complete, 20 pruned, 6" in text
    assert f"trained for {cost['epochs']:,} epochs" in text
    assert f"would have been {cost['epochs_without_pruning']:,} epochs" in text
    assert f"so {100 * saved:.0f} % of them were saved" in text
    assert "began 2025-05-01 10:00 and ended 2025-05-01 13:26" in text.replace("  ", " ")
    for said in ("folder:/data/eurosat", "0f3a" * 8, "configs/eurosat.py", "optuna 4.5.0"):
        assert said in text
    assert "host0 (20 trials), host1 (20 trials)" in text


def test_the_page_needs_nothing_else(tmp_path):
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


@pytest.mark.parametrize(
    ("study", "sentences"),
    [
        (make_study(0), ["No trial has been started.", "There is no best trial"]),
        (make_study(3, states=("failed",)), ["No trial has a value: all have failed."]),
        (make_study(1), ["Trial 0 is the only complete trial", "A single trial has a value"]),
        (make_study(2, states=("pruned",)), ["There is no best trial: none has been completed"]),
        (make_study(2, states=("running", "failed")), ["1 failed, 1 still running"]),
        (make_study(3, 0), ["The study has no parameters."]),
    ],
)
def test_what_is_missing_is_a_sentence(study, sentences, tmp_path, undrawn):
    text = _parsed(study | {"importance": None, "importance_note": "Too few."}, tmp_path).text
    for sentence in [*sentences, "Too few."]:
        assert sentence in text


def test_a_loss_is_no_percentage(tmp_path, undrawn):
    study = make_study(30, 3, "validation_loss")
    best = study["trials"][study["best"]]
    text = _parsed(study, tmp_path).text
    assert f"validation loss {best['value']:.4f}." in text
    assert "the least validation loss" in text


def test_a_choice_of_none_is_not_what_is_missing(tmp_path, undrawn):
    study = make_study(2, 1, states=("complete",))
    study["space"]["model.norm"] = {"kind": "categorical", "choices": ["batch", None]}
    study["space"]["train.steps"] = {"kind": "int", "low": 16, "high": 64, "log": False, "step": 16}
    study["trials"][0]["params"] |= {"model.norm": None, "train.steps": 32}
    rows = _parsed(study, tmp_path).rows[1:]
    first, second = (row[-3:-1] for row in rows)
    assert first == [["1.0", "None"], ["32", "32"]]
    assert second == [[str(study_page._SORTS_FIRST), study_page._NOTHING]] * 2
    assert "16 to 64 in steps of 16" in (tmp_path / "index.html").read_text("utf-8")


def test_hostile_texts_are_text(tmp_path, undrawn):
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
