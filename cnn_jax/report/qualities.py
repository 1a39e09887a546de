"""The report's section on robustness: accuracy on corrupted images and by image quality."""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cnn_jax.quality import robustness
from cnn_jax.quality.corruptions import FAMILIES, SEVERITIES
from cnn_jax.report import style, thumbnails
from cnn_jax.report.charts import Chart
from cnn_jax.report.run import Measurements, MissingError
from cnn_jax.report.sections import Figures, most_confident_image
from cnn_jax.report.style import Theme

# The size of the sample of images to corrupt: the total number of pixels, and the minimum and
# maximum number of images.
_PIXELS = 2**19
_MIN_IMAGES, _MAX_IMAGES = 40, 250
# The total number of pixels of the images for measuring accuracy by image quality.
_QUALITY_PIXELS = 2**26
# The longer side, in pixels, of each corrupted image on the page.
_SIDE = 64
# The page names this many corruptions: those with the lowest accuracy.
_NUM_WORST = 3


def qualities(run: Measurements) -> Figures:
    """Measures accuracy, confidence and calibration on corrupted images of the test split."""
    network = run.need_network()
    height, width = network.predictor.preprocessing.image_size
    labels, test = network.labels("test"), network.dataset.splits["test"]
    size = min(max(_PIXELS // (height * width), _MIN_IMAGES), _MAX_IMAGES)
    sample = robustness.stratified_sample(labels, size)
    images = robustness.load_images(network.dataset.loader, test[sample])
    try:
        found = robustness.measure(network.predictor, images, labels[sample])
    except ImportError as error:
        raise MissingError(f"The corruptions need {error.name}, which is not installed.") from error
    worst_first = sorted(found["corruptions"], key=lambda n: found["corruptions"][n]["accuracy"])
    # The sample for accuracy by image quality can be larger, because the network has already
    # predicted all test images.
    rows = robustness.stratified_sample(labels, _QUALITY_PIXELS // (height * width))
    positions = test[rows]
    images = robustness.load_images(network.dataset.loader, positions)
    hits = network.probabilities["test"].argmax(axis=1) == labels
    pixels = robustness.original_pixels(network.source, positions, network.predictor.preprocessing)
    return found | {
        "split": "test",
        "split_count": len(labels),
        "mean_corrupted_accuracy": 1 - found["mean_corruption_error"],
        "worst": worst_first[:_NUM_WORST],
        "by_quality_count": len(rows),
        "by_quality": robustness.by_quality(images, hits[rows], pixels),
    }


def draw_pictures(run: Measurements, folder: pathlib.Path) -> dict[str, str]:
    """Draws a test image with each corruption at severities 1 to 5, side by side.

    Returns:
      The name of the image file by corruption.
    """
    pixels = most_confident_image(run.need_network())
    found = {}
    for name, versions in robustness.examples(pixels).items():
        tiles = [thumbnails.fit_to_square(version, _SIDE) for version in versions]
        found[name] = f"examples/corruption_{name}.png"
        thumbnails.save_small(thumbnails.join_in_row(tiles), folder / found[name])
    return found


def charts(figures: Mapping[str, Any]) -> dict[str, Chart]:
    """Returns the robustness charts: a heat map, curves by family, accuracy by image quality."""
    if "robustness" not in figures:
        return {}
    section = figures["robustness"]
    rows = len(section["corruptions"]) + len(FAMILIES)
    curves = math.ceil(len(FAMILIES) / 2)
    return {
        "corruptions": Chart(functools.partial(_heat_map, section), (5.4, 0.9 + 0.21 * rows)),
        "corruption_curves": Chart(functools.partial(_curves, section), (5.6, 2.2 * curves)),
        "own_qualities": Chart(
            functools.partial(_plot_by_quality, section["by_quality"]), (7.6, 2.6)
        ),
    }


def _families(section: Mapping[str, Any]) -> dict[str, list[str]]:
    """Maps each family of corruptions to the measured corruptions; omits empty families."""
    measured = section["corruptions"]
    families = {family: [n for n in names if n in measured] for family, names in FAMILIES.items()}
    return {family: names for family, names in families.items() if names}


def _label(name: str) -> str:
    """Converts the name of a corruption to its label in the charts."""
    return name.replace("_", " ").replace("jpeg", "JPEG")


def _heat_map(section: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Draws a heat map of accuracy: one row per corruption, one column per severity.

    Above the corruptions of each family, an empty row shows the name of the family.
    """
    axes = style.plain(figure.subplots(), theme)
    clean = section["clean"]["accuracy"]
    rows: list[list[float]] = []
    names: list[str] = []
    for family, members in _families(section).items():
        rows.append([math.nan] * (1 + len(SEVERITIES)))
        names.append(family)
        for name in members:
            severities = section["corruptions"][name]["severities"]
            rows.append([clean, *(figures["accuracy"] for figures in severities)])
            names.append(_label(name))
    values = np.array(rows)
    axes.imshow(values, cmap=theme.colours, norm=Normalize(0, 1), aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            ink = style.ink_on(theme.colours(value))
            text = f"{100 * value:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=ink, size=style.TEXT_SIZE)
    axes.grid(visible=False)
    axes.set_xticks(range(1 + len(SEVERITIES)), ["none", *map(str, SEVERITIES)])
    axes.set_yticks(range(len(names)), names)
    for label in axes.get_yticklabels():
        if label.get_text() in FAMILIES:
            label.set_fontweight("bold")
    axes.set(xlabel="severity")
    axes.set_title("accuracy (%)", size=style.TEXT_SIZE, color=theme.ink)


def _curves(section: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Draws curves of accuracy by severity, in one panel for each family of corruptions."""
    families = _families(section)
    columns = 2
    panels = figure.subplots(
        math.ceil(len(families) / columns), columns, sharex=True, sharey=True, squeeze=False
    ).ravel()
    for axes, (family, members) in zip(panels, families.items(), strict=False):
        style.plain(axes, theme)
        for number, name in enumerate(members):
            severities = section["corruptions"][name]["severities"]
            accuracies = [section["clean"]["accuracy"], *(f["accuracy"] for f in severities)]
            axes.plot(
                range(len(accuracies)),
                accuracies,
                color=theme.lines[number],
                marker="osv^Dx"[number],
                markersize=3.5,
                linewidth=1.3,
                label=_label(name),
            )
        axes.set_title(family, size=style.TEXT_SIZE, color=theme.ink, fontweight="bold")
        style.legend(axes, theme, loc="upper center", ncols=2, bbox_to_anchor=(0.5, -0.18))
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(style.percent())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(families) :]:
        axes.set_visible(False)
    for axes in panels[: len(families)]:
        axes.set(xlabel="severity", ylabel="accuracy (%)")
        axes.label_outer()


def _plot_by_quality(
    quality_bins: Mapping[str, Sequence[Figures]], figure: Figure, theme: Theme
) -> None:
    """Draws accuracy by image sharpness, brightness and resolution, with Wilson intervals."""
    units = {
        "sharpness": "variance of the Laplacian (grey levels²)",
        "brightness": "mean grey level",
        "resolution": "pixels of the file",
    }
    panels = figure.subplots(1, len(quality_bins), sharey=True, squeeze=False).ravel()
    for axes, (name, bins) in zip(panels, quality_bins.items(), strict=True):
        style.plain(axes, theme)
        accuracy = np.array([b["accuracy"] for b in bins])
        intervals = np.array([b["confidence_interval"] for b in bins]).T
        axes.errorbar(
            range(len(bins)),
            accuracy,
            np.abs(intervals - accuracy),
            fmt="o",
            color=theme.accent,
            markersize=4,
            capsize=3,
        )
        axes.set_xticks(range(len(bins)), [_range_label(b["from"], b["to"]) for b in bins])
        axes.set_title(name, size=style.TEXT_SIZE, color=theme.ink, fontweight="bold")
        axes.margins(x=0.15)
        axes.yaxis.set_major_formatter(style.percent())
        axes.set(xlabel=units[name])
    panels[0].set(ylabel="accuracy (%)")


def _range_label(low: float, high: float) -> str:
    """Formats the range of a bin on two lines, or as one number if the rounded ends are equal."""
    first, last = f"{low:,.0f}", f"{high:,.0f}"
    return first if first == last else f"{first}-\n{last}"
