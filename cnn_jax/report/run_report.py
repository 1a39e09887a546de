"""Writes the report of a run or an ensemble: a page, picture files, and all numbers as JSON."""

import concurrent.futures
import functools
import json
import os
import pathlib
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Container
from typing import Any

import jax
import numpy as np
from PIL import Image

from cnn_jax.config import schema
from cnn_jax.config.schema import Config
from cnn_jax.data import Track, no_track, scan
from cnn_jax.data.splits import SPLITS
from cnn_jax.explain.overlay import draw_overlay
from cnn_jax.report import (
    charts,
    explanations,
    members,
    qualities,
    sections,
    style,
    texts,
    thumbnails,
)
from cnn_jax.report.run import FORMAT, Ensemble, MissingError, Network, Run, read_folder
from cnn_jax.report.sections import Figures
from cnn_jax.system.atomic import write_text
from cnn_jax.system.console import Console
from cnn_jax.system.errors import UserError
from cnn_jax.training import run_directory

# Maps the names of the two slowest sections in metrics.json to the functions that compute the
# sections. Only a full report has these sections. The explanations are first, because they choose
# the method of the maps, which are drawn while the robustness is measured.
_FULL: dict[str, Callable[[Run | Ensemble], Figures]] = {
    "explanations": explanations.explanations,
    "robustness": qualities.qualities,
}
# The longer side of the image files on the page, in pixels.
_SIDE = 144
# The titles of the sections, in the order of the page.
_TITLES = {
    "figures": "Metrics",
    "members": "Members and disagreement",
    "classes": "Classes",
    "curves": "Learning curves",
    "confusion": "Confusions",
    "calibration": "Calibration",
    "coverage": "Rejecting uncertain images",
    "mistakes": "Mistakes",
    "label_errors": "Suspected label errors",
    "explanations": "Explanations",
    "robustness": "Robustness",
    "augmentation": "Augmented training images",
    "run": "The run",
}


def write_report(
    workdir: str | os.PathLike[str],
    track: Track = no_track,
    *,
    detail: str = "full",
    source: str | None = None,
    after_training: bool = False,
    warn: Callable[[str], None] | None = None,
) -> pathlib.Path:
    """Writes the self-contained page report/index.html, and its pictures as separate files.

    The network predicts the validation and test splits again. All numbers on the page are added
    to report/metrics.json. If the bundle or the data cannot be used, the page says so at its top
    and keeps the sections of an earlier report of the same network.

    Args:
      workdir: The folder of a run or an ensemble.
      track: Shows progress.
      detail: "full", or "figures" for a report without explanations and corruptions.
      source: The name of the training data if it was moved; by default the name in the bundle.
      after_training: Whether this process has just trained the network; the page then names
        the device and the time of this process.
      warn: Receives the sentence at the top of the page if the network cannot be used.

    Returns:
      The page's path.

    Raises:
      BundleError: The ensemble is damaged.
      ConfigError: The folder is neither of a run nor of an ensemble, or `source` is not a source's
        name.
      DataError: `source` cannot be read, or is not the data that the network was trained on.
        Nothing is written.
      OSError: The report cannot be written.
    """
    page, figures = _write(workdir, track, detail, source, after_training)
    if warn is not None and (notice := figures["summary"].get("notice")):
        warn(notice)
    return page


def _write(
    workdir: str | os.PathLike[str],
    track: Track,
    detail: str,
    source: str | None,
    after_training: bool,
) -> tuple[pathlib.Path, Figures]:
    """Writes the report; returns the page's path and the content of metrics.json."""
    workdir = pathlib.Path(workdir)
    watch = _Stopwatch()
    measuring = _seconds_since_training(workdir) if after_training else 0.0
    run = read_folder(workdir, track, source)
    watch.lap("predictions")
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    # If the network is missing, no new images can be drawn. Keep the images of an earlier report.
    if run.network is not None:
        shutil.rmtree(folder / "examples", ignore_errors=True)
        (folder / "examples").mkdir()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            new, missing, drawings = _sections(run, detail, track, watch, folder, thread)
            for drawing in drawings:
                drawing.result()
        finally:  # On an interrupt, do not wait for the pending drawings.
            thread.shutdown(cancel_futures=True)
    figures = run.figures | new | {"missing": missing, "format": FORMAT}
    figures["methods"] = texts.methods(figures)
    figures["run"] = _facts(run, figures.get("run"), after_training)
    figures["summary"] = texts.summary(figures)
    if run.network is None:
        figures["summary"]["notice"] = _notice(run, figures)

    if run.network is not None:
        _draw_examples(run.network, new, folder, detail == "full" and isinstance(run, Run))
        if isinstance(run, Run) and "augmentation" in new:
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
    write_text(folder / "index.html", _page(figures, folder, drawn))
    return folder / "index.html", figures


