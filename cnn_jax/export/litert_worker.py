"""Converts and runs LiteRT models; a script for the Python of --converter_python.

LiteRT needs other versions of packages than this project. Therefore this script runs in another
environment, and imports nothing of this project:

    python litert_worker.py convert SOURCE.mlir MODEL.tflite float32|dynamic|static [IMAGES.npy]
    python litert_worker.py run MODEL.tflite

`run` reads requests from stdin until it is closed: the number of images, 4 bytes, little-endian,
and the images, uint8 [batch, height, width, 3]. It writes the probabilities, float32 [batch,
classes], to stdout.
"""

import os
import pathlib
import sys


def convert(source: str, target: str, precision: str, images: str = "") -> None:
    """Converts a StableHLO module, as text, to a LiteRT model.

    Args:
      source: The file of the module.
      target: The file of the model.
      precision: "float32"; "dynamic" for weights with 8 bits and activations whose ranges are
        measured for each image; or "static" for activations with the ranges of `images`.
      images: A NumPy file, uint8 [n, height, width, 3], for "static".
    """
    import litert_converter.converter_api_ext as converter  # type: ignore[import-not-found]
    from litert_converter.mlir import ir, passmanager  # type: ignore[import-not-found]

    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        module = ir.Module.parse(pathlib.Path(source).read_text())
        for operation in module.body.operations:
            attributes = operation.operation.attributes
            if attributes["sym_name"].value == "main":
                signature = ("serving_default", ["images"], ["probabilities"])
                converter.set_signature(operation.operation, *signature)
        manager = passmanager.PassManager()
        converter.run_convert_to_tfl_passes(module, manager, converter.ConvertToTFLConfig())
        model = converter.export_flatbuffer_to_bytes(module.operation)
    if precision != "float32":
        model = quantize(model, images if precision == "static" else None)
    pathlib.Path(target).write_bytes(model)


def quantize(model: bytes, images: str | None) -> bytes:
    """Quantizes a model to 8 bits; if `images` is None, with dynamic ranges. See `convert`."""
    import numpy as np
    from litert_quantizer import (  # type: ignore[import-not-found]
        calibrator,
        quantizer,
        recipe,
        recipe_manager,
    )
    from litert_quantizer.utils import qsv_utils  # type: ignore[import-not-found]

    quantization = quantizer.Quantizer(bytearray(model))
    if images is None:
        quantization.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        return bytes(quantization.quantize().quantized_model)
    quantization.load_quantization_recipe(recipe.static_wi8_ai8())
    # Probabilities of 8 bits would be multiples of 1/256.
    for operation in ("SOFTMAX", "OUTPUT"):
        quantization.update_quantization_recipe(".*", operation, algorithm_key="no_quantize")
    # `Quantizer.calibrate` takes moving averages of the images' ranges, which are too small.
    ranges = calibrator.Calibrator(model, 1, qsv_update_func=qsv_utils.min_max_update)
    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(quantization.get_quantization_recipe())
    batches = [{"images": image[None]} for image in np.load(images)]
    ranges.calibrate({"serving_default": batches}, manager)
    return bytes(quantization.quantize(ranges.get_model_qsvs()).quantized_model)


def run(path: str) -> None:
    """Answers requests; see the description of this script."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-not-found]

    # LiteRT prints messages to stdout, so the probabilities are written to a copy of stdout.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    (images,), (probabilities,) = interpreter.get_input_details(), interpreter.get_output_details()
    shape = tuple(images["shape"][1:])
    while header := sys.stdin.buffer.read(4):
        count = int.from_bytes(header, "little")
        content = sys.stdin.buffer.read(count * int(np.prod(shape)))
        for image in np.frombuffer(content, np.uint8).reshape(count, 1, *shape):
            interpreter.set_tensor(images["index"], image)
            interpreter.invoke()
            answers.write(np.float32(interpreter.get_tensor(probabilities["index"])).tobytes())
        answers.flush()


if __name__ == "__main__":
    {"convert": convert, "run": run}[sys.argv[1]](*sys.argv[2:])
