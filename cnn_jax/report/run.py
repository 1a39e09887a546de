"""Reads the files of a run or an ensemble for the report."""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cnn_jax.data import Track
from cnn_jax.data.augment import Augmentation
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.mix import Mixing
from cnn_jax.data.source import Source
from cnn_jax.data.splits import SPLITS
from cnn_jax.inference import bundle as bundles
from cnn_jax.inference.bundle import read_bundle, read_networks
from cnn_jax.inference.ensemble import EnsemblePredictor
from cnn_jax.inference.evaluation import open_as_trained, predict_split, score
from cnn_jax.inference.predictor import BundlePredictor, TrainedPredictor
from cnn_jax.system.errors import ConfigError, DataError, UserError

# Increase this number when the meaning of a section of metrics.json changes.
FORMAT = 3
_SPLIT_KEYS = {
    *("accuracy", "precision", "recall", "f1", "loss", "count"),
    *("confidence_intervals", "per_class", "confusion"),
}
_EPOCH_KEYS = (
    *("epoch", "step", "seconds", "images_per_second", "learning_rate"),
    *(f"{split}_{key}" for split in ("train", "validation") for key in ("loss", "accuracy")),
)


class MissingError(Exception):
    """Raised if a section of the report cannot be created; the message gives the reason."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The parts of a run's configuration that the report uses.

    `dropout` is None if the network has no such key.
    """

    source: str
    image_size: tuple[int, ...]
    model: str
    dropout: float | None
    precision: str
    epochs: int
    monitor: str
    seed: int
    batch_size: int
    balanced: bool
    augmentation: Augmentation
    mixing: Mixing

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Creates the settings from the content of config.json.

        Raises:
          KeyError: A key is missing.
          TypeError: The content is not a configuration.
        """
        data, train, augment = config["data"], config["train"], config["augment"]
        return cls(
            source=data["source"],
            image_size=tuple(data["image_size"]),
            model=config["model"]["name"],
            dropout=config["model"].get("dropout"),
            precision=config["precision"],
            epochs=train["epochs"],
            monitor=train["monitor"],
            seed=config["seed"],
            batch_size=train["batch_size"],
            balanced=train["balance"] == "sampling",
            augmentation=Augmentation.from_config(augment),
            mixing=Mixing.from_config(augment),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """The trained network or ensemble, the data and the predictions of a report.

    Attributes:
      predictor: The loaded bundle or ensemble.
      dataset: The data that the network was trained on, with the same splits.
      probabilities: The probabilities of each predicted split; images are in the order of the
        split.
    """

    predictor: BundlePredictor | EnsemblePredictor
    dataset: Dataset
    probabilities: Mapping[str, Float[np.ndarray, "_ classes"]]

    @property
    def source(self) -> Source:
        return self.dataset.source

    @property
    def class_names(self) -> list[str]:
        return self.predictor.class_names

    def labels(self, split: str) -> Int[np.ndarray, " _"]:
        return self.source.labels[self.dataset.splits[split]]

    def need_single(self) -> BundlePredictor:
        """Returns the predictor; raises MissingError if it is an ensemble."""
        if isinstance(self.predictor, EnsemblePredictor):
            raise MissingError(
                "Explanations need a single network. cnn_jax explain explains a member of the "
                "ensemble, whose bundle is in the folder members/0."
            )
        return self.predictor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Measurements:
    """The part of a report that runs and ensembles have in common.

    Attributes:
      workdir: The folder of the run or the ensemble.
      figures: The content of report/metrics.json. It has the metrics of each split that were
        stored or can be computed, and the sections of an earlier report of the same network.
      versions: The versions of the libraries that wrote the bundle; empty without a bundle.
      network: The trained network; None if the bundle or its data cannot be used.
      why_no_network: A sentence with the reason if `network` is None.
    """

    workdir: pathlib.Path
    figures: dict[str, Any]
    versions: dict[str, str]
    network: Network | None
    why_no_network: str

    def need_network(self) -> Network:
        """Returns the trained network; raises MissingError if `network` is None."""
        if self.network is None:
            raise MissingError(self.why_no_network)
        return self.network

    def is_measured(self) -> bool:
        """Returns whether the metrics of all splits are known."""
        return all(split in self.figures for split in SPLITS)

    def need_figures(self, split: str) -> dict[str, Any]:
        """Returns the metrics of a split; raises MissingError if the metrics are missing."""
        if split not in self.figures:
            raise MissingError(self.why_no_network)
        return self.figures[split]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Run(Measurements):
    """The content of a run's folder.

    Attributes:
      config: The content of config.json.
      settings: The parts of the configuration that the report uses.
      history: The complete records of metrics.jsonl, one for each epoch.
      damaged_records: The number of damaged records.
      pretrained: The content of pretrained.json: the weights with which the run started; empty
        for random weights.
    """

    config: dict[str, Any]
    settings: Settings
    history: list[dict[str, Any]]
    damaged_records: int
    pretrained: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Ensemble(Measurements):
    """The content of an ensemble's folder.

    Attributes:
      predictor: The loaded ensemble.
    """

    predictor: EnsemblePredictor


def read_folder(workdir: pathlib.Path, track: Track, source: str | None = None) -> Run | Ensemble:
    """Reads the folder of a run or an ensemble, opens its data, and predicts its splits.

    The training split is predicted only if its metrics are not stored. Missing data, or a missing
    bundle of a run, is an error only if `source` is given. Without `source`, the run may have been
    stopped, or its data may have been moved.

    Args:
      workdir: The folder of the run or the ensemble.
      track: Shows progress.
      source: The name of the data if it was moved; by default the name in the bundle.

    Raises:
      BundleError: The ensemble is damaged.
      ConfigError: The folder is neither of a run nor of an ensemble, or `source` is not a source's
        name.
      DataError: `source` cannot be read, or is not the data that the network was trained on.
    """
    description = _read_json(workdir / "bundle.json")
    if "ensemble" in description and "export" not in description:
        return _read_ensemble(workdir, description, track, source)
    return read_run(workdir, track, source)


def _read_ensemble(
    workdir: pathlib.Path, description: dict[str, Any], track: Track, source: str | None
) -> Ensemble:
    """Reads the folder of an ensemble, whose bundle.json has the content `description`."""
    contents = read_networks(workdir)
    assert isinstance(contents, bundles.Ensemble)
    predictor = EnsemblePredictor(contents)
    figures = _read_figures(workdir)
    network, reason = None, ""
    try:
        network = _open_network(predictor, figures, track, source)
    except MissingError as missing:
        reason = str(missing)
    return Ensemble(
        workdir=workdir,
        figures=figures,
        versions=description["versions"],
        network=network,
        why_no_network=reason,
        predictor=predictor,
    )


def read_run(workdir: pathlib.Path, track: Track, source: str | None = None) -> Run:
    """Reads the folder of a run; see `read_folder`."""
    config = _read_config(workdir / "config.json")
    try:
        settings = Settings.from_config(config)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"--run: {workdir / 'config.json'} is not the configuration of a run of this version: "
            f"{error!r}"
        ) from error
    history, damaged_records = _read_history(workdir / "metrics.jsonl")
    figures = _read_figures(workdir)
    network, reason = None, ""
    try:
        network = _open_network(_open_bundle(workdir), figures, track, source)
    except MissingError as missing:
        reason = str(missing)
    return Run(
        workdir=workdir,
        config=config,
        settings=settings,
        history=history,
        damaged_records=damaged_records,
        figures=figures,
        versions=_read_json(workdir / "bundle" / "bundle.json").get("versions", {}),
        pretrained=_read_json(workdir / "pretrained.json"),
        network=network,
        why_no_network=reason,
    )


def _read_config(path: pathlib.Path) -> Any:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        is_bundle = (path.parent / "bundle.json").is_file()
        advice = "; cnn_jax evaluate measures a bundle" * is_bundle
        raise ConfigError(
            f"--run: {path.parent} is not the folder of a run or an ensemble: there is no "
            f"{path.name}{advice}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run: {path} cannot be read: {error}") from error
    return config


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object from a file; returns {} if the file is missing or has no JSON object."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _read_figures(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the usable part of report/metrics.json; returns {} if there is none."""
    figures = _read_json(workdir / "report" / "metrics.json")
    if figures.get("format") != FORMAT or not all(_are_figures(figures.get(s)) for s in SPLITS):
        # Keep only the metrics of the splits, not the report's sections. Sections in another format
        # cannot be shown. If the metrics of a split are missing, the sections may belong to another
        # network.
        figures = {s: figures[s] for s in SPLITS if _are_figures(figures.get(s))}
    return figures


