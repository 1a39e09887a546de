"""A whole training, from images to the last epoch, beside the bare training step.

    python experiments/bench_run.py [--images=10000] [--image_size=224] [--epochs=45]
        [--batch_sizes=32,256] [--steps_per_execution=1,8] [--precision=auto] [--json=FILE]

Trains by the specification on generated images, decoded before, each setting in a process
of its own. "images/s" is the median over all epochs but the first, as the run itself counts
them: data, augmentation, steps and reading the losses, without validation. "bare" is the
same step alone, many in a row on one batch that is on the device, without augmentation.
"seconds" is all epochs, with validation: the mean of all but the first, in which programs
are compiled, times their number. "peak" is the most memory of the device that was in use
at once; a CPU does not tell.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

REPOSITORY = pathlib.Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--batch_sizes", default="32,256")
    parser.add_argument("--steps_per_execution", default="1,8")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # In a process of its own.
    flags = parser.parse_args()
    if flags.measure:
        print(json.dumps(measure(flags, *map(int, flags.measure.split(",")))))
        return
    columns = ("images/s", "bare", "/ bare", "seconds", "peak MB")
    print(f"{'batch':>5}  {'at once':>7}" + "".join(f"  {column:>9}" for column in columns))
    rows = []
    for batch_size in flags.batch_sizes.split(","):
        for count in flags.steps_per_execution.split(","):
            row = measured_apart(f"{batch_size},{count}")
            rows.append(row)
            print(
                f"{batch_size:>5}  {count:>7}  {row['images_per_second']:>9,.0f}"
                f"  {row['bare']:>9,.0f}  {row['images_per_second'] / row['bare']:>9.3f}"
                f"  {row['seconds']:>9.1f}  {row['peak_bytes'] / 1e6:>9,.0f}",
                flush=True,
            )
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=2) + "\n")


def measured_apart(setting: str) -> dict[str, Any]:
    """What `measure` finds in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--measure={setting}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{setting}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(flags: argparse.Namespace, batch_size: int, count: int) -> dict[str, Any]:
    """Trains, and then takes the bare step."""
    sys.path.insert(0, str(REPOSITORY))
    from cnn_jax.console import Console
    from cnn_jax.loop import train_and_evaluate
    from cnn_jax.runtime import keep_freed_memory
    from configs import spec_224

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
    config = spec_224.get_config()
    config.update_from_flattened_dict(overrides)
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        train_and_evaluate(config, workdir, console=Console(is_silent=True))
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        precision = json.loads((workdir / "config.json").read_text())["precision"]
    later = [json.loads(line) for line in lines][1:]
    return {
        "batch_size": batch_size,
        "steps_per_execution": count,
        "images_per_second": statistics.median(epoch["images_per_second"] for epoch in later),
        "seconds": statistics.mean(epoch["seconds"] for epoch in later) * flags.epochs,
        "peak_bytes": _peak_bytes(),
        "bare": batch_size / _seconds_of_bare_step(flags.image_size, batch_size, precision),
    }


def _peak_bytes() -> int:
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


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
    peers.seconds_of_each(step, 2)
    return statistics.median(peers.seconds_of_each(step, 10)) / count


if __name__ == "__main__":
    main()
