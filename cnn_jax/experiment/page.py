"""The HTML page of a comparison or an experiment, with curves over time."""

import datetime
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

import cnn_jax
from cnn_jax.experiment import texts
from cnn_jax.report import style
from cnn_jax.report.style import Theme
from cnn_jax.system.atomic import write_text

# The range of e-values that the chart shows.
_LOWEST, _HIGHEST = 1e-3, 1e6


def write_page(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes the self-contained page of a result.

    Args:
      result: The value of `analysis.analyse` or `replay.replay`.
      path: The file.

    Raises:
      OSError: The file cannot be written.
    """
    charts = {}
    if result["curve"]["count"]:
        plots = {"difference": plot_difference, "evidence": plot_evidence}
        charts = style.draw_embedded(
            {name: functools.partial(plot, result) for name, plot in plots.items()}, (5.0, 3.2)
        )
    head, cells = texts.arm_table(result)
    page = style.template("experiment.html").render(
        result=result,
        name=result.get("experiment", {}).get("name", ""),
        headline=texts.headline(result),
        head=head,
        cells=cells,
        rows=texts.rows(result),
        charts=charts,
        noun=texts.noun(result),
        version=cnn_jax.__version__,
    )
    write_text(path, page, shared=True)


def plot_difference(result: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Plots the difference of the versions, and its confidence sequence."""
    axes = style.plain(figure.subplots(), theme)
    curve, x = result["curve"], _positions(result, axes)
    axes.axhline(0, color=theme.ink, linewidth=0.9, linestyle=":")
    axes.fill_between(x, curve["low"], curve["high"], color=theme.accent, alpha=0.25, linewidth=0)
    axes.plot(x, curve["difference"], color=theme.accent, linewidth=1.4)
    reach = max(2 * abs(curve["high"][-1] - curve["low"][-1]), abs(curve["difference"][-1]), 1e-3)
    axes.set_ylim(max(-1.05, -reach), min(1.05, reach))
    axes.yaxis.set_major_formatter(style.percent())
    axes.set_ylabel("challenger minus champion (points)")


def plot_evidence(result: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Plots the e-values, with the threshold of a decision."""
    axes = style.plain(figure.subplots(), theme)
    curve, x = result["curve"], _positions(result, axes)
    for name, colour in (("better", theme.first), ("worse", theme.second)):
        values = [min(max(value, _LOWEST), _HIGHEST) for value in curve[name]]
        axes.plot(x, values, color=colour, linewidth=1.4, label=f"challenger is {name}")
    axes.axhline(result["threshold"], color=theme.ink, linewidth=0.9, linestyle=":")
    axes.set(yscale="log", ylim=(_LOWEST, _HIGHEST), ylabel="e-value")
    axes.minorticks_off()
    style.legend(axes, theme, loc="lower center", ncols=2, bbox_to_anchor=(0.5, 1))


def _positions(result: Mapping[str, Any], axes: Any) -> list[Any]:
    """Returns the horizontal positions of the points of a curve, and labels the axis.

    The positions are times if they are known, else numbers of images.
    """
    if not (times := result.get("times")):
        axes.set_xlabel(texts.noun(result))
        axes.xaxis.set_major_formatter(style.thousands())
        return result["curve"]["count"]
    locator = AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.xaxis.get_offset_text().set_size(style.TEXT_SIZE)
    axes.set_xlabel("end of the window of a unit (UTC)")
    return [datetime.datetime.fromisoformat(time) for time in times]
