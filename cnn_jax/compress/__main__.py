"""Makes a smaller and faster network from a bundle: removes channels, then trains the rest.

    cnn_jax compress --bundle=RUN --keep=0.5 --workdir=NEW_RUN [--epochs=6]

The new run has all files of a training run. Its bundle can be used like any other.
"""

from collections.abc import Sequence

from cnn_jax.config import files
from cnn_jax.config.schema import SOURCE_FORMS
from cnn_jax.system import cli

_EPOCHS = 6


def main(argv: Sequence[str]) -> None:
    parser = files.ConfigParser(
        prog="cnn_jax compress",
        description="Remove channels of a network, then train it as the bundle's run was trained.",
    )
    cli.add_bundle_flag(parser)
    parser.add_argument(
        "--keep",
        required=True,
        type=cli.number("above 0, at most 1", lambda value: 0 < value <= 1),
        metavar="RATIO",
        help="largest number of operations, as a fraction of those of the bundle",
    )
    parser.add_argument(
        "--workdir", required=True, type=cli.path, metavar="DIR", help="the new run's folder"
    )
    parser.add_argument(
        "--epochs", type=cli.positive, default=_EPOCHS, metavar="N", help=f"epochs ({_EPOCHS})"
    )
    parser.add_argument("--source", help=f"{SOURCE_FORMS}: the training data, if it was moved")
    parser.set_defaults(config=None)
    flags, overrides = parser.parse_with_overrides(argv)
    if flags.config is not None:
        files.find(flags.config)
    with cli.blocked_interrupts():
        # JAX takes seconds to import, so it is imported after the flags have been checked.
        from cnn_jax.compress.compressor import compress, describe
        from cnn_jax.system.compilation_cache import keep_compiled
        from cnn_jax.system.console import Console
        from cnn_jax.system.runtime import keep_freed_memory

    keep_freed_memory()
    keep_compiled()
    console = Console()
    config, record = compress(
        flags.bundle,
        flags.workdir,
        flags.keep,
        epochs=flags.epochs,
        source=flags.source,
        recipe=flags.config,
        overrides=overrides,
        console=console,
    )
    print("\n".join(describe(record)))
    with cli.blocked_interrupts():
        # Matplotlib takes half a second to import, so it is imported after training.
        from cnn_jax.report.run_report import report_after_training
    print(f"report      {report_after_training(flags.workdir, config, console)}")


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
