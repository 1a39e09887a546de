"""What a run says first, and what it says last."""

import pathlib
import platform
import shlex
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import cnn_jax
from cnn_jax.configuration import Config
from cnn_jax.console import Console
from cnn_jax.data.pipeline import Dataset
from cnn_jax.data.sources import DecodedSource
from cnn_jax.models import count_parameters, forward_flops

_MAX_CLASSES_SHOWN = 12


def show_plan(
    console: Console,
    config: Config,
    workdir: pathlib.Path,
    dataset: Dataset,
    model: nn.Module,
) -> None:
    """Says what will happen: device, precision, data, model, and where results go."""
    image_size = dataset.loader.preprocessing.image_size
    source = dataset.source
    sizes = {name: len(indices) for name, indices in dataset.splits.items()}
    if isinstance(source, DecodedSource):
        residency = "decoded in memory"
    elif dataset.loader.workers:
        residency = f"read by {dataset.loader.workers} processes"
    else:
        residency = "read by threads"
    ignored = f", {source.num_ignored:,} other files ignored" if source.num_ignored else ""
    lines = [
        f"{source.name}: {len(source):,} images of {len(source.class_names)} classes{ignored}",
        ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        f"{image_size[0]} x {image_size[1]} pixels, {residency}",
        *_class_table(dataset),
    ]
    devices = jax.devices()
    kind = devices[0].device_kind
    console.facts(
        {
            "cnn_jax": f"{cnn_jax.__version__} with JAX {jax.__version__}, "
            f"Python {platform.python_version()}",
            "device": f"{len(devices)} x {kind}, {config.precision}",
            "data": "\n".join(lines),
            "model": f"{config.model.name}, "
            f"{count_parameters(model, image_size):,} parameters, "
            f"{forward_flops(model, image_size) / 1e6:,.1f} MFLOP an image",
            "training": f"{_count(config.train.epochs, 'epoch')} at batch size "
            f"{config.train.batch_size}, seed {config.seed}, best by {config.train.monitor}",
            "results": str(workdir),
        }
    )
    console.print()


def _class_table(dataset: Dataset) -> list[str]:
    """Images by class and split; of many classes, the smallest and the largest."""
    source = dataset.source
    counts = {
        name: np.bincount(source.labels[indices], minlength=len(source.class_names))
        for name, indices in dataset.splits.items()
    }
    order = np.arange(len(source.class_names))
    if len(order) > _MAX_CLASSES_SHOWN:
        by_size = np.argsort(sum(counts.values()), kind="stable")
        order = np.concatenate([by_size[:3], by_size[-3:]])
    names = [_shorten(source.class_names[label], 24) for label in order]
    width = max(map(len, ["class", *names]))
    rows = ["  ".join([f"{'class':<{width}}", *(f"{name:>10}" for name in counts)])]
    for row, (label, name) in enumerate(zip(order, names, strict=True)):
        if row == 3 and len(order) < len(source.class_names):
            rows.append(f"... {len(source.class_names) - len(order)} classes between")
        columns = (f"{column[label]:>10,}" for column in counts.values())
        rows.append("  ".join([f"{name:<{width}}", *columns]))
    return rows


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def show_results(workdir: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Prints the test figures and how to go on, on stdout."""
    test = report["test"]
    figures = "  ".join(
        f"{name} {test[key]:.2%}"
        for name, key in (
            ("accuracy", "accuracy"),
            ("precision", "precision"),
            ("recall", "recall"),
            ("F1", "f1"),
        )
    )
    bundle = shlex.quote(str(workdir / "bundle"))
    print(f"\ntest        {figures}  loss {test['loss']:.4f}")
    print(f"            {test['count']:,} images; all figures are in {workdir / 'report'}")
    print(f"measure     python -m cnn_jax.evaluate --bundle={bundle}")
    print(f"use         python -m cnn_jax.predict --bundle={bundle} --input=FILE_OR_FOLDER")
