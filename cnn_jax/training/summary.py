"""The plan that a run prints first, and the results that it prints last."""

import pathlib
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.cells import cell_len

import cnn_jax
from cnn_jax.config.schema import Config
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.findings import count
from cnn_jax.data.mix import Mixing
from cnn_jax.models.network import Network, count_parameters, forward_flops, updates_statistics
from cnn_jax.system.console import Console
from cnn_jax.system.errors import printable
from cnn_jax.system.text import FACT_INDENT, shorten, table, wrap
from cnn_jax.training.loss import balanced_weights
from cnn_jax.training.metrics import MAX_HALF_WIDTH, half_width, wilson_interval
from cnn_jax.training.sharding import Layout, make_mesh

_MAX_CLASSES_SHOWN = 12

# Below this number of training images, a pretrained network is probably better than a network
# with random weights. On the 18,900 training images of EuroSAT, both networks have about the same
# accuracy.
_MANY_IMAGES = 20_000
_ADVICE = (
    "on this number of images a pretrained network is usually better: --config=finetune,\n"
    "or --config=probe, which takes only minutes (docs/pretrained.md)"
)


def show_plan(
    console: Console,
    config: Config,
    workdir: pathlib.Path,
    dataset: Dataset,
    model: Network,
    changes: Sequence[str] = (),
    pretrained: Mapping[str, Any] | None = None,
) -> None:
    """Prints the plan of a run: device, data, model, training, and the folder of the results.

    Args:
      console: Prints the plan.
      config: The resolved configuration.
      workdir: The run's folder.
      dataset: The data set of the run.
      model: The network.
      changes: A line for each key that has changed since the run was last started.
      pretrained: The record of the weights with which the run started; None for random weights.
    """
    image_size = dataset.loader.preprocessing.image_size
    source = dataset.source
    sizes = {name: len(indices) for name, indices in dataset.splits.items()}
    lines = [
        f"{printable(source.name)}: {len(source):,} images of {len(source.class_names)} classes",
        ", ".join(f"{name} {size:,}" for name, size in sizes.items()) + _division(config, dataset),
        *_interval_width(sizes["test"], config),
        f"{image_size[0]} x {image_size[1]} pixels, {_residency(dataset)}",
        *_class_table(dataset, console.width),
    ]
    devices = jax.devices()
    kind = devices[0].device_kind
    console.facts(
        {
            "cnn_jax": f"{cnn_jax.__version__} with JAX {jax.__version__}, "
            f"Python {platform.python_version()}",
            "device": f"{len(devices)} x {kind}, {config.precision}{_parallelism(config)}",
            "data": "\n".join(lines),
            "checked": "\n".join(dataset.findings.summary()),
            "model": f"{config.model.name}, "
            f"{count_parameters(model, image_size):,} parameters, "
            f"{forward_flops(model, image_size) / 1e6:,.1f} MFLOP an image",
            **({"weights": _weights(config, pretrained)} if pretrained else {}),
            "training": f"{count(config.train.epochs, 'epoch')}, batch size "
            f"{config.train.batch_size}{_batch_advice(config, devices)}, "
            f"seed {config.seed}{_split_seed(config)}; "
            f"best epoch by {config.train.monitor}"
            + _options(config)
            + _mixing(config)
            + _accumulation(config, model, image_size)
            + _extension(config)
            + _balance(config, dataset),
            "results": str(workdir),
        }
        | ({"changed": "\n".join(changes)} if changes else {})
        | ({"advice": _ADVICE} if _needs_pretraining(config, sizes["train"]) else {})
    )
    for warning in dataset.findings.warnings():
        console.warn(warning)
    console.print()


def _batch_advice(config: Config, devices: Sequence[Any]) -> str:
    """Advises a better batch size if the devices are TPUs; returns "" if there is none."""
    layout = Layout(make_mesh(config.mesh.model, devices), config.train.batch_size)
    multiple = layout.batch_multiple
    if multiple > 1:
        multiple *= config.train.accumulation_steps
    if layout.batch_size % multiple == 0:
        return ""
    return f" (TPUs are the fastest with multiples of {multiple:,})"


def _split_seed(config: Config) -> str:
    """Describes the seed of the splits and the fold of a cross-validation, if they are set."""
    data, text = config.data, ""
    if data.split_seed >= 0:
        text += f", split seed {data.split_seed}"
    if data.folds:
        text += f", test fold {data.fold} of 0 to {data.folds - 1}"
    return text


