"""Measures the time of a training step on 1, 2, 4 and 8 devices.

    python experiments/benchmarks/bench_scaling.py [--rounds=7] [--steps=20]

The same training step runs on the same global batch on 1, 2, 4 and 8 devices. On a CPU all
devices share the cores of one machine. The costs of dividing (collective operations,
smaller matrices) make several devices slower than one device. But XLA does not divide every
operation among all cores, so one device leaves cores idle; this makes several devices faster.

All cases take turns in one process, so that other load on the machine affects all of them.
The numbers are medians over rounds without compilation. One device is measured twice, to
show the noise. The last columns are the differences of the loss from the loss on one device.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import numpy as np
from common import default_step, random_batch

from cnn_jax.system import runtime
from cnn_jax.training import sharding
from cnn_jax.training.metrics import Metrics


class Trainer:
    """A trainer of the default CNN on a given number of devices."""

    def __init__(self, num_devices: int, model: int, side: int, batch_size: int):
        self.name = f"{num_devices} device{'s' * (num_devices > 1)}" + f", model {model}" * (
            model > 1
        )
        mesh = sharding.make_mesh(model, jax.devices()[:num_devices])
        self._layout = sharding.Layout(mesh, batch_size)
        step = default_step(side)
        state_sharding = sharding.split_large(mesh, jax.eval_shape(step.init_state))
        self._state = jax.jit(step.init_state, out_shardings=state_sharding)()
        self._step = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(state_sharding, self._layout.batch_sharding),
            out_shardings=(state_sharding, self._layout.replicated),
            compiler_options=runtime.compiler_options(),
        )

    def run(self, batches: list[dict[str, np.ndarray]]) -> tuple[float, list[float]]:
        """Trains on the batches; returns the mean seconds of a step, and the loss of each step."""
        metrics: list[Metrics] = []
        began = time.perf_counter()
        for batch in batches:
            self._state, batch_metrics = self._step(self._state, self._layout.to_devices(batch))
            metrics.append(batch_metrics)
        jax.block_until_ready(metrics)
        seconds = (time.perf_counter() - began) / len(batches)
        return seconds, [float(batch_metrics.compute()["loss"]) for batch_metrics in metrics]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--image_size", type=int, default=32)
    flags = parser.parse_args()
    sizes = (flags.image_size, flags.batch_size)
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()]
    trainers = [Trainer(n, 1, *sizes) for n in counts]
    # One device is measured twice, to show the noise of the measurement.
    trainers += [Trainer(1, 1, *sizes)]
    trainers[-1].name = "1 device again"
    if jax.device_count() >= 4:
        trainers.append(Trainer(4, 2, *sizes))
    batches = [random_batch(*sizes, seed) for seed in range(flags.steps)]
    # The time of the first call is ignored, because it includes the compilation.
    losses = [trainer.run(batches)[1] for trainer in trainers]
    seconds: list[list[float]] = [[] for _ in trainers]
    for _ in range(flags.rounds):
        for trainer, times in zip(trainers, seconds, strict=True):
            times.append(trainer.run(batches)[0])

    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, JAX {jax.__version__};", end=" "
    )
    print(f"global batch {flags.batch_size} at {flags.image_size} x {flags.image_size} pixels\n")
    print("| | ms a step | times one device | from - to | loss, step 1 | loss, last step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for trainer, times, own_losses in zip(trainers, seconds, losses, strict=True):
        ratios = sorted(t / one for t, one in zip(times, seconds[0], strict=True))
        row = {
            "name": trainer.name,
            "milliseconds": 1e3 * statistics.median(times),
            "ratio": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "first": abs(own_losses[0] - losses[0][0]),
            "last": abs(own_losses[-1] - losses[0][-1]),
        }
        print(
            "| {name} | {milliseconds:.1f} | {ratio:.2f} | {lowest:.2f} - {highest:.2f} "
            "| {first:.1e} | {last:.1e} |".format(**row)
        )


if __name__ == "__main__":
    main()
