"""Images a second of a training step, beside PyTorch, Keras and plain Linen.

    pip install -e '.[bench]' && python experiments/bench_train.py [--json=FILE]

Each library trains the specification's network on the same batch in a process of its own;
the processes take turns, so that a busy moment of the machine hits all alike. First all
must agree on loss and gradients for the same weights: this project in float32 with the
others in float64 (in float32 some differ from themselves by more), to 1e-4 of the largest
number of each tensor. Then steps are timed one by one, to their end on the device.
Medians; compilation and the first steps are apart. The data is on the device, but for
Keras's, which `train_on_batch` sends; no input pipeline takes part.

"memory kept" is what the training command does to its own process (`cnn_jax.runtime`): the
C library keeps freed memory; so it is for variants of this project, which have one of its
optimisations taken back (`peers.py`). PyTorch gains by it as well, if its user knows of it,
so it is measured both ways. "best peer" is the best of all but plain Linen with the settings
that its users have: without it. (The JSON also has the ratio where neither has it.) "floor"
is that of `experiments/roofline.py`.

--peer_python=PATH is the interpreter of another environment, for peers that cannot be
installed beside the JAX that is to be measured.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import peers

# Pixels on a side, and images in a batch.
SHAPES = ((32, 256), (64, 128), (224, 32))
# As `runtime.keep_freed_memory` does; the environment reaches processes of any kind.
KEPT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
}
TOLERANCE = 1e-4


def is_own(name: str) -> bool:
    """Whether a peer is this project's, or a variant of it."""
    return issubclass(peers.PEERS[name], peers.Ours)


