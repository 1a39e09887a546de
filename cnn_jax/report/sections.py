"""What the report says of a run: each section a function from the run to JSON types.

A section that cannot be made raises MissingError with the reason. An image that the page is to
show stands in a section as a dictionary of `example`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

import cnn_jax
from cnn_jax.data import pipeline
from cnn_jax.inference import calibration
from cnn_jax.models.network import count_parameters
from cnn_jax.report import charts, label_errors, texts, verdicts
from cnn_jax.report.run import MissingError, Network, Run
from cnn_jax.training.checkpoint import best_record

# How many images are shown of each kind.
NUM_WRONG, NUM_UNSURE, NUM_SUSPECTS, NUM_AUGMENTED = 24, 12, 24, 12
_NUM_PAIRS, _IMAGES_OF_A_PAIR = 10, 3
# Hardly any data set has a larger share of wrong labels: it is the network's that is.
_CREDIBLE = 0.1
# Shares of the test images that are kept when the least confident are refused.
_KEPT = (1.0, 0.95, 0.9, 0.8, 0.5)

Figures = dict[str, Any]


def example(network: Network, split: str, row: int, predicted: int | None = None) -> Figures:
    """What is said of one image; the page shows it with these words.

    Args:
      network: The network.
      split: One that it has probabilities of.
      row: The image's position in the split.
      predicted: The class to name, by default the most probable one.

    Returns:
      "id", "split", "position" in the source, "picture" (the file's name below report/), "true"
      and "predicted" class, and the latter's probability, "confidence".
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


def surest_image(network: Network) -> UInt8[np.ndarray, "height width 3"]:
    """The test image that the network is most confident of, of those that it is right about."""
    probabilities = network.probabilities["test"]
    is_right = probabilities.argmax(axis=1) == network.labels("test")
    row = int((probabilities.max(axis=1) + is_right).argmax())
    position = network.dataset.splits["test"][row : row + 1]
    return network.dataset.loader.load(position)["image"][0]


def guessing(run: Run) -> Figures:
    """How the network compares with always naming the most common class of the training images."""
    return verdicts.guessing(run.need_figures("test"), run.figures.get("train"))


def curves(run: Run) -> Figures:
    """Learning curves, the best epoch, and what they say in words."""
    history = run.history
    best = best_record(history, run.settings.monitor) if history else None
    if best is None:
        raise MissingError("No epoch has been finished, so there is no curve to draw.")
    keys = ("epoch", "learning_rate", "seconds")
    measured = [f"{split}_{key}" for split in ("train", "validation") for key in _CURVES]
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
    return figures | verdicts.training(figures, train, validation)


_CURVES = ("loss", "accuracy")


def confusion(run: Run) -> Figures:
    """The order of the classes in the matrix, and the pairs that are confused most often."""
    if run.network is None and "confusion" in run.figures:
        return run.figures["confusion"]  # Of an earlier report, which has images.
    test = run.need_figures("test")
    names, matrix = list(test["per_class"]), np.array(test["confusion"])
    errors = matrix * (1 - np.eye(len(matrix), dtype=int))
    # Of equal counts, the pair whose true class is the smaller loses more.
    worst = np.lexsort((-charts.row_shares(matrix).ravel(), -errors.ravel()))[:_NUM_PAIRS]
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
                    "examples": _of_pair(run.network, int(true), int(predicted)),
                }
            )
    return {
        "order": charts.confusion_order(matrix),
        "errors": int(errors.sum()),
        "pairs": pairs,
    }


def _of_pair(network: Network | None, true: int, predicted: int) -> list[Figures]:
    """The most confident test images of a class that are taken for another."""
    if network is None:
        return []
    probabilities = network.probabilities["test"]
    is_it = (network.labels("test") == true) & (probabilities.argmax(axis=1) == predicted)
    rows = np.flatnonzero(is_it)
    rows = rows[np.argsort(-probabilities[rows, predicted], kind="stable")]
    return [example(network, "test", int(row)) for row in rows[:_IMAGES_OF_A_PAIR]]


def calibrated(run: Run) -> Figures:
    """How far the test split's probabilities hold, before and after temperature scaling."""
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
    }


def coverage(run: Run) -> Figures:
    """Accuracy of the test images that are kept when the least confident are refused."""
    network = run.need_network()
    probabilities, labels = network.probabilities["test"], network.labels("test")
    every = calibration.coverage(probabilities, labels, num_points=len(labels))
    # Images of equal confidence go together, so that no fewer than wanted are kept.
    points = np.searchsorted(every["coverage"], np.array(_KEPT) - 1e-12)
    return {
        "curve": calibration.coverage(probabilities, labels),
        "points": [
            {key: values[point] for key, values in every.items()}
            for point in dict.fromkeys(points.tolist())
        ],
    }


