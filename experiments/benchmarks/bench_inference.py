"""Compares the inference time of this project with PyTorch, ONNX Runtime and Keras.

    pip install -e '.[bench]' && python experiments/benchmarks/bench_inference.py [--json=FILE]

An inference goes from uint8 images in host memory to probabilities in host memory. All
libraries use the same weights, each in a separate process; they take turns, as in
`bench_train.py`. Before that, their probabilities must agree within --tolerance, in float32
without TensorFloat-32. The numbers are medians and do not include compilation.

This project keeps freed memory and computes in the calling thread, as its server does
(`cnn_jax.system.runtime`); the other libraries use their defaults. --cores=1 gives each library
one processor core. "best peer" is the fastest peer except plain Linen; "floor" is the
shortest possible time by `experiments/benchmarks/roofline.py`.
"""

import contextlib
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import peers
from bench_train import (
    Process,
    exit_if_left_out,
    floor_milliseconds,
    is_own,
    make_parser,
    measure,
    print_header,
    print_rows,
    without_failures,
    write_data,
    write_json,
)
from roofline import parse_shapes

# Each pair is the side of an image in pixels and a batch size.
SHAPES = ((32, 1), (32, 32), (64, 1), (64, 32), (224, 1), (224, 32))
TOLERANCE = 1e-5
# This environment variable has the same effect as `runtime.compute_in_calling_thread`.
_IN_CALLING_THREAD = {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}


def check_agreement(
    processes: list[Process], folder: pathlib.Path, tolerance: float
) -> tuple[list[Process], float]:
    """Compares the probabilities that all libraries compute from the same images and weights.

    Returns:
      The processes that answered, and the largest difference from this project's probabilities.

    Raises:
      SystemExit: A difference is larger than the tolerance.
    """
    data = folder / "agree.npz"
    write_data(data, 64, 8)
    files = {process.name: folder / f"probabilities{i}.npz" for i, process in enumerate(processes)}
    # All requests are sent before the first answer is read, so the processes compile in parallel.
    for process in processes:
        process.send(do="open", data=str(data), precision="float32", dropout=peers.DROPOUT)
        process.send(do="probabilities", to=str(files[process.name]))
    results = {}

    def read(process: Process) -> None:
        process.receive()
        process.receive()
        with np.load(files[process.name]) as arrays:
            results[process.name] = arrays["probabilities"]

    processes = without_failures(processes, read)
    expected, worst = results[processes[0].name], 0.0
    for name, probabilities in results.items():
        difference = float(np.abs(probabilities - expected).max())
        if not difference <= tolerance:  # Unlike `>`, this condition is true for NaN.
            sys.exit(f"{name} disagrees by {difference:.1e}")
        worst = max(worst, difference)
    return processes, worst


def main() -> None:
    parser = make_parser(list(peers.PEERS)[:7], seconds=6, tolerance=TOLERANCE)
    parser.add_argument("--cores", type=int, help="number of processor cores (Linux)")
    flags = parser.parse_args()
    if flags.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.cores])
    shapes = parse_shapes(flags.shapes) if flags.shapes else SHAPES
    floors = floor_milliseconds(shapes, flags.precision, flags.peaks, kind="inference")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        started = [
            Process(
                name,
                name == "cnn_jax",
                flags.peer_python,
                _IN_CALLING_THREAD if is_own(name) else None,
            )
            for name in flags.peers
        ]
        for process in started:
            stack.callback(process.close)
        folder = pathlib.Path(temporary)
        processes, worst = check_agreement(started, folder, flags.tolerance)
        print(f"probabilities agree to {worst:.1e}\n", flush=True)
        print_header()
        for side, batch_size in shapes:
            seconds = measure(
                processes,
                folder,
                side,
                batch_size,
                flags.precision,
                flags.seconds,
                do="predict",
            )
            processes = [process for process in processes if process.name in seconds]
            ours = seconds[processes[0].name]
            others = [seconds[p.name] for p in processes if not is_own(p.peer)]
            best_peer, floor_ms = min(others, default=float("nan")), floors[side, batch_size]
            rows.append(
                {
                    "image_size": side,
                    "batch_size": batch_size,
                    "ratio_to_best_peer": best_peer / ours,
                    "times_floor": 1e3 * ours / floor_ms,
                    "floor_ms": floor_ms,
                    "ms": {name: 1e3 * value for name, value in seconds.items()},
                    "agreement": worst,
                }
            )
            print_rows(seconds, side, batch_size, 1e3 * best_peer, floor_ms)
            write_json(flags.json, rows)
    exit_if_left_out(started, processes)


if __name__ == "__main__":
    main()
