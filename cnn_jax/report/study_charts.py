"""The charts of a study: value by trial, by epoch and by parameter, and parameter importance."""

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cnn_jax.report import style
from cnn_jax.report.study_values import (
    Range,
    Scale,
    Study,
    Trial,
    best_trial,
    comparable_trials,
    format_number,
    is_number,
    parameter_value,
    running_best,
    scale_for_all_trials,
    scale_for_complete_trials,
    sorted_importance,
    sorted_trials,
    trials_with_value,
    value_scale,
)
from cnn_jax.report.style import Theme


class _Look(NamedTuple):
    """The style of a trial state: marker, index of the colour, and whether the marker is filled."""

    marker: str
    line: int
    is_filled: bool


# The states are drawn in this order, so that the most important state is drawn on top.
_STATES = {
    "failed": _Look("x", 3, True),
    "pruned": _Look("v", 5, False),
    "running": _Look("D", 2, False),
    "complete": _Look("o", 0, True),
}


# The charts with trials or epochs on the horizontal axis.


def history(study: Study, figure: Figure, theme: Theme) -> None:
    """Draws the value of each trial by trial number, and the best value so far as a line.

    Only complete trials count for the best value. Failed trials without a value are drawn at the
    lower edge of the chart.
    """
    axes = style.plain(figure.subplots(), theme)
    scale, trials = scale_for_all_trials(study), trials_with_value(study)
    for state, some in _trials_by_state(trials):
        numbers = [trial["number"] for trial in some]
        values = scale.clip([trial["value"] for trial in some])
        axes.scatter(numbers, values, label=state, **_marks(state, theme, len(trials)))
    _draw_failed(study, axes, theme)
    _draw_running_best(study, scale, axes, theme)
    _draw_value_axis(scale, axes)
    _draw_counting_axis("trial", axes)
    _legend_above(axes, theme)


def _draw_failed(study: Study, axes: Axes, theme: Theme) -> None:
    """Draws a marker at the lower edge of the chart for each failed trial without a value."""
    failed = [
        trial["number"]
        for trial in study["trials"]
        if trial["state"] == "failed" and not is_number(trial["value"])
    ]
    if failed:
        lower_edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        marks = _marks("failed", theme, len(failed))
        axes.scatter(failed, [0.0] * len(failed), label="failed", **lower_edge, **marks)


def _draw_running_best(study: Study, scale: Scale, axes: Axes, theme: Theme) -> None:
    """Draws the best value of the complete trials so far, as a step line over the trial numbers."""
    numbers, values = running_best(study)
    if not numbers:
        return
    # The line ends at the last trial, even if that trial is not complete.
    last = sorted_trials(study)[-1]["number"]
    axes.step(
        [*numbers, last],
        scale.clip([*values, values[-1]]),
        where="post",
        color=theme.second,
        linewidth=1.5,
        label="best so far",
    )


def curves(study: Study, figure: Figure, theme: Theme) -> None:
    """Draws the monitored value of each trial by epoch, with the best trial on top."""
    axes = style.plain(figure.subplots(), theme)
    best = best_trial(study)
    others = [trial for trial in sorted_trials(study) if trial is not best]
    for state, trials in _trials_by_state(others):
        lines = [_line(trial) for trial in trials if trial["curve"]]
        if lines:
            _draw_lines(lines, state, line_alpha(len(others)), axes, theme)
    if best is not None and best["curve"]:
        epochs, values = _line(best).T
        marker = "o" if len(values) == 1 else ""
        axes.plot(epochs, values, color=theme.second, linewidth=2, marker=marker, label="best")
    everything = [v for trial in study["trials"] for v in trial["curve"] if is_number(v)]
    # The first epochs have far worse values than the last epochs, so this axis covers a larger
    # range (reach=10) than the axes of the other charts.
    _draw_value_axis(value_scale(study, everything, reach=10), axes)
    _draw_counting_axis("epoch", axes)
    _legend_above(axes, theme)


def _draw_lines(
    lines: Sequence[Float[np.ndarray, "_ 2"]], state: str, alpha: float, axes: Axes, theme: Theme
) -> None:
    """Draws the curves of the trials in one state; curves of complete trials are thicker."""
    colour = theme.lines[_STATES[state].line]
    width = 1.0 if state == "complete" else 0.6
    alpha *= 1 if state == "complete" else 0.7
    axes.add_collection(LineCollection(lines, color=colour, linewidths=width, alpha=alpha))
    # Mark the end of each curve with a dot, because a curve of one epoch has no visible line.
    ends = np.array([line[-1] for line in lines])
    axes.scatter(*ends.T, s=4, color=colour, alpha=alpha, linewidths=0)
    axes.plot([], [], color=colour, linewidth=1.4, label=state)


def _line(trial: Trial) -> Float[np.ndarray, "epochs 2"]:
    """Returns the points (epoch, value) of a trial's curve; a non-finite value becomes NaN.

    The curve has a gap at a NaN.
    """
    values = [value if is_number(value) else math.nan for value in trial["curve"]]
    return np.column_stack([np.arange(1, len(values) + 1), np.array(values, float)])


# The charts of the parameters of a study.


def importance(study: Study, figure: Figure, theme: Theme) -> None:
    """Draws the importance of each parameter as a bar, in decreasing order."""
    axes = style.plain(figure.subplots(), theme)
    shares = sorted_importance(study)
    bars = axes.barh(range(len(shares)), list(shares.values()), color=theme.accent)
    texts = [f"{100 * share:.1f}" for share in shares.values()]
    axes.bar_label(bars, texts, padding=3, color=theme.ink, size=style.TEXT_SIZE)
    axes.set_yticks(range(len(shares)), axis_names(list(shares)), parse_math=False)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(style.percent())
    # Leave space for the number at the end of the longest bar.
    axes.set(xlim=(0, max(1.15 * max(shares.values()), 0.01)), xlabel="importance (%)")


