import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, require_cpu, require_devices

from cnn_jax.system.errors import ConfigError, DataError
from cnn_jax.training import sharding


def test_the_mesh_divides_a_batch_among_all_devices():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count(), "model": 1}
    images = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
    batch = sharding.Layout(mesh, 16).to_devices({"image": images})
    assert batch["image"].sharding.shard_shape((16, 3)) == (16 // jax.device_count(), 3)
    np.testing.assert_array_equal(batch["image"], images)


def test_several_batches_are_divided_by_example():
    mesh = sharding.make_mesh()
    rows = np.arange(3 * 16 * 2, dtype=np.int32).reshape(3, 16, 2)
    batches = sharding.Layout(mesh, 16).to_devices({"row": rows}, stacked=1)
    assert batches["row"].sharding.shard_shape(rows.shape) == (3, 16 // jax.device_count(), 2)
    np.testing.assert_array_equal(batches["row"], rows)


def test_one_process_loads_all_rows_for_any_device_order():
    require_devices(2)
    devices = jax.devices()[::-1]
    mesh = sharding.make_mesh(2, devices)
    np.testing.assert_array_equal(sharding.Layout(mesh, 12).rows, np.arange(12))


@pytest.mark.parametrize("model", [1, 2, 4])
def test_large_arrays_are_divided_by_their_last_dimension(model):
    require_devices(model)
    mesh = sharding.make_mesh(model)
    shapes = {"large": (3, 3, 64, 128), "small": (128,), "odd": (400, 129)}
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    parts = {
        name: laid.shard_shape(shapes[name])
        for name, laid in sharding.split_large(mesh, tree).items()
    }
    assert parts == shapes | {"large": (3, 3, 64, 128 // model)}


def test_distribute_supports_every_sharding():
    require_devices(2)
    mesh = sharding.make_mesh(2)
    array = np.random.default_rng(0).normal(size=(256, 128)).astype(np.float32)
    shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
    for layout in (sharding.replicated(mesh), sharding.split_large(mesh, shape)):
        placed = sharding.distribute(array, layout)
        assert placed.sharding == layout
        np.testing.assert_array_equal(placed, array)


def test_one_process_does_not_wait_for_others():
    with sharding.synchronized_errors():
        pass
    with pytest.raises(DataError, match="mine"), sharding.synchronized_errors():
        raise DataError("mine")
    sharding.check_equal("other data", "00ff")
    rows = np.ones((3, 2))
    assert sharding.share_rows(lambda positions: [rows[positions]], 3)[0].tolist() == rows.tolist()
    assert sharding.is_true_in_all_processes(True)
    assert not sharding.is_true_in_all_processes(False)
    assert sharding.is_primary()


def _simulate_two_processes(monkeypatch, process, gather):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(sharding.multihost_utils, "process_allgather", gather)


def test_a_value_must_be_true_in_all_processes(monkeypatch):
    for other in (True, False):
        _simulate_two_processes(monkeypatch, 0, lambda own, other=other: np.array([own, other]))
        assert sharding.is_true_in_all_processes(True) == other
        assert not sharding.is_true_in_all_processes(False)


def test_a_process_without_rows_computes_one_that_is_not_used(monkeypatch):
    """A network cannot compute a batch without images."""
    asked = []

    def compute(positions):
        asked.append(positions.tolist())
        return [np.stack([np.full(2, 7.0 + position) for position in positions])]

    _simulate_two_processes(monkeypatch, 1, lambda own: np.stack([[[7.0, 7.0]], own + 1]))
    (rows,) = sharding.share_rows(compute, 1)
    assert asked == [[0]]
    assert rows.tolist() == [[7.0, 7.0]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("localhost:1", None, 2), "set all three, or none"),
        ((None, 0, None), "set all three, or none"),
        (("localhost:1", 2, 2), "--process_id: must be below --process_count=2"),
    ],
)
def test_contradictory_flags_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        sharding.start_processes(*flags)


def test_without_flags_and_cluster_there_is_one_process():
    """The test needs a new process, because JAX must not have used a device before."""
    code = (
        "import jax; from cnn_jax.training import sharding\n"
        "sharding.start_processes(); sharding.start_processes(process_count=1)\n"
        "assert jax.process_count() == 1 and not jax.distributed.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_the_memory_of_a_device_is_known():
    require_cpu()
    assert 1e8 < sharding.device_bytes() * jax.local_device_count() < 1e14
    assert 0 < sharding.free_device_bytes() <= sharding.device_bytes()
    assert sharding.accelerator_bytes() == 0  # A CPU is not an accelerator.
