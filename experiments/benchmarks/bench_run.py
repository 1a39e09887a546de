"""Measures the time of a complete training run, and the speed of the training step on its own.

    python experiments/benchmarks/bench_run.py [--config=spec_224] [--images=10000]
        [--image_size=224]
        [--epochs=45] [--batch_sizes=32,256] [--steps_per_execution=1,8] [--precision=auto]
        [--json=FILE]

Trains with a file of `configs/` on generated images, and measures the test accuracy. Each
setting runs in a separate process. The JSON is written after each epoch. The columns:

- "images/s" is the median over all epochs except the first, as the run itself reports it. The
  time includes data, augmentation, steps and reading the losses, but not validation.
- "bare" is the speed of the same step when it is repeated on one batch that is on the device,
  without augmentation.
- "epochs s" is the time of all epochs with validation: the number of epochs times the mean time
  of an epoch. The first epoch, in which programs are compiled, is left out of the mean.
- "all s" is the wall-clock time of the training: preparing the images, compiling, all epochs and
  measuring all splits.
- "accuracy" is the accuracy of the best epoch's network on the test split.
- "peak MB" is the peak memory of the device; unknown on a CPU.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from common import REPOSITORY, device_peak_bytes, seconds_of_each, write_json

CONFIGS = ("spec_224", "fast")
COLUMNS = {
    "images/s": ("images_per_second", "{:,.0f}"),
    "bare": ("bare", "{:,.0f}"),
    "epochs s": ("seconds", "{:.1f}"),
    "all s": ("wall_seconds", "{:.1f}"),
    "accuracy": ("test_accuracy", "{:.4f}"),
    "peak MB": ("peak_megabytes", "{:,.0f}"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", choices=CONFIGS, default="spec_224")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--batch_sizes", default="32,256")
    parser.add_argument("--steps_per_execution", default="1,8", help="0: what the run chooses")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=pathlib.Path, help="write the metrics to this file, too")
    # This script passes the flag --measure to the separate process that it starts.
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        measure(flags, *map(int, flags.measure.split(",")))
        return
    print(f"{'batch':>5}  {'at once':>7}" + "".join(f"  {column:>9}" for column in COLUMNS))
    rows: list[dict[str, Any]] = []
    for batch_size in flags.batch_sizes.split(","):
        for count in flags.steps_per_execution.split(","):
            row: dict[str, Any] = {}
            for row in rows_of_process(f"{batch_size},{count}"):
                write_json(flags.json, [*rows, row])
            rows.append(row)
            cells = (form.format(row[key]) for key, form in COLUMNS.values())
            print(
                f"{batch_size:>5}  {row['steps_per_execution']:>7}"
                + "".join(f"  {cell:>9}" for cell in cells),
                flush=True,
            )


def rows_of_process(setting: str) -> Iterator[dict[str, Any]]:
    """Runs `measure` in a new process, and yields the rows that the process prints."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--measure={setting}"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait():
            log.seek(0)
            sys.exit(f"{setting}: {log.read()[-2000:]}")


def measure(flags: argparse.Namespace, batch_size: int, count: int) -> None:
    """Trains, then times the training step; prints a JSON row after each epoch and each stage."""
    sys.path.insert(0, str(REPOSITORY))
    from cnn_jax.system.console import Console
    from cnn_jax.system.runtime import keep_freed_memory
    from cnn_jax.training.loop import train_and_evaluate
    from configs import fast, spec_224

    keep_freed_memory()
    overrides = {
        "data.source": f"shapes:{flags.images}",
        "data.image_size": (flags.image_size, flags.image_size),
        "data.stratify": "exact",
        "train.epochs": flags.epochs,
        "train.patience": flags.epochs,
        "train.batch_size": batch_size,
        "train.steps_per_execution": count,
        "precision": flags.precision,
    }
    config = {"fast": fast, "spec_224": spec_224}[flags.config].get_config()
    config.update_from_flattened_dict(overrides)
    row: dict[str, Any] = {
        "config": flags.config,
        "image_size": flags.image_size,
        "batch_size": batch_size,
        "epochs": flags.epochs,
    }
    began = time.perf_counter()

    def show(history: list[dict[str, Any]]) -> None:
        if later := history[1:]:
            row.update(
                epochs_done=len(history),
                images_per_second=statistics.median(e["images_per_second"] for e in later),
                seconds=statistics.mean(e["seconds"] for e in later) * flags.epochs,
                validation_accuracy=max(e["validation_accuracy"] for e in history),
                wall_seconds=time.perf_counter() - began,
                peak_megabytes=device_peak_bytes() / 1e6,
            )
            print(json.dumps(row), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        report = train_and_evaluate(config, workdir, console=Console(is_silent=True), on_epoch=show)
        resolved = json.loads((workdir / "config.json").read_text())
    row |= {
        "steps_per_execution": resolved["train"]["steps_per_execution"],
        "precision": resolved["precision"],
        "test_accuracy": report["test"]["accuracy"],
        "wall_seconds": time.perf_counter() - began,
    }
    print(json.dumps(row), flush=True)
    seconds = _seconds_of_bare_step(flags.image_size, batch_size, resolved["precision"])
    print(json.dumps(row | {"bare": batch_size / seconds}), flush=True)


def _seconds_of_bare_step(image_size: int, batch_size: int, precision: str) -> float:
    import peers
    from bench_train import write_data

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "data.npz"
        write_data(path, image_size, batch_size)
        task = peers.load_task(path, precision, peers.DROPOUT)
    ours = peers.Ours(task)
    count = max(1, 640 // batch_size)
    step = functools.partial(ours.train_without_waiting, count)
    return statistics.median(seconds_of_each(step, 12)[2:]) / count


if __name__ == "__main__":
    main()
