"""The HTML page of a hyper-parameter study: the best trial, the cost, charts, and all trials."""

import collections
import io
import math
import pathlib
import shlex
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from matplotlib import pyplot
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from cnn_jax.report import style, texts
from cnn_jax.system.atomic import write_text
from cnn_jax.system.errors import printable
from cnn_jax.system.text import percent

Study = Mapping[str, Any]
Trial = Mapping[str, Any]
# The search range of a parameter: its kind, and either its two ends or its choices.
Range = Mapping[str, Any]

# The sort key of a table cell without a number. The key must be finite: the sorting script
# subtracts keys, and infinity minus infinity is NaN.
_SORT_FIRST = -1e300
# The text that the page shows for a missing value.
_MISSING = "\N{EN DASH}"
# A value is near an end of its range if the distance is at most this fraction of the range.
_EDGE = 0.05
_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
}


def write_study_page(study: Study, folder: pathlib.Path) -> pathlib.Path:
    """Writes the self-contained page of a study.

    Several processes may write the page at the same time. The page of the process that finishes
    last remains.

    Args:
      study: Plain JSON values, as `tune.outcome.summarize` gives them: "name", "monitor" and
        "direction"; "space", the range of each parameter; "trials"; "best", the number of the
        best trial or None; "importance"; "cost"; and the origin of the study.
      folder: The folder of the study, which also has the best configuration. It receives
        index.html, and is created if necessary.

    Returns:
      The page's path, `folder`/index.html.

    Raises:
      OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = shlex.quote(str(folder / (study["best_config"] or "")))
    page = style.template("study.html").render(
        study=study,
        name=study["monitor"].replace("_", " ").replace("f1", "F1"),
        best=next((one for one in study["trials"] if one["number"] == study["best"]), None),
        command=f"cnn_jax train --config={config} --workdir=...",
        charts=draw_charts(study),
        hosts=collections.Counter(trial["host"] for trial in study["trials"]),
        duration=texts.duration,
        format_objective=lambda value: _format_objective(study, value),
        format_value=_format_value,
        format_range=_format_range,
        range_edge=range_edge,
        cell=_cell,
        sort_first=_SORT_FIRST,
        **style.sorting_script(),
    )
    write_text(folder / "index.html", page, shared=True)
    return folder / "index.html"


def draw_charts(study: Study) -> dict[str, str]:
    """Draws Optuna's charts of a study; omits charts whose data is missing.

    Returns:
      The charts as data URIs of PNG images, by the name of the chart: "history", "curves",
      "parallel", and "slice KEY" for each parameter.
    """
    plots = optuna.visualization.matplotlib
    charts, copied = {}, _in_memory(study)
    # `rc_context` restores Matplotlib's style, which Optuna changes.
    with warnings.catch_warnings(), pyplot.rc_context():
        # Optuna warns that the functions are experimental. Matplotlib warns about missing
        # characters.
        warnings.simplefilter("ignore")
        # Without the backend "agg", the charts would open as windows on a desktop.
        pyplot.switch_backend("agg")
        complete = [trial for trial in copied.trials if trial.state == TrialState.COMPLETE]
        if complete:
            charts["history"] = _png(plots.plot_optimization_history(copied), (5, 3.5))
        if any(trial.intermediate_values for trial in copied.trials):
            axes = plots.plot_intermediate_values(copied)
            if len(copied.trials) > 10 and (legend := axes.get_legend()) is not None:
                legend.remove()  # This legend would be higher than the chart.
            charts["curves"] = _png(axes, (5, 3.5))
        if len(complete) > 1 and study["space"]:
            width = max(8, 1.5 * len(study["space"]))
            charts["parallel"] = _png(plots.plot_parallel_coordinate(copied), (width, 4))
            for key in study["space"]:
                charts[f"slice {key}"] = _png(plots.plot_slice(copied, [_plain(key)]), (3.6, 2.8))
    return charts


def _in_memory(study: Study) -> optuna.Study:
    """Converts a study from JSON values to an Optuna study in memory."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        copied = optuna.create_study(direction=study["direction"])
    finally:
        optuna.logging.set_verbosity(level)
    distributions = {_plain(key): _distribution(range_) for key, range_ in study["space"].items()}
    for trial in sorted(study["trials"], key=lambda trial: trial["number"]):
        params = dict(_params(study, trial))
        state = _STATES[trial["state"]]
        value = trial["value"] if _is_number(trial["value"]) else None
        if state == TrialState.COMPLETE and value is None:
            state = TrialState.FAIL
        copied.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value,
                params=params,
                distributions={key: distributions[key] for key in params},
                intermediate_values={
                    epoch: value
                    for epoch, value in enumerate(trial["curve"], 1)
                    if _is_number(value)
                },
            )
        )
    return copied


