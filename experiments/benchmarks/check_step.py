"""Measures the precision, the repeatability and the memory of the training step on this device.

    python experiments/benchmarks/check_step.py [--image_size=224] [--batch_size=256] [--json=FILE]

- Whether 20 steps, repeated in the same process and in another process, give the same train
  state bit for bit. The other process compiles again, so XLA may choose other algorithms.
- The same check with XLA's deterministic operations, and how much longer a step then takes.
- The peak device memory of the process that runs the step.
- Gradients of one batch in bfloat16 against float32, without dropout: the norm of the
  difference over the norm of the float32 gradient, for each tensor.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import numpy as np
import peers
from bench_train import PeerProcess, write_data
from common import write_json

STEPS = 20
VARIANTS = {"as it is": "", "deterministic": "--xla_gpu_deterministic_ops=true"}


def ask_for_digest(process: PeerProcess, data: pathlib.Path, precision: str) -> None:
    """Requests STEPS training steps and a digest of the train state, and does not wait."""
    process.send(do="open", data=str(data), precision=precision, dropout=peers.DROPOUT)
    process.send(do="train", times=STEPS)
    process.send(do="digest")


def read_digest(process: PeerProcess) -> str:
    """Waits for the answer to `ask_for_digest`; returns the SHA-256 digest of the train state."""
    process.receive()
    process.receive()
    return process.receive()["digest"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the timing")
    parser.add_argument("--json", type=pathlib.Path, help="write the metrics to this file, too")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = pathlib.Path(temporary)
        data = folder / "data.npz"
        write_data(data, flags.image_size, flags.batch_size)

        def start(xla_flags: str = "") -> PeerProcess:
            variables = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
            if xla_flags:
                variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
            process = PeerProcess("cnn_jax", variables=variables)
            stack.callback(process.close)
            return process

        rows: dict[str, dict[str, Any]] = {name: {} for name in VARIANTS}
        results = {
            "image_size": flags.image_size,
            "batch_size": flags.batch_size,
            "precision": flags.precision,
            "variants": rows,
        }
        # The processes run one after the other, because XLA times algorithms while it compiles.
        processes, digests, failed = {}, {}, []
        for name, xla_flags in VARIANTS.items():
            process = start(xla_flags)
            ask_for_digest(process, data, flags.precision)
            try:
                digests[name] = read_digest(process)
            except RuntimeError as error:
                # If one variant fails, the other variant is still measured.
                print(f"{name}: {error}", flush=True)
                failed.append(name)
                continue
            processes[name] = process
            peak_bytes = process.ask(do="memory")["peak_bytes"]
            rows[name]["peak_megabytes"] = peak_bytes / 1e6 if peak_bytes else None
            ask_for_digest(process, data, flags.precision)
            rows[name]["same_in_process"] = read_digest(process) == digests[name]
            write_json(flags.json, results)
        times: dict[str, list[float]] = {name: [] for name in processes}
        for _ in range(flags.rounds):
            for name, process in processes.items():
                times[name] += process.ask(do="train", times=1 + STEPS)["seconds"][1:]
        for name, seconds in times.items():
            rows[name]["ms"] = 1e3 * statistics.median(seconds)
            print(f"{name}: {rows[name]}", flush=True)
        write_json(flags.json, results)

        # No times are measured from here on, so all processes may compile at the same time.
        others = {name: start(VARIANTS[name]) for name in processes}
        for process in others.values():
            ask_for_digest(process, data, flags.precision)
        files = {precision: folder / f"{precision}.npz" for precision in ("float32", "bfloat16")}
        by_precision = {precision: start() for precision in files}
        for precision, process in by_precision.items():
            process.send(do="open", data=str(data), precision=precision, dropout=0.0)
            process.send(do="gradients", to=str(files[precision]))
        for process in by_precision.values():
            process.receive()
            process.receive()
        with np.load(files["float32"]) as exact, np.load(files["bfloat16"]) as rounded:
            differences = results["gradient_differences"] = {
                name: float(np.linalg.norm(rounded[name] - exact[name]) / norm)
                for name in exact
                if (norm := np.linalg.norm(exact[name]))
            }
        print("\nbfloat16 gradients against float32")
        for name, difference in differences.items():
            print(f"{name:<24}  {difference:.2e}", flush=True)
        write_json(flags.json, results)
        for name, process in others.items():
            rows[name]["same_in_other_process"] = read_digest(process) == digests[name]
            print(f"{name}, in another process: {rows[name]['same_in_other_process']}", flush=True)
        write_json(flags.json, results)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
