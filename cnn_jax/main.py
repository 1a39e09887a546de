"""Trains and evaluates a classifier, and writes its bundle and its report."""

import argparse
import functools
import logging
import pathlib
from collections.abc import Sequence

from cnn_jax.config import files
from cnn_jax.system import cli
from cnn_jax.system.errors import ConfigError, UserError, is_url

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    parser = files.ConfigParser(prog="cnn_jax train", description=__doc__)
    parser.add_argument(
        "--workdir",
        type=_folder,
        metavar="DIR",
        help="the run's folder; with --members, the folder of all members",
    )
    parser.add_argument(
        "--backup",
        metavar="URL",
        help="keep a copy of the run's folder at s3://BUCKET/PATH, gs://BUCKET/PATH, "
        "az://CONTAINER/PATH or in another folder; the same command on another machine restores it "
        "and continues the run",
    )
    parser.add_argument(
        "--mlflow",
        metavar="URI",
        help="MLflow server or database to which the finished run is logged (by default "
        "$MLFLOW_TRACKING_URI)",
    )
    parser.add_argument(
        "--members",
        type=cli.natural,
        metavar="K",
        help="train K networks (2 or more) that differ only in their seeds, all at the same time; "
        "each is a run in the sub-folder seed-SEED of --workdir. Saves time only on a GPU",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="record a trace of a few steps in the folder profile of --workdir",
    )
    several = parser.add_argument_group(
        "several processes", "Detected automatically on Slurm, Open MPI, Kubernetes and Cloud TPU."
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument(
        "--process_id", type=cli.natural, metavar="N", help="number of this process, from 0"
    )
    several.add_argument(
        "--process_count", type=cli.natural, metavar="N", help="number of processes"
    )
    flags, overrides = parser.parse_with_overrides(argv)
    if flags.workdir is None:
        raise ConfigError(
            "--workdir is missing: name a folder for the run, such as --workdir=runs/first; the "
            "same command with the same folder continues an interrupted run"
        )
    if flags.members is not None:
        if flags.members < 2:
            raise ConfigError(f"--members: must be 2 or more, got {flags.members}")
        if flags.profile or flags.backup is not None:
            other = "--profile" if flags.profile else "--backup"
            raise ConfigError(f"--members: cannot be used with {other}")
    files.find(flags.config)
    with cli.blocked_interrupts():
        # JAX takes seconds to import, so it is imported after the flags have been checked.
        from cnn_jax.registry import mlflow
        from cnn_jax.system.compilation_cache import keep_compiled
        from cnn_jax.system.runtime import keep_freed_memory
        from cnn_jax.training import summary
        from cnn_jax.training.backup import Backup
        from cnn_jax.training.loop import train_and_evaluate
        from cnn_jax.training.members import train_members
        from cnn_jax.training.sharding import is_primary, start_processes

    uri = mlflow.tracking_uri(flags.mlflow)
    config = files.load(flags.config, overrides)
    backup = Backup(flags.backup) if flags.backup is not None else None
    keep_freed_memory()
    start_processes(flags.coordinator, flags.process_id, flags.process_count)
    keep_compiled()
    workdir = pathlib.Path(flags.workdir)
    if flags.members is not None:
        reports = train_members(config, workdir, flags.members)
        for folder, report in reports.items():
            summary.show_metrics(folder, report)
        folders = list(reports)
    else:
        show = functools.partial(summary.show_metrics, workdir) if is_primary() else None
        train_and_evaluate(config, workdir, profile=flags.profile, on_metrics=show, backup=backup)
        if is_primary():
            summary.show_commands(workdir)
        folders = [workdir]
    with cli.blocked_interrupts():
        # Matplotlib takes half a second to import, so it is imported after training.
        from cnn_jax.report.run_report import report_after_training
        from cnn_jax.system.console import Console
    console = Console(is_silent=not is_primary())
    pages = [report_after_training(folder, config, console) for folder in folders]
    if not is_primary():
        return
    if backup is not None:
        backup.copy()  # The report is new.
    for page_or_command in pages:
        print(f"report      {page_or_command}")
    if flags.members is not None:
        print(f"ensemble    {summary.ensemble_command(workdir, folders)}")
    if uri is None:
        return
    for folder in folders:
        try:
            print(f"mlflow      {mlflow.log_run(folder, uri)}")
        except UserError as error:
            # Without --mlflow, the URI comes from MLFLOW_TRACKING_URI, which may be meant for
            # other programs. So the error is only a warning.
            message = f"the run is not logged: {error}; the same command tries it again"
            if flags.mlflow:
                raise type(error)(message) from error
            logger.warning(message)


def _folder(text: str) -> str:
    """An argparse type for the folder of a run."""
    if is_url(text):
        raise argparse.ArgumentTypeError(
            f"must be a folder on this machine, got {text}; --backup={text} keeps a copy of the "
            "folder there"
        )
    return cli.path(text)


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
