import math

import pytest

from cnn_jax.report.study_values import (
    format_number,
    range_edge,
    range_position,
    running_best,
    value_scale,
)

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
        # The range of LOG is four decades, so 5 % of the range is a fifth of a decade.
        *((LOG, 1.5e-4, "lower"), (LOG, 1.6e-4, None), (LOG, 0.02, None)),
        *((LOG, 0.63, None), (LOG, 0.64, "upper"), (LOG, 1.0, "upper")),
        *((INT, 2, "lower"), (INT, 3, None), (INT, 37, None), (INT, 38, "upper")),
        # The range of LOG_INT is ten doublings, so 5 % of the range is half a doubling.
        *((LOG_INT, 1, "lower"), (LOG_INT, 2, None), (LOG_INT, 700, None), (LOG_INT, 730, "upper")),
        *((CHOICE, 16, None), (CHOICE, False, None), (LINEAR, math.nan, None)),
        # A range with a single value has no edge.
        ({"kind": "float", "low": 0.1, "high": 0.1, "log": False}, 0.1, None),
    ],
)
def test_edge_is_five_percent_of_range(range_, value, expected):
    assert range_edge(range_, value) == expected


@pytest.mark.parametrize(
    ("range_", "value", "expected"),
    [
        *((LINEAR, 0.1, 0.2), (LOG, 1e-3, 0.25), (LOG_INT, 32, 0.5), (INT, 40, 1.0)),
        *((CHOICE, 16, 0.0), (CHOICE, "a", 0.5), (CHOICE, False, 1.0), (CHOICE, "b", math.nan)),
        *((LINEAR, math.nan, math.nan), (LINEAR, "a", math.nan), (LOG, 0.0, math.nan)),
        ({"kind": "categorical", "choices": ["one"]}, "one", 0.5),
        ({"kind": "int", "low": 3, "high": 3, "log": False}, 3, 0.5),
    ],
)
def test_position_is_fraction_of_range(range_, value, expected):
    assert range_position(range_, value) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_value_axis_excludes_far_worse_values():
    """The median is 0.9 and the best value is 0.95, so the axis starts at 0.8."""
    values = [0.1, 0.9, 0.9, 0.95, 0.94]
    rising = value_scale({"direction": "maximize", "monitor": "validation_f1"}, values)
    assert (rising.low, rising.high) == pytest.approx((0.8, 0.95))
    assert rising.clip([0.1, 0.9]) == pytest.approx([0.8, 0.9])
    assert rising.position(0.1) == 0
    assert (rising.name, rising.format_value(0.95)) == ("validation F1", "95.00 %")
    falling = value_scale(
        {"direction": "minimize", "monitor": "validation_loss"}, [9.0, 0.3, 0.3, 0.2, 0.25]
    )
    assert (falling.low, falling.high) == pytest.approx((0.2, 0.5))
    assert falling.format_value(0.25) == "0.2500"


def test_running_best_uses_complete_trials_by_number():
    states = ("complete", "pruned", "complete", "complete", "failed", "complete")
    values = (0.5, 0.9, 0.4, 0.7, None, 0.6)
    trials = [
        {"number": i, "state": state, "value": value}
        for i, (state, value) in enumerate(zip(states, values, strict=True))
    ]
    study = {"trials": trials[::-1], "direction": "maximize"}
    assert running_best(study) == ([0, 2, 3, 5], [0.5, 0.5, 0.7, 0.7])
    study["direction"] = "minimize"
    assert running_best(study) == ([0, 2, 3, 5], [0.5, 0.4, 0.4, 0.4])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((0, "0"), (512, "512"), (1024, "1,024"), (1e-4, "0.0001"), (0.0012345678, "0.001235")),
        *((3.21e-5, "3.21e-5"), (2e8, "2e8"), (12345.6, "12,346"), (-0.5, "-0.5")),
    ],
)
def test_numbers_have_four_digits(value, expected):
    assert format_number(value) == expected
