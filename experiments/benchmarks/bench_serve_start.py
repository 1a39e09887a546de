"""Measures the start, the memory and the CPU time of a server, with a bundle and an 8-bit export.

    pip install -e '.[bench,onnx,serve]' && python experiments/benchmarks/bench_serve_start.py
        [--repository=OTHER_CHECKOUT,...] [--side=224] [--rounds=5]

The servers have the default network with random weights: as a bundle, and as an 8-bit ONNX export
of this bundle. The columns of the table are:

    seconds to ready   the time from the start of the process until the server is ready
    CPU seconds        the CPU time of the process in this time
    peak MB            the largest resident memory of the process, after all requests
    ms an image        the CPU time of the process for an image in requests of 32 JPEGs of the size
                       --side; this time includes decoding

The compilation cache is warm: the first start of each server is not measured. Several checkouts of
this repository take turns, so that two commits can be compared. The process has one thread for
computations, so that CPU times can be compared. The script needs Linux.
"""

import argparse
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import requests
from bench_serve import make_bundle, make_images
from common import REPOSITORY, child_environment, cpu_seconds, memory_megabytes

from cnn_jax.export.function import flat_function
from cnn_jax.export.onnx_model import images_model
from cnn_jax.export.quantize import quantize
from cnn_jax.inference.bundle import describe, read_bundle, write_folder
from cnn_jax.inference.exported import ONNX_MODEL
from cnn_jax.inference.predictor import BundlePredictor

_BATCH = 32
_REQUESTS = 5


class _Start(NamedTuple):
    """The measurements of one start of a server; see the description of this module."""

    seconds: float
    cpu_seconds: float
    peak_megabytes: float
    milliseconds: float


def make_export(path: pathlib.Path, bundle: pathlib.Path, side: int) -> None:
    """Writes the 8-bit ONNX export of a bundle; random images determine the ranges."""
    predictor = BundlePredictor.load(bundle)
    images = np.random.default_rng(0).integers(0, 256, (8, side, side, 3), np.uint8)
    model = quantize(images_model(flat_function(predictor), predictor), [images])
    description = describe(read_bundle(bundle)) | {"export": {"format": "onnx", "int8": True}}
    write_folder(path, {ONNX_MODEL: model.SerializeToString()}, description)


def measure(repository: pathlib.Path, bundle: pathlib.Path, images: Sequence[bytes]) -> _Start:
    """Starts a server, sends requests, and returns the measurements."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "cnn_jax.serve", f"--bundle={bundle}", "--port=0"],
        cwd=repository,
        env=child_environment(repository)
        | {
            "PYTHONUNBUFFERED": "1",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            seconds = time.perf_counter() - start
            if not line.startswith("ready"):
                sys.exit(f"{repository}: the server of {bundle} printed {line!r}")
            cpu_seconds_to_ready = cpu_seconds(process.pid)
            times = []
            for _ in range(_REQUESTS):
                before = cpu_seconds(process.pid)
                files = [("file", image) for image in images]
                requests.post(f"{line.split()[-1]}predict", files=files).raise_for_status()
                times.append(cpu_seconds(process.pid) - before)
            memory = memory_megabytes(process.pid, "VmHWM")
        finally:
            process.terminate()
    milliseconds = 1000 * statistics.median(times) / len(images)
    return _Start(seconds, cpu_seconds_to_ready, memory, milliseconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", default=str(REPOSITORY), help="checkouts to compare")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    images = make_images(_BATCH, flags.side)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        bundles = {"bundle": folder / "bundle", "8-bit export": folder / "export"}
        make_bundle(folder / "bundle", flags.side)
        make_export(folder / "export", folder / "bundle", flags.side)
        cases = [(path, name) for path in flags.repository.split(",") for name in bundles]
        measured: dict[tuple[str, str], list[_Start]] = {case: [] for case in cases}
        for turn in range(flags.rounds + 1):
            for (repository, name), starts in measured.items():
                found = measure(pathlib.Path(repository).resolve(), bundles[name], images)
                if turn:
                    starts.append(found)
    print(f"Python {platform.python_version()}, JAX {jax.__version__}, {flags.side} pixels\n")
    print("| checkout | server of | seconds to ready | CPU seconds | peak MB | ms an image |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (repository, name), starts in measured.items():
        medians = _Start(*(statistics.median(values) for values in zip(*starts, strict=True)))
        print(
            f"| {repository} | {name} | {medians.seconds:.2f} | {medians.cpu_seconds:.2f} | "
            f"{medians.peak_megabytes:.0f} | {medians.milliseconds:.1f} |"
        )


if __name__ == "__main__":
    main()
