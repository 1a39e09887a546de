"""Retrains a served network on the labelled images of its request log: one pass.

    cnn_jax retrain --registry=DIR --model=NAME --source=SOURCE --log=LOG [LOG ...] --state=DIR
        [--when=harm,labels] [--min_new=200] [--margin=0.01] [--keep=3] [--json]
        [--config=FILE] [--config.KEY=VALUE ...]

A pass first compares a version that an earlier pass has promoted with the version before, by the
labels since the promotion, and rolls it back if it is worse. Otherwise, if there is a reason
(--when), it trains a network on SOURCE and the labelled images of LOG, starting with the weights of
the champion, adds it to the registry, and promotes it if tests on the test split allow it. The same
data and configuration are tried only once. Call the command again and again, for example from cron:
an interrupted pass is continued by the next one. The command exits with 3 if a network was refused
or rolled back.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Sequence

from cnn_jax.config.files import ConfigParser, find
from cnn_jax.config.schema import LOG_MARK
from cnn_jax.monitor.flags import add_measure_flags
from cnn_jax.registry import ledger
from cnn_jax.registry.flags import add_registry_flag, margin, required_registry
from cnn_jax.registry.registry import Registry
from cnn_jax.system import cli
from cnn_jax.system.errors import ConfigError, did_you_mean

TRIGGERS = ("harm", "labels", "always")
_MIN_NEW = 200
_KEEP = 3
# The exit code if a network was refused or rolled back.
_NEGATIVE = 3


def _triggers(text: str) -> list[str]:
    """Parses the value of --when; an argparse type."""
    names = text.split(",")
    for name in names:
        if name not in TRIGGERS:
            raise argparse.ArgumentTypeError(
                f"there is no {name!r}{did_you_mean(name, TRIGGERS)}; there are "
                f"{', '.join(TRIGGERS)}"
            )
    return names


def main(argv: Sequence[str]) -> None:
    parser = ConfigParser(
        prog="cnn_jax retrain",
        description="Make one pass: watch the promoted version, or train and judge a new one.",
    )
    add_registry_flag(parser)
    parser.add_argument(
        "--model",
        required=True,
        type=functools.partial(ledger.check_name, "model"),
        metavar="NAME",
        help="the model whose champion is retrained",
    )
    parser.add_argument(
        "--source",
        required=True,
        metavar="SOURCE",
        help="the data with which the first champion was trained",
    )
    cli.add_log_flag(parser, required=True)
    parser.add_argument(
        "--state",
        required=True,
        type=cli.path,
        metavar="DIR",
        help="a folder of its own for the attempts of this model",
    )
    parser.add_argument(
        "--when",
        type=_triggers,
        default=["harm", "labels"],
        metavar="WORD,...",
        help="reasons for an attempt; harm: the monitor reports harm; labels: there are --min_new "
        "new labelled images; always (harm,labels)",
    )
    parser.add_argument(
        "--min_new",
        type=cli.positive,
        default=_MIN_NEW,
        metavar="N",
        help="number of new labelled images: usable for training, and not in the last attempt or "
        f"with another label there ({_MIN_NEW})",
    )
    parser.add_argument(
        "--margin",
        type=margin,
        default=0.01,
        metavar="FRACTION",
        help="the difference in accuracy that a promotion accepts (0.01)",
    )
    parser.add_argument(
        "--keep",
        type=cli.positive,
        default=_KEEP,
        metavar="N",
        help=f"number of ended attempts whose images and networks stay in --state ({_KEEP})",
    )
    add_measure_flags(parser.add_argument_group("the monitor, for --when=harm"))
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    flags, overrides = parser.parse_with_overrides(argv)
    if LOG_MARK in flags.source:
        raise ConfigError(f"--source: name the data without {LOG_MARK}; --log names the logs")
    find(flags.config)
    url = required_registry(flags)
    with cli.blocked_interrupts():
        # JAX takes seconds to import, so it is imported after the flags have been checked.
        from cnn_jax.data.sources import absolute
        from cnn_jax.retrain.attempts import PROMOTED, BusyError
        from cnn_jax.retrain.passes import NOTHING, Settings, run_pass
        from cnn_jax.system.compilation_cache import keep_compiled
        from cnn_jax.system.console import Console
        from cnn_jax.system.runtime import keep_freed_memory

    keep_freed_memory()
    keep_compiled()
    settings = Settings(
        model=flags.model,
        source=absolute(flags.source),
        logs=flags.log,
        triggers=flags.when,
        min_new=flags.min_new,
        margin=flags.margin,
        keep=flags.keep,
        drift=(flags.window, flags.last, flags.level, flags.max_drop),
        recipe=flags.config,
        overrides=overrides,
    )
    try:
        outcome = run_pass(Registry(url), pathlib.Path(flags.state), settings, Console())
    except BusyError as error:
        print(f"nothing to do: {error}", file=sys.stderr)
        return
    if flags.json:
        values = {"action": outcome.action, "text": outcome.text, "attempt": outcome.attempt}
        print(json.dumps(values, indent=1, ensure_ascii=True, allow_nan=False))
    else:
        print(cli.fit(outcome.text, sys.stdout))
    if outcome.action not in (NOTHING, PROMOTED):
        sys.exit(_NEGATIVE)


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
