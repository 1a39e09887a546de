"""The compression of a bundle: pruning, then training in a new run."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cnn_jax.compress import prune
from cnn_jax.config import files, schema
from cnn_jax.config.resolve import bundle_values
from cnn_jax.config.schema import Config, default_config
from cnn_jax.data import Track
from cnn_jax.data.dataset import Dataset, check_trainable
from cnn_jax.data.sources import absolute
from cnn_jax.inference.bundle import Bundle, digest, find_bundle, read_bundle, write_bundle
from cnn_jax.inference.evaluation import (
    evaluate,
    evenly_spaced,
    image_batches,
    open_as_trained,
)
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.models.network import count_parameters, forward_flops
from cnn_jax.system.atomic import write_text
from cnn_jax.system.console import Console
from cnn_jax.system.errors import ConfigError
from cnn_jax.training import run_directory
from cnn_jax.training.loop import train_and_evaluate

# The number of training images that determine the importance of channels.
_IMPORTANCE_IMAGES = 1024
_SPLITS = ("validation", "test")
# The only key of the section `model` that the user can set.
_DROPOUT = "model.dropout"
# The keys whose automatic values depend on the machine.
_AUTOMATIC = frozenset({"precision", "augment.place", "train.steps_per_execution"})
# The files of a compression in the folder of its run.
_RECORD, _NARROWED = "compress.json", "narrowed"


def compress(
    bundle: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    keep: float,
    *,
    epochs: int = 6,
    source: str | None = None,
    recipe: str | None = None,
    overrides: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> tuple[Config, dict[str, Any]]:
    """Removes the least important channels of a network, and trains the smaller network.

    The same call with the same folder resumes an interrupted run.

    Args:
      bundle: A bundle, or a run that has a bundle.
      workdir: The folder of the new run, which has the files of a training run. Its folder
        "narrowed" is the bundle with which training starts, and compress.json is the record.
      keep: The largest number of operations of the new network, as a fraction of the original
        number; above 0, at most 1.
      epochs: The number of epochs.
      source: The training data of the bundle, if it was moved.
      recipe: A configuration for the training, as for `--config`. By default, it is the
        configuration of the bundle's run, or the default configuration if the bundle has no run.
      overrides: New values of configuration keys, as text, by key.
      console: Shows the progress.

    Returns:
      The configuration of the run, and the record: "before", "narrowed" and "after" have the
      parameters, the operations per image ("flops") and the accuracies by split.

    Raises:
      ConfigError: The network cannot be pruned, a key is wrong or cannot be set, the bundle was
        trained on other data, or the folder is in use.
      BundleError: There is no bundle, or the bundle is damaged.
      DataError: The data cannot be used.
      TrainingError: Training cannot continue.
      Interrupted: The run was saved and stopped.
    """
    console = console or Console()
    overrides = overrides or {}
    workdir, path = pathlib.Path(workdir), find_bundle(bundle)
    original = read_bundle(path)
    is_pretrained = bool(original.model.get("pretrained"))
    if is_pretrained:
        # Training starts with the narrowed network, not with the pretrained weights.
        original = dataclasses.replace(original, model={**original.model, "pretrained": ""})
    prune.widths(original.model)  # Raises ConfigError if the network cannot be pruned.
    if path.resolve().is_relative_to(workdir.resolve()):
        raise ConfigError(f"--workdir: {workdir} contains the bundle; use another folder")
    source = absolute(source or original.data["source"])
    previous = run_directory.read_config(workdir)
    fixed = _fixed_values(original, source, epochs) | {
        # A run that was moved does not need its initial weights again.
        "checkpoint.init_from": (previous or {}).get(
            "checkpoint.init_from", str(workdir / _NARROWED)
        )
    }
    if wrong := sorted((fixed.keys() - {_DROPOUT}) & overrides.keys()):
        raise ConfigError(f"config.{wrong[0]}: cannot be set, because compress determines it")
    config = _load_recipe(recipe, path, overrides)
    with config.ignore_type(), config.unlocked():
        dropout = config.model.get("dropout")
        config.model = default_config(original.model["name"]).model
        config.update_from_flattened_dict(fixed)
        if _DROPOUT in overrides:
            config.model.dropout = dropout
    schema.validate(config, jax.device_count())
    made_from = {"bundle_sha256": digest(path), "keep": keep}
    if previous is None:
        run_directory.check_apart(workdir, source)
        with run_directory.lock(workdir):
            record = made_from | _narrow(original, workdir, source, keep, console.track)
            write_text(workdir / _RECORD, json.dumps(record, indent=1) + "\n")
    else:
        record = _read_record(workdir, made_from)
    for line in describe(record):
        console.print(line)
    model = _narrowed_section(original, record["channels"], keep)
    if _DROPOUT in overrides:
        del model["dropout"]
    with config.ignore_type(), config.unlocked():
        config.model.update_from_flattened_dict(schema.flat(model))
        if is_pretrained and "optimizer.l2" not in overrides:
            # With pretrained weights, the L2 penalty was on the kernel of the head only. The
            # narrowed network has no pretrained weights, so the penalty would be on all kernels.
            config.optimizer.l2 = 0.0
    report = train_and_evaluate(config, workdir, console)
    after = {name: record["narrowed"][name] for name in ("parameters", "flops")} | {
        split: report[split]["accuracy"] for split in _SPLITS if split in report
    }
    return config, record | {"after": after}


def describe(record: Mapping[str, Any]) -> list[str]:
    """Returns a table of the networks in the record of a compression, one line each."""
    lines = []
    for name in ("before", "narrowed", "after"):
        if name not in record:
            continue
        values = record[name]
        accuracies = "".join(
            f", {split} accuracy {values[split]:.2%}" for split in _SPLITS if split in values
        )
        lines.append(
            f"{name:12}{values['parameters']:,} parameters, {values['flops'] / 1e6:,.2f} MFLOP an "
            f"image{accuracies}"
        )
    return lines


def _narrow(
    original: Bundle, workdir: pathlib.Path, source: str, keep: float, track: Track
) -> dict[str, Any]:
    """Writes the bundle of the pruned network; returns its record.

    The record has the numbers of the network before pruning ("before") and after ("narrowed").
    """
    predictor = BundlePredictor(original)
    dataset = open_as_trained(predictor, source, track)
    check_trainable(dataset)
    if dataset.fingerprint != original.data["fingerprint"]:
        # Other data has other splits, so the network could be trained on former test images.
        raise ConfigError(
            f"--source: {source} is not the data that the bundle was trained on; to train on other "
            "data, use cnn_jax train --config.checkpoint.init_from=BUNDLE"
        )
    size = original.preprocessing.image_size
    widths = prune.choose_widths(
        original.model, len(original.class_names), size, keep, original.precision
    )
    scores = prune.importance(
        predictor.model,
        predictor.variables,
        original.preprocessing,
        _labelled_batches(dataset, track),
    )
    channels = prune.most_important(scores, widths)
    narrowed = dataclasses.replace(
        original,
        model=_narrowed_section(original, channels, keep),
        variables=prune.narrow(predictor.model, original.variables, channels),
        metrics={},
    )
    record = {
        name: _measure(BundlePredictor(bundle), dataset, track)
        for name, bundle in (("before", original), ("narrowed", narrowed))
    }
    write_bundle(narrowed, workdir / _NARROWED)
    return record | {"channels": {name: kept.tolist() for name, kept in channels.items()}}


def _narrowed_section(
    original: Bundle, channels: Mapping[str, Sequence[int] | np.ndarray], keep: float
) -> dict[str, Any]:
    """Returns the section `model` of the narrowed network; `channels` are those that it keeps."""
    section = prune.with_widths(
        original.model, {stage: len(kept) for stage, kept in channels.items()}
    )
    # A smaller network overfits less; no gain was measured (one seed, experiments/RESULTS.md).
    return section | {"dropout": round(keep * section["dropout"], 3)}


def _labelled_batches(dataset: Dataset, track: Track) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of training images, and their classes."""
    chosen = evenly_spaced(dataset.splits["train"], _IMPORTANCE_IMAGES)
    labels = dataset.source.labels[chosen]
    for images in image_batches(dataset.loader, chosen, track, "ranking channels"):
        yield images, labels[: len(images)]
        labels = labels[len(images) :]


