"""The parallel-coordinates chart of a study: axes for the parameters and the monitored value.

The chart shortens long parameter keys and long choices. The tables of the page have the full text.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cnn_jax.report import style
from cnn_jax.report.study_charts import axis_names, line_alpha, spaced_indices
from cnn_jax.report.study_values import (
    Range,
    Study,
    Trial,
    best_trial,
    comparable_trials,
    format_number,
    is_number,
    parameter_value,
    range_position,
    scale_for_complete_trials,
    trials_with_value,
)
from cnn_jax.report.style import Theme

# The height of the chart's axes, in inches.
_HEIGHT = 3.2
# The font size of the labels of a categorical parameter, and the width of a letter at that size, in
# points.
_SIZE, _LETTER = 7.5, 4.7


def parallel_size(study: Study) -> tuple[float, float]:
    """Returns the chart's (width, height) in inches; the width grows with the number of axes."""
    return min(max(1.25 * (len(study["space"]) + 1), 5.5), 10.5), _HEIGHT + 1.1


def parallel(study: Study, figure: Figure, theme: Theme) -> None:
    """Draws each trial as a line that crosses the axes of the parameters and the monitored value.

    Trials with better values have stronger colours. Pruned trials are faint. The best trial is
    drawn on top of all other trials.
    """
    axes = figure.subplots()
    axes.set_axis_off()
    _draw_trials(study, axes, theme)
    _draw_names(study, axes, theme)
    for across, range_ in enumerate(study["space"].values()):
        if range_["kind"] == "categorical":
            _draw_categories(range_, across, _between_axes(study), axes, theme)
        else:
            _draw_numbers(range_, across, axes, theme)
    _draw_ramp(study, axes, theme)
    axes.set(xlim=(-0.1, len(study["space"]) + 0.25), ylim=(-0.03, 1.03))


# The lines of the trials.


def line_positions(study: Study, trials: Sequence[Trial]) -> Float[np.ndarray, "trials axes"]:
    """Returns the positions, 0 to 1, at which the line of each trial crosses the axes.

    The axes are the parameters in the order of the space, and then the value. A position is NaN
    if the trial has no value for the parameter.
    """
    scale = scale_for_complete_trials(study)
    rows = [
        [
            *(
                range_position(range_, parameter_value(trial, key))
                for key, range_ in study["space"].items()
            ),
            scale.position(trial["value"]),
        ]
        for trial in trials
    ]
    return np.array(rows, float).reshape(len(trials), len(study["space"]) + 1)


def _draw_trials(study: Study, axes: Axes, theme: Theme) -> None:
    trials, best = comparable_trials(study), best_trial(study)
    lines = line_positions(study, trials)
    across = np.arange(lines.shape[1])
    qualities = scale_for_complete_trials(study).qualities(lines[:, -1])
    alpha = line_alpha(len(trials))
    for row in np.argsort(qualities, kind="stable").tolist():
        if trials[row] is best:
            look = {"color": theme.second, "linewidth": 2.4, "zorder": 3}
        elif trials[row]["state"] == "complete":
            colour = _colour(qualities[row], theme)
            look = {"color": colour, "linewidth": 1.2, "alpha": alpha, "zorder": 2}
        else:
            look = {"color": theme.ink, "linewidth": 0.5, "alpha": 0.4 * alpha, "zorder": 1}
        axes.plot(across, lines[row], **look)


def _colour(quality: float, theme: Theme) -> tuple[float, float, float, float]:
    """Converts a quality, 0 (worst) to 1 (best), to a colour of the theme's colour ramp.

    The first quarter of the colour ramp is not used, because it is too close to the background.
    """
    return theme.colours(0.25 + 0.75 * quality)


# The axes and their labels.


def _draw_names(study: Study, axes: Axes, theme: Theme) -> None:
    """Draws the axes and their names; slants all names if the longest name is too long."""
    value = scale_for_complete_trials(study).label.removeprefix("validation ")
    names = [*axis_names(list(study["space"])), value]
    is_slanted = max(map(len, names)) * 5.3 > _between_axes(study)  # A letter is 5.3 points wide.
    slant = {"rotation": 30, "ha": "left", "rotation_mode": "anchor"} if is_slanted else {}
    for across, name in enumerate(names):
        axes.plot([across, across], [0, 1], color=theme.ink, linewidth=0.8, zorder=2.5)
        _write(axes, theme, name, (across, 1), (0, 17), **({"va": "bottom"} | slant))


