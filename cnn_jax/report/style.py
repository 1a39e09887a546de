"""The common style of all pages and charts: colours, axes, templates.

The class names and file names of a data set are untrusted. They are never used as names of output
files or as HTML markup. A chart shows a name only if Matplotlib's font can draw it.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib.resources
import pathlib
import re
import tempfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from cnn_jax.system import text
from cnn_jax.system.errors import printable

# The default size (width, height) of a chart in inches, the dots per inch of the image file, and
# the font size in points.
SIZE = (4.0, 3.0)
DPI = 144
TEXT_SIZE = 8.5
# The maximum number of characters of a class name on an axis.
_MAX_NAME = 24


@dataclasses.dataclass(frozen=True)
class Theme:
    """The colours of a chart on a light or a dark page.

    The colours `first`, `second` and `lines` are from the palette of Okabe and Ito (2008), whose
    colours colour-blind people can distinguish.

    Attributes:
      suffix: The last part of the names of chart files in this theme.
      ground: The colour of the page's background.
      ink: The colour of text.
      line: The colour of grids.
      accent: The colour of data in a chart with a single kind of data.
      first: The colour of the first of two kinds of data.
      second: The colour of the second of two kinds of data.
      channels: The colours of the channels R, G and B of images.
      ramp: A sequence of colours of one hue, from the smallest to the largest value.
      lines: The colours of the lines in a chart with several lines.
    """

    suffix: str
    ground: str
    ink: str
    line: str
    accent: str
    first: str
    second: str
    channels: tuple[str, str, str]
    ramp: tuple[str, ...]
    lines: tuple[str, ...]

    @property
    def colours(self) -> LinearSegmentedColormap:
        """The colour ramp as a Matplotlib colormap."""
        return LinearSegmentedColormap.from_list("ramp", self.ramp)


THEMES = (
    Theme(
        suffix="",
        ground="#ffffff",
        ink="#4a4f57",
        line="#dfe2e6",
        accent="#3f6fa8",
        first="#0072b2",
        second="#d55e00",
        channels=("#c4504a", "#4d9a5b", "#4a74c4"),
        ramp=("#eaf1f8", "#8fb8dd", "#3f7cb8", "#0b3c6f"),
        lines=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a57500", "#5a5a5a"),
    ),
    Theme(
        suffix="_dark",
        ground="#17191d",
        ink="#b9bec6",
        line="#3a3f47",
        accent="#7fb0e6",
        first="#56b4e9",
        second="#e69f00",
        channels=("#e5827c", "#7fc98d", "#86a8ec"),
        ramp=("#22303f", "#2f6291", "#6aa6de", "#d3e7fb"),
        lines=("#56b4e9", "#e69f00", "#2cc99d", "#e6a3c8", "#f0e442", "#b9bec6"),
    ),
)

Plot = Callable[[Figure, Theme], None]


def draw(path: pathlib.Path, plot: Plot, size: tuple[float, float] = SIZE, dpi: int = DPI) -> None:
    """Draws and saves a chart in the light and the dark theme, with a transparent background.

    The layout takes half of the time. It is computed only once, because both themes have the same
    text.

    Args:
      path: The file of the light chart; the dark chart is saved beside it.
      plot: Draws the chart.
      size: (width, height) in inches.
      dpi: Dots per inch of the files.
    """
    positions = []
    for theme in THEMES:
        figure = Figure(figsize=size, dpi=dpi, layout=None if positions else "constrained")
        canvas = FigureCanvasAgg(figure)
        plot(figure, theme)
        for part in (figure, *figure.axes):
            part.patch.set_alpha(0)
        for axes, position in zip(figure.axes, positions, strict=False):
            axes.set_position(position)
        canvas.draw()  # `savefig` would be slower, because it draws twice.
        positions = [axes.get_position(original=True) for axes in figure.axes]
        pixels = np.asarray(canvas.buffer_rgba())
        Image.fromarray(pixels).save(path.with_stem(path.stem + theme.suffix), dpi=(dpi, dpi))


def plain(axes: Axes, theme: Theme) -> Axes:
    """Adds a light grid to the axes and removes the frame of the axes; returns the axes."""
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=theme.ink, labelsize=TEXT_SIZE, length=0)
    axes.grid(color=theme.line, linewidth=0.7)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.ink, size=TEXT_SIZE)
    return axes


def legend(axes: Axes, theme: Theme, **options: Any) -> None:
    """Draws a legend without a frame; `options` are passed on to Matplotlib's `legend`."""
    defaults = {"frameon": False, "fontsize": TEXT_SIZE, "handlelength": 1.6}
    axes.legend(**(defaults | options), labelcolor=theme.ink)


