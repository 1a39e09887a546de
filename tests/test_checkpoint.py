import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.checkpoint import Checkpoints, best_record, goodness
from cnn_jax.errors import TrainingError

MONITOR = "validation_accuracy"


def _record(epoch, accuracy):
    return {"epoch": epoch, "step": 10 * epoch, MONITOR: accuracy}


def _state(value):
    return {"weights": jnp.full((3, 2), value), "step": jnp.array(int(value), jnp.int32)}


EMPTY = {"confusion": jnp.zeros((2, 2), jnp.int32)}


def _save_epochs(path, accuracies, monitor=MONITOR):
    history = []
    checkpoints = Checkpoints(path, monitor)
    for epoch, accuracy in enumerate(accuracies, start=1):
        history.append({"epoch": epoch, "step": 10 * epoch, monitor: accuracy})
        checkpoints.save(10 * epoch, _state(epoch), EMPTY, history, "data")
    checkpoints.close()
    return history


def _steps(path):
    return sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdecimal())


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [
        ([0.1, 0.9, 0.5, 0.6], [20, 40]),
        ([0.1, 0.2, 0.3], [30]),
        ([0.5, 0.5, 0.5], [10, 30]),  # The earliest of equals.
    ],
)
def test_the_latest_and_the_best_are_kept(tmp_path, accuracies, kept):
    history = _save_epochs(tmp_path, accuracies)
    assert _steps(tmp_path) == kept
    best = best_record(history, MONITOR)
    assert best is not None
    assert best["step"] == kept[0]


def test_of_losses_the_lowest_is_best(tmp_path):
    _save_epochs(tmp_path, [0.5, 0.2, 0.9], monitor="validation_loss")
    assert _steps(tmp_path) == [20, 30]


def test_nan_is_worse_than_all():
    assert goodness(_record(1, float("nan")), MONITOR) == -np.inf
    assert best_record([_record(1, float("nan")), _record(2, 0.0)], MONITOR)["epoch"] == 2
    assert best_record([], MONITOR) is None


def test_everything_comes_back_bit_for_bit(tmp_path):
    state = {
        "weights": jax.random.normal(jax.random.key(0), (5, 3)),
        "step": jnp.array(7, jnp.int32),
    }
    totals = {"confusion": jnp.arange(4, dtype=jnp.int32).reshape(2, 2)}
    history = [_record(1, 1 / 3)]
    first = Checkpoints(tmp_path, MONITOR)
    first.save(17, state, totals, history, "data")
    first.close()

    second = Checkpoints(tmp_path, MONITOR)
    assert second.latest_step() == 17
    template = jax.tree.map(jnp.zeros_like, (state, totals))
    restored = second.restore(17, *template, "data")
    second.close()
    for a, b in zip(
        jax.tree.leaves(restored), jax.tree.leaves((state, totals, history)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_one_saved_within_an_epoch_is_the_latest_but_never_the_best(tmp_path):
    history = _save_epochs(tmp_path, [0.9, 0.1])
    checkpoints = Checkpoints(tmp_path, MONITOR)
    checkpoints.save(25, _state(2.5), EMPTY, history, "data")
    checkpoints.close()
    assert _steps(tmp_path) == [10, 25]


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """Training goes on, and reuses the arrays, while they are being written."""
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {"weights": jnp.zeros(1_000_000)}
    checkpoints = Checkpoints(tmp_path, MONITOR)
    state = step(state)
    checkpoints.save(1, state, EMPTY, [], "data")
    for _ in range(20):
        state = step(state)
    restored, _, _ = checkpoints.restore(1, state, EMPTY, "data")
    checkpoints.close()
    np.testing.assert_array_equal(restored["weights"], 1)


def test_other_data_is_refused(tmp_path):
    _save_epochs(tmp_path, [0.5])
    checkpoints = Checkpoints(tmp_path, MONITOR)
    with pytest.raises(TrainingError, match="the data has changed"):
        checkpoints.restore(10, _state(0), EMPTY, "other data")
    checkpoints.close()


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    _save_epochs(tmp_path, [0.5])
    for path in (tmp_path / "10" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, MONITOR)
    with pytest.raises(TrainingError, match="cannot be restored"):
        checkpoints.restore(10, _state(0), EMPTY, "data")
    checkpoints.close()