def value_by_parameter(study: Study, key: str, figure: Figure, theme: Theme) -> None:
    """Plots the monitored value of each trial against the trial's value of a parameter."""
    axes = style.plain(figure.subplots(), theme)
    scale, range_, best = scale_for_complete_trials(study), study["space"][key], best_trial(study)
    trials = comparable_trials(study)
    for state, some in _trials_by_state(trials):
        across = [_axis_position(range_, trial, key) for trial in some]
        values = scale.clip([trial["value"] for trial in some])
        axes.scatter(across, values, **_marks(state, theme, len(trials)))
    if best in trials:
        star = {"marker": "*", "s": 90, "color": theme.second, "zorder": 3}
        axes.scatter([_axis_position(range_, best, key)], scale.clip([best["value"]]), **star)
    _draw_value_axis(scale, axes)
    if range_["kind"] == "categorical":
        _draw_category_axis(range_, axes)
    else:
        _draw_number_axis(range_, axes)


def _axis_position(range_: Range, trial: Trial, key: str) -> float:
    """Returns a trial's position on a parameter's axis.

    Trials with the same choice get slightly different positions, so that their points do not
    cover each other.
    """
    value = parameter_value(trial, key)
    if range_["kind"] != "categorical":
        return value if is_number(value) else math.nan
    if value not in range_["choices"]:
        return math.nan
    golden = (math.sqrt(5) - 1) / 2  # Multiples of the golden ratio, modulo 1, are evenly spread.
    return range_["choices"].index(value) + 0.4 * (trial["number"] * golden % 1 - 0.5)


def _draw_category_axis(range_: Range, axes: Axes) -> None:
    """Labels at most 13 choices on the axis of a categorical parameter; slants long labels."""
    names = style.tick_names([str(choice) for choice in range_["choices"]])
    shown = spaced_indices(len(names), math.ceil(len(names) / 12))
    labels = [names[index] for index in shown]
    is_tight = sum(map(len, labels)) > 36
    slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_tight else {}
    axes.set_xticks(shown, labels, parse_math=False, **slant)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(visible=False, axis="x")


def _draw_number_axis(range_: Range, axes: Axes) -> None:
    """Scales and labels the axis of a numeric parameter."""
    low, high = range_["low"], range_["high"]
    if range_["log"]:
        axes.set_xscale("log")
        subs = (1.0, 2.0, 5.0) if high / low < 30 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_locator(NullLocator())
        margin = (high / low) ** 0.04
        ends = (low / margin, high * margin)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=range_["kind"] == "int"))
        margin = 0.04 * (high - low)
        ends = (low - margin, high + margin)
    if low < high:
        axes.set_xlim(*ends)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))


# The styles of points, lines, axes and legends.


def _trials_by_state(trials: Sequence[Trial]) -> Iterator[tuple[str, list[Trial]]]:
    """Yields each state that occurs, with the trials in this state, in drawing order."""
    for state in _STATES:
        if found := [trial for trial in trials if trial["state"] == state]:
            yield state, found


def _marks(state: str, theme: Theme, count: int) -> dict[str, Any]:
    """Returns the marker style of a trial state; markers are smaller for more than 100 trials."""
    look = _STATES[state]
    colour = theme.lines[look.line]
    size = 22 if count <= 100 else 12
    marks = {"marker": look.marker, "s": size, "linewidths": 0.9, "alpha": 0.8}
    if not look.is_filled:
        return marks | {"facecolors": "none", "edgecolors": colour}
    return marks | {"color": colour}


def line_alpha(lines: int) -> float:
    """Returns the opacity of each line in a chart; the more lines, the lower the opacity."""
    return float(np.clip(6 / math.sqrt(max(lines, 1)), 0.3, 0.9))


def axis_names(keys: Sequence[str]) -> list[str]:
    """Returns a label for each parameter key: its last part if unique, else the whole key."""
    last = [key.rpartition(".")[2] for key in keys]
    counts = collections.Counter(last)
    return style.tick_names(
        [part if counts[part] == 1 else key for key, part in zip(keys, last, strict=True)]
    )


def spaced_indices(count: int, every: int) -> list[int]:
    """Returns indices below `count` that are at least `every` apart, including the last index."""
    last = count - 1
    return [*(index for index in range(0, last, every) if last - index >= every), last]


def _draw_value_axis(scale: Scale, axes: Axes) -> None:
    """Scales and labels the axis of the monitored value."""
    margin = 0.05 * (scale.high - scale.low)
    axes.set(ylim=(scale.low - margin, scale.high + margin), ylabel=scale.label)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scale.format_tick(value)))


def _draw_counting_axis(label: str, axes: Axes) -> None:
    """Labels a horizontal axis with whole numbers, such as trial numbers or epochs."""
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    axes.set(xlabel=label)


def _legend_above(axes: Axes, theme: Theme) -> None:
    """Draws a legend above the chart: each trial state once, the most important state first."""
    handles, labels = axes.get_legend_handles_labels()
    drawn = dict(zip(labels, handles, strict=True))
    order = [label for label in [*reversed(_STATES), "best so far", "best"] if label in drawn]
    style.legend(
        axes,
        theme,
        handles=[drawn[label] for label in order],
        labels=order,
        loc="lower center",
        ncols=min(len(order), 4),
        columnspacing=1.2,
        handletextpad=0.5,
        bbox_to_anchor=(0.5, 1),
    )
