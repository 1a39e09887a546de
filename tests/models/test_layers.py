"""Compares each layer with the corresponding layer or function of Flax Linen, JAX or NumPy."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models import layers
from cnn_jax.models.layers import (
    BatchNorm,
    Conv,
    Dense,
    LayerNorm,
    add_bias,
    channel_sums,
    gelu,
    max_pool_2x2,
    max_pool_3x3,
    normalize_batch,
    relu6,
)

# The layers divide the pixels into blocks of equal size. The numbers of pixels in these shapes have
# many divisors (1024 and 480), few divisors (4107), or none (7).
SHAPES = [(4, 16, 16, 32), (2, 12, 20, 5), (3, 37, 37, 8), (1, 7, 1, 3)]


def _random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, shape), dtype)


@pytest.fixture(autouse=True)
def _implicit_broadcasts_of_flax():
    """Allows JAX's rank promotion, which `nn.Conv` and `nn.BatchNorm` of Flax rely on."""
    with jax.numpy_rank_promotion("allow"):
        yield


def _assert_close(actual, expected, tolerance=1e-5):
    """Asserts that arrays are equal up to a tolerance, relative to the largest absolute value."""
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            a, e, rtol=0, atol=tolerance * max(np.abs(e).max(), 1e-6)
        ),
        actual,
        jax.tree.map(np.asarray, expected),
    )


def _value_and_gradients(module, variables, x, weights):
    """Returns (sum, statistics), and the gradients of the sum.

    The sum is a weighted sum of a module's outputs. The statistics are the module's new batch
    statistics. The gradients are with respect to the parameters and to the inputs.
    """

    def weighted(params, x):
        out, updates = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(weights * out.astype(jnp.float32)), updates

    return jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(variables["params"], x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_channel_sums_equal_numpy(shape, count):
    arrays = [_random(*shape, seed=seed) for seed in range(count)]
    expected = [np.asarray(array, np.float64).sum((0, 1, 2)) for array in arrays]
    _assert_close(list(jax.jit(channel_sums)(*arrays)), expected, 1e-6)


def test_long_sums_are_precise():
    """The sum of half a million equal numbers is precise, unlike a running sum in float32."""
    x = jnp.full((2, 512, 512, 4), 0.1, jnp.float32)
    np.testing.assert_allclose(channel_sums(x)[0], x.size / 4 * np.float64(x[0, 0, 0, 0]), 2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_conv_equals_flax(shape):
    x = _random(*shape)
    plain = nn.Conv(6, (3, 3), kernel_init=nn.initializers.he_normal())
    ours = Conv(6)
    variables = plain.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), variables)
    variables["params"]["bias"] = _random(6, seed=2)
    weights = _random(*shape[:3], 6, seed=1)
    _assert_close(
        _value_and_gradients(ours, variables, x, weights),
        _value_and_gradients(plain, variables, x, weights),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_forms_of_the_kernel_gradient_are_equal(shape):
    x, gradient = _random(*shape), _random(*shape[:3], 6, seed=1)
    kernel = jnp.zeros((3, 3, shape[-1], 6))
    expected = layers._kernel_gradient(x, gradient, kernel)
    for form in (layers._kernel_gradient_on_cpu, layers._kernel_gradient_in_float32):
        _assert_close(form(x, gradient, kernel), expected)


def test_a_kernel_gradient_for_tpus_is_not_rounded():
    x, gradient = (_random(2, 8, 8, 4, seed=seed, dtype=jnp.bfloat16) for seed in (0, 1))
    kernel = jnp.zeros((3, 3, 4, 4), jnp.bfloat16)
    actual = layers._kernel_gradient_in_float32(x, gradient, kernel)
    exact = layers._kernel_gradient(*(a.astype(jnp.float32) for a in (x, gradient, kernel)))
    assert actual.dtype == jnp.float32
    _assert_close(actual, exact, 1e-5)


def test_the_gradients_of_a_convolution_in_bfloat16_are_float32():
    x = _random(2, 8, 8, 4, dtype=jnp.bfloat16)
    conv = Conv(5, jnp.dtype("bfloat16"))
    variables = conv.init(jax.random.key(0), x)

    def total(variables):
        out = conv.apply(variables, x)
        assert out.dtype == jnp.bfloat16
        return jnp.sum(out.astype(jnp.float32))

    gradients = jax.grad(total)(variables)["params"]
    np.testing.assert_array_equal(gradients["bias"], 128)
    assert gradients["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_jitted", [False, True])
def test_batch_norm_in_training_equals_flax(shape, is_jitted):
    options = {"use_running_average": False, "epsilon": 1e-3}
    x = nn.relu(_random(*shape))
    plain, ours = nn.BatchNorm(momentum=0, **options), BatchNorm(**options)
    variables = plain.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), variables)
    channels = shape[-1]
    variables["params"] = {
        "scale": _random(channels, seed=2),  # The scales are positive and negative.
        "bias": _random(channels, seed=3),
    }
    compute = _value_and_gradients
    if is_jitted:
        compute = jax.jit(compute, static_argnums=0)
    weights = _random(*shape, seed=1)
    _assert_close(compute(ours, variables, x, weights), compute(plain, variables, x, weights), 1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "default"])
