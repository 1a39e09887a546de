"""The page of a hyper-parameter study: its best trial, what it cost, charts, and all trials.

Keys of parameters and names of categories are cut short in charts, and stand whole on the page.
"""

import base64
import collections
import dataclasses
import functools
import hashlib
import importlib.resources
import itertools
import math
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import markupsafe
import numpy as np
from jaxtyping import Float
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cnn_jax.report import style
from cnn_jax.report.style import Theme

Study = Mapping[str, Any]
Trial = Mapping[str, Any]
# A parameter's entry in the study's space: its kind, and its ends or its choices.
Range = Mapping[str, Any]

# A value this near to an end of its range, in shares of it, lies at its edge.
_EDGE = 0.05
# An axis of values goes from the best to so many times the distance of the median from it; one of
# curves, which begin far from their ends, to so many.
_REACH, _REACH_OF_CURVES = 3, 10
# A cell without a number sorts below all others. Infinity less infinity would be no number.
_SORTS_FIRST = -1e300
# Inches of parallel coordinates: between two axes, of the chart's width, and of its axes' height.
_SPACING, _WIDTHS, _AXIS = 1.25, (5.5, 10.5), 3.2
# Stands for what is not there.
_NOTHING = "\N{EN DASH}"
# In points: of small text, how wide a letter of it and how high a line of it is; and how wide a
# letter of the names of axes.
_SMALL, _LETTER, _LINE = 7.5, 4.7, 9.5
_LETTER_OF_AXES = 5.3
# Letters of a category's name that are left at least, and how many names an axis has room for.
_SHORTEST, _MOST_NAMES = 8, 12
# What charts of single parameters measure, in inches: three stand in a row of the page.
_SLICE = (3.3, 2.5)
# Of the page, behind the names of categories.
_GROUNDS = {"": "#ffffff", "_dark": "#17191d"}
# How each state is drawn: its marker, its colour among the theme's lines, and whether it is full.
_STATES = {
    "failed": ("x", 3, True),
    "pruned": ("v", 5, False),
    "running": ("D", 2, False),
    "complete": ("o", 0, True),
}


class Cell(NamedTuple):
    """Of the table of all trials: what it shows, what it sorts by, and its class."""

    text: str
    by: float
    look: str = "n"


class Chart(NamedTuple):
    """What is drawn, on (width, height) inches."""

    plot: style.Plot
    size: tuple[float, float] = style.SIZE


def write_study_page(study: Study, folder: pathlib.Path) -> pathlib.Path:
    """Writes a study as a page that needs no other file, and its charts beside it.

    Args:
      study: Plain JSON values, as `tune.outcome.summarize` gives them: "name", "monitor" and
        "direction"; "space", the range of each parameter; "trials"; "best", the number of one of
        them or None; "importance"; "cost"; and where it comes from.
      folder: The study's, where its best configuration lies. Gets index.html and PNG files; it is
        made if it is not there.

    Returns:
      The page's path, `folder`/index.html.

    Raises:
      OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    charts = charts_of(study)
    for name, chart in charts.items():
        for theme in style.THEMES:
            style.draw(folder / f"{name}{theme.suffix}.png", theme, chart.plot, chart.size)
    path = folder / "index.html"
    path.write_text(_page(study, charts, folder), "utf-8")
    return path


# What the study says.


@dataclasses.dataclass(frozen=True)
class Scale:
    """How the monitored value is written, and what an axis of it shows.

    Attributes:
      name: Such as "validation accuracy".
      is_share: Whether it is written in percent.
      is_rising: Whether the larger value is the better.
      low: The axis's lower end.
      high: Its upper end.
    """

    name: str
    is_share: bool
    is_rising: bool
    low: float
    high: float

    @property
    def label(self) -> str:
        return f"{self.name} (%)" if self.is_share else self.name

    @property
    def digits(self) -> int:
        """So many decimals tell the axis's ticks apart."""
        span = (self.high - self.low) * (100 if self.is_share else 1)
        return min(max(1 - math.floor(math.log10(span)), 0), 6)

    def text(self, value: float | None) -> str:
        """Such as "93.45 %"; a loss has four decimals."""
        if value is None or not math.isfinite(value):
            return _NOTHING
        return f"{100 * value:.2f} %" if self.is_share else f"{value:.4f}"

    def tick(self, value: float, more: int = 0) -> str:
        """As an axis has it, whose label says that it is in percent; `more` are more digits."""
        return f"{value * (100 if self.is_share else 1):.{self.digits + more}f}"

    def at_edge(self, values: Sequence[float]) -> list[float]:
        """Values beyond the axis lie at its end."""
        return np.clip(values, self.low, self.high).tolist()

    def place(self, value: float) -> float:
        """Where it lies on the axis: 0 at its lower end and 1 at its upper one."""
        return (self.at_edge([value])[0] - self.low) / (self.high - self.low)


