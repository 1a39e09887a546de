"""Functions that several benchmarks use.

The processes of other libraries import this module in their own environments. Therefore the module
imports neither this project nor JAX; the functions that need them import them when they are called.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CLASSES = 10
# These environment variables have the same effect as `runtime.keep_freed_memory`. They also work in
# processes that do not import this project, such as PyTorch's process.
KEPT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
}


# Times.


def seconds_of_each(
    action: Callable[[], object], count: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Calls a function `count` times, and returns the seconds of each call by a clock."""
    times = []
    for _ in range(count):
        start = clock()
        action()
        times.append(clock() - start)
    return times


def seconds_in_turns(
    actions: Mapping[Any, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 1,
) -> dict[Any, list[float]]:
    """Calls functions in turns, so that other load on the machine affects all of them.

    Args:
      actions: The functions, by name.
      rounds: The number of measured calls of each function.
      clock: A function that returns a time in seconds.
      warm_up: The number of further first calls that do not count, because they may compile.

    Returns:
      The seconds of each measured call, by name.
    """
    times: dict[Any, list[float]] = {name: [] for name in actions}
    for _ in range(warm_up + rounds):
        for name, action in actions.items():
            times[name] += seconds_of_each(action, 1, clock)
    return {name: values[warm_up:] for name, values in times.items()}


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time of all threads of a process on Linux."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_megabytes(pid: int, field: str) -> float:
    """Returns the memory of a process on Linux: VmRSS for the present one, VmHWM for the peak."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def device_peak_bytes() -> int:
    """Returns the peak memory of JAX's first device in bytes, or 0 if it is unknown."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


# Processes.


def child_environment(repository: pathlib.Path = REPOSITORY) -> dict[str, str]:
    """Returns the environment of a process that imports `cnn_jax` from the folder `repository`."""
    folders = [str(repository), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


class Process:
    """A process that answers requests; each request and each answer is one line of JSON."""

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str]):
        """Starts a process.

        Args:
          name: The name for messages.
          command: The command; its program calls `answer_requests`.
          variables: Further environment variables.
        """
        self.name = name
        # The log is a file, because an unread pipe would block a process that prints many warnings.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_VERBOSE") else self._log,
            env={**os.environ, **variables},
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request to the process, and returns the answer.

        Raises:
          RuntimeError: The process ended without an answer; the message has its last output.
        """
        self.send(**request)
        return self.receive()

    def send(self, **request: Any) -> None:
        """Sends a request to the process, and does not wait for the answer."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Waits for the answer to the oldest unanswered request, and returns the answer.

        Raises:
          RuntimeError: The process ended without an answer; the message has its last output.
        """
        process = self._process
        assert process.stdout
        reply = process.stdout.readline()
        if not reply:
            process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{self.name} failed: {self._log.read()[-2000:]}")
        return json.loads(reply)

    def close(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()


def answer_requests(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers the requests on stdin with a function until stdin is closed; see `Process`.

    Text that a library prints goes to stderr, because stdout is only for the answers.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()


def write_json(path: pathlib.Path | None, value: Any) -> None:
    """Writes a value to a JSON file; does nothing if `path` is None."""
    if path:
        path.write_text(json.dumps(value, indent=1) + "\n")


# Batches, networks and models.


def random_batch(side: int, batch_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a batch of random images, uint8 [batch_size, side, side, 3], and random labels."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (batch_size, side, side, 3), np.uint8),
        "label": rng.integers(0, CLASSES, batch_size).astype(np.int32),
        "mask": np.ones(batch_size, bool),
    }


def default_step(side: int, precision: str = "float32", **changes: Any) -> Any:
    """Returns the `TrainStep` of the default network for square images.

    Args:
      side: The side of the images in pixels.
      precision: "float32" or "bfloat16".
      changes: Other values of the fields of `TrainStep`.
    """
    from cnn_jax.data.preprocessing import Preprocessing
    from cnn_jax.models.cnn import CNN
    from cnn_jax.training.optimizer import make_optimizer, make_schedule
    from cnn_jax.training.step import TrainStep

    values = {
        "model": CNN(num_classes=CLASSES, dtype=np.dtype(precision)),
        "optimizer": make_optimizer(make_schedule(1e-3, 1e-3, total_steps=1), 1e-4),
        "preprocessing": Preprocessing((side, side)),
        "label_smoothing": 0.1,
    }
    return TrainStep(**values | changes)


def random_bundle(section: Mapping[str, Any], side: int, seed: int = 0) -> Any:
    """Returns a `Bundle` with an untrained network, which is as fast as a trained network.

    Args:
      section: The section `model` of a configuration.
      side: The side of the images in pixels.
      seed: The seed of the weights.
    """
    import jax
    import jax.numpy as jnp

    from cnn_jax.data.preprocessing import Preprocessing
    from cnn_jax.inference.bundle import Bundle
    from cnn_jax.models.network import make_model

    model = make_model(section, CLASSES, "float32")
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, side, side, 3)))
    # After training, no scale is 1 and no shift is 0. Otherwise an export would be another graph.
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(
        lambda leaf: leaf + np.float32(0.1) * rng.random(leaf.shape, np.float32), variables
    )
    return Bundle(
        model=dict(section),
        precision="float32",
        class_names=[f"class {number}" for number in range(CLASSES)],
        preprocessing=Preprocessing(image_size=(side, side)),
        temperature=1.0,
        data={},
        metrics={},
        variables=variables,
    )


def one_thread_session(model: bytes | str) -> Any:
    """Returns an ONNX Runtime session with one thread for a model or the path of a model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
