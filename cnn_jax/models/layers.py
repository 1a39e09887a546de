"""The layers of Linen and JAX that XLA compiles badly on a CPU, written so that it does not.

Each has the parameters, values and gradients of the plain layer that its docstring
names (`tests/models/test_layers.py` compares them), and can be swapped for it. What
all of them gain is in `experiments/RESULTS.md`. Gradients are given by hand, for reverse
mode alone: `jax.jvp` does not go through.
"""

import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Sums within blocks of so many rows and numbers: they stay in a core's nearest cache, and
# from 33 rows on XLA rewrites a sum into windows, which take several times as long.
_BLOCK_ROWS, _BLOCK_SIZE = 32, 1024


def channel_sums(
    *arrays: Float[Array, "batch height width channel"],
) -> tuple[Float[Array, " channel"], ...]:
    """The float32 sums of arrays of one shape over all but channels, in one pass over memory."""
    arrays = tuple(array.astype(jnp.float32) for array in arrays)
    sums = lax.platform_dependent(*arrays, cpu=_sums_of_blocks, default=_plain_sums)
    return cast(tuple[Array, ...], sums)


def _plain_sums(*arrays: Array) -> tuple[Array, ...]:
    return tuple(jnp.sum(array, axis=(0, 1, 2)) for array in arrays)


def _sums_of_blocks(*arrays: Array) -> tuple[Array, ...]:
    """First over blocks of neighbouring pixels, for all arrays in one loop, then over blocks."""
    batch, height, width, channels = arrays[0].shape
    pixels = height * width
    rows = max(
        rows
        for rows in range(1, _BLOCK_ROWS + 1)
        if pixels % rows == 0 and (rows == 1 or rows * channels <= _BLOCK_SIZE)
    )
    blocks = tuple(array.reshape(batch, pixels // rows, rows, channels) for array in arrays)
    sums = lax.reduce(blocks, (jnp.float32(0),) * len(blocks), _add, (2,))
    # Or XLA makes one sum of the two again.
    return tuple(jnp.sum(array, axis=(0, 1)) for array in lax.optimization_barrier(sums))


def _add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _of_pixels(channels: Float[Array, " channel"]) -> Float[Array, "1 1 1 channel"]:
    """A number for each channel, to be combined with those of all pixels."""
    return channels[None, None, None]


def _convolve(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def convolve(
    x: Float[Array, "batch height width channel"],
    kernel: Float[Array, "3 3 channel features"],
) -> Float[Array, "batch height width features"]:
    """The cross-correlation of images with a kernel, at stride 1 and with padding "SAME"."""
    return _convolve(x, kernel)


def _convolve_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel), (x, kernel)


def _convolve_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    of_x = lax.platform_dependent(
        x, gradient, kernel, cpu=_input_gradient_on_cpu, default=_input_gradient
    )
    of_kernel = lax.platform_dependent(
        x, gradient, kernel, cpu=_kernel_gradient_on_cpu, default=_kernel_gradient
    )
    return cast(Array, of_x), cast(Array, of_kernel)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _input_gradient(x: Array, gradient: Array, kernel: Array) -> Array:
    return jax.linear_transpose(lambda x: _convolve(x, kernel), x)(gradient)[0]


def _input_gradient_on_cpu(x: Array, gradient: Array, kernel: Array) -> Array:
    """The same convolution as above, with a kernel that XLA cannot see is transposed.

    Within loops it would convolve by the untransposed one, in ten times the time.
    """
    transposed = lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2)
    return _convolve(gradient, lax.optimization_barrier(transposed))


def _kernel_gradient(x: Array, gradient: Array, kernel: Array) -> Array:
    return jax.linear_transpose(lambda kernel: _convolve(x, kernel), kernel)(gradient)[0]


def _kernel_gradient_on_cpu(x: Array, gradient: Array, kernel: Array) -> Array:
    """The same convolution as above, images with gradients of their size, by Eigen.

    oneDNN, which XLA may use on CPUs (`runtime.compiler_options`), takes up to eight times
    as long for it. XLA does not give it kernels that are reversed, here by channel.
    """
    of_kernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        lax.rev(gradient.transpose(1, 2, 0, 3), (3,)),
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return lax.rev(of_kernel, (3,)).transpose(1, 2, 0, 3)


@jax.custom_vjp
def add_bias(
    x: Float[Array, "batch height width channel"], bias: Float[Array, " channel"]
) -> Float[Array, "batch height width channel"]:
    """The sum of both; the bias's gradient is one of `channel_sums`."""
    return x + _of_pixels(bias)


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return x + _of_pixels(bias), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    (total,) = channel_sums(gradient)
    return gradient, total.astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def max_pool_2x2(
    x: Float[Array, "batch height width channel"],
) -> Float[Array, "batch height//2 width//2 channel"]:
    """Max pooling with window 2 x 2 and stride 2; an odd last row or column is dropped.

    Value and gradient are those of `nn.max_pool`: where pixels of a window tie, the gradient
    goes to the first. (If several are not numbers, to another one of them.)
    """
    return _max_pool(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])


@jax.custom_vjp
def _max_pool(x: Array) -> Array:
    a, b, c, d = _windows(x)
    # Or XLA computes it anew, across its rows, where the next layer wants it transposed.
    return lax.optimization_barrier(jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d)))


def _max_pool_forward(x: Array) -> tuple[Array, Array]:
    """Also says which pixel of each window is the largest, 0 to 3 by row and column.

    The backward pass does not look for it: XLA may compute pixels twice, with other
    roundings, and none might equal the maximum.
    """
    windows = jnp.stack(_windows(x))
    pooled, which = lax.platform_dependent(windows, cpu=_largest_in_one_pass, default=_largest)
    return lax.optimization_barrier((pooled, which.astype(jnp.int8)))


