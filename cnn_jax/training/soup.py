"""The average of the weights of several short continuations of a run."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from cnn_jax.config import files, schema
from cnn_jax.config.resolve import resolve
from cnn_jax.config.schema import Config
from cnn_jax.data import Track
from cnn_jax.data.dataset import Dataset
from cnn_jax.inference.batching import BATCH_SIZE
from cnn_jax.inference.bundle import Bundle, find_bundle, read_bundle
from cnn_jax.inference.evaluation import evaluate, evenly_spaced, image_batches
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.models.network import make_model, updates_statistics
from cnn_jax.system.atomic import write_text
from cnn_jax.system.console import Console
from cnn_jax.system.errors import ConfigError, DataError
from cnn_jax.training import results, run_directory
from cnn_jax.training.checkpoint import monitored_score
from cnn_jax.training.loop import STATISTICS_IMAGES, open_dataset, train_and_evaluate
from cnn_jax.training.run_directory import INDIFFERENT_KEYS
from cnn_jax.training.step import Statistics, update_statistics


def make_soup(
    run: pathlib.Path,
    workdir: pathlib.Path,
    members: int,
    epochs: int,
    overrides: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains continuations of a run, and writes a bundle with the average of their weights.

    The weights are averaged as in Wortsman et al. 2022, "Model soups", section 2. The
    continuations start from the same weights, so that a line between two of them crosses no
    region of high loss. The same call continues after an interruption.

    Args:
      run: The folder of a finished run.
      workdir: The folder of the continuations and of the result.
      members: The number of continuations, 2 or more.
      epochs: The number of epochs of each continuation.
      overrides: New values of configuration keys for the continuations, as text, by key.
      console: Shows the progress.

    Returns:
      The content of soup.json: "validation" has the monitored metric of the "run" and of the
      "soup"; "is_kept" is whether the bundle has the average, and not the weights of the run;
      "test" is the test accuracy of the bundle.

    Raises:
      ConfigError: There is no run, or a key is wrong or cannot be set.
      BundleError: The run has no bundle, or the bundle is damaged.
      DataError: The data cannot be used, or has changed since the run.
      TrainingError: Training cannot continue.
      Interrupted: A continuation was saved and stopped.
    """
    console, overrides = console or Console(), overrides or {}
    if not (run / "config.json").is_file():
        raise ConfigError(f"--run: {run} is not the folder of a run: it has no config.json")
    original = read_bundle(find_bundle(run))
    _check_output(workdir, run)
    fixed = {
        "data.split_seed": original.data["division"]["seed"],
        "checkpoint.init_from": str(find_bundle(run).resolve()),
        "checkpoint.restore_step": 0,
        "train.epochs": epochs,
        "train.probe": False,
        "optimizer.decay_epochs": 0,
        "report.detail": "none",
        "report.splits": ("validation",),
    }
    for key in sorted(overrides):
        # Other splits would let the continuations see the test images of the run.
        is_fixed = key.startswith(("data.", "model.")) and key not in INDIFFERENT_KEYS
        if key in ("seed", *fixed) or is_fixed:
            raise ConfigError(
                f"config.{key}: cannot be set, because soup determines it or takes it from the run"
            )
    config = files.load(str(run / "config.json"), overrides)
    with config.ignore_type():
        config.update_from_flattened_dict(fixed)
    if config.model.get("pretrained"):
        # A run starts from one bundle only, and the L2 penalty of pretrained networks is on the
        # kernel of the head only.
        config.model.pretrained, config.optimizer.l2 = "", 0.0
    run_directory.check_apart(workdir, config.data.source)
    with run_directory.lock(workdir):
        return _train_and_average(run, workdir, members, config, original, overrides, console)


