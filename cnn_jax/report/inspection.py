"""The page with the results of inspecting a data set: charts, contact sheets and lists.

The charts contain no class or file names, because Matplotlib's font lacks the characters of many
languages that browsers can show.
"""

import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from PIL import Image

import cnn_jax
from cnn_jax.data import Track, no_track, scan
from cnn_jax.data.findings import count
from cnn_jax.data.splits import SPLITS
from cnn_jax.data.survey import Cluster, Survey
from cnn_jax.report import style
from cnn_jax.report.style import Theme
from cnn_jax.report.thumbnails import load_thumbnail

# The maximum number of rows in a list on the page, and the maximum number of image names in a row.
# The file inspection.json contains all rows and names.
_MAX_ROWS = 50
_MAX_NAMES = 8
# If a data set has more than twice this number of classes, the page shows this number of the
# largest classes and this number of the smallest classes.
_MAX_CLASSES = 100
# The side of a thumbnail and the gap between two thumbnails, in pixels.
_THUMBNAIL, _GAP = 96, 6
# The number of columns and the number of rows of thumbnails in a contact sheet.
_COLUMNS, _ROWS = 6, 4
# If there are more different image sizes than this, the chart of image sizes shows a density
# instead of points.
_MAX_POINTS = 2000


def write_page(survey: Survey, folder: pathlib.Path, track: Track = no_track) -> pathlib.Path:
    """Writes the survey of a data set to an HTML page and, in full, to inspection.json.

    Up to 24 images of each class are read again for the contact sheets. Some of the duplicates are
    read again for the lists of duplicates.

    Args:
      survey: The survey to show.
      folder: An existing folder for index.html, inspection.json and PNG files.
      track: Shows progress.

    Returns:
      The page's path, `folder`/index.html.

    Raises:
      OSError: The folder cannot be written.
    """
    (folder / "inspection.json").write_text(json.dumps(survey.to_dict(), indent=1) + "\n", "utf-8")
    charts = _draw_charts(survey, folder)
    sheets = _draw_sheets(survey, folder, track)
    page = style.template("inspection.html").render(
        survey=survey,
        source=survey.source,
        findings=survey.findings,
        figures=survey.to_dict(),
        splits=SPLITS,
        classes=class_rows(survey.counts),
        charts=charts,
        sheets=sheets,
        exact=_duplicate_rows(survey, survey.exact, folder, "exact"),
        near=_duplicate_rows(survey, survey.near, folder, "near"),
        limit=_MAX_ROWS,
        count=count,
        version=cnn_jax.__version__,
    )
    path = folder / "index.html"
    path.write_text(page, "utf-8")
    return path


def _duplicate_rows(
    survey: Survey, clusters: Sequence[Cluster], folder: pathlib.Path, kind: str
) -> list[dict[str, Any]]:
    """Returns the rows of a list of duplicates: one row for each of the first 50 clusters.

    The images of each cluster are drawn side by side; a row has the file name of its "picture".
    """
    source = survey.source
    rows = []
    for number, cluster in enumerate(clusters[:_MAX_ROWS]):
        shown = survey.varied(cluster)[:_MAX_NAMES]
        picture = f"{kind}_{number:03d}.png"
        _sheet([_thumbnail(survey, i) for i in shown], len(shown)).save(folder / picture)
        rows.append(
            {
                "different_labels": cluster.different_labels,
                "different_splits": cluster.different_splits,
                "size": len(cluster.images),
                "rest": len(cluster.images) - len(shown),
                "picture": picture,
                "images": [
                    {
                        "id": source.ids[i],
                        "class": source.class_names[source.labels[i]],
                        "split": survey.example_splits[i],
                    }
                    for i in shown
                ],
            }
        )
    return rows


def class_rows(counts: Int[np.ndarray, "classes 3"]) -> list[dict[str, Any] | None]:
    """Returns the rows of the page's table of classes.

    Args:
      counts: The number of images of each class in each split.

    Returns:
      For each class, "label", "images" by split, and "percents": the images by split as
      percentages of the largest class. With more than 200 classes, only the 100 largest and the
      100 smallest classes have rows; a single None stands for all omitted classes.
    """
    labels: list[int | None] = list(range(len(counts)))
    if len(labels) > 2 * _MAX_CLASSES:
        size_order = np.argsort(-counts.sum(axis=1), kind="stable").tolist()
        labels = [*size_order[:_MAX_CLASSES], None, *size_order[-_MAX_CLASSES:]]
    percents = 100 * counts / max(counts.sum(axis=1).max(), 1)
    return [
        None
        if label is None
        else {
            "label": label,
            "images": counts[label].tolist(),
            "percents": percents[label].tolist(),
        }
        for label in labels
    ]


# The contact sheets of classes and the strips of duplicates.


def sample(survey: Survey, label: int) -> list[int]:
    """Returns the positions of up to 24 images of a class, chosen by a hash of the image names.

    The choice does not depend on the order of the files.
    """
    ids = survey.source.ids

    def digest(i: int) -> bytes:
        return hashlib.sha256(ids[i].encode("utf-8", "surrogatepass")).digest()

    members = np.flatnonzero(survey.source.labels == label).tolist()
    return sorted(members, key=digest)[: _COLUMNS * _ROWS]


