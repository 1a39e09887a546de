"""The processes of a run, the mesh of their devices, and the layout of arrays on it."""

import contextlib
import dataclasses
import functools
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

# JAX ends all processes if one of them sends no heartbeat for this time. JAX's default of
# 100 s would only delay the end.
_HEARTBEAT_SECONDS = 30
# Parameters with fewer elements than this are copied to each device.
_LEAST_DIVIDED = 2**14
# Words in the error messages of Gloo, NCCL and JAX after a process was lost.
_LOST = re.compile(r"by peer|Gloo|NCCL|unhealthy|heartbeat|Barrier", re.IGNORECASE)


def start_processes(
    coordinator: str | None = None, process_id: int | None = None, process_count: int | None = None
) -> None:
    """Connects the processes of one run. Call it before any other use of JAX.

    Without arguments JAX detects Slurm, Open MPI, Kubernetes and Cloud TPU; if it detects
    none of them, the run has one process.

    Args:
      coordinator: host:port at which process 0 listens.
      process_id: The number of this process, from 0.
      process_count: The number of processes; 1 without the other arguments means one process
        even where JAX would detect several.

    Raises:
      ConfigError: Only some arguments are given, or they contradict each other.
      TrainingError: The processes cannot connect.
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
        # JAX's message when it detects no cluster.
        if coordinator is not None or "coordinator_address" not in str(error):
            raise ConfigError(f"--coordinator: {error}") from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise TrainingError(f"the processes of this run cannot be connected: {reason}") from error


def is_primary() -> bool:
    """Whether this process writes the files and prints; one process of a run does."""
    return jax.process_index() == 0


@contextlib.contextmanager
def synchronized_errors() -> Iterator[None]:
    """If one process raises a UserError inside this block, all processes raise an error.

    Otherwise the others would wait for it forever. The code in the block must not itself wait
    for other processes.

    Raises:
      TrainingError: Another process failed.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(failure is not None))
        if failure is None and failed.any():
            failure = TrainingError(f"process {failed.argmax()} could not start; see its message")
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
    """The error to raise instead of one that means a lost process; None for other errors."""
    if jax.process_count() == 1 or not _LOST.search(str(error)):
        return None
    return TrainingError(
        "another process of this run has ended or cannot be reached (see its messages); start "
        "the same command in all processes to continue from the latest checkpoint"
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
      model: The number of devices that share the large parameters; it must divide the
        number of devices. The batch is divided among the groups of such devices.
      devices: The devices; by default all devices of all processes.
    """
    # Flax Linen's dropout does not work under explicit axes, JAX's default.
    axis_types = (AxisType.Auto, AxisType.Auto)
    count = jax.device_count() if devices is None else len(devices)
    shape = (count // model, model)
    return jax.make_mesh(shape, ("data", "model"), axis_types=axis_types, devices=devices)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How batches lie on the devices of a mesh.

    Attributes:
      mesh: The devices, along the axes `data` and `model`.
      batch_size: Examples in a global batch.
    """

    mesh: Mesh
    batch_size: int

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on each device."""
        return replicated(self.mesh)

    @property
    def by_example(self) -> NamedSharding:
        """The first dimension divided along `data`."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def by_step_and_example(self) -> NamedSharding:
        """The second dimension divided along `data`; the first one counts steps."""
        return NamedSharding(self.mesh, PartitionSpec(None, "data"))

    @property
    def data_devices(self) -> int:
        """The number of devices that a batch is divided among."""
        return self.mesh.shape["data"]

    @functools.cached_property
    def rows(self) -> Int[np.ndarray, " rows"]:
        """The rows of a global batch that the devices of this process hold, in order."""
        slices = self.by_example.addressable_devices_indices_map((self.batch_size,)).values()
        rows = np.arange(self.batch_size)
        return np.unique(np.concatenate([rows[index] for index in slices]))

    def to_devices(
        self, batch: Mapping[str, np.ndarray], by_step: bool = False
    ) -> dict[str, jax.Array]:
        """Sends a global batch, of which each process has its `rows`.

        Args:
          batch: Arrays of rows; with `by_step`, of steps and rows.
          by_step: Whether the first dimension counts steps.
        """
        sharding = self.by_step_and_example if by_step else self.by_example
        steps = 1 if by_step else 0

        def global_shape(rows: np.ndarray) -> tuple[int, ...]:
            return (*rows.shape[:steps], self.batch_size, *rows.shape[steps + 1 :])

        # The one transfer of a step that the transfer guard lets pass.
        with jax.transfer_guard_host_to_device("allow"):
            return {
                name: jax.make_array_from_process_local_data(sharding, rows, global_shape(rows))
                for name, rows in batch.items()
            }

    def to_all_devices(self, array: np.ndarray) -> jax.Array:
        """Copies an array, which every process has whole, to all devices."""
        return distribute(array, self.replicated)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split_large(mesh: Mesh, tree: PyTree) -> PyTree:
    """The sharding of each array: its last dimension divided along `model`, or a whole copy.

    The last dimension of a kernel is its output channels or units. Small arrays, and arrays
    that cannot be divided evenly, are copied to each device.
    """
    parts = mesh.shape["model"]

    def leaf_sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if parts == 1 or leaf.size < _LEAST_DIVIDED or leaf.shape[-1] % parts:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "model"))

    return jax.tree.map(leaf_sharding, tree)


def distribute(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has whole, laid out on the devices of all processes."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def accelerator_bytes() -> int:
    """The memory of one accelerator of this process; 0 on a CPU or if it is unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return 0
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def device_bytes() -> int:
    """The memory of one device; 0 if it is unknown. CPU devices share the machine's memory."""
    if jax.local_devices()[0].platform == "cpu":
        return memory_bytes() // jax.local_device_count()
    return accelerator_bytes()


def free_device_bytes() -> int:
    """The memory of one device that is free at this moment."""
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
