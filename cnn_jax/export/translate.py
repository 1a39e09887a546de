"""A translator from flat JAX functions to ONNX graphs.

The batch size `function.BATCH` becomes the dynamic dimension "batch". ONNX convolutions need the
channels before the pixels, so each tensor has an order of its axes, and a transposition is only
inserted where an operation needs another order.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx
from jax.extend import core
from onnx import TensorProto, helper, numpy_helper

from cnn_jax.export.function import BATCH, ExportError, array_shape

# ONNX Runtime supports this operator set since version 1.14. `Resize` with antialiasing needs it.
OPSET, IR_VERSION = 18, 8

_DTYPES = {
    "float32": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}
_CHANNELS_FIRST = (0, 3, 1, 2)


class Graph:
    """An ONNX graph under construction."""

    def __init__(self, prefix: str = "") -> None:
        """Starts with an empty graph; all names start with `prefix`."""
        self._prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def constant(self, array: np.ndarray | np.generic) -> str:
        """Adds a constant; returns its name. Equal constants are stored once."""
        array = np.asarray(array, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._names:
            name = self._names[key] = f"{self._prefix}constant_{len(self._names)}"
            self._constants[name] = numpy_helper.from_array(array, name)
        return self._names[key]

    def constants(self) -> list[onnx.TensorProto]:
        """Returns the constants that the nodes use."""
        used = {name for node in self.nodes for name in node.input}
        return [value for name, value in self._constants.items() if name in used]

    def integers(self, *values: int | np.integer) -> str:
        """Adds a constant int64 [n]; returns its name."""
        return self.constant(np.array(values, np.int64))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output; returns the name of the output."""
        name = f"{self._prefix}{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def model(
        self,
        images: onnx.ValueInfoProto,
        probabilities: str,
        shape: Sequence[str | int],
        metadata: Mapping[str, str],
        initializers: Iterable[onnx.TensorProto] = (),
    ) -> onnx.ModelProto:
        """Returns the model with one input and the output "probabilities", float32.

        Args:
          images: The input.
          probabilities: The name of the output in the graph.
          shape: The shape of the output; a text is the name of a dynamic dimension.
          metadata: Texts for the users of the file, by key.
          initializers: Further constants.
        """
        nodes = list(self.nodes)
        if probabilities != "probabilities":
            nodes.append(helper.make_node("Identity", [probabilities], ["probabilities"]))
        output = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, shape)
        constants = [*self.constants(), *initializers]
        graph = helper.make_graph(nodes, "cnn_jax", [images], [output], constants)
        model = helper.make_model(
            graph,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
            producer_name="cnn_jax",
        )
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model)
        return model


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the flat function.

    Attributes:
      name: The name in the graph; "" for a constant.
      shape: The shape; a dimension of 1 may stand for a larger dimension of the flat function.
      order: The axes of the flat function in the order in which the tensor in the graph has them.
      array: The values of a constant, in the order of the flat function; else None.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    array: np.ndarray | None = None


def _plain_order(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(len(shape)))


def _constant(value: Any) -> _Tensor:
    array = np.asarray(value)
    return _Tensor("", array.shape, _plain_order(array.shape), array)


def add_function(graph: Graph, function: core.ClosedJaxpr, images: str) -> str:
    """Adds a flat function to a graph.

    Args:
      graph: The graph.
      function: The flat function of images, uint8 [BATCH, height, width, 3].
      images: The name of the images in the graph.

    Returns:
      The name of the result in the graph.

    Raises:
      ExportError: The function has an operation for which there is no translation.
    """
    return _Translator(graph, function.jaxpr).run(function, images)


