"""The processes of a run, the mesh of devices, and the sharding of arrays on the mesh."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

from cnn_jax.data.dataset import memory_bytes
from cnn_jax.system.errors import ConfigError, TrainingError, UserError

# JAX ends all processes of a run if one process sends no heartbeat for this time. With JAX's
# default, 100 s, the remaining processes would only wait longer.
_HEARTBEAT_SECONDS = 30
# XLA divides the images of a batch into groups of this number on a TPU, because a register of a TPU
# has this number of columns. An incomplete group takes as long as a complete one.
TPU_IMAGES = 128
# Parameters with fewer elements than this number are copied to each device, not divided.
_LEAST_DIVIDED = 2**14
# Words in the error messages of Gloo, NCCL and JAX that mean that another process has ended.
_LOST = re.compile(r"by peer|Gloo|NCCL|unhealthy|heartbeat|Barrier", re.IGNORECASE)


def start_processes(
    coordinator: str | None = None, process_id: int | None = None, process_count: int | None = None
) -> None:
    """Connects the processes of one run. Call this function before any other use of JAX.

    Without arguments, JAX detects Slurm, Open MPI, Kubernetes and Cloud TPU. If JAX detects
    none of these systems, the run has one process.

    Args:
      coordinator: The host and port, "HOST:PORT", at which process 0 listens.
      process_id: The number of this process, from 0.
      process_count: The number of processes. 1 without the other arguments means one process,
        also in an environment in which JAX would detect several.

    Raises:
      ConfigError: Only some arguments are given, or the arguments contradict each other.
      TrainingError: The processes cannot connect.
    """
    if process_count == 1 and coordinator is None:
        return
    given = (coordinator, process_id, process_count)
    if given != (None, None, None) and None in given:
        raise ConfigError("--coordinator, --process_id and --process_count: set all three, or none")
    if process_id is not None and process_count is not None and process_id >= process_count:
        raise ConfigError(f"--process_id: must be below --process_count={process_count}")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"--coordinator: must be HOST:PORT, got {coordinator!r}")
    try:
        jax.distributed.initialize(
            coordinator, process_count, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except ValueError as error:
        # If JAX detects no cluster, JAX's error message names `coordinator_address`. The run then
        # has one process.
        if coordinator is not None or "coordinator_address" not in str(error):
            raise ConfigError(f"--coordinator: {error}") from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise TrainingError(f"the processes of this run cannot be connected: {reason}") from error


def is_primary() -> bool:
    """Returns whether this is the primary process, which prints and writes the run's files."""
    return jax.process_index() == 0


def primary_only(function: Callable[..., None]) -> Callable[..., None]:
    """Decorates a function so that only the primary process executes the function's body."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        if is_primary():
            function(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def synchronized_errors() -> Iterator[None]:
    """If one process raises a UserError inside this context, all processes raise an error.

    Without this context, the other processes would wait forever. The code inside the context
    must not wait for other processes.

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
    """Checks that a digest, such as the configuration's digest, is equal in all processes.

    Args:
      what: A noun phrase for the message, "process N has {what} than process 0".
      digest: A hexadecimal digest.

    Raises:
      TrainingError: The digests of two processes differ.
    """
    if jax.process_count() > 1:
        digests = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8))
        differs = (digests != digests[0]).any(axis=1)
        if differs.any():
            raise TrainingError(f"process {differs.argmax()} has {what} than process 0")