def scale_of(study: Study, values: Sequence[float], reach: float = _REACH) -> Scale:
    """An axis for these values of what the study monitors.

    It ends at the worst of them, but not farther from the best than `reach` times the distance of
    the median from it: a few trials that learn nothing would else leave no room to tell the good
    ones apart.

    Args:
      study: Says what is monitored, and whether it is to rise.
      values: Any number of them, all finite.
      reach: At least 1.
    """
    is_rising = study["direction"] == "maximize"
    is_share = not study["monitor"].endswith("loss")
    name = study["monitor"].replace("_", " ").replace("f1", "F1")
    if not len(values):
        return Scale(name, is_share, is_rising, 0.0, 1.0)
    low, high, median = float(np.min(values)), float(np.max(values)), float(np.median(values))
    if is_rising and median < high:
        low = max(low, high - reach * (high - median))
    elif not is_rising and median > low:
        high = min(high, low + reach * (median - low))
    if high - low < 1e-9:
        around = max(0.01 * abs(high), 1e-3)
        low, high = low - around, high + around
    return Scale(name, is_share, is_rising, low, high)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _ordered(study: Study) -> list[Trial]:
    return sorted(study["trials"], key=lambda trial: trial["number"])


def _valued(study: Study) -> list[Trial]:
    """The trials that have a value, in the order of their numbers."""
    return [trial for trial in _ordered(study) if _is_number(trial["value"])]


def _compared(study: Study) -> list[Trial]:
    """The trials whose parameters can be held against their values."""
    return [trial for trial in _valued(study) if trial["state"] != "failed"]


def _by_importance(study: Study) -> dict[str, float]:
    """The share of each parameter, the largest first."""
    return dict(sorted((study["importance"] or {}).items(), key=lambda item: -item[1]))


def _best(study: Study) -> Trial | None:
    return next((trial for trial in study["trials"] if trial["number"] == study["best"]), None)


def _scale_of_all(study: Study) -> Scale:
    return scale_of(study, [trial["value"] for trial in _valued(study)])


def _scale_of_complete(study: Study) -> Scale:
    """Where there are complete trials, theirs: most pruned ones are worse for being shorter."""
    complete = [trial["value"] for trial in _valued(study) if trial["state"] == "complete"]
    return scale_of(study, complete) if complete else _scale_of_all(study)


def _of(trial: Trial, key: str) -> Any:
    """A trial's value for a parameter; NaN, which no choice can be, if it lacks it."""
    return trial["params"].get(key, math.nan)


