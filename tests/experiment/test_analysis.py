"""Tests of the decisions and checks of experiments, and of the text and the page."""

import json
import math

import numpy as np
import pytest
from logs import DAY, START, experiment

from cnn_jax.experiment import texts
from cnn_jax.experiment.analysis import analyse, analyse_pairs
from cnn_jax.experiment.observations import Observations, Unit
from cnn_jax.experiment.page import write_page

NOW = START + 100 * DAY


def observe(units, **changes):
    values = {
        "units": units,
        "pairs": [],
        "agreements": [],
        "milliseconds": {"champion": [5.0, 6.0], "challenger": [7.0]},
        "failures": {"champion": 0, "challenger": 0},
        "misplaced": 0,
        "skew": -1.0,
    }
    return Observations(**(values | changes))


def make_units(count, champion=0.5, challenger=0.5, seed=0, fraction=0.5, **changes):
    """Returns units whose outcomes are 0 or 1; the chances of the arms are given."""
    rng = np.random.default_rng(seed)
    units = []
    for number in range(count):
        arm = "challenger" if rng.random() < fraction else "champion"
        chance = challenger if arm == "challenger" else champion
        outcomes = [float(rng.random() < chance)]
        values = {"outcomes": outcomes, "milliseconds": float(rng.uniform(1, 10))}
        units.append(Unit(arm, START + number, **(values | changes)))
    return units


def result_of(units, **changes):
    return analyse(experiment(**changes), observe(units), NOW)


def failed(result):
    return [check["name"] for check in result["checks"] if not check["passed"]]


def test_better_challenger_is_found_once():
    result = result_of(make_units(2000, 0.4, 0.6))
    assert (result["decision"], failed(result)) == ("better", [])
    assert 0 < result["decided_after"] < 1000
    low, high = result["interval"]
    assert low < 0.2 < high
    assert low > 0
    again = result_of(make_units(2000, 0.4, 0.6)[: result["decided_after"]])
    assert again["decided_after"] == result["decided_after"]


def test_worse_challenger_is_found():
    assert result_of(make_units(2000, 0.6, 0.4))["decision"] == "worse"


def test_equal_arms_give_no_decision():
    result = result_of(make_units(2000, seed=1))
    assert (result["decision"], result["decided_after"], failed(result)) == ("none", None, [])
    assert (
        result["arms"]["champion"]["with_outcome"] + result["arms"]["challenger"]["with_outcome"]
        == 2000
    )


def test_unequal_fraction_needs_no_correction():
    """The challenger answers 20 %, and the arms are equal."""
    result = result_of(make_units(3000, 0.9, 0.9, fraction=0.2), fraction=0.2)
    assert (result["decision"], failed(result)) == ("none", [])


def test_pending_units_do_not_count():
    units = make_units(300, 0.2, 0.9)
    running = experiment(window=DAY)
    result = analyse(running, observe(units), START + DAY + 100)
    assert result["units"] == 101
    assert sum(arm["pending"] for arm in result["arms"].values()) == 199
    assert analyse(running, observe(units), START)["decision"] == "none"


def test_sample_ratio_mismatch_makes_the_result_invalid():
    units = make_units(3000, 0.4, 0.6, fraction=0.4)
    result = result_of(units)
    assert (result["decision"], failed(result)) == ("invalid", ["sample ratio"])
    assert "are in the challenger, expected 50.00%" in texts.headline(result)


def test_mismatch_of_return_rates_makes_ratings_invalid():
    units = make_units(3000)
    for unit in units[::2]:
        if unit.arm == "challenger":
            unit.outcomes = [None]
    assert failed(result_of(units, outcome="rating")) == ["feedback ratio"]
    # A missing reward is the outcome 0, so its rate may differ.
    result = result_of(units, outcome="reward")
    assert (result["decision"], failed(result)) == ("worse", [])


@pytest.mark.parametrize(
    ("changes", "name"), [({"misplaced": 1}, "assignment"), ({"skew": 6.0}, "clocks")]
)
def test_wrong_rows_make_the_result_invalid(changes, name):
    result = analyse(experiment(), observe(make_units(500, 0.2, 0.9), **changes), NOW)
    assert (result["decision"], failed(result)) == ("invalid", [name])


def test_failures_of_the_challenger_mean_worse():
    units = make_units(1500, 0.4, 0.6)
    for unit in units[::4]:
        unit.failures = int(unit.arm == "challenger")
    result = result_of(units)
    assert (result["decision"], failed(result)) == ("worse", ["failures"])
    assert texts.headline(result).startswith("Version 2 must not be promoted: ")


def test_failures_of_the_champion_are_no_problem():
    units = make_units(1500)
    for unit in units[::4]:
        unit.failures = int(unit.arm == "champion")
    assert failed(result_of(units)) == []


def test_slow_answers_of_the_challenger_mean_worse():
    units = make_units(2000)
    for unit in units:
        unit.milliseconds *= 1 + (unit.arm == "challenger")
    assert failed(result_of(units)) == ["latency"]


def test_unit_without_an_answer_is_not_slow():
    units = make_units(500)
    for unit in units[:300:2]:
        unit.milliseconds, unit.outcomes = math.nan, []
    assert failed(result_of(units)) == []


def test_pairs_are_counted_and_compared():
    rng = np.random.default_rng(0)
    challenger, champion = rng.random((2, 400)) < np.array([[0.95], [0.85]])
    result = analyse_pairs(np.stack([challenger, champion], axis=1))
    assert result["correct"] == {"champion": champion.sum(), "challenger": challenger.sum()}
    assert result["gains"] == (challenger & ~champion).sum()
    assert result["losses"] == (champion & ~challenger).sum()
    assert result["difference"] == pytest.approx(challenger.mean() - champion.mean())
    assert result["decision"] == "better"
    swapped = analyse_pairs(np.stack([champion, challenger], axis=1))
    assert (swapped["decision"], swapped["decided_after"]) == ("worse", result["decided_after"])


def test_curve_is_short_and_ends_with_the_last_unit():
    result = result_of(make_units(5000))
    curve = result["curve"]
    assert len(curve["count"]) == len(result["times"]) <= 200
    assert (curve["count"][0], curve["count"][-1]) == (1, 5000)
    assert curve["difference"][-1] == result["difference"]


@pytest.mark.parametrize("count", [0, 1, 150])
@pytest.mark.parametrize("is_shadow", [False, True])
def test_text_json_and_page_are_written(tmp_path, count, is_shadow):
    pairs = [(True, bool(number % 3)) for number in range(count)]
    observations = observe(
        [] if is_shadow else make_units(count), pairs=pairs, agreements=[a == b for a, b in pairs]
    )
    running = experiment(is_shadow=is_shadow, name="a" * 30)
    result = analyse(running, observations, NOW)
    json.dumps(result, allow_nan=False)
    text = texts.describe(result, 80)
    assert texts.headline(result).split()[0] in text
    assert max(map(len, text.splitlines())) <= 80
    write_page(result, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert running.name in page
    assert ("data:image/png" in page) == (count > 0)
    assert "https://" not in page
