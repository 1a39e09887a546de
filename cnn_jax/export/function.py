"""The deployable function: the prediction of a bundle or an ensemble as one flat JAX function.

All formats are made from this function. It contains only standard operations:

- Functions with custom gradients and compiled functions are expanded.
- Of operations that depend on the platform, the function contains the standard form.
- Everything that depends only on the weights is computed in advance.
- Factors and shifts of channels, such as BatchNorm, become part of a convolution or dense layer
  where the result is the same except for rounding. A shift before a padded convolution remains,
  because a convolution pads with zeros after the shift. A factor after ReLU remains if it is
  negative for any channel.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.extend import core
from jaxtyping import Array

from cnn_jax.inference.ensemble import EnsemblePredictor, views
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.models.network import forward
from cnn_jax.system.errors import UserError

# The batch size of the flat function stands for any batch size. It is a prime number that is larger
# than any dimension of a network, so it and its multiples are recognised in all shapes. Symbolic
# shapes are not used, because JAX then traces a slice with a stride as a gather.
BATCH = 1_000_003
# A shift is divided by a factor only if the quotient is at most this value, because a larger value
# would dominate the rounding errors.
_MAX_QUOTIENT = 1e3


class ExportError(UserError):
    """A network cannot be exported, or the exported model is not accurate enough."""


def flat_function(predictor: BundlePredictor | EnsemblePredictor) -> core.ClosedJaxpr:
    """Returns the flat function of a bundle's or an ensemble's predictor.

    Returns:
      A function from images, uint8 [BATCH, height, width, 3], to probabilities, float32 [BATCH,
      classes]. Its constants are the weights.
    """
    return flatten(functools.partial(_predict, predictor), predictor.preprocessing.image_size)


def _predict(predictor: BundlePredictor | EnsemblePredictor, images: Array) -> Array:
    """Returns the class probabilities of images."""
    if isinstance(predictor, EnsemblePredictor):
        found = [
            _predict(member, view)
            for view in views(images, predictor.flip, predictor.shift)
            for member in predictor.members
        ]
        mean = sum(found[1:], found[0]) / np.float32(len(found))
        logits = jnp.log(jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))
    else:
        logits = forward(predictor.model, predictor.variables, images, predictor.preprocessing)
    return jax.nn.softmax(logits / np.float32(predictor.temperature))


def flatten(function: Callable[[Array], Array], image_size: tuple[int, int]) -> core.ClosedJaxpr:
    """Converts a function of images to a flat function; see the description of this module.

    Args:
      function: A function from images, uint8 [batch, height, width, 3], to an array.
      image_size: The height and the width of the images.

    Returns:
      The flat function of images, uint8 [BATCH, height, width, 3].
    """
    images = jax.ShapeDtypeStruct((BATCH, *image_size, 3), np.uint8)
    traced = jax.make_jaxpr(function)(images)

    def flat(images: Array) -> Array:
        (result,) = _expand(traced.jaxpr, traced.consts, [images])
        return _emit(result)

    return jax.make_jaxpr(flat)(images)


def stable_hlo(function: core.ClosedJaxpr, image_size: tuple[int, int]) -> export.Exported:
    """Exports a flat function for CPU, CUDA and TPU, with a symbolic batch size.

    Args:
      function: The flat function.
      image_size: The height and the width of the images.
    """
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_size, 3), np.uint8)
    platforms = ("cpu", "cuda", "tpu")
    run = jax.jit(lambda images: evaluate(function, images)[0])
    return export.export(run, platforms=platforms)(images)


def stable_hlo_text(function: core.ClosedJaxpr, image_size: tuple[int, int]) -> str:
    """Returns a flat function for one image as the text of a StableHLO module."""
    image = jax.ShapeDtypeStruct((1, *image_size, 3), np.uint8)
    run = jax.jit(lambda images: evaluate(function, images)[0])
    return export.export(run, platforms=("cpu",))(image).mlir_module()


def evaluate(
    function: core.ClosedJaxpr,
    images: Array | np.ndarray,
    observe: Callable[[core.JaxprEqn, Array], None] | None = None,
) -> list[Array]:
    """Evaluates a flat function for any batch size.

    Args:
      function: The flat function.
      images: uint8 [batch, height, width, 3]; the batch size may be symbolic.
      observe: A function that gets each equation and its result.

    Returns:
      The probabilities, as a list of one array.
    """
    batch = images.shape[0]

    def resize(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(resize(element) for element in value)
        is_multiple = type(value) is int and value and value % BATCH == 0
        return value // BATCH * batch if is_multiple else value

    values: dict[core.Var, Any] = dict(zip(function.jaxpr.constvars, function.consts, strict=True))
    values[function.jaxpr.invars[0]] = images
    for equation in function.jaxpr.eqns:
        inputs = [v.val if isinstance(v, core.Literal) else values[v] for v in equation.invars]
        params = {
            key: resize(value) if key in _SHAPES else value
            for key, value in equation.params.items()
        }
        result = equation.primitive.bind(*inputs, **params)
        (output,) = equation.outvars
        values[output] = result
        if observe is not None:
            observe(equation, result)
    return [values[cast(core.Var, output)] for output in function.jaxpr.outvars]


def array_shape(atom: Any) -> tuple[int, ...]:
    """Returns the shape of a variable or a constant of a flat function."""
    return atom.aval.shape


# The parameters of primitives that may contain the batch size.
_SHAPES = ("shape", "new_sizes", "limit_indices", "slice_sizes")


@dataclasses.dataclass(frozen=True)
class _Constant:
    """An array whose values are known before the function is called.

    Attributes:
      array: The values; a dimension of 1 may stand for a larger dimension of `shape`.
      shape: The shape that the traced function has.
    """

    array: np.ndarray
    shape: tuple[int, ...]

    def channels(self, count: int) -> np.ndarray | None:
        """Returns the value of each channel, [count]; None if values of a channel differ."""
        if self.array.size not in (1, count) or (self.array.shape or (1,))[-1] != self.array.size:
            return None
        return np.broadcast_to(self.array.reshape(-1).astype(np.float64), (count,))


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A convolution or dense layer that is not computed yet, so that its weights may change.

    Attributes:
      apply: A function from a kernel, whose last axis contains the output channels, to the output.
      kernel: The kernel, float64.
      bias: The bias [channels], float64.
      is_rectified: Whether ReLU follows.
    """

    apply: Callable[[np.ndarray], Array]
    kernel: np.ndarray
    bias: np.ndarray
    is_rectified: bool = False

    def scale(self, factor: np.ndarray) -> "_Layer":
        return dataclasses.replace(self, kernel=self.kernel * factor, bias=self.bias * factor)

    def emit(self) -> Array:
        x = _add_channels(self.apply(self.kernel.astype(np.float32)), self.bias)
        return jnp.maximum(x, np.float32(0)) if self.is_rectified else x

    def then(self, function: Callable[[Array], Array]) -> "_Layer":
        """Returns the layer followed by a function that keeps the channel of each value."""
        return dataclasses.replace(self, apply=lambda kernel: function(self.apply(kernel)))