def place(range_: Range, value: Any) -> float:
    """Where a parameter's value lies in its range.

    Args:
      range_: Its kind, and its ends or its choices.
      value: NaN if the trial lacks it.

    Returns:
      0 at the lower end and 1 at the upper one, on the log scale where the range is searched on
      it. Categories lie at even distances. What has no room to be anywhere else lies at 0.5, and
      a value that is none of the range's has no place: NaN.
    """
    if range_["kind"] == "categorical":
        choices = range_["choices"]
        if value not in choices:
            return math.nan
        return choices.index(value) / (len(choices) - 1) if len(choices) > 1 else 0.5
    if not _is_number(value):
        return math.nan
    low, high = range_["low"], range_["high"]
    if low == high:
        return 0.5
    if range_["log"]:
        return math.log(value / low) / math.log(high / low) if value > 0 else math.nan
    return (value - low) / (high - low)


def edge(range_: Range, value: Any) -> str | None:
    """The end at which a value lies, "lower" or "upper", within 5 % of its range; or None.

    As far as the log scale goes where the range is searched on it. Categories have no ends.
    """
    where = place(range_, value)
    if range_["kind"] == "categorical" or math.isnan(where):
        return None
    # A value right at 5 % counts, whatever rounding makes of it.
    if where <= _EDGE + 1e-9:
        return "lower"
    return "upper" if where >= 1 - _EDGE - 1e-9 else None


def places(study: Study, trials: Sequence[Trial]) -> Float[np.ndarray, "trials axes"]:
    """Where each trial crosses each axis of the parallel coordinates, from 0 to 1.

    The axes are the parameters in the order of the space, and last the value. NaN where a trial
    has no value for a parameter.
    """
    scale = _scale_of_complete(study)
    rows = [
        [
            *(place(range_, _of(trial, key)) for key, range_ in study["space"].items()),
            scale.place(trial["value"]),
        ]
        for trial in trials
    ]
    return np.array(rows, float).reshape(len(trials), len(study["space"]) + 1)


# Charts.


def charts_of(study: Study) -> dict[str, Chart]:
    """The charts that there is something to draw of, by the names of their files."""
    charts = {}
    if _valued(study):
        charts["history"] = Chart(functools.partial(history, study))
    if any(_is_number(value) for trial in study["trials"] for value in trial["curve"]):
        charts["curves"] = Chart(functools.partial(curves, study))
    if study["importance"]:
        size = (4.0, 0.9 + 0.26 * len(study["importance"]))
        charts["importance"] = Chart(functools.partial(importance, study), size)
    if len(_compared(study)) > 1 and study["space"]:
        charts["parallel"] = Chart(functools.partial(parallel, study), parallel_size(study))
        for number, key in enumerate(study["space"]):
            plot = functools.partial(value_by_parameter, study, key)
            charts[f"slice_{number:02d}"] = Chart(plot, _SLICE)
    return charts


def history(study: Study, figure: Figure, theme: Theme) -> None:
    """The value of each trial by its number, and the best of the complete ones so far.

    Failed trials without a value stand at the foot.
    """
    axes = style.plain(figure.subplots(), theme)
    scale = _scale_of_all(study)
    for state, trials in _by_state(_valued(study)):
        numbers = [trial["number"] for trial in trials]
        values = scale.at_edge([trial["value"] for trial in trials])
        axes.scatter(numbers, values, label=state, **_marks(state, theme, len(_valued(study))))
    valueless = [trial for trial in study["trials"] if not _is_number(trial["value"])]
    failed = [trial["number"] for trial in valueless if trial["state"] == "failed"]
    if failed:
        foot = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        marks = _marks("failed", theme, len(failed))
        axes.scatter(failed, [0.0] * len(failed), label="failed", **foot, **marks)
    _draw_best_so_far(study, scale, axes, theme)
    _draw_value_axis(scale, axes)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="trial", ylabel=scale.label)
    _legend_above(axes, theme)


def best_so_far(study: Study) -> tuple[list[int], list[float]]:
    """Numbers of the complete trials, and the best value up to each of them."""
    complete = [trial for trial in _valued(study) if trial["state"] == "complete"]
    better = np.maximum if study["direction"] == "maximize" else np.minimum
    values = np.array([trial["value"] for trial in complete], float)
    return [trial["number"] for trial in complete], better.accumulate(values).tolist()


