"""Writes the HTML report of a run or an ensemble.

    cnn_jax report --run=RUN [--source=folder:PATH]

writes RUN/report/index.html and prints its path. Training writes the same report at its end. RUN
may also be the folder of an ensemble.
"""

from collections.abc import Sequence

from cnn_jax.config.schema import SOURCE_FORMS
from cnn_jax.report.run_report import write_report
from cnn_jax.system import cli, runtime
from cnn_jax.system.compilation_cache import keep_compiled
from cnn_jax.system.console import Console


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax report", description="Write the report of a run or an ensemble."
    )
    parser.add_argument(
        "--run", required=True, type=cli.path, help="the folder of a run or an ensemble"
    )
    parser.add_argument("--source", help=f"the training data if it was moved: {SOURCE_FORMS}")
    flags = parser.parse_args(argv)

    runtime.keep_freed_memory()
    keep_compiled()
    console = Console()
    print(write_report(flags.run, console.track, source=flags.source, warn=console.warn))


if __name__ == "__main__":
    cli.run(main)
