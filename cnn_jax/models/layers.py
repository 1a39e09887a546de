"""Layers with the same results as layers of Flax Linen and JAX, in forms that XLA compiles well.

Each layer has the parameters, values and gradients of the standard layer that its docstring
names (`tests/models/test_layers.py` compares the two layers), and can be replaced by the
standard layer. Where the platforms need different forms, `lax.platform_dependent` selects one.
The measured gain in speed on CPUs is in `experiments/RESULTS.md`, with the bytes and cycles that
XLA counts for a GPU and a TPU. Most gradients are written by hand, for reverse mode only: `jax.jvp`
of these layers fails.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

# The largest number of rows of a block in which `_blockwise_sums` adds values. With more rows, XLA
# rewrites the sum as a sum over windows, which takes several times as long.
_BLOCK_ROWS = 31


def channel_sums(
    *arrays: Float[Array, "batch height width channel"],
) -> tuple[Float[Array, " channel"], ...]:
    """Sums each array over all axes except the last, in float32 and in one pass over memory.

    Args:
      *arrays: Arrays of the same shape.

    Returns:
      A sum for each array and channel.
    """
    return _sums(arrays, (0, 1))


@jax.custom_vjp
def image_sums(
    *arrays: Float[Array, "batch height width channel"],
) -> tuple[Float[Array, "batch channel"], ...]:
    """Does the same as `channel_sums`, for each image of the batch."""
    return _sums(arrays, (1,))


def _image_sums_forward(*arrays: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    return image_sums(*arrays), arrays


def _image_sums_backward(
    arrays: tuple[Array, ...], gradients: tuple[Array, ...]
) -> tuple[Array, ...]:
    # Only the shapes of the arrays are used, so that XLA does not keep the arrays.
    return tuple(
        jnp.broadcast_to(gradient[:, None, None], array.shape).astype(array.dtype)
        for array, gradient in zip(arrays, gradients, strict=True)
    )


image_sums.defvjp(_image_sums_forward, _image_sums_backward)


def _sums(arrays: tuple[Array, ...], axes: tuple[int, ...]) -> tuple[Array, ...]:
    """Sums arrays of shape [batch, height * width, channel] over the given axes."""
    arrays = tuple(array.astype(jnp.float32) for array in arrays)
    sums = lax.platform_dependent(
        *arrays,
        cpu=functools.partial(_blockwise_sums, axes=axes),
        default=functools.partial(_plain_sums, axes=axes),
    )
    return cast(tuple[Array, ...], sums)


def _plain_sums(*arrays: Array, axes: tuple[int, ...]) -> tuple[Array, ...]:
    return tuple(jnp.sum(array, axis=(*axes, 2)) for array in arrays)


def _blockwise_sums(*arrays: Array, axes: tuple[int, ...]) -> tuple[Array, ...]:
    """Sums each array within blocks of neighbouring pixels, and then adds the sums of the blocks.

    One loop handles all arrays.
    """
    batch, height, width, channels = arrays[0].shape
    pixels = height * width
    rows = max(rows for rows in range(1, _BLOCK_ROWS + 1) if pixels % rows == 0)
    blocks = tuple(array.reshape(batch, pixels // rows, rows, channels) for array in arrays)
    sums = lax.reduce(blocks, (jnp.float32(0),) * len(blocks), _add, (2,))
    # Without this barrier, XLA merges the sum within blocks and the sum over blocks into one sum.
    return tuple(jnp.sum(array, axis=axes) for array in lax.optimization_barrier(sums))


def _add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _per_channel(values: Float[Array, " channel"]) -> Float[Array, "1 1 1 channel"]:
    """Reshapes an array of values per channel, so that the array broadcasts to images."""
    return values[None, None, None]


def _convolve(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def convolve(
    x: Float[Array, "batch height width channel"],
    kernel: Float[Array, "3 3 channel features"],
) -> Float[Array, "batch height width features"]:
    """Convolves images with a kernel, with stride 1 and padding "SAME", in the dtype of x.

    As usual for networks, this is a cross-correlation: the kernel is not reversed. The gradient of
    the kernel has the kernel's dtype. On a TPU, a float32 gradient of bfloat16 images is not
    rounded to bfloat16 before it is summed over the devices.
    """
    return _convolve(x, kernel.astype(x.dtype))


def _convolve_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel.astype(x.dtype)), (x, kernel)


def _convolve_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    own_kernel = kernel.astype(x.dtype)
    input_gradient = lax.platform_dependent(
        x, gradient, own_kernel, cpu=_input_gradient_on_cpu, default=_input_gradient
    )
    kernel_gradient = lax.platform_dependent(
        x,
        gradient,
        own_kernel,
        cpu=_as(kernel.dtype, _kernel_gradient_on_cpu),
        tpu=_as(kernel.dtype, _kernel_gradient_in_float32),
        default=_as(kernel.dtype, _kernel_gradient),
    )
    return cast(Array, input_gradient), cast(Array, kernel_gradient)


def _as(dtype: jnp.dtype, function: Callable[..., Array]) -> Callable[..., Array]:
    """Returns a function that converts the result of `function` to a dtype."""
    return lambda *args: function(*args).astype(dtype)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _input_gradient(x: Array, gradient: Array, kernel: Array) -> Array:
    return jax.linear_transpose(lambda x: _convolve(x, kernel), x)(gradient)[0]


def _input_gradient_on_cpu(x: Array, gradient: Array, kernel: Array) -> Array:
    """Computes the gradient of the input as a convolution with the transposed kernel, for CPUs.

    The barrier hides the transposition from XLA. Without the barrier, XLA convolves with the
    untransposed kernel inside loops, which takes ten times as long.
    """
    transposed = lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2)
    return _convolve(gradient, lax.optimization_barrier(transposed))


def _kernel_gradient(x: Array, gradient: Array, kernel: Array) -> Array:
    return jax.linear_transpose(lambda kernel: _convolve(x, kernel), kernel)(gradient)[0]


def _kernel_gradient_in_float32(x: Array, gradient: Array, kernel: Array) -> Array:
    """Computes `_kernel_gradient` without rounding the sums over the pixels to the dtype of x."""
    return lax.conv_general_dilated(
        x,
        gradient,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=jnp.float32,
    )


def _kernel_gradient_on_cpu(x: Array, gradient: Array, kernel: Array) -> Array:
    """Computes the gradient of the kernel as a convolution of images with gradients, for CPUs.

    On a CPU, XLA may pass convolutions to oneDNN instead of Eigen (`runtime.compiler_options`).
    oneDNN takes up to eight times as long as Eigen for this convolution. XLA passes no
    convolution with a reversed kernel to oneDNN. This function therefore reverses the
    convolution's kernel along the output channels, and then reverses the result in the same way.
    """
    reversed_gradient = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        lax.rev(gradient.transpose(1, 2, 0, 3), (3,)),
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return lax.rev(reversed_gradient, (3,)).transpose(1, 2, 0, 3)


@jax.custom_vjp
def add_bias(
    x: Float[Array, "batch height width channel"], bias: Float[Array, " channel"]
) -> Float[Array, "batch height width channel"]:
    """Adds a bias to each channel, in the dtype of x.

    The gradient of the bias is computed by `channel_sums`, and has the dtype of the bias.
    """
    return x + _per_channel(bias.astype(x.dtype))


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return x + _per_channel(bias.astype(x.dtype)), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    (total,) = channel_sums(gradient)
    return gradient, total.astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def relu6(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes min(max(x, 0), 6).

    The gradient is 1 between 0 and 6, else 0, as in PyTorch. The backward pass needs only the
    result. The gradient of `jax.nn.relu6` needs x, so that x and the result are both kept.
    """
    return jnp.minimum(nn.relu(x), 6)


