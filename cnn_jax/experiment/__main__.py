"""Splits the live requests for a model between two versions, and decides which version is better.

    cnn_jax experiment start MODEL NAME --challenger=V --registry=DIR [--fraction=0.5] [--shadow]
        [--outcome=reward] [--window=1d] [--alias=champion]
    cnn_jax experiment show MODEL [NAME] --registry=DIR --log=LOG [LOG ...] [--json] [--page=FILE]
    cnn_jax experiment end MODEL --registry=DIR

`start` writes the experiment to the log of the registry, so that every server of the registry
splits the requests in the same way. A client sends the header X-Unit-Id; requests without it get
the version of the alias and do not count. With --shadow, the version of the alias answers all
requests, and the challenger only predicts the same images. `show` reads the request logs of the
servers. A running experiment cannot be changed; it ends with `end`, or if the alias moves.
"""

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

from cnn_jax.registry import ledger
from cnn_jax.registry.flags import add_registry_flag, required_registry
from cnn_jax.registry.ledger import CHAMPION, RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.registry.split import OUTCOMES, Experiment, Split, new_salt
from cnn_jax.system import cli

_fraction = cli.number("above 0 and below 1", lambda value: 0 < value < 1)
_model = functools.partial(ledger.check_name, "model")


def main(argv: Sequence[str]) -> None:
    flags = _parser().parse_args(argv)
    flags.command(Registry(required_registry(flags)), flags)


def add_result_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name the request logs and the form of the output."""
    cli.add_log_flag(parser, required=True)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--page", type=cli.path, metavar="FILE", help="HTML page to write")


def write_result(result: dict, flags: argparse.Namespace) -> None:
    """Prints a result, and writes the page that --page names."""
    from cnn_jax.experiment import texts

    if flags.page is not None:
        with cli.blocked_interrupts():  # Importing Matplotlib takes seconds.
            from cnn_jax.experiment.page import write_page
        write_page(result, pathlib.Path(flags.page))
    if flags.json:
        cli.write_json(result, sys.stdout)
    else:
        print(texts.describe(result, cli.columns()))


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="cnn_jax experiment",
        description="Compare two versions of a model by live requests.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=description, description=f"{description}.")
        added.set_defaults(command=run)
        added.add_argument("model", type=_model, metavar="MODEL")
        add_registry_flag(added)
        return added

    start = command("start", _start, "split the requests of an alias between two versions")
    start.add_argument("name", metavar="NAME", help="a name that no other experiment has")
    start.add_argument(
        "--challenger",
        required=True,
        type=ledger.parse_version_or_alias,
        metavar="V",
        help="the number of the other version, or one of its aliases",
    )
    start.add_argument("--alias", default=CHAMPION, help=f"the alias to split ({CHAMPION})")
    start.add_argument(
        "--fraction",
        type=_fraction,
        default=0.5,
        help="fraction of the units that the challenger answers (0.5)",
    )
    start.add_argument(
        "--shadow", action="store_true", help="compute the challenger's answers and drop them"
    )
    start.add_argument(
        "--outcome",
        choices=OUTCOMES,
        default=OUTCOMES[0],
        metavar="KIND",
        help="reward: mean reward of a unit's images, 0 without feedback; rating: the same, only "
        "of images with feedback; label: fraction of the labelled images that are correct (reward)",
    )
    start.add_argument(
        "--window",
        type=cli.duration,
        default=86400.0,
        metavar="TIME",
        help="time after a unit's first image in which images and feedback count, such as 1h (1d)",
    )
    start.add_argument("--note", default="", metavar="TEXT", help="a note for the log")
    show = command("show", _show, "print the arms, the decision and the checks")
    show.add_argument("name", nargs="?", metavar="NAME", help="the experiment (the latest)")
    add_result_flags(show)
    end = command("end", _end, "end the running experiment of a model")
    end.add_argument("--note", default="", metavar="TEXT", help="a note for the log")
    return parser


def _start(registry: Registry, flags: argparse.Namespace) -> None:
    outcome = "label" if flags.shadow else flags.outcome
    split = Split(flags.name, new_salt(), flags.fraction, outcome, flags.window, flags.shadow)
    started = registry.start_experiment(
        flags.model, flags.challenger, split, flags.alias, flags.note
    )
    verb = "also predicts the images of" if started.is_shadow else "answers"
    print(
        f"experiment {started.name} of {flags.model}@{started.alias}: version "
        f"{started.challenger} {verb} {started.fraction:.4g} of the units, and version "
        f"{started.champion} answers {'all' if started.is_shadow else 'the others'}"
    )


def _end(registry: Registry, flags: argparse.Namespace) -> None:
    ended = registry.end_experiment(flags.model, flags.note)
    print(f"experiment {ended.name} of {flags.model} has ended; {ended.alias} answers all requests")


def _show(registry: Registry, flags: argparse.Namespace) -> None:
    from cnn_jax.experiment.analysis import analyse
    from cnn_jax.experiment.observations import read_observations

    experiment = _find(registry, flags.model, flags.name)
    now = time.time()
    observations = read_observations(experiment, flags.log, now)
    write_result(analyse(experiment, observations, now), flags)


def _find(registry: Registry, model: str, name: str | None) -> Experiment:
    """Returns the experiment of a model with a given name, or the latest experiment."""
    experiments = ledger.find(registry.models, model).experiments
    if not experiments:
        raise RegistryError(
            f"{model} has had no experiment; to start one: cnn_jax experiment start"
        )
    if name is None:
        return list(experiments.values())[-1]
    if name not in experiments:
        known = ", ".join(experiments)
        raise RegistryError(f"{model} has no experiment {name}; known names: {known}")
    return experiments[name]


if __name__ == "__main__":
    cli.run(main)
