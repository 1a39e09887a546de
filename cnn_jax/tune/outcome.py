"""What a study has come to: figures, a table, and the best configuration as a file."""

import csv
import datetime
import fcntl
import io
import json
import math
import pathlib
import shlex
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import optuna
from ml_collections import ConfigDict
from optuna.importance import FanovaImportanceEvaluator
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

import cnn_jax
from cnn_jax.config.schema import Config
from cnn_jax.data.findings import count
from cnn_jax.data.sources import absolute
from cnn_jax.report.study import write_study_page
from cnn_jax.report.texts import duration
from cnn_jax.system.atomic import write_text
from cnn_jax.tune import storage
from cnn_jax.tune.search import best_value, merit
from cnn_jax.tune.space import configured, describe, short
from cnn_jax.tune.study import Plan, counts, trial_folder

# Rows of the table on stdout.
_MOST_SHOWN = 10
_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
}


def conclude(plan: Plan, study: Study) -> dict[str, Any]:
    """Summarizes a study and writes that, of several workers one after the other.

    Returns:
      What `summarize` gives.

    Raises:
      StorageError: The storage does not answer.
    """
    lock = plan.folder / "locks" / "outcome"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        summary = storage.patiently(
            lambda: summarize(plan, study), plan.storage_timeout, "No finished trial is lost"
        )
        write_outcome(plan, summary)
    return summary


def summarize(plan: Plan, study: Study) -> dict[str, Any]:
    """All that there is to say of a study, as JSON; see `report.study`."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if counts(trial)]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = best_trial(plan, study)
    importance, note = _importance(study, complete)
    states = [_STATES[trial.state] for trial in trials]
    epochs = sum(len(trial.intermediate_values) for trial in trials)
    max_epochs = plan.config.train.epochs
    return {
        "name": plan.name,
        "monitor": plan.monitor,
        "direction": study.direction.name.lower(),
        "max_epochs": max_epochs,
        "trials_wanted": plan.trials,
        "data": {
            "source": plan.config.data.source,
            "fingerprint": study.user_attrs["definition"]["data"],
        },
        "versions": {
            "cnn_jax": cnn_jax.__version__,
            "jax": jax.__version__,
            "optuna": optuna.__version__,
        },
        "config_file": plan.config_file,
        "space": {key: describe(distribution) for key, distribution in plan.space.items()},
        "trials": [_describe_trial(plan, trial) for trial in trials],
        "best": best.number if best else None,
        "best_config": "best.py",
        "importance": importance,
        "importance_note": note,
        "cost": {
            **{state: states.count(state) for state in dict.fromkeys(_STATES.values())},
            "epochs": epochs,
            "epochs_without_pruning": epochs
            + sum(
                max_epochs - len(trial.intermediate_values)
                for trial in trials
                if trial.state == TrialState.PRUNED
            ),
            "seconds": sum(trial.user_attrs.get("seconds", 0.0) for trial in trials),
            "started": _iso(min(filter(None, (t.datetime_start for t in trials)), default=None)),
            "ended": _iso(max(filter(None, (t.datetime_complete for t in trials)), default=None)),
        },
    }


def best_trial(plan: Plan, study: Study) -> FrozenTrial | None:
    """Of the trials that came to their end, the best; of equal ones, the first."""
    complete = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if counts(trial) and trial.value is not None
    ]
    return max(complete, key=lambda trial: merit(trial.value or 0.0, plan.direction), default=None)


def _describe_trial(plan: Plan, trial: FrozenTrial) -> dict[str, Any]:
    curve = dict(sorted(trial.intermediate_values.items()))
    return {
        "number": trial.number,
        "state": _STATES[trial.state],
        "value": best_value(curve, plan.direction),
        "epochs": len(curve),
        "seconds": trial.user_attrs.get("seconds", 0.0),
        "params": {key: trial.params[key] for key in plan.space if key in trial.params},
        "curve": list(curve.values()),
        "error": trial.user_attrs.get("error", ""),
        "host": trial.user_attrs.get("host", ""),
        "folder": str(trial_folder(pathlib.Path(), trial.number)),
    }


def _iso(time: datetime.datetime | None) -> str | None:
    return time.isoformat(timespec="seconds") if time else None


def _importance(study: Study, complete: list[FrozenTrial]) -> tuple[dict[str, float] | None, str]:
    """What each parameter by itself explains of the value's variance, by functional ANOVA.

    In shares of what all of them explain by themselves.
    (Hutter et al. 2014, "An Efficient Approach for Assessing Hyperparameter Importance".)
    Or None, and why.
    """
    values = {trial.value for trial in complete}
    if len(complete) < 4 or len(values) < 2:
        return None, "Too few trials came to their end, or all of them to the same value."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of scikit-learn's forests, on few trials.
        try:
            shares = optuna.importance.get_param_importances(
                study, evaluator=FanovaImportanceEvaluator(seed=0)
            )
        except (ImportError, RuntimeError, ValueError) as error:
            return None, f"They could not be computed: {error}"
    if not all(map(math.isfinite, shares.values())):
        return None, "They could not be computed from so few trials."
    return dict(shares), ""


def write_outcome(plan: Plan, study: Mapping[str, Any]) -> None:
    """Writes study.json, trials.csv, the page and, if there is a best trial, its configuration.

    Args:
      plan: The study.
      study: What `summarize` gives.
    """
    write_text(plan.folder / "study.json", json.dumps(study, indent=1, ensure_ascii=False) + "\n")
    write_text(plan.folder / "trials.csv", table(study))
    path = plan.folder / study["best_config"]
    if study["best"] is None:
        path.unlink(missing_ok=True)
    else:
        write_text(path, best_config_text(plan, study, path))
    write_study_page(study, plan.folder)


def table(study: Mapping[str, Any]) -> str:
    """All trials as CSV: number, state, value, epochs, seconds, parameters, host, error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = list(study["space"])
    own = ("number", "state", "value", "epochs", "seconds")
    writer.writerow([*own, *keys, "host", "error"])
    for trial in study["trials"]:
        params = [trial["params"].get(key, "") for key in keys]
        writer.writerow([*(trial[name] for name in own), *params, trial["host"], trial["error"]])
    return text.getvalue()


