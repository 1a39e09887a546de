"""Compares two versions of a model on the same test images, as evidence for a promotion."""

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from cnn_jax.data import Track, no_track
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.sources import absolute
from cnn_jax.inference.evaluation import labelled_split, open_as_trained, predict_split
from cnn_jax.inference.exported import load_predictor
from cnn_jax.inference.predictor import TrainedPredictor
from cnn_jax.quality.noninferiority import compare
from cnn_jax.registry.ledger import Evidence, Version
from cnn_jax.registry.registry import Registry
from cnn_jax.system.errors import BundleError, ConfigError, DataError

logger = logging.getLogger(__name__)


class NotComparedError(DataError):
    """Raised if the present version of an alias cannot predict the images of a comparison."""


@dataclasses.dataclass(frozen=True)
class _Measured:
    """The predictions of a version for the images of a split.

    Attributes:
      version: The version.
      is_correct: Whether each image is classified correctly, by the id of the image.
      labels: The class of each image, by the same ids.
      logged: The ids of the images that are from a request log.
    """

    version: Version
    is_correct: dict[str, bool]
    labels: dict[str, str]
    logged: set[str]


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
    measured, opened = [], None
    for version in (registry.resolve(candidate.model, alias), candidate):
        opened = _open(registry, version, source, split, track, opened)
        measured.append(_measure(version, *opened, split, track))
    old, new = measured
    return _compare(new, old, alias, source, margin, split)


def compare_with_history(
    registry: Registry,
    candidate: Version,
    alias: str,
    source: str,
    dataset: Dataset,
    margin: float,
    earlier: Sequence[int] = (),
    track: Track = no_track,
) -> Evidence:
    """Compares a version with the version of an alias, and with the best of earlier versions.

    A version that is worse than the present one by less than the margin may pass. Without the
    second comparison, such small losses could add up. The best version is the one with the largest
    accuracy on the test images that it shares with the candidate. An earlier version that cannot
    predict the data, because it is damaged or has other classes, is left out with a warning.

    The caller guarantees that no version was trained on images of the test split.

    Args:
      registry: The registry of the versions.
      candidate: The version to promote.
      alias: An alias.
      source: The name of a source.
      dataset: The source, divided as the training data of the candidate.
      margin: The difference in accuracy that is still accepted, above 0 and below 1.
      earlier: The numbers of the earlier versions.
      track: Shows progress.

    Returns:
      The comparison with the version of the alias. Its field `best` is the comparison with the best
      version, unless this is the same version.

    Raises:
      NotComparedError: The version of the alias cannot predict the images.
      UserError: See `compare_versions`.
    """
    opened = _load(registry, candidate), dataset
    new = _measure(candidate, *opened, "test", track, warn=False)
    current = registry.resolve(candidate.model, alias)
    found = {}
    for number in (current.number, *earlier):
        version = registry.resolve(candidate.model, number)
        try:
            own = _open(registry, version, source, "test", track, opened)
            old = _measure(version, *own, "test", track, warn=False)
            found[number] = _compare(new, old, alias, source, margin, "test")
        except (BundleError, ConfigError, DataError) as error:
            if number == current.number:
                raise NotComparedError(f"{version} cannot be compared: {error}") from error
            logger.warning("%s is not compared: %s", version, error)
    # The first of equal versions, which is the present one.
    best = max(found.values(), key=lambda one: one.reference_correct / one.images)
    if best.reference == current.number:
        return best
    return dataclasses.replace(found[current.number], best=best)


def _compare(
    new: _Measured, old: _Measured, alias: str, source: str, margin: float, split: str
) -> Evidence:
    """Compares two versions on the images that both have predicted."""
    ids = [one for one in new.is_correct if one in old.is_correct]
    if not ids:
        raise DataError(f"{source} has no image that is in the {split} split of both versions")

    def compare_on(ids: Sequence[str]) -> Evidence:
        class_names = sorted({new.labels[one] for one in ids})
        result = compare(
            np.array([new.is_correct[one] for one in ids]),
            np.array([old.is_correct[one] for one in ids]),
            np.array([class_names.index(new.labels[one]) for one in ids]),
            class_names,
            margin,
        )
        return Evidence(
            candidate=new.version.number,
            alias=alias,
            reference=old.version.number,
            source=absolute(source),
            split=split,
            **dataclasses.asdict(result),
        )

    evidence, others = compare_on(ids), [one for one in ids if one not in new.logged]
    # The labels of logged images may have been chosen by the answers of a version.
    if 0 < len(others) < len(ids):
        evidence = dataclasses.replace(evidence, without_log=compare_on(others))
    return evidence


def _load(registry: Registry, version: Version) -> TrainedPredictor:
    with tempfile.TemporaryDirectory(prefix="cnn_jax-") as directory:
        return load_predictor(registry.fetch(version, directory))


def _open(
    registry: Registry,
    version: Version,
    source: str,
    split: str,
    track: Track,
    opened: tuple[TrainedPredictor, Dataset] | None = None,
) -> tuple[TrainedPredictor, Dataset]:
    """Returns the predictor of a version, and the source as its training data was divided.

    Args:
      registry: The registry of the version.
      version: The version.
      source: The name of the source.
      split: The split that is compared.
      track: Shows progress.
      opened: Another predictor and its data set, which is used if it would be the same.
    """
    predictor = _load(registry, version)
    if opened is not None and _opens_as(predictor) == _opens_as(opened[0]):
        dataset = opened[1]
    else:
        dataset = open_as_trained(predictor, source, track, grouped=split != "all")
    trained_on = predictor.data["fingerprint"], predictor.data["source"]
    if split == "all" and (
        dataset.fingerprint == trained_on[0] or dataset.source.name == trained_on[1]
    ):
        raise DataError(
            f"{source} is the data that a version was trained on: compare with --split=test, or on "
            "images that are new to both versions"
        )
    return predictor, dataset


def _opens_as(predictor: TrainedPredictor) -> tuple[Any, ...]:
    """Returns the values that determine how `open_as_trained` opens a source for a predictor."""
    keys = ("division", "max_unreadable", "allow_outside")
    return predictor.preprocessing, *(predictor.data[key] for key in keys)


def _measure(
    version: Version,
    predictor: TrainedPredictor,
    dataset: Dataset,
    split: str,
    track: Track,
    warn: bool = True,
) -> _Measured:
    """Predicts the images of a split; `warn` is whether to warn of training images."""
    indices, labels = labelled_split(predictor, dataset, split, warn=warn)
    probabilities = predict_split(predictor, dataset.loader, indices, track, f"measuring {version}")
    is_correct = (probabilities.argmax(axis=1) == labels).tolist()
    source = dataset.source
    ids = [source.ids[index] for index in indices]
    names = [predictor.class_names[label] for label in labels]
    logged = np.zeros(len(source), bool) if source.logged is None else source.logged
    return _Measured(
        version,
        is_correct=dict(zip(ids, is_correct, strict=True)),
        labels=dict(zip(ids, names, strict=True)),
        logged={source.ids[index] for index in indices if logged[index]},
    )
