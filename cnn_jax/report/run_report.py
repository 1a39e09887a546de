"""The report of a run: its page, the pictures beside it, and all its figures as JSON."""

import concurrent.futures
import json
import os
import pathlib
import platform
import shlex
import shutil
import time
from collections.abc import Container
from typing import Any

import jax
import numpy as np
from PIL import Image

from cnn_jax.config import files
from cnn_jax.config.schema import Config
from cnn_jax.data import Track, no_track, scan
from cnn_jax.data.splits import SPLITS
from cnn_jax.explain.overlay import under_map
from cnn_jax.report import charts, explanations, qualities, sections, style, texts, thumbnails
from cnn_jax.report.run import FORMAT, MissingError, Network, Run, read_run
from cnn_jax.report.sections import Figures
from cnn_jax.system.console import Console
from cnn_jax.system.errors import UserError
from cnn_jax.training import run_directory

# The sections that take longer than all others, by their names in metrics.json.
# Corruptions come first: their charts, which take longest, are drawn during the explanations.
_FULL = {"robustness": qualities.qualities, "explanations": explanations.explanations}
# The longer side of the images on the page, in pixels of their files.
_SIDE = 144
# The page's sections, in its order.
_TITLES = {
    "figures": "Figures",
    "classes": "Classes",
    "curves": "Learning curves",
    "confusion": "Confusions",
    "calibration": "Calibration",
    "coverage": "Refusing the least confident",
    "mistakes": "Mistakes",
    "label_errors": "Suspected label errors",
    "explanations": "What it looks at",
    "robustness": "Images of other qualities",
    "augmentation": "What the network saw",
    "run": "The run",
}


def write_report(
    workdir: str | os.PathLike[str],
    track: Track = no_track,
    *,
    detail: str = "full",
    source: str | None = None,
    after_training: bool = False,
) -> pathlib.Path:
    """Writes report/index.html, which needs no other file, and what it shows.

    Validation and test are predicted again. What the report finds is added to
    report/metrics.json, and every number of the page stands there. Of what cannot be had, such
    as the images of data that has gone, the page says why; figures of an earlier report of the
    same network stay.

    Args:
      workdir: The run's folder.
      track: Shows progress.
      detail: "full", or "figures" for a report without explanations and corruptions.
      source: Where the run's data is now; by default where it was.
      after_training: Whether this process has just trained the network, so that its device is
        the one to be named.

    Returns:
      The page's path.

    Raises:
      ConfigError: The folder is not a run's.
      OSError: It cannot be written.
    """
    return _write(workdir, track, detail, source, after_training)[0]


def _write(
    workdir: str | os.PathLike[str],
    track: Track,
    detail: str,
    source: str | None,
    after_training: bool,
) -> tuple[pathlib.Path, Figures]:
    """Writes the report as `write_report` does, and also returns the content of metrics.json."""
    workdir = pathlib.Path(workdir)
    watch = _Stopwatch()
    measuring = _seconds_since_training(workdir) if after_training else 0.0
    run = read_run(workdir, track, source)
    watch.lap("predictions")
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    if run.network is not None:  # Else those of an earlier report stay.
        shutil.rmtree(folder / "examples", ignore_errors=True)
        (folder / "examples").mkdir()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            new, missing, drawings = _sections(run, detail, track, watch, folder, thread)
            for drawing in drawings:
                drawing.result()
        finally:  # Without this, an interrupt would wait for all of them.
            thread.shutdown(cancel_futures=True)
    figures = run.figures | new | {"missing": missing, "methods": texts.METHODS, "format": FORMAT}
    figures["run"] = _facts(run, figures.get("run"), after_training)
    figures["summary"] = texts.summary(figures)

    if run.network is not None:
        _draw_examples(run.network, sections.examples(new), folder, detail == "full")
        if "augmentation" in new:
            _draw_augmentation(run, folder)
    _draw_pictures(run, new, folder)
    watch.lap("images")
    drawn = _draw_charts(figures, folder, already=new)
    watch.lap("charts")
    if after_training:
        figures["run"]["time"] = texts.time_spent(
            figures["run"]["seconds"], {"measuring": measuring, **watch.seconds}
        )
    run_directory.write_metrics(workdir, figures)
    run_directory.write_text(folder / "index.html", _page(figures, folder, drawn))
    return folder / "index.html", figures


