"""Compares each convolution with `lax.conv_general_dilated`, or with NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn_jax.models import convolutions
from cnn_jax.models.convolutions import dense_convolve, depthwise_convolve, paddings


def _random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _assert_close(actual, expected):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max()),
        actual,
        jax.tree.map(np.asarray, expected),
    )


def _value_and_gradients(function, *inputs):
    def weighted(*inputs):
        out = function(*inputs)
        return jnp.sum(out * _random(*out.shape, seed=9)), out

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(*inputs)


def _reference(x, kernel, stride, pads, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_paddings_of_both_conventions():
    assert paddings("symmetric", 3, 2, (8, 9)) == ((1, 1), (1, 1))
    assert paddings("same", 3, 2, (8, 9)) == ((0, 1), (1, 1))
    assert paddings("same", 5, 2, (8, 7)) == ((1, 2), (2, 2))
    assert paddings("same", 5, 1, (8, 7)) == ((2, 2), (2, 2))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(12, 10), (2, 2), (4, 3)])
def test_dense_convolutions_equal_lax(kernel_size, stride, size):
    pads = paddings("symmetric", kernel_size, stride, size)
    inputs = _random(2, *size, 3), _random(kernel_size, kernel_size, 3, 4, seed=1)
    actual = _value_and_gradients(lambda *i: dense_convolve(*i, stride, pads), *inputs)
    _assert_close(actual, _value_and_gradients(lambda *i: _reference(*i, stride, pads), *inputs))


@pytest.mark.parametrize("has_onednn", [True, False])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "size"),
    # The first four cases have more than one tile.
    [
        (3, 1, (9, 10)),
        (3, 1, (4, 30)),
        (5, 2, (14, 12)),
        (7, 1, (5, 9)),
        (3, 2, (8, 7)),
        (5, 1, (2, 3)),
        (7, 2, (2, 2)),
    ],
)
def test_depthwise_convolutions_equal_lax(
    monkeypatch, has_onednn, padding, kernel_size, stride, size
):
    monkeypatch.setattr(convolutions, "_HAS_ONEDNN", has_onednn)
    pads = paddings(padding, kernel_size, stride, size)
    inputs = _random(3, *size, 4), _random(kernel_size, kernel_size, 4, seed=1)
    actual = _value_and_gradients(lambda *i: depthwise_convolve(*i, stride, pads), *inputs)

    def expected(x, kernel):
        return _reference(x, kernel[:, :, None], stride, pads, groups=4)

    _assert_close(actual, _value_and_gradients(expected, *inputs))


@pytest.mark.parametrize("stride", [1, 2])
def test_other_platforms_get_the_plain_gradients_of_a_depthwise_convolution(stride):
    size = (6, 6)
    pads = paddings("same", 3, stride, size)
    x, kernel = _random(2, *size, 3), _random(3, 3, 3, seed=1)
    gradient = _random(2, 6 // stride, 6 // stride, 3, seed=2)
    options = {"kernel_size": 3, "stride": stride, "pads": pads}
    actual = convolutions._kernel_gradient(x, gradient, **options)
    _assert_close(actual, convolutions._kernel_gradient_on_cpu(x, gradient, **options))
    options = {"size": size, "stride": stride, "pads": pads}
    actual = convolutions._input_gradient(gradient, kernel, **options)
    _assert_close(actual, convolutions._input_gradient_on_cpu(gradient, kernel, **options))


def test_a_depthwise_convolution_trains_in_bfloat16():
    inputs = _random(2, 4, 4, 3), _random(3, 3, 3, seed=1)
    convolve = functools.partial(depthwise_convolve, stride=1, pads=((1, 1), (1, 1)))
    value, backward = jax.vjp(convolve, *(array.astype(jnp.bfloat16) for array in inputs))
    gradients = backward(value)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16] * 2
    expected_value, expected_backward = jax.vjp(convolve, *inputs)
    for actual, expected in zip(gradients, expected_backward(expected_value), strict=True):
        error = np.abs(actual.astype(jnp.float32) - expected).max()
        assert error < 0.03 * np.abs(expected).max()


def test_platforms_without_cpu_code_convolve_in_groups():
    convolve = functools.partial(depthwise_convolve, stride=1, pads=((1, 1), (1, 1)))
    lowered = (
        jax.jit(convolve)
        .trace(_random(1, 8, 8, 4), _random(3, 3, 4))
        .lower(lowering_platforms=("tpu",))
    )
    assert "feature_group_count = 4" in lowered.as_text()
