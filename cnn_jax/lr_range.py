"""Suggests a learning rate: a short training in which the learning rate grows exponentially.

    cnn_jax lr_range --config=folder --config.data.source=folder:PATH [--output=lr_range.png]

The command prints the suggestion, and draws the loss at each learning rate.
"""

import pathlib
from collections.abc import Sequence

from cnn_jax.config import files
from cnn_jax.system import cli
from cnn_jax.system.errors import ConfigError, file_errors

_LEAST_STEPS = 20


def main(argv: Sequence[str]) -> None:
    parser = files.ConfigParser(
        prog="cnn_jax lr_range",
        description="Suggest a learning rate after a short training in which it grows.",
    )
    rate = cli.number("above 0", lambda value: value > 0)
    parser.add_argument("--low", type=rate, default=1e-5, help="first learning rate (1e-5)")
    parser.add_argument("--high", type=rate, default=1.0, help="last learning rate (1)")
    parser.add_argument(
        "--steps", type=cli.positive, default=200, metavar="N", help="number of steps (200)"
    )
    parser.add_argument(
        "--output", type=cli.path, default="lr_range.png", metavar="FILE", help="PNG file"
    )
    flags, overrides = parser.parse_with_overrides(argv)
    if flags.high <= flags.low:
        raise ConfigError(f"--high: must be above --low={flags.low:g}, got {flags.high:g}")
    if flags.steps < _LEAST_STEPS:
        raise ConfigError(f"--steps: must be {_LEAST_STEPS} or more, got {flags.steps}")
    output = pathlib.Path(flags.output)
    if output.suffix != ".png" or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: must be a .png file in an existing folder, got {output}")
    files.find(flags.config)
    with cli.blocked_interrupts():
        # JAX takes seconds to import, so it is imported after the flags have been checked.
        from cnn_jax.system.compilation_cache import keep_compiled
        from cnn_jax.system.console import Console
        from cnn_jax.training import lr_range

    keep_compiled()
    config = files.load(flags.config, overrides)
    result = lr_range.measure(config, flags.steps, flags.low, flags.high, Console())
    with file_errors(output):
        lr_range.draw(result, output)
    print(result.describe())


if __name__ == "__main__":
    cli.run(main)
