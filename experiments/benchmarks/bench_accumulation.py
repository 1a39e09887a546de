"""Measures the time of a training step that splits its batch into parts (gradient accumulation).

    python experiments/benchmarks/bench_accumulation.py [--pixels=32] [--batch_size=64] [--rounds=9]

The step processes the parts in a loop. Each number of parts is measured twice: with this
project's function for the input gradient of a convolution, and with XLA's function. XLA's CPU
compiler has no fast code for XLA's function inside a loop (`models/layers.py`). The cases take
turns; the numbers are median milliseconds and do not include compilation.
"""

import argparse
import statistics
from collections.abc import Callable

import jax
from common import default_step, random_batch, seconds_in_turns

from cnn_jax.models import layers
from cnn_jax.system import runtime

PARTS = (1, 2, 4)
OURS, XLAS = layers._input_gradient_on_cpu, layers._input_gradient


def make_step(side: int, batch_size: int, parts: int) -> Callable[[], object]:
    """Returns a function that runs a compiled step on random images and waits for the result."""
    train_step = default_step(side, accumulation_steps=parts)
    state = jax.jit(train_step.init_state)()
    batch = random_batch(side, batch_size)
    step = jax.jit(train_step, compiler_options=runtime.compiler_options())
    compiled = step.lower(state, batch).compile()

    return lambda: jax.block_until_ready(compiled(state, batch))


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step in parts.")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    flags = parser.parse_args()
    runtime.keep_freed_memory()
    steps = {}
    for name, gradient in (("cnn_jax", OURS), ("XLA's gradient", XLAS)):
        # `make_step` traces the training step with the gradient function that is set here.
        layers._input_gradient_on_cpu = gradient
        for parts in PARTS:
            steps[name, parts] = make_step(flags.pixels, flags.batch_size, parts)
    seconds = seconds_in_turns(steps, flags.rounds)
    print(f"JAX {jax.__version__}, {flags.pixels} x {flags.pixels}, batch {flags.batch_size}\n")
    print("| | " + " | ".join(f"{parts} part{'s' * (parts > 1)}" for parts in PARTS) + " |")
    print("| --- |" + " --- |" * len(PARTS))
    for name in ("cnn_jax", "XLA's gradient"):
        medians = [1e3 * statistics.median(seconds[name, parts]) for parts in PARTS]
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in medians) + " |")


if __name__ == "__main__":
    main()
