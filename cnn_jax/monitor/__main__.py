"""Detects drift and estimates the accuracy of a served version from its request log.

    cnn_jax monitor --registry=DIR --model=NAME --log=LOG [LOG ...]
    cnn_jax monitor --bundle=RUN --log=LOG [--window=250] [--days=7] [--max_drop=0.05]
        [--json] [--output=FILE.json] [--gauges=FILE.prom] [--page=FILE.html]
    cnn_jax monitor --bundle=RUN --fit_reference=FILE

compares the predictions of one version with the reference statistics in its bundle, in windows of
equal size. The command exits with 0 without harm, and with 3 if the accuracy has fallen by more
than --max_drop. Drift is not harm: drift without lost accuracy exits with 0. --fit_reference
computes the reference statistics of a bundle that has none, from its training data; give the file
to later calls with --reference.
"""

import logging
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cnn_jax.data.request_log import Folders, read_images
from cnn_jax.monitor.flags import (
    add_log_flags,
    add_measure_flags,
    add_version_flags,
    open_rows,
    open_version,
    save_reference,
)
from cnn_jax.monitor.gauges import describe_gauges
from cnn_jax.monitor.rows import Rows
from cnn_jax.monitor.windows import measure
from cnn_jax.quality.drift import TESTS
from cnn_jax.quality.reference import Reference
from cnn_jax.quality.trust import Distances, statistics
from cnn_jax.system import cli
from cnn_jax.system.atomic import write_text
from cnn_jax.system.errors import ConfigError, DataError, printable
from cnn_jax.system.text import fill, percent, table

logger = logging.getLogger(__name__)

# The exit code if the accuracy has fallen.
HARM = 3
_EXAMPLES = 12


def describe(result: Mapping[str, Any], width: int | None) -> str:
    """Returns the result of the monitor as text.

    Args:
      result: The value of `windows.measure`, with the keys "model" and "version".
      width: The width of the terminal, in columns.
    """
    from cnn_jax.monitor.page import BLIND_SPOT, EXPLANATIONS

    reference, labels = result["reference"], result["labels"]
    name = printable(f"{result['model']}/{result['version']}")
    lines = [
        f"{name}: {result['images']:,} images, {len(result['windows'])} windows of "
        f"{result['window']:,}; {result['waiting']:,} images wait for the next window.",
        f"Validation accuracy {percent(reference['accuracy'])} ({reference['images']:,} images).",
    ]
    if result["windows"]:
        rows = [
            (
                window["to"],
                percent(window["estimated_accuracy"]),
                str(window["labels"]["count"]),
                *(f"{window['p_values'][test]:.1g}" for test in TESTS),
                "alarm" if window["alarm"] else "differs" if window["differs"] else "no",
            )
            for window in result["windows"]
        ]
        head = ("window until", "estimate", "labels", *TESTS, "drift")
        lines += ["", table(head, rows, width), ""]
    if labels["accuracy"] is not None:
        low, high = labels["interval"]
        lines.append(
            f"Labels of {labels['sample']:,} random images of the two latest windows: accuracy "
            f"{percent(labels['accuracy'])} (95 % interval {percent(low)} to {percent(high)})."
        )
    if labels["new_class"]:
        lines.append(
            f"{labels['new_class']:,} labelled images have a class that the network does not know."
        )
    state = result["state"].replace("_", " ")
    lines.append(f"State: {state}. {EXPLANATIONS[result['state']]} {BLIND_SPOT}")
    return "\n".join(fill(line, width) if "\n" not in line else line for line in lines)


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax monitor", description="Watch a served version for drift and lost accuracy."
    )
    add_version_flags(parser)
    add_log_flags(parser)
    add_measure_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=cli.path, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--gauges", type=cli.path, metavar="FILE", help="file for Prometheus' textfile collector"
    )
    parser.add_argument("--page", type=cli.path, metavar="FILE", help="HTML page to write")
    parser.add_argument(
        "--fit_reference",
        type=cli.path,
        metavar="FILE",
        help="only compute the reference statistics of --bundle, and write them to this file",
    )
    flags = parser.parse_args(argv)
    if flags.fit_reference is not None:
        _fit_reference(flags.bundle, pathlib.Path(flags.fit_reference))
        return

    served = open_version(flags)
    reference = served.reference
    if reference is None:
        raise DataError(
            f"{served.name}: the bundle has no reference statistics; compute them with "
            "--bundle=RUN --fit_reference=FILE, and add --reference=FILE to this command"
        )
    rows = open_rows(flags, served)
    result = {"model": rows.model, "version": rows.version, "digest": served.digest}
    result |= measure(rows, reference, flags.window, flags.last, flags.level, flags.max_drop)
    for warning in rows.warnings:
        logger.warning("%s", warning)
    if flags.output is not None:
        with cli.open_output(flags.output) as file:
            cli.write_json(result, file)
    if flags.gauges is not None:
        write_text(pathlib.Path(flags.gauges), describe_gauges(result, time.time()), shared=True)
    if flags.page is not None:
        _write_page(pathlib.Path(flags.page), result, rows, reference, flags.log)
    if sys.stdout is not None:
        if flags.json:
            cli.write_json(result, sys.stdout)
        else:
            print(describe(result, cli.columns()))
    if result["state"] == "harm":
        sys.exit(HARM)