def _draw_best_so_far(study: Study, scale: Scale, axes: Axes, theme: Theme) -> None:
    numbers, values = best_so_far(study)
    if not numbers:
        return
    last = _ordered(study)[-1]["number"]  # The best stands until the end.
    axes.step(
        [*numbers, last],
        scale.at_edge([*values, values[-1]]),
        where="post",
        color=theme.second,
        linewidth=1.5,
        label="best so far",
    )


def curves(study: Study, figure: Figure, theme: Theme) -> None:
    """The monitored value of each trial by epoch; the best trial on top of all others."""
    axes = style.plain(figure.subplots(), theme)
    best = _best(study)
    others = [trial for trial in _ordered(study) if trial is not best]
    everything = [v for trial in study["trials"] for v in trial["curve"] if _is_number(v)]
    scale = scale_of(study, everything, _REACH_OF_CURVES)
    for state, trials in _by_state(others):
        width = 1.0 if state == "complete" else 0.6
        colour = theme.lines[_STATES[state][1]]
        alpha = _alpha(len(others)) * (1 if state == "complete" else 0.7)
        lines = [_line(trial) for trial in trials if trial["curve"]]
        if not lines:
            continue
        axes.add_collection(LineCollection(lines, color=colour, linewidths=width, alpha=alpha))
        # Where it ends: a curve of one epoch is nothing else.
        ends = np.array([line[-1] for line in lines])
        axes.scatter(*ends.T, s=4, color=colour, alpha=alpha, linewidths=0)
        axes.plot([], [], color=colour, linewidth=1.4, label=state)
    if best is not None and best["curve"]:
        epochs, values = _line(best).T
        marker = "o" if len(values) == 1 else ""
        axes.plot(epochs, values, color=theme.second, linewidth=2, marker=marker, label="best")
    _draw_value_axis(scale, axes)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="epoch", ylabel=scale.label)
    _legend_above(axes, theme)


def _line(trial: Trial) -> Float[np.ndarray, "epochs 2"]:
    """Epochs from 1, and values; what is no number leaves a gap."""
    values = [value if _is_number(value) else math.nan for value in trial["curve"]]
    return np.column_stack([np.arange(1, len(values) + 1), np.array(values, float)])


def importance(study: Study, figure: Figure, theme: Theme) -> None:
    """A bar for each parameter, the most important first."""
    axes = style.plain(figure.subplots(), theme)
    shares = _by_importance(study)
    bars = axes.barh(_axis_names(list(shares)), list(shares.values()), color=theme.accent)
    texts = [f"{100 * share:.1f}" for share in shares.values()]
    axes.bar_label(bars, texts, padding=3, color=theme.ink, size=style.TEXT_SIZE)
    axes.set_yticks(range(len(shares)), _axis_names(list(shares)), parse_math=False)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(style.percent())
    # Room for the number at the end of the longest bar.
    axes.set(xlim=(0, max(1.15 * max(shares.values()), 0.01)), xlabel="share (%)")


def value_by_parameter(study: Study, key: str, figure: Figure, theme: Theme) -> None:
    """The value of each trial by that of one parameter."""
    axes = style.plain(figure.subplots(), theme)
    scale, range_, best = _scale_of_complete(study), study["space"][key], _best(study)
    compared = _compared(study)
    for state, trials in _by_state(compared):
        across = [_across(range_, trial, key) for trial in trials]
        values = scale.at_edge([trial["value"] for trial in trials])
        axes.scatter(across, values, **_marks(state, theme, len(compared)))
    if best in compared:
        star = {"marker": "*", "s": 90, "color": theme.second, "zorder": 3}
        axes.scatter([_across(range_, best, key)], scale.at_edge([best["value"]]), **star)
    _draw_value_axis(scale, axes)
    _draw_parameter_axis(range_, axes)
    axes.set(ylabel=scale.label)


