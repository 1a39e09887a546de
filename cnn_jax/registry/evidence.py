"""Compares two versions of a model on the same test images, as evidence for a promotion."""

import dataclasses
import tempfile

import numpy as np
from jaxtyping import Bool

from cnn_jax.data import Track, no_track
from cnn_jax.data.sources import absolute
from cnn_jax.inference.evaluation import labelled_split, open_as_trained, predict_split
from cnn_jax.inference.exported import load_predictor
from cnn_jax.inference.predictor import TrainedPredictor
from cnn_jax.quality.noninferiority import compare
from cnn_jax.registry.ledger import Evidence, Version
from cnn_jax.registry.registry import Registry
from cnn_jax.system.errors import DataError


def compare_versions(
    registry: Registry,
    candidate: Version,
    alias: str,
    source: str,
    margin: float,
    split: str = "test",
    track: Track = no_track,
) -> Evidence:
    """Measures two versions on the same images, and tests whether the first is not worse.

    Args:
      registry: The registry of the versions.
      candidate: The version to promote.
      alias: An alias; the candidate is compared with its version, the reference.
      source: The name of a source.
      margin: The difference in accuracy that is still accepted, above 0 and below 1.
      split: "test": the images that are in the test split of both versions; "all": all images.
      track: Shows progress.

    Returns:
      The evidence; see `noninferiority.compare`.

    Raises:
      UserError: A version or the data cannot be used, the data has a class that a version does not
        know, there are no images to compare, or the split "all" is training data.
    """
    reference = registry.resolve(candidate.model, alias)
    measured = []
    for version in (reference, candidate):
        with tempfile.TemporaryDirectory(prefix="cnn_jax-") as directory:
            predictor = load_predictor(registry.fetch(version, directory))
        measured.append(_measure(predictor, source, split, f"measuring {version}", track))
    (old_correct, _), (new_correct, labels) = measured
    ids = [one for one in new_correct if one in old_correct]
    if not ids:
        raise DataError(f"{source} has no image that is in the {split} split of both versions")
    class_names = sorted({labels[one] for one in ids})
    result = compare(
        np.array([new_correct[one] for one in ids]),
        np.array([old_correct[one] for one in ids]),
        np.array([class_names.index(labels[one]) for one in ids]),
        class_names,
        margin,
    )
    return Evidence(
        candidate=candidate.number,
        alias=alias,
        reference=reference.number,
        source=absolute(source),
        split=split,
        **dataclasses.asdict(result),
    )


def _measure(
    predictor: TrainedPredictor, source: str, split: str, description: str, track: Track
) -> tuple[dict[str, bool], dict[str, str]]:
    """Returns whether each image of a split is classified correctly, and its class, by image id."""
    dataset = open_as_trained(predictor, source, track, grouped=split != "all")
    trained_on = predictor.data["fingerprint"], predictor.data["source"]
    if split == "all" and (
        dataset.fingerprint == trained_on[0] or dataset.source.name == trained_on[1]
    ):
        raise DataError(
            f"{source} is the data that a version was trained on: compare with --split=test, or on "
            "images that are new to both versions"
        )
    indices, labels = labelled_split(predictor, dataset, split)
    probabilities = predict_split(predictor, dataset.loader, indices, track, description)
    correct: Bool[np.ndarray, " n"] = probabilities.argmax(axis=1) == labels
    ids = [dataset.source.ids[index] for index in indices]
    names = [predictor.class_names[label] for label in labels]
    return dict(zip(ids, correct.tolist(), strict=True)), dict(zip(ids, names, strict=True))