class Process:
    """A peer in a process of its own."""

    def __init__(self, name: str, is_memory_kept: bool, peer_python: str):
        self.peer, self.name = name, name + ", memory kept" * is_memory_kept
        self._process = subprocess.Popen(
            [sys.executable if is_own(name) else peer_python, peers.__file__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not os.environ.get("BENCH_VERBOSE") else None,
            env={
                **os.environ,
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # All of them share one GPU.
                **(KEPT if is_memory_kept else {}),
            },
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request; returns the answer.

        Raises:
          RuntimeError: The process has ended instead, with what it said last.
        """
        process = self._process
        assert process.stdin
        assert process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        reply = process.stdout.readline()
        if not reply:
            said = process.stderr.read() if process.stderr else ""
            raise RuntimeError(f"{self.name} failed: {said[-2000:]}")
        return json.loads(reply)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def write_data(path: pathlib.Path, side: int, batch_size: int) -> None:
    """Random weights, images and labels: the first epoch's network, not all zeros and ones."""
    rng = np.random.default_rng(0)
    arrays: peers.Arrays = {}
    channels = 3
    for i, features in enumerate(peers.FEATURES, start=1):
        deviation = (2 / (9 * channels)) ** 0.5
        arrays |= {
            f"params/conv{i}/kernel": rng.normal(0, deviation, (3, 3, channels, features)),
            f"params/conv{i}/bias": rng.normal(0, 0.1, features),
            f"params/norm{i}/scale": rng.uniform(0.5, 1.5, features),
            f"params/norm{i}/bias": rng.normal(0, 0.1, features),
            f"batch_stats/norm{i}/mean": rng.uniform(0.3, 0.5, features),
            f"batch_stats/norm{i}/var": rng.uniform(0.3, 0.5, features),
        }
        channels = features
    for name, inputs, outputs in (
        ("dense", channels, peers.DENSE),
        ("head", peers.DENSE, peers.CLASSES),
    ):
        arrays[f"params/{name}/kernel"] = rng.normal(0, (2 / inputs) ** 0.5, (inputs, outputs))
        arrays[f"params/{name}/bias"] = rng.normal(0, 0.1, outputs)
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    arrays["images"] = rng.integers(0, 256, (batch_size, side, side, 3), np.uint8)
    arrays["labels"] = rng.integers(0, peers.CLASSES, batch_size).astype(np.int32)
    np.savez(path, allow_pickle=False, **arrays)


def check_agreement(processes: list[Process], folder: pathlib.Path) -> float:
    """Loss and gradients of all, for the same weights, without dropout.

    Returns:
      The largest difference from this project's, as a part of the largest number of each
      tensor.

    Raises:
      SystemExit: It is larger than TOLERANCE.
    """
    data = folder / "agree.npz"
    write_data(data, 32, 16)
    results = {}
    for process in processes:
        precision = "float32" if is_own(process.peer) else "float64"
        process.ask(do="open", data=str(data), precision=precision, dropout=0.0)
        to = folder / "gradients.npz"
        loss = process.ask(do="gradients", to=str(to))["loss"]
        with np.load(to) as gradients:
            results[process.name] = {"loss": np.float64(loss), **gradients}
    expected = results[processes[0].name]
    worst = 0.0
    for name, arrays in results.items():
        assert arrays.keys() == expected.keys(), arrays.keys() ^ expected.keys()
        for key, array in arrays.items():
            difference = np.abs(array - expected[key]).max() / np.abs(expected[key]).max()
            if not difference <= TOLERANCE:  # Nor if one of them is not a number.
                sys.exit(f"{name} disagrees in {key} by {difference:.1e}")
            worst = max(worst, difference)
    return worst


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Pixels and images of "32x256,224x32"."""
    pairs = (shape.split("x") for shape in text.split(","))
    return tuple((int(side), int(batch_size)) for side, batch_size in pairs)


def measure(
    processes: list[Process],
    folder: pathlib.Path,
    side: int,
    batch_size: int,
    precision: str,
    seconds: float,
    do: str = "train",
) -> dict[str, float]:
    """Median seconds of a step of each (or of what else it is to `do`), in turns of a second."""
    data = folder / "data.npz"
    write_data(data, side, batch_size)
    per_turn = {}
    for process in processes:
        process.ask(do="open", data=str(data), precision=precision, dropout=peers.DROPOUT)
        process.ask(do=do, times=3)
        step = statistics.median(process.ask(do=do, times=2)["seconds"])
        per_turn[process.name] = max(1, min(200, round(1.0 / step)))
    times: dict[str, list[float]] = {process.name: [] for process in processes}
    for _ in range(max(3, round(seconds / 1.5))):
        for process in processes:
            # The first step of a turn finds caches that others have filled.
            reply = process.ask(do=do, times=1 + per_turn[process.name])
            times[process.name] += reply["seconds"][1:]
    return {name: statistics.median(values) for name, values in times.items()}


def make_parser(names: list[str], seconds: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", help="such as 32x256,224x32: pixels x images")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=seconds, help="for each library and shape")
    parser.add_argument("--peers", default=",".join(names), help="names of peers.py")
    parser.add_argument("--peer_python", default=sys.executable, metavar="PATH")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file, too")
    return parser


def print_header() -> None:
    print(f"{'':<39}  {'ms':>8}  {'images/s':>9}  {'/ best peer':>11}  {'/ floor':>7}")


def print_rows(
    seconds: dict[str, float], side: int, batch_size: int, best_peer_ms: float, floor_ms: float
) -> None:
    """What each needs for one shape."""
    print(f"\n{side} x {side} pixels, batch {batch_size}, floor {floor_ms:.2f} ms")
    for name, value in seconds.items():
        print(
            f"{name:<39}  {1e3 * value:>8.2f}  {batch_size / value:>9,.1f}"
            f"  {best_peer_ms / 1e3 / value:>11.2f}  {1e3 * value / floor_ms:>7.2f}",
            flush=True,
        )


def main() -> None:
    flags = make_parser(list(peers.PEERS)[:6], seconds=12).parse_args()
    shapes = parse_shapes(flags.shapes) if flags.shapes else SHAPES
    names = flags.peers.split(",")
    floors = floor_milliseconds(shapes, flags.precision)  # While nobody holds the memory.
    as_is = [(name, name.startswith("cnn_jax ")) for name in names]
    if not pathlib.Path("/dev/nvidia0").exists():  # On a GPU, its memory is what counts.
        as_is = [(names[0], True), *as_is, *((name, True) for name in names[1:] if "orch" in name)]
    processes = [Process(name, is_kept, flags.peer_python) for name, is_kept in as_is]
    rows = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.close)
        folder = pathlib.Path(temporary)
        worst = check_agreement(processes, folder)
        print(f"loss and gradients agree to {worst:.1e}\n", flush=True)
        print_header()
        for side, batch_size in shapes:
            seconds = measure(processes, folder, side, batch_size, flags.precision, flags.seconds)
            row = summarize(seconds, side, batch_size, processes[0].name, floors[side, batch_size])
            rows.append(row)
            print_rows(seconds, side, batch_size, row["best_peer_ms"], row["floor_ms"])
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=2) + "\n")


def floor_milliseconds(
    shapes: tuple[tuple[int, int], ...], precision: str, kind: str = "training"
) -> dict[tuple[int, int], float]:
    """By `roofline.py`, in a process of its own, so that none of this one's memory is in it."""
    floors = {}
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        for side, batch_size in shapes:
            subprocess.run(
                [
                    *(sys.executable, str(pathlib.Path(__file__).with_name("roofline.py"))),
                    *(f"--image_size={side}", f"--batch_size={batch_size}"),
                    *(f"--precision={precision}", f"--json={file.name}"),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            found = json.loads(pathlib.Path(file.name).read_text())["rows"]
            floors[side, batch_size] = next(row["floor_ms"] for row in found if row["kind"] == kind)
    return floors


def summarize(
    seconds: dict[str, float], side: int, batch_size: int, ours: str, floor_ms: float
) -> dict[str, Any]:
    """The figures of one shape; rates are images a second."""
    by_default = {
        name: value
        for name, value in seconds.items()
        if not name.startswith(("cnn_jax", "plain Linen")) and "memory kept" not in name
    }

    def best(part: str) -> float | None:
        found = [value for name, value in by_default.items() if part in name]
        return batch_size / min(found) if found else None

    best_peer = min(by_default.values(), default=float("nan"))
    return {
        "image_size": side,
        "batch_size": batch_size,
        "ours": batch_size / seconds[ours],
        "torch": best("orch"),
        "keras": best("Keras"),
        "ratio_to_best_peer": best_peer / seconds[ours],
        "ratio_by_default_allocation": best_peer / seconds.get("cnn_jax", float("nan")),
        "times_floor": 1e3 * seconds[ours] / floor_ms,
        "floor_ms": floor_ms,
        "best_peer_ms": 1e3 * best_peer,
        "ms": {name: 1e3 * value for name, value in seconds.items()},
    }


if __name__ == "__main__":
    main()