def mistakes(run: Run) -> Figures:
    """The most confident wrong test images, and the least confident right ones."""
    network = run.need_network()
    probabilities, labels = network.probabilities["test"], network.labels("test")
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == labels

    def shown(rows: Int[np.ndarray, " _"], order: np.ndarray, number: int) -> list[Figures]:
        chosen = rows[np.argsort(order[rows], kind="stable")][:number]
        return [example(network, "test", row) for row in chosen.tolist()]

    threshold = verdicts.sure_threshold(probabilities.shape[1])
    return {
        "wrong": shown(np.flatnonzero(~is_right), -confidence, NUM_WRONG),
        "num_wrong": int((~is_right).sum()),
        "sure_threshold": threshold,
        "num_sure": int((~is_right & (confidence >= threshold)).sum()),
        "unsure": shown(np.flatnonzero(is_right), confidence, NUM_UNSURE),
        "num_right": int(is_right.sum()),
    }


def suspected_labels(run: Run) -> Figures:
    """Validation and test images whose label is probably wrong, and the classes they have."""
    network = run.need_network()
    splits = ("validation", "test")
    labels = np.concatenate([network.labels(split) for split in splits])
    probabilities = np.concatenate([network.probabilities[split] for split in splits])
    found = label_errors.find(probabilities, labels)
    places = [(split, row) for split in splits for row in range(len(network.labels(split)))]
    positions = np.concatenate([network.dataset.splits[split] for split in splits])
    return {
        "suspected": len(found.rows),
        "of": len(labels),
        "share": len(found.rows) / len(labels),
        "credible": len(found.rows) <= _CREDIBLE * len(labels),
        "examples": [
            example(network, *places[row], predicted=suggested)
            for row, suggested in zip(
                found.rows[:NUM_SUSPECTS].tolist(), found.suggested.tolist(), strict=False
            )
        ],
        # All of them, the most suspicious first.
        "ids": [network.source.ids[i] for i in positions[found.rows]],
    }


def augmentation(run: Run) -> Figures:
    """What is drawn, and the classes of the images that show it."""
    batch, _ = training_images(run)
    names = run.need_network().class_names
    ranges = run.settings.augmentation
    return {
        "flip": ranges.flip,
        "rotation": ranges.rotation,
        "zoom": ranges.zoom,
        "contrast": ranges.contrast,
        "is_off": ranges.is_identity(),
        "classes": [names[label] for label in batch["label"]],
    }


def training_images(run: Run) -> tuple[pipeline.NumpyBatch, pipeline.NumpyBatch]:
    """The first images of the first training batch: before and after augmentation.

    Augmented here; on an accelerator the same draws round to other grey levels.
    """
    network, settings = run.need_network(), run.settings

    def first(ranges: pipeline.Augmentation) -> pipeline.NumpyBatch:
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

    return first(pipeline.Augmentation()), first(settings.augmentation)


def facts(run: Run) -> Figures:
    """The run's configuration, data, time and versions."""
    settings = run.settings
    seconds = math.fsum(record["seconds"] for record in run.history)
    figures: Figures = {
        "name": run.workdir.resolve().name,
        "folder": str(run.workdir),
        "source": settings.source,
        "network": settings.model,
        "image_size": list(settings.image_size),
        "precision": settings.precision,
        "epochs": len(run.history),
        "epochs_wanted": settings.epochs,
        "configuration": run.config,
        "mixing": settings.mixing.describe(),
        "warnings": [],
        "seconds": seconds,
        "duration": texts.duration(seconds),
        "versions": run.versions,
        "made_by": f"cnn_jax {cnn_jax.__version__}",
        "images": {
            split: run.figures[split]["count"]
            for split in ("train", "validation", "test")
            if split in run.figures
        },
    }
    if run.history:
        rates = [record["images_per_second"] for record in run.history]
        figures["images_per_second"] = float(np.median(rates))
    if run.network is not None:
        predictor, dataset = run.network.predictor, run.network.dataset
        figures |= {
            "classes": len(predictor.class_names),
            "parameters": count_parameters(predictor.model, predictor.preprocessing.image_size),
            "fingerprint": dataset.fingerprint,
            "warnings": dataset.findings.warnings(),
        }
    return figures


# In the order of the page, by their names in metrics.json.
SECTIONS: dict[str, Callable[[Run], Figures]] = {
    "guessing": guessing,
    "curves": curves,
    "confusion": confusion,
    "calibration": calibrated,
    "coverage": coverage,
    "mistakes": mistakes,
    "label_errors": suspected_labels,
    "augmentation": augmentation,
}


def examples(figures: object) -> list[Figures]:
    """All dictionaries of `example` anywhere in sections."""
    if isinstance(figures, dict):
        if "picture" in figures:
            return [figures]
        figures = list(figures.values())
    if isinstance(figures, list):
        return [found for part in figures for found in examples(part)]
    return []
