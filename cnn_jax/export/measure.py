"""Measures an exported model; a script that `certificate.measure` starts in a new process.

The process imports only the library that runs the model, so that its peak memory is the memory that
the model needs.
"""

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

_BATCH_SIZES = (1, 32)
_REPETITIONS = 10

Run = Callable[[np.ndarray], object]


def onnx(path: str) -> Run:
    """Returns the function that runs an ONNX model with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def stablehlo(path: str) -> Run:
    """Returns the function that runs a StableHLO artifact on the CPU."""
    import jax
    from jax import export

    exported = export.deserialize(bytearray(pathlib.Path(path).read_bytes()))
    run = jax.jit(exported.call)
    return lambda images: run(images).block_until_ready()


def litert(path: str) -> Run:
    """Returns the function that runs a LiteRT model, which takes one image at a time."""
    from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-not-found]

    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    index = interpreter.get_input_details()[0]["index"]

    def run(images: np.ndarray) -> None:
        for image in images:
            interpreter.set_tensor(index, image[None])
            interpreter.invoke()

    return run


def main() -> None:
    """Prints the measurements as JSON; the arguments are runner, path, height and width."""
    runner, path, height, width = sys.argv[1:]
    run = {"onnx": onnx, "stablehlo": stablehlo, "litert": litert}[runner](path)
    rng = np.random.default_rng(0)
    milliseconds = {}
    for size in _BATCH_SIZES:
        images = rng.integers(0, 256, (size, int(height), int(width), 3), np.uint8)
        run(images)
        seconds = []
        for _ in range(_REPETITIONS):
            start = time.perf_counter()
            run(images)
            seconds.append(time.perf_counter() - start)
        milliseconds[str(size)] = round(1000 * statistics.median(seconds) / size, 3)
    print(json.dumps({"milliseconds_per_image": milliseconds, "peak_memory_bytes": _peak_memory()}))


def _peak_memory() -> int | None:
    """Returns the peak memory of this process in bytes; None if the system does not report it."""
    # `getrusage` would return the peak memory of the parent process if that is larger.
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main()
