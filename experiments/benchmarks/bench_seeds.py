"""Compares three ways to train several networks with different seeds on one device.

    python experiments/benchmarks/bench_seeds.py [--shapes=32x32,224x32] [--counts=1,4,16]
        [--json=FILE]

A small network does not fill a GPU. Here K networks take a step on the same batch, each with
its own dropout seed. The three ways are K single steps one after the other, one program with a
loop (`jax.lax.map`), and one program for all K networks (`jax.vmap`). The table has the median
milliseconds of one step of one network. Compilation is not included. `cnn_jax train --members`
uses the third way on a GPU, and the second way elsewhere.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from common import default_step, random_batch, seconds_in_turns, write_json
from roofline import parse_shapes

from cnn_jax.system import runtime
from cnn_jax.training.step import TrainState, TrainStep

Step = Callable[[TrainState, jax.Array], TrainState]


def make_step(side: int, batch_size: int, precision: str) -> tuple[Step, Callable[[int], Any]]:
    """Returns the training step of one network, and a function that initialises the network.

    The function takes a seed and returns the initial train state.
    """
    train_step = default_step(side, precision)
    batch = jax.device_put(random_batch(side, batch_size))

    def step(state: TrainState, seed: jax.Array) -> TrainState:
        return with_seed(seed)(state, batch)[0]

    def with_seed(seed: Any) -> TrainStep:
        # The seed is a traced argument, so one compiled program serves the seeds of all networks.
        return dataclasses.replace(train_step, seed=seed)

    return step, jax.jit(lambda seed: with_seed(seed).init_state())


def milliseconds(
    step: Step, single: Step, init: Callable[[int], Any], count: int, rounds: int
) -> dict[str, float]:
    """Returns, for each of the three methods, the median milliseconds per step and network.

    Args:
      step: The step of one network.
      single: `step` under `jax.jit`.
      init: The function from a seed to the initial state.
      count: Number of networks that are trained together.
      rounds: Number of measurements of each method.
    """
    seeds = jnp.arange(count)
    states = [init(seed) for seed in range(count)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    jit = functools.partial(jax.jit, compiler_options=runtime.compiler_options())
    mapped = jit(lambda states, seeds: jax.lax.map(lambda pair: step(*pair), (states, seeds)))
    ways: dict[str, Callable[[], Any]] = {
        "single": lambda: [single(state, seed) for state, seed in zip(states, seeds, strict=True)],
        "map": functools.partial(mapped, stacked, seeds),
        "vmap": functools.partial(jit(jax.vmap(step)), stacked, seeds),
    }
    actions = {name: lambda run=run: jax.block_until_ready(run()) for name, run in ways.items()}
    seconds = seconds_in_turns(actions, rounds, warm_up=2)
    return {name: 1e3 * statistics.median(times) / count for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", type=parse_shapes, default="32x32,224x32")
    parser.add_argument("--counts", default="1,4,16", help="numbers of networks")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=pathlib.Path, help="write the metrics to this file, too")
    flags = parser.parse_args()
    runtime.keep_freed_memory()
    print("| pixels | batch | networks | single ms | lax.map ms | vmap ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for side, batch_size in flags.shapes:
        step, init = make_step(side, batch_size, flags.precision)
        single = jax.jit(step, compiler_options=runtime.compiler_options())
        for count in map(int, flags.counts.split(",")):
            found = milliseconds(step, single, init, count, flags.rounds)
            rows.append(
                {"image_size": side, "batch_size": batch_size, "networks": count, "ms": found}
            )
            cells = " | ".join(f"{value:.3f}" for value in found.values())
            print(f"| {side} | {batch_size} | {count} | {cells} |", flush=True)
            write_json(flags.json, rows)


if __name__ == "__main__":
    main()
