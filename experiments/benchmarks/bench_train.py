"""Compares the speed of this project's training step with PyTorch, Keras and plain Flax Linen.

    pip install -e '.[bench]' && python experiments/benchmarks/bench_train.py [--json=FILE]

Each library trains the default network of this project on the same batch in a separate process. The
processes take turns, so that other load on the machine affects all of them.

First, all libraries must agree on the loss and the gradients for the same weights: this
project in float32, the other libraries in float64 (in float32 the results of some libraries vary by
more than the tolerance). The limit is --tolerance times the largest number of each tensor.
TensorFloat-32, which GPUs use by default, is off for this comparison.

Then each step is timed until the device has finished it. The numbers are medians without
compilation and without the first steps. The data is on the device, except for Keras, whose
`train_on_batch` copies the data to the device. There is no input pipeline.

A library that fails is named and left out, and the exit status is 1 at the end. The JSON is
written after each shape.

"memory kept" means that the C library keeps freed memory, as in the training command
(`cnn_jax.system.runtime`). The variants of this project, each without one optimisation
(`peers.py`), also keep it. PyTorch also becomes faster, so it is measured both ways.
"best peer" is the fastest peer except plain Linen, with its default settings, so without
kept memory. "floor" is the shortest possible time by `experiments/benchmarks/roofline.py`.

--peer_python=PATH is the interpreter of another environment, for peers that cannot be
installed beside the JAX that is to be measured. --peaks=FILE is the JSON of
`experiments/benchmarks/roofline.py` for this precision, whose rates are then not measured again.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import peers
from common import CLASSES, KEPT, Process, write_json
from roofline import parse_shapes

# The sides of the images in pixels and the batch sizes.
_SHAPES = "32x256,64x128,224x32"
_TOLERANCE = 1e-4


def is_own(name: str) -> bool:
    """Returns whether an entry of `peers.PEERS` is this project or a variant of this project."""
    return issubclass(peers.PEERS[name], peers.Ours)


class PeerProcess(Process):
    """A process that runs one of the compared libraries.

    Attributes:
      peer: The name of the library in `peers.PEERS`.
      is_memory_kept: Whether the C library keeps freed memory.
    """

    def __init__(
        self,
        peer: str,
        is_memory_kept: bool = False,
        peer_python: str = sys.executable,
        variables: Mapping[str, str] | None = None,
    ):
        self.peer, self.is_memory_kept = peer, is_memory_kept
        python = sys.executable if peers.PEERS[peer].needs_cnn_jax else peer_python
        super().__init__(
            peer + ", memory kept" * is_memory_kept,
            [python, peers.__file__, peer],
            {
                "TF_CPP_MIN_LOG_LEVEL": "3",
                # All processes share one GPU, so no process may preallocate the GPU's memory.
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                **(KEPT if is_memory_kept else {}),
                **(variables or {}),
            },
        )


def without_failures(
    processes: list[PeerProcess], action: Callable[[PeerProcess], object]
) -> list[PeerProcess]:
    """Applies an action to each process, and returns the processes in which the action succeeded.

    Each process that fails is reported on stdout and closed.

    Raises:
      SystemExit: The first process, with which the other processes are compared, failed.
    """
    working = []
    for process in processes:
        try:
            action(process)
            working.append(process)
        except RuntimeError as error:
            print(f"left out: {error}\n", flush=True)
            process.close()
    if processes[0] not in working:
        sys.exit(f"{processes[0].name} failed, and nothing can be compared with it")
    return working


def write_data(path: pathlib.Path, side: int, batch_size: int) -> None:
    """Writes random weights, running statistics, images and labels to an .npz file."""
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
        ("head", peers.DENSE, CLASSES),
    ):
        arrays[f"params/{name}/kernel"] = rng.normal(0, (2 / inputs) ** 0.5, (inputs, outputs))
        arrays[f"params/{name}/bias"] = rng.normal(0, 0.1, outputs)
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    arrays["images"] = rng.integers(0, 256, (batch_size, side, side, 3), np.uint8)
    arrays["labels"] = rng.integers(0, CLASSES, batch_size).astype(np.int32)
    np.savez(path, allow_pickle=False, **arrays)


def check_agreement(
    processes: list[PeerProcess], folder: pathlib.Path, tolerance: float, do: str
) -> tuple[list[PeerProcess], float]:
    """Compares the results of all libraries for the same weights, without dropout.

    Args:
      processes: The processes; the first one runs this project.
      folder: A folder for temporary files.
      tolerance: The largest allowed difference, as a fraction of the largest number of each tensor.
      do: "gradients" for the loss and the gradients; the other libraries compute them in float64.
        "probabilities" for the class probabilities, in float32.

    Returns:
      The processes that answered, and the largest difference from this project's results, as a
      fraction of the largest number of each tensor.

    Raises:
      SystemExit: A difference is larger than the tolerance.
    """
    data = folder / "agree.npz"
    write_data(data, 32, 16)
    files = {process.name: folder / f"results{i}.npz" for i, process in enumerate(processes)}
    # All requests are sent before the first answer is read, so the processes compile in parallel.
    for process in processes:
        is_exact = do == "gradients" and not is_own(process.peer)
        precision = "float64" if is_exact else "float32"
        process.send(do="open", data=str(data), precision=precision, dropout=0.0)
        process.send(do=do, to=str(files[process.name]))
    results: dict[str, dict[str, Any]] = {}

    def read(process: PeerProcess) -> None:
        process.receive()
        reply = process.receive()  # This answer has the loss, if there is one.
        with np.load(files[process.name]) as arrays:
            results[process.name] = {**reply, **arrays}

    processes = without_failures(processes, read)
    expected = results[processes[0].name]
    worst = 0.0
    for name, arrays in results.items():
        assert arrays.keys() == expected.keys(), arrays.keys() ^ expected.keys()
        for key, array in arrays.items():
            difference = np.abs(array - expected[key]).max() / np.abs(expected[key]).max()
            if not difference <= tolerance:  # Unlike `>`, this condition is true for NaN.
                sys.exit(f"{name} disagrees in {key} by {difference:.1e}")
            worst = max(worst, float(difference))
    return processes, worst


def measure(
    processes: list[PeerProcess],
    folder: pathlib.Path,
    side: int,
    batch_size: int,
    precision: str,
    seconds: float,
    do: str,
) -> dict[str, float]:
    """Measures the action `do`, "train" or "predict"; returns the median seconds by process.

    The processes take turns of at most one second. Processes that fail are missing in the result.
    """
    data = folder / "data.npz"
    write_data(data, side, batch_size)
    per_turn = {}

    def open_and_warm_up(process: PeerProcess) -> None:
        process.ask(do="open", data=str(data), precision=precision, dropout=peers.DROPOUT)
        process.ask(do=do, times=3)
        step = statistics.median(process.ask(do=do, times=2)["seconds"])
        per_turn[process.name] = max(1, min(200, round(min(1.0, seconds) / step)))

    processes = without_failures(processes, open_and_warm_up)
    times: dict[str, list[float]] = {process.name: [] for process in processes}
    for _ in range(max(3, round(seconds / 1.5))):
        for process in processes:
            # The first step of a turn is not counted, because the processor's caches hold the data
            # of another process.
            reply = process.ask(do=do, times=1 + per_turn[process.name])
            times[process.name] += reply["seconds"][1:]
    return {name: statistics.median(values) for name, values in times.items()}


def peer_names(text: str) -> list[str]:
    """Parses a comma-separated list of names of `peers.PEERS`; an argparse type."""
    names = text.split(",")
    if unknown := set(names) - set(peers.PEERS):
        raise argparse.ArgumentTypeError(f"no {unknown}; there are {', '.join(peers.PEERS)}")
    return names


def make_parser(
    names: list[str], shapes: str, seconds: float, tolerance: float
) -> argparse.ArgumentParser:
    """Returns a parser with the flags that this benchmark shares with `bench_inference.py`."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--shapes", type=parse_shapes, default=shapes, help="side in pixels x batch size"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="seconds for each library and shape"
    )
    parser.add_argument(
        "--peers", type=peer_names, default=",".join(names), help="names of peers.py"
    )
    parser.add_argument("--peer_python", default=sys.executable, metavar="PATH")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=tolerance,
        help="largest allowed difference of the results",
    )
    parser.add_argument("--peaks", type=pathlib.Path, metavar="FILE", help="roofline.py's JSON")
    parser.add_argument("--json", type=pathlib.Path, help="write the metrics to this file, too")
    return parser