def _relu6_forward(x: Array) -> tuple[Array, Array]:
    result = relu6(x)
    return result, result


def _relu6_backward(result: Array, gradient: Array) -> tuple[Array]:
    is_inside = (result > 0) & (result < 6)
    return (jnp.where(is_inside, gradient, jnp.zeros((), gradient.dtype)),)


relu6.defvjp(_relu6_forward, _relu6_backward)


def max_pool_2x2(
    x: Float[Array, "batch height width channel"],
) -> Float[Array, "batch height//2 width//2 channel"]:
    """Applies max pooling with a 2 x 2 window, stride 2 and padding "VALID".

    Values and gradients equal those of `nn.max_pool`: if several pixels of a window have the
    maximum, the first of these pixels gets the gradient. (A window with several NaN pixels is an
    exception: the gradient may go to another pixel of the window than with `nn.max_pool`.)
    """
    return _max_pool(_whole_windows(x))


def _whole_windows(x: Array) -> Array:
    """Removes the last row and the last column if their number is odd."""
    return x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]


@jax.custom_vjp
def _max_pool(x: Array) -> Array:
    return cast(Array, lax.platform_dependent(x, cpu=_max_of_windows, default=_standard_max_pool))


def _max_of_windows(x: Array) -> Array:
    a, b, c, d = _windows(x)
    # Without this barrier, XLA recomputes the pooled values with strided reads.
    return lax.optimization_barrier(jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d)))


