"""Trains, measures and bundles a classifier."""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from cnn_jax import cli
from cnn_jax.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cnn_jax.main", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--config", type=cli.path, default="configs/default.py", metavar="FILE")
    parser.add_argument("--workdir", type=cli.path, required=True, help="the run's folder")
    parser.add_argument("--profile", action="store_true", help="record a trace of a few steps")
    several = parser.add_argument_group(
        "several processes", "Found by itself on Slurm, Open MPI, Kubernetes and Cloud TPU."
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--process_id", type=cli.natural, metavar="N", help="this one, from 0")
    several.add_argument("--process_count", type=cli.natural, metavar="N", help="how many")
    parser.epilog = "--config.KEY=VALUE changes any key of the configuration."
    known, overrides = parser.parse_known_args(argv)
    with cli.interrupts_held_back():
        # Imported late, so that a wrong flag is told at once.
        from cnn_jax.compiled import keep_compiled
        from cnn_jax.runtime import keep_freed_memory
        from cnn_jax.sharding import start_processes
        from cnn_jax.train import train_and_evaluate

    config = load_config(known.config, overrides)
    keep_freed_memory()
    start_processes(known.coordinator, known.process_id, known.process_count)
    keep_compiled()
    train_and_evaluate(config, known.workdir, profile=known.profile)
    with cli.interrupts_held_back():
        # Imported later still: charts take half a second that training need not wait for.
        from cnn_jax.report.run_report import report_after_training
    report_after_training(known.workdir, config)


def load_config(file: str, overrides: Sequence[str]) -> ConfigDict:
    """The configuration of a file, with `--config.KEY=VALUE` overrides.

    Raises:
      ConfigError: There is no such file, it fails, or an override is no key's.
    """
    from cnn_jax import configuration

    if not pathlib.Path(file).is_file():
        raise ConfigError(f"--config: there is no file {file!r}")
    for argument in overrides:
        if not argument.startswith("--config."):
            raise ConfigError(f"unexpected argument {argument!r}; see --help")
        configuration.check_key(argument.removeprefix("--config.").partition("=")[0])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    try:
        values([sys.argv[0], f"--config={file}", *overrides])
    except flags.IllegalFlagValueError as error:
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?):", str(error))
        raise configuration.wrong_value(*wrong.groups()) if wrong else error from error
    except Exception as error:  # A configuration is a program, and may fail in any way.
        raise ConfigError(f"--config: {file}: {type(error).__name__}: {error}") from error
    return values.config


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
