import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax.models.cnn import CNN
from cnn_jax.optimizer import kernel_mask, make_optimizer, make_schedule


def test_schedule_is_the_cosine_between_its_two_rates():
    schedule = make_schedule(1e-3, 1e-4, total_steps=100)
    steps = np.array([0, 25, 50, 100, 150])
    expected = 1e-4 + 0.5 * 9e-4 * (1 + np.cos(np.pi * np.minimum(steps, 100) / 100))
    np.testing.assert_allclose([schedule(step) for step in steps], expected, rtol=1e-6)


def test_warm_up_is_linear_and_the_cosine_follows_it():
    schedule = make_schedule(1e-3, 1e-4, total_steps=110, warmup_steps=10)
    np.testing.assert_allclose(
        [schedule(step) for step in (0, 5, 10, 60, 110)], [0, 5e-4, 1e-3, 5.5e-4, 1e-4], rtol=1e-6
    )


def test_equal_rates_are_constant():
    schedule = make_schedule(1e-4, 1e-4, total_steps=10)
    np.testing.assert_allclose([schedule(step) for step in range(12)], 1e-4, rtol=1e-6)


def _params():
    variables = CNN(3, features=(4, 8), dense=16).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return variables["params"]


def test_only_kernels_are_regularised():
    mask = kernel_mask(_params())
    flat = {jax.tree_util.keystr(path): on for path, on in jax.tree.leaves_with_path(mask)}
    assert {name for name, on in flat.items() if on} == {
        f"['{layer}']['kernel']" for layer in ("conv1", "conv2", "dense", "head")
    }
    assert len(flat) == 12


def test_l2_is_the_gradient_of_half_the_sum_of_squares_of_kernels():
    """The step equals Adam's on the gradient of loss + l2 / 2 * sum(kernel ** 2)."""
    params = _params()
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # No parameter is zero.
    l2 = 0.3

    def loss(params):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(params))

    def loss_with_penalty(params):
        kernels = [
            leaf
            for path, leaf in jax.tree.leaves_with_path(params)
            if "kernel" in jax.tree_util.keystr(path)
        ]
        return loss(params) + l2 / 2 * sum(jnp.sum(kernel**2) for kernel in kernels)

    ours = make_optimizer(optax.constant_schedule(1e-3), l2)
    reference = optax.adam(1e-3)
    state, reference_state = ours.init(params), reference.init(params)
    expected = params
    for _ in range(3):
        updates, state = ours.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        grads = jax.grad(loss_with_penalty)(expected)
        updates, reference_state = reference.update(grads, reference_state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), params, expected)


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-2])
def test_the_first_step_of_adam_has_the_size_of_the_learning_rate(learning_rate):
    optimizer = make_optimizer(optax.constant_schedule(learning_rate), 0.0)
    params = {"bias": jnp.array([1.0, -2.0])}
    updates, _ = optimizer.update({"bias": jnp.array([3.0, -0.5])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["bias"], [-learning_rate, learning_rate], rtol=1e-5)
