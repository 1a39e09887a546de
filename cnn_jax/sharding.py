"""The mesh of devices and how arrays lie on it."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices of all processes along one axis, `data`."""
    # Flax Linen's dropout does not work under explicit axes, JAX's default.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split_by_example(mesh: Mesh) -> NamedSharding:
    """The first dimension divided among the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def accelerator_bytes() -> int:
    """Memory of one of this process's accelerators; 0 on a CPU, and where it is not told."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return 0
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def to_devices(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """The global batch from the rows that this process holds."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
