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

import os

import peers
from bench_train import PeerProcess, compare, is_own, make_parser

# The sides of the images in pixels and the batch sizes.
_SHAPES = "32x1,32x32,64x1,64x32,224x1,224x32"
_TOLERANCE = 1e-5
# This environment variable has the same effect as `runtime.compute_in_calling_thread`.
_IN_CALLING_THREAD = {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}


def main() -> None:
    parser = make_parser(list(peers.PEERS)[:7], _SHAPES, seconds=6, tolerance=_TOLERANCE)
    parser.add_argument("--cores", type=int, help="number of processor cores (Linux)")
    flags = parser.parse_args()
    if flags.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.cores])

    def start(name: str) -> PeerProcess:
        variables = _IN_CALLING_THREAD if is_own(name) else None
        return PeerProcess(name, name == "cnn_jax", flags.peer_python, variables)

    compare(flags, lambda: [start(name) for name in flags.peers], "predict")


if __name__ == "__main__":
    main()
