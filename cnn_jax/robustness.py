"""Measures the accuracy of a bundle on corrupted images.

    cnn_jax robustness --bundle=RUN [--source=folder:PATH] [--split=test] [--sample=N]
        [--json] [--output=FILE.json]

applies each corruption of `quality/corruptions.py` to the images of a split, at five severities.
It prints the accuracy for each corruption, and the accuracy on the original images by their
sharpness, brightness and resolution. --json prints JSON instead, and --output also writes it to a
file. The command classifies 115 times as many images as `cnn_jax evaluate`. --sample=N uses only N
images of the split; each class has the same fraction of them as of the split.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cnn_jax.evaluate import (
    add_data_flags,
    open_by_flags,
    percent_interval,
    split_name,
    write_result,
)
from cnn_jax.quality.corruptions import IMAGENET_C, SEVERITIES
from cnn_jax.quality.robustness import measure_split
from cnn_jax.system import cli, runtime
from cnn_jax.system.compilation_cache import keep_compiled
from cnn_jax.system.console import Console
from cnn_jax.system.errors import printable
from cnn_jax.system.text import fill, percent, table


def describe(result: Mapping[str, Any], title: str, width: int) -> str:
    """Describes the robustness of a network as text.

    Args:
      result: The value of `measure_split`.
      title: The first line.
      width: The width of the terminal, in columns.
    """
    clean, corruptions = result["clean"], result["corruptions"]
    sorted_corruptions = sorted(corruptions.items(), key=lambda item: item[1]["accuracy"])
    rows = [
        (
            name,
            f"{100 * metrics['accuracy']:.1f}",
            *(f"{100 * severity['accuracy']:.0f}" for severity in metrics["severities"]),
            str(metrics["first_severity_10_points_lower"] or "never"),
        )
        for name, metrics in sorted_corruptions
    ]
    paragraphs = [
        fill(title, width),
        fill(
            f"Clean images: accuracy {percent(clean['accuracy'])}, mean confidence "
            f"{percent(clean['confidence'])}, expected calibration error "
            f"{percent(clean['expected_calibration_error'])}.",
            width,
        ),
        fill(
            "Accuracy in % on corrupted images, the lowest first: the mean over the severities, "
            "the accuracy at severity 1 to 5, and the first severity at which accuracy is 10 "
            "percentage points lower than on clean images.",
            width,
        )
        + "\n"
        + table(("corruption", "mean", *map(str, SEVERITIES), "-10 at"), rows, width),
    ]
    if result["mean_corruption_error"] is not None:
        count = sum(name in IMAGENET_C for name in corruptions)
        # Adding 0.0 converts -0.0 to 0.0.
        more = round(100 * result["relative_mean_corruption_error"], 1) + 0.0
        paragraphs.append(
            fill(
                f"Mean error over the {count} corruptions of "
                f"ImageNet-C: {percent(result['mean_corruption_error'])}, "
                f"{more:.1f} percentage points more than "
                "on clean images.",
                width,
            )
        )
    paragraphs.append(fill("Accuracy on clean images, by the quality of the images:", width))
    for quality, bins in result["by_quality"].items():
        digits = 0 if quality == "resolution" else 1
        rows = [
            (
                f"{group['from']:,.{digits}f} to {group['to']:,.{digits}f}",
                f"{group['count']:,}",
                percent(group["accuracy"]),
                percent_interval(group["confidence_interval"]),
            )
            for group in bins
        ]
        unit = " (pixels)" * (quality == "resolution")
        head = (f"{quality}{unit}", "images", "accuracy", "95 % interval")
        paragraphs.append(table(head, rows, width))
    return "\n\n".join(paragraphs)


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax robustness",
        description="Measure a bundle on a split under 23 corruptions of the images.",
    )
    add_data_flags(parser)
    parser.add_argument(
        "--sample",
        type=cli.positive,
        metavar="N",
        help="number of images to use, with each class in proportion; by default all",
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