@dataclasses.dataclass(frozen=True)
class _Affine:
    """An array `base * factor + shift`, with a factor and a shift for each channel, float64."""

    base: Array | _Layer
    factor: np.ndarray
    shift: np.ndarray

    def simplify(self) -> "_Affine":
        """Includes the factor and the shift in the weights of the base, where this is exact."""
        base, factor, shift = self.base, self.factor, self.shift
        if isinstance(base, _Layer) and (not base.is_rectified or np.all(factor > 0)):
            base, factor = base.scale(factor), np.ones_like(factor)
            if not base.is_rectified:
                base = dataclasses.replace(base, bias=base.bias + shift)
                shift = np.zeros_like(shift)
        return _Affine(base, factor, shift)

    def split(self) -> tuple[Array, np.ndarray, np.ndarray]:
        """Returns the computed base, and the factor and the shift that are still to be applied."""
        simple = self.simplify()
        base = simple.base.emit() if isinstance(simple.base, _Layer) else simple.base
        return base, simple.factor, simple.shift


_Value = Array | _Constant | _Affine


def _expand(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[_Value]) -> list[_Value]:
    """Evaluates a function, with the simplifications that this module describes."""
    uses: dict[core.Var, int] = {}
    for atom in [atom for equation in jaxpr.eqns for atom in equation.invars] + jaxpr.outvars:
        if not isinstance(atom, core.Literal):
            uses[atom] = uses.get(atom, 0) + 1
    values: dict[core.Var, _Value] = {}

    def write(variable: core.Var, value: _Value) -> None:
        # A value that is used twice is computed now, so that it is computed only once.
        is_computed = isinstance(value, _Affine) and uses.get(variable, 0) > 1
        values[variable] = _emit(value) if is_computed else value

    def read(atom: Any) -> _Value:
        return _constant(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for variable, value in zip(jaxpr.constvars, map(_constant, consts), strict=True):
        write(variable, value)
    for variable, value in zip(jaxpr.invars, inputs, strict=True):
        write(variable, value)
    for equation in jaxpr.eqns:
        outputs = _evaluate(equation, [read(atom) for atom in equation.invars])
        for variable, value in zip(equation.outvars, outputs, strict=True):
            write(variable, value)
    return [read(atom) for atom in jaxpr.outvars]


def _constant(value: Any) -> _Constant:
    array = np.asarray(value)
    return _Constant(array, array.shape)


def _evaluate(equation: core.JaxprEqn, inputs: list[_Value]) -> list[Any]:
    """Returns the outputs of an equation."""
    name, params = equation.primitive.name, equation.params
    if name in ("jit", "closed_call"):
        return _expand(params["jaxpr"].jaxpr, params["jaxpr"].consts, inputs)
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return _expand(params["call_jaxpr"].jaxpr, params["call_jaxpr"].consts, inputs)
    if name == "platform_index":
        return [_constant(np.int32(params["platforms"].index(None)))]
    if name == "cond" and isinstance(inputs[0], _Constant):
        branch = params["branches"][int(inputs[0].array)]
        return _expand(branch.jaxpr, branch.consts, inputs[1:])
    if name in ("optimization_barrier", "stop_gradient", "copy"):
        return inputs
    shapes = [array_shape(variable) for variable in equation.outvars]
    if all(isinstance(value, _Constant) for value in inputs):
        return _precompute(equation, cast(list[_Constant], inputs), shapes)
    if name == "unstack":
        array, axis = _emit(inputs[0]), params["axis"]
        return [lax.index_in_dim(array, i, axis, keepdims=False) for i in range(len(shapes))]
    if name == "split":
        ends = np.cumsum(params["sizes"])
        return [
            lax.slice_in_dim(_emit(inputs[0]), end - size, end, axis=params["axis"])
            for size, end in zip(params["sizes"], ends, strict=True)
        ]
    rule = _RULES.get(name)
    result = rule(equation, inputs) if rule else None
    if result is not None:
        return [result]
    return _bind(equation, map(_emit, inputs))


def _precompute(
    equation: core.JaxprEqn, inputs: list[_Constant], shapes: list[tuple[int, ...]]
) -> list[_Value]:
    """Evaluates an equation whose inputs are all constants."""
    if equation.primitive.name == "broadcast_in_dim":
        (value,), dimensions = inputs, equation.params["broadcast_dimensions"]
        sizes = [1] * len(shapes[0])
        for size, dimension in zip(value.array.shape, dimensions, strict=True):
            sizes[dimension] = size
        return [_Constant(value.array.reshape(sizes), shapes[0])]
    if any(size % BATCH == 0 for shape in shapes for size in shape if size):
        return _bind(equation, map(_emit, inputs))
    with jax.ensure_compile_time_eval():
        arrays = [np.broadcast_to(value.array, value.shape) for value in inputs]
        return [_constant(output) for output in _bind(equation, arrays)]


def _bind(equation: core.JaxprEqn, inputs: Iterable[Any]) -> list[Any]:
    """Computes an equation; returns the list of its outputs."""
    outputs = equation.primitive.bind(*inputs, **equation.params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def _emit(value: _Value) -> Any:
    """Returns the array of a value; its computation becomes part of the flat function."""
    if isinstance(value, _Constant):
        if value.array.shape == value.shape:
            return value.array
        return lax.broadcast_in_dim(value.array, value.shape, range(len(value.shape)))
    if isinstance(value, _Affine):
        x, factor, shift = value.split()
        if np.any(factor != 1):
            x = x * _per_channel(factor, x)
        return _add_channels(x, shift)
    return value


def _add_channels(x: Array, shift: np.ndarray) -> Array:
    return x + _per_channel(shift, x) if np.any(shift != 0) else x


def _per_channel(values: np.ndarray, x: Array) -> Array:
    return lax.broadcast_in_dim(values.astype(np.float32), x.shape, (x.ndim - 1,))


def _affine(value: _Value) -> _Affine | None:
    """Converts a value to `_Affine`; returns None if it is not float32 or has no channels."""
    if isinstance(value, _Affine):
        return value
    if isinstance(value, _Constant) or value.dtype != jnp.float32 or value.ndim < 2:
        return None
    count = value.shape[-1]
    return _Affine(value, np.ones(count), np.zeros(count))


def _arithmetic(equation: core.JaxprEqn, inputs: list[_Value]) -> _Value | None:
    """Adds, subtracts, multiplies or divides an array and a constant for each channel."""
    name = equation.primitive.name
    first, second = inputs
    if isinstance(first, _Constant):
        if name == "div":
            return None
        array, constant, sign = _affine(second), first, -1 if name == "sub" else 1
    elif isinstance(second, _Constant):
        array, constant, sign = _affine(first), second, 1
    else:
        return None
    channels = None if array is None else constant.channels(array.factor.size)
    if array is None or channels is None:
        return None
    if name in ("mul", "div"):
        channels = 1 / channels if name == "div" else channels
        return _Affine(array.base, array.factor * channels, array.shift * channels)
    if name == "sub":
        channels = -sign * channels
    return _Affine(array.base, sign * array.factor, sign * array.shift + channels)


def _rectify(equation: core.JaxprEqn, inputs: list[_Value]) -> _Value | None:
    """Applies max(x, 0) to a layer, whose weights can then still change."""
    constants = [value for value in inputs if isinstance(value, _Constant)]
    arrays = [value for value in inputs if isinstance(value, _Affine)]
    if len(constants) != 1 or len(arrays) != 1 or np.any(constants[0].array != 0):
        return None
    simple = arrays[0].simplify()
    layer = simple.base
    if not isinstance(layer, _Layer) or layer.is_rectified:
        return None
    return dataclasses.replace(simple, base=dataclasses.replace(layer, is_rectified=True))


def _dot(equation: core.JaxprEqn, inputs: list[_Value]) -> _Value | None:
    """Multiplies an array with a constant matrix."""
    x, kernel = inputs
    (contracting, batch) = equation.params["dimension_numbers"]
    ndim = len(array_shape(equation.invars[0]))
    is_dense = contracting == ((ndim - 1,), (0,)) and batch == ((), ())
    if not is_dense or not isinstance(kernel, _Constant) or len(kernel.shape) != 2:
        return None
    array = _affine(x)
    if array is None:
        return None
    weights = np.broadcast_to(kernel.array.astype(np.float64), kernel.shape)
    base, factor, shift = array.split()

    def apply(kernel: np.ndarray) -> Array:
        if ndim != 4:
            return equation.primitive.bind(base, kernel, **equation.params)
        # LiteRT cannot convert the product of an array of 4 dimensions and a matrix.
        return lax.conv_general_dilated(
            base,
            jnp.asarray(kernel[None, None]),
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    layer = _Layer(apply, weights * factor[:, None], shift @ weights)
    count = kernel.shape[1]
    return _Affine(layer, np.ones(count), np.zeros(count))


def _convolve(equation: core.JaxprEqn, inputs: list[_Value]) -> _Value | None:
    """Convolves images with a constant kernel."""
    x, kernel = inputs
    numbers = equation.params["dimension_numbers"]
    is_standard = numbers.lhs_spec == (0, 3, 1, 2) and numbers.rhs_spec == (3, 2, 0, 1)
    array = _affine(x)
    if not is_standard or not isinstance(kernel, _Constant) or array is None:
        return None
    weights = np.broadcast_to(kernel.array.astype(np.float64), kernel.shape)
    base, factor, shift = array.split()
    quotient = shift / np.where(factor == 0, np.nan, factor)
    if np.all(np.abs(quotient) <= _MAX_QUOTIENT):
        base = _add_channels(base, quotient)
    else:
        base, factor = _emit(_Affine(base, factor, shift)), np.ones_like(factor)
    # A depthwise kernel [height, width, 1, channels] has no axis of input channels.
    groups = equation.params["feature_group_count"]
    if groups == 1:
        weights = weights * factor[:, None]
    elif groups == factor.size == kernel.shape[-1]:
        weights = weights * factor
    else:
        return None
    count = kernel.shape[-1]
    layer = _Layer(
        lambda kernel: equation.primitive.bind(base, kernel, **equation.params),
        weights,
        np.zeros(count),
    )
    return _Affine(layer, np.ones(count), np.zeros(count))


def _pool(equation: core.JaxprEqn, inputs: list[_Value]) -> _Value | None:
    """Applies max pooling before the factor and the shift, which then apply to fewer pixels."""
    (value,) = inputs
    if not isinstance(value, _Affine) or equation.params["window_dimensions"][-1] != 1:
        return None
    value = value.simplify()
    if np.any(value.factor <= 0):
        return None
    base, factor, shift = value.split()
    return _Affine(equation.primitive.bind(base, **equation.params), factor, shift)


def _sum(equation: core.JaxprEqn, inputs: list[_Value]) -> _Value | None:
    """Sums over axes other than the last one."""
    (value,) = inputs
    shape, axes = array_shape(equation.invars[0]), equation.params["axes"]
    if not isinstance(value, _Affine) or len(shape) - 1 in axes or len(shape) - len(axes) < 2:
        return None
    count = math.prod(shape[axis] for axis in axes)
    if count % BATCH == 0:
        return None
    base, factor, shift = value.split()
    return _Affine(equation.primitive.bind(base, **equation.params), factor, shift * count)


def _reshape(equation: core.JaxprEqn, inputs: list[_Value]) -> _Value | None:
    """Changes the shape of an array whose channels stay the last axis."""
    value, shape = inputs[0], array_shape(equation.outvars[0])
    if not isinstance(value, _Affine) or len(shape) < 2 or shape[-1] != value.factor.size:
        return None

    def apply(x: Array) -> Array:
        return equation.primitive.bind(x, **equation.params)

    base = value.base
    base = base.then(apply) if isinstance(base, _Layer) else apply(base)
    return dataclasses.replace(value, base=base)


_RULES: dict[str, Callable[[core.JaxprEqn, list[_Value]], _Value | None]] = {
    **dict.fromkeys(("add", "sub", "mul", "div"), _arithmetic),
    "max": _rectify,
    "dot_general": _dot,
    "conv_general_dilated": _convolve,
    "reduce_window_max": _pool,
    "reduce_sum": _sum,
    "reshape": _reshape,
}