def _across(range_: Range, trial: Trial, key: str) -> float:
    """Where a trial stands on a parameter's axis: those of a category side by side, not on top."""
    value = _of(trial, key)
    if range_["kind"] != "categorical":
        return value if _is_number(value) else math.nan
    if value not in range_["choices"]:
        return math.nan
    golden = (math.sqrt(5) - 1) / 2  # Its multiples spread evenly, however many there are.
    return range_["choices"].index(value) + 0.4 * (trial["number"] * golden % 1 - 0.5)


def _draw_parameter_axis(range_: Range, axes: Axes) -> None:
    if range_["kind"] == "categorical":
        names = style.tick_names([str(choice) for choice in range_["choices"]])
        shown = _some(len(names), math.ceil(len(names) / _MOST_NAMES))
        labels = [names[index] for index in shown]
        is_tight = sum(map(len, labels)) > 36
        turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_tight else {}
        axes.set_xticks(shown, labels, parse_math=False, **turned)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.grid(visible=False, axis="x")
        return
    low, high = range_["low"], range_["high"]
    if range_["log"]:
        axes.set_xscale("log")
        subs = (1.0, 2.0, 5.0) if high / low < 30 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_locator(NullLocator())
        around = (high / low) ** 0.04
        ends = (low / around, high * around)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=range_["kind"] == "int"))
        around = 0.04 * (high - low)
        ends = (low - around, high + around)
    if low < high:
        axes.set_xlim(*ends)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def _by_state(trials: Sequence[Trial]) -> Iterator[tuple[str, list[Trial]]]:
    """The trials of each state that there is, those that matter most last and so on top."""
    for state in _STATES:
        if found := [trial for trial in trials if trial["state"] == state]:
            yield state, found


def _marks(state: str, theme: Theme, count: int) -> dict[str, Any]:
    """How the points of a state are drawn where there are so many trials."""
    marker, line, is_full = _STATES[state]
    colour = theme.lines[line]
    marks = {"marker": marker, "s": 22 if count <= 100 else 12, "linewidths": 0.9, "alpha": 0.8}
    if not is_full:
        return marks | {"facecolors": "none", "edgecolors": colour}
    return marks | {"color": colour}


def _alpha(lines: int) -> float:
    """Of a line among so many: where they lie upon each other they can still be told apart."""
    return float(np.clip(6 / math.sqrt(max(lines, 1)), 0.3, 0.9))


def _draw_value_axis(scale: Scale, axes: Axes) -> None:
    around = 0.05 * (scale.high - scale.low)
    axes.set_ylim(scale.low - around, scale.high + around)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scale.tick(value)))


def _legend_above(axes: Axes, theme: Theme) -> None:
    """The states in the reverse of the order in which they are drawn, each once."""
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


# Parallel coordinates.


def parallel_size(study: Study) -> tuple[float, float]:
    """(width, height) in inches: the more parameters, the wider, until the page is full."""
    least, most = _WIDTHS
    return min(max(_SPACING * (len(study["space"]) + 1), least), most), _AXIS + 1.1


def parallel(study: Study, figure: Figure, theme: Theme) -> None:
    """A line for each trial, across an axis for each parameter and one for the value.

    The better the value, the stronger the colour. Pruned trials are faint, and the best is on top.
    """
    axes = figure.subplots()
    axes.set_axis_off()
    _draw_trials(study, axes, theme)
    _draw_axes(study, axes, theme)
    _draw_ramp(study, axes, theme)
    axes.set(xlim=(-0.1, len(study["space"]) + 0.25), ylim=(-0.03, 1.03))