def _distribution(range_: Range) -> BaseDistribution:
    if range_["kind"] == "categorical":
        return CategoricalDistribution(list(map(_choice, range_["choices"])))
    kind = IntDistribution if range_["kind"] == "int" else FloatDistribution
    return kind(range_["low"], range_["high"], log=range_["log"])


def _params(study: Study, trial: Trial) -> Iterator[tuple[str, Any]]:
    """Yields a trial's parameters, except parameters with values outside the study's ranges."""
    for key, value in trial["params"].items():
        range_ = study["space"].get(key)
        if range_ is None:
            continue
        if range_["kind"] == "categorical":
            if value in range_["choices"]:
                yield _plain(key), _choice(value)
        elif range_["low"] <= value <= range_["high"]:
            yield _plain(key), value


def _choice(value: Any) -> Any:
    """Converts a choice to a type that Optuna supports: None, a number or a text."""
    return value if value is None or isinstance(value, int | float) else _plain(str(value))


def _plain(text: str) -> str:
    """Escapes unprintable characters, and "$", which would start a formula in Matplotlib."""
    return printable(text).replace("$", r"\$")


def _png(axes: Any, size: tuple[float, float]) -> str:
    """Returns the chart with these axes as the data URI of a PNG image, and closes the chart.

    Args:
      axes: The axes, or an array of axes, of one chart.
      size: The (width, height) of the chart in inches.
    """
    figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
    figure.set_size_inches(size)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return style.png_uri(file.getvalue())


def _is_number(value: object) -> bool:
    """Returns whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def range_edge(range_: Range, value: Any) -> str | None:
    """Returns the end of the range that is near a value: "lower", "upper" or None.

    A value is near an end if the distance is at most 5 % of the range. The distance is measured
    on the log scale if the range is searched on the log scale. Choices have no ends.
    """
    if range_["kind"] == "categorical" or range_["low"] == range_["high"] or not _is_number(value):
        return None
    low, high, value = (
        math.log(number) if range_["log"] else number
        for number in (range_["low"], range_["high"], value)
    )
    position = (value - low) / (high - low)
    # Without the tolerance of 1e-9, rounding errors could exclude a value at exactly 5 %.
    if position <= _EDGE + 1e-9:
        return "lower"
    return "upper" if position >= 1 - _EDGE - 1e-9 else None


def _format_objective(study: Study, value: float | None) -> str:
    """Formats a value of the monitored metric, such as "93.45 %"; a loss has four decimals."""
    if not _is_number(value):
        return _MISSING
    assert value is not None
    return f"{value:.4f}" if study["monitor"].endswith("loss") else percent(value, 2)


def _cell(range_: Range, trial: Trial, key: str) -> tuple[float, str]:
    """Returns the sort key and the text of a parameter; choices are sorted in the range's order."""
    if key not in trial["params"]:
        return _SORT_FIRST, _MISSING
    value = trial["params"][key]
    choices = range_.get("choices", ())
    order = choices.index(value) if value in choices else value
    return order if _is_number(order) else _SORT_FIRST, _format_value(value)


def _format_value(value: Any) -> str:
    """Formats the value of a parameter; numbers get four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_range(range_: Range) -> str:
    """Formats the range of a parameter, such as "0.0001 to 0.01, on the log scale"."""
    if range_["kind"] == "categorical":
        return ", ".join(map(str, range_["choices"]))
    scale = ", on the log scale" if range_["log"] else ""
    steps = f" in steps of {_format_value(range_['step'])}" if "step" in range_ else ""
    return f"{_format_value(range_['low'])} to {_format_value(range_['high'])}{steps}{scale}"