def _standard_max_pool(x: Array) -> Array:
    return nn.max_pool(x, (2, 2), (2, 2))


def _max_pool_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """Returns the pooled images, and the index of the largest pixel of each window with x.

    The pixels of a window have the indices 0 to 3, in row-major order. The backward pass uses
    the index and does not compare pixels with the maximum: XLA may compute pixels twice, with
    different rounding, so that no pixel equals the maximum.
    """
    pooled, index = lax.platform_dependent(
        x,
        cpu=lambda x: lax.optimization_barrier(_largest_by_reduction(x)),
        tpu=lambda x: _without_index(_standard_max_pool(x)),
        default=lambda x: lax.optimization_barrier(_largest(x)),
    )
    return pooled, (index, x)


def _without_index(pooled: Array, *others: Array) -> tuple[Array, ...]:
    """Returns pooled images with indices of zero: on TPUs, the backward pass does not use them."""
    return pooled, jnp.zeros(pooled.shape, jnp.int8), *others


def _largest(x: Array, *others: Array) -> tuple[Array, ...]:
    """Returns the maximum of each window of x, and the index of the maximum, int8.

    On a GPU, XLA fuses these comparisons into one kernel. A reduction would be three kernels.

    Args:
      x: The images.
      *others: Arrays with the shape of x, whose pixels at the same positions are returned too.
    """
    return _largest_pixels(list(zip(*map(_windows, (x, *others)), strict=True)))


