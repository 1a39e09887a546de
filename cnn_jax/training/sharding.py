"""The processes of a run, the mesh of their devices, and how arrays lie on it."""

import contextlib
import os
import pathlib
import re
import resource
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

from cnn_jax.data.dataset import memory_bytes
from cnn_jax.system.errors import ConfigError, TrainingError, UserError

# A process that has not been heard of for so many seconds is taken for dead, and
# JAX ends the others. (JAX's own 100 would keep them waiting for nothing.)
_HEARTBEAT_SECONDS = 30
# Parameters with fewer elements than this lie whole on each device.
_LEAST_DIVIDED = 2**14
# How the libraries that move data between processes say that one of them is gone.
_LOST = re.compile(r"by peer|Gloo|NCCL|unhealthy|heartbeat|Barrier", re.IGNORECASE)


def start_processes(
    coordinator: str | None = None, process_id: int | None = None, process_count: int | None = None
) -> None:
    """Connects the processes of one run. To be called before any other use of JAX.

    Without arguments JAX itself looks for Slurm, Open MPI, Kubernetes and Cloud TPU,
    and if it finds none of them there is one process.

    Args:
      coordinator: host:port at which process 0 listens.
      process_id: Which one this is, from 0.
      process_count: How many there are; 1 alone means one process, wherever it runs.

    Raises:
      ConfigError: Only some are given, or they contradict each other.
      TrainingError: The processes do not find each other.
    """
    if process_count == 1 and coordinator is None:
        return
    given = (coordinator, process_id, process_count)
    if given != (None, None, None) and None in given:
        raise ConfigError("--coordinator, --process_id and --process_count belong together")
    if process_id is not None and process_count is not None and process_id >= process_count:
        raise ConfigError(f"--process_id: must be below --process_count={process_count}")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"--coordinator: must be HOST:PORT, got {coordinator!r}")
    try:
        jax.distributed.initialize(
            coordinator, process_count, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except ValueError as error:
        # What JAX says where it detects none of those that it knows.
        if coordinator is not None or "coordinator_address" not in str(error):
            raise ConfigError(f"--coordinator: {error}") from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise TrainingError(f"the processes of this run cannot be connected: {reason}") from error


def is_primary() -> bool:
    """Whether this is the one process that writes files and speaks."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails within in one process fails in all, so that none waits for it in vain.

    Nothing within may itself wait for other processes.

    Raises:
      TrainingError: It failed in another process.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(failure is not None))
        if failure is None and failed.any():
            failure = TrainingError(f"process {failed.argmax()} could not start; it says why")
    if failure is not None:
        raise failure


def check_equal(what: str, digest: str) -> None:
    """Raises TrainingError if the processes do not all have the same hexadecimal digest."""
    if jax.process_count() > 1:
        digests = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8))
        differs = (digests != digests[0]).any(axis=1)
        if differs.any():
            raise TrainingError(f"process {differs.argmax()} has {what} than process 0")


def lost_process(error: BaseException) -> TrainingError | None:
    """What to raise instead of an error that means that another process is gone; else None."""
    if jax.process_count() == 1 or not _LOST.search(str(error)):
        return None
    return TrainingError(
        "another process of this run has ended or cannot be reached any more (see what it said); "
        "the same command for all of them goes on from the latest checkpoint"
    )


def gather_rows(rows: np.ndarray) -> list[np.ndarray]:
    """The arrays [n, ...] of all processes, in the order of the processes; n may differ."""
    if jax.process_count() == 1:
        return [rows]
    counts = multihost_utils.process_allgather(np.array(len(rows))).tolist()
    padding = [(0, max(counts) - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    padded = multihost_utils.process_allgather(np.pad(rows, padding))
    return [part[:count] for part, count in zip(padded, counts, strict=True)]


def make_mesh(model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Devices along the axes `data` and `model`.

    Args:
      model: Devices among which the large parameters are divided. It divides the
        number of devices; the batch is divided among the rest.
      devices: By default all devices of all processes.
    """
    # Flax Linen's dropout does not work under explicit axes, JAX's default.
    axis_types = (AxisType.Auto, AxisType.Auto)
    count = jax.device_count() if devices is None else len(devices)
    shape = (count // model, model)
    return jax.make_mesh(shape, ("data", "model"), axis_types=axis_types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split_by_example(mesh: Mesh) -> NamedSharding:
    """The first dimension divided along `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split_by_step_and_example(mesh: Mesh) -> NamedSharding:
    """The second dimension divided along `data`; the first is of steps, one after the other."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def split_large(mesh: Mesh, tree: PyTree) -> PyTree:
    """For each array of a tree: its last dimension divided along `model`, or a whole copy.

    The last dimension of a kernel is its output channels or units. Small arrays,
    and those that cannot be divided evenly, are copied.
    """
    parts = mesh.shape["model"]

    def of_leaf(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if parts == 1 or leaf.size < _LEAST_DIVIDED or leaf.shape[-1] % parts:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "model"))

    return jax.tree.map(of_leaf, tree)


def local_rows(sharding: NamedSharding, batch_size: int) -> Int[np.ndarray, " rows"]:
    """The rows of a global batch that the devices of this process hold, in order."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in slices]))


def to_devices(
    batch: Mapping[str, np.ndarray], *, sharding: NamedSharding, batch_size: int
) -> dict[str, jax.Array]:
    """The global batch, from the `local_rows` of each process.

    Args:
      batch: Arrays of rows; or, if `sharding` divides the second dimension, of steps and rows.
      sharding: How examples are divided.
      batch_size: Examples in the global batch.
    """
    before = sharding.spec.index("data")

    def global_shape(rows: np.ndarray) -> tuple[int, ...]:
        return (*rows.shape[:before], batch_size, *rows.shape[before + 1 :])

    with jax.transfer_guard_host_to_device("allow"):  # This is the one that is meant.
        return {
            name: jax.make_array_from_process_local_data(sharding, rows, global_shape(rows))
            for name, rows in batch.items()
        }


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has whole, laid out on the devices of all."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def accelerator_bytes() -> int:
    """Memory of one of this process's accelerators; 0 on a CPU, and where it is not told."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return 0
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def device_bytes() -> int:
    """Memory of one device; 0 where it is not told. A machine's CPU devices share its own."""
    if jax.local_devices()[0].platform == "cpu":
        return memory_bytes() // jax.local_device_count()
    return accelerator_bytes()


def free_device_bytes() -> int:
    """What of the memory of one device nobody uses at this moment."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    page, free = os.sysconf("SC_PAGE_SIZE"), memory_bytes()
    if "SC_AVPHYS_PAGES" in os.sysconf_names:  # Linux.
        free = min(free, page * os.sysconf("SC_AVPHYS_PAGES"))
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            used = page * int(pathlib.Path("/proc/self/statm").read_text().split()[0])
            free = min(free, limit - used)
    return free // jax.local_device_count()