def _draw_trials(study: Study, axes: Axes, theme: Theme) -> None:
    compared, best = _compared(study), _best(study)
    lines = places(study, compared)
    across = np.arange(lines.shape[1])
    is_rising = study["direction"] == "maximize"
    quality = (lines[:, -1] if is_rising else 1 - lines[:, -1]).tolist()
    alpha = _alpha(len(compared))
    for row in np.argsort(quality, kind="stable").tolist():
        if compared[row] is best:
            continue
        if compared[row]["state"] == "complete":
            look = {"color": _colour(quality[row], theme), "linewidth": 1.2, "alpha": alpha}
            axes.plot(across, lines[row], zorder=2, **look)
        else:
            faint = {"color": theme.ink, "linewidth": 0.5, "alpha": 0.4 * alpha}
            axes.plot(across, lines[row], zorder=1, **faint)
    for row, trial in enumerate(compared):
        if trial is best:
            axes.plot(across, lines[row], color=theme.second, linewidth=2.4, zorder=3)


def _colour(quality: float, theme: Theme) -> tuple[float, float, float, float]:
    """Of the ramp, of which the first part would be lost on the page's ground."""
    return theme.colours(0.25 + 0.75 * quality)


def _draw_axes(study: Study, axes: Axes, theme: Theme) -> None:
    """Vertical lines with what is at their ends or, of categories, all along them."""
    value = _scale_of_complete(study).label.removeprefix("validation ")
    names = [*_axis_names(list(study["space"])), value]
    is_slanted = max(map(len, names)) * _LETTER_OF_AXES > _between_axes(study)
    slant = {"rotation": 30, "ha": "left", "rotation_mode": "anchor"} if is_slanted else {}
    for across, name in enumerate(names):
        axes.plot([across, across], [0, 1], color=theme.ink, linewidth=0.8, zorder=2.5)
        _write(axes, theme, name, (across, 1), (0, 17), **({"va": "bottom"} | slant))
    for across, range_ in enumerate(study["space"].values()):
        if range_["kind"] == "categorical":
            _write_categories(study, across, axes, theme)
            continue
        _write(axes, theme, number(range_["low"]), (across, 0), (0, -5), va="top")
        _write(axes, theme, number(range_["high"]), (across, 1), (0, 5), va="bottom")
        if range_["log"]:
            decades = [place(range_, value) for value in _decades(range_["low"], range_["high"])]
            axes.scatter(
                [across] * len(decades), decades, marker="_", s=30, color=theme.ink, linewidths=0.8
            )


def _between_axes(study: Study) -> float:
    """Room for text from one axis to the next, in points."""
    return 72 * parallel_size(study)[0] / (len(study["space"]) + 1.5) - 12