def _largest_pixels(positions: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Returns the largest pixel of each window, and its index, int8.

    Args:
      positions: For each position in the windows, the pixels there, and other arrays, whose values
        at the largest pixels are returned too.
    """
    largest, index = positions[0], jnp.zeros(positions[0][0].shape, jnp.int8)
    for position, candidates in enumerate(positions[1:], start=1):
        is_larger = (candidates[0] > largest[0]) | jnp.isnan(candidates[0])
        pairs = zip(candidates, largest, strict=True)
        largest = tuple(jnp.where(is_larger, *pair) for pair in pairs)
        index = jnp.where(is_larger, jnp.int8(position), index)
    return largest[0], index, *largest[1:]


def _largest_by_reduction(x: Array) -> tuple[Array, Array]:
    """Returns the same as `_largest`, by one reduction over pairs (value, index)."""
    windows = jnp.stack(_windows(x))
    indices = lax.broadcasted_iota(jnp.int32, windows.shape, 0)
    init = jnp.asarray(-jnp.inf, windows.dtype), jnp.int32(0)
    pooled, index = lax.reduce((windows, indices), init, _larger, (0,))
    return pooled, index.astype(jnp.int8)


def _larger(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Returns the pair (value, index) with the larger value; NaN is larger than every number."""
    is_b = (b[0] > a[0]) | jnp.isnan(b[0])
    return jnp.where(is_b, b[0], a[0]), jnp.where(is_b, b[1], a[1])


def _max_pool_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    """Computes the backward pass of `max_pool_2x2`: the gradient with respect to the images."""
    index, x = residuals
    routed = lax.platform_dependent(
        index, x, gradient, tpu=_select_and_scatter, default=_route_by_index
    )
    return (routed,)


def _select_and_scatter(index: Array, x: Array, gradient: Array) -> Array:
    """Routes the gradient of each window to the first of its largest pixels, for TPUs.

    In `_route_by_index`, XLA would write the broadcast arrays to memory.
    """
    return jax.vjp(_standard_max_pool, x)[1](gradient)[0]


def _route_by_index(index: Array, x: Array, gradient: Array) -> Array:
    """Routes the gradient of each window to the pixel that the index names.

    The computation uses only comparisons, which XLA fuses into the loops that need the gradient.
    """
    batch, height, width, channels = gradient.shape
    pixel = jnp.arange(4, dtype=index.dtype).reshape(1, 1, 2, 1, 2, 1)
    is_largest = index[:, :, None, :, None] == pixel
    routed = jnp.where(is_largest, gradient[:, :, None, :, None], 0)
    return routed.reshape(batch, 2 * height, 2 * width, channels)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _windows(x: Array) -> list[Array]:
    """Returns four arrays, one for each position of a pixel in the 2 x 2 windows.

    The shape of each array is [batch, height//2, width//2, channel].
    """
    return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


@jax.custom_vjp
def max_pool_3x3(
    x: Float[Array, "batch height width channel"],
) -> Float[Array, "batch new_height new_width channel"]:
    """Applies max pooling with a 3 x 3 window and stride 2, padded by one pixel on all sides.

    The padding is minus infinity. The values and the gradients equal those of `nn.max_pool`, whose
    gradient takes five times as long on a CPU. See `max_pool_2x2` about equal pixels.
    """
    return nn.max_pool(x, (3, 3), (2, 2), cast(Any, ((1, 1), (1, 1))))


def _max_pool_3x3_forward(x: Array) -> tuple[Array, tuple[Array, tuple[int, ...]]]:
    """Returns the pooled images, and the index, 0 to 8, of the largest pixel of each window."""
    height, width = ((n - 1) // 2 * 2 + 1 for n in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    positions = [
        (padded[:, i : i + height : 2, j : j + width : 2],) for i in range(3) for j in range(3)
    ]
    largest, index = lax.optimization_barrier(_largest_pixels(positions))
    return largest, (index, x.shape[1:3])


def _max_pool_3x3_backward(
    residuals: tuple[Array, tuple[int, ...]], gradient: Array
) -> tuple[Array]:
    index, size = residuals
    zero = jnp.zeros((), gradient.dtype)
    totals = zero
    for position in range(9):
        routed = jnp.where(index == position, gradient, zero)
        rows, columns = (
            # The padding before, after and between the pixels; 1 pixel between means stride 2.
            (offset - 1, n - 2 * pooled + 2 - offset, 1)
            for offset, n, pooled in zip(divmod(position, 3), size, index.shape[1:3], strict=True)
        )
        totals += lax.pad(routed, zero, ((0, 0, 0), rows, columns, (0, 0, 0)))
    return (totals,)


max_pool_3x3.defvjp(_max_pool_3x3_forward, _max_pool_3x3_backward)


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
      The normalised batch, (x - mean) / sqrt(variance + epsilon) * scale + bias, in the dtype
      of x; the mean and the variance of the batch, float32. The variance is the biased one,
      E[x^2] - E[x]^2, as in `nn.BatchNorm`. No gradient flows through the mean and the
      variance.
    """
    return _normalize_batch_forward(x, scale, bias, epsilon)[0]


def _normalize_batch_forward(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    in_float32 = x.astype(jnp.float32)
    total, squares_total = channel_sums(in_float32, in_float32 * in_float32)
    count = x.size // x.shape[-1]
    mean = total / count
    variance = jnp.maximum(squares_total / count - mean * mean, 0)
    inverse = lax.rsqrt(variance + epsilon)
    normalized = (in_float32 - _per_channel(mean)) * _per_channel(inverse * scale) + _per_channel(
        bias
    )
    return (normalized.astype(x.dtype), mean, variance), (x, mean, inverse, scale)


def _normalize_batch_backward(
    epsilon: float, residuals: tuple[Array, ...], gradients: tuple[Any, ...]
) -> tuple[Array, Array, Array]:
    del epsilon
    x, mean, _, _ = residuals
    gradient = gradients[0].astype(jnp.float32)
    centred = x.astype(jnp.float32) - _per_channel(mean)
    sums = channel_sums(gradient, gradient * centred)
    return _normalization_gradients(residuals, gradient, sums)


def _normalization_gradients(
    residuals: tuple[Array, ...], gradient: Array, sums: tuple[Array, ...]
) -> tuple[Array, Array, Array]:
    """Returns the gradients of x, the scale and the bias in `normalize_batch`.

    Args:
      residuals: The arrays of the forward pass.
      gradient: The gradient of the normalised batch, float32.
      sums: For each channel the sum of the gradient, and of the gradient times (x - mean).
    """
    x, mean, inverse, scale = residuals
    centred = x.astype(jnp.float32) - _per_channel(mean)
    bias_gradient, scale_gradient = sums
    scale_gradient *= inverse
    # Let g be `gradient`. The gradient with respect to x is scale / deviation * (g - mean(g) -
    # projection of g on the normalised x). The code computes this product as a sum of three
    # terms, each with one factor per channel.
    count = x.size // x.shape[-1]
    slope = inverse * scale
    projection = -slope * inverse * scale_gradient / count
    constant = -slope * bias_gradient / count
    x_gradient = (
        _per_channel(slope) * gradient + _per_channel(projection) * centred + _per_channel(constant)
    )
    return x_gradient.astype(x.dtype), scale_gradient, bias_gradient


normalize_batch.defvjp(_normalize_batch_forward, _normalize_batch_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_batch_and_pool(
    x: Float[Array, "batch height width channel"],
    scale: Float[Array, " channel"],
    bias: Float[Array, " channel"],
    epsilon: float,
) -> tuple[
    Float[Array, "batch height width channel"],
    Float[Array, "batch height//2 width//2 channel"],
    Float[Array, " channel"],
    Float[Array, " channel"],
]:
    """Applies `normalize_batch`, and `max_pool_2x2` to the normalised batch.

    On GPUs and TPUs, the backward pass computes the sums for the gradients of the scale and the
    bias from the pooled pixels, because the gradient of all other pixels is zero. It therefore
    reads x once less than the two functions would.

    Returns:
      The normalised batch, the pooled batch, and the mean and the variance of x.
    """
    normalized, pooled, mean, variance = _normalize_batch_and_pool_forward(x, scale, bias, epsilon)[
        0
    ]
    return normalized, pooled, mean, variance


def _normalize_batch_and_pool_forward(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    (normalized, mean, variance), residuals = _normalize_batch_forward(x, scale, bias, epsilon)
    windows = _whole_windows(normalized)
    pooled, index, pooled_x = lax.platform_dependent(
        windows,
        _whole_windows(x),
        cpu=_pool_on_cpu,
        tpu=_pool_without_index,
        default=lambda normalized, x: lax.optimization_barrier(_largest(normalized, x)),
    )
    return (normalized, pooled, mean, variance), (*residuals, index, windows, pooled_x)


def _pool_on_cpu(normalized: Array, x: Array) -> tuple[Array, ...]:
    """Returns the pooled batch, the indices, and zeros in place of the pixels of x."""
    pooled, index = lax.optimization_barrier(_largest_by_reduction(normalized))
    return pooled, index, jnp.zeros_like(pooled)


def _pool_without_index(normalized: Array, x: Array) -> tuple[Array, ...]:
    """Returns the pooled batch, indices of zero, and the pixels of x that are pooled."""
    pooled, _, pooled_x = _largest(normalized, x)
    return _without_index(*lax.optimization_barrier((pooled, pooled_x)))


def _normalize_batch_and_pool_backward(
    epsilon: float, residuals: tuple[Array, ...], gradients: tuple[Any, ...]
) -> tuple[Array, Array, Array]:
    *norm_residuals, index, windows, pooled_x = residuals
    residuals = tuple(norm_residuals)
    x, mean, _, _ = residuals
    pooled_gradient = _instantiate(gradients[1])
    (routed,) = _max_pool_backward((index, windows), pooled_gradient)
    # An odd last row or column is in no window.
    routed = jnp.pad(routed, [(0, n - m) for n, m in zip(x.shape, routed.shape, strict=True)])
    if not isinstance(gradients[0], SymbolicZero):  # The normalised batch is used elsewhere, too.
        total = (routed + gradients[0], *gradients[2:])
        return _normalize_batch_backward(epsilon, residuals, total)
    gradient = routed.astype(jnp.float32)

    def sums(gradient: Array, x: Array) -> tuple[Array, ...]:
        gradient, x = gradient.astype(jnp.float32), x.astype(jnp.float32)
        return channel_sums(gradient, gradient * (x - _per_channel(mean)))

    totals = lax.platform_dependent(
        gradient,
        x,
        pooled_gradient,
        pooled_x,
        cpu=lambda gradient, x, *_: sums(gradient, x),
        default=lambda gradient, x, *pooled: sums(*pooled),
    )
    return _normalization_gradients(residuals, gradient, totals)


def _instantiate(gradient: Any) -> Array:
    """Returns an array of zeros if a gradient is a `SymbolicZero`, else the gradient."""
    if isinstance(gradient, SymbolicZero):
        return jnp.zeros(gradient.shape, cast(Any, gradient.dtype))
    return gradient


normalize_batch_and_pool.defvjp(
    lambda x, scale, bias, epsilon: _normalize_batch_and_pool_forward(
        x.value, scale.value, bias.value, epsilon
    ),
    _normalize_batch_and_pool_backward,
    symbolic_zeros=True,
)


def _normalize_batch_with_means(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[Array, Array, Array, Array]:
    """Returns the normalised images, their means over the pixels, and the statistics of the batch.

    The statistics are the mean and the variance of each channel.
    """
    normalized = cast(tuple[Array, ...], normalize_batch(x, scale, bias, epsilon))[0]
    in_float32 = x.astype(jnp.float32)
    pixels = x.shape[1] * x.shape[2]
    sums = image_sums(in_float32, in_float32 * in_float32)
    image_means, squares = (total / pixels for total in sums)
    mean = jnp.mean(image_means, axis=0)
    variance = jnp.maximum(jnp.mean(squares, axis=0) - mean * mean, 0)
    factor = lax.rsqrt(variance + epsilon) * scale
    means = (image_means - mean[None]) * factor[None] + bias[None]
    mean, variance = lax.stop_gradient(mean), lax.stop_gradient(variance)
    return normalized, means.astype(x.dtype), mean, variance


class Conv(nn.Module):
    """A replacement for `nn.Conv` with a 3 x 3 kernel, stride 1 and padding "SAME".

    Attributes:
      features: The number of output channels.
      dtype: The dtype of the computation; parameters are float32.
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
        return add_bias(convolve(x.astype(self.dtype), kernel), bias)


class BatchNorm(nn.Module):
    """A replacement for `nn.BatchNorm` with momentum 0.

    The collection "batch_stats" contains the mean and the variance of each channel, for use in
    inference. In training, the layer overwrites this mean and variance with the statistics of
    the batch; `step.update_statistics` averages the statistics over many batches.

    Attributes:
      use_running_average: True normalises with "batch_stats", False with the statistics of
        the batch.
      epsilon: The number added to the variance.
      dtype: The dtype of the output. Parameters and statistics are float32.
    """

    use_running_average: bool
    epsilon: float
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def _variables(self, channels: int) -> tuple[Array, Array, nn.Variable, nn.Variable]:
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        variance = self.variable("batch_stats", "var", jnp.ones, (channels,))
        return scale, bias, mean, variance

    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch height width channel"]:
        if self.use_running_average:
            scale, bias, mean, variance = self._variables(x.shape[-1])
            factor = lax.rsqrt(variance.value + self.epsilon) * scale
            centred = x - _per_channel(mean.value)
            return (centred * _per_channel(factor) + _per_channel(bias)).astype(self.dtype)
        (normalized,) = self._normalize(normalize_batch, x)
        return normalized

    def with_max_pool(
        self, x: Float[Array, "batch height width channel"]
    ) -> tuple[
        Float[Array, "batch height width channel"],
        Float[Array, "batch height//2 width//2 channel"],
    ]:
        """Returns the normalised images, and the result of `max_pool_2x2` of them."""
        if self.use_running_average:
            normalized = self(x)
            return normalized, max_pool_2x2(normalized)
        normalized, pooled = self._normalize(normalize_batch_and_pool, x)
        return normalized, pooled

    def with_mean(
        self, x: Float[Array, "batch height width channel"]
    ) -> tuple[Float[Array, "batch height width channel"], Float[Array, "batch channel"]]:
        """Returns the normalised images, and the mean of each image and channel over the pixels.

        In training, the mean is computed from sums over the pixels of x, like the statistics of the
        batch. If the normalised images are not used, they are not computed.
        """
        if self.use_running_average:
            normalized = self(x)
            return normalized, jnp.mean(normalized, axis=(1, 2))
        normalized, means = self._normalize(_normalize_batch_with_means, x)
        return normalized, means

    def _normalize(self, function: Callable[..., Any], x: Array) -> list[Array]:
        """Normalises with the statistics of the batch, and stores them.

        Args:
          function: Takes the images, the scale, the bias and epsilon. The last two results are the
            mean and the variance of each channel.
          x: The images.

        Returns:
          The results of the function without the mean and the variance.
        """
        scale, bias, stored_mean, stored_variance = self._variables(x.shape[-1])
        *results, mean, variance = function(x.astype(self.dtype), scale, bias, self.epsilon)
        if not self.is_initializing():
            stored_mean.value, stored_variance.value = mean, variance
        return results

    def affine(self, channels: int) -> tuple[Float[Array, " channel"], Float[Array, " channel"]]:
        """Returns the factor and the shift of each channel, from the stored statistics."""
        scale, bias, mean, variance = self._variables(channels)
        factor = lax.rsqrt(variance.value + self.epsilon) * scale
        return factor, bias - mean.value * factor


# LayerNorm (Ba et al. 2016) with the epsilon of ConvNeXt and of vision transformers. PyTorch's
# default is 1e-5.
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6)


