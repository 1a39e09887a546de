"""Compares the speed of augmentation with OpenCV on the host and with JAX on the device.

    python experiments/benchmarks/bench_augment.py

Prints the median milliseconds for a batch of 32, without compilation. The two
implementations take turns. The column "host" is measured with one thread, as in a worker process;
the device is JAX's default device.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
from common import seconds_in_turns

from cnn_jax.data import augment

BATCH_SIZE = 32
REPEATS = 30


def main() -> None:
    print(f"device: {jax.devices()[0].device_kind}")
    print(f"{'pixels':>8}  {'host ms':>8}  {'device ms':>9}  {'device / host':>13}")
    on_device = jax.jit(augment.apply_on_device)
    recipe = augment.Augmentation("horizontal", 0.2, 0.2, 0.2)
    rng = np.random.default_rng(0)
    for side in (32, 64, 128, 224):
        images = rng.integers(0, 256, (BATCH_SIZE, side, side, 3), np.uint8)
        draws = augment.draw(rng, recipe, BATCH_SIZE, (side, side))
        arguments = {"images": images, **draws}
        device_arguments = jax.tree.map(jnp.array, arguments)
        actions = {
            "host": lambda a=arguments: augment.apply_on_host(**a),
            "device": lambda a=device_arguments: jax.block_until_ready(on_device(**a)),
        }
        times = seconds_in_turns(actions, REPEATS)
        host_ms, device_ms = (1e3 * statistics.median(values) for values in times.values())
        print(f"{side:>8}  {host_ms:>8.2f}  {device_ms:>9.2f}  {device_ms / host_ms:>13.1f}")


if __name__ == "__main__":
    main()
