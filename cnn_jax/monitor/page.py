"""The HTML page of the monitor: the state, the windows over time, and example images."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cnn_jax.monitor.rows import Rows
from cnn_jax.quality.drift import TESTS
from cnn_jax.report import style
from cnn_jax.report.style import Theme
from cnn_jax.system.atomic import write_text

EXPLANATIONS = {
    "no_data": "The log has no complete window yet.",
    "no_drift": "The two latest windows do not both differ from the validation images.",
    "drift": (
        "The latest windows differ from the validation images, but the estimated accuracy has not "
        "fallen by more than the limit. Drift is not harm."
    ),
    "harm": "The accuracy has fallen by more than the limit.",
}
BLIND_SPOT = (
    "The estimated accuracy does not see images of classes that the network does not know. Only "
    "labels show them."
)
# The smallest p-value that the chart shows.
_SMALLEST = 1e-12


def write_monitor_page(
    path: pathlib.Path,
    result: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the self-contained page of the monitor.

    Args:
      path: The HTML file.
      result: The value of `windows.measure`, with the keys "model" and "version".
      examples: Images of the latest windows: "group", "text" and "uri" (a data URI).

    Raises:
      OSError: The file cannot be written.
    """
    charts = {}
    if result["windows"]:
        plots = {"accuracy": _plot_accuracy, "tests": _plot_tests}
        charts = style.draw_embedded(
            {name: functools.partial(plot, result) for name, plot in plots.items()}, (6.0, 3.0)
        )
    page = style.template("monitor.html").render(
        result=result,
        explanation=EXPLANATIONS[result["state"]],
        blind_spot=BLIND_SPOT,
        charts=charts,
        tests=TESTS,
        groups=sorted({example["group"] for example in examples}),
        examples=examples,
        limit=result["reference"]["accuracy"] - result["max_drop"],
    )
    write_text(path, page, shared=True)


def choose_examples(
    rows: Rows, statistics: np.ndarray, first: int, count: int
) -> list[tuple[int, str]]:
    """Chooses images for the page from the rows that start at `first`.

    Args:
      rows: The predictions.
      statistics: The values of `drift.STATISTICS` for the rows from `first`.
      first: The position of the first image of the latest windows.
      count: The number of images in each of the two groups.

    Returns:
      The positions of images, each with the name of its group.
    """
    distance, confidence = statistics[:, 0], statistics[:, 1]
    unusual = np.argsort(-distance, kind="stable")[:count]
    uncertain = np.argsort(confidence, kind="stable")[:count]
    return [(first + int(i), "the most unusual images") for i in unusual] + [
        (first + int(i), "the least confident predictions") for i in uncertain
    ]


def _plot_accuracy(result: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Draws the estimated accuracy, and the accuracy of labelled images, by window."""
    axes = style.plain(figure.subplots(), theme)
    windows, reference = result["windows"], result["reference"]["accuracy"]
    numbers = np.arange(1, len(windows) + 1)
    axes.axhline(reference, color=theme.ink, linewidth=1, label="validation")
    limit = reference - result["max_drop"]
    axes.axhline(limit, color=theme.ink, linewidth=1, linestyle="--", label="limit")
    estimates = [window["estimated_accuracy"] for window in windows]
    line = {"linewidth": 1.5, "marker": "o", "markersize": 3}
    axes.plot(numbers, estimates, color=theme.first, label="estimated", **line)
    labelled = [
        (number, *window["labels"]["interval"], window["labels"]["accuracy"])
        for number, window in zip(numbers, windows, strict=True)
        if window["labels"]["accuracy"] is not None
    ]
    if labelled:
        x, low, high, accuracy = np.array(labelled).T
        errors = np.maximum([accuracy - low, high - accuracy], 0)
        axes.errorbar(x, accuracy, errors, color=theme.second, fmt="s", ms=4, label="labelled")
    axes.set(xlabel="window", ylabel="accuracy (%)", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(style.percent())
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    style.legend(axes, theme, loc="lower left", ncols=2)


def _plot_tests(result: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Draws the p-value of each test by window, on a logarithmic scale."""
    axes = style.plain(figure.subplots(), theme)
    numbers = np.arange(1, len(result["windows"]) + 1)
    for test, colour in zip(TESTS, theme.lines, strict=True):
        values = [max(window["p_values"][test], _SMALLEST) for window in result["windows"]]
        axes.plot(
            numbers, values, color=colour, label=test, linewidth=1.3, marker="o", markersize=3
        )
    threshold = result["level"] / len(TESTS)
    axes.axhline(threshold, color=theme.ink, linewidth=1, linestyle="--")
    axes.set(xlabel="window", ylabel="p-value", yscale="log", ylim=(_SMALLEST / 2, 2))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    style.legend(axes, theme, loc="lower left", ncols=2)
