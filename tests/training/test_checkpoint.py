import collections
import contextlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require_devices
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cnn_jax.system.errors import ConfigError, TrainingError
from cnn_jax.training import sharding
from cnn_jax.training.checkpoint import Checkpoints, best_record, checksums, monitored_score

MONITOR = "validation_accuracy"


def _record(epoch, accuracy):
    return {"epoch": epoch, "step": 10 * epoch, MONITOR: accuracy}


def _state(value):
    """A state whose weights are so large that TensorStore stores them without a checksum."""
    weights = jax.random.normal(jax.random.key(value), (300, 200))
    return {"weights": weights, "step": jnp.array(value, jnp.int32)}


EMPTY = {"confusion": jnp.zeros((2, 2), jnp.int32)}


def _open(path, **options):
    return contextlib.closing(Checkpoints(path, MONITOR, **options))


def _save_epochs(path, accuracies, monitor=MONITOR, keep=2):
    history = []
    checkpoints = Checkpoints(path, monitor, keep)
    for epoch, accuracy in enumerate(accuracies, start=1):
        history.append({"epoch": epoch, "step": 10 * epoch, monitor: accuracy})
        checkpoints.save(10 * epoch, _state(10 * epoch), EMPTY, history, "data")
    checkpoints.close()
    return history


def _steps(path):
    return sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdecimal())


@pytest.mark.parametrize(
    ("accuracies", "keep", "best", "kept"),
    [
        ([0.1, 0.9, 0.5, 0.6, 0.7], 2, 20, [10, 20, 40, 50]),
        ([0.1, 0.9, 0.5, 0.6, 0.7], 1, 20, [10, 20, 50]),
        ([0.1, 0.2, 0.3, 0.4], 1, 40, [30, 40]),
        ([0.5, 0.5, 0.5, 0.5], 2, 10, [10, 30, 40]),  # Of equally good epochs, the first is best.
        ([0.1, 0.2, 0.3, 0.4], 9, 40, [10, 20, 30, 40]),
    ],
)
def test_latest_and_best_and_its_predecessor_are_kept(tmp_path, accuracies, keep, best, kept):
    history = _save_epochs(tmp_path, accuracies, keep=keep)
    assert _steps(tmp_path) == kept
    record = best_record(history, MONITOR)
    assert record is not None
    assert record["step"] == best


def test_the_lowest_loss_is_best(tmp_path):
    _save_epochs(tmp_path, [0.5, 0.2, 0.9, 0.8], monitor="validation_loss", keep=1)
    assert _steps(tmp_path) == [10, 20, 40]


def test_nan_has_the_lowest_score():
    assert monitored_score(_record(1, float("nan")), MONITOR) == -np.inf
    assert best_record([_record(1, float("nan")), _record(2, 0.0)], MONITOR)["epoch"] == 2
    assert best_record([], MONITOR) is None


