import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax.models.cnn import CNN
from cnn_jax.training.optimizer import (
    head_kernel_mask,
    kernel_mask,
    learning_rate_factors,
    make_optimizer,
    make_schedule,
)


def test_schedule_is_a_cosine_between_two_learning_rates():
    schedule = make_schedule(1e-3, 1e-4, total_steps=100)
    steps = np.array([0, 25, 50, 100, 150])
    expected = 1e-4 + 0.5 * 9e-4 * (1 + np.cos(np.pi * np.minimum(steps, 100) / 100))
    np.testing.assert_allclose([schedule(step) for step in steps], expected, rtol=1e-6)


def test_warm_up_is_linear_and_the_cosine_follows():
    schedule = make_schedule(1e-3, 1e-4, total_steps=110, warmup_steps=10)
    np.testing.assert_allclose(
        [schedule(step) for step in (0, 5, 10, 60, 110)], [0, 5e-4, 1e-3, 5.5e-4, 1e-4], rtol=1e-6
    )


def test_equal_learning_rates_are_constant():
    schedule = make_schedule(1e-4, 1e-4, total_steps=10)
    np.testing.assert_allclose([schedule(step) for step in range(12)], 1e-4, rtol=1e-6)


def test_one_cycle_rises_from_a_25th_and_falls_along_cosines():
    schedule = make_schedule(0.5, 1e-3, total_steps=100, shape="one_cycle")
    steps = np.arange(120)
    rise = 0.02 + 0.48 * (1 - np.cos(np.pi * np.minimum(steps, 30) / 30)) / 2
    fall = 1e-3 + 0.499 * (1 + np.cos(np.pi * (np.clip(steps, 30, 100) - 30) / 70)) / 2
    expected = np.where(steps < 30, rise, fall)
    np.testing.assert_allclose([schedule(step) for step in steps], expected, rtol=1e-5)


def test_one_cycle_equals_the_schedule_of_optax():
    schedule = make_schedule(0.5, 0.5 / 25 / 1e4, total_steps=57, shape="one_cycle")
    other = optax.cosine_onecycle_schedule(57, 0.5)
    for step in range(60):
        assert float(schedule(step)) == pytest.approx(float(other(step)), rel=1e-5, abs=1e-8)


def test_warm_up_is_the_rise_of_one_cycle_and_zero_its_end():
    schedule = make_schedule(1.0, 0.0, total_steps=20, warmup_steps=15, shape="one_cycle")
    values = [float(schedule(step)) for step in (0, 15, 20, 30)]
    assert values == pytest.approx([0.04, 1.0, 0.0, 0.0], abs=1e-7)


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


def test_l2_adds_the_gradient_of_half_the_squared_kernels():
    """Adam receives the gradient of loss + l2 / 2 * sum(kernel ** 2).

    Adam's first moment after one step is a tenth of the gradient. The step itself is not
    compared, because it hardly depends on the size of the gradient.
    """
    # The addition ensures that no parameter is zero.
    params = jax.tree.map(lambda leaf: leaf + 0.1, _params())
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

    optimizer = make_optimizer(optax.constant_schedule(1e-3), l2)
    _, state = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
    first_moment = optax.tree.get(state, "mu")
    expected = jax.grad(loss_with_penalty)(params)
    jax.tree.map(
        lambda mu, grad: np.testing.assert_allclose(mu, 0.1 * grad, rtol=1e-5),
        first_moment,
        expected,
    )


