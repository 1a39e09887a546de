"""Trains, measures and bundles a classifier."""

import argparse
from collections.abc import Sequence

from cnn_jax import cli


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
        from cnn_jax import configuration
        from cnn_jax.compiled import keep_compiled
        from cnn_jax.loop import train_and_evaluate
        from cnn_jax.runtime import keep_freed_memory
        from cnn_jax.sharding import start_processes

    config = configuration.load(known.config, overrides)
    keep_freed_memory()
    start_processes(known.coordinator, known.process_id, known.process_count)
    keep_compiled()
    train_and_evaluate(config, known.workdir, profile=known.profile)
    with cli.interrupts_held_back():
        # Imported later still: charts take half a second that training need not wait for.
        from cnn_jax.report.run_report import report_after_training
    report_after_training(known.workdir, config)


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
