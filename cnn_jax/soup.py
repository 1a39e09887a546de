"""Averages the weights of several short continuations of a run (a "model soup").

    cnn_jax soup --run=RUN --workdir=DIR [--members=3] [--epochs=4] [--config.KEY=VALUE ...]

Each continuation starts from the weights of RUN. It trains with the configuration and the splits of
RUN, but with other random numbers. DIR/bundle has the average of their weights if the average is
better on the validation split than RUN, else the weights of RUN.
"""

import pathlib
from collections.abc import Sequence

from cnn_jax.config import files
from cnn_jax.system import cli
from cnn_jax.system.errors import ConfigError

_MEMBERS, _EPOCHS = 3, 4


def main(argv: Sequence[str]) -> None:
    parser = files.ConfigParser(
        prog="cnn_jax soup", description="Average the weights of short continuations of a run."
    )
    parser.add_argument(
        "--run", required=True, type=cli.path, metavar="RUN", help="folder of a finished run"
    )
    parser.add_argument(
        "--workdir", required=True, type=cli.path, metavar="DIR", help="folder of the result"
    )
    parser.add_argument(
        "--members", type=cli.positive, default=_MEMBERS, metavar="N", help="continuations (3)"
    )
    parser.add_argument(
        "--epochs", type=cli.positive, default=_EPOCHS, metavar="N", help="epochs of each (4)"
    )
    parser.set_defaults(config=None)
    flags, overrides = parser.parse_with_overrides(argv)
    if flags.config is not None:
        raise ConfigError("--config: cannot be set, because soup uses the configuration of the run")
    if flags.members < 2:
        raise ConfigError("--members: must be 2 or more, got 1")
    with cli.blocked_interrupts():
        # JAX takes seconds to import, so it is imported after the flags have been checked.
        from cnn_jax.system.compilation_cache import keep_compiled
        from cnn_jax.system.runtime import keep_freed_memory
        from cnn_jax.training.soup import describe, make_soup

    keep_freed_memory()
    keep_compiled()
    run, workdir = pathlib.Path(flags.run), pathlib.Path(flags.workdir)
    print(describe(make_soup(run, workdir, flags.members, flags.epochs, overrides)))


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