class _Stopwatch:
    """A stopwatch that adds up the seconds of each task."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Counts the time since the last call for `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _seconds_since_training(workdir: pathlib.Path) -> float:
    """Seconds since the last epoch was logged: calibrating, measuring, writing the bundle."""
    try:
        return max(time.time() - (workdir / "metrics.jsonl").stat().st_mtime, 0.0)
    except OSError:
        return 0.0


def report_after_training(workdir: str | os.PathLike[str], config: Config, console: Console) -> str:
    """Writes the report of a run that this process has trained, and shows where the time went.

    With several processes none writes it, because the others would have to wait. A failure is a
    warning, because the run is complete without its report.

    Args:
      workdir: The run's folder.
      config: Its configuration.
      console: Shows progress, the time after training and warnings.

    Returns:
      The page's path; or, if none is written, the command that writes it.

    Raises:
      KeyboardInterrupt: With a message that has the command.
      OSError: The report cannot be written.
      UserError: The folder is not a run's.
    """
    command = f"cnn_jax report --run={shlex.quote(str(workdir))}"
    detail = config.report.detail
    if jax.process_count() > 1 or detail == "none":
        return command
    try:
        page, figures = _write(workdir, console.track, detail, None, after_training=True)
        console.facts({"time": figures["run"]["time"]["words"]})
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(f"the run is done; {command} makes its report") from interruption
    except (OSError, UserError):
        raise
    except Exception as error:
        console.warn(f"no report: {type(error).__name__}: {error}; all else is complete")
        return command
    return str(page)


def _sections(
    run: Run,
    detail: str,
    track: Track,
    watch: _Stopwatch,
    folder: pathlib.Path,
    thread: concurrent.futures.Executor,
) -> tuple[Figures, dict[str, str], list[concurrent.futures.Future[Any]]]:
    """Makes all sections; a thread draws those that are ready, while the network is at work.

    Returns:
      The sections that can be made, why the others cannot, by name, and the drawings under way.
    """
    made, missing, drawings = {}, {}, []
    if not run.is_measured():
        missing["figures"] = run.why_no_network
    full = _FULL if detail == "full" else {}
    wanted = sections.SECTIONS | full
    splits = {split: run.figures[split] for split in SPLITS if split in run.figures}
    for name, make in track(wanted.items(), "reporting", len(wanted)):
        if name in full and run.network is not None and name == next(iter(full)):
            examples = sections.examples(dict(made))
            drawings.append(thread.submit(_draw_examples, run.network, examples, folder, True))
        try:
            made[name] = make(run)
            drawings.append(thread.submit(_draw_charts, splits | {name: made[name]}, folder))
        except MissingError as reason:
            missing[name] = str(reason)
        watch.lap(name)
    for name in _FULL.keys() - wanted.keys():
        missing[name] = "Left out of this report (report.detail); cnn_jax.report makes the whole."
    return made, missing, drawings


def _facts(run: Run, before: object, after_training: bool) -> Figures:
    """What is to be said of the run; device and time are those of the report after training."""
    facts = sections.facts(run)
    if after_training:
        devices = jax.devices()
        facts["trained_on"] = {
            "device": f"{len(devices)} x {devices[0].device_kind}",
            "processes": jax.process_count(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        }
    elif isinstance(before, dict):
        facts |= {key: before[key] for key in ("trained_on", "time") if key in before}
    return facts


# Pictures.


def _draw_examples(
    network: Network, examples: list[Figures], folder: pathlib.Path, are_explained: bool
) -> None:
    """Draws each image that is not there yet, and once more under its map if they are explained."""
    by_position = {
        shown["position"]: shown for shown in examples if not (folder / shown["picture"]).exists()
    }
    positions = list(by_position)
    preprocessing = network.predictor.preprocessing

    def load(position: int) -> Image.Image | None:
        return thumbnails.load_thumbnail(network.source, position, preprocessing, _SIDE)

    images = dict(zip(positions, scan.on_all_cores(load, positions), strict=True))
    for position, image in images.items():
        if image is not None:
            thumbnails.save_small(image, folder / by_position[position]["picture"])
    if not are_explained or not positions:
        return
    pixels = network.dataset.loader.load(np.array(positions))["image"]
    classes = [network.class_names.index(shown["predicted"]) for shown in by_position.values()]
    maps = explanations.maps(network.predictor, pixels, np.array(classes))
    for position, values in zip(positions, maps, strict=True):
        if (image := images[position]) is not None:
            path = folder / by_position[position]["picture"]
            thumbnails.save_small(under_map(image, values), _map_path(path))


def _map_path(picture: pathlib.Path) -> pathlib.Path:
    return picture.with_stem(f"{picture.stem}_map")


def _draw_augmentation(run: Run, folder: pathlib.Path) -> None:
    """Draws training images beside what became of them."""
    before, after = (batch["image"] for batch in sections.training_images(run))
    for number, pair in enumerate(zip(before, after, strict=True)):
        row = thumbnails.in_a_row([thumbnails.fitted(pixels, _SIDE) for pixels in pair])
        row.save(folder / "examples" / f"augmented_{number:02d}.png")


def _draw_pictures(run: Run, made: Figures, folder: pathlib.Path) -> None:
    """Draws what sections show beside charts and examples, and names the files in them."""
    drawings = {"explanations": explanations.draw_pictures, "robustness": qualities.draw_pictures}
    for name, draw in drawings.items():
        if name in made:
            made[name]["pictures"] = draw(run, folder)


def _draw_charts(figures: Figures, folder: pathlib.Path, already: Container[str] = ()) -> list[str]:
    """Draws what there are figures for, in both themes; returns the names of the charts.

    Args:
      figures: The content of metrics.json, or a part of it.
      folder: Where to.
      already: Sections whose charts are drawn.
    """
    names = []
    for section in figures:
        of_section = {name: figures[name] for name in (*SPLITS, section) if name in figures}
        for name, chart in _charts(of_section).items():
            names.append(name)
            if section not in already:
                style.draw(folder / f"{name}.png", chart.plot, chart.size, chart.dpi)
    return names


def _charts(figures: Figures) -> dict[str, charts.Chart]:
    return charts.charts_of(figures) | explanations.charts(figures) | qualities.charts(figures)


# The page.


def _page(
    figures: Figures,
    folder: pathlib.Path,
    drawn: list[str],
) -> str:
    def picture(name: str) -> str | None:
        """A file of the folder as a part of the page, if it is there."""
        path = folder / name
        return style.data_uri(path) if path.is_file() else None

    names = list(figures["test"]["per_class"]) if "test" in figures else []
    return style.template("run_report.html").render(
        figures=figures,
        run=figures["run"],
        titles=_TITLES,
        charts={name: style.embedded(folder / f"{name}.png") for name in drawn},
        picture=picture,
        map_of=lambda name: picture(str(_map_path(pathlib.Path(name)))),
        are_mapped=any((folder / "examples").glob("*_map.png")),
        # Where a chart has a class's number, the table of classes has it too.
        are_numbered=style.tick_names(names) != [style.shorten(name) for name in names],
        configuration={
            key: json.dumps(value, ensure_ascii=False)
            for key, value in files.flat(figures["run"]["configuration"]).items()
        },
        **style.sorting_script(),
    )