def _between_axes(study: Study) -> float:
    """Returns the width available for text between two neighbouring axes, in points."""
    return 72 * parallel_size(study)[0] / (len(study["space"]) + 1.5) - 12


def _draw_numbers(range_: Range, across: int, axes: Axes, theme: Theme) -> None:
    """Labels the ends of a numeric axis and, on a log scale, marks the powers of ten."""
    low, high = range_["low"], range_["high"]
    _write(axes, theme, format_number(low), (across, 0), (0, -5), va="top")
    _write(axes, theme, format_number(high), (across, 1), (0, 5), va="bottom")
    if range_["log"]:
        decades = [range_position(range_, value) for value in _decades(low, high)]
        ticks = {"marker": "_", "s": 30, "color": theme.ink, "linewidths": 0.8}
        axes.scatter([across] * len(decades), decades, **ticks)


def _decades(low: float, high: float) -> list[float]:
    """Returns the powers of ten from `low` to `high`."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**power for power in range(first, last + 1)]


def _draw_categories(range_: Range, across: int, width: float, axes: Axes, theme: Theme) -> None:
    """Labels an axis with the choices of a categorical parameter.

    The labels are horizontal if the longest label fits into `width` points. Otherwise they are
    vertical, along the axis.
    """
    names = style.tick_names([str(choice) for choice in range_["choices"]])
    high = 72 * _HEIGHT / max(len(names) - 1, 1)
    is_horizontal = max(map(len, names)) * _LETTER <= width
    # The minimum distance between two labels, in points: the height of a horizontal label, or the
    # length of a vertical label of eight letters with a margin.
    least = 9.5 if is_horizontal else 1.5 * 8 * _LETTER
    every = math.ceil(least / high)
    longest = int((width if is_horizontal else every * high / 1.5) / _LETTER)
    # An outline in the background colour separates the letters from the lines of the trials.
    halo = patheffects.withStroke(linewidth=3.5, foreground=theme.ground)
    for index in spaced_indices(len(names), every):
        position = range_position(range_, range_["choices"][index])
        look = {"ha": "left", "va": "center", "size": _SIZE, "path_effects": [halo]}
        if not is_horizontal:
            look |= {"rotation": 90, "va": _inward_alignment(position)}
        _write(axes, theme, _shorten(names[index], longest), (across, position), (4, 0), **look)


def _inward_alignment(position: float) -> str:
    """Returns the alignment that keeps a vertical label between the two ends of the axis."""
    return {0.0: "bottom", 1.0: "top"}.get(position, "center")


def _shorten(name: str, length: int) -> str:
    """Replaces the middle of a long name with an ellipsis; names often differ at the end."""
    if len(name) <= length:
        return name
    kept = max(length - 1, 2)
    return f"{name[: kept - kept // 2]}…{name[-(kept // 2) :]}"


def _draw_ramp(study: Study, axes: Axes, theme: Theme) -> None:
    """Draws the colour ramp along the value axis, and labels both ends and the best value."""
    scale, last = scale_for_complete_trials(study), len(study["space"])
    steps = np.linspace(0, 1, 65)
    qualities = scale.qualities((steps[:-1] + steps[1:]) / 2)
    for (low, high), quality in zip(itertools.pairwise(steps.tolist()), qualities, strict=True):
        band = {"color": _colour(quality, theme), "linewidth": 0}
        axes.fill_between([last + 0.02, last + 0.08], low, high, **band)
    values = [trial["value"] for trial in trials_with_value(study)]
    below = "≤" if min(values) < scale.low else ""
    above = "≥" if max(values) > scale.high else ""
    _write(axes, theme, below + scale.format_tick(scale.low, more=1), (last, 0), (0, -5), va="top")
    _write(
        axes, theme, above + scale.format_tick(scale.high, more=1), (last, 1), (0, 5), va="bottom"
    )
    if (best := best_trial(study)) is not None and is_number(best["value"]):
        position = (last + 0.08, scale.position(best["value"]))
        _write(axes, theme, "best", position, (3, 0), ha="left", va="center", color=theme.second)


def _write(
    axes: Axes,
    theme: Theme,
    text: str,
    position: tuple[float, float],
    offset: tuple[float, float],
    **options: Any,
) -> None:
    """Writes text at a position in data coordinates, shifted by `offset` points."""
    options = {"ha": "center", "size": style.TEXT_SIZE, "color": theme.ink} | options
    axes.annotate(
        text,
        position,
        offset,
        textcoords="offset points",
        parse_math=False,
        zorder=4,
        annotation_clip=False,
        **options,
    )
