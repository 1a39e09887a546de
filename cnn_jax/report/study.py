"""The HTML page of a hyper-parameter study: the best trial, the cost, charts, and all trials."""

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
    comparable_trials,
    format_parameter,
    format_range,
    is_number,
    parameter_value,
    range_edge,
    range_position,
    scale_for_all_trials,
    scale_for_complete_trials,
    sorted_importance,
    sorted_trials,
    trials_with_value,
)
from cnn_jax.system.atomic import write_text

# The sort key of a table cell without a number. The key must be finite: the sorting script
# subtracts keys, and infinity minus infinity is NaN.
_SORT_FIRST = -1e300


class Cell(NamedTuple):
    """A cell of the table of trials: the text, the sort key, and the CSS class."""

    text: str
    sort_key: float
    css_class: str = "n"


def write_study_page(study: Study, folder: pathlib.Path) -> pathlib.Path:
    """Writes the self-contained page of a study, and the page's charts as PNG files.

    Several processes may write the page at the same time. The page of the process that finishes
    last remains.

    Args:
      study: Plain JSON values, as `tune.outcome.summarize` gives them: "name", "monitor" and
        "direction"; "space", the range of each parameter; "trials"; "best", the number of the
        best trial or None; "importance"; "cost"; and the origin of the study.
      folder: The folder of the study, which also has the best configuration. It receives
        index.html and the PNG files, and is created if necessary.

    Returns:
      The page's path, `folder`/index.html.

    Raises:
      OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".page.", dir=folder) as name:
        # Each process draws into a separate temporary folder, so that no page embeds an incomplete
        # chart that another process is writing.
        temporary = pathlib.Path(name)
        _draw_charts(study, temporary)
        write_text(temporary / "index.html", _page(study, temporary, folder))
        for path in sorted(temporary.iterdir()):
            path.replace(folder / path.name)
    return folder / "index.html"


# The charts on the page of a study.


def make_charts(study: Study) -> dict[str, Chart]:
    """Returns the charts of a study by file name; omits charts whose data is missing."""
    charts = {}
    if trials_with_value(study):
        charts["history"] = Chart(functools.partial(study_charts.history, study))
    if any(is_number(value) for trial in study["trials"] for value in trial["curve"]):
        charts["curves"] = Chart(functools.partial(study_charts.curves, study))
    if study["importance"]:
        size = (4.0, 0.9 + 0.26 * len(study["importance"]))
        charts["importance"] = Chart(functools.partial(study_charts.importance, study), size)
    if len(comparable_trials(study)) > 1 and study["space"]:
        charts["parallel"] = Chart(functools.partial(parallel, study), parallel_size(study))
        for number, key in enumerate(study["space"]):
            plot = functools.partial(study_charts.value_by_parameter, study, key)
            # Three charts of this width fit side by side on the page.
            charts[f"slice_{number:02d}"] = Chart(plot, (3.3, 2.5))
    return charts


def _draw_charts(study: Study, folder: pathlib.Path) -> None:
    for name, chart in make_charts(study).items():
        style.draw(folder / f"{name}.png", *chart)


# The rendering of the HTML page.


def _page(study: Study, drawn: pathlib.Path, folder: pathlib.Path) -> str:
    """Renders the page of a study as HTML.

    Args:
      study: The study.
      drawn: The folder of the charts to embed.
      folder: The folder to which the page will be moved.
    """
    scale = scale_for_all_trials(study)
    config = shlex.quote(str(folder / (study["best_config"] or "")))
    return style.template("study.html").render(
        study=study,
        scale=scale,
        best=best_trial(study),
        command=f"cnn_jax train --config={config} --workdir=...",
        parameters=best_parameters(study),
        charts={name: style.embedded(drawn / f"{name}.png") for name in make_charts(study)},
        beyond={
            "course": _beyond(study, scale),
            "compared": _beyond(study, scale_for_complete_trials(study)),
        },
        missing=missing(study),
        shares=sorted_importance(study),
        rows=[_row(study, scale, trial) for trial in sorted_trials(study)],
        hosts=collections.Counter(trial["host"] for trial in study["trials"]),
        ranges={key: format_range(range_) for key, range_ in study["space"].items()},
        duration=texts.duration,
        time=_time,
        **style.sorting_script(),
    )


def best_parameters(study: Study) -> list[dict[str, Any]]:
    """Returns the range of each parameter and the value of the parameter in the best trial.

    The key "edge" is the end of the range that is near the value; see `range_edge`.
    """
    best = best_trial(study)
    if best is None:
        return []
    return [
        {
            "key": key,
            "value": format_parameter(range_, parameter_value(best, key)),
            "range": format_range(range_),
            "edge": range_edge(range_, parameter_value(best, key)),
        }
        for key, range_ in study["space"].items()
    ]


def _row(study: Study, scale: Scale, trial: Trial) -> dict[str, Any]:
    """Returns the row of a trial in the table of trials."""
    cells = [
        Cell(scale.format_value(trial["value"]), _sortable(trial["value"])),
        Cell(f"{trial['epochs']:,}", trial["epochs"]),
        Cell(texts.duration(trial["seconds"]), trial["seconds"]),
        *(_cell(range_, parameter_value(trial, key)) for key, range_ in study["space"].items()),
    ]
    return {"trial": trial, "is_best": trial["number"] == study["best"], "cells": cells}


def _cell(range_: Range, value: Any) -> Cell:
    """Returns the table cell of a parameter's value; choices are sorted in the range's order."""
    text = format_parameter(range_, value)
    if range_["kind"] == "categorical":
        return Cell(text, _sortable(range_position(range_, value)), "choice")
    return Cell(text, _sortable(value))


def _sortable(value: Any) -> float:
    """Converts a value to a sort key; a missing or non-finite value gets the lowest key."""
    return value if is_number(value) else _SORT_FIRST


def _time(iso: str | None) -> str:
    """Formats an ISO 8601 time as date, hour and minute."""
    return (iso or "")[:16].replace("T", " ")


def _beyond(study: Study, scale: Scale) -> str:
    """Returns a sentence about trials with values beyond the axis, or "" if there are none."""
    values = np.array([trial["value"] for trial in trials_with_value(study)], float)
    worse = int(((values < scale.low) | (values > scale.high)).sum())
    if not worse:
        return ""
    end = scale.format_value(scale.low if scale.is_rising else scale.high)
    trials = "1 trial is" if worse == 1 else f"{worse:,} trials are"
    return f"{trials} worse than {end} and drawn at the edge of the axis."


def missing(study: Study) -> dict[str, str]:
    """Maps the name of each missing section to a sentence that gives the reason."""
    none_started = "No trial has been started."
    why = {"trials": none_started}
    have_all_failed = {trial["state"] for trial in study["trials"]} == {"failed"}
    none = none_started
    if study["trials"]:
        end = ": all trials have failed." if have_all_failed else " yet."
        none = f"No trial has a value{end}"
    why |= {"history": none, "curves": none}
    if best_trial(study) is None:
        why["best"] = "There is no best trial, because " + (
            "all trials have failed." if have_all_failed else "no trial is complete yet."
        )
    if not study["importance"]:
        note = study["importance_note"] or "The importance of the parameters is not known."
        why["importance"] = note
    if len(comparable_trials(study)) < 2:
        one = "Only one trial has a value; a comparison needs two."
        why |= dict.fromkeys(("parallel", "slices"), one if comparable_trials(study) else none)
    elif not study["space"]:
        why |= dict.fromkeys(("parallel", "slices"), "The study has no parameters.")
    return why
