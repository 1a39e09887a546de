"""Exact figures of a bundle on a whole split.

    python -m cnn_jax.evaluate --bundle=RUN/bundle [--source=folder:PATH] [--split=test]

prints them as JSON, as `report/metrics.json` holds them.
"""

import argparse
import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cnn_jax import cli
from cnn_jax.console import Console
from cnn_jax.data import Track, no_track
from cnn_jax.data.pipeline import Loader, evaluation_batches
from cnn_jax.data.sources import Source, fingerprint, open_source
from cnn_jax.data.splits import SPLITS, split_by_id
from cnn_jax.errors import DataError
from cnn_jax.metrics import full_report
from cnn_jax.predict import BATCH_SIZE, Predictor

logger = logging.getLogger(__name__)


def predict_split(
    predictor: Predictor,
    source: Source,
    indices: Int[np.ndarray, " n"],
    track: Track = no_track,
    description: str = "measuring",
) -> Float[np.ndarray, "n classes"]:
    """Probabilities of these examples of a source, in their order, float32."""
    loader = Loader(source, predictor.preprocessing)
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
    of_true_class = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    # A float32 probability can be 0 where its logarithm would still be finite.
    loss_sum = -np.log(np.maximum(of_true_class, np.finfo(np.float32).tiny)).sum()
    return full_report(cells.reshape(num_classes, num_classes), float(loss_sum), class_names)


def evaluate(
    predictor: Predictor, source: Source, split: str = "test", track: Track = no_track
) -> dict[str, Any]:
    """Figures of a split of a source, divided as it was when the bundle was trained.

    Args:
      predictor: A loaded bundle.
      source: Any source whose classes the bundle knows.
      split: "train", "validation", "test" or "all".
      track: Shows progress.

    Raises:
      DataError: The source has a class that the bundle does not know, or the
        split is empty.
    """
    unknown = sorted(set(source.class_names) - set(predictor.class_names))
    if unknown:
        raise DataError(
            f"{source.name} has classes that the bundle does not know: {', '.join(unknown)}; "
            f"it knows {', '.join(predictor.class_names)}"
        )
    data = predictor.data
    if split != "all" and fingerprint(source) != data["fingerprint"]:
        logger.warning(
            "%s is not the data that the bundle was trained on: its %s split may hold images "
            "that were trained on if it shares some; --split=all takes everything",
            source.name,
            split,
        )
    if split == "all":
        indices = np.arange(len(source))
    else:
        indices = split_by_id(source.ids, source.labels, data["split"], data["seed"])[split]
    if not len(indices):
        raise DataError(f"{source.name} has no images in its {split} split")
    absent = sorted(set(predictor.class_names) - set(source.class_names))
    if absent:
        logger.warning(
            "%s has no images of %s: they count 0 in the means of precision, recall and F1",
            source.name,
            ", ".join(absent),
        )
    to_bundle = np.array([predictor.class_names.index(name) for name in source.class_names])
    probabilities = predict_split(predictor, source, indices, track)
    return score(probabilities, to_bundle[source.labels[indices]], predictor.class_names)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cnn_jax.evaluate", description="Measure a bundle on a whole split."
    )
    parser.add_argument("--bundle", required=True, type=cli.path, help="the bundle, RUN/bundle")
    parser.add_argument(
        "--source", help="shapes, folder:PATH or tfds:NAME; what it was trained on if not given"
    )
    parser.add_argument("--split", default="test", choices=[*SPLITS, "all"])
    parser.add_argument("--output", type=cli.path, help="JSON file to write; stdout if not given")
    flags = parser.parse_args(argv)

    predictor = Predictor.load(flags.bundle)
    console = Console()
    source = open_source(flags.source or predictor.data["source"], console.track)
    with cli.open_output(flags.output) as file:
        figures = evaluate(predictor, source, flags.split, console.track)
        json.dump(figures, file, indent=1, ensure_ascii=False)
        file.write("\n")


if __name__ == "__main__":
    cli.run(main)
