"""Evaluates a bundle on a split of a data set.

    cnn_jax evaluate --bundle=RUN [--source=folder:PATH] [--split=test] [--json]
        [--output=FILE.json]

prints the metrics as a table. --json prints them as JSON instead, in the form of
`report/metrics.json`. --output also writes the JSON to a file.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from cnn_jax.config.schema import SOURCE_FORMS
from cnn_jax.data import Track
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.findings import count
from cnn_jax.data.splits import SPLITS
from cnn_jax.inference.evaluation import evaluate, open_as_trained
from cnn_jax.inference.exported import load_predictor
from cnn_jax.inference.predictor import TrainedPredictor
from cnn_jax.system import cli, runtime
from cnn_jax.system.compilation_cache import keep_compiled
from cnn_jax.system.console import Console
from cnn_jax.system.errors import printable
from cnn_jax.system.text import fill, percent, table

logger = logging.getLogger(__name__)


_MAX_CLASSES_SHOWN = 20


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for a bundle, a data set and a split, such as --bundle and --source."""
    cli.add_bundle_flag(parser)
    parser.add_argument("--source", help=f"{SOURCE_FORMS}; by default the training data")
    parser.add_argument(
        "--split",
        default="test",
        choices=[*SPLITS, "all"],
        metavar="SPLIT",
        help="train, validation, test or all (test)",
    )
    parser.add_argument(
        "--max_unreadable",
        type=cli.fraction,
        metavar="RATIO",
        help="fraction of images that may be unreadable, 0 to 1; by default as in training",
    )
    parser.add_argument(
        "--allow_outside",
        action="store_true",
        help="follow links and paths out of the data's folder",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=cli.path, metavar="FILE", help="JSON file to write")


def open_by_flags(flags: argparse.Namespace, track: Track) -> tuple[TrainedPredictor, Dataset]:
    """Opens the bundle and the data set that the flags name, and warns about unreadable images.

    Args:
      flags: The parsed flags of `add_data_flags`.
      track: Shows progress.
    """
    predictor = load_predictor(flags.bundle)
    dataset = open_as_trained(
        predictor,
        flags.source,
        track,
        grouped=flags.split != "all",  # Only a division into splits needs the groups.
        max_unreadable=flags.max_unreadable,
        allow_outside=flags.allow_outside,
    )
    for image in dataset.findings.unreadable:
        logger.warning("left out: %s %s", printable(image.id), image.reason)
    return predictor, dataset


def write_result(
    result: Mapping[str, Any], text: str, flags: argparse.Namespace, file: IO[str]
) -> None:
    """Writes the result of a command to stdout, and to the file that --output names.

    Args:
      result: The result, of JSON types.
      text: The result as text, for stdout unless --json is given.
      flags: The parsed flags of `add_data_flags`.
      file: The file of --output, or stdout without that flag; see `cli.open_output`.
    """
    if flags.output is not None:
        cli.write_json(result, file)
    # If stdout is closed, only the file that --output names gets the result.
    if sys.stdout is None:
        return
    if flags.json:
        cli.write_json(result, sys.stdout)
    else:
        print(text)


def describe(result: Mapping[str, Any], title: str, width: int) -> str:
    """Returns the metrics of a split as text, with a table of the classes with the lowest F1.

    Args:
      result: The value of `evaluation.score`.
      title: The first line.
      width: The width of the terminal, in columns.
    """
    intervals = result["confidence_intervals"]
    metrics = [
        (name, percent(result[key], 2), percent_interval(intervals[key]))
        for name, key in (
            ("accuracy", "accuracy"),
            ("precision", "precision"),
            ("recall", "recall"),
            ("F1", "f1"),
        )
    ]
    low, high = intervals["loss"]
    metrics.append(("loss", f"{result['loss']:.4f}", f"{low:.3f} to {high:.3f}"))
    # The classes with the lowest F1 come first, and classes without images last.
    classes_by_f1 = sorted(
        result["per_class"].items(), key=lambda item: (not item[1]["support"], item[1]["f1"])
    )
    classes = [
        (
            printable(name),
            *(percent(values[key]) for key in ("precision", "recall", "f1")),
            f"{values['support']:,}",
        )
        for name, values in classes_by_f1[:_MAX_CLASSES_SHOWN]
    ]
    rest = len(classes_by_f1) - len(classes)
    more = (f"... {count(rest, 'more class', 'more classes')}; --json has all",)
    return "\n".join(
        (
            fill(title, width),
            "",
            table(("", "value", "95 % interval"), metrics, width),
            fill("Precision, recall and F1 are means over the classes.", width),
            "",
            table(("class", "precision", "recall", "F1", "images"), classes, width),
            *(more if rest else ()),
        )
    )


def percent_interval(interval: Sequence[float]) -> str:
    """Formats an interval of ratios as percentages, such as "10.0 to 15.0 %"."""
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax evaluate", description="Measure a bundle on a split of a data set."
    )
    add_data_flags(parser)
    flags = parser.parse_args(argv)

    runtime.keep_freed_memory()
    keep_compiled()
    track = Console().track
    predictor, dataset = open_by_flags(flags, track)
    with cli.open_output(flags.output) as file:
        result = evaluate(predictor, dataset, flags.split, track)
        title = f"{split_name(flags.split)} of {dataset.source.name}: {result['count']:,} images"
        write_result(result, describe(result, printable(title), cli.columns()), flags, file)


def split_name(split: str) -> str:
    """Returns the name of a split, for use in a title."""
    return "all images" if split == "all" else f"{split} split"


if __name__ == "__main__":
    cli.run(main)
