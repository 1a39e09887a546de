"""A study: many trainings, each with other hyper-parameters, and the best of them as a file.

    python -m cnn_jax.tune --config=configs/folder.py --config.data.source=folder:PATH \
        --study=NAME --space=experiments/spaces/default.py [--trials=50] [--time_budget=8h]

The same command goes on with a study that was stopped or killed, and may be given any number
of times at once: with --storage=URL on other machines too.
"""

import argparse
import pathlib
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cnn_jax import cli
from cnn_jax.errors import ConfigError, UserError
from cnn_jax.tune import PRUNERS

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_STUDIES = pathlib.Path("studies")


def main(argv: Sequence[str]) -> None:
    known, overrides = _parser().parse_known_args(argv)
    start = time.monotonic()
    with cli.interrupts_held_back():
        # Imported late, so that a wrong flag is told at once.
        try:
            import optuna  # noqa: F401
            import sqlalchemy  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{error.name} is not installed: pip install 'cnn_jax[tune]' brings it"
            ) from error
        from cnn_jax import configuration
        from cnn_jax.compiled import keep_compiled
        from cnn_jax.runtime import keep_freed_memory
        from cnn_jax.tune.space import load_space
        from cnn_jax.tune.study import Plan, run_study

    config = configuration.load(known.config, overrides)
    plan = Plan(
        name=known.study,
        config=config,
        space=load_space(known.space, config),
        folder=pathlib.Path(known.workdir or _STUDIES / known.study),
        storage=known.storage or "",
        config_file=known.config,
        trials=known.trials,
        pruner=known.pruner,
        storage_timeout=known.storage_timeout,
        deadline=start + known.time_budget if known.time_budget else None,
    )
    keep_freed_memory()
    keep_compiled()
    study = run_study(plan)
    with cli.interrupts_held_back():
        # Imported later still: what it needs takes seconds that the trials need not wait for.
        from cnn_jax.tune.outcome import conclude
    show_outcome(conclude(plan, study), plan.folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cnn_jax.tune",
        description="Search for the hyper-parameters that are best on the validation split.",
        epilog="--config.KEY=VALUE changes any key of the configuration.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=cli.path, default="configs/default.py", metavar="FILE")
    parser.add_argument("--study", type=_name, required=True, metavar="NAME")
    parser.add_argument(
        "--space", type=cli.path, required=True, metavar="FILE", help="which keys, and how far"
    )
    parser.add_argument("--workdir", type=cli.path, help="the study's folder (studies/NAME)")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="a database's URL, such as postgresql://USER@HOST/NAME, or journal:PATH "
        "(a SQLite file in the study's folder)",
    )
    parser.add_argument("--trials", type=cli.positive, default=50, metavar="N", help="in all (50)")
    parser.add_argument("--pruner", choices=PRUNERS, default=PRUNERS[0])
    parser.add_argument(
        "--time_budget",
        type=_duration,
        metavar="TIME",
        help="such as 90m or 1h30m; what is unfinished then goes on at the next start",
    )
    parser.add_argument(
        "--storage_timeout",
        type=_duration,
        default=60.0,
        metavar="TIME",
        help="how long a storage that does not answer is tried again (60s)",
    )
    return parser


def _name(text: str) -> str:
    """The argparse type of a study's name, which is also a folder's."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(
            f"must be letters, digits, _, - and . and not begin with a sign, got {text!r}"
        )
    return text


def _duration(text: str) -> float:
    """The argparse type of a time such as 1h30m, in seconds; a number alone is seconds."""
    parts = re.fullmatch(r"(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s?)?", text)
    seconds = sum(
        int(part.rstrip("dhms")) * _UNITS.get(part[-1], 1)
        for part in (parts.groups() if parts else ())
        if part
    )
    if not seconds:
        raise argparse.ArgumentTypeError(f"must be a time such as 90m or 1h30m, got {text!r}")
    return float(seconds)


def show_outcome(study: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Prints the table of trials, the best one, and how to go on, on stdout.

    Raises:
      UserError: No trial came to its end.
    """
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
    for trial in order:
        value = "" if trial["value"] is None else f"{trial['value']:.4f}"
        params = [_short(trial["params"].get(key, "")) for key in keys]
        seconds = f"{trial['seconds']:.0f}"
        rows.append(
            [str(trial["number"]), trial["state"], value, str(trial["epochs"]), seconds, *params]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))

    cost = study["cost"]
    print(
        f"\ncost        {cost['complete']} complete, {cost['pruned']} pruned, {cost['failed']} "
        f"failed, {cost['running']} running; {cost['epochs']:,} epochs, of "
        f"{cost['epochs_without_pruning']:,} without pruning; {_time(cost['seconds'])} of training"
    )
    print(f"page        {folder / 'index.html'}")
    if study["best"] is None:
        reasons = [f"; trial {t['number']}: {t['error']}" for t in study["trials"] if t["error"]]
        later = ", yet; the same command goes on" * (cost["running"] > 0)
        raise UserError(f"no trial has come to its end{later}{''.join(reasons)}")
    best = next(trial for trial in study["trials"] if trial["number"] == study["best"])
    config = shlex.quote(str(folder / study["best_config"]))
    run = shlex.quote(str(folder / best["folder"]))
    print(f"best        trial {best['number']}: {study['monitor']} {best['value']:.4f}")
    print(f"train       python -m cnn_jax.main --config={config} --workdir=runs/{study['name']}")
    print(f"or measure  python -m cnn_jax.main --config={config} --workdir={run}")


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