def test_the_optimizer_equals_adam_in_float64():
    """Five steps of the optimizer equal five steps of Adam, computed in float64."""
    optimizer = make_optimizer(optax.constant_schedule(0.01), l2=0.0)
    params = {"bias": jnp.array([1.0, -2.0, 0.5])}
    state = optimizer.init(params)
    theta, m, v = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
    for t in range(1, 6):
        gradient = np.array([t, -0.1 * t**2, 1.0])
        updates, state = optimizer.update({"bias": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        theta -= 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(params["bias"], theta, rtol=1e-5)


def test_weight_decay_equals_adamw_in_float64():
    """Five steps equal AdamW (Loshchilov and Hutter 2019, algorithm 2), computed in float64."""
    optimizer = make_optimizer(optax.constant_schedule(0.01), l2=0.0, weight_decay=0.3)
    start = np.array([1.0, -2.0, 0.5])
    params = {"bias": jnp.array(start), "kernel": jnp.array(start)}
    state = optimizer.init(params)
    theta, m, v = {"bias": start.copy(), "kernel": start.copy()}, np.zeros(3), np.zeros(3)
    for t in range(1, 6):
        gradient = np.array([t, -0.1 * t**2, 1.0])
        updates, state = optimizer.update(
            {name: jnp.array(gradient) for name in params}, state, params
        )
        params = optax.apply_updates(params, updates)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        theta["kernel"] -= 0.01 * (step + 0.3 * theta["kernel"])
        theta["bias"] -= 0.01 * step  # Biases do not decay.
    for name in params:
        np.testing.assert_allclose(params[name], theta[name], rtol=1e-5)


_START = np.array([1.0, -2.0, 0.5, 3.0])


def _gradient(t):
    # The gradients of the last two elements change their sign in step 4. In this step, the update
    # of Lion has the sign of the gradient for the last element, but not for the third one.
    return np.array([t, -0.1 * t**2, *((1.0, 1.0) if t < 4 else (-0.2, -0.5))])


def _five_steps(optimizer):
    params = {"kernel": jnp.array(_START)}
    state = optimizer.init(params)
    for t in range(1, 6):
        gradient = {"kernel": jnp.array(_gradient(t))}
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params["kernel"]


def test_sgd_equals_gradient_descent_with_momentum_and_penalty():
    """The step is v = 0.8 v + gradient + l2 * kernel, then kernel -= 0.01 (v + decay * kernel)."""
    optimizer = make_optimizer(
        optax.constant_schedule(0.01), l2=0.2, name="sgd", momentum=0.8, weight_decay=0.3
    )
    theta, velocity = _START.copy(), np.zeros(4)
    for t in range(1, 6):
        velocity = 0.8 * velocity + _gradient(t) + 0.2 * theta
        theta -= 0.01 * (velocity + 0.3 * theta)
    np.testing.assert_allclose(_five_steps(optimizer), theta, rtol=1e-5)


def test_lion_equals_its_paper():
    """Five steps equal Lion (Chen et al. 2023, algorithm 2), computed in float64."""
    optimizer = make_optimizer(optax.constant_schedule(0.01), l2=0.0, name="lion", weight_decay=0.3)
    theta, m = _START.copy(), np.zeros(4)
    for t in range(1, 6):
        gradient = _gradient(t)
        theta -= 0.01 * (np.sign(0.9 * m + 0.1 * gradient) + 0.3 * theta)
        m = 0.99 * m + 0.01 * gradient
    np.testing.assert_allclose(_five_steps(optimizer), theta, rtol=1e-5)


def test_adamw_is_adam_with_weight_decay():
    first, second = (
        _five_steps(make_optimizer(optax.constant_schedule(0.01), 0.0, name=name, weight_decay=0.3))
        for name in ("adam", "adamw")
    )
    np.testing.assert_array_equal(first, second)


def test_each_stage_has_its_own_learning_rate():
    """The length of Adam's first step is the learning rate, for any gradient."""
    model = CNN(3, features=(4, 8), dense=16)
    factors = functools.partial(
        learning_rate_factors, model=model, stage_decay=0.5, head_factor=3.0
    )
    optimizer = make_optimizer(optax.constant_schedule(0.1), l2=0.0, factors=factors)
    params = _params()
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7.0), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    lengths = {
        path[0]: -np.asarray(leaf)
        for path, leaf in flax.traverse_util.flatten_dict(updates).items()
    }
    expected = {"conv1": 0.5, "norm1": 0.5, "conv2": 1, "norm2": 1, "dense": 1, "head": 3}
    assert lengths.keys() == expected.keys()
    for layer, factor in expected.items():
        np.testing.assert_allclose(lengths[layer], 0.1 * factor, rtol=1e-5)


def test_the_penalty_of_pretrained_networks_covers_the_head_only():
    mask = flax.traverse_util.flatten_dict(head_kernel_mask(_params()), sep="/")
    assert [name for name, on in mask.items() if on] == ["head/kernel"]