def _measure(predictor: BundlePredictor, dataset: Dataset, track: Track) -> dict[str, Any]:
    """Returns the parameter count, the operations per image and the accuracies of a network."""
    size = predictor.preprocessing.image_size
    return {
        "parameters": count_parameters(predictor.model, size),
        "flops": forward_flops(predictor.model, size),
        **{
            split: evaluate(predictor, dataset, split, track)["accuracy"]
            for split in _SPLITS
            if len(dataset.splits[split])
        },
    }


def _read_record(workdir: pathlib.Path, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the record of an earlier call with the same folder.

    Args:
      workdir: The folder of a run.
      made_from: The values of the record that must be the same.

    Raises:
      ConfigError: The folder has another run, or the bundle or --keep has changed.
    """
    try:
        record = json.loads((workdir / _RECORD).read_text(encoding="utf-8"))
        same = {key: record[key] for key in made_from} == made_from
    except FileNotFoundError as error:
        raise ConfigError(
            f"--workdir: {workdir} has a run that is not a compression; use another folder"
        ) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--workdir: {workdir / _RECORD} cannot be read: {error!r}; use another folder"
        ) from error
    if not same:
        raise ConfigError(
            f"--workdir: {workdir} has the compression of another bundle or with another --keep; "
            "use another folder"
        )
    return record


def _load_recipe(recipe: str | None, bundle: pathlib.Path, overrides: Mapping[str, str]) -> Config:
    """Reads the configuration for the training; see `compress`."""
    own = bundle.parent / "config.json"
    if recipe is not None or bundle.name != "bundle" or not own.is_file():
        return files.load(recipe or "default", overrides)
    config = files.load(str(own), overrides)
    # The bundle's run may have resolved automatic values on another machine.
    automatic = {key: schema.keys()[key].default for key in _AUTOMATIC - overrides.keys()}
    with config.ignore_type():
        config.update_from_flattened_dict(automatic)
    return config


def _fixed_values(bundle: Bundle, source: str, epochs: int) -> dict[str, Any]:
    """Returns the values of the configuration keys that the compression determines, by key.

    Args:
      bundle: The original network.
      source: The training data.
      epochs: The number of epochs.
    """
    return bundle_values(bundle) | {
        # The run has the splits of the bundle, so no test image is used for training.
        "seed": bundle.data["division"]["seed"],
        "data.split_seed": -1,
        "data.source": source,
        "checkpoint.restore_step": 0,
        "train.epochs": epochs,
        "train.from_stage": "",
        "train.probe": False,
        "optimizer.decay_epochs": 0,
    }