@pytest.mark.parametrize("uses_maps", [False, True])
@pytest.mark.parametrize("shape", [(4, 16, 16, 8), (3, 7, 5, 4)])
def test_batch_norm_with_max_pool_equals_flax(monkeypatch, shape, uses_maps, platform):
    """The scales are positive, negative and zero, so that some windows have equal pixels."""
    monkeypatch.setattr(
        layers.lax,
        "platform_dependent",
        lambda *operands, **branches: branches.get(platform, branches["default"])(*operands),
    )
    x = jnp.round(nn.relu(_random(*shape)))
    scale = _random(shape[-1], seed=2).at[0].set(0)
    bias = _random(shape[-1], seed=3)
    pool_weights = _random(shape[0], shape[1] // 2, shape[2] // 2, shape[3], seed=4)
    map_weights = _random(*shape, seed=5) * uses_maps

    def weighted(maps, pooled):
        total = jnp.sum(pool_weights * pooled)
        return total + jnp.sum(map_weights * maps) if uses_maps else total

    def ours(x, scale, bias):
        maps, pooled, *_ = layers.normalize_batch_and_pool(x, scale, bias, 1e-3)
        return weighted(maps, pooled)

    def plain(x, scale, bias):
        module = nn.BatchNorm(use_running_average=False, momentum=0, epsilon=1e-3)
        variables = {"params": {"scale": scale, "bias": bias}}
        maps, _ = module.apply(variables, x, mutable=["batch_stats"])
        return weighted(maps, nn.max_pool(maps, (2, 2), (2, 2)))

    actual, expected = (
        jax.jit(jax.value_and_grad(function, (0, 1, 2)))(x, scale, bias)
        for function in (ours, plain)
    )
    _assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("uses_maps", [False, True])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_batch_norm_with_mean_equals_flax(use_running_average, uses_maps):
    shape = (4, 16, 15, 8)
    x, map_weights = nn.relu(_random(*shape)), _random(*shape, seed=1)
    mean_weights = _random(shape[0], shape[-1], seed=2)
    options = {"use_running_average": use_running_average, "epsilon": 1e-3}
    plain, ours = nn.BatchNorm(momentum=0, **options), BatchNorm(**options)
    variables = plain.init(jax.random.key(0), x)
    variables["params"] = {"scale": _random(8, seed=3), "bias": _random(8, seed=4)}

    def weighted(module, params, x):
        def results(module, x):
            if isinstance(module, BatchNorm):
                return module.with_mean(x)
            maps = module(x)
            return maps, maps.mean((1, 2))

        (maps, means), updates = nn.apply(results, module, mutable=["batch_stats"])(
            {**variables, "params": params}, x
        )
        total = jnp.sum(mean_weights * means)
        return total + jnp.sum(map_weights * maps) if uses_maps else total, updates

    actual, expected = (
        jax.jit(jax.value_and_grad(weighted, argnums=(1, 2), has_aux=True), static_argnums=0)(
            module, variables["params"], x
        )
        for module in (ours, plain)
    )
    _assert_close(actual, expected, 1e-5)


def test_batch_norm_in_inference_equals_flax():
    options = {"use_running_average": True, "epsilon": 1e-3}
    x = _random(2, 5, 6, 4)
    variables = {
        "params": {"scale": _random(4, seed=1), "bias": _random(4, seed=2)},
        "batch_stats": {"mean": _random(4, seed=3), "var": jnp.abs(_random(4, seed=4))},
    }
    plain, ours = nn.BatchNorm(**options).apply(variables, x), BatchNorm(**options)
    _assert_close(ours.apply(variables, x), plain, 1e-6)


def test_batch_norm_statistics_are_precise_in_bfloat16():
    """BatchNorm computes its statistics as float32 sums, even if its inputs are bfloat16."""
    x = _random(8, 16, 16, 4, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    module = BatchNorm(use_running_average=False, epsilon=1e-3, dtype=jnp.dtype("bfloat16"))
    variables = module.init(jax.random.key(0), x)
    out, updates = module.apply(variables, x, mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    stats = updates["batch_stats"]
    _assert_close(stats, {"mean": exact.mean((0, 1, 2)), "var": exact.var((0, 1, 2))}, 1e-5)
    weights = _random(*x.shape, seed=1)
    gradient = jax.grad(
        lambda x: jnp.sum(
            weights * module.apply(variables, x, mutable=["batch_stats"])[0].astype(jnp.float32)
        )
    )(x)
    assert gradient.dtype == jnp.bfloat16


def test_a_constant_channel_is_normalised_to_its_bias():
    x = jnp.full((2, 4, 4, 3), 0.7)
    out, mean, variance = normalize_batch(x, jnp.ones(3), jnp.arange(3.0), 1e-3)
    np.testing.assert_allclose(mean, 0.7, rtol=1e-6)
    np.testing.assert_allclose(variance, 0, atol=1e-6)
    np.testing.assert_allclose(out, np.broadcast_to(np.arange(3.0), x.shape), atol=1e-4)


def test_the_gradient_of_a_bias_is_a_sum():
    x, bias, weights = _random(2, 8, 8, 3), _random(3, seed=1), _random(2, 8, 8, 3, seed=2)
    x_gradient, bias_gradient = jax.grad(lambda *a: jnp.sum(weights * add_bias(*a)), (0, 1))(
        x, bias
    )
    np.testing.assert_array_equal(x_gradient, weights)
    np.testing.assert_allclose(bias_gradient, weights.sum((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 7, 2), (2, 2, 3, 1), (3, 1, 4, 2)])
def test_max_pool_and_its_gradient_equal_flax(shape, ties):
    x = _random(*shape)
    if ties:
        x = jnp.round(x / 2)

    def flax_pool(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    np.testing.assert_array_equal(jax.jit(max_pool_2x2)(x), flax_pool(x))
    weights = _random(*max_pool_2x2(x).shape, seed=1)

    def weighted(pool):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(weights * pool(x))))

    (value, gradient), (flax_value, flax_gradient) = (
        weighted(pool)(x) for pool in (max_pool_2x2, flax_pool)
    )
    np.testing.assert_allclose(value, flax_value, rtol=1e-6)
    np.testing.assert_array_equal(gradient, flax_gradient)


@pytest.mark.parametrize("form", [layers._largest, layers._largest_by_reduction])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_forms_of_max_pool_equal_flax_with_equal_pixels(form, dtype):
    """Tests the forms of all platforms, of which a platform compiles only one."""
    x = jnp.round(_random(2, 6, 8, 3) / 2).astype(dtype)
    pooled, pull_back = jax.vjp(lambda x: nn.max_pool(x, (2, 2), (2, 2)), x)
    largest, index = form(x)
    np.testing.assert_array_equal(largest, pooled)
    assert index.dtype == jnp.int8
    weights = _random(*pooled.shape, seed=1, dtype=dtype)
    for route in (layers._route_by_index, layers._select_and_scatter):
        np.testing.assert_array_equal(route(index, x, weights), pull_back(weights)[0])


@pytest.mark.parametrize("pixel", range(4))
def test_max_pool_propagates_nan(pixel):
    x = jnp.ones((1, 4, 1, 1)).at[0, pixel].set(jnp.nan).reshape(1, 2, 2, 1)
    assert jnp.isnan(max_pool_2x2(x)).all()
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(max_pool_2x2(x)))(x)
    assert jnp.isnan(value)
    assert gradient.ravel()[pixel] == 1
    assert gradient.sum() == 1


def test_layer_norm_has_the_epsilon_of_convnext_and_of_vision_transformers():
    x = 1e-3 * np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    centred = x.astype(np.float64) - x.mean(1, keepdims=True)
    expected = centred / np.sqrt(centred.var(1, keepdims=True) + 1e-6)
    layer = LayerNorm()
    result = layer.apply(layer.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_dense_equals_linen():
    x = _random(2, 3, 5)
    variables = Dense(4, jnp.dtype("float32")).init(jax.random.key(0), x)
    weights = _random(2, 3, 4, seed=1)
    actual, expected = (
        _value_and_gradients(layer, variables, x, weights)
        for layer in (Dense(4, jnp.dtype("float32")), nn.Dense(4))
    )
    _assert_close(actual, expected)


def test_gelu_is_the_exact_one():
    x = np.linspace(-6, 6, 100)
    expected = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x]
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), expected, atol=2e-6)
    # In bfloat16, 1 + erf(x) would be 0 for these inputs.
    small = gelu(jnp.asarray([-3.0, -3.5], jnp.bfloat16))
    np.testing.assert_allclose(small.astype(jnp.float32), [-4.05e-3, -8.14e-4], rtol=0.02)


