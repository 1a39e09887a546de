"""A study: many trainings, each with other hyper-parameters, and the best of them as a file.

    cnn_jax tune --config=folder --config.data.source=folder:PATH \
        --study=NAME [--space=FILE] [--trials=50] [--time_budget=8h]

The same command goes on with a study that was stopped or killed, and may be given any number
of times at once: with --storage=URL on other machines too.
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

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_STUDIES = pathlib.Path("studies")


def main(argv: Sequence[str]) -> None:
    known, overrides = files.parse(_parser(), argv)
    files.find(known.config)
    space = files.find(known.space, "--space", "spaces")
    start = time.monotonic()
    with cli.blocked_interrupts():
        # Imported late, so that a wrong flag is reported at once.
        try:
            import optuna  # noqa: F401
            import sqlalchemy  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{error.name} is not installed: pip install 'cnn_jax[tune]' brings it"
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
        # Imported later still: what it needs takes seconds that the trials need not wait for.
        from cnn_jax.tune.outcome import conclude, show_outcome
    outcome = conclude(plan, study)
    show_outcome(outcome, plan.folder)
    if outcome["best"] is None:
        raise _nothing_to_show(outcome, plan.is_over())


def _nothing_to_show(study: Mapping[str, Any], is_over: bool) -> BaseException:
    """Why a study has no best trial."""
    if is_over:
        return Interrupted("time was up before a trial came to its end; the same command goes on")
    reasons = [f"; trial {t['number']}: {t['error']}" for t in study["trials"] if t["error"]]
    yet = " yet" * (study["cost"]["running"] > 0)
    return UserError(f"no trial has come to its end{yet}{''.join(reasons)}")


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="cnn_jax tune",
        description="Search for the hyper-parameters that are best on the validation split.",
    )
    parser.add_argument(
        "--config",
        type=files.file_name,
        default="default",
        metavar="FILE",
        help="a configuration file, RUN/config.json, or a shipped configuration (default)",
    )
    parser.add_argument("--study", type=_name, required=True, metavar="NAME")
    parser.add_argument(
        "--space",
        type=files.file_name,
        default="default",
        metavar="FILE",
        help="which keys, and how far: a file or a shipped space (default)",
    )
    parser.add_argument("--workdir", type=cli.path, help="the study's folder (studies/NAME)")
    parser.add_argument(
        "--storage",
        type=_storage,
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


def _storage(text: str) -> str:
    """The argparse type of a storage's URL: not empty, as a variable that is not set would be."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
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


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