def ink_on(colour: tuple[float, float, float, float]) -> str:
    """Returns the colour of text for a background: dark text on light, light text on dark."""
    red, green, blue, _ = colour
    # The weighted sum is the relative luminance (ITU-R BT.709).
    return "#1b1f24" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "#ffffff"


def thousands() -> FuncFormatter:
    """Returns a tick formatter for whole numbers, such as "2,000"."""
    return FuncFormatter(lambda value, _: f"{value:,.0f}")


def percent() -> FuncFormatter:
    """Returns a tick formatter that formats fractions as percentages without "%".

    The axis label contains the "%".
    """
    return FuncFormatter(lambda value, _: f"{100 * value:.3g}")


def tick_names(class_names: Sequence[str]) -> list[str]:
    """Returns the axis label of each class: the name, or the number if the name cannot be drawn."""
    return [_tick_name(name, number) for number, name in enumerate(class_names)]


def _tick_name(name: str, number: int) -> str:
    if not name.strip() or not all(map(_can_be_drawn, name)):
        return f"#{number}"
    return shorten(name)


def shorten(name: str) -> str:
    """Shortens a name to at most 24 characters; an ellipsis replaces the end of a longer name."""
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


def _can_be_drawn(character: str) -> bool:
    """Returns whether a chart can show a character.

    The character must be printable, must be in the chart font, and must belong to a script that
    runs from left to right.
    """
    is_left_to_right = unicodedata.bidirectional(character) not in ("R", "AL")
    return character.isprintable() and is_left_to_right and ord(character) in _glyphs()


@functools.cache
def _glyphs() -> frozenset[int]:
    """Returns the code points that Matplotlib's default font, DejaVu Sans, can draw."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())


def template(name: str) -> jinja2.Template:
    """Loads a page template of this package; the template escapes all inserted text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cnn_jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _on_one_line(value) if type(value) is str else value,
    )
    environment.filters |= {
        "number": lambda value: f"{value:,}",
        "percent": text.percent,
        "points": text.points,
        "decimal": lambda value, digits=4: f"{value:.{digits}f}",
        "minute": lambda iso: iso[:16].replace("T", " "),
    }
    return environment.get_template(name)


def _on_one_line(value: str) -> str:
    """Escapes unprintable characters in text, and prevents line breaks before "%"."""
    return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", printable(value))


def data_uri(path: pathlib.Path) -> markupsafe.Markup:
    """Returns a PNG file as a data URI; see `png_uri`."""
    return png_uri(path.read_bytes())


def png_uri(png: bytes) -> markupsafe.Markup:
    """Returns the content of a PNG file as a data URI.

    The URI is marked as safe markup, because escaping such a long text takes a second.
    """
    encoded = base64.b64encode(png).decode()
    return markupsafe.Markup(f"data:image/png;base64,{encoded}")


def embedded(path: pathlib.Path) -> dict[str, Any]:
    """Returns the light and the dark image of a chart as data URIs.

    Args:
      path: The file of the light chart; the dark chart is beside it.

    Returns:
      The data URIs "light" and "dark", and "width" and "height" in CSS pixels.
    """
    with Image.open(path) as image:
        width, height = image.size
        scale = 96 / image.info.get("dpi", (96, 96))[0]
    return {
        "light": data_uri(path),
        "dark": data_uri(path.with_stem(path.stem + THEMES[1].suffix)),
        "width": round(width * scale),
        "height": round(height * scale),
    }


def draw_embedded(plots: Mapping[str, Plot], size: tuple[float, float]) -> dict[str, Any]:
    """Draws charts, and returns them as in `embedded`, by name.

    Args:
      plots: The functions that draw the charts, by name; see `draw`.
      size: The (width, height) of each chart in inches.
    """
    with tempfile.TemporaryDirectory(prefix="cnn_jax-") as folder:
        paths = {name: pathlib.Path(folder) / f"{name}.png" for name in plots}
        for name, path in paths.items():
            draw(path, plots[name], size)
        return {name: embedded(path) for name, path in paths.items()}


def sorting_script() -> dict[str, str]:
    """Returns the script that sorts tables, and its digest; see `page_script`."""
    return page_script("sort.js")


def page_script(name: str) -> dict[str, str]:
    """Returns a script of this package, and its digest for the Content Security Policy.

    With this digest, browsers run no other script on the page.
    """
    script = importlib.resources.files("cnn_jax.report").joinpath(name).read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": markupsafe.Markup(script), "script_digest": digest}
