"""Measures the time from the start of a command to its first result.

    python experiments/benchmarks/bench_startup.py [--rounds=5] [--json=FILE]

Each number is the median wall time of a new process over the rounds; all cases take turns.
The two commands are measured in three states of JAX's compilation cache. `off` is without a
cache, which is the default of JAX; `cold` starts with an empty cache and fills the cache; `warm`
starts with a filled cache. The files are in the system's cache, and the images are decoded. A
training ends when its heartbeat reports the first step. The time of an import does not
include the exit of Python, which takes up to a second.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from common import REPOSITORY, write_json
from PIL import Image

IMPORTS = ("jax", "flax.linen", "cnn_jax.predict", "cnn_jax.training.loop")
STATES = ("off", "cold", "warm")
_POLL_SECONDS = 0.01


def _command(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def seconds_to_end(command: Sequence[str], environment: Mapping[str, str]) -> float:
    began = time.perf_counter()
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if result.returncode:
        sys.exit(f"{' '.join(command)}: {result.stderr}")
    return seconds


def seconds_to_first_step(
    command: Sequence[str], environment: Mapping[str, str], workdir: pathlib.Path
) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not _steps(workdir):
            if process.poll() is not None:
                sys.exit(f"{' '.join(command)}: exit {process.returncode} before the first step")
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
    shutil.rmtree(workdir)
    return seconds


def _steps(workdir: pathlib.Path) -> int:
    try:
        return json.loads((workdir / "heartbeat.json").read_text(encoding="utf-8"))["step"]
    except FileNotFoundError:
        return 0


class Bench:
    """The measured commands, which all use the same folder with a cache and a bundle."""

    def __init__(self, folder: pathlib.Path, config: str):
        self._cache = folder / "cache"
        environment = {
            k: v
            for k, v in os.environ.items()
            if "COMPILATION_CACHE" not in k and "PERSISTENT_CACHE" not in k
        }
        environment |= {"CNN_JAX_CACHE": str(self._cache)}
        main = _command("-m", "cnn_jax.main", f"--config={config}", "--config.report.detail=none")
        # This complete run decodes the images, so that no measurement includes the decoding, and
        # writes the bundle for the command `predict`.
        seconds_to_end([*main, f"--workdir={folder / 'first'}"], environment)
        pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "image.jpg")
        predict = _command(
            *("-m", "cnn_jax.predict"),
            *(f"--bundle={folder / 'first' / 'bundle'}", f"--input={folder / 'image.jpg'}"),
        )
        self.measured: dict[str, Callable[[], float]] = {}
        for module in IMPORTS:
            command = _command("-c", f"import os, {module}; os._exit(0)")
            self.measured[f"import {module}"] = lambda c=command: seconds_to_end(c, environment)
        off = environment | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        for state in STATES:
            state_environment = off if state == "off" else environment
            self.measured[f"predict one image, {state}"] = lambda s=state, e=state_environment: (
                self._in_state(s, lambda: seconds_to_end(predict, e))
            )
        for state in STATES:
            state_environment = off if state == "off" else environment
            self.measured[f"train to the first step, {state}"] = (
                lambda s=state, e=state_environment: self._in_state(
                    s, lambda: seconds_to_first_step(main, e, folder / "run")
                )
            )

    def _in_state(self, state: str, measure: Callable[[], float]) -> float:
        """Measures a command; for the state "cold", first deletes the compiled programs."""
        if state == "cold":
            shutil.rmtree(self._cache / "compiled", ignore_errors=True)
        return measure()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="configs/smoke.py")
    parser.add_argument("--json", type=pathlib.Path, help="write the metrics to this file, too")
    flags = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        measured = Bench(pathlib.Path(name), flags.config).measured
        seconds: dict[str, list[float]] = {what: [] for what in measured}
        for turn in range(flags.rounds + 1):
            for what, measure in measured.items():
                took = measure()
                # The first round is a warm-up, which loads the files into the operating system's
                # cache.
                if turn:
                    seconds[what].append(took)

    versions = f"Python {platform.python_version()}, JAX {jax.__version__}"
    print(f"{os.cpu_count()} cores, {versions}; {flags.config}, medians of {flags.rounds}\n")
    print("| | seconds | from - to |")
    print("| --- | --- | --- |")
    table: list[dict[str, Any]] = []
    for what, times in seconds.items():
        row = {
            "what": what,
            "seconds": statistics.median(times),
            "lowest": min(times),
            "highest": max(times),
        }
        table.append(row)
        print("| {what} | {seconds:.2f} | {lowest:.2f} - {highest:.2f} |".format(**row))
    write_json(flags.json, {"versions": versions, "cores": os.cpu_count(), "rows": table})


if __name__ == "__main__":
    main()
