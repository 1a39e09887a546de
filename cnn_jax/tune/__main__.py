"""Searches for the best hyper-parameters in many runs, and writes a configuration file.

    cnn_jax tune --config=folder --config.data.source=folder:PATH \
        --study=NAME [--space=FILE] [--trials=50] [--time_budget=8h]

The same command continues a study that was stopped or killed. Several processes may run the
command at the same time; with --storage=URL, the processes may run on several machines.
"""

import argparse
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cnn_jax.config import files
from cnn_jax.system import cli
from cnn_jax.system.errors import ConfigError, Interrupted, UserError
from cnn_jax.tune import PRUNERS

_STUDIES = pathlib.Path("studies")


def main(argv: Sequence[str]) -> None:
    known, overrides = _parser().parse_with_overrides(argv)
    files.find(known.config)
    space = files.find(known.space, "--space", "spaces")
    start = time.monotonic()
    with cli.blocked_interrupts():
        # Importing JAX takes seconds, so the flags are checked before this import.
        try:
            import optuna  # noqa: F401
            import sqlalchemy  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{error.name} is not installed: install it with: pip install 'cnn_jax[tune]'"
            ) from error
        from cnn_jax.system.compilation_cache import keep_compiled
        from cnn_jax.system.runtime import keep_freed_memory
        from cnn_jax.tune.space import load_space
        from cnn_jax.tune.study import Plan, run_study

    config = files.load(known.config, overrides)
    plan = Plan(
        name=known.study,
        config=config,
        space=load_space(str(space), config),
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
    with cli.blocked_interrupts():
        # Importing this module takes seconds, so the module is imported only after the trials.
        from cnn_jax.tune.outcome import conclude, show_outcome
    outcome = conclude(plan, study)
    show_outcome(outcome, plan.folder)
    if outcome["best"] is None:
        raise _no_best_trial(outcome, plan.is_over())


def _no_best_trial(study: Mapping[str, Any], is_over: bool) -> BaseException:
    """Returns the error for a study in which no trial has finished."""
    if is_over:
        return Interrupted("the time is over and no trial has finished; the same command continues")
    reasons = [f"; trial {t['number']}: {t['error']}" for t in study["trials"] if t["error"]]
    yet = " yet" * (study["cost"]["running"] > 0)
    return UserError(f"no trial has finished{yet}{''.join(reasons)}")


def _parser() -> files.ConfigParser:
    parser = files.ConfigParser(
        prog="cnn_jax tune",
        description="Search for the hyper-parameters that are best on the validation split.",
    )
    parser.add_argument("--study", type=_name, required=True, metavar="NAME")
    parser.add_argument(
        "--space",
        type=files.file_name,
        default="default",
        metavar="FILE",
        help="keys to vary, with ranges: a file or a shipped space (default)",
    )
    parser.add_argument("--workdir", type=cli.path, help="the study's folder (studies/NAME)")
    parser.add_argument(
        "--storage",
        type=_storage,
        metavar="URL",
        help="a database's URL, such as postgresql://USER@HOST/NAME, or journal:PATH "
        "(a SQLite file in the study's folder)",
    )
    parser.add_argument(
        "--trials", type=cli.positive, default=50, metavar="N", help="total number of trials (50)"
    )
    parser.add_argument("--pruner", choices=PRUNERS, default=PRUNERS[0])
    parser.add_argument(
        "--time_budget",
        type=cli.duration,
        metavar="TIME",
        help="such as 90m or 1h30m; the next start continues an unfinished trial",
    )
    parser.add_argument(
        "--storage_timeout",
        type=cli.duration,
        default=60.0,
        metavar="TIME",
        help="time for which a storage that does not answer is retried (60s)",
    )
    return parser


def _name(text: str) -> str:
    """An argparse type that checks the name of a study, which is also the name of a folder."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(
            f"must be letters, digits, _, - and . and begin with a letter, digit or _, got {text!r}"
        )
    return text


def _storage(text: str) -> str:
    """An argparse type that checks that the URL of a storage is not empty.

    A URL from an unset shell variable is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
