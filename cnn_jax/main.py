"""Trains, measures and bundles a classifier.

    python -m cnn_jax.main --config=configs/default.py --workdir=RUN [--config.key=value ...]

Any key of the configuration can be changed on the command line.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from cnn_jax import cli, configuration
from cnn_jax.configuration import Config
from cnn_jax.errors import ConfigError
from cnn_jax.train import train_and_evaluate


def main(argv: Sequence[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    config, workdir = parse(argv)
    train_and_evaluate(config, workdir)


def parse(argv: Sequence[str]) -> tuple[Config, str]:
    """The configuration and the run's folder that a command line names.

    Raises:
      ConfigError: A flag or key is unknown, missing or malformed.
    """
    if not any(argument.lstrip("-").startswith("config=") for argument in argv):
        argv = ["--config=configs/default.py", *argv]
    for argument in argv:
        name, _, value = argument.lstrip("-").partition("=")
        if name.startswith("config."):
            configuration.check_key(name.removeprefix("config."))
        elif name == "config" and not pathlib.Path(value).is_file():
            raise ConfigError(f"--config: there is no file {value!r}")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        positional = values([sys.argv[0], *argv])[1:]
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # A configuration is a program, and may fail in any way.
        raise ConfigError(f"--config: {type(error).__name__}: {error}") from error
    if positional:
        raise ConfigError(f"unexpected argument {positional[0]!r}; see --help")
    if values.workdir is None:
        raise ConfigError("--workdir: is missing; name a folder for the run")
    return values.config, values.workdir


if __name__ == "__main__":
    cli.run(main)