def _decades(low: float, high: float) -> list[float]:
    """The powers of ten of a range."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**power for power in range(first, last + 1)]


def _write_categories(study: Study, across: int, axes: Axes, theme: Theme) -> None:
    """Their names beside the axis: upright, where there is room to the next one."""
    range_ = list(study["space"].values())[across]
    names = style.tick_names([str(choice) for choice in range_["choices"]])
    wide, high = _between_axes(study), 72 * _AXIS / max(len(names) - 1, 1)
    is_upright = max(map(len, names)) * _LETTER <= wide
    # Of names along the axis, one at its end takes more of the room to the next.
    least = _LINE if is_upright else 1.5 * _SHORTEST * _LETTER
    every = math.ceil(least / high)
    longest = int((wide if is_upright else every * high / 1.5) / _LETTER)
    # Clear of the lines behind it.
    halo = patheffects.withStroke(linewidth=3.5, foreground=_GROUNDS[theme.suffix])
    for index in _some(len(names), every):
        where = place(range_, range_["choices"][index])
        look = {"ha": "left", "va": "center", "size": _SMALL, "path_effects": [halo]}
        if not is_upright:
            look |= {"rotation": 90, "va": _towards_the_middle(where)}
        _write(axes, theme, _cut(names[index], longest), (across, where), (4, 0), **look)


def _some(count: int, every: int) -> list[int]:
    """Every so many of them, and the last, which takes the place of one that is too near."""
    last = count - 1
    return [*(index for index in range(0, last, every) if last - index >= every), last]


def _towards_the_middle(where: float) -> str:
    """So that a name along an axis does not stand out over its end."""
    return {0.0: "bottom", 1.0: "top"}.get(where, "center")


def _write(
    axes: Axes,
    theme: Theme,
    text: str,
    where: tuple[float, float],
    moved: tuple[float, float],
    **look: Any,
) -> None:
    """A text at a point of the axes, moved by so many points of type."""
    look = {"ha": "center", "size": style.TEXT_SIZE, "color": theme.ink} | look
    axes.annotate(
        text,
        where,
        moved,
        textcoords="offset points",
        parse_math=False,
        zorder=4,
        annotation_clip=False,
        **look,
    )


def _draw_ramp(study: Study, axes: Axes, theme: Theme) -> None:
    """The axis of the value, with its colours, its ends and the best."""
    scale, last = _scale_of_complete(study), len(study["space"])
    steps = np.linspace(0, 1, 65).tolist()
    for low, high in itertools.pairwise(steps):
        middle = (low + high) / 2
        quality = middle if scale.is_rising else 1 - middle
        axes.fill_between(
            [last + 0.02, last + 0.08], low, high, color=_colour(quality, theme), linewidth=0
        )
    values = [trial["value"] for trial in _valued(study)]
    below = "≤" if min(values) < scale.low else ""
    above = "≥" if max(values) > scale.high else ""
    _write(axes, theme, below + scale.tick(scale.low, more=1), (last, 0), (0, -5), va="top")
    _write(axes, theme, above + scale.tick(scale.high, more=1), (last, 1), (0, 5), va="bottom")
    if (best := _best(study)) is not None and _is_number(best["value"]):
        where = (last + 0.08, scale.place(best["value"]))
        _write(axes, theme, "best", where, (3, 0), ha="left", va="center", color=theme.second)


# Texts.


def number(value: float) -> str:
    """Of a parameter: four digits that count, such as "0.0001", "512" or "1e-5"."""
    if abs(value) < 1e6 and (float(value).is_integer() or abs(value) >= 1e4):
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _parameter(range_: Range, value: Any) -> str:
    """A parameter's value as the page has it."""
    if isinstance(value, float) and math.isnan(value):
        return _NOTHING
    return str(value) if range_["kind"] == "categorical" else number(value)


def _range_text(range_: Range) -> str:
    if range_["kind"] == "categorical":
        return ", ".join(map(str, range_["choices"]))
    scale = ", on the log scale" if range_["log"] else ""
    steps = f" in steps of {number(range_['step'])}" if "step" in range_ else ""
    return f"{number(range_['low'])} to {number(range_['high'])}{steps}{scale}"


def _axis_names(keys: Sequence[str]) -> list[str]:
    """What stands for each parameter: the last part of its key, where that is no other's."""
    last = [key.rpartition(".")[2] for key in keys]
    counts = collections.Counter(last)
    return style.tick_names(
        [part if counts[part] == 1 else key for key, part in zip(keys, last, strict=True)]
    )


def _cut(name: str, length: int) -> str:
    """Without its middle if it is longer: names of choices often differ at their ends."""
    if len(name) <= length:
        return name
    kept = max(length - 1, 2)
    return f"{name[: kept - kept // 2]}…{name[-(kept // 2) :]}"


