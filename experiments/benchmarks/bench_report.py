"""Measures the time of a training run until its last epoch ends, and the time after that.

    python experiments/benchmarks/bench_report.py --source=folder:PATH [--before=CHECKOUT]
        [--epochs=10] [--image_size=64] [--repetitions=3] [--json=FILE]

Runs `python -m cnn_jax.main` with this checkout, and in turn with the checkout of another
commit, if --before is given. Each checkout has its own cache directory. The first run of a
checkout, which compiles all programs and decodes all images, is "cold"; its later runs are
"warm". The columns:

- "training" is the time from the start of the command to the last epoch.
- "after" is the time from the last epoch to the end of the command: measuring the splits,
  writing the bundle, and writing the report.

Times are wall-clock seconds, and medians over the repetitions.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from common import REPOSITORY, child_environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True)
    parser.add_argument("--before", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    flags = parser.parse_args()
    checkouts = {"now": REPOSITORY} | ({"before": flags.before} if flags.before else {})
    times: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as scratch:
        for repetition in range(flags.repetitions + 1):
            for name, checkout in checkouts.items():
                folder = pathlib.Path(scratch, name)
                times[name].append(_run(checkout, folder, repetition, flags))
                print(name, repetition, times[name][-1], file=sys.stderr, flush=True)
                if flags.json:
                    flags.json.write_text(json.dumps(times))
    print(f"{'checkout':<10}{'cache':<8}{'training s':>12}{'after s':>10}{'ratio':>8}")
    for name, runs in times.items():
        for cache, chosen in (("cold", runs[:1]), ("warm", runs[1:])):
            if chosen:
                training = statistics.median(run["training"] for run in chosen)
                after = statistics.median(run["after"] for run in chosen)
                numbers = f"{training:>12.1f}{after:>10.1f}{after / training:>8.2f}"
                print(f"{name:<10}{cache:<8}{numbers}")


def _run(
    checkout: pathlib.Path, folder: pathlib.Path, repetition: int, flags: argparse.Namespace
) -> dict[str, float]:
    """Runs the training command once; measures the time of training and the time after it.

    Returns:
      The seconds of the columns "training" and "after".

    Raises:
      RuntimeError: The command fails.
    """
    environment = child_environment(checkout) | {
        "CNN_JAX_CACHE": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache" / "xla"),
    }
    command = [
        *(sys.executable, "-m", "cnn_jax.main", "--config=configs/folder.py"),
        f"--workdir={folder / f'run{repetition}'}",
        f"--config.data.source={flags.source}",
        f"--config.train.epochs={flags.epochs}",
        f"--config.data.image_size=({flags.image_size},{flags.image_size})",
    ]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    trained = None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("calibrating") and trained is None:
            trained = time.monotonic()
    if process.wait() or trained is None:
        raise RuntimeError("".join(lines[-20:]))
    return {"training": trained - start, "after": time.monotonic() - trained}


if __name__ == "__main__":
    main()