def _notice(run: Run | Ensemble, figures: Figures) -> str:
    """Returns the notice at the top of the page if the network or its data cannot be used."""
    is_kept = any(name in figures for name in figures["missing"])
    kept = " The sections marked below are from an earlier report." if is_kept else ""
    return f"This report is not complete. {run.why_no_network}{kept}"


class _Stopwatch:
    """A stopwatch that adds up the seconds spent on each task."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Adds the time since the previous lap to the seconds of the task `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _seconds_since_training(workdir: pathlib.Path) -> float:
    """Returns the seconds since the last epoch was logged.

    In this time the run computed the calibration and the metrics, and wrote the bundle.
    """
    try:
        return max(time.time() - (workdir / "metrics.jsonl").stat().st_mtime, 0.0)
    except OSError:
        return 0.0


def report_after_training(workdir: str | os.PathLike[str], config: Config, console: Console) -> str:
    """Writes the report of a run that this process has trained, and prints the time spent.

    If several processes train the network, no report is written, because all other processes
    would have to wait for the report. An unexpected error is shown as a warning, because the run is
    complete without its report.

    Args:
      workdir: The run's folder.
      config: The run's configuration.
      console: Shows progress, the time after training and warnings.

    Returns:
      The page's path; or, if no report is written, the command that writes it.

    Raises:
      KeyboardInterrupt: The user interrupted the report; the message has the command.
      OSError: The report cannot be written.
      UserError: The folder is not the folder of a run.
    """
    command = f"cnn_jax report --run={shlex.quote(str(workdir))}"
    detail = config.report.detail
    if jax.process_count() > 1 or detail == "none":
        return command
    try:
        page, figures = _write(workdir, console.track, detail, None, after_training=True)
        console.facts({"time": figures["run"]["time"]["words"]})
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(
            f"the run is complete; {command} writes its report"
        ) from interruption
    except (OSError, UserError):
        raise
    except Exception as error:
        console.warn(f"no report: {type(error).__name__}: {error}; the run itself is complete")
        return command
    return str(page)


def _sections(
    run: Run | Ensemble,
    detail: str,
    track: Track,
    watch: _Stopwatch,
    folder: pathlib.Path,
    thread: concurrent.futures.Executor,
) -> tuple[Figures, dict[str, str], list[concurrent.futures.Future[Any]]]:
    """Computes all sections of a report while another thread draws the finished sections.

    Returns:
      The sections by name; the reasons for missing sections by name; and the pending drawings.
    """
    made, missing, drawings = {}, {}, []
    if not run.is_measured():
        missing["figures"] = run.why_no_network
    wanted = _wanted_sections(run, detail)
    splits = {split: run.figures[split] for split in SPLITS if split in run.figures}
    for name, make in track(wanted.items(), "reporting", len(wanted)):
        if name == "robustness" and run.network is not None:
            is_run = isinstance(run, Run)
            drawings.append(thread.submit(_draw_examples, run.network, dict(made), folder, is_run))
        try:
            made[name] = make()
            drawings.append(thread.submit(_draw_charts, splits | {name: made[name]}, folder))
        except MissingError as reason:
            missing[name] = str(reason)
        watch.lap(name)
    for name in _FULL.keys() - wanted.keys():
        missing[name] = "Not part of this report (report.detail); cnn_jax report --run=RUN adds it."
    return made, missing, drawings


def _wanted_sections(run: Run | Ensemble, detail: str) -> dict[str, Callable[[], Figures]]:
    """Returns the functions that compute the sections of a report, by name."""
    full = _FULL if detail == "full" else {}
    common = {name: functools.partial(make, run) for name, make in (sections.COMMON | full).items()}
    if isinstance(run, Ensemble):
        return {"members": functools.partial(members.members, run), **common}
    special = {name: functools.partial(make, run) for name, make in sections.RUN_ONLY.items()}
    return {**special, **common}


def _facts(run: Run | Ensemble, earlier: object, after_training: bool) -> Figures:
    """Returns details of a run or an ensemble, such as its data and its library versions.

    Device and time of a run are kept from the report that was written directly after training.
    """
    if isinstance(run, Ensemble):
        return members.facts(run)
    facts = sections.facts(run)
    if after_training:
        devices = jax.devices()
        facts["trained_on"] = {
            "device": f"{len(devices)} x {devices[0].device_kind}",
            "processes": jax.process_count(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        }
    elif isinstance(earlier, dict):
        facts |= {key: earlier[key] for key in ("trained_on", "time") if key in earlier}
    return facts


# The pictures and charts of the report.


def _draw_examples(
    network: Network, made: Figures, folder: pathlib.Path, are_explained: bool
) -> None:
    """Draws the example images of sections that have no file yet.

    If `are_explained` is True, the saliency maps of the images are drawn too. The section on
    explanations names their method.
    """
    new_examples = {
        shown["position"]: shown
        for shown in sections.examples(made)
        if not (folder / shown["picture"]).exists()
    }
    positions = list(new_examples)
    preprocessing = network.predictor.preprocessing

    def load(position: int) -> Image.Image | None:
        return thumbnails.load_thumbnail(network.source, position, preprocessing, _SIDE)

    images = dict(zip(positions, scan.on_all_cores(load, positions), strict=True))
    for position, image in images.items():
        if image is not None:
            thumbnails.save_small(image, folder / new_examples[position]["picture"])
    if not are_explained or not positions:
        return
    pixels = network.dataset.loader.load(np.array(positions))["image"]
    classes = [network.class_names.index(shown["predicted"]) for shown in new_examples.values()]
    method = made.get("explanations", {}).get("maps", explanations.REPORT_METHODS[0])
    maps = explanations.maps(network.need_single(), pixels, np.array(classes), method)
    for position, values in zip(positions, maps, strict=True):
        if (image := images[position]) is not None:
            path = folder / new_examples[position]["picture"]
            thumbnails.save_small(draw_overlay(image, values, preprocessing), _map_path(path))


def _map_path(picture: pathlib.Path) -> pathlib.Path:
    return picture.with_stem(f"{picture.stem}_map")


def _draw_augmentation(run: Run, folder: pathlib.Path) -> None:
    """Draws training images before and after augmentation, side by side."""
    before, after = (batch["image"] for batch in sections.training_images(run))
    for number, pair in enumerate(zip(before, after, strict=True)):
        row = thumbnails.join_in_row([thumbnails.fit_to_square(pixels, _SIDE) for pixels in pair])
        row.save(folder / "examples" / f"augmented_{number:02d}.png")


def _draw_pictures(run: Run | Ensemble, made: Figures, folder: pathlib.Path) -> None:
    """Draws the pictures of the sections on explanations and on robustness.

    The file names of the pictures are added to these two sections in `made`.
    """
    drawings = {"explanations": explanations.draw_pictures, "robustness": qualities.draw_pictures}
    for name, draw in drawings.items():
        if name in made:
            made[name]["pictures"] = draw(run, folder)


def _draw_charts(figures: Figures, folder: pathlib.Path, already: Container[str] = ()) -> list[str]:
    """Draws the charts of all sections in the light and the dark theme; returns the chart names.

    Args:
      figures: The content of metrics.json, or a part of it.
      folder: The folder for the files.
      already: The names of sections whose charts have already been drawn.
    """
    names = []
    for section in figures:
        parts = {name: figures[name] for name in (*SPLITS, section) if name in figures}
        for name, chart in _charts(parts).items():
            names.append(name)
            if section not in already:
                style.draw(folder / f"{name}.png", chart.plot, chart.size, chart.dpi)
    return names


def _charts(figures: Figures) -> dict[str, charts.Chart]:
    return charts.run_charts(figures) | explanations.charts(figures) | qualities.charts(figures)


# The rendering of the HTML page.


def _page(
    figures: Figures,
    folder: pathlib.Path,
    drawn: list[str],
) -> str:
    def picture(name: str) -> str | None:
        """Returns a picture file as a data URI, or None if the file is missing."""
        path = folder / name
        return style.data_uri(path) if path.is_file() else None

    names = list(figures["test"]["per_class"]) if "test" in figures else []
    is_ensemble = "members" in figures or "members" in figures["missing"]
    omitted = sections.RUN_ONLY if is_ensemble else ("members",)
    titles = {name: title for name, title in _TITLES.items() if name not in omitted}
    if is_ensemble:
        titles["run"] = "The ensemble"
    return style.template("run_report.html").render(
        figures=figures,
        run=figures["run"],
        titles=titles,
        charts={name: style.embedded(folder / f"{name}.png") for name in drawn},
        picture=picture,
        map_of=lambda name: picture(str(_map_path(pathlib.Path(name)))),
        are_mapped=any((folder / "examples").glob("*_map.png")),
        # A chart shows the number of a class if the class name cannot be drawn. The table of
        # classes then shows the numbers of the classes too.
        are_numbered=style.tick_names(names) != [style.shorten(name) for name in names],
        configuration={
            key: json.dumps(value, ensure_ascii=False)
            for key, value in schema.flat(figures["run"].get("configuration", {})).items()
        },
        **style.sorting_script(),
    )
