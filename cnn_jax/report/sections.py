"""Computes the sections of a report; each function returns JSON values.

A function raises MissingError with the reason if its section cannot be computed. An image for the
page is described by a dictionary, which the function `example` makes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

import cnn_jax
from cnn_jax.data import pipeline
from cnn_jax.data.splits import SPLITS
from cnn_jax.inference import calibration
from cnn_jax.models.network import count_parameters
from cnn_jax.report import charts, label_errors, texts, verdicts
from cnn_jax.report.run import Measurements, MissingError, Network, Run
from cnn_jax.training.checkpoint import best_record

# The number of images of each kind on the page: wrong predictions, uncertain predictions, suspected
# label errors, and augmented images.
NUM_WRONG, NUM_UNSURE, NUM_SUSPECTS, NUM_AUGMENTED = 24, 12, 24, 12
# The number of pairs of confused classes on the page, and the number of images of each pair.
_NUM_PAIRS, _PAIR_IMAGES = 10, 3
# If more than this fraction of the labels is suspected to be wrong, most of these labels are
# probably correct, and the network is wrong.
_CREDIBLE = 0.1
# The fractions of test images to keep when the images with the lowest confidence are rejected.
_KEPT = (1.0, 0.95, 0.9, 0.8, 0.5)

Figures = dict[str, Any]


def example(network: Network, split: str, row: int, predicted: int | None = None) -> Figures:
    """Returns the description of an image for the page: its name, file, classes and confidence.

    Args:
      network: The network.
      split: A split whose probabilities the network has.
      row: The image's position in the split.
      predicted: The class to report as predicted; by default the class with the largest
        probability.

    Returns:
      "id", "split", "position" in the source, "picture" (the name of its file below report/),
      the classes "true" and "predicted", and "confidence", the probability of "predicted".
    """
    position = int(network.dataset.splits[split][row])
    probabilities = network.probabilities[split][row]
    predicted = int(probabilities.argmax()) if predicted is None else predicted
    return {
        "id": network.source.ids[position],
        "split": split,
        "position": position,
        "picture": f"examples/{position}.png",
        "true": network.class_names[network.source.labels[position]],
        "predicted": network.class_names[predicted],
        "confidence": float(probabilities[predicted]),
    }


def most_confident_image(network: Network) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the correctly classified test image with the highest confidence.

    The image has the network's input size.
    """
    probabilities = network.probabilities["test"]
    is_right = probabilities.argmax(axis=1) == network.labels("test")
    row = int((probabilities.max(axis=1) + is_right).argmax())
    position = network.dataset.splits["test"][row : row + 1]
    return network.dataset.loader.load(position)["image"][0]


def guessing(run: Measurements) -> Figures:
    """Compares the network with a classifier that always predicts the most common test class."""
    return verdicts.guessing(run.need_figures("test"))


def curves(run: Run) -> Figures:
    """Returns the learning curves, the best epoch, and a verdict on the training."""
    history = run.history
    best = best_record(history, run.settings.monitor) if history else None
    if best is None:
        raise MissingError("No epoch has been completed, so there is no curve to draw.")
    keys = ("epoch", "learning_rate", "seconds")
    measured = [f"{split}_{key}" for split in SPLITS[:2] for key in ("loss", "accuracy")]
    columns = {key: [record[key] for record in history] for key in (*keys, *measured)}
    figures = {
        "best_epoch": best["epoch"],
        "monitor": run.settings.monitor,
        "best_value": best[run.settings.monitor],
        "epochs": len(history),
        "damaged_records": run.damaged_records,
        **columns,
    }
    train, validation = (run.figures.get(split) for split in ("train", "validation"))
    return figures | verdicts.training(figures, train, validation, run.settings.dropout)