def test_restored_content_equals_saved_content_bit_for_bit(tmp_path):
    state = {
        "weights": jax.random.normal(jax.random.key(0), (5, 3)),
        "step": jnp.array(7, jnp.int32),
    }
    totals = {"confusion": jnp.arange(4, dtype=jnp.int32).reshape(2, 2)}
    history = [_record(1, 1 / 3)]
    first = Checkpoints(tmp_path, MONITOR)
    first.save(17, state, totals, history, "data", seconds=1.25)
    first.close()

    with _open(tmp_path) as second:
        assert second.steps() == [17]
        saved = second.restore(17, *jax.tree.map(jnp.zeros_like, (state, totals)))
    assert (saved.step, saved.history, saved.seconds) == (17, history, 1.25)
    for a, b in zip(
        jax.tree.leaves((saved.state, saved.epoch_metrics)),
        jax.tree.leaves((state, totals)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_within_an_epoch_is_never_the_best(tmp_path):
    history = _save_epochs(tmp_path, [0.1, 0.9, 0.1], keep=1)
    with _open(tmp_path, keep=1) as checkpoints:
        checkpoints.save(35, _state(35), EMPTY, history, "data")
    assert _steps(tmp_path) == [10, 20, 35]


def test_a_state_that_is_donated_after_save_is_saved_unchanged(tmp_path):
    """Training continues, and reuses the buffers of the state, while the checkpoint is written."""
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"weights": jnp.zeros(1_000_000)}
    with _open(tmp_path) as checkpoints:
        state = step(state)
        checkpoints.save(1, state, EMPTY, [], "data")
        for _ in range(20):
            state = step(state)
        saved = checkpoints.restore(1, state, EMPTY)
    np.testing.assert_array_equal(saved.state["weights"], 1)


def test_a_history_that_grows_after_save_is_saved_unchanged(tmp_path):
    """Training continues, and appends to the history, while the checkpoint is written."""
    history = [_record(1, 0.5)]
    with _open(tmp_path) as checkpoints:
        for epoch in range(2, 6):
            step = history[-1]["step"]
            checkpoints.save(step, _state(step), EMPTY, history, "data")
            history.append(_record(epoch, 0.5 + epoch / 100))
        checkpoints.wait()
        for step in checkpoints.steps():
            saved = checkpoints.restore(step, _state(0), EMPTY)
            assert saved.history == history[: step // 10]


def test_a_different_fingerprint_is_refused(tmp_path):
    _save_epochs(tmp_path, [0.5])
    with _open(tmp_path) as checkpoints:
        checkpoints.check_data("data")
        with pytest.raises(TrainingError, match="the data has changed"):
            checkpoints.check_data("other data")


@pytest.mark.parametrize("flips", [1, 2, 3])
def test_a_checksum_detects_flipped_bits_in_every_dtype(flips):
    rng = np.random.default_rng(flips)
    for dtype in (np.float32, np.int32, jnp.bfloat16, np.uint8):
        array = np.asarray(rng.integers(0, 2, (3, 5, 7)), dtype)
        before = int(checksums([jnp.asarray(array)])[0])
        for _ in range(20):
            bits = np.unpackbits(array.view(np.uint8), bitorder="little")
            bits[rng.choice(bits.size, flips, replace=False)] ^= 1
            changed = np.packbits(bits, bitorder="little").view(dtype).reshape(array.shape)
            assert int(checksums([jnp.asarray(changed)])[0]) != before


@pytest.mark.parametrize("bit", [0, 15, 30, 31])
def test_a_checksum_detects_the_same_bit_flipped_in_many_elements(bit):
    """A sum of products would not detect flips of the highest bits, because these bits cancel."""
    bits = np.random.default_rng(0).integers(0, 2**32, 400, np.uint32)
    before = int(checksums([jnp.asarray(bits)])[0])
    for count in (2, 4, 256, 400):
        for start in range(0, 401 - count, 16):
            changed = bits.copy()
            changed[start : start + count] ^= np.uint32(1 << bit)
            assert int(checksums([jnp.asarray(changed)])[0]) != before


def _mix(x):
    """The 32-bit finalizer of MurmurHash3, computed with Python integers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def test_a_checksum_does_not_depend_on_the_sharding():
    require_devices(2)
    array = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    mesh = sharding.make_mesh(model=2)
    bits = array.view(np.uint32).ravel().tolist()
    expected = sum(_mix(b ^ _mix(position)) for position, b in enumerate(bits, start=1)) % 2**32
    for spec in (P(), P("data"), P(None, "model"), P("data", "model")):
        divided = jax.device_put(array, NamedSharding(mesh, spec))
        assert int(checksums([divided])[0]) == expected


# Tests with damaged checkpoints. Epoch 2 of 3 is the best epoch. The checkpoint of epoch 1, which
# precedes the best epoch, is also kept. So the steps 10, 20 and 30 exist.


def _files(checkpoint):
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]


def _flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _halve(path, rng):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _remove(path, rng):
    path.unlink()


@pytest.mark.parametrize("damage", [_flip, _halve, _remove])
@pytest.mark.parametrize("step", [20, 30])
def test_a_damaged_file_never_changes_the_restored_content(tmp_path, damage, step):
    """Damage to a file has no effect, or an earlier checkpoint is restored."""
    history = _save_epochs(tmp_path / "whole", [0.1, 0.9, 0.5])
    rng = random.Random(step)
    restored_steps = collections.Counter()
    for path in _files(tmp_path / "whole" / str(step)):
        run = tmp_path / "run"
        shutil.copytree(tmp_path / "whole", run / "checkpoints")
        damage(run / "checkpoints" / path.relative_to(tmp_path / "whole"), rng)
        with _open(run / "checkpoints") as checkpoints:
            saved, moved_steps = checkpoints.restore_latest(_state(0), EMPTY)
            assert saved is not None
            jax.tree.map(np.testing.assert_array_equal, saved.state, _state(saved.step))
            assert saved.history == history[: saved.step // 10]
            # Later checkpoints are moved to another folder, so that the same steps can be saved
            # again.
            assert checkpoints.steps()[0] == saved.step
            assert moved_steps == [other for other in (30, 20) if other > saved.step]
            moved = {entry.name for entry in (run / "damaged").glob("*")}
            assert moved == set(map(str, moved_steps))
            checkpoints.save(saved.step + 1, _state(0), EMPTY, saved.history, "data")
        restored_steps[saved.step] += 1
        shutil.rmtree(run)
    # If the best checkpoint is damaged, its epoch is trained again.
    before = 20 if step == 30 else 10
    assert set(restored_steps) == {30, before}


def test_if_no_checkpoint_is_intact_none_is_moved(tmp_path):
    _save_epochs(tmp_path, [0.5, 0.6])
    for step in (10, 20):
        (tmp_path / str(step) / "progress" / "metadata").write_text("{}")
    with (
        _open(tmp_path) as checkpoints,
        pytest.raises(TrainingError, match=r"no checkpoint in .* is intact \(.*20 is damaged"),
    ):
        checkpoints.restore_latest(_state(0), EMPTY)
    assert _steps(tmp_path) == [10, 20]


def test_without_checkpoints_restore_latest_returns_none(tmp_path):
    with _open(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(_state(0), EMPTY) == (None, [])


def test_rewind_deletes_later_checkpoints(tmp_path):
    _save_epochs(tmp_path, [0.1, 0.2, 0.3, 0.4], keep=4)
    with _open(tmp_path, keep=4) as checkpoints:
        with pytest.raises(ConfigError, match=r"no checkpoint of step 25 .* are 10, 20, 30, 40$"):
            checkpoints.rewind(25, _state(0), EMPTY)
        (tmp_path / "10" / "progress" / "metadata").write_text("{}")
        with pytest.raises(TrainingError, match="10 is damaged"):
            checkpoints.rewind(10, _state(0), EMPTY)
        assert checkpoints.steps() == [40, 30, 20, 10]
        assert checkpoints.rewind(20, _state(0), EMPTY).step == 20
        assert checkpoints.steps() == [20, 10]
        checkpoints.save(30, _state(3), EMPTY, [], "data")
    assert _steps(tmp_path) == [10, 20, 30]