class Dense(nn.Module):
    """A replacement for `nn.Dense` that reshapes the input to a matrix.

    On a CPU, XLA's gradient of a product over several axes takes up to three times as long.

    Attributes:
      features: The number of output channels.
      dtype: The dtype of the computation; parameters are float32.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channel"]) -> Float[Array, "*batch features"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.truncated_normal(0.02), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        matrix = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        matrix = matrix @ kernel.astype(self.dtype) + bias.astype(self.dtype)[None]
        return matrix.reshape(*x.shape[:-1], self.features)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes the exact GELU (Hendrycks and Gimpel 2016) in float32.

    `nn.gelu` uses the complementary error function, which takes twice as long.
    """
    in_float32 = x.astype(jnp.float32)
    distribution = 0.5 + 0.5 * lax.erf(in_float32 * math.sqrt(0.5))
    return (in_float32 * distribution).astype(x.dtype)


class Mlp(nn.Module):
    """A dense layer, the exact GELU, and a second dense layer.

    Attributes:
      hidden: The number of hidden units. There are as many output channels as input channels.
      dtype: The dtype of the computation.
    """

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channel"]) -> Float[Array, "*batch channel"]:
        hidden = gelu(Dense(self.hidden, self.dtype, name="fc1")(x))
        return Dense(x.shape[-1], self.dtype, name="fc2")(hidden)
