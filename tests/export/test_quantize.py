import numpy as np
import pytest
from conftest import write_images
from exports import check_rounded, network_case, run_onnx, small_predictor

from cnn_jax.export import exporter
from cnn_jax.export.function import flat_function
from cnn_jax.export.onnx_model import images_model, pixels_model
from cnn_jax.inference.exported import load_predictor
from cnn_jax.models import NETWORKS
from cnn_jax.training.loop import train_and_evaluate

onnx = pytest.importorskip("onnx")
from cnn_jax.export.quantize import _measure_ranges, quantize  # noqa: E402


def _batches(predictor, seed=0):
    shape = (16, *predictor.preprocessing.image_size, 3)
    return [np.random.default_rng(seed).integers(0, 256, shape, np.uint8)]


def _operators(model, name):
    return [node for node in model.graph.node if node.op_type == name]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_quantized(name):
    case = network_case(name)
    model = images_model(case.function, case.predictor)
    quantized = quantize(model, _batches(case.predictor))
    probabilities = run_onnx(quantized, images=case.images)
    check_rounded(probabilities, case.expected)
    single = run_onnx(quantized, images=case.images[:1])
    np.testing.assert_allclose(single, probabilities[:1], atol=1e-3)
    assert _operators(quantized, "QuantizeLinear")
    # `quantize` does not change its argument.
    np.testing.assert_allclose(run_onnx(model, images=case.images), case.expected, atol=5e-6)


def test_convolutions_have_8_bits_except_the_first():
    predictor = small_predictor("cnn", features=(4, 8, 12), dense=128)
    model = quantize(images_model(flat_function(predictor), predictor), _batches(predictor))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node}
    first, *others = _operators(model, "Conv")
    assert constants[first.input[1]].data_type == onnx.TensorProto.FLOAT
    assert len(others) == 2
    for node in others:
        pixels, kernel, bias = (producers[name] for name in node.input)
        assert {node.op_type for node in (pixels, kernel, bias)} == {"DequantizeLinear"}
        assert constants[kernel.input[0]].data_type == onnx.TensorProto.INT8
        assert constants[bias.input[0]].data_type == onnx.TensorProto.INT32
        # ONNX Runtime Web accepts only scalars for a whole tensor.
        assert not constants[pixels.input[1]].dims
        assert constants[pixels.input[2]].data_type == onnx.TensorProto.UINT8
        # QLinearConv adds the integers of the bias to the integers of the products.
        scales = [onnx.numpy_helper.to_array(constants[n.input[1]]) for n in (pixels, kernel, bias)]
        np.testing.assert_allclose(scales[2], scales[0] * scales[1], rtol=1e-6)
    dense, _ = _operators(model, "MatMul")
    weights = producers[dense.input[1]]
    assert constants[weights.input[0]].data_type == onnx.TensorProto.INT8


def test_the_first_convolution_has_8_bits_if_a_pool_leads_to_the_next():
    predictor = small_predictor("cnn", features=(4, 8), batch_norm=False)
    model = quantize(images_model(flat_function(predictor), predictor), _batches(predictor))
    constants = {tensor.name for tensor in model.graph.initializer}
    assert not any(node.input[1] in constants for node in _operators(model, "Conv"))


def test_a_kernel_is_rounded_with_the_scale_of_its_channel():
    predictor = small_predictor("cnn", features=(4, 8))
    exact = images_model(flat_function(predictor), predictor)
    model = quantize(exact, _batches(predictor))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    before = {t.name: onnx.numpy_helper.to_array(t) for t in exact.graph.initializer}
    kernel = before[_operators(exact, "Conv")[1].input[1]]
    name = _operators(model, "Conv")[1].input[1]
    integers, scales = constants[f"{name}_integers"], constants[f"{name}_scales"]
    np.testing.assert_allclose(scales, np.abs(kernel).max((1, 2, 3)) / 127, rtol=1e-6)
    error = integers * scales[:, None, None, None] - kernel
    assert (np.abs(error).max((1, 2, 3)) <= scales / 2 * 1.001).all()


