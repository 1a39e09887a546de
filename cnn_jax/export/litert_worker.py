"""Converts and runs LiteRT models; a script for the Python of --converter_python.

LiteRT needs other versions of packages than this project. Therefore this script runs in another
environment, and imports nothing of this project:

    python litert_worker.py convert SOURCE.mlir MODEL.tflite float32|int8
    python litert_worker.py run MODEL.tflite

`run` reads requests from stdin until it is closed: the number of images, 4 bytes, little-endian,
and the images, uint8 [batch, height, width, 3]. It writes the probabilities, float32 [batch,
classes], to stdout.
"""

import os
import pathlib
import sys


def convert(source: str, target: str, precision: str) -> None:
    """Converts a StableHLO module, as text, to a LiteRT model."""
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
    if precision == "int8":
        from litert_quantizer import quantizer, recipe  # type: ignore[import-not-found]

        # The weights have 8 bits; the ranges of the activations are measured for each image.
        quantization = quantizer.Quantizer(bytearray(model))
        quantization.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        model = bytes(quantization.quantize().quantized_model)
    pathlib.Path(target).write_bytes(model)


def run(path: str) -> None:
    """Answers requests; see the description of this script."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-not-found]

    # LiteRT prints messages to stdout, so the answers get a copy of it.
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
            answers.write(interpreter.get_tensor(probabilities["index"]).tobytes())
        answers.flush()


if __name__ == "__main__":
    {"convert": convert, "run": run}[sys.argv[1]](*sys.argv[2:])
