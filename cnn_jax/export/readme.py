"""The README of an exported model."""

from collections.abc import Mapping
from typing import Any

from cnn_jax.inference.predictor import Predictor

_ONNX = """\
`model.onnx` takes `images`, uint8 [batch, {height}, {width}, 3], RGB, resized and not normalised.
`pixels.onnx` takes `pixels`, uint8 [height, width, 3], RGB, of any size, and resizes the image.
Both return `probabilities`, float32 [batch, {classes}]; bundle.json has the class names in order.

    import numpy as np, onnxruntime
    from PIL import Image, ImageOps
    session = onnxruntime.InferenceSession("pixels.onnx")
    image = ImageOps.exif_transpose(Image.open("golden/0.png")).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    print(session.run(None, {{"pixels": pixels}})[0])
"""
_WEB = """\
`index.html` classifies images in the browser: `pixels.onnx` and ONNX Runtime Web, no server code.
Browsers do not load models from file:// addresses, so any web server must serve the folder:

    python -m http.server 8000 --bind 127.0.0.1

The page compares the model with the images in `golden/` before it accepts an image.
"""
_LITERT = """\
`model.tflite` takes `images`, uint8 [1, {height}, {width}, 3], RGB, resized and not normalised.
It returns `probabilities`, float32 [1, {classes}]; bundle.json has the class names in order.

    import numpy as np
    from ai_edge_litert.interpreter import Interpreter
    run = Interpreter("model.tflite").get_signature_runner()
    print(run(images=np.zeros((1, {height}, {width}, 3), np.uint8))["probabilities"])
"""
_STABLEHLO = """\
`model.stablehlo` takes uint8 [batch, {height}, {width}, 3], RGB, resized and not normalised.
It returns probabilities, float32 [batch, {classes}]; bundle.json has the class names in order.
JAX reads the file for 6 months (later versions) and 30 days (earlier versions) after JAX {jax}.

    import jax, numpy as np
    from jax import export
    model = export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
    print(model.call(np.zeros((1, {height}, {width}, 3), np.uint8)))
"""


def text(certificate: Mapping[str, Any], predictor: Predictor) -> str:
    """Returns the README, which says how to run the model and how to check it.

    Args:
      certificate: The certificate; "format" and "versions" are used.
      predictor: The predictor of the bundle, for the image size and the number of classes.
    """
    height, width = predictor.preprocessing.image_size
    template = {"litert": _LITERT, "onnx": _ONNX, "stablehlo": _STABLEHLO, "web": _WEB}[
        certificate["format"]
    ]
    usage = template.format(
        height=height,
        width=width,
        classes=len(predictor.class_names),
        jax=certificate["versions"]["jax"],
    )
    return (
        f"# An image classifier exported by cnn_jax to {certificate['format']}\n\n{usage}\n"
        "`certificate.json` compares the model with the bundle that it comes from. Its list\n"
        "`golden` has the probabilities of the images in `golden/`: your program should return\n"
        "the same.\n"
    )