def _duration(seconds: float) -> str:
    """Such as "3 h 26 min"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole // 60 % 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def _time(iso: str | None) -> str:
    """To the minute."""
    return (iso or "")[:16].replace("T", " ")


# The page.


def _page(study: Study, charts: Mapping[str, Chart], folder: pathlib.Path) -> str:
    script = importlib.resources.files("cnn_jax.report").joinpath("sort.js").read_text("utf-8")
    scale, best = _scale_of_all(study), _best(study)
    config = shlex.quote(str(folder / (study["best_config"] or "")))
    return style.template("study.html").render(
        study=study,
        scale=scale,
        best=best,
        command=f"python -m cnn_jax.main --config={config} --workdir=...",
        parameters=best_parameters(study),
        charts={name: _embedded(chart, folder / f"{name}.png") for name, chart in charts.items()},
        beyond={
            "course": _beyond(study, scale),
            "compared": _beyond(study, _scale_of_complete(study)),
        },
        missing=missing(study),
        shares=_by_importance(study),
        rows=[_row(study, scale, trial) for trial in _ordered(study)],
        hosts=collections.Counter(trial["host"] for trial in study["trials"]),
        ranges={key: _range_text(range_) for key, range_ in study["space"].items()},
        duration=_duration,
        time=_time,
        script=markupsafe.Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def best_parameters(study: Study) -> list[dict[str, Any]]:
    """What the best trial has for each parameter, its range, and the edge it lies at."""
    best = _best(study)
    if best is None:
        return []
    return [
        {
            "key": key,
            "value": _parameter(range_, _of(best, key)),
            "range": _range_text(range_),
            "edge": edge(range_, _of(best, key)),
        }
        for key, range_ in study["space"].items()
    ]


def _row(study: Study, scale: Scale, trial: Trial) -> dict[str, Any]:
    """What the table of all trials says of one."""
    cells = [
        Cell(scale.text(trial["value"]), _sortable(trial["value"])),
        Cell(f"{trial['epochs']:,}", trial["epochs"]),
        Cell(_duration(trial["seconds"]), trial["seconds"]),
        *(_cell(range_, _of(trial, key)) for key, range_ in study["space"].items()),
    ]
    return {"trial": trial, "is_best": trial["number"] == study["best"], "cells": cells}


def _cell(range_: Range, value: Any) -> Cell:
    """A parameter's value; categories sort in the order in which the range has them."""
    text = _parameter(range_, value)
    if range_["kind"] == "categorical":
        return Cell(text, _sortable(place(range_, value)), "choice")
    return Cell(text, _sortable(value))


def _sortable(value: Any) -> float:
    return value if _is_number(value) else _SORTS_FIRST


def _beyond(study: Study, scale: Scale) -> str:
    """Which values stand at the edge of the charts, in a sentence, if any do."""
    values = np.array([trial["value"] for trial in _valued(study)], float)
    worse = int(((values < scale.low) | (values > scale.high)).sum())
    if not worse:
        return ""
    end = scale.text(scale.low if scale.is_rising else scale.high)
    trials = "1 trial stands" if worse == 1 else f"{worse:,} trials stand"
    return f"{trials} at the edge of the axis of values, being worse than {end}."


def missing(study: Study) -> dict[str, str]:
    """Why a section is not there, in a sentence, by its name."""
    trials = study["trials"]
    states = {trial["state"] for trial in trials}
    none = "No trial has been started."
    if states:
        none = "No trial has a value" + (": all have failed." if states == {"failed"} else " yet.")
    why = {}
    if _best(study) is None:
        why["best"] = "There is no best trial: none has been completed" + (
            ", all have failed." if states == {"failed"} else " so far."
        )
    if not study["importance"]:
        note = study["importance_note"] or "The importance of the parameters is not known."
        why["importance"] = note
    compared = len(_compared(study))
    if compared < 2:
        one = "A single trial has a value: from the second on, they can be compared."
        why |= dict.fromkeys(("parallel", "slices"), one if compared else none)
    elif not study["space"]:
        why |= dict.fromkeys(("parallel", "slices"), "The study has no parameters.")
    return why | {"history": none, "curves": none, "trials": "No trial has been started."}


def _embedded(chart: Chart, path: pathlib.Path) -> dict[str, Any]:
    """A chart for a light and a dark page, and its size in the page's pixels."""
    width, height = chart.size
    dark = path.with_stem(path.stem + style.THEMES[1].suffix)
    return {
        "light": style.data_uri(path),
        "dark": style.data_uri(dark),
        "width": round(96 * width),
        "height": round(96 * height),
    }
