"""The metrics of a bundle on a whole split.

    cnn_jax evaluate --bundle=RUN [--source=folder:PATH] [--split=test] [--json]
        [--output=FILE.json]

prints them as a table; --json prints them as JSON instead, as `report/metrics.json` holds them.
--output writes the JSON to a file as well.
"""

import argparse
import dataclasses
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
from jaxtyping import Float, Int

from cnn_jax import cli, runtime
from cnn_jax.calibration import log_probabilities
from cnn_jax.compiled import keep_compiled
from cnn_jax.console import Console, table
from cnn_jax.data import Track, no_track
from cnn_jax.data.dataset import Dataset, choose_residency, open_dataset
from cnn_jax.data.findings import count
from cnn_jax.data.pipeline import Loader, evaluation_batches
from cnn_jax.data.sources import FORMS, absolute, open_source
from cnn_jax.data.splits import SPLITS, Division
from cnn_jax.errors import DataError, printable
from cnn_jax.metrics import full_report
from cnn_jax.predict import BATCH_SIZE, Predictor

logger = logging.getLogger(__name__)

_MAX_CLASSES_SHOWN = 20


def predict_split(
    predictor: Predictor,
    loader: Loader,
    indices: Int[np.ndarray, " n"],
    track: Track = no_track,
    description: str = "measuring",
) -> Float[np.ndarray, "n classes"]:
    """Probabilities of these examples of a loader's source, in their order, float32."""
    rows = [np.empty((0, len(predictor.class_names)), np.float32)]
    with evaluation_batches(loader, indices, BATCH_SIZE) as batches:
        num_batches = math.ceil(len(indices) / BATCH_SIZE)
        for batch in track(batches, description, num_batches):
            rows.append(predictor(batch["image"])[batch["mask"]])
    return np.concatenate(rows)


def score(
    probabilities: Float[np.ndarray, "n classes"],
    labels: Int[np.ndarray, " n"],
    class_names: list[str],
) -> dict[str, Any]:
    """All figures of a split from its probabilities; see `metrics.full_report`."""
    num_classes = len(class_names)
    predictions = probabilities.argmax(axis=1)
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    losses = -log_probabilities(probabilities)[np.arange(len(labels)), labels]
    return full_report(cells.reshape(num_classes, num_classes), losses, class_names)


def evaluate(
    predictor: Predictor, dataset: Dataset, split: str = "test", track: Track = no_track
) -> dict[str, Any]:
    """Figures of a split of a data set.

    Args:
      predictor: A loaded bundle.
      dataset: Any whose classes the bundle knows; see `open_as_trained`.
      split: "train", "validation", "test" or "all".
      track: Shows progress.

    Raises:
      DataError: The data has a class that the bundle does not know, or the
        split is empty.
    """
    indices, labels = labelled_split(predictor, dataset, split)
    source = dataset.source
    absent = sorted(set(predictor.class_names) - set(source.class_names))
    if absent:
        logger.warning(
            "%s has no images of %s: they count 0 in the means of precision, recall and F1",
            source.name,
            ", ".join(absent),
        )
    probabilities = predict_split(predictor, dataset.loader, indices, track)
    return score(probabilities, labels, predictor.class_names)


