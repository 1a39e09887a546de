"""Standard and depthwise convolutions with any odd kernel size, stride and padding.

They have the same results as `lax.conv_general_dilated` (`tests/models/test_convolutions.py`
compares them), in forms that XLA compiles well on a CPU. The gradients of a depthwise convolution
are written by hand, for reverse mode only.
"""

import functools
import platform
from collections.abc import Callable, Iterator
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.models.layers import BatchNorm, add_bias, convolve
from cnn_jax.models.network import Backbone

# The numbers of pixels to add: ((top, bottom), (left, right)).
Padding = tuple[tuple[int, int], tuple[int, int]]

# Since JAX 0.11, XLA uses oneDNN for grouped convolutions on these processors. Without oneDNN, a
# grouped convolution takes up to 70 times as long as the equivalent sum of shifted images.
_HAS_ONEDNN = jax.__version_info__ >= (0, 11) and platform.machine() in ("x86_64", "AMD64")
# On a CPU, a convolution with an output of 2 x 2 pixels takes 40 times as long as the equivalent
# matrix product.
_FEW_PIXELS = 4
# The gradient of a depthwise kernel consists of sums of products. A product belongs to a kernel
# position and an output pixel. These are the largest numbers of products that are unrolled
# together: for a whole image, and for a tile of a larger image (a part of a row). More products
# take longer to compile.
_UNROLLED_PRODUCTS = 400
_UNROLLED_PRODUCTS_OF_TILE = 200
_FLOAT32 = jnp.dtype("float32")


def paddings(padding: str, kernel_size: int, stride: int, size: tuple[int, int]) -> Padding:
    """Returns the number of pixels to add at the top, bottom, left and right.

    Args:
      padding: "symmetric" adds half of the kernel to all sides, as PyTorch does; "same" adds
        less, and at most one pixel more at the bottom and at the right, as TensorFlow does.
      kernel_size: The height and the width of the kernel, odd.
      stride: The stride in both directions.
      size: The height and the width of the images.
    """
    if padding == "symmetric":
        half = kernel_size // 2
        return (half, half), (half, half)
    rows, columns = lax.padtype_to_pads(size, (kernel_size,) * 2, (stride,) * 2, "SAME")
    return (rows[0], rows[1]), (columns[0], columns[1])