def confusion(run: Measurements) -> Figures:
    """Returns the order of the classes in the confusion matrix, and the most confused pairs."""
    if run.network is None and "confusion" in run.figures:
        # Without the network, no new example images can be selected. Keep the section of an earlier
        # report, which contains example images.
        return run.figures["confusion"]
    test = run.need_figures("test")
    names, matrix = list(test["per_class"]), np.array(test["confusion"])
    errors = matrix * (1 - np.eye(len(matrix), dtype=int))
    # Among pairs with equal counts, the pair with the larger fraction of its true class comes
    # first.
    worst = np.lexsort((-charts.row_fractions(matrix).ravel(), -errors.ravel()))[:_NUM_PAIRS]
    pairs = []
    for true, predicted in zip(*np.divmod(worst, len(matrix)), strict=True):
        if errors[true, predicted]:
            pairs.append(
                {
                    "true": names[true],
                    "predicted": names[predicted],
                    "count": int(errors[true, predicted]),
                    "of": int(matrix[true].sum()),
                    "share": float(errors[true, predicted] / matrix[true].sum()),
                    "examples": _pair_examples(run.network, int(true), int(predicted)),
                }
            )
    return {
        "order": charts.confusion_order(matrix),
        "errors": int(errors.sum()),
        "pairs": pairs,
    }


def _pair_examples(network: Network | None, true: int, predicted: int) -> list[Figures]:
    """Returns the most confident test images of class `true` that are predicted as `predicted`."""
    if network is None:
        return []
    probabilities = network.probabilities["test"]
    is_pair = (network.labels("test") == true) & (probabilities.argmax(axis=1) == predicted)
    rows = np.flatnonzero(is_pair)
    rows = rows[np.argsort(-probabilities[rows, predicted], kind="stable")]
    return [example(network, "test", int(row)) for row in rows[:_PAIR_IMAGES]]


def calibration_section(run: Measurements) -> Figures:
    """Measures the calibration of the test predictions before and after temperature scaling."""
    network = run.need_network()
    after, labels = network.probabilities["test"], network.labels("test")
    temperature = network.predictor.temperature
    before = calibration.apply_temperature(after, 1 / temperature)
    return {
        "temperature": temperature,
        "count": len(labels),
        "bins": calibration.NUM_BINS,
        "before": calibration.describe(before, labels),
        "after": calibration.describe(after, labels),
        "calibrated": verdicts.calibrated_error(after.max(axis=1)),
    }


def coverage(run: Measurements) -> Figures:
    """Measures the test accuracy when the images with the lowest confidence are rejected."""
    network = run.need_network()
    probabilities, labels = network.probabilities["test"], network.labels("test")
    curve = calibration.coverage(probabilities, labels, num_points=len(labels))
    # Images of equal confidence are kept or rejected together, so the kept fraction may be larger
    # than the requested fraction.
    points = np.searchsorted(curve["coverage"], np.array(_KEPT) - 1e-12)
    return {
        "curve": calibration.coverage(probabilities, labels),
        "points": [
            {key: values[point] for key, values in curve.items()}
            for point in dict.fromkeys(points.tolist())
        ],
    }


def mistakes(run: Measurements) -> Figures:
    """Selects test images with confident wrong predictions or uncertain correct predictions."""
    network = run.need_network()
    probabilities, labels = network.probabilities["test"], network.labels("test")
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == labels

    def examples_by(rows: Int[np.ndarray, " _"], order: np.ndarray, number: int) -> list[Figures]:
        chosen = rows[np.argsort(order[rows], kind="stable")][:number]
        return [example(network, "test", row) for row in chosen.tolist()]

    threshold = verdicts.sure_threshold(probabilities.shape[1])
    return {
        "wrong": examples_by(np.flatnonzero(~is_right), -confidence, NUM_WRONG),
        "num_wrong": int((~is_right).sum()),
        "sure_threshold": threshold,
        "num_sure": int((~is_right & (confidence >= threshold)).sum()),
        "unsure": examples_by(np.flatnonzero(is_right), confidence, NUM_UNSURE),
        "num_right": int(is_right.sum()),
    }


def suspected_labels(run: Measurements) -> Figures:
    """Finds validation and test images whose label is probably wrong, and suggests other labels."""
    network = run.need_network()
    splits = ("validation", "test")
    labels = np.concatenate([network.labels(split) for split in splits])
    probabilities = np.concatenate([network.probabilities[split] for split in splits])
    found = label_errors.find(probabilities, labels)
    split_rows = [(split, row) for split in splits for row in range(len(network.labels(split)))]
    positions = np.concatenate([network.dataset.splits[split] for split in splits])
    return {
        "suspected": len(found.rows),
        "of": len(labels),
        "share": len(found.rows) / len(labels),
        "credible": len(found.rows) <= _CREDIBLE * len(labels),
        "examples": [
            example(network, *split_rows[row], predicted=suggested)
            for row, suggested in zip(
                found.rows[:NUM_SUSPECTS].tolist(), found.suggested.tolist(), strict=False
            )
        ],
        # The ids of all suspected images, the most suspicious image first.
        "ids": [network.source.ids[i] for i in positions[found.rows]],
    }


