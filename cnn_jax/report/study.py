"""The page of a hyper-parameter study: its best trial, what it cost, charts, and all trials."""

import collections
import functools
import pathlib
import shlex
import tempfile
from typing import Any, NamedTuple

import numpy as np

from cnn_jax.report import study_charts, style, texts
from cnn_jax.report.charts import Chart
from cnn_jax.report.parallel import parallel, parallel_size
from cnn_jax.report.study_values import (
    Range,
    Scale,
    Study,
    Trial,
    best_trial,
    by_importance,
    compared,
    edge,
    is_number,
    ordered,
    parameter,
    parameter_text,
    place,
    range_text,
    scale_of_all,
    scale_of_complete,
    valued,
)
from cnn_jax.system.atomic import write_text

# A cell without a number sorts below all others. Infinity less infinity would be no number.
_SORTS_FIRST = -1e300


class Cell(NamedTuple):
    """Of the table of all trials: what it shows, what it sorts by, and its class."""

    text: str
    by: float
    look: str = "n"


def write_study_page(study: Study, folder: pathlib.Path) -> pathlib.Path:
    """Writes a study as a page that needs no other file, and its charts beside it.

    Others may write the same page at the same time: the last is left, whole.

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
    with tempfile.TemporaryDirectory(prefix=".page.", dir=folder) as name:
        # A folder of one's own: the page has the charts that it was made with, and no half ones.
        aside = pathlib.Path(name)
        _draw_charts(study, aside)
        write_text(aside / "index.html", _page(study, aside, folder))
        for path in sorted(aside.iterdir()):
            path.replace(folder / path.name)
    return folder / "index.html"


# Charts.


def charts_of(study: Study) -> dict[str, Chart]:
    """The charts that there is something to draw of, by the names of their files."""
    charts = {}
    if valued(study):
        charts["history"] = Chart(functools.partial(study_charts.history, study))
    if any(is_number(value) for trial in study["trials"] for value in trial["curve"]):
        charts["curves"] = Chart(functools.partial(study_charts.curves, study))
    if study["importance"]:
        size = (4.0, 0.9 + 0.26 * len(study["importance"]))
        charts["importance"] = Chart(functools.partial(study_charts.importance, study), size)
    if len(compared(study)) > 1 and study["space"]:
        charts["parallel"] = Chart(functools.partial(parallel, study), parallel_size(study))
        for number, key in enumerate(study["space"]):
            plot = functools.partial(study_charts.value_by_parameter, study, key)
            # Three stand in a row of the page.
            charts[f"slice_{number:02d}"] = Chart(plot, (3.3, 2.5))
    return charts


def _draw_charts(study: Study, folder: pathlib.Path) -> None:
    for name, chart in charts_of(study).items():
        style.draw(folder / f"{name}.png", *chart)


# The page.


def _page(study: Study, drawn: pathlib.Path, folder: pathlib.Path) -> str:
    """The page with the charts of the folder `drawn`; it will lie in `folder`."""
    scale = scale_of_all(study)
    config = shlex.quote(str(folder / (study["best_config"] or "")))
    return style.template("study.html").render(
        study=study,
        scale=scale,
        best=best_trial(study),
        command=f"cnn_jax train --config={config} --workdir=...",
        parameters=best_parameters(study),
        charts={name: style.embedded(drawn / f"{name}.png") for name in charts_of(study)},
        beyond={
            "course": _beyond(study, scale),
            "compared": _beyond(study, scale_of_complete(study)),
        },
        missing=missing(study),
        shares=by_importance(study),
        rows=[_row(study, scale, trial) for trial in ordered(study)],
        hosts=collections.Counter(trial["host"] for trial in study["trials"]),
        ranges={key: range_text(range_) for key, range_ in study["space"].items()},
        duration=texts.duration,
        time=_time,
        **style.sorting_script(),
    )


def best_parameters(study: Study) -> list[dict[str, Any]]:
    """What the best trial has for each parameter, its range, and the edge it lies at."""
    best = best_trial(study)
    if best is None:
        return []
    return [
        {
            "key": key,
            "value": parameter_text(range_, parameter(best, key)),
            "range": range_text(range_),
            "edge": edge(range_, parameter(best, key)),
        }
        for key, range_ in study["space"].items()
    ]


def _row(study: Study, scale: Scale, trial: Trial) -> dict[str, Any]:
    """What the table of all trials says of one."""
    cells = [
        Cell(scale.text(trial["value"]), _sortable(trial["value"])),
        Cell(f"{trial['epochs']:,}", trial["epochs"]),
        Cell(texts.duration(trial["seconds"]), trial["seconds"]),
        *(_cell(range_, parameter(trial, key)) for key, range_ in study["space"].items()),
    ]
    return {"trial": trial, "is_best": trial["number"] == study["best"], "cells": cells}


def _cell(range_: Range, value: Any) -> Cell:
    """A parameter's value; categories sort in the order in which the range has them."""
    text = parameter_text(range_, value)
    if range_["kind"] == "categorical":
        return Cell(text, _sortable(place(range_, value)), "choice")
    return Cell(text, _sortable(value))


def _sortable(value: Any) -> float:
    return value if is_number(value) else _SORTS_FIRST


def _time(iso: str | None) -> str:
    """To the minute."""
    return (iso or "")[:16].replace("T", " ")


def _beyond(study: Study, scale: Scale) -> str:
    """Which values stand at the edge of the charts, in a sentence, if any do."""
    values = np.array([trial["value"] for trial in valued(study)], float)
    worse = int(((values < scale.low) | (values > scale.high)).sum())
    if not worse:
        return ""
    end = scale.text(scale.low if scale.is_rising else scale.high)
    trials = "1 trial stands" if worse == 1 else f"{worse:,} trials stand"
    return f"{trials} at the edge of the axis of values, being worse than {end}."


def missing(study: Study) -> dict[str, str]:
    """Why a section is not there, in a sentence, by its name."""
    none_started = "No trial has been started."
    why = {"trials": none_started}
    have_all_failed = {trial["state"] for trial in study["trials"]} == {"failed"}
    none = none_started
    if study["trials"]:
        none = "No trial has a value" + (": all have failed." if have_all_failed else " yet.")
    why |= {"history": none, "curves": none}
    if best_trial(study) is None:
        why["best"] = "There is no best trial: none has been completed" + (
            ", all have failed." if have_all_failed else " so far."
        )
    if not study["importance"]:
        note = study["importance_note"] or "The importance of the parameters is not known."
        why["importance"] = note
    if len(compared(study)) < 2:
        one = "A single trial has a value: from the second on, they can be compared."
        why |= dict.fromkeys(("parallel", "slices"), one if compared(study) else none)
    elif not study["space"]:
        why |= dict.fromkeys(("parallel", "slices"), "The study has no parameters.")
    return why
