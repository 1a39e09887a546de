"""The files that a run leaves behind, other than checkpoints and the bundle."""

import csv
import io
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from cnn_jax.configuration import Config
from cnn_jax.data.scan import Unreadable
from cnn_jax.errors import ConfigError

# What a resumed run may change. No number depends on these: the data's
# fingerprint stands for where it lies.
_FREE_KEYS = frozenset(
    f"data.{key}"
    for key in ("source", "workers", "cache", "max_pixels", "max_unreadable", "allow_outside")
)


def claim(workdir: pathlib.Path, config: Config) -> None:
    """Makes the folder, and checks that no run of another configuration is in it.

    Raises:
      ConfigError: There is one, or the folder cannot be made.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            present = json.loads(path.read_text(encoding="utf-8"))
            _check_same(path, present, json.loads(config.to_json()))
    except OSError as error:
        raise ConfigError(f"--workdir: cannot use {workdir}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"--workdir: {path} is not a configuration: {error}") from error


def write_config(workdir: pathlib.Path, config: Config) -> None:
    """Writes config.json, from when on the folder is this run's.

    Raises:
      ConfigError: The folder cannot be written.
    """
    try:
        text = json.dumps(json.loads(config.to_json()), indent=1, ensure_ascii=False)
        write_text(workdir / "config.json", text + "\n")
    except OSError as error:
        raise ConfigError(f"--workdir: cannot write {workdir}: {error.strerror}") from error


def _check_same(path: pathlib.Path, present: Any, wanted: Any) -> None:
    was, is_now = _flat(present), _flat(wanted)
    changed = [
        f"{key}: {was.get(key, 'absent')} -> {is_now.get(key, 'absent')}"
        for key in sorted((was.keys() | is_now.keys()) - _FREE_KEYS)
        if was.get(key) != is_now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"--workdir: {path.parent} holds a run of another configuration "
            f"({'; '.join(changed)}); use another folder, or the configuration in {path.name}"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    leaves = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.")
    return leaves


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file: the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    # A file name that is not UTF-8 has surrogates, which become JSON's escapes.
    aside.write_text(text, "utf-8", "backslashreplace")
    aside.replace(path)


class EpochLog:
    """metrics.jsonl and the TensorBoard events: one record for each epoch."""

    def __init__(self, workdir: pathlib.Path, history: Sequence[Mapping[str, Any]]):
        """Starts both anew with the epochs that are done already.

        A run that was killed may have logged an epoch that it has to repeat.
        """
        self._path = workdir / "metrics.jsonl"
        write_text(self._path, "".join(map(_line, history)))
        shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(str(workdir / "tensorboard"))
        for record in history:
            self._write_events(record)

    def append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        self._write_events(record)

    def _write_events(self, record: Mapping[str, Any]) -> None:
        for key, value in record.items():
            if key not in ("step", "epoch"):
                # "train_loss" becomes "loss/train", which TensorBoard groups.
                split, _, metric = key.partition("_")
                is_metric = split in ("train", "validation")
                tag = f"{metric}/{split}" if is_metric else f"run/{key}"
                self._writer.add_scalar(tag, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def write_metrics(workdir: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes report/metrics.json: the figures of each split."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (workdir / "report").mkdir(exist_ok=True)
    write_text(workdir / "report" / "metrics.json", text + "\n")


def write_unreadable(workdir: pathlib.Path, unreadable: Sequence[Unreadable]) -> None:
    """Writes report/unreadable.csv: a row for each image that was left out, and why."""
    (workdir / "report").mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "reason"])
    writer.writerows((image.id, image.reason) for image in unreadable)
    write_text(workdir / "report" / "unreadable.csv", text.getvalue())


def write_predictions(
    workdir: pathlib.Path,
    ids: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Writes report/predictions.csv: one row for each example of the test split.

    Args:
      workdir: The run's folder.
      ids: Identity of each example.
      labels: int [n], its class.
      probabilities: float32 [n, classes].
      class_names: In the order of the labels.
    """
    (workdir / "report").mkdir(exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "label", "predicted", "confidence"])
    for example_id, label, row in zip(ids, labels, probabilities, strict=True):
        best = int(row.argmax())
        # The shortest digits that give back this float32, and no other.
        confidence = np.format_float_positional(row[best], unique=True)
        writer.writerow([example_id, class_names[label], class_names[best], confidence])
    write_text(workdir / "report" / "predictions.csv", text.getvalue())