def _draw_sheets(survey: Survey, folder: pathlib.Path, track: Track) -> list[dict[str, Any]]:
    """Draws a contact sheet for each class that has images; returns a description of each sheet."""
    counts = survey.counts.sum(axis=1).tolist()
    labels = [label for label, number in enumerate(counts) if number]

    def draw(label: int) -> dict[str, Any]:
        shown = sample(survey, label)
        sheet = _sheet([_thumbnail(survey, i) for i in shown], _COLUMNS)
        picture = f"class_{label:03d}.png"
        sheet.save(folder / picture)
        return {
            "name": survey.source.class_names[label],
            "images": counts[label],
            "shown": len(shown),
            "picture": picture,
            "width": sheet.width,
            "height": sheet.height,
        }

    return list(track(scan.on_all_cores(draw, labels), "drawing classes", len(labels)))


def _sheet(thumbnails: Sequence[Image.Image | None], columns: int) -> Image.Image:
    """Arranges thumbnails in a transparent grid, and centres each thumbnail in its cell."""
    rows = math.ceil(len(thumbnails) / columns)
    step = _THUMBNAIL + _GAP
    sheet = Image.new("RGBA", (columns * step - _GAP, rows * step - _GAP), (0, 0, 0, 0))
    for number, thumbnail in enumerate(thumbnails):
        if thumbnail is not None:
            row, column = divmod(number, columns)
            left = column * step + (_THUMBNAIL - thumbnail.width) // 2
            top = row * step + (_THUMBNAIL - thumbnail.height) // 2
            sheet.paste(thumbnail, (left, top))
    return sheet


def _thumbnail(survey: Survey, index: int) -> Image.Image | None:
    return load_thumbnail(survey.source, index, survey.preprocessing, _THUMBNAIL)


# The charts of the survey of a data set.


def _draw_charts(survey: Survey, folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Draws the charts of the survey of a data set.

    A chart of resolutions or aspect ratios is omitted if the value is the same for all images.

    Returns:
      The width and height of each chart in CSS pixels, by the chart's file name without suffix.
    """
    plots: dict[str, Callable[[Survey, Figure, Theme], None]] = {}
    if len(survey.resolutions) > 1:
        plots["resolutions"] = _plot_resolutions
        if np.ptp(survey.aspect_ratios) > 0:
            plots["aspect_ratios"] = _plot_aspect_ratios
    if survey.levels.any():
        plots["levels"] = _plot_levels
    for name, plot in plots.items():
        style.draw(folder / f"{name}.png", functools.partial(plot, survey))
    width, height = style.SIZE
    return dict.fromkeys(plots, (round(96 * width), round(96 * height)))


def _plot_resolutions(survey: Survey, figure: Figure, theme: Theme) -> None:
    """Plots the image sizes as points, or as a density if there are many different sizes.

    The area of a point shows the number of images of this size.
    """
    axes = style.plain(figure.subplots(), theme)
    widths, heights = np.array([size for size, _ in survey.resolutions]).T
    images = np.array([number for _, number in survey.resolutions])
    is_wide = max(widths.max() / widths.min(), heights.max() / heights.min()) > 8
    if len(images) <= _MAX_POINTS:
        area = 12 + 240 * images / images.max()
        axes.scatter(widths, heights, area, color=theme.accent, alpha=0.5, linewidths=0)
    else:
        scale = np.geomspace if is_wide else np.linspace
        bins = [scale(sides.min(), sides.max() + 1, 48) for sides in (widths, heights)]
        colours = LinearSegmentedColormap.from_list("", [theme.line, theme.accent])
        norm = LogNorm(vmin=1)
        axes.hist2d(widths, heights, bins=bins, weights=images, norm=norm, cmap=colours)
    if is_wide:
        axes.set(xscale="log", yscale="log")
        axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_wide else MaxNLocator(5))
        axis.set_major_formatter(style.thousands())
    axes.set(xlabel="width (pixels)", ylabel="height (pixels)")


def _plot_aspect_ratios(survey: Survey, figure: Figure, theme: Theme) -> None:
    """Plots a histogram of the images' aspect ratios, with the ratios on a log scale."""
    axes = style.plain(figure.subplots(), theme)
    ratios = np.log2(survey.aspect_ratios)
    reach = max(np.abs(ratios).max() * 1.05, 0.5)
    axes.hist(ratios, np.linspace(-reach, reach, 42), color=theme.accent)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{2**value:.{2 if value < 0 else 3}g}")
    )
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(style.thousands())
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="width / height", ylabel="images")


def _plot_levels(survey: Survey, figure: Figure, theme: Theme) -> None:
    """Plots the fraction of pixels at each grey level, with a line for each channel."""
    axes = style.plain(figure.subplots(), theme)
    fractions = survey.levels / survey.levels.sum(axis=1, keepdims=True)
    for fraction, name, colour in zip(fractions, "RGB", theme.channels, strict=True):
        axes.plot(fraction, color=colour, linewidth=1.4, label=name)
    axes.set(xlim=(0, 255), ylim=(0, None), xticks=[0, 64, 128, 192, 255])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(style.percent())
    axes.set(xlabel="grey level", ylabel="pixels (%)")
    style.legend(axes, theme, loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1))