def _needs_pretraining(config: Config, train_images: int) -> bool:
    """Returns whether the run starts from random weights, but pretrained weights may be better."""
    is_pretrained = config.model.get("pretrained") or config.checkpoint.init_from
    is_generated = config.data.source.startswith("shapes")
    return not is_pretrained and not is_generated and train_images < _MANY_IMAGES


def _weights(config: Config, pretrained: Mapping[str, Any]) -> str:
    """Describes the initial weights; compares their preprocessing with the run's preprocessing."""
    license = pretrained.get("license") or "unknown"
    lines = [f"{printable(pretrained['source'])}, licence: {printable(license)}"]
    if not config.model.get("pretrained"):
        return lines[0]
    values = {
        key: (_plain(value), _plain(config.data[key]))
        for key, value in pretrained.get("preprocessing", {}).items()
        if key != "crop_ratio" or config.data.resize == "crop"
    }
    same = [f"{key} {own}" for key, (theirs, own) in values.items() if own == theirs]
    other = [f"{key} {own}, not {theirs}" for key, (theirs, own) in values.items() if own != theirs]
    for name, settings in ("the preprocessing of the weights", same), ("other than theirs", other):
        if settings:
            lines.append(f"{name}: {'; '.join(settings)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """Formats a configuration value as text; a list of equal numbers becomes one number."""
    values = [f"{v:g}" if isinstance(v, float) else str(v) for v in np.atleast_1d(value).tolist()]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def _parallelism(config: Config) -> str:
    """Describes how many devices share a copy of the network, and how many processes run.

    A number is omitted if it is 1.
    """
    model = config.mesh.model
    devices = f", {model} for each copy of the network" if model > 1 else ""
    processes = jax.process_count()
    return devices + (f", in {processes} processes" if processes > 1 else "")


def _residency(dataset: Dataset) -> str:
    """Describes how images are decoded and where the pixels are stored."""
    if dataset.residency == "none":
        workers = dataset.loader.workers
        decoders = count(workers, "process", "processes") if workers else "threads"
        return f"decoded in each epoch by {decoders}"
    assert dataset.loader.pixels is not None
    size = f"{dataset.loader.pixels.nbytes / 1e6:,.1f} MB"
    place = {"disk": "on disk", "memory": "in memory", "device": "on the device"}
    return f"decoded once, {size} {place[dataset.residency]}"


def _division(config: Config, dataset: Dataset) -> str:
    """Describes groups and predefined splits; returns "" if the run uses neither."""
    group = f"; grouped by {config.data.group}" if config.data.group else ""
    is_kept = config.data.keep_splits and any(dataset.source.own_splits)
    return ("; the splits of the data are used" if is_kept else "") + group


def _interval_width(test_images: int, config: Config) -> list[str]:
    """Returns a warning if the test split is too small for a precise accuracy; else []."""
    margin = half_width(wilson_interval(test_images / 2, test_images))
    if not test_images or margin < MAX_HALF_WIDTH:
        return []
    images = count(test_images, "test image")
    exact = "data.stratify=exact or " if config.data.stratify == "stable" else ""
    return [
        f"{images}: accuracy will be known to ± {100 * margin:.0f} points",
        f"(more precise with {exact}several seeds)",
    ]


def _options(config: Config) -> str:
    """Describes the optimizer, the average of the weights and the teachers, unless default."""
    optimizer, distill = config.optimizer, config.distill
    parts = []
    if (optimizer.algorithm, optimizer.schedule) != ("adam", "cosine"):
        schedule = optimizer.schedule.replace("_", "-")
        parts.append(f"{optimizer.algorithm} with the {schedule} schedule")
    if config.train.ema:
        parts.append(f"averaged weights (decay {config.train.ema:g})")
    if distill.bundles:
        teachers = count(len(distill.bundles.split(",")), "teacher")
        parts.append(f"{teachers} with weight {distill.weight:g}")
    return "".join(f"\n{part}" for part in parts)


def _mixing(config: Config) -> str:
    """Describes how images are mixed; returns "" if images are not mixed."""
    mixing = Mixing.from_config(config.augment)
    if mixing.is_identity():
        return ""
    return f"\n{mixing.describe()}; train metrics are of mixed images"


def _accumulation(config: Config, model: Network, image_size: tuple[int, int]) -> str:
    """Describes gradient accumulation; returns "" if the run does not accumulate gradients."""
    parts = config.train.accumulation_steps
    if parts == 1:
        return ""
    rows = config.train.batch_size // parts
    uses_batch = updates_statistics(model, image_size)
    norm = "; BatchNorm uses the statistics of each part" if uses_batch else ""
    return f"\neach batch in {parts} parts of {count(rows, 'image')}{norm}"


def _extension(config: Config) -> str:
    """Describes the end of the learning-rate schedule.

    The result is "" if the schedule ends after train.epochs epochs.
    """
    decay = config.optimizer.decay_epochs
    if decay == config.train.epochs:
        return ""
    end = config.optimizer.final_learning_rate
    if decay > config.train.epochs:
        return f"\nthe learning rate would reach its final value, {end:g}, after {decay} epochs"
    return f"\nthe learning rate reaches its final value, {end:g}, after {decay} epochs"


def _balance(config: Config, dataset: Dataset) -> str:
    """Describes class balancing; returns "" if the run does not balance the classes."""
    counts = dataset.findings.counts["train"]
    names = dataset.source.class_names
    # Classes without training images are ignored here. A warning reports these classes.
    nonempty = np.flatnonzero(counts)
    least, most = nonempty[counts[nonempty].argmin()], counts.argmax()
    rarest, commonest = printable(names[least]), printable(names[most])
    if config.train.balance == "loss":
        weights = balanced_weights(counts)
        return (
            f"\nweights of losses are from {weights[most]:.3g} ({commonest}) to "
            f"{weights[least]:.3g} ({rarest}); metrics are unweighted"
        )
    if config.train.balance == "sampling":
        passes = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
        return (
            f"\nan epoch contains each image of {rarest} {passes[least]:.3g} times and of "
            f"{commonest} {passes[most]:.3g} times; metrics are for the data without balancing"
        )
    return ""


def _class_table(dataset: Dataset, width: int | None) -> list[str]:
    """Returns a table of the number of images by class and split.

    If there are many classes, the table has only the smallest and the largest classes.

    Args:
      dataset: The data set.
      width: The columns of the terminal, 12 of which `Console.facts` uses; None for no limit.
    """
    source = dataset.source
    counts = {
        name: np.bincount(source.labels[indices], minlength=len(source.class_names))
        for name, indices in dataset.splits.items()
    }
    order = np.arange(len(source.class_names))
    if len(order) > _MAX_CLASSES_SHOWN:
        size_order = np.argsort(sum(counts.values()), kind="stable")
        order = np.concatenate([size_order[:3], size_order[-3:]])
    name_width = 24
    if width is not None:
        width -= FACT_INDENT
        name_width = min(name_width, max(8, width - 12 * len(counts)))
    rows: list[Sequence[str] | str] = [
        (
            shorten(printable(source.class_names[label]), name_width),
            *(f"{column[label]:,}" for column in counts.values()),
        )
        for label in order
    ]
    if len(order) < len(source.class_names):
        rows.insert(3, f"... {len(source.class_names) - len(order)} classes between")
    return table(("class", *counts), rows, width, min_column=10).splitlines()


def describe_metrics(metrics: Mapping[str, Any]) -> str:
    """Returns the metrics of a split as a line of text."""
    names = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"}
    ratios = "  ".join(f"{name} {metrics[key]:.2%}" for key, name in names.items())
    return f"{ratios}  loss {metrics['loss']:.4f}"


def show_metrics(workdir: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Prints the test metrics on stdout, if the test split was measured."""
    if "test" not in report:
        return
    test = report["test"]
    lines = [
        f"test        {describe_metrics(test)}",
        f"            {test['count']:,} images; all metrics are in {workdir / 'report'}",
    ]
    print()
    for line in lines:
        print("\n".join(wrap(line, _stdout_width(), 12)), flush=True)


def show_commands(workdir: pathlib.Path) -> None:
    """Prints the commands that use a finished run, on stdout."""
    bundle = shlex.quote(str(workdir / "bundle"))
    width = _stdout_width()
    commands = [
        f"measure     cnn_jax evaluate --bundle={bundle}",
        f"use         cnn_jax predict --bundle={bundle} --input=FILE_OR_FOLDER",
    ]
    for line in commands:
        is_wide = width is not None and cell_len(line) > width
        # A long command is broken before its flags, so that the user can still copy the command.
        print(line.replace(" --", f" \\\n{'':16}--") if is_wide else line)


def ensemble_command(workdir: pathlib.Path, folders: Sequence[pathlib.Path]) -> str:
    """Returns the command that makes an ensemble of runs, in a folder below `workdir`."""
    output = shlex.quote(f"--output={workdir / 'ensemble'}")
    return f"cnn_jax ensemble --bundles {shlex.join(map(str, folders))} {output}"


def _stdout_width() -> int | None:
    """Returns the width of the terminal that shows stdout, in columns; None without a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else None