def print_rows(
    seconds: dict[str, float], side: int, batch_size: int, best_peer_ms: float, floor_ms: float
) -> None:
    """Prints a row for each library, for one pair of image size and batch size."""
    print(f"\n{side} x {side} pixels, batch {batch_size}, floor {floor_ms:.2f} ms")
    for name, value in seconds.items():
        print(
            f"{name:<39}  {1e3 * value:>8.2f}  {batch_size / value:>9,.1f}"
            f"  {best_peer_ms / 1e3 / value:>11.2f}  {1e3 * value / floor_ms:>7.2f}",
            flush=True,
        )


def compare(
    flags: argparse.Namespace,
    start: Callable[[], list[PeerProcess]],
    do: str,
) -> None:
    """Compares the speed of libraries; prints a table, and writes the JSON after each shape.

    Args:
      flags: The flags of `make_parser`.
      start: A function that starts the processes of the libraries; the first one is this project.
      do: "train" or "predict".

    Raises:
      SystemExit: A library failed, or the results of two libraries differ.
    """
    # The shortest possible times are measured before the compared libraries allocate the device's
    # memory.
    kind = "training" if do == "train" else "inference"
    floors = floor_milliseconds(flags.shapes, flags.precision, flags.peaks, kind)
    rows = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = pathlib.Path(temporary)
        started = start()
        for process in started:
            stack.callback(process.close)
        results = "gradients" if do == "train" else "probabilities"
        processes, worst = check_agreement(started, folder, flags.tolerance, results)
        print(f"{results} agree to {worst:.1e}\n", flush=True)
        print(f"{'':<39}  {'ms':>8}  {'images/s':>9}  {'/ best peer':>11}  {'/ floor':>7}")
        for side, batch_size in flags.shapes:
            shape, floor_ms = (side, batch_size), floors[side, batch_size]
            seconds = measure(processes, folder, *shape, flags.precision, flags.seconds, do)
            processes = [process for process in processes if process.name in seconds]
            others = [p for p in processes if not (is_own(p.peer) or p.is_memory_kept)]
            best_peer = min((seconds[p.name] for p in others), default=math.nan)
            ours = seconds[processes[0].name]
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