def is_true_in_all_processes(value: bool) -> bool:
    """Returns whether a value is true in all processes; the result is equal in all processes."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).all())


def lost_process(error: BaseException) -> TrainingError | None:
    """Returns a one-line error if `error` means that another process has ended, else None."""
    if jax.process_count() == 1 or not _LOST.search(str(error)):
        return None
    return TrainingError(
        "another process of this run has ended or cannot be reached (see its messages); start "
        "the same command in all processes to continue from the latest checkpoint"
    )


def share_rows(
    function: Callable[[Int[np.ndarray, " part"]], list[np.ndarray]], count: int
) -> list[np.ndarray]:
    """Computes arrays with one row for each position below `count`; the processes share the work.

    Args:
      function: Takes positions, and returns arrays with a row for each position, of at most 32 bits
        a number. It gets no positions only if `count` is 0.
      count: The number of positions.

    Returns:
      The arrays with all rows, in the order of the positions, in each process.
    """
    parts = np.array_split(np.arange(count), jax.process_count())
    # If there are more processes than positions, some processes compute a row that is not used.
    part = parts[jax.process_index()]
    own = function(part if len(part) else parts[0])
    if jax.process_count() == 1:
        return own
    shared = []
    for rows in own:
        # The arrays that JAX gathers must have equal shapes. The first part is the longest.
        padding = [(0, len(parts[0]) - len(rows))] + [(0, 0)] * (rows.ndim - 1)
        gathered = multihost_utils.process_allgather(np.pad(rows, padding))
        pairs = zip(gathered, parts, strict=True)
        shared.append(np.concatenate([padded[: len(part)] for padded, part in pairs]))
    return shared


def make_mesh(model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of devices with the axes `data` and `model`.

    Args:
      model: The number of devices that share the large parameters; a divisor of the number
        of devices. The batch is divided among groups of this number of devices.
      devices: The devices; by default all devices of all processes.
    """
    # Explicit axes are JAX's default, but Flax Linen's dropout fails with explicit axes.
    axis_types = (AxisType.Auto, AxisType.Auto)
    count = jax.device_count() if devices is None else len(devices)
    shape = (count // model, model)
    return jax.make_mesh(shape, ("data", "model"), axis_types=axis_types, devices=devices)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The division of batches among the devices of a mesh.

    Attributes:
      mesh: The devices, with the axes `data` and `model`.
      batch_size: The number of examples in a global batch.
    """

    mesh: Mesh
    batch_size: int

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that is copied to every device in full."""
        return replicated(self.mesh)

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of an array whose first dimension is divided along the axis `data`."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def stacked_batch_sharding(self) -> NamedSharding:
        """The sharding of an array [steps, rows, ...] with the rows divided along `data`."""
        return NamedSharding(self.mesh, PartitionSpec(None, "data"))

    @property
    def data_devices(self) -> int:
        """The number of devices that share a batch."""
        return self.mesh.shape["data"]

    @property
    def batch_multiple(self) -> int:
        """The global batch size should be a multiple of this number; 1 if all sizes are as good."""
        is_tpu = self.mesh.devices.flat[0].platform == "tpu"
        return TPU_IMAGES * self.data_devices if is_tpu else 1

    @functools.cached_property
    def rows(self) -> Int[np.ndarray, " rows"]:
        """The sorted indices of this process's rows in a global batch."""
        slices = self.batch_sharding.addressable_devices_indices_map((self.batch_size,)).values()
        rows = np.arange(self.batch_size)
        return np.unique(np.concatenate([rows[index] for index in slices]))

    def to_devices(self, batch: Mapping[str, np.ndarray], stacked: int = 0) -> dict[str, jax.Array]:
        """Copies a global batch to the devices; each process provides the rows in `self.rows`.

        Args:
          batch: Arrays [rows, ...], or stacked arrays such as [steps, rows, ...].
          stacked: The number of dimensions before the rows.
        """
        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * stacked, "data"))

        def global_shape(rows: np.ndarray) -> tuple[int, ...]:
            return (*rows.shape[:stacked], self.batch_size, *rows.shape[stacked + 1 :])

        # This is the only transfer of a step that the transfer guard allows.
        with jax.transfer_guard_host_to_device("allow"):
            return {
                name: jax.make_array_from_process_local_data(sharding, rows, global_shape(rows))
                for name, rows in batch.items()
            }

    def to_all_devices(self, array: np.ndarray) -> jax.Array:
        """Copies an array to all devices; every process must have the whole array."""
        return distribute(array, self.replicated)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is copied to every device in full."""
    return NamedSharding(mesh, PartitionSpec())


def split_large(mesh: Mesh, tree: PyTree) -> PyTree:
    """Returns a sharding for each array; large arrays are divided along the axis `model`.

    The last dimension of a large array is divided. In a kernel, this dimension is the output
    channels or units. Small arrays, and arrays that cannot be divided evenly, are copied to
    each device.
    """
    parts = mesh.shape["model"]

    def leaf_sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if parts == 1 or leaf.size < _LEAST_DIVIDED or leaf.shape[-1] % parts:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "model"))

    return jax.tree.map(leaf_sharding, tree)


def distribute(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Distributes an array among all devices; every process must have the whole array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def accelerator_bytes() -> int:
    """Returns the memory of one accelerator of this process, in bytes; 0 on a CPU or if unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return 0
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def device_bytes() -> int:
    """Returns one device's memory in bytes; 0 if unknown. CPU devices share the host's memory."""
    if jax.local_devices()[0].platform == "cpu":
        return memory_bytes() // jax.local_device_count()
    return accelerator_bytes()


def free_device_bytes() -> int:
    """Returns the free memory of one device, in bytes."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    page, free = os.sysconf("SC_PAGE_SIZE"), memory_bytes()
    # Linux defines SC_AVPHYS_PAGES, but macOS does not.
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = min(free, page * os.sysconf("SC_AVPHYS_PAGES"))
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            used = page * int(pathlib.Path("/proc/self/statm").read_text().split()[0])
            free = min(free, limit - used)
    return free // jax.local_device_count()