def test_a_channel_with_a_tiny_kernel_keeps_its_bias():
    predictor = small_predictor("cnn", features=(4, 8, 12), dense=128)
    model = images_model(flat_function(predictor), predictor)
    node = _operators(model, "Conv")[1]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    kernel, bias = (tensors[name] for name in node.input[1:])
    values = [onnx.numpy_helper.to_array(tensor).copy() for tensor in (kernel, bias)]
    values[0][0] *= 1e-12
    values[1][0] = 2.0
    for tensor, value in zip((kernel, bias), values, strict=True):
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    quantized = quantize(model, _batches(predictor))
    tensors = {tensor.name: tensor for tensor in quantized.graph.initializer}
    producers = {node.output[0]: node for node in quantized.graph.node}
    dequantize = producers[_operators(quantized, "Conv")[1].input[2]]
    integers, scales = (onnx.numpy_helper.to_array(tensors[name]) for name in dequantize.input[:2])
    np.testing.assert_allclose(integers * scales.astype(float), values[1], atol=1e-3)


def test_the_range_of_a_tensor_is_that_of_all_batches():
    predictor = small_predictor("cnn", features=(4, 8))
    model = images_model(flat_function(predictor), predictor)
    name = _operators(model, "Relu")[0].output[0]
    images = _batches(predictor)[0]
    (low, high) = _measure_ranges(model, [name], [images[:5], images[5:]])[name]
    observed = onnx.ModelProto.FromString(model.SerializeToString())
    observed.graph.output.insert(0, onnx.helper.make_tensor_value_info(name, 1, None))
    values = run_onnx(observed, images=images)
    assert (low, high) == (0.0, values.max())


def test_pixels_of_any_size_are_classified_with_8_bits():
    predictor = small_predictor("cnn")
    model = quantize(images_model(flat_function(predictor), predictor), _batches(predictor))
    pixels = np.full((40, 50, 3), 90, np.uint8)
    expected = run_onnx(model, images=np.full((1, 24, 24, 3), 90, np.uint8))
    result = run_onnx(pixels_model(model, predictor), pixels=pixels)
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained bundle that distinguishes three colours."""
    from configs import default

    folder = tmp_path_factory.mktemp("trained")
    write_images(folder / "images", per_class=60)
    config = default.get_config()
    config.data.source = f"folder:{folder / 'images'}"
    config.data.image_size = (16, 16)
    config.data.stratify = "exact"
    config.model.features = (8, 8)
    config.model.dense = 16
    config.train.batch_size = 8
    config.train.epochs = 4
    train_and_evaluate(config, folder / "run")
    return folder / "run"


def test_a_trained_network_keeps_its_accuracy(trained, tmp_path):
    statement = exporter.export(trained, tmp_path / "out", int8=True)
    values = statement["comparison"]["test"]
    assert values["before"]["accuracy"] > 0.6
    assert values["agreement"] == 1
    assert 0 < values["largest_difference"] < 0.005
    loaded = load_predictor(tmp_path / "out")
    assert loaded.metrics["test"] == values["after"]
    exporter.export(trained, tmp_path / "again", int8=True)
    first, second = ((tmp_path / name / "model.onnx").read_bytes() for name in ("out", "again"))
    assert first == second


def test_a_network_with_one_convolution_is_quantized():
    """The first convolution stays in float32, so there is no activation in 8 bits."""
    predictor = small_predictor("cnn", features=(4,), dense=128)
    exact = images_model(flat_function(predictor), predictor)
    model = quantize(exact, _batches(predictor))
    assert not _operators(model, "QuantizeLinear")
    images = _batches(predictor)[0]
    probabilities, expected = (run_onnx(one, images=images) for one in (model, exact))
    np.testing.assert_allclose(probabilities, expected, atol=0.02)
