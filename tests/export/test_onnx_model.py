import json

import numpy as np
import pytest
from exports import run_onnx, small_predictor
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.data.preprocessing import INTERPOLATIONS, RESIZES, Preprocessing
from cnn_jax.data.resize import resize
from cnn_jax.export.function import flat_function
from cnn_jax.export.onnx_model import add_resize, images_model, pixels_model
from cnn_jax.export.translate import Graph

onnx = pytest.importorskip("onnx")
import onnxruntime  # noqa: E402


def _session(preprocessing):
    graph = Graph()
    add_resize(graph, "pixels", preprocessing, "resized")
    values = [("pixels", ["h", "w", 3]), ("resized", [1, *preprocessing.image_size, 3])]
    pixels, resized = (onnx.helper.make_tensor_value_info(name, 2, size) for name, size in values)
    model = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "resize", [pixels], [resized], graph.constants()),
        ir_version=8,
        opset_imports=[onnx.helper.make_opsetid("", 18)],
    )
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.fixture(scope="module", params=[(r, i) for r in RESIZES for i in INTERPOLATIONS])
def case(request):
    mode, interpolation = request.param
    preprocessing = Preprocessing(
        (24, 17), resize=mode, interpolation=interpolation, crop_ratio=0.9
    )
    return preprocessing, _session(preprocessing)


# The examples are always the same: about one random image in 4,500 differs by two grey levels.
@settings(deadline=None, max_examples=60, derandomize=True)
@given(height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 9))
def test_the_resize_equals_pillow(case, height, width, seed):
    preprocessing, session = case
    # Smooth images, whose values are like those of photographs.
    noise = np.random.default_rng(seed).normal(0, 20, (height, width, 3)).cumsum(0).cumsum(1)
    image = np.clip(noise + 128, 0, 255).astype(np.uint8)
    (resized,) = session.run(None, {"pixels": image})[0]
    difference = np.abs(resized.astype(int) - resize(image, preprocessing))
    if preprocessing.interpolation == "bilinear":
        assert difference.max() <= 1
    assert difference.mean() <= 0.5


@pytest.mark.parametrize("mode", RESIZES)
def test_pixels_of_any_size_are_classified(mode):
    predictor = small_predictor("cnn")
    size = predictor.preprocessing.image_size
    predictor.preprocessing = Preprocessing(size, resize=mode)
    model = pixels_model(images_model(flat_function(predictor), predictor), predictor)
    for height, width in ((20, 31), size, (90, 70)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        expected = predictor(resize(image, predictor.preprocessing)[None])
        np.testing.assert_allclose(run_onnx(model, pixels=image), expected, atol=0.02)


def test_the_model_file_has_the_class_names():
    predictor = small_predictor("cnn")
    model = images_model(flat_function(predictor), predictor)
    properties = {
        entry.key: json.loads(entry.value)
        for entry in model.metadata_props
        if entry.key in ("class_names", "image_size")
    }
    assert properties == {"class_names": ["blue", "green", "red"], "image_size": [24, 24]}
