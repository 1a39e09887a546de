"""What a run has left, read for its report."""

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
from cnn_jax.system.errors import ConfigError, UserError

# Raise it when a section of metrics.json means something else.
FORMAT = 2
_SPLIT_KEYS = {
    *("accuracy", "precision", "recall", "f1", "loss", "count"),
    *("confidence_intervals", "per_class", "confusion"),
}
_EPOCH_KEYS = (
    *("epoch", "step", "seconds", "images_per_second", "learning_rate"),
    *(f"{split}_{key}" for split in ("train", "validation") for key in ("loss", "accuracy")),
)


class MissingError(Exception):
    """Why a section of the report has nothing to show, in a sentence."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the report needs of a run's configuration."""

    source: str
    image_size: tuple[int, ...]
    model: str
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
        """From the content of config.json; raises KeyError or TypeError if it is none."""
        data, train, augment = config["data"], config["train"], config["augment"]
        ranges = {name: augment[name] for name in ("flip", "rotation", "zoom", "contrast")}
        return cls(
            source=data["source"],
            image_size=tuple(data["image_size"]),
            model=config["model"]["name"],
            precision=config["precision"],
            epochs=train["epochs"],
            monitor=train["monitor"],
            seed=config["seed"],
            batch_size=train["batch_size"],
            balanced=train["balance"] == "sampling",
            augmentation=Augmentation(**ranges),
            mixing=Mixing.from_config(augment),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """The network that came of a run, and what it says of the images that it was measured on.

    Attributes:
      predictor: The loaded bundle.
      dataset: What it was trained on, divided as then.
      probabilities: By split, of its images in their order.
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
    """What is there of a run.

    Attributes:
      workdir: Its folder.
      config: The content of config.json.
      settings: What the report needs of it.
      history: The records of metrics.jsonl that are complete, one for each epoch.
      damaged_records: How many others there are.
      figures: The content of report/metrics.json: the figures of all splits that are there or
        can be computed, and the sections of an earlier report of the same network.
      versions: Of the libraries that it was trained with; empty without a bundle.
      network: None if it cannot be looked at.
      why_no_network: The reason, in a sentence.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    settings: Settings
    history: list[dict[str, Any]]
    damaged_records: int
    figures: dict[str, Any]
    versions: dict[str, str]
    network: Network | None
    why_no_network: str

    def need_network(self) -> Network:
        """Raises MissingError if there is none."""
        if self.network is None:
            raise MissingError(self.why_no_network)
        return self.network

    def is_measured(self) -> bool:
        """Whether there are figures of all splits."""
        return all(split in self.figures for split in SPLITS)

    def need_figures(self, split: str) -> dict[str, Any]:
        """The figures of a split; raises MissingError if there are none."""
        if split not in self.figures:
            raise MissingError(self.why_no_network)
        return self.figures[split]


def read_run(workdir: pathlib.Path, track: Track, source: str | None = None) -> Run:
    """Reads a run's folder, opens its data, and predicts validation and test.

    What is missing is no error: a run may have been stopped, or its data may have gone.

    Args:
      workdir: The run's folder.
      track: Shows progress.
      source: Where its data is now; by default where it was.

    Raises:
      ConfigError: The folder is not a run's.
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
        # What an earlier report found is of another network, or of another form.
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
        network=network,
        why_no_network=reason,
    )


def _read_config(path: pathlib.Path) -> Any:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"--run: {path.parent} is not the folder of a run: there is no {path.name}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run: {path} cannot be read: {error}") from error
    return config


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """An object, empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _read_history(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """The records that are complete and finite, and how many are not."""
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
    """Whether they are those of a split, as this version writes them."""
    return isinstance(figures, dict) and figures.keys() >= _SPLIT_KEYS


def _open_network(
    workdir: pathlib.Path, figures: dict[str, Any], track: Track, source: str | None
) -> Network:
    """Also adds the figures of splits that are missing.

    Raises:
      MissingError: There is no bundle, or its data is not there.
    """
    if not (workdir / "bundle").is_dir():
        raise MissingError(
            "There is no bundle: the run has not come to its end. The command that started it "
            "goes on with it."
        )
    try:
        predictor = BundlePredictor(read_bundle(workdir / "bundle"))
    except UserError as error:
        raise MissingError(f"The bundle cannot be used: {error}.") from error
    try:
        dataset = open_as_trained(predictor, source, track)
        _check_unchanged(dataset, predictor)
        probabilities = {
            split: predict_split(
                predictor, dataset.loader, dataset.splits[split], track, f"looking at {split}"
            )
            for split in SPLITS
            # What is known of the training images is enough.
            if split != "train" or split not in figures
        }
    except (UserError, OSError) as error:
        raise MissingError(f"The data cannot be read: {error}.") from error
    network = Network(predictor, dataset, probabilities)
    for split, rows in probabilities.items():
        figures.setdefault(split, score(rows, network.labels(split), network.class_names))
    return network


def _check_unchanged(dataset: Dataset, predictor: BundlePredictor) -> None:
    """Raises MissingError if it is not what the bundle was trained on."""
    if dataset.fingerprint != predictor.data["fingerprint"]:
        raise MissingError(
            f"{dataset.source.name} is no longer the data that the network was trained on: "
            "images have been added, removed or changed since."
        )
