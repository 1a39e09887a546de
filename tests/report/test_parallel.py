import math

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from studies import make_study

from cnn_jax.report import parallel, style

LIGHT = style.THEMES[0]


def test_positions_on_axes_match_values_by_hand():
    space = {
        "rate": {"kind": "float", "low": 1e-4, "high": 1.0, "log": True},
        "size": {"kind": "categorical", "choices": [16, "a", False]},
        "dropout": {"kind": "float", "low": 0.0, "high": 0.5, "log": False},
        "layers": {"kind": "int", "low": 1, "high": 1024, "log": True},
    }
    parameters = [
        {"rate": 1e-3, "size": 16, "dropout": 0.1, "layers": 32},
        {"rate": 1.0, "size": False, "dropout": 0.5, "layers": 1},
        # The keys of a trial may have another order than the keys of the space.
        {"layers": 1024, "dropout": 0.0, "size": "a", "rate": 1e-4},
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
    np.testing.assert_allclose(parallel.line_positions(study, trials), expected, atol=1e-12)


@pytest.mark.parametrize("monitor", ["validation_accuracy", "validation_loss"])
def test_better_trials_have_stronger_and_higher_lines(monitor):
    study = make_study(40, 3, monitor)
    figure = Figure()
    parallel.parallel(study, figure, LIGHT)
    complete = [line for line in figure.axes[0].lines if line.get_zorder() == 2]
    (best,) = (line for line in figure.axes[0].lines if line.get_zorder() == 3)
    assert to_rgba(best.get_color()) == to_rgba(LIGHT.second)
    assert len(complete) == study["cost"]["complete"] - 1
    is_loss = monitor.endswith("loss")
    ends = [line.get_ydata()[-1] for line in complete]
    assert ends == sorted(ends, reverse=is_loss)  # Better trials are drawn on top.
    assert best.get_ydata()[-1] == (0 if is_loss else 1)
    reds = [to_rgba(line.get_color())[0] for line in complete]
    assert reds == sorted(reds, reverse=True)  # Better trials are darker.
    assert reds[0] > reds[-1] + 0.1


def test_long_choices_are_shortened_in_the_middle():
    assert parallel._shorten("(16, 32, 64, 128)", 9) == "(16,…128)"
    assert parallel._shorten("short", 5) == "short"