def main() -> None:
    parser = make_parser(list(peers.PEERS)[:6], _SHAPES, seconds=12, tolerance=_TOLERANCE)
    flags = parser.parse_args()
    names = flags.peers
    kept = [(name, name.startswith("cnn_jax ")) for name in names]
    # On CPUs, some libraries are measured a second time with `is_memory_kept`: the C library keeps
    # freed memory. This setting has no effect on GPUs, because the C library does not manage the
    # memory of GPUs.
    if not is_on_gpu():
        kept = [(names[0], True), *kept, *((name, True) for name in names[1:] if "orch" in name)]
    compare(
        flags,
        lambda: [PeerProcess(name, is_kept, flags.peer_python) for name, is_kept in kept],
        "train",
    )


def is_on_gpu() -> bool:
    """Returns whether the libraries compute on an NVIDIA GPU."""
    return pathlib.Path("/dev/nvidia0").exists() and os.environ.get("JAX_PLATFORMS") != "cpu"


def exit_if_left_out(started: Sequence[PeerProcess], processes: Sequence[PeerProcess]) -> None:
    """Raises SystemExit if a process in `started` has failed and was removed from `processes`."""
    working = {process.name for process in processes}
    if failed := [process.name for process in started if process.name not in working]:
        sys.exit(f"failed and left out: {', '.join(failed)}")


def floor_milliseconds(
    shapes: tuple[tuple[int, int], ...],
    precision: str,
    peaks: pathlib.Path | None = None,
    kind: str = "training",
) -> dict[tuple[int, int], float]:
    """Runs `roofline.py` in a new process, and returns the shortest possible time of each shape.

    The process frees the device memory when it exits.

    Args:
      shapes: Pairs of the side of an image in pixels and the batch size.
      precision: "float32" or "bfloat16".
      peaks: The JSON of `roofline.py`, whose rates are used; None to measure them.
      kind: "training" or "inference".
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run(
            [
                *(sys.executable, str(pathlib.Path(__file__).with_name("roofline.py"))),
                f"--shapes={','.join(f'{side}x{batch_size}' for side, batch_size in shapes)}",
                *(f"--precision={precision}", f"--json={file.name}"),
                *([f"--peaks={peaks}"] if peaks else []),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows = json.loads(pathlib.Path(file.name).read_text())["rows"]
    return {
        (row["image_size"], row["batch_size"]): row["floor_ms"]
        for row in rows
        if row["kind"] == kind
    }


if __name__ == "__main__":
    main()
