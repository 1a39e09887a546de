"""Milliseconds of an inference, beside PyTorch, ONNX Runtime and Keras.

    pip install -e '.[bench]' && python experiments/bench_inference.py [--json=FILE]

From uint8 images in host memory to probabilities in host memory, through the same
weights; each library in a process of its own, all in turn, as in `bench_train.py`. First
all must agree on the probabilities to 1e-5. Medians; compilation is apart.

This project keeps freed memory, as its commands do (`cnn_jax.runtime`), the others have
their defaults. "best peer" is the best of the others but plain Linen, "floor" that
of `experiments/roofline.py`.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import peers
from bench_train import (
    Process,
    floor_milliseconds,
    is_own,
    make_parser,
    measure,
    parse_shapes,
    print_header,
    print_rows,
    write_data,
)

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
        if not difference <= TOLERANCE:  # Nor if one of them is not a number.
            sys.exit(f"{process.name} disagrees by {difference:.1e}")
        worst = max(worst, difference)
    return worst


def main() -> None:
    flags = make_parser(list(peers.PEERS)[:7], seconds=6).parse_args()
    shapes = parse_shapes(flags.shapes) if flags.shapes else SHAPES
    floors = floor_milliseconds(shapes, flags.precision, kind="inference")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        processes = [
            Process(name, name == "cnn_jax", flags.peer_python) for name in flags.peers.split(",")
        ]
        for process in processes:
            stack.callback(process.close)
        folder = pathlib.Path(temporary)
        print(f"probabilities agree to {check_agreement(processes, folder):.1e}\n")
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
                }
            )
            print_rows(seconds, side, batch_size, 1e3 * best_peer, floor_ms)
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