@pytest.mark.parametrize("size", [(8, 12), (7, 10), (1, 2)])
def test_max_pool_3x3_equals_linen(size):
    # With these small integers, a window often has several largest pixels. All values are negative,
    # so padding with zeros would change the result.
    x = jnp.asarray(np.random.default_rng(0).integers(-4, 0, (2, *size, 3)), jnp.float32)

    def value_and_gradient(pool):
        out = jax.eval_shape(pool, x)
        weights = _random(*out.shape, seed=1)
        return jax.jit(lambda x: (pool(x), jax.grad(lambda x: jnp.sum(weights * pool(x)))(x)))(x)

    plain = value_and_gradient(lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
    _assert_close(value_and_gradient(max_pool_3x3), plain, 1e-6)


def test_relu6_equals_jax_and_has_the_gradient_of_pytorch():
    x = jnp.asarray([-np.inf, -1, -0.0, 0, 1e-30, 3, 6, 7], jnp.float32)
    value, backward = jax.vjp(relu6, x)
    np.testing.assert_array_equal(value, jax.nn.relu6(x))
    # At 0 and at 6, the gradient of `jax.nn.relu6` is 1 / 2.
    np.testing.assert_array_equal(backward(2 * jnp.ones(8))[0], 2 * ((x > 0) & (x < 6)))
    assert jnp.isnan(relu6(jnp.full(1, jnp.nan))[0])
