"""Quantization of an ONNX model to 8 bits, with QuantizeLinear and DequantizeLinear nodes.

Activations are uint8 with one scale for each tensor, from the range on training images. The
kernels of convolutions are int8 with one scale for each output channel (Jacob et al. 2018). The
weights of dense layers are stored as int8, and computed in float32.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cnn_jax.inference.exported import open_session

# The operators that ONNX Runtime computes with 8 bits if their inputs have 8 bits.
_FOLLOWING = ("Add", "Concat", "MaxPool", "Mul", "Pad", "Sigmoid", "Slice")
# These operators output only values of their input, so the output has the same scale.
_SAME_SCALE = ("MaxPool", "Pad", "Slice")
# ONNX Runtime computes these operators as a part of the convolution before them.
_FUSED = ("Relu", "Clip")
# The first convolution, over R, G and B, stays float32 if an output is the sum of at most this
# number of products, because 8 bits would take twice as long.
_FEW_PRODUCTS = 27
# Smaller matrices of weights stay float32.
_MIN_WEIGHTS = 1024


class _Rounded(NamedTuple):
    """A tensor that was rounded to 8 bits."""

    name: str
    scale: float
    zero_point: int


def quantize(model: onnx.ModelProto, batches: Iterable[np.ndarray]) -> onnx.ModelProto:
    """Returns the model with its convolutions and the operations between them in 8 bits.

    Args:
      model: The model with the input "images".
      batches: Images of the training data, uint8 [batch, height, width, 3], one or more batches;
        they determine the ranges of the activations.

    Returns:
      A new model with the same input and output.
    """
    quantizer = _Quantizer(copy.deepcopy(model))
    return quantizer.quantize(_measure_ranges(model, quantizer.find_activations(), batches))


def _measure_ranges(
    model: onnx.ModelProto, names: list[str], batches: Iterable[np.ndarray]
) -> dict[str, tuple[float, float]]:
    """Returns the smallest and the largest value of each tensor; the range contains 0."""
    if not names:
        return {}
    observed, outputs = copy.deepcopy(model), []
    for name in names:
        for operator in ("ReduceMin", "ReduceMax"):
            output = f"{operator}_{name}"
            observed.graph.node.append(helper.make_node(operator, [name], [output], keepdims=0))
            value = helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, [])
            observed.graph.output.append(value)
            outputs.append(output)
    session = open_session(observed.SerializeToString())
    values = np.array([session.run(outputs, {"images": batch}) for batch in batches])
    # Convolutions pad with 0, so 0 must be in the range.
    lows, highs = np.minimum(values[:, ::2].min(0), 0), np.maximum(values[:, 1::2].max(0), 0)
    return {
        name: (float(low), float(high)) for name, low, high in zip(names, lows, highs, strict=True)
    }


class _Quantizer:
    """The state of the quantization of a model, which is changed in place."""

    def __init__(self, model: onnx.ModelProto):
        self._model = model
        self._nodes = list(model.graph.node)
        self._constants = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer
        }
        self._producers = {node.output[0]: node for node in self._nodes}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in self._nodes:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._rounded: dict[str, _Rounded] = {}
        self._new_nodes: list[onnx.NodeProto] = []

    def find_activations(self) -> list[str]:
        """Returns the names of the tensors to round: inputs and outputs of 8-bit convolutions."""
        found: dict[str, None] = {}
        for node in self._nodes:
            inputs = [name for name in node.input if name and name not in self._constants]
            if node.op_type == "Conv":
                if not self._is_quantized(node):
                    continue
                found[node.input[0]] = None
            elif node.op_type not in _FOLLOWING or not inputs or not found.keys() >= set(inputs):
                continue
            found[self._fused_output(node)] = None
        return list(found)

    def _fused_output(self, node: onnx.NodeProto) -> str:
        """Returns the output of a node, or of the activation function that is fused with it."""
        users = self._users.get(node.output[0], [])
        is_fused = node.op_type == "Conv" and len(users) == 1 and users[0].op_type in _FUSED
        return (users[0] if is_fused else node).output[0]

    def _is_quantized(self, convolution: onnx.NodeProto) -> bool:
        kernel = self._constants[convolution.input[1]]
        if kernel.shape[1] != 3 or math.prod(kernel.shape[1:]) > _FEW_PRODUCTS:
            return True
        # Quantize it too if max pooling and another convolution follow. Otherwise ONNX Runtime
        # converts to 8 bits before the pooling, which then takes ten times as long as between two
        # 8-bit convolutions.
        pools = self._users.get(self._fused_output(convolution), [])
        return any(
            user.op_type == "Conv"
            for pool in pools
            if pool.op_type == "MaxPool"
            for user in self._users.get(pool.output[0], [])
        )

    def quantize(self, ranges: Mapping[str, tuple[float, float]]) -> onnx.ModelProto:
        """Changes the model; `ranges` has the ranges of the tensors to round."""
        for node in self._nodes:
            if node.op_type == "Conv" and self._is_quantized(node):
                self._quantize_convolution(node)
            elif node.op_type == "MatMul":
                self._store_weights(node)
            else:
                self._quantize_inputs(node, is_rounded=node.output[0] in ranges)
            self._new_nodes.append(node)
            if node.output[0] in ranges:
                self._round_output(node, *ranges[node.output[0]])
        graph = self._model.graph
        needed, kept = {output.name for output in graph.output}, []
        for node in reversed(self._new_nodes):
            if node.output[0] in needed:
                kept.append(node)
                needed |= set(node.input)
        del graph.node[:], graph.initializer[:]
        graph.node.extend(reversed(kept))
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(array), name)
            for name, array in self._constants.items()
            if name in needed
        )
        onnx.checker.check_model(self._model)
        return self._model

    def _add_constant(self, name: str, array: np.ndarray | np.generic) -> str:
        self._constants[name] = np.asarray(array)
        return name

    def _add_node(self, operator: str, output: str, *inputs: str, **attributes: Any) -> str:
        self._new_nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def _quantize_convolution(self, node: onnx.NodeProto) -> None:
        """Replaces the input, the kernel and the bias of a convolution with dequantized tensors."""
        kernel = self._constants[node.input[1]].astype(np.float64)
        bias = self._constants[node.input[2]].astype(np.float64) if len(node.input) > 2 else 0.0
        x = self._rounded[node.input[0]]
        name = node.name
        largest = np.abs(kernel).max((1, 2, 3))
        # The scale of the bias is the product of the scales of the kernel and of the input. If this
        # product is too small, the bias exceeds the range of 32 bits.
        smallest = np.abs(bias) / (x.scale * 2.0**30)
        scales = np.maximum(np.where(largest == 0, 1, largest) / 127, smallest).astype(np.float32)
        integers = np.round(kernel / scales[:, None, None, None]).astype(np.int8)
        kernel_name = self._dequantize_constant(f"{name}_kernel", integers, scales)
        bias_scales = (scales * np.float32(x.scale)).astype(np.float32)
        limit = np.iinfo(np.int32).max
        integers = np.clip(np.round(bias / bias_scales), -limit, limit).astype(np.int32)
        bias_name = self._dequantize_constant(f"{name}_bias", integers, bias_scales)
        del node.input[:]
        node.input.extend([x.name, kernel_name, bias_name])

    def _store_weights(self, node: onnx.NodeProto) -> None:
        """Stores a large constant matrix as int8, with a scale for each column."""
        self._quantize_inputs(node, is_rounded=False)
        weights = self._constants.get(node.input[1])
        if weights is None or weights.ndim != 2 or weights.size < _MIN_WEIGHTS:
            return
        largest = np.abs(weights).max(0)
        scales = (np.where(largest == 0, 1, largest) / 127).astype(np.float32)
        integers = np.round(weights / scales).astype(np.int8)
        node.input[1] = self._dequantize_constant(f"{node.name}_weights", integers, scales, axis=1)

    def _quantize_inputs(self, node: onnx.NodeProto, *, is_rounded: bool) -> None:
        """Replaces the rounded inputs of a node, and its constants if its output is rounded too."""
        inputs = []
        for name in node.input:
            if name in self._rounded:
                inputs.append(self._rounded[name].name)
            elif is_rounded and node.op_type in ("Add", "Mul") and name in self._constants:
                array = self._constants[name]
                low, high = min(float(array.min()), 0.0), max(float(array.max()), 0.0)
                scale, zero_point = _scale(low, high)
                integers = np.clip(np.round(array / scale) + zero_point, 0, 255).astype(np.uint8)
                integers_name = self._add_constant(f"{node.name}_constant", integers)
                output = f"{node.name}_dequantized_constant"
                parameters = self._parameters(output, scale, zero_point)
                inputs.append(
                    self._add_node("DequantizeLinear", output, integers_name, *parameters)
                )
            else:
                inputs.append(name)
        del node.input[:]
        node.input.extend(inputs)

    def _round_output(self, node: onnx.NodeProto, low: float, high: float) -> None:
        """Rounds the output of a node to 8 bits."""
        name = node.output[0]
        scale, zero_point = _scale(low, high)
        if node.op_type in _SAME_SCALE:
            for value in self._rounded.values():
                if value.name == node.input[0]:
                    scale, zero_point = value.scale, value.zero_point
        parameters = self._parameters(name, scale, zero_point)
        integers = self._add_node("QuantizeLinear", f"{name}_quantized", name, *parameters)
        output = self._add_node("DequantizeLinear", f"{name}_dequantized", integers, *parameters)
        self._rounded[name] = _Rounded(output, scale, zero_point)

    def _parameters(self, name: str, scale: float, zero_point: int) -> list[str]:
        # These are scalars, because ONNX Runtime Web refuses the shape [1].
        return [
            self._add_constant(f"{name}_scale", np.float32(scale)),
            self._add_constant(f"{name}_zero_point", np.uint8(zero_point)),
        ]

    def _dequantize_constant(
        self, name: str, integers: np.ndarray, scales: np.ndarray, axis: int = 0
    ) -> str:
        inputs = [
            self._add_constant(f"{name}_integers", integers),
            self._add_constant(f"{name}_scales", scales),
        ]
        return self._add_node("DequantizeLinear", name, *inputs, axis=axis)


def _scale(low: float, high: float) -> tuple[float, int]:
    """Returns the scale and the zero point of a range that contains 0."""
    scale = float(np.float32((high - low) / 255)) or 1.0
    return scale, round(-low / scale)