class _Translator:
    """The state of the translation of one function.

    The method `_NAME` translates the JAX primitive NAME.
    """

    def __init__(self, graph: Graph, jaxpr: Any):
        self._graph = graph
        self._images = ""
        self._tensors: dict[core.Var, _Tensor] = {}
        # The names of transposed tensors, by (name, order).
        self._transposed: dict[tuple[str, tuple[int, ...]], str] = {}
        # The first variable with each name. Further variables, such as transposed ones, may have
        # the same name.
        self._first: dict[str, core.Var] = {}
        atoms = [atom for equation in jaxpr.eqns for atom in equation.invars]
        names = [atom for atom in atoms if not isinstance(atom, core.Literal)]
        self._used_once = {atom for atom in names if names.count(atom) == 1}

    def run(self, function: core.ClosedJaxpr, images: str) -> str:
        """Translates all equations; returns the name of the result."""
        jaxpr = function.jaxpr
        for variable, value in zip(jaxpr.constvars, function.consts, strict=True):
            self._tensors[variable] = _constant(value)
        self._images = images
        (variable,) = jaxpr.invars
        tensor = _Tensor(images, array_shape(variable), (0, 1, 2, 3))
        if any(equation.primitive.name == "conv_general_dilated" for equation in jaxpr.eqns):
            # It is faster to transpose bytes than floats.
            tensor = self._ordered(tensor, _CHANNELS_FIRST)
        self._tensors[variable] = tensor
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            inputs = [self._read(atom) for atom in equation.invars]
            translate = getattr(self, f"_{name}", None) or _ELEMENTWISE.get(name)
            if translate is None or len(equation.outvars) != 1:
                raise ExportError(
                    f"the network uses the JAX operation {name}, which has no translation to "
                    "ONNX; add it to cnn_jax/export/translate.py"
                )
            if isinstance(translate, str):
                result = self._elementwise(translate, *inputs)
            else:
                result = translate(equation, *inputs)
            (output,) = equation.outvars
            self._tensors[output] = result
            self._first.setdefault(result.name, output)
        (result,) = jaxpr.outvars
        return self._name(self._plain(self._read(result)))

    def _read(self, atom: Any) -> _Tensor:
        if isinstance(atom, core.Literal):  # A Python number has the dtype of the operation.
            return _constant(np.asarray(atom.val, cast(Any, atom.aval).dtype))
        return self._tensors[atom]

    # The names of tensors, their axes, and dimensions of 1.

    def _name(self, tensor: _Tensor) -> str:
        if tensor.array is None:
            return tensor.name
        return self._graph.constant(tensor.array.transpose(tensor.order))

    def _ordered(self, tensor: _Tensor, order: tuple[int, ...]) -> _Tensor:
        """Returns a tensor with another order of its axes."""
        if tensor.array is not None or tensor.order == order:
            return dataclasses.replace(tensor, order=order)
        key = (tensor.name, order)
        if key not in self._transposed:
            permutation = [tensor.order.index(axis) for axis in order]
            self._transposed[key] = self._graph.add("Transpose", tensor.name, perm=permutation)
        return _Tensor(self._transposed[key], tensor.shape, order)

    def _plain(self, tensor: _Tensor) -> _Tensor:
        return self._ordered(tensor, _plain_order(tensor.shape))

    def _full(self, tensor: _Tensor, shape: tuple[int, ...]) -> _Tensor:
        """Returns a tensor with all elements of a shape, in the same order of axes."""
        if tensor.shape == shape:
            return tensor
        sizes = [self._size(shape[axis]) for axis in tensor.order]
        target = self._graph.add("Concat", *sizes, axis=0)
        name = self._graph.add("Expand", self._name(tensor), target)
        return _Tensor(name, shape, tensor.order)

    def _size(self, size: int) -> str:
        """Returns the name of a dimension in the graph, int64 [1]."""
        if size == BATCH:
            return self._graph.add("Shape", self._images, start=0, end=1)
        return self._graph.integers(size)

    def _reshaped(self, tensor: _Tensor, shape: tuple[int, ...]) -> _Tensor:
        sizes = [-1 if size and size % BATCH == 0 else size for size in shape]
        name = self._graph.add(
            "Reshape", self._name(self._plain(tensor)), self._graph.integers(*sizes)
        )
        return _Tensor(name, shape, _plain_order(shape))

    def _replaceable(self, atom: Any, operator: str) -> onnx.NodeProto | None:
        """Returns the node that computes `atom` if another node may replace it, else None.

        The node must be the last one, have the operator, and have no other use.
        """
        if isinstance(atom, core.Literal) or atom not in self._used_once or not self._graph.nodes:
            return None
        last, name = self._graph.nodes[-1], self._tensors[atom].name
        is_last = last.op_type == operator and last.output[0] == name
        return last if is_last and self._first.get(name) is atom else None

    # Operations on each element.

    def _elementwise(self, operator: str, *inputs: _Tensor) -> _Tensor:
        arrays = [tensor for tensor in inputs if tensor.array is None]
        order = (arrays or [max(inputs, key=lambda tensor: len(tensor.shape))])[0].order
        names = [
            self._name(tensor if not tensor.shape else self._ordered(tensor, order))
            for tensor in inputs
        ]
        shape = np.broadcast_shapes(*(tensor.shape for tensor in inputs))
        return _Tensor(self._graph.add(operator, *names), shape, order)

    def _add(self, equation: core.JaxprEqn, x: _Tensor, y: _Tensor) -> _Tensor:
        """Adds two tensors; a constant for each channel becomes the bias of a convolution."""
        convolution = self._replaceable(equation.invars[0], "Conv")
        if convolution and y.array is not None and y.array.size == x.shape[-1] == y.shape[-1]:
            convolution.input.append(self._graph.constant(y.array.reshape(-1)))
            return x
        return self._elementwise("Add", x, y)

    def _max(self, equation: core.JaxprEqn, x: _Tensor, y: _Tensor) -> _Tensor:
        for value, other in ((x, y), (y, x)):
            if other.array is not None and not np.any(other.array):
                return self._elementwise("Relu", value)
        return self._elementwise("Max", x, y)

    def _min(self, equation: core.JaxprEqn, x: _Tensor, y: _Tensor) -> _Tensor:
        """Returns the minimum; after ReLU, a constant becomes the upper limit of `Clip`."""
        for atom, value, other in zip(equation.invars, (x, y), (y, x), strict=True):
            relu = self._replaceable(atom, "Relu")
            if relu and other.array is not None and other.array.size == 1:
                limits = [np.float32(0), np.float32(other.array.reshape(()))]
                self._graph.nodes.remove(relu)
                inputs = [relu.input[0], *map(self._graph.constant, limits)]
                return dataclasses.replace(value, name=self._graph.add("Clip", *inputs))
        return self._elementwise("Min", x, y)

    def _convert_element_type(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        dtype = _DTYPES.get(str(np.dtype(equation.params["new_dtype"])))
        if dtype is None:
            raise ExportError(f"the network uses the dtype {equation.params['new_dtype']}")
        return dataclasses.replace(
            x, name=self._graph.add("Cast", self._name(x), to=dtype), array=None
        )

    def _rsqrt(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        return self._elementwise("Reciprocal", self._elementwise("Sqrt", x))

    def _square(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        return self._elementwise("Mul", x, x)

    def _erfc(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        return self._elementwise("Sub", _constant(np.float32(1)), self._elementwise("Erf", x))

    def _integer_pow(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        return self._elementwise("Pow", x, _constant(np.float32(equation.params["y"])))

    def _select_n(self, equation: core.JaxprEqn, which: _Tensor, *cases: _Tensor) -> _Tensor:
        return self._elementwise("Where", which, cases[1], cases[0])

    # Changes of the shape.

    def _broadcast_in_dim(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        """Inserts axes; the dimensions of 1 remain, because ONNX operators broadcast them."""
        shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
        sizes = [1] * len(shape)
        for size, axis in zip(x.shape, axes, strict=True):
            sizes[axis] = size
        if x.array is not None:
            return _constant(x.array.reshape(sizes))
        if len(axes) == len(shape):
            return x
        return self._reshaped(x, tuple(sizes))

    def _reshape(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        return self._reshaped(
            self._full(x, array_shape(equation.invars[0])), equation.params["new_sizes"]
        )

    def _squeeze(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        return self._reshaped(
            self._full(x, array_shape(equation.invars[0])), array_shape(equation.outvars[0])
        )

    def _transpose(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        """Renames the axes; the elements stay where they are."""
        permutation = equation.params["permutation"]
        return _Tensor(
            x.name,
            tuple(x.shape[axis] for axis in permutation),
            tuple(permutation.index(axis) for axis in x.order),
            None if x.array is None else x.array.transpose(permutation),
        )

    def _slice(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        x = self._full(x, array_shape(equation.invars[0]))
        params = equation.params
        strides = params["strides"] or (1,) * len(x.shape)
        bounds = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
        axes = [i for i, (a, b, s) in enumerate(bounds) if (a, b, s) != (0, x.shape[i], 1)]
        positions = [x.order.index(axis) for axis in axes]
        columns = [*zip(*(bounds[axis] for axis in axes), strict=True)] if axes else [(), (), ()]
        starts, limits, steps = (self._graph.integers(*column) for column in columns)
        name = self._graph.add(
            "Slice", self._name(x), starts, limits, self._graph.integers(*positions), steps
        )
        return _Tensor(name, array_shape(equation.outvars[0]), x.order)

    def _rev(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        """Translates `lax.rev` to an ONNX Slice with the step -1."""
        x = self._full(x, array_shape(equation.invars[0]))
        axes = [x.order.index(axis) for axis in equation.params["dimensions"]]
        last, before_first, step = (
            self._graph.integers(*[value] * len(axes)) for value in (-1, -(2**31), -1)
        )
        positions = self._graph.integers(*axes)
        name = self._graph.add("Slice", self._name(x), last, before_first, positions, step)
        return _Tensor(name, array_shape(equation.outvars[0]), x.order)

    def _concatenate(self, equation: core.JaxprEqn, *inputs: _Tensor) -> _Tensor:
        order = next((x.order for x in inputs if x.array is None), inputs[0].order)
        names = [
            self._name(self._ordered(self._full(x, array_shape(atom)), order))
            for x, atom in zip(inputs, equation.invars, strict=True)
        ]
        axis = order.index(equation.params["dimension"])
        name = self._graph.add("Concat", *names, axis=axis)
        return _Tensor(name, array_shape(equation.outvars[0]), order)

    def _pad(self, equation: core.JaxprEqn, x: _Tensor, value: _Tensor) -> _Tensor:
        config = equation.params["padding_config"]
        if any(low < 0 or high < 0 or interior for low, high, interior in config):
            raise ExportError("the network pads between pixels or by a negative number of pixels")
        x = self._full(x, array_shape(equation.invars[0]))
        lows, highs = ([config[axis][i] for axis in x.order] for i in (0, 1))
        pads = self._graph.integers(*lows, *highs)
        name = self._graph.add("Pad", self._name(x), pads, self._name(value))
        return _Tensor(name, array_shape(equation.outvars[0]), x.order)

    # Reductions, convolutions and products of matrices.

    def _reduce(self, operator: str, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        axes = equation.params["axes"]
        x = self._full(x, array_shape(equation.invars[0]))
        positions = self._graph.integers(*sorted(x.order.index(axis) for axis in axes))
        name = self._graph.add(operator, self._name(x), positions, keepdims=0)
        kept = [axis for axis in x.order if axis not in axes]
        order = tuple(sorted(kept).index(axis) for axis in kept)
        return _Tensor(name, array_shape(equation.outvars[0]), order)

    def _reduce_sum(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        return self._reduce("ReduceSum", equation, x)

    def _reduce_max(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        return self._reduce("ReduceMax", equation, x)

    def _reduce_min(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        return self._reduce("ReduceMin", equation, x)

    def _reduce_window_max(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        return self._pool("MaxPool", equation, x, dilations=equation.params["window_dilation"][1:3])

    def _reduce_window_sum(self, equation: core.JaxprEqn, x: _Tensor) -> _Tensor:
        if set(equation.params["window_dilation"]) != {1}:
            raise ExportError("the network has average pooling with dilated windows")
        mean = self._pool("AveragePool", equation, x, count_include_pad=1)
        size = np.float32(math.prod(equation.params["window_dimensions"]))
        name = self._graph.add("Mul", mean.name, self._graph.constant(size))
        return dataclasses.replace(mean, name=name)

    def _pool(
        self, operator: str, equation: core.JaxprEqn, x: _Tensor, **attributes: Any
    ) -> _Tensor:
        window, strides, padding = (
            equation.params[key] for key in ("window_dimensions", "window_strides", "padding")
        )
        others = [(window[axis], strides[axis], *padding[axis]) for axis in (0, -1)]
        if len(window) != 4 or any(other != (1, 1, 0, 0) for other in others):
            raise ExportError("the network has pooling over other axes than height and width")
        if set(equation.params["base_dilation"]) != {1}:
            raise ExportError("the network has pooling of images with gaps between the pixels")
        if any(max(pads) >= size for pads, size in zip(padding, window, strict=True)):
            raise ExportError("the network pads images by a whole window of pooling or more")
        x = self._full(self._ordered(x, _CHANNELS_FIRST), array_shape(equation.invars[0]))
        name = self._graph.add(
            operator,
            self._name(x),
            kernel_shape=window[1:3],
            strides=strides[1:3],
            pads=[padding[axis][side] for side in (0, 1) for axis in (1, 2)],
            **attributes,
        )
        return _Tensor(name, array_shape(equation.outvars[0]), _CHANNELS_FIRST)

    def _conv_general_dilated(
        self, equation: core.JaxprEqn, x: _Tensor, kernel: _Tensor
    ) -> _Tensor:
        params = equation.params
        numbers = params["dimension_numbers"]
        if params["lhs_dilation"] != (1, 1) or params["batch_group_count"] != 1:
            raise ExportError("the network has a transposed convolution")
        x = self._ordered(self._full(x, array_shape(equation.invars[0])), numbers.lhs_spec)
        padding = params["padding"]
        name = self._graph.add(
            "Conv",
            self._name(x),
            self._name(self._ordered(kernel, numbers.rhs_spec)),
            strides=params["window_strides"],
            dilations=params["rhs_dilation"],
            group=params["feature_group_count"],
            pads=[pads[side] for side in (0, 1) for pads in padding],
        )
        return _Tensor(name, array_shape(equation.outvars[0]), numbers.out_spec)

    def _dot_general(self, equation: core.JaxprEqn, x: _Tensor, y: _Tensor) -> _Tensor:
        """Multiplies matrices."""
        contracting, batch = equation.params["dimension_numbers"]
        shape = array_shape(equation.outvars[0])
        is_dense = contracting == ((len(x.shape) - 1,), (0,)) and not batch[0]
        x, y = (
            self._full(tensor, array_shape(atom))
            for tensor, atom in zip((x, y), equation.invars, strict=True)
        )
        if is_dense and len(y.shape) == 2:
            names = [self._name(self._plain(tensor)) for tensor in (x, y)]
            return _Tensor(self._graph.add("MatMul", *names), shape, _plain_order(shape))
        # The order of the axes is: batch axes, free axes, contracted axes; and for the second
        # matrix: batch axes, contracted axes, free axes. All axes of a kind become one.
        (x_inner, y_inner), (x_batch, y_batch) = contracting, batch
        x_free, y_free = (
            tuple(axis for axis in range(len(tensor.shape)) if axis not in (*inner, *outer))
            for tensor, inner, outer in ((x, x_inner, x_batch), (y, y_inner, y_batch))
        )
        x = self._matrices(self._ordered(x, (*x_batch, *x_free, *x_inner)), len(x_batch), x_free)
        y = self._matrices(self._ordered(y, (*y_batch, *y_inner, *y_free)), len(y_batch), y_inner)
        name = self._graph.add("MatMul", self._name(x), self._name(y))
        product = _Tensor(name, (*x.shape[:-1], y.shape[-1]), _plain_order(x.shape))
        return product if product.shape == shape else self._reshaped(product, shape)

    def _matrices(self, tensor: _Tensor, num_batch: int, rows: Sequence[int]) -> _Tensor:
        """Returns a tensor with the batch axes and one axis each for rows and columns."""
        sizes = [tensor.shape[axis] for axis in tensor.order]
        end = num_batch + len(rows)
        shape = (*sizes[:num_batch], math.prod(sizes[num_batch:end]), math.prod(sizes[end:]))
        plain = _Tensor(self._name(tensor), tuple(sizes), _plain_order(sizes))
        return plain if len(shape) == len(sizes) else self._reshaped(plain, shape)


_ELEMENTWISE: dict[str, str] = {
    "abs": "Abs",
    "and": "And",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
}
