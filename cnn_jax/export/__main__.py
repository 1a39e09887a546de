"""Exports a bundle to a model for another runtime, and checks that it is as accurate.

    cnn_jax export --bundle=RUN --output=DIR [--format=onnx] [--int8] [--max_loss=0.005]

writes the model, certificate.json, images for checks (golden/) and a README. If the model loses
more accuracy than --max_loss, nothing is written.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cnn_jax.config.schema import SOURCE_FORMS
from cnn_jax.export.exporter import FORMATS, MAX_LOSS, export
from cnn_jax.export.web import PACKAGE
from cnn_jax.system import cli, runtime
from cnn_jax.system.compilation_cache import keep_compiled
from cnn_jax.system.console import Console


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax export",
        description="Export a bundle to another format, and compare both on all test images.",
    )
    cli.add_bundle_flag(parser)
    parser.add_argument(
        "--output", required=True, type=cli.path, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--format", default="onnx", choices=FORMATS, help=f"{', '.join(FORMATS)} (onnx)"
    )
    parser.add_argument(
        "--int8", action="store_true", help="compute convolutions with 8 bits; not for stablehlo"
    )
    parser.add_argument(
        "--static_ranges",
        action="store_true",
        help="for litert with --int8: use the ranges of training images for the activations",
    )
    parser.add_argument(
        "--max_loss",
        type=cli.fraction,
        default=MAX_LOSS,
        metavar="RATIO",
        help=f"largest allowed loss of accuracy, 0 to 1 ({MAX_LOSS})",
    )
    parser.add_argument("--source", help=f"{SOURCE_FORMS}; by default the training data")
    parser.add_argument(
        "--npm_package",
        type=cli.path,
        metavar="FILE",
        help=f"for web: the file that `npm pack {PACKAGE}` downloads",
    )
    parser.add_argument(
        "--converter_python",
        type=cli.path,
        metavar="PYTHON",
        help="for litert: the Python of an environment with LiteRT",
    )
    flags = parser.parse_args(argv)

    runtime.keep_freed_memory()
    keep_compiled()
    certificate = export(
        flags.bundle,
        flags.output,
        flags.format,
        int8=flags.int8,
        static_ranges=flags.static_ranges,
        max_loss=flags.max_loss,
        source=flags.source,
        npm_package=flags.npm_package,
        converter_python=flags.converter_python,
        track=Console().track,
    )
    for line in describe(certificate):
        print(cli.fit(line, sys.stdout))
    print(f"{flags.output}/certificate.json")


def describe(certificate: Mapping[str, Any]) -> list[str]:
    """Returns the main facts of a certificate, one line each."""
    lines = [f"{name}: {size:,} bytes" for name, size in certificate["bytes"].items()]
    for split, values in certificate["comparison"].items():
        before, after = (100 * values[key]["accuracy"] for key in ("before", "after"))
        lines.append(
            f"{split}: accuracy {after:.2f} % (bundle {before:.2f} %), agreement "
            f"{100 * values['agreement']:.2f} %, largest difference of a probability "
            f"{values['largest_difference']:.1e}, {values['count']:,} images"
        )
    times = certificate["measured"]["milliseconds_per_image"]
    memory = certificate["measured"]["peak_memory_bytes"]
    lines.append(
        ", ".join(f"batch {size}: {value:.2f} ms per image" for size, value in times.items())
        + ", one thread"
        + (f"; peak memory {memory / 2**20:.0f} MB" if memory else "")
    )
    return lines


if __name__ == "__main__":
    cli.run(main)
