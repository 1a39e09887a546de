"""Reads the files of a run for the run's report."""

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
from cnn_jax.inference.bundle import read_bundle
from cnn_jax.inference.evaluation import open_as_trained, predict_split, score
from cnn_jax.inference.predictor import BundlePredictor
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
    """The trained network, the data and the predictions of a run.

    Attributes:
      predictor: The loaded bundle.
      dataset: The data that the network was trained on, with the same splits.
      probabilities: The probabilities of each predicted split; images are in the order of the
        split.
    """

    predictor: BundlePredictor
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


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The content of a run's folder.

    Attributes:
      workdir: The folder.
      config: The content of config.json.
      settings: The parts of the configuration that the report uses.
      history: The complete records of metrics.jsonl, one for each epoch.
      damaged_records: The number of damaged records.
      figures: The content of report/metrics.json. It has the metrics of each split that were
        stored or can be computed, and the sections of an earlier report of the same network.
      versions: The versions of the libraries that trained the network; empty without a bundle.
      pretrained: The content of pretrained.json: the weights with which the run started; empty
        for random weights.
      network: The trained network; None if the bundle or its data cannot be used.
      why_no_network: A sentence with the reason if `network` is None.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    settings: Settings
    history: list[dict[str, Any]]
    damaged_records: int
    figures: dict[str, Any]
    versions: dict[str, str]
    pretrained: dict[str, Any]
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


def read_run(workdir: pathlib.Path, track: Track, source: str | None = None) -> Run:
    """Reads a run's folder, opens the run's data, and predicts the validation and test splits.

    Missing data or a missing bundle is an error only if `source` is given. Without `source`, the
    run may have been stopped, or its data may have been moved.

    Args:
      workdir: The run's folder.
      track: Shows progress.
      source: The name of the run's data if it was moved; by default the name in the bundle.

    Raises:
      ConfigError: The folder is not the folder of a run, or `source` is not a source's name.
      DataError: `source` cannot be read, or is not the data that the network was trained on.
    """
    config = _read_config(workdir / "config.json")
    try:
        settings = Settings.from_config(config)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"--run: {workdir / 'config.json'} is not the configuration of a run of this version: "
            f"{error!r}"
        ) from error
    history, damaged_records = _read_history(workdir / "metrics.jsonl")
    figures = _read_json(workdir / "report" / "metrics.json")
    if figures.get("format") != FORMAT or not all(_are_figures(figures.get(s)) for s in SPLITS):
        # Keep only the metrics of the splits, not the report's sections. Sections in another format
        # cannot be shown. If the metrics of a split are missing, the sections may belong to another
        # network.
        figures = {s: figures[s] for s in SPLITS if _are_figures(figures.get(s))}
    network, reason = None, ""
    try:
        network = _open_network(workdir, figures, track, source)
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
        advice = "; cnn_jax evaluate measures a bundle or an ensemble" * is_bundle
        raise ConfigError(
            f"--run: {path.parent} is not the folder of a run: there is no {path.name}{advice}"
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


def _open_network(
    workdir: pathlib.Path, figures: dict[str, Any], track: Track, source: str | None
) -> Network:
    """Opens a run's bundle and data, and computes the metrics that are missing in `figures`.

    The new metrics are added to `figures`.

    Raises:
      MissingError: The bundle is missing, or the bundle or its data cannot be used.
      ConfigError: `source` is not the name of a source.
      DataError: `source` cannot be read, or is not the data that the network was trained on.
    """
    if not (workdir / "bundle").is_dir():
        raise MissingError(
            "There is no bundle, because the run is not finished. To continue the run, start it "
            "again with the same command."
        )
    try:
        predictor = BundlePredictor(read_bundle(workdir / "bundle"))
    except UserError as error:
        raise MissingError(f"The bundle cannot be used: {error}.") from error
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
    dataset: Dataset, predictor: BundlePredictor, *, is_new_source: bool
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
