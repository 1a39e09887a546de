"""The result of a study: metrics, a table, and the best configuration as a file."""

import csv
import datetime
import fcntl
import io
import json
import math
import pathlib
import shlex
import sys
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
from cnn_jax.models import hub
from cnn_jax.report.study import write_study_page
from cnn_jax.report.texts import duration
from cnn_jax.system import text
from cnn_jax.system.atomic import write_text
from cnn_jax.tune import storage
from cnn_jax.tune.search import best_value, merit
from cnn_jax.tune.space import configured, describe, short
from cnn_jax.tune.study import Plan, counts, trial_folder

# The largest number of rows of the table on stdout.
_MAX_ROWS = 10
_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
}


def conclude(plan: Plan, study: Study) -> dict[str, Any]:
    """Summarizes a study and writes the result files; a lock admits one worker at a time.

    Args:
      plan: The study.
      study: The study in its storage.

    Returns:
      The result of `summarize`.

    Raises:
      StorageError: The storage does not answer.
    """
    lock = plan.folder / "locks" / "outcome"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        summary = storage.call_with_retries(
            lambda: summarize(plan, study), plan.storage_timeout, "No finished trial is lost"
        )
        write_outcome(plan, summary)
    return summary


def summarize(plan: Plan, study: Study) -> dict[str, Any]:
    """Returns all results of a study as JSON values; `report.study` documents the keys."""
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
    """Returns the earliest of the best completed trials; None if no trial is complete."""
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
    """Estimates the importance of each parameter by functional ANOVA.

    The importance is the fraction of the variance that only this parameter explains,
    divided by the sum of these fractions (Hutter et al. 2014, "An Efficient Approach for
    Assessing Hyperparameter Importance").

    Returns:
      The importance by parameter, and ""; or None, and the reason why there is no importance.
    """
    values = {trial.value for trial in complete}
    if len(complete) < 4 or len(values) < 2:
        return None, "Too few trials completed, or all of them have the same value."
    with warnings.catch_warnings():
        # scikit-learn warns about random forests that are fitted to few trials.
        warnings.simplefilter("ignore")
        try:
            importance = optuna.importance.get_param_importances(
                study, evaluator=FanovaImportanceEvaluator(seed=0)
            )
        except (ImportError, RuntimeError, ValueError) as error:
            return None, f"They could not be computed: {error}"
    if not all(map(math.isfinite, importance.values())):
        return None, "They could not be computed from so few trials."
    return dict(importance), ""


def write_outcome(plan: Plan, study: Mapping[str, Any]) -> None:
    """Writes study.json, trials.csv, the HTML page, and the configuration of the best trial.

    If there is no best trial, an old configuration file is removed.

    Args:
      plan: The study.
      study: The result of `summarize`.
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
    """Returns all trials as CSV: number, state, value, epochs, seconds, parameters, host, error."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    keys = list(study["space"])
    own = ("number", "state", "value", "epochs", "seconds")
    writer.writerow([*own, *keys, "host", "error"])
    for trial in study["trials"]:
        params = [trial["params"].get(key, "") for key in keys]
        writer.writerow([*(trial[name] for name in own), *params, trial["host"], trial["error"]])
    return file.getvalue()


def show_outcome(study: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Prints the best trials as a table, the cost, and the next commands, on stdout."""
    keys = list(study["space"])
    head = ["trial", "state", study["monitor"], "epochs", "seconds", *map(_last, keys)]
    rows = []
    order = sorted(
        study["trials"],
        key=lambda trial: (
            trial["state"] != "complete",
            trial["value"] is None,
            (trial["value"] or 0) * (-1 if study["direction"] == "maximize" else 1),
        ),
    )
    for trial in order[:_MAX_ROWS]:
        value = "" if trial["value"] is None else f"{trial['value']:.4f}"
        params = [short(trial["params"].get(key, "")) for key in keys]
        seconds = f"{trial['seconds']:.0f}"
        rows.append(
            [str(trial["number"]), trial["state"], value, str(trial["epochs"]), seconds, *params]
        )
    print(text.table(head, rows, text.terminal_width(sys.stdout)))
    if len(order) > _MAX_ROWS:
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
        where = f"in {best['folder']} of the study's folder on that host"
        print(f"            the run of this trial is on {best['host']}, {where}")


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def best_config_text(plan: Plan, study: Mapping[str, Any], path: pathlib.Path) -> str:
    """Returns the configuration of the best trial as the text of a configuration file.

    Args:
      plan: The study.
      study: The result of `summarize`; it has a best trial.
      path: The path of the file.
    """
    best = next(trial for trial in study["trials"] if trial["number"] == study["best"])
    config = configured(plan.config, best["params"])
    with config.ignore_type():
        # With absolute paths, the configuration file works in any directory.
        config.data.source = absolute(config.data.source)
        if path_of_weights := config.checkpoint.init_from:
            path_of_weights = pathlib.Path(path_of_weights).expanduser().resolve()
            config.checkpoint.init_from = str(path_of_weights)
        if name_of_weights := config.model.get("pretrained"):
            config.model.pretrained = hub.absolute(name_of_weights)
    epochs = count(best["epochs"], "epoch")
    quoted = shlex.quote(str(path)).replace("\\", "\\\\").replace('"', '\\"')
    return f'''"""The best of {count(len(study["trials"]), "trial")} of the study {plan.name}.

    cnn_jax train --config={quoted} --workdir=runs/{plan.name}

Number {best["number"]}, with {plan.monitor} {best["value"]:.4f} after {epochs}.
The test split was not used.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {_literal(config, set(best["params"]), "", " " * 8)}
    )
'''


def _literal(config: Config, tuned: set[str], prefix: str, indent: str) -> str:
    """Formats a configuration as a Python dictionary, with a comment after each tuned key."""
    lines = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            literal = _literal(value, tuned, f"{prefix}{key}.", indent + "    ") + ","
        else:
            literal = f"{_python(value)},{'  # Tuned.' * (prefix + key in tuned)}"
        lines.append(f'{indent}    "{key}": {literal}\n')
    return f"{{\n{''.join(lines)}{indent}}}"


def _python(value: Any) -> str:
    """Formats a value as a Python literal, with double quotes around ASCII strings."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_python, value))}{',' * (len(value) == 1)})"
    # JSON and Python write printable ASCII characters in the same way, but not other characters.
    is_plain = isinstance(value, str) and value.isascii() and value.isprintable()
    return json.dumps(value) if is_plain else repr(value)
