"""The charts of a run's report, drawn from the content of metrics.json."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.cluster.hierarchy
import scipy.spatial.distance
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from cnn_jax.report import style
from cnn_jax.report.style import Theme

# The chart of a confusion matrix has numbers in the cells for at most _MAX_NUMBERS classes, lines
# between all cells for at most _MAX_LINES classes, and class names for at most _MAX_NAMES classes.
_MAX_NUMBERS, _MAX_LINES, _MAX_NAMES = 20, 60, 200
# Maps the maximum number of classes to the side of a cell in inches. A matrix with more classes
# than _MAX_NAMES has no class names, and the side of the whole matrix is _UNNAMED_SIDE inches.
_CELLS = {12: 0.42, _MAX_NUMBERS: 0.34, _MAX_LINES: 0.19, _MAX_NAMES: 0.14}
_UNNAMED_SIDE = 8.0
# The resolution of the images of large matrices, in dots per inch. With style.DPI, these image
# files would be too large.
_LARGE_DPI = 96


class Chart(NamedTuple):
    """A chart: its plot function, its size (width, height) in inches, and its dots per inch."""

    plot: style.Plot
    size: tuple[float, float] = style.SIZE
    dpi: int = style.DPI


def run_charts(figures: Mapping[str, Any]) -> dict[str, Chart]:
    """Returns the charts of a run by file name.

    A chart is omitted if `figures` does not contain the section with the data of the chart.
    """
    charts = {}
    if curves := figures.get("curves"):
        charts["loss"] = Chart(functools.partial(learning, curves, "loss"))
        charts["accuracy"] = Chart(functools.partial(learning, curves, "accuracy"))
        charts["learning_rate"] = Chart(functools.partial(learning_rate, curves))
    if "confusion" in figures and "test" in figures:
        order, test = figures["confusion"]["order"], figures["test"]
        matrix = np.array(test["confusion"])[np.ix_(order, order)]
        all_names = style.tick_names(list(test["per_class"]))
        names = [all_names[label] for label in order]
        size, dpi = confusion_size(names)
        for name, normalized in (("confusion", False), ("confusion_normalized", True)):
            plot = functools.partial(confusion, matrix, names, normalized)
            charts[name] = Chart(plot, size, dpi)
    if calibration := figures.get("calibration"):
        charts["reliability"] = Chart(functools.partial(reliability, calibration))
    if covered := figures.get("coverage"):
        charts["coverage"] = Chart(functools.partial(coverage, covered))
    return charts


# The charts of the learning curves.


def learning(curves: Mapping[str, Any], metric: str, figure: Figure, theme: Theme) -> None:
    """Plots the loss or the accuracy of the training and validation splits by epoch."""
    axes = style.plain(figure.subplots(), theme)
    for split, colour, marker in (("train", theme.first, "o"), ("validation", theme.second, "s")):
        values = curves[f"{split}_{metric}"]
        axes.plot(curves["epoch"], values, color=colour, label=split, **_points(values, marker))
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(style.percent())
    else:
        # Set the upper limit here: Matplotlib would compute the margin from the range of the data,
        # but this axis starts at 0.
        highest = max(*curves["train_loss"], *curves["validation_loss"])
        axes.set_ylim(0, 1.06 * highest if highest > 0 else 1)
    axes.set(ylabel="accuracy (%)" if metric == "accuracy" else "loss (nats)")
    _mark_best(curves, axes, theme)
    style.legend(axes, theme)


def learning_rate(curves: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Draws the learning rate by epoch."""
    axes = style.plain(figure.subplots(), theme)
    rates = curves["learning_rate"]
    axes.plot(curves["epoch"], rates, color=theme.accent, **_points(rates, "o"))
    axes.set_ylim(0, 1.06 * max(rates) if max(rates) > 0 else 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(ylabel="learning rate")
    _mark_best(curves, axes, theme)


def _points(values: Sequence[float], marker: str) -> dict[str, Any]:
    """Returns the style options of a curve; a curve with at most 12 points also has markers."""
    return {"linewidth": 1.5, "marker": marker if len(values) <= 12 else "", "markersize": 4}


def _mark_best(curves: Mapping[str, Any], axes: Axes, theme: Theme) -> None:
    """Marks the best epoch with a vertical line, and labels the epoch axis with whole numbers."""
    axes.axvline(curves["best_epoch"], color=theme.ink, linewidth=0.9, linestyle=(0, (2, 2)))
    axes.annotate(
        f"best: {curves['best_epoch']}",
        (curves["best_epoch"], 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        color=theme.ink,
        size=style.TEXT_SIZE,
    )
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="epoch")


# The chart of the confusion matrix.


def confusion_order(matrix: Int[np.ndarray, "classes classes"]) -> list[int]:
    """Orders the classes so that classes that are often confused are neighbours.

    The method is hierarchical clustering by mean distance with optimal leaf ordering (Bar-Joseph,
    Gifford and Jaakkola 2001). The distance of two classes is 1 minus the mean of two fractions:
    the images of each class that are predicted as the other class. Classes without confusions come
    last, in their original order.

    Args:
      matrix: The confusion matrix; rows are the true classes.

    Returns:
      A permutation of the labels.
    """
    fractions = row_fractions(matrix)
    similarity = (fractions + fractions.T) / 2
    np.fill_diagonal(similarity, 0)
    confused = np.flatnonzero(similarity.any(axis=1))
    if len(confused) < 3:
        return list(range(len(matrix)))
    distance = 1 - similarity[np.ix_(confused, confused)]
    np.fill_diagonal(distance, 0)
    tree = scipy.cluster.hierarchy.linkage(
        scipy.spatial.distance.squareform(distance, checks=False),
        "average",
        # Optimal leaf ordering takes minutes for a thousand classes.
        optimal_ordering=len(confused) <= _MAX_NAMES,
    )
    order = confused[scipy.cluster.hierarchy.leaves_list(tree)].tolist()
    return [*order, *np.setdiff1d(np.arange(len(matrix)), confused).tolist()]


def row_fractions(
    matrix: Int[np.ndarray, "classes classes"],
) -> Float[np.ndarray, "classes classes"]:
    """Divides each row of a confusion matrix by its sum; a row of zeros does not change."""
    sums = matrix.sum(axis=1, keepdims=True)
    return matrix / np.maximum(sums, 1)


def confusion_size(names: Sequence[str]) -> tuple[tuple[float, float], int]:
    """Returns the size and the resolution of the chart of a confusion matrix.

    Args:
      names: The class names as the axis labels show them.

    Returns:
      (width, height) in inches, and dots per inch.
    """
    count = len(names)
    cell = next((size for limit, size in _CELLS.items() if count <= limit), None)
    if cell is None:
        return (_UNNAMED_SIDE + 1.2, _UNNAMED_SIDE + 0.5), style.DPI
    side = max(count * cell, 1.6)
    sides = 1 if count <= _MAX_LINES else 2
    labels_side = 0.5 + 0.07 * max(map(len, names)) * sides
    dpi = style.DPI if count <= _MAX_LINES else _LARGE_DPI
    return (side + labels_side + 1.0, side + labels_side), dpi


def confusion(
    matrix: Int[np.ndarray, "classes classes"],
    names: Sequence[str],
    normalized: bool,
    figure: Figure,
    theme: Theme,
) -> None:
    """Draws a confusion matrix. A square-root colour scale makes rare confusions visible.

    Args:
      matrix: Rows are the true classes.
      names: The class names, in the order of the matrix.
      normalized: Whether to divide each row by its sum.
      figure: The figure to draw on.
      theme: The colours.
    """
    axes = style.plain(figure.subplots(), theme)
    count = len(matrix)
    values = row_fractions(matrix) if normalized else matrix.astype(float)
    colours = theme.colours
    norm = PowerNorm(0.5, vmin=0, vmax=max(values.max(), 1e-9))
    image = axes.imshow(
        np.ma.masked_equal(values, 0), cmap=colours, norm=norm, interpolation="nearest"
    )
    axes.grid(visible=False)
    lines = np.arange(0, count + 1, 1 if count <= _MAX_LINES else 10) - 0.5
    axes.set_xticks(lines, minor=True)
    axes.set_yticks(lines, minor=True)
    axes.grid(which="minor", color=theme.line, linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    if count <= _MAX_NAMES:
        size = style.TEXT_SIZE
        rotation = 90 if count > 12 or max(map(len, names)) > 3 else 0
        axes.set_xticks(range(count), names, rotation=rotation, size=size, parse_math=False)
        axes.set_yticks(range(count), names, size=size, parse_math=False)
        # Large matrices have class names on all four sides, because a reader who scrolls sees only
        # a part of the matrix.
        is_large = count > _MAX_LINES
        axes.tick_params(axis="x", labeltop=is_large, labelrotation=rotation)
        axes.tick_params(axis="y", labelright=is_large)
    else:
        axes.set(xticks=[], yticks=[])
    if count <= _MAX_NUMBERS:
        _write_cells(values, normalized, axes, colours, norm)
    axes.set(xlabel="predicted class", ylabel="true class")
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / (0.2 * count + 1)), aspect=18)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(colors=theme.ink, labelsize=style.TEXT_SIZE, length=0)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4, integer=not normalized))
    bar.ax.yaxis.set_major_formatter(style.percent() if normalized else style.thousands())
    bar.set_label(
        "fraction of the true class (%)" if normalized else "images",
        color=theme.ink,
        size=style.TEXT_SIZE,
    )