def show_outcome(study: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Prints the best trials as a table, the cost, and how to go on, on stdout."""
    keys = list(study["space"])
    rows = [["trial", "state", study["monitor"], "epochs", "seconds", *map(_last, keys)]]
    order = sorted(
        study["trials"],
        key=lambda trial: (
            trial["state"] != "complete",
            trial["value"] is None,
            (trial["value"] or 0) * (-1 if study["direction"] == "maximize" else 1),
        ),
    )
    for trial in order[:_MOST_SHOWN]:
        value = "" if trial["value"] is None else f"{trial['value']:.4f}"
        params = [short(trial["params"].get(key, "")) for key in keys]
        seconds = f"{trial['seconds']:.0f}"
        rows.append(
            [str(trial["number"]), trial["state"], value, str(trial["epochs"]), seconds, *params]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))

    if len(order) > _MOST_SHOWN:
        print(f"all {len(order)} trials are in {folder / 'trials.csv'}")

    cost = study["cost"]
    print(
        f"\ncost        {cost['complete']} complete, {cost['pruned']} pruned, {cost['failed']} "
        f"failed, {cost['running']} running; {cost['epochs']:,} epochs, of "
        f"{cost['epochs_without_pruning']:,} without pruning; training took "
        f"{duration(cost['seconds'])}"
    )
    print(f"page        {folder / 'index.html'}")
    if study["best"] is None:
        return
    best = next(trial for trial in study["trials"] if trial["number"] == study["best"])
    config = shlex.quote(str(folder / study["best_config"]))
    run = folder / best["folder"]
    print(f"best        trial {best['number']}: {study['monitor']} {best['value']:.4f}")
    print(f"train       cnn_jax train --config={config} --workdir=runs/{study['name']}")
    if (run / "config.json").exists():
        workdir = shlex.quote(str(run))
        print(f"or measure  cnn_jax train --config={config} --workdir={workdir}")
    else:
        where = f"in {best['folder']} of the study's folder there"
        print(f"            its own run is on {best['host']}, {where}")


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def best_config_text(plan: Plan, study: Mapping[str, Any], path: pathlib.Path) -> str:
    """The best trial's configuration as a file that runs as it is.

    Args:
      plan: The study.
      study: What `summarize` gives; it has a best trial.
      path: Where the file will be.
    """
    best = next(trial for trial in study["trials"] if trial["number"] == study["best"])
    config = configured(plan.config, best["params"])
    with config.ignore_type():
        # To run anywhere.
        config.data.source = absolute(config.data.source)
        if path_of_weights := config.checkpoint.init_from:
            path_of_weights = pathlib.Path(path_of_weights).expanduser().resolve()
            config.checkpoint.init_from = str(path_of_weights)
    epochs = count(best["epochs"], "epoch")
    quoted = shlex.quote(str(path)).replace("\\", "\\\\").replace('"', '\\"')
    return f'''"""The best of {count(len(study["trials"]), "trial")} of the study {plan.name}.

    cnn_jax train --config={quoted} --workdir=runs/{plan.name}

Number {best["number"]}, with {plan.monitor} {best["value"]:.4f} after {epochs}.
The test split was not looked at.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {_literal(config, set(best["params"]), "", " " * 8)}
    )
'''


def _literal(config: Config, tuned: set[str], prefix: str, indent: str) -> str:
    """A configuration as a dictionary in Python, a key a line, with a word at what was tuned."""
    lines = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            text = _literal(value, tuned, f"{prefix}{key}.", indent + "    ") + ","
        else:
            text = f"{_python(value)},{'  # Tuned.' * (prefix + key in tuned)}"
        lines.append(f'{indent}    "{key}": {text}\n')
    return f"{{\n{''.join(lines)}{indent}}}"


def _python(value: Any) -> str:
    """A value as Python has it, with double quotes."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_python, value))}{',' * (len(value) == 1)})"
    # JSON's escapes of other characters than these are not Python's.
    is_plain = isinstance(value, str) and value.isascii() and value.isprintable()
    return json.dumps(value) if is_plain else repr(value)