def _read_history(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """Reads the training history from metrics.jsonl.

    Returns:
      The complete records whose numbers are finite, and the number of damaged lines.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [], 0
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and all(_is_finite(record.get(k)) for k in _EPOCH_KEYS):
                records.append(record)
    return records, len(lines) - len(records)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _are_figures(figures: object) -> bool:
    """Returns whether a JSON value contains all metrics of a split in the current format."""
    return isinstance(figures, dict) and figures.keys() >= _SPLIT_KEYS


def _open_bundle(workdir: pathlib.Path) -> BundlePredictor:
    """Opens a run's bundle; raises MissingError if it is missing or cannot be used."""
    if not (workdir / "bundle").is_dir():
        raise MissingError(
            "There is no bundle, because the run is not finished. To continue the run, start it "
            "again with the same command."
        )
    try:
        return BundlePredictor(read_bundle(workdir / "bundle"))
    except UserError as error:
        raise MissingError(f"The bundle cannot be used: {error}.") from error


def _open_network(
    predictor: BundlePredictor | EnsemblePredictor,
    figures: dict[str, Any],
    track: Track,
    source: str | None,
) -> Network:
    """Opens the data of a predictor, and computes the metrics that are missing in `figures`.

    The new metrics are added to `figures`.

    Raises:
      MissingError: The data cannot be used.
      ConfigError: `source` is not the name of a source.
      DataError: `source` cannot be read, or is not the data that the network was trained on.
    """
    try:
        dataset = open_as_trained(predictor, source, track)
        _check_fingerprint(dataset, predictor, is_new_source=source is not None)
        probabilities = {
            split: predict_split(
                predictor, dataset.loader, dataset.splits[split], track, f"looking at {split}"
            )
            for split in SPLITS
            # Predict the training split only if its metrics are missing, because the report shows
            # no predictions of single training images.
            if split != "train" or split not in figures
        }
    except (UserError, OSError) as error:
        if source is not None:
            raise
        raise MissingError(f"The data cannot be read: {error}.") from error
    network = Network(predictor, dataset, probabilities)
    for split, rows in probabilities.items():
        figures.setdefault(split, score(rows, network.labels(split), network.class_names))
    return network


def _check_fingerprint(
    dataset: Dataset, predictor: TrainedPredictor, *, is_new_source: bool
) -> None:
    """Checks that a data set is the data set on which a bundle's network was trained.

    Raises:
      DataError: The data differs, and the user gave its name (`is_new_source`).
      MissingError: The data differs, and its name is from the bundle.
    """
    if dataset.fingerprint == predictor.data["fingerprint"]:
        return
    if is_new_source:
        raise DataError(
            f"--source: {dataset.source.name} is not the data that the network was trained on "
            f"({predictor.data['source']}): its images or classes differ. Name a copy of that "
            "data, or measure the network on other data with cnn_jax evaluate"
        )
    raise MissingError(
        f"{dataset.source.name} has changed since the network was trained on it: images were "
        "added, removed or edited."
    )