def _train_and_average(
    run: pathlib.Path,
    workdir: pathlib.Path,
    members: int,
    config: Config,
    original: Bundle,
    overrides: Mapping[str, str],
    console: Console,
) -> dict[str, Any]:
    """Trains the continuations, and writes the result; see `make_soup`.

    `config` is the configuration of the continuations, except their seeds. `original` is the bundle
    of the run.
    """
    seed = config.seed
    total: PyTree = None
    for number in range(1, members + 1):
        console.print(f"continuation {number} of {members}")
        config.seed = (seed + number) % 2**32
        folder = workdir / f"continuation-{number}"
        train_and_evaluate(config, folder, console)
        continuation = read_bundle(folder / "bundle")
        _check_data(run, original, continuation.data["fingerprint"])
        params = jax.tree.map(np.float64, continuation.variables["params"])
        total = params if total is None else jax.tree.map(np.add, total, params)
    own = json.loads((run / "config.json").read_text(encoding="utf-8"))
    moved = {key: value for key, value in overrides.items() if key in INDIFFERENT_KEYS}
    resolved = resolve(files.load(str(run / "config.json"), moved), schema.flat(own))
    dataset = open_dataset(resolved, console.track)
    _check_data(run, original, dataset.fingerprint)
    params = jax.tree.map(lambda array: (array / members).astype(np.float32), total)
    variables = {**original.variables, "params": params}
    soup = _with_new_statistics(
        dataclasses.replace(original, variables=variables), dataset, console.track
    )
    monitor = config.train.monitor
    values = {
        name: _validate(bundle, dataset, monitor, console.track)
        for name, bundle in (("run", original), ("soup", soup))
    }
    scores = {name: monitored_score({monitor: value}, monitor) for name, value in values.items()}
    is_kept = scores["soup"] > scores["run"]
    run_directory.write_pretrained(workdir, original.pretrained)
    report = results.write_results(
        resolved, workdir, dataset, (soup if is_kept else original).variables, console.track
    )
    record = {
        "members": members,
        "epochs": config.train.epochs,
        "monitor": monitor,
        "validation": values,
        "is_kept": is_kept,
        "test": report["test"]["accuracy"] if "test" in report else None,
    }
    write_text(workdir / "soup.json", json.dumps(record, indent=1) + "\n")
    return record


def _check_output(workdir: pathlib.Path, run: pathlib.Path) -> None:
    """Raises ConfigError if the output folder has files that do not belong to a soup."""
    names = {path.name for path in workdir.iterdir()} if workdir.is_dir() else set()
    is_soup = "continuation-1" in names and "config.json" not in names
    if names - {"lock"} and not is_soup:
        raise ConfigError(
            f"--workdir: {workdir} has files that are not of a soup, such as {min(names)}; name "
            "another folder"
        )
    if workdir.resolve().is_relative_to(find_bundle(run).resolve()):
        raise ConfigError(f"--workdir: {workdir} is inside the bundle of the run; name another")


def _check_data(run: pathlib.Path, original: Bundle, fingerprint: str) -> None:
    """Raises DataError if a fingerprint does not fit the data and the splits of the run."""
    if fingerprint != original.data["fingerprint"]:
        raise DataError(
            f"{run}: the data or its splits have changed since the run, so the continuations may "
            "have seen its test images; restore the data"
        )


def describe(record: Mapping[str, Any]) -> str:
    """Describes the result of `make_soup` in one line."""
    values = record["validation"]
    outcome = (
        "the bundle has the average" if record["is_kept"] else "the bundle has the run's weights"
    )
    test = "" if record["test"] is None else f", test accuracy {record['test']:.2%}"
    return (
        f"{record['monitor']}: run {values['run']:.4f}, average of {record['members']} "
        f"continuations {values['soup']:.4f}; {outcome}{test}"
    )


def _validate(bundle: Bundle, dataset: Dataset, monitor: str, track: Track) -> float:
    """Returns the monitored metric of a network on the validation split, without calibration."""
    predictor = BundlePredictor(dataclasses.replace(bundle, temperature=1.0))
    metrics = evaluate(predictor, dataset, "validation", track)
    return metrics[monitor.removeprefix("validation_")]


def _with_new_statistics(bundle: Bundle, dataset: Dataset, track: Track) -> Bundle:
    """Returns a copy of a bundle with BatchNorm statistics for its parameters.

    The average of the continuations' statistics would not fit: the variance of an average of
    activations is not the average of their variances.
    """
    model = make_model(bundle.model, len(bundle.class_names), bundle.precision)
    if not updates_statistics(model, bundle.preprocessing.image_size):
        return bundle
    indices = dataset.splits["train"]
    # All batches must have the same size: BATCH_SIZE, or the number of images if it is smaller.
    count = min(len(indices), STATISTICS_IMAGES)
    count -= count % BATCH_SIZE if count > BATCH_SIZE else 0
    chosen = evenly_spaced(indices, count)
    add = jax.jit(
        functools.partial(update_statistics, model=model, preprocessing=bundle.preprocessing)
    )
    variables = jax.device_put(bundle.variables)
    statistics = Statistics.empty(variables["batch_stats"])
    loader = dataclasses.replace(dataset.loader, on_device=False)
    for images in image_batches(loader, chosen, track, "estimating statistics"):
        statistics = add(statistics, variables, {"image": images})
    batch_stats = jax.device_get(statistics.batch_stats)
    return dataclasses.replace(bundle, variables={**bundle.variables, "batch_stats": batch_stats})