def _fit_reference(bundle: str | None, path: pathlib.Path) -> None:
    """Computes the reference statistics of a bundle from its training data, and writes them."""
    if bundle is None:
        raise ConfigError("--fit_reference: needs --bundle, whose training data is read again")
    from cnn_jax.inference.bundle import digest, find_bundle
    from cnn_jax.inference.evaluation import open_as_trained
    from cnn_jax.inference.predictor import BundlePredictor
    from cnn_jax.quality.reference_fit import measure_samples
    from cnn_jax.quality.trust import fit_reference
    from cnn_jax.system.compilation_cache import keep_compiled
    from cnn_jax.system.console import Console

    keep_compiled()
    track = Console().track
    predictor = BundlePredictor.load(bundle)
    dataset = open_as_trained(predictor, track=track)
    if dataset.fingerprint != predictor.data["fingerprint"]:
        logger.warning("%s has changed since the training of %s", dataset.source.name, bundle)
    if dataset.source.class_names != predictor.class_names:
        raise DataError(f"{dataset.source.name} has other classes than {bundle}")
    source = dataset.source
    samples = measure_samples(predictor, dataset.loader, dataset.splits, source.labels, track)
    save_reference(fit_reference(**samples), digest(find_bundle(bundle)), path)
    print(f"wrote the reference statistics of {bundle} to {path}")


def _write_page(
    path: pathlib.Path,
    result: Mapping[str, Any],
    rows: Rows,
    reference: Reference,
    folders: Folders,
) -> None:
    from cnn_jax.monitor.page import choose_examples, write_monitor_page
    from cnn_jax.report.style import png_uri

    examples = []
    if result["windows"]:
        first = result["windows"][-2:][0]["first"]
        distances = Distances(reference.class_means, reference.covariance)
        values = statistics(distances, rows.predictions[slice(first, None)])
        chosen = choose_examples(rows, values, first, _EXAMPLES)
        keys = [rows.keys[row] for row, _ in chosen]
        images = read_images(folders, keys)
        classes, probabilities = rows.predictions.classes, rows.predictions.probabilities
        for row, group in chosen:
            if (image := images.get(rows.keys[row])) is not None:
                name = rows.class_names[classes[row]]
                confidence = float(probabilities[row].max())
                text = f"{name}, {percent(confidence)}"
                examples.append({"group": group, "text": text, "uri": png_uri(image)})
    write_monitor_page(path, result, examples)


if __name__ == "__main__":
    cli.run(main)
