"""Measures the time from the start of the server's process until the server is ready.

    pip install -e '.[serve]' && python experiments/benchmarks/bench_serve_start.py
        [--repository=OTHER_CHECKOUT,...] [--side=224] [--rounds=5]

The compilation cache is warm: the first start of each checkout is not measured. Several checkouts
of this repository take turns, so that two commits can be compared.
"""

import argparse
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import jax
from bench_serve import make_bundle

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def seconds_to_ready(repository: pathlib.Path, bundle: pathlib.Path) -> float:
    """Starts a server, and returns the seconds until it has printed that it is ready."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "cnn_jax.serve", f"--bundle={bundle}", "--port=0"],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.send_signal(signal.SIGTERM)
    if not line.startswith("ready"):
        sys.exit(f"{repository}: the server has ended with {process.returncode}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repository", default=str(REPOSITORY), help="checkouts to compare")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    measured: dict[str, list[float]] = {name: [] for name in flags.repository.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        bundle = pathlib.Path(folder) / "bundle"
        make_bundle(bundle, flags.side)
        for turn in range(flags.rounds + 1):
            for name, times in measured.items():
                seconds = seconds_to_ready(pathlib.Path(name).resolve(), bundle)
                if turn:
                    times.append(seconds)
    print(f"Python {platform.python_version()}, JAX {jax.__version__}, {flags.side} pixels\n")
    print("| checkout | seconds to ready | from - to |")
    print("| --- | --- | --- |")
    for name, times in measured.items():
        print(f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} - {max(times):.2f} |")


if __name__ == "__main__":
    main()