def _write_cells(
    values: np.ndarray,
    normalized: bool,
    axes: Axes,
    colours: LinearSegmentedColormap,
    norm: PowerNorm,
) -> None:
    """Writes a number into each non-zero cell; the colour contrasts with the cell's colour."""
    for row, column in np.argwhere(values > 0).tolist():
        value = values[row, column]
        axes.text(
            column,
            row,
            _short_fraction(value) if normalized else _short_count(value),
            ha="center",
            va="center",
            size=style.TEXT_SIZE,
            color=style.ink_on(colours(norm(value))),
        )


def _short_fraction(fraction: float) -> str:
    """Formats a fraction as a percentage without "%".

    A fraction below 0.01 becomes "<1", and a fraction between 0.99 and 1 becomes ">99".
    """
    if fraction < 0.01:
        return "<1"
    return ">99" if 0.99 < fraction < 1 else f"{100 * fraction:.0f}"


def _short_count(count: float) -> str:
    """Formats a count in at most four characters, such as "9999" or "123k"."""
    return f"{count:.0f}" if count < 10_000 else f"{count / 1000:.0f}k"


# The charts of calibration and of selective prediction.


def reliability(calibration: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Draws a reliability diagram (Guo et al. 2017): curves before and after temperature scaling.

    The upper panel shows the accuracy in each confidence bin that has images. The lower panel
    shows the number of images in each bin.
    """
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    style.plain(upper, theme).plot([0, 1], [0, 1], color=theme.ink, linewidth=0.9, linestyle=":")
    style.plain(lower, theme)
    for when, colour, marker in (("before", theme.second, "s"), ("after", theme.first, "o")):
        bins = calibration[when]["reliability"]
        count, confidence, accuracy = (
            np.array(bins[key]) for key in ("count", "confidence", "accuracy")
        )
        full = count > 0
        line = {"color": colour, "linewidth": 1.4, "marker": marker, "markersize": 4}
        upper.plot(confidence[full], accuracy[full], label=f"{when} scaling", **line)
        edges = np.linspace(0, 1, len(count) + 1)
        lower.stairs(count, edges, color=colour, linewidth=1.4)
    upper.set(ylim=(-0.02, 1.02), ylabel="accuracy (%)")
    lower.set(xlim=(0, 1.02), xlabel="confidence (%)", ylabel="images")
    for axis in (upper.yaxis, lower.xaxis):
        axis.set_major_locator(MultipleLocator(0.2))
        axis.set_major_formatter(style.percent())
    lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    lower.yaxis.set_major_formatter(style.thousands())
    figure.align_ylabels([upper, lower])
    style.legend(upper, theme, loc="lower center", ncols=2, bbox_to_anchor=(0.5, 1))


def coverage(covered: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Plots the accuracy of the most confident images against the fraction of images kept.

    This fraction is called coverage.
    """
    axes = style.plain(figure.subplots(), theme)
    curve = covered["curve"]
    axes.plot(
        curve["coverage"], curve["accuracy"], color=theme.accent, **_points(curve["coverage"], "o")
    )
    lowest = min(curve["accuracy"])
    axes.set(xlim=(0, 1.02), ylim=(max(lowest - 0.1 * (1 - lowest) - 0.002, -0.02), 1.002))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(style.percent())
    axes.set(
        xlabel="images kept, the most confident first (%)", ylabel="accuracy of kept images (%)"
    )