def _largest(windows: Array) -> tuple[Array, Array]:
    return jnp.max(windows, axis=0), jnp.argmax(windows, axis=0).astype(jnp.int32)


def _largest_in_one_pass(windows: Array) -> tuple[Array, Array]:
    pixel = lax.broadcasted_iota(jnp.int32, windows.shape, 0)
    init = jnp.asarray(-jnp.inf, windows.dtype), jnp.int32(0)
    pooled, which = lax.reduce((windows, pixel), init, _larger, (0,))
    return pooled, which


def _larger(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    is_b = (b[0] > a[0]) | jnp.isnan(b[0])
    return jnp.where(is_b, b[0], a[0]), jnp.where(is_b, b[1], a[1])


def _max_pool_backward(which: Array, gradient: Array) -> tuple[Array]:
    """By comparisons alone, which XLA computes within the loops that need the gradient."""
    batch, height, width, channels = gradient.shape
    pixel = jnp.arange(4, dtype=which.dtype).reshape(1, 1, 2, 1, 2, 1)
    is_largest = which[:, :, None, :, None] == pixel
    routed = jnp.where(is_largest, gradient[:, :, None, :, None], 0)
    return (routed.reshape(batch, 2 * height, 2 * width, channels),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _windows(x: Array) -> list[Array]:
    """The pixels of each 2 x 2 window, by row and column, [batch, height//2, width//2, channel]."""
    return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_batch(
    x: Float[Array, "batch height width channel"],
    scale: Float[Array, " channel"],
    bias: Float[Array, " channel"],
    epsilon: float,
) -> tuple[
    Float[Array, "batch height width channel"], Float[Array, " channel"], Float[Array, " channel"]
]:
    """Normalises each channel by the mean and variance of the batch (Ioffe and Szegedy 2015).

    Returns:
      (x - mean) / sqrt(variance + epsilon) * scale + bias, in x's dtype; the mean and the
      variance, float32. The variance is that of the batch itself, E[x^2] - E[x]^2, as in
      `nn.BatchNorm`. No gradient flows through the second and third.
    """
    return _normalize_batch_forward(x, scale, bias, epsilon)[0]


def _normalize_batch_forward(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    in_float32 = x.astype(jnp.float32)
    total, total_of_squares = channel_sums(in_float32, in_float32 * in_float32)
    count = x.size // x.shape[-1]
    mean = total / count
    variance = jnp.maximum(total_of_squares / count - mean * mean, 0)
    inverse = lax.rsqrt(variance + epsilon)
    normalized = (in_float32 - _of_pixels(mean)) * _of_pixels(inverse * scale) + _of_pixels(bias)
    return (normalized.astype(x.dtype), mean, variance), (x, mean, inverse, scale)


def _normalize_batch_backward(
    epsilon: float, residuals: tuple[Array, ...], gradients: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    del epsilon
    x, mean, inverse, scale = residuals
    gradient = gradients[0].astype(jnp.float32)
    centred = x.astype(jnp.float32) - _of_pixels(mean)
    of_bias, of_scale = channel_sums(gradient, gradient * centred)
    of_scale *= inverse
    # scale / deviation * (gradient - its mean - its part along the normalised x), a sum of
    # three terms whose factors are those of a channel.
    count = x.size // x.shape[-1]
    slope = inverse * scale
    along_x = -slope * inverse * of_scale / count
    constant = -slope * of_bias / count
    of_x = _of_pixels(slope) * gradient + _of_pixels(along_x) * centred + _of_pixels(constant)
    return of_x.astype(x.dtype), of_scale, of_bias


normalize_batch.defvjp(_normalize_batch_forward, _normalize_batch_backward)


class Conv(nn.Module):
    """`nn.Conv` with a 3 x 3 kernel, stride 1 and padding "SAME".

    Attributes:
      features: Number of output channels.
      dtype: Computation dtype; parameters are float32.
    """

    features: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch height width features"]:
        kernel = self.param(
            "kernel", nn.initializers.he_normal(), (3, 3, x.shape[-1], self.features)
        )
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        x = convolve(x.astype(self.dtype), kernel.astype(self.dtype))
        return add_bias(x, bias.astype(self.dtype))


class BatchNorm(nn.Module):
    """`nn.BatchNorm` with momentum 0, over all axes but the last.

    The collection "batch_stats" has the mean and the variance of each channel that
    inference normalises by. In training the layer replaces them by those of the batch;
    `step.update_statistics` averages them over many batches.

    Attributes:
      use_running_average: Whether to normalise by "batch_stats", or by the statistics of
        the batch.
      epsilon: The number added to the variance.
      dtype: The dtype of the output. Parameters and statistics are float32.
    """

    use_running_average: bool
    epsilon: float
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch height width channel"]:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        stored_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        stored_variance = self.variable("batch_stats", "var", jnp.ones, shape)
        if self.use_running_average:
            factor = lax.rsqrt(stored_variance.value + self.epsilon) * scale
            centred = x - _of_pixels(stored_mean.value)
            return (centred * _of_pixels(factor) + _of_pixels(bias)).astype(self.dtype)
        normalized, mean, variance = cast(
            tuple[Array, Array, Array],
            normalize_batch(x.astype(self.dtype), scale, bias, self.epsilon),
        )
        if not self.is_initializing():
            stored_mean.value, stored_variance.value = mean, variance
        return normalized
