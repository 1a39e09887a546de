"""Measures the time and the memory of a training step for several values of `train.from_stage`.

    python experiments/benchmarks/bench_frozen.py [--network=tf_efficientnet_lite0]
        [--from_stages blocks_4 head] [--image_size=64] [--batch_size=32] [--seconds=8]

The first row trains all stages. The program runs on one core, and the steps of the rows take
turns. A time is the median of the processor time, without compilation. "temporary memory" is what
XLA allocates for the activations and gradients of a step; "optimizer state" is the memory of
Adam's moments.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
from common import CLASSES, random_batch, seconds_of_each
from jaxtyping import PyTree

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from cnn_jax.config.schema import default_config
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.models import NETWORKS
from cnn_jax.models.network import make_model
from cnn_jax.system import runtime
from cnn_jax.training.optimizer import make_optimizer, make_schedule
from cnn_jax.training.step import TrainStep


def size(tree: PyTree) -> float:
    """Returns the memory of all arrays of a tree, in megabytes."""
    return sum(array.nbytes for array in jax.tree.leaves(tree)) / 1e6


def compile_step(
    flags: argparse.Namespace, from_stage: str
) -> tuple[Callable[[], None], float, float]:
    """Compiles the training step.

    Returns:
      A function that runs one step, the temporary memory, and the memory of the optimizer state,
      in megabytes.
    """
    section = default_config(flags.network).model.to_dict()
    model = make_model(section, CLASSES, "float32", from_stage)
    step = TrainStep(
        model=model,
        optimizer=make_optimizer(make_schedule(1e-4, 1e-4, 1), l2=0.0),
        preprocessing=Preprocessing(image_size=(flags.image_size, flags.image_size)),
        is_trainable=model.is_trained_parameter if from_stage else None,
    )
    batch = jax.device_put(random_batch(flags.image_size, flags.batch_size))
    state = jax.jit(step.init_state, compiler_options=runtime.quick_compiler_options())()
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    compiled = lowered.compile(runtime.compiler_options())

    def run() -> None:
        nonlocal state
        state, _ = compiled(state, batch)
        jax.block_until_ready(state)

    memory = compiled.memory_analysis()
    assert memory is not None
    return run, memory.temp_size_in_bytes / 1e6, size(state.opt_state)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=NETWORKS, default="tf_efficientnet_lite0")
    parser.add_argument("--from_stages", nargs="+", default=["blocks_4", "head"])
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8, help="for each row")
    flags = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    runtime.keep_freed_memory()
    names = ["", *flags.from_stages]
    steps = {name: compile_step(flags, name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.process_time() + flags.seconds * len(names)
    while time.process_time() < end:
        for name in names:
            # The first of three steps is not counted, because the processor's caches hold the data
            # of another row.
            times[name] += seconds_of_each(steps[name][0], 3, time.process_time)[1:]
    print("| trained from | ms per image | temporary memory | optimizer state |")
    print("| --- | --- | --- | --- |")
    for name in names:
        _, temporary, optimizer = steps[name]
        milliseconds = 1e3 * statistics.median(times[name]) / flags.batch_size
        print(
            f"| {name or 'all stages'} | {milliseconds:.2f} | {temporary:.0f} MB "
            f"| {optimizer:.1f} MB |"
        )


if __name__ == "__main__":
    main()