def augmentation(run: Run) -> Figures:
    """Returns the parameter ranges of the augmentation, and the classes of the example images."""
    batch, _ = training_images(run)
    names = run.need_network().class_names
    ranges = run.settings.augmentation
    return {
        **dataclasses.asdict(ranges),
        "is_off": ranges.is_identity(),
        "description": ranges.describe(),
        "classes": [names[label] for label in batch["label"]],
    }


def training_images(run: Run) -> tuple[pipeline.NumpyBatch, pipeline.NumpyBatch]:
    """Returns the first images of the first training batch, before and after augmentation.

    The images are augmented on the host. Training on an accelerator rounds some grey levels
    differently.
    """
    network, settings = run.need_network(), run.settings

    def first_batch(ranges: pipeline.Augmentation) -> pipeline.NumpyBatch:
        stream = pipeline.training_batches(
            network.dataset.loader,
            network.dataset.splits["train"],
            batch_size=settings.batch_size,
            augmentation=ranges,
            place="host",
            seed=settings.seed,
            balanced=settings.balanced,
            rows=np.arange(min(settings.batch_size, NUM_AUGMENTED)),
        )
        with stream as batches:
            return next(batches)

    return first_batch(pipeline.Augmentation()), first_batch(settings.augmentation)


def facts(run: Run) -> Figures:
    """Returns the configuration, data, time and library versions of a run."""
    settings = run.settings
    seconds = math.fsum(record["seconds"] for record in run.history)
    figures = common_facts(run) | {
        "source": settings.source,
        "network": settings.model,
        "image_size": list(settings.image_size),
        "precision": settings.precision,
        "epochs": len(run.history),
        "epochs_wanted": settings.epochs,
        "configuration": run.config,
        "mixing": settings.mixing.describe(),
        "seconds": seconds,
        "duration": texts.duration(seconds),
    }
    if run.pretrained:
        names = ("source", "license", "sha256")
        figures["pretrained"] = {name: str(run.pretrained.get(name, "")) for name in names}
    if run.history:
        rates = [record["images_per_second"] for record in run.history]
        figures["images_per_second"] = float(np.median(rates))
    if run.network is not None:
        predictor = run.network.need_single()
        figures["parameters"] = count_parameters(
            predictor.model, predictor.preprocessing.image_size
        )
    return figures


def common_facts(run: Measurements) -> Figures:
    """Returns the facts that the reports of runs and of ensembles have in common."""
    figures: Figures = {
        "name": run.workdir.resolve().name,
        "folder": str(run.workdir),
        "versions": run.versions,
        "made_by": f"cnn_jax {cnn_jax.__version__}",
        "images": {split: run.figures[split]["count"] for split in SPLITS if split in run.figures},
        "warnings": [],
    }
    if run.network is not None:
        dataset = run.network.dataset
        figures |= {
            "classes": len(run.network.class_names),
            "fingerprint": dataset.fingerprint,
            "warnings": dataset.findings.warnings(),
        }
    return figures


# Maps the names of sections in metrics.json to the functions that compute the sections. The
# reports of runs and of ensembles have these sections.
COMMON: dict[str, Callable[[Measurements], Figures]] = {
    "guessing": guessing,
    "confusion": confusion,
    "calibration": calibration_section,
    "coverage": coverage,
    "mistakes": mistakes,
    "label_errors": suspected_labels,
}
# The sections of the report of a run only.
RUN_ONLY: dict[str, Callable[[Run], Figures]] = {"curves": curves, "augmentation": augmentation}


def examples(figures: object) -> list[Figures]:
    """Finds all image descriptions in a section, at any depth of nesting.

    The function `example` makes these descriptions.
    """
    if isinstance(figures, dict):
        if "picture" in figures:
            return [figures]
        figures = list(figures.values())
    if isinstance(figures, list):
        return [found for part in figures for found in examples(part)]
    return []
