"""Milliseconds of an inference, beside PyTorch, ONNX Runtime and Keras.

    pip install -e '.[bench]' && python experiments/bench_inference.py [--json=FILE]

From uint8 images in host memory to probabilities in host memory, through the same
weights; each library in a process of its own with its defaults, all in turn, as in
`bench_train.py`. First all must agree on the probabilities to 1e-5. Medians; compilation
is apart. "best peer" is the best of all others, "floor" that of `experiments/roofline.py`.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import peers
from bench_train import Process, floor_milliseconds, measure, parse_shapes, write_data

# Pixels on a side, and images in a batch.
SHAPES = ((32, 1), (32, 32), (64, 1), (64, 32), (224, 1), (224, 32))
TOLERANCE = 1e-5


def check_agreement(processes: list[Process], folder: pathlib.Path) -> float:
    """The largest difference of a probability from this project's.

    Raises:
      SystemExit: It is larger than TOLERANCE.
    """
    data, to = folder / "agree.npz", folder / "probabilities.npz"
    write_data(data, 64, 8)
    expected, worst = None, 0.0
    for process in processes:
        process.ask(do="open", data=str(data), precision="float32", dropout=peers.DROPOUT)
        process.ask(do="probabilities", to=str(to))
        with np.load(to) as arrays:
            found = arrays["probabilities"]
        expected = found if expected is None else expected
        difference = float(np.abs(found - expected).max())
        if difference > TOLERANCE:
            sys.exit(f"{process.name} disagrees by {difference:.1e}")
        worst = max(worst, difference)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", help="such as 32x1,224x32: pixels x images")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=6, help="for each library and shape")
    parser.add_argument("--peers", default=",".join(peers.PEERS), help="their names")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    flags = parser.parse_args()
    shapes = parse_shapes(flags.shapes) if flags.shapes else SHAPES
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        processes = [Process(name, is_memory_kept=False) for name in flags.peers.split(",")]
        for process in processes:
            stack.callback(process.close)
        folder = pathlib.Path(temporary)
        print(f"probabilities agree to {check_agreement(processes, folder):.1e}\n")
        floors = floor_milliseconds(shapes, flags.precision, kind="inference")
        print(f"{'':<22}  {'ms':>8}  {'images/s':>9}  {'/ best peer':>11}  {'/ floor':>7}")
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
            ours, *others = (seconds[process.name] for process in processes)
            best_peer, floor_ms = min(others, default=float("nan")), floors[side, batch_size]
            rows.append(
                {
                    "image_size": side,
                    "batch_size": batch_size,
                    "ratio_to_best_peer": best_peer / ours,
                    "times_floor": 1e3 * ours / floor_ms,
                    "floor_ms": floor_ms,
                    "ms": {name: 1e3 * value for name, value in seconds.items()},
                }
            )
            print(f"\n{side} x {side} pixels, batch {batch_size}, floor {floor_ms:.3f} ms")
            for name, value in seconds.items():
                print(
                    f"{name:<22}  {1e3 * value:>8.2f}  {batch_size / value:>9,.1f}"
                    f"  {best_peer / value:>11.2f}  {1e3 * value / floor_ms:>7.2f}",
                    flush=True,
                )
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
