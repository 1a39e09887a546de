"""Compares two versions of a model by logged images with labels.

    cnn_jax compare MODEL CHALLENGER CHAMPION --registry=DIR --log=LOG [LOG ...]
        [--since=TIME] [--json] [--page=FILE]

Both versions predict the same images, which no user notices. CHALLENGER and CHAMPION are versions
or aliases. The servers must record the images (`cnn_jax serve --request_log_images`), and the
labels must arrive with POST /feedback. The command may be repeated after every label: the
probability of a wrong decision stays at most 5 %.
"""

import argparse
import datetime
import functools
from collections.abc import Sequence

from cnn_jax.experiment.__main__ import add_result_flags, write_result
from cnn_jax.registry import ledger
from cnn_jax.registry.flags import add_registry_flag, required_registry
from cnn_jax.registry.registry import Registry
from cnn_jax.system import cli


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax compare",
        description="Compare two versions of a model by logged images with labels.",
    )
    parser.add_argument(
        "model", type=functools.partial(ledger.check_name, "model"), metavar="MODEL"
    )
    for name in ("challenger", "champion"):
        parser.add_argument(name, type=ledger.parse_version_or_alias, metavar=name.upper())
    add_registry_flag(parser)
    add_result_flags(parser)
    parser.add_argument(
        "--since",
        type=_time,
        metavar="TIME",
        help="use later images only, such as 2026-01-31T12:00 in UTC; by default images since the "
        "newer version was added to the registry, because a version may have been trained on "
        "older images",
    )
    flags = parser.parse_args(argv)
    registry = Registry(required_registry(flags))
    challenger = registry.resolve(flags.model, flags.challenger)
    champion = registry.resolve(flags.model, flags.champion)
    with cli.blocked_interrupts():  # Importing JAX takes seconds.
        from cnn_jax.experiment.replay import replay
        from cnn_jax.system.compilation_cache import keep_compiled
        from cnn_jax.system.console import Console
        from cnn_jax.system.runtime import keep_freed_memory

    keep_freed_memory()
    keep_compiled()
    track = Console().track
    write_result(replay(registry, challenger, champion, flags.log, flags.since, track), flags)


def _time(text: str) -> float:
    """An argparse type that converts a time in ISO 8601 to seconds since the epoch."""
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a time such as 2026-01-31T12:00, got {text!r}"
        ) from None
    return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()


if __name__ == "__main__":
    cli.run(main)