def dense_convolve(
    x: Float[Array, "batch height width channel"],
    kernel: Float[Array, "kernel_height kernel_width channel features"],
    stride: int,
    pads: Padding,
) -> Float[Array, "batch new_height new_width features"]:
    """Computes a standard convolution: each output channel depends on all input channels.

    Args:
      x: The images, in the dtype of the kernel.
      kernel: The kernel, whose height and width are equal and odd.
      stride: The stride in both directions.
      pads: The numbers of zeros to add on each side; see `paddings`.
    """
    kernel_size = kernel.shape[0]
    height, width = _output_size(x, kernel_size, stride, pads)
    if kernel_size == 1:
        return _product(x[:, ::stride, ::stride], kernel[0, 0])
    if height * width <= _FEW_PIXELS:
        shifted = _shifted_images(x, kernel_size, stride, pads, (height, width))
        patches = jnp.concatenate([image for _, _, image in shifted], axis=-1)
        return _product(patches, kernel.reshape(-1, kernel.shape[-1]))
    if kernel_size == 3 and stride == 1 and pads == ((1, 1), (1, 1)):
        return cast(Array, convolve(x, kernel))
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _product(x: Array, matrix: Array) -> Array:
    """Multiplies the channels of each pixel by a matrix.

    On a CPU, the gradient of a product of two matrices takes a third of the time of the gradient
    of a convolution, or of a product of an array that has more axes.
    """
    # Without this barrier, XLA of JAX 0.11.2 aborts the process while it compiles the training step
    # of ResNet-18 for an H100 (triton_tiling_propagation.cc).
    x = cast(Array, lax.platform_dependent(x, cpu=lambda x: x, default=lax.optimization_barrier))
    pixels = x.reshape(-1, x.shape[-1])
    return (pixels @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_convolve(
    x: Float[Array, "batch height width channel"],
    kernel: Float[Array, "kernel_height kernel_width channel"],
    stride: int,
    pads: Padding,
) -> Float[Array, "batch new_height new_width channel"]:
    """Computes a depthwise convolution: each channel has a separate kernel.

    The arguments have the meaning of those of `dense_convolve`; only the kernel has another shape.
    """
    return _depthwise(x, kernel, stride, pads)


def _depthwise(x: Array, kernel: Array, stride: int, pads: Padding) -> Array:
    on_cpu = _grouped if _HAS_ONEDNN else _sum_of_shifted_images
    return cast(
        Array,
        lax.platform_dependent(
            x,
            kernel,
            cpu=functools.partial(on_cpu, stride=stride, pads=pads),
            default=functools.partial(_grouped, stride=stride, pads=pads),
        ),
    )


def _grouped(x: Array, kernel: Array, stride: int, pads: Padding) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _sum_of_shifted_images(x: Array, kernel: Array, stride: int, pads: Padding) -> Array:
    size = _output_size(x, kernel.shape[0], stride, pads)
    shifted = _shifted_images(x, kernel.shape[0], stride, pads, size)
    return functools.reduce(
        jnp.add, (image * kernel[i, j][None, None, None] for i, j, image in shifted)
    )


def _shifted_images(
    x: Array, kernel_size: int, stride: int, pads: Padding, size: tuple[int, int]
) -> Iterator[tuple[int, int, Array]]:
    """Yields the row and the column of each kernel position, and the shifted image.

    The shifted image [batch, *size, channel] contains the pixels that the kernel's value at this
    position multiplies.
    """
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = ((n - 1) * stride + 1 for n in size)
    for i in range(kernel_size):
        for j in range(kernel_size):
            yield i, j, padded[:, i : i + height : stride, j : j + width : stride]


def _output_size(x: Array, kernel_size: int, stride: int, pads: Padding) -> tuple[int, int]:
    height, width = (
        (n + sum(pad) - kernel_size) // stride + 1
        for n, pad in zip(x.shape[1:3], pads, strict=True)
    )
    return height, width


def _depthwise_forward(
    x: Array, kernel: Array, stride: int, pads: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return _depthwise(x, kernel, stride, pads), (x, kernel)


def _depthwise_backward(
    stride: int, pads: Padding, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    size = x.shape[1], x.shape[2]
    options = {"kernel_size": kernel.shape[0], "stride": stride, "pads": pads}
    kernel_gradient = lax.platform_dependent(
        x,
        gradient,
        cpu=functools.partial(_kernel_gradient_on_cpu, **options),
        default=functools.partial(_kernel_gradient, **options),
    )
    options = {"size": size, "stride": stride, "pads": pads}
    input_gradient = lax.platform_dependent(
        gradient,
        kernel,
        cpu=functools.partial(_input_gradient_on_cpu, **options),
        default=functools.partial(_input_gradient, **options),
    )
    return cast(Array, input_gradient), cast(Array, kernel_gradient)


depthwise_convolve.defvjp(_depthwise_forward, _depthwise_backward)


def _input_gradient(
    gradient: Array, kernel: Array, size: tuple[int, int], stride: int, pads: Padding
) -> Array:
    """Computes the gradient of the input, which has the given size, as JAX would do."""
    x = jax.ShapeDtypeStruct((len(gradient), *size, gradient.shape[-1]), gradient.dtype)
    convolve = functools.partial(_grouped, kernel=kernel, stride=stride, pads=pads)
    return jax.linear_transpose(convolve, x)(gradient)[0]


def _input_gradient_on_cpu(
    gradient: Array, kernel: Array, size: tuple[int, int], stride: int, pads: Padding
) -> Array:
    """Computes the gradient of the input as a convolution with the reversed kernel.

    For a stride above 1, zeros are first inserted between the pixels of `gradient`.
    """
    last = kernel.shape[0] - 1
    between = (0, 0, stride - 1)
    zero = jnp.zeros((), gradient.dtype)
    spread = lax.pad(gradient, zero, ((0, 0, 0), between, between, (0, 0, 0)))
    if stride > 1:
        # Without this barrier, XLA inserts the zeros between pixels again for each kernel position.
        spread = lax.optimization_barrier(spread)
    rows, columns = (
        (last - before, n - length + before)
        for n, length, (before, _) in zip(size, spread.shape[1:3], pads, strict=True)
    )
    reversed_kernel = lax.optimization_barrier(lax.rev(kernel, (0, 1)))
    return _depthwise(spread, reversed_kernel, 1, (rows, columns))


def _kernel_gradient(
    x: Array, gradient: Array, kernel_size: int, stride: int, pads: Padding
) -> Array:
    kernel = jax.ShapeDtypeStruct((kernel_size, kernel_size, x.shape[-1]), x.dtype)
    convolve = functools.partial(_grouped, x, stride=stride, pads=pads)
    return jax.linear_transpose(convolve, kernel)(gradient)[0]


def _kernel_gradient_on_cpu(
    x: Array, gradient: Array, kernel_size: int, stride: int, pads: Padding
) -> Array:
    """Computes `_kernel_gradient` with unrolled sums over the pixels.

    XLA compiles an unrolled sum to one loop over the batch and the channels, which takes a tenth
    to a half of the time of a reduction. Large images are divided into tiles.
    """
    batch, height, width, channels = gradient.shape
    add_products = functools.partial(_add_products, kernel_size=kernel_size, stride=stride)
    totals = (jnp.zeros((batch, channels), jnp.float32),) * kernel_size**2
    if kernel_size**2 * height * width <= _UNROLLED_PRODUCTS:
        totals = add_products(totals, x, gradient, offset=(pads[0][0], pads[1][0]))
    else:
        # A tile is a part of a row of the gradient; all tiles have the same width.
        parts = -(-width * kernel_size**2 // _UNROLLED_PRODUCTS_OF_TILE)
        tile_width = -(-width // parts)
        # The padding of the gradient is zero, so that it adds nothing to the totals.
        gradient = _pad(gradient, (0, 0), (height, parts * tile_width))
        window_width = (tile_width - 1) * stride + kernel_size
        x_height, x_width = ((n - 1) * stride + kernel_size for n in gradient.shape[1:3])
        x = _pad(x, (pads[0][0], pads[1][0]), (x_height, x_width))
        x, gradient = lax.optimization_barrier((x, gradient))

        def add_tile(index: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            row, column = index // parts, index % parts * tile_width
            tile = lax.dynamic_slice(
                gradient, (0, row, column, 0), (batch, 1, tile_width, channels)
            )
            images = lax.dynamic_slice(
                x,
                (0, row * stride, column * stride, 0),
                (batch, kernel_size, window_width, channels),
            )
            return add_products(totals, images, tile, offset=(0, 0))

        totals = lax.fori_loop(0, height * parts, add_tile, totals)
    # Without this barrier, XLA fuses the products into the sum over the batch.
    stacked = lax.optimization_barrier(jnp.stack(totals))
    total = jnp.sum(stacked, axis=1).reshape(kernel_size, kernel_size, channels)
    return total.astype(x.dtype)


def _pad(x: Array, before: tuple[int, int], size: tuple[int, int]) -> Array:
    """Adds zeros before and after the rows and columns; returns images of the given size."""
    rows, columns = (
        (first, new - first - old, 0)
        for first, new, old in zip(before, size, x.shape[1:3], strict=True)
    )
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), rows, columns, (0, 0, 0)))


def _add_products(
    totals: tuple[Float[Array, "batch channel"], ...],
    x: Float[Array, "batch height width channel"],
    gradient: Float[Array, "batch new_height new_width channel"],
    *,
    kernel_size: int,
    stride: int,
    offset: tuple[int, int],
) -> tuple[Float[Array, "batch channel"], ...]:
    """Adds products of images and gradients to `totals`, one total for each kernel position.

    Args:
      totals: A total for each position of the kernel, in row-major order, in float32.
      x: The images.
      gradient: The gradient of the convolution's output.
      kernel_size: The height and the width of the kernel.
      stride: The stride of the convolution.
      offset: The number of zeros before the rows and before the columns of `x`. The zeros are
        not part of `x`.
    """
    height, width = gradient.shape[1:3]
    new_totals = []
    for position, total in enumerate(totals):
        i, j = divmod(position, kernel_size)
        for row in range(height):
            for column in range(width):
                y, z = row * stride + i - offset[0], column * stride + j - offset[1]
                if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
                    total += (x[:, y, z] * gradient[:, row, column]).astype(jnp.float32)
        new_totals.append(total)
    return tuple(new_totals)


class Kernel(nn.Module):
    """A layer whose only parameter is the kernel of a convolution.

    Attributes:
      shape: Height, width, input channels (1 if the convolution is depthwise), output channels.
    """

    shape: tuple[int, int, int, int]

    @nn.compact
    def __call__(self) -> Float[Array, "height width channel features"]:
        mode = "fan_in" if self.shape[2] == 1 else "fan_out"
        return self.param(
            "kernel", nn.initializers.variance_scaling(2.0, mode, "normal"), self.shape
        )


def convolve_and_normalize(
    x: Float[Array, "batch height width channel"],
    features: int,
    kernel_size: int,
    stride: int = 1,
    *,
    conv: str,
    norm: str,
    use_running_average: bool,
    epsilon: float = 1e-5,
    padding: str = "symmetric",
    depthwise: bool = False,
    dtype: jnp.dtype,
) -> Float[Array, "batch new_height new_width features"]:
    """Applies a bias-free convolution, then `BatchNorm`; must be called in a compact method.

    With stored statistics the two layers are one convolution, whose kernel contains the factor
    of each channel. This saves passes over memory, also for the gradients.

    Args:
      x: The images.
      features: The number of output channels.
      kernel_size: The height and the width of the kernel, odd.
      stride: The stride in both directions.
      conv: The name of the convolution in the module that calls this function.
      norm: The name of the normalisation in this module.
      use_running_average: See `BatchNorm`.
      epsilon: See `BatchNorm`.
      padding: See `paddings`.
      depthwise: Whether each channel has a separate kernel; `features` is then the number of
        input channels.
      dtype: The dtype of the computation.
    """
    channels = 1 if depthwise else x.shape[-1]
    kernel = Kernel((kernel_size, kernel_size, channels, features), name=conv)()
    normalization = BatchNorm(use_running_average, epsilon, dtype, name=norm)
    pads = paddings(padding, kernel_size, stride, (x.shape[1], x.shape[2]))

    def convolve_with(kernel: Array) -> Array:
        images, kernel = x.astype(dtype), kernel.astype(dtype)
        if depthwise:
            return cast(Array, depthwise_convolve(images, kernel[:, :, 0], stride, pads))
        return dense_convolve(images, kernel, stride, pads)

    if not use_running_average:
        return normalization(convolve_with(kernel))
    factor, shift = normalization.affine(features)
    normalized = convolve_with(kernel * factor[None, None, None])
    return cast(Array, add_bias(normalized, shift.astype(dtype)))


class ConvolutionalBackbone(Backbone):
    """A backbone of convolutions, each followed by BatchNorm.

    Attributes:
      padding: "symmetric" or "same"; see `paddings`.
      epsilon: The number that BatchNorm adds to the variance.
      batch_norm_statistics: "frozen": training normalises with the stored statistics. "batch":
        training normalises with the statistics of the batch.
    """

    padding: str = "symmetric"
    epsilon: float = 1e-5
    batch_norm_statistics: str = "frozen"

    @property
    def embedding_is_mean_map(self) -> bool:
        return self.embedding == "last"

    @nn.nowrap
    def conv_norm(self, stage: str, train: bool) -> Callable[..., Array]:
        """Returns `convolve_and_normalize` with the options of this network.

        Args:
          stage: The stage to which the convolution belongs.
          train: Whether the network runs in training mode.
        """
        uses_batch = self.is_training(stage, train) and self.batch_norm_statistics == "batch"
        return functools.partial(
            convolve_and_normalize,
            use_running_average=not uses_batch,
            epsilon=self.epsilon,
            padding=self.padding,
            dtype=self.dtype,
        )