def labelled_split(
    predictor: Predictor, dataset: Dataset, split: str
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The positions of a split's images, and their labels as the bundle numbers them.

    Warns if the data is not that of the bundle.

    Raises:
      DataError: The data has a class that the bundle does not know, or the
        split is empty.
    """
    source = dataset.source
    unknown = sorted(set(source.class_names) - set(predictor.class_names))
    if unknown:
        raise DataError(
            f"{source.name} has classes that the bundle does not know: {', '.join(unknown)}; "
            f"it knows {', '.join(predictor.class_names)}"
        )
    if split != "all" and dataset.fingerprint != predictor.data["fingerprint"]:
        logger.warning(
            "%s is not the data that the bundle was trained on: its %s split may hold images "
            "that were trained on if it shares some; --split=all takes everything",
            source.name,
            split,
        )
    indices = np.arange(len(source)) if split == "all" else dataset.splits[split]
    if not len(indices):
        raise DataError(f"{source.name} has no images in its {split} split")
    to_bundle = np.array([predictor.class_names.index(name) for name in source.class_names])
    return indices, to_bundle[source.labels[indices]]


def open_as_trained(
    predictor: Predictor,
    source: str | None = None,
    track: Track = no_track,
    *,
    grouped: bool = True,
    max_unreadable: float | None = None,
    allow_outside: bool = False,
) -> Dataset:
    """Opens a source and divides it as the bundle's was when it was trained.

    Its images are decoded once and kept, as training keeps them.

    Args:
      predictor: A loaded bundle.
      source: The name of a source; by default that of the bundle.
      track: Shows progress.
      grouped: Whether the bundle's groups stay together; other data may have none.
      max_unreadable: The largest share of images that may be unreadable; by default
        that of the bundle.
      allow_outside: Whether links and paths may lead out of the data's folder, even
        if the bundle's might not.

    Raises:
      ConfigError: No source has a name of this form.
      DataError: The data cannot be used, or too much of it is unreadable.
    """
    data = predictor.data
    name = absolute(source or data["source"])
    listing = open_source(name, track, allow_outside or data["allow_outside"])
    division = Division.from_dict(data["division"])
    return open_dataset(
        listing,
        division if grouped else dataclasses.replace(division, group=""),
        predictor.preprocessing,
        max_unreadable=data["max_unreadable"] if max_unreadable is None else max_unreadable,
        residency=choose_residency("auto", listing, predictor.preprocessing, device_bytes=0),
        track=track,
    )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that looks at a split of a data set with a bundle."""
    cli.add_bundle_flag(parser)
    parser.add_argument("--source", help=f"{FORMS}; what it was trained on if not given")
    parser.add_argument(
        "--split",
        default="test",
        choices=[*SPLITS, "all"],
        metavar="SPLIT",
        help="train, validation, test or all (test)",
    )
    parser.add_argument(
        "--max_unreadable",
        type=cli.share,
        metavar="RATIO",
        help="ratio of images that may be unreadable, 0 to 1; as in training if not given",
    )
    parser.add_argument(
        "--allow_outside",
        action="store_true",
        help="follow links and paths out of the data's folder",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--output", type=cli.path, metavar="FILE", help="JSON file to write as well"
    )


def open_by_flags(flags: argparse.Namespace, track: Track) -> tuple[Predictor, Dataset]:
    """The bundle and the data set that `add_data_flags` name; warns of what is left out."""
    predictor = Predictor.load(flags.bundle)
    dataset = open_as_trained(
        predictor,
        flags.source,
        track,
        grouped=flags.split != "all",  # All of it is not divided.
        max_unreadable=flags.max_unreadable,
        allow_outside=flags.allow_outside,
    )
    for image in dataset.findings.unreadable:
        logger.warning("left out: %s %s", printable(image.id), image.reason)
    return predictor, dataset


def write_result(
    result: Mapping[str, Any], text: str, flags: argparse.Namespace, file: IO[str]
) -> None:
    """Writes what a command has measured to stdout and to the file of --output.

    Args:
      result: A value of JSON types.
      text: The result as tables, which go to stdout unless --json is given.
      flags: The parsed flags of `add_data_flags`.
      file: The file of --output, or stdout without that flag; see `cli.open_output`.
    """
    if flags.output is not None:
        cli.write_json(result, file)
    if sys.stdout is None:  # It is closed, so there is --output.
        return
    if flags.json:
        cli.write_json(result, sys.stdout)
    else:
        print(text)


def describe(result: Mapping[str, Any], title: str, width: int) -> str:
    """The metrics of a split as text, with the classes of the lowest F1.

    Args:
      result: The return value of `score`.
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
    # The classes that most need attention first; those without images say nothing.
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
            cli.fill(title, width),
            "",
            table(("", "value", "95 % interval"), metrics, width),
            cli.fill("Precision, recall and F1 are means over the classes.", width),
            "",
            table(("class", "precision", "recall", "F1", "images"), classes, width),
            *(more if rest else ()),
        )
    )


def percent(value: float, digits: int = 1) -> str:
    """A ratio as a percentage."""
    return f"{100 * value:.{digits}f} %"


def percent_interval(interval: Sequence[float]) -> str:
    """An interval of ratios in percent."""
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="cnn_jax evaluate", description="Measure a bundle on a whole split."
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
    """The name of a split in a title."""
    return "all images" if split == "all" else f"{split} split"


if __name__ == "__main__":
    cli.run(main)
