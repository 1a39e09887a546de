"""The ONNX models of a bundle: one for preprocessed images, and one for pixels of any size."""

import json
import math

import numpy as np
import onnx
from jax.extend import core
from onnx import TensorProto, helper

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.resize import PADDING
from cnn_jax.export.translate import Graph, add_function
from cnn_jax.inference.predictor import TrainedPredictor


def images_model(function: core.ClosedJaxpr, predictor: TrainedPredictor) -> onnx.ModelProto:
    """Returns the model with the input "images", uint8 [batch, height, width, 3].

    The images have the size of the network's input; the model normalises them. The output is
    "probabilities", float32 [batch, classes].

    Args:
      function: The flat function of the predictor.
      predictor: The predictor, for the image size and the class names.
    """
    graph = Graph()
    shape = ["batch", *predictor.preprocessing.image_size, 3]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, shape)
    probabilities = add_function(graph, function, "images")
    return graph.model(
        images, probabilities, ["batch", len(predictor.class_names)], _metadata(predictor)
    )


def pixels_model(images: onnx.ModelProto, predictor: TrainedPredictor) -> onnx.ModelProto:
    """Returns the model with the input "pixels", uint8 [height, width, 3] of any size.

    The model resizes and crops the image as `data.resize` does. The output is "probabilities",
    float32 [1, classes].

    Args:
      images: The model for preprocessed images.
      predictor: The predictor, for the preprocessing and the class names.
    """
    graph = Graph("resize_")
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["height", "width", 3])
    add_resize(graph, "pixels", predictor.preprocessing, "images")
    graph.nodes += images.graph.node
    return graph.model(
        pixels,
        "probabilities",
        [1, len(predictor.class_names)],
        _metadata(predictor),
        images.graph.initializer,
    )


def _metadata(predictor: TrainedPredictor) -> dict[str, str]:
    height, width = predictor.preprocessing.image_size
    return {
        "class_names": json.dumps(predictor.class_names),
        "image_size": json.dumps([height, width]),
        "resize": predictor.preprocessing.resize,
        "interpolation": predictor.preprocessing.interpolation,
    }


def add_resize(graph: Graph, pixels: str, preprocessing: Preprocessing, output: str) -> None:
    """Adds the resizing of an image to a graph; see `data.resize`.

    `Resize` with antialiasing computes what Pillow does, but rounds some values to the next grey
    level.

    Args:
      graph: The graph.
      pixels: The name of the image in the graph, uint8 [height, width, 3].
      preprocessing: `image_size`, `resize`, `crop_ratio` and `interpolation` are used.
      output: The name of the result, uint8 [1, *image_size, 3].
    """
    height, width = preprocessing.image_size
    size = graph.add("Shape", pixels, start=0, end=2)
    scaled = _scaled_size(graph, size, preprocessing)
    planes = graph.add("Transpose", pixels, perm=[2, 0, 1])
    planes = graph.add("Unsqueeze", planes, graph.integers(0))
    bicubic = preprocessing.interpolation == "bicubic"
    mode = {"mode": "cubic", "cubic_coeff_a": -0.5} if bicubic else {"mode": "linear"}
    sizes = graph.add("Concat", graph.integers(1, 3), scaled, axis=0)
    resized = graph.add("Resize", planes, "", "", sizes, antialias=1, exclude_outside=1, **mode)
    target = graph.integers(height, width)
    if preprocessing.resize == "crop":
        # Round halves to even, as Python does.
        difference = graph.add("Cast", graph.add("Sub", scaled, target), to=TensorProto.FLOAT)
        half = graph.add("Mul", difference, graph.constant(np.float32(0.5)))
        start = graph.add("Cast", graph.add("Round", half), to=TensorProto.INT64)
        stop = graph.add("Add", start, target)
        resized = graph.add("Slice", resized, start, stop, graph.integers(2, 3))
    elif preprocessing.resize == "pad":
        missing = graph.add("Sub", target, scaled)
        before = graph.add("Div", missing, graph.integers(2, 2))
        after = graph.add("Sub", missing, before)
        zeros = graph.integers(0, 0)
        pads = graph.add("Concat", zeros, before, zeros, after, axis=0)
        resized = graph.add("Pad", resized, pads, graph.constant(np.uint8(PADDING)))
    resized = graph.add("Transpose", resized, perm=[0, 2, 3, 1])
    graph.nodes.append(
        helper.make_node("Reshape", [resized, graph.integers(1, height, width, 3)], [output])
    )


def _scaled_size(graph: Graph, size: str, preprocessing: Preprocessing) -> str:
    """Returns the name of the size of the scaled image, int64 [2]; see `data.resize`."""
    height, width = preprocessing.image_size
    if preprocessing.resize == "stretch":
        return graph.integers(height, width)
    if preprocessing.resize == "pad":
        exact = graph.add("Cast", size, to=TensorProto.DOUBLE)
        ratios = graph.add("Div", graph.constant(np.array([height, width], np.float64)), exact)
        ratio = graph.add("ReduceMin", ratios, graph.integers(0), keepdims=1)
        rounded = graph.add("Round", graph.add("Mul", exact, ratio))
        whole = graph.add("Cast", rounded, to=TensorProto.INT64)
        return graph.add("Max", whole, graph.integers(1, 1))
    covered = [math.floor(side / preprocessing.crop_ratio) for side in (height, width)]
    # The factor is the larger one of covered height / height and covered width / width.
    swapped = graph.add("Gather", size, graph.integers(1, 0))
    products = graph.add("Mul", graph.integers(*covered), swapped)
    first, second = (graph.add("Gather", products, graph.integers(i)) for i in (0, 1))
    is_height = graph.add("GreaterOrEqual", first, second)
    height_scaled, width_scaled = (
        graph.add("Div", graph.add("Mul", size, graph.integers(side, side)), denominator)
        for side, denominator in zip(
            covered,
            (graph.add("Gather", size, graph.integers(i)) for i in (0, 1)),
            strict=True,
        )
    )
    return graph.add("Where", is_height, height_scaled, width_scaled)
