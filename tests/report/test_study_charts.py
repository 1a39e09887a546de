import numpy as np
import pytest
from matplotlib.figure import Figure
from studies import make_study

from cnn_jax.report import study_charts, style

LIGHT = style.THEMES[0]


def _labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_history_shows_all_trials():
    study = make_study(40, 2)
    figure = Figure()
    study_charts.history(study, figure, LIGHT)
    (axes,) = figure.axes
    points = dict(zip(_labels(axes), axes.collections, strict=False))
    for state in ("complete", "pruned", "failed"):
        trials = [trial for trial in study["trials"] if trial["state"] == state]
        numbers = points[state].get_offsets()[:, 0].tolist()
        assert numbers == [trial["number"] for trial in trials]
    # Failed trials are drawn at the lower edge of the chart.
    assert not points["failed"].get_offsets()[:, 1].any()
    (best_line,) = axes.lines
    assert best_line.get_ydata()[-1] == study["trials"][study["best"]]["value"]
    assert best_line.get_xdata()[-1] == 39


def test_curve_has_gaps_at_missing_values():
    study = make_study(12, 2)
    study["trials"][0]["curve"][3:5] = [None, float("nan")]
    figure = Figure()
    study_charts.curves(study | {"best": 0}, figure, LIGHT)
    best = next(line for line in figure.axes[0].lines if line.get_label() == "best")
    assert best.get_xdata().tolist() == list(range(1, 16))
    assert np.flatnonzero(np.isnan(best.get_ydata())).tolist() == [3, 4]


def test_parameters_with_equal_short_names_have_separate_bars():
    keys = [f"model.{'long_' * 8}{i}" for i in range(3)]
    shares = dict(zip(keys, (0.2, 0.7, 0.1), strict=True))
    figure = Figure()
    study_charts.importance({"importance": shares}, figure, LIGHT)
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == [0.7, 0.2, 0.1]
    assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == pytest.approx([0, 1, 2])


def test_trials_with_same_choice_are_side_by_side():
    study = make_study(40, 2)
    choices = study["space"]["train.batch_size"]["choices"]
    figure = Figure()
    study_charts.value_by_parameter(study, "train.batch_size", figure, LIGHT)
    drawn = np.concatenate([points.get_offsets() for points in figure.axes[0].collections[:2]])
    trials = [
        trial
        for state in ("pruned", "complete")
        for trial in study["trials"]
        if trial["state"] == state
    ]
    indices = [choices.index(trial["params"]["train.batch_size"]) for trial in trials]
    assert np.abs(drawn[:, 0] - indices).max() <= 0.2
    assert len(set(drawn[:, 0])) == len(trials)


def test_axis_labels_keep_a_distance():
    assert study_charts.spaced_indices(5, 1) == [0, 1, 2, 3, 4]
    assert study_charts.spaced_indices(10, 2) == [0, 2, 4, 6, 9]
    assert study_charts.spaced_indices(1, 3) == [0]


def test_axis_name_is_last_part_of_key_if_unique():
    names = study_charts.axis_names(["a.rate", "model.dropout", "augment.dropout", "b.猫"])
    assert names == ["rate", "model.dropout", "augment.dropout", "#3"]
