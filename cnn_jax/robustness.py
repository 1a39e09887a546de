"""Accuracy, confidence and calibration across image qualities.

    cnn_jax robustness --bundle=RUN [--source=folder:PATH] [--split=test] [--sample=N]
        [--json] [--output=FILE.json]

corrupts the images of a split in every way that `quality/corruptions.py` knows, at five
severities each, and prints tables of the accuracy that is left, and of the accuracy by the
images' own sharpness, brightness and resolution. --json prints all of it as JSON instead, and
--output writes that to a file as well. This is 115 times the work of `cnn_jax.evaluate`:
--sample=N takes N of the images, with each class in proportion.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cnn_jax.evaluate import (
    add_data_flags,
    open_by_flags,
    percent,
    percent_interval,
    split_name,
    write_result,
)
from cnn_jax.quality.corruptions import IMAGENET_C, SEVERITIES
from cnn_jax.quality.robustness import measure_split
from cnn_jax.system import cli, runtime
from cnn_jax.system.compilation_cache import keep_compiled
from cnn_jax.system.console import Console, table
from cnn_jax.system.errors import printable


def describe(result: Mapping[str, Any], title: str, width: int) -> str:
    """The robustness of a network as text.

    Args:
      result: The return value of `measure_split`.
      title: The first line.
      width: The width of the terminal, in columns.
    """
    clean, corruptions = result["clean"], result["corruptions"]
    sorted_corruptions = sorted(corruptions.items(), key=lambda item: item[1]["accuracy"])
    rows = [
        (
            name,
            f"{100 * found['accuracy']:.1f}",
            *(f"{100 * one['accuracy']:.0f}" for one in found["severities"]),
            str(found["first_severity_10_points_lower"] or "never"),
        )
        for name, found in sorted_corruptions
    ]
    paragraphs = [
        cli.fill(title, width),
        cli.fill(
            f"Clean images: accuracy {percent(clean['accuracy'])}, mean confidence "
            f"{percent(clean['confidence'])}, expected calibration error "
            f"{percent(clean['expected_calibration_error'])}.",
            width,
        ),
        cli.fill(
            "Accuracy in % on corrupted images, the lowest first: the mean over the severities, at "
            "severity 1 to 5, and the first severity at which it is 10 percentage points lower "
            "than on clean images.",
            width,
        )
        + "\n"
        + table(("corruption", "mean", *map(str, SEVERITIES), "-10 at"), rows, width),
    ]
    if result["mean_corruption_error"] is not None:
        count = sum(name in IMAGENET_C for name in corruptions)
        more = round(100 * result["relative_mean_corruption_error"], 1) + 0.0  # Never -0.0.
        paragraphs.append(
            cli.fill(
                f"Mean error over the {count} corruptions of "
                f"ImageNet-C: {percent(result['mean_corruption_error'])}, "
                f"{more:.1f} percentage points more than "
                "on clean images.",
                width,
            )
        )
    paragraphs.append(cli.fill("Accuracy on clean images, by their own quality:", width))
    for quality, bins in result["by_quality"].items():
        digits = 0 if quality == "resolution" else 1
        rows = [
            (
                f"{one['from']:,.{digits}f} to {one['to']:,.{digits}f}",
                f"{one['count']:,}",
                percent(one["accuracy"]),
                percent_interval(one["confidence_interval"]),
            )
            for one in bins
        ]
        unit = " (pixels)" * (quality == "resolution")
        head = (f"{quality}{unit}", "images", "accuracy", "95 % interval")
        paragraphs.append(table(head, rows, width))
    return "\n\n".join(paragraphs)


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax robustness",
        description="Measure a bundle on a split whose images are corrupted in many ways.",
    )
    add_data_flags(parser)
    parser.add_argument(
        "--sample",
        type=cli.positive,
        metavar="N",
        help="take N of the images, with each class in proportion",
    )
    parser.add_argument(
        "--seed", type=cli.natural, default=0, help="seed of the sample and the corruptions (0)"
    )
    flags = parser.parse_args(argv)

    runtime.keep_freed_memory()
    keep_compiled()
    track = Console().track
    predictor, dataset = open_by_flags(flags, track)
    with cli.open_output(flags.output) as file:
        result = measure_split(
            predictor,
            dataset,
            flags.split,
            flags.sample,
            seed=flags.seed,
            track=track,
        )
        taken, count = f"{result['count']:,}", f"{result['split_count']:,}"
        images = f"{count} images" if taken == count else f"{taken} of {count} images"
        title = f"{split_name(flags.split)} of {dataset.source.name}: {images}"
        write_result(result, describe(result, printable(title), cli.columns()), flags, file)


if __name__ == "__main__":
    cli.run(main)
