import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exports import network_case, run_onnx
from jax import lax

from cnn_jax.export.function import BATCH, ExportError, evaluate, flatten, stable_hlo
from cnn_jax.export.onnx_model import images_model
from cnn_jax.export.translate import Graph, add_function
from cnn_jax.models import NETWORKS

helper = pytest.importorskip("onnx.helper")


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_equals_the_predictor_at_any_batch_size(name):
    case = network_case(name)
    model = images_model(case.function, case.predictor)
    for batch in (1, 7):
        probabilities = run_onnx(model, images=case.images[:batch])
        np.testing.assert_allclose(probabilities, case.expected[:batch], atol=5e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_stable_hlo_equals_the_predictor_at_any_batch_size(name):
    case = network_case(name)
    exported = stable_hlo(case.function, case.predictor.preprocessing.image_size)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    # Each batch size is compiled, which takes seconds for a large network.
    for batch in (1, 7) if name == "cnn" else (7,):
        probabilities = exported.call(case.images[:batch])
        np.testing.assert_allclose(probabilities, case.expected[:batch], atol=5e-6)


def _translate(function):
    """Flattens a function of images [b, 4, 6, 3], and also translates it to an ONNX model."""
    flat = flatten(function, (4, 6))
    return flat, _model(flat)


def _model(flat):
    graph = Graph()
    images = helper.make_tensor_value_info("images", 2, ["batch", 4, 6, 3])
    result = add_function(graph, flat, "images")
    shape = [f"axis_{axis}" for axis in range(flat.out_avals[0].ndim)]
    return graph.model(images, result, shape, {})


def _float(x):
    return x.astype(jnp.float32) / 255 - 0.4


def _convolve(x, channels=3, **options):
    kernel = np.random.default_rng(0).normal(size=(3, 2, channels, 6)).astype(np.float32)
    options = {"window_strides": (1, 1), "padding": ((1, 1), (0, 1))} | options
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(_float(x), kernel, dimension_numbers=numbers, **options)


def _swap(x):
    return lax.transpose(x, (0, 1, 3, 2))


def _attention(x):
    x = _float(x).reshape(x.shape[0], 24, 3)
    products = jnp.einsum("bic,bjc->bij", x, x)
    return jnp.einsum("bij,bjc->bci", products, x)


def _pool(x, window=(1, 2, 2, 1), strides=(1, 1, 1, 1), pads=(0, 0, 0, 0), **options):
    """Returns the sums of windows; `pads` is the padding on both sides of each axis."""
    pads = [(pad, pad) for pad in pads]
    return lax.reduce_window(_float(x), 0.0, lax.add, window, strides, pads, **options)


_SHIFT = np.arange(6, dtype=np.float32).reshape(1, 1, 1, 6)
_MATRIX = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)

_FUNCTIONS = {
    "reductions": lambda x: jnp.max(_float(x), (1, 3)) + jnp.sum(_float(x), (1, 3)),
    "minimum": lambda x: jnp.min(_float(x), (0 + 2,)),
    "transposed": lambda x: _float(x).transpose(0, 2, 3, 1) * 2,
    "strided slice": lambda x: lax.slice(
        _float(x), (0, 1, 0, 1), (x.shape[0], 4, 6, 3), (1, 2, 3, 1)
    ),
    "reversed": lambda x: lax.rev(_float(x), (1, 2)),
    "reversed after a transposition": lambda x: lax.rev(_float(x).transpose(0, 3, 1, 2), (2,)),
    "concatenated": lambda x: jnp.concatenate([_float(x), _convolve(x)], -1),
    "padded": lambda x: lax.pad(_convolve(x), 0.5, ((0, 0, 0), (1, 2, 0), (0, 1, 0), (0, 0, 0))),
    "convolution": lambda x: _convolve(x, window_strides=(2, 1)),
    "dilated": lambda x: _convolve(x, rhs_dilation=(1, 2), padding="VALID"),
    "grouped": lambda x: _convolve(x, channels=1, feature_group_count=3),
    "two biases": lambda x: (_convolve(x) + _SHIFT) + _SHIFT**2,
    "bias used twice": lambda x: (y := _convolve(x)) * (y + _SHIFT),
    "limited": lambda x: jnp.minimum(jnp.maximum(_convolve(x), 0), 0.3),
    "limits per channel": lambda x: jnp.minimum(jnp.maximum(_float(x), 0), _SHIFT[..., :3]),
    "pooled": lambda x: lax.reduce_window(
        _float(x), -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 0), (0, 1), (0, 0))
    ),
    "average": lambda x: nn.avg_pool(_float(x), (3, 2), (1, 2), ((1, 0), (0, 1))),
    "average after convolution": lambda x: nn.avg_pool(_convolve(x) + _SHIFT, (2, 2), (2, 2)),
    "dense": lambda x: _float(x) @ _MATRIX,
    "dense after convolution": lambda x: _convolve(x)[..., :3] @ _MATRIX,
    "attention": _attention,
    "two contracted axes": lambda x: jnp.einsum("bhwc,bhwd->bcd", _float(x), _float(x)),
    "broadcast in two ways": lambda x: (
        jnp.sum(_float(x), (1, 2))[:, None, None] * jnp.sum(_float(x), 3)[..., None]
    ),
    "broadcast before a reshape": lambda x: jnp.broadcast_to(
        jnp.sum(_float(x), 3)[..., None], (x.shape[0], 4, 6, 2)
    ).reshape(-1, 48),
    "constant for each image": lambda x: jnp.concatenate(
        [_float(x)[:, :, 0], jnp.broadcast_to(jnp.arange(3.0), (x.shape[0], 1, 3))], 1
    ),
    "erf": lambda x: lax.erf(_float(x)) + lax.erfc(_float(x) * 2),
    "powers": lambda x: _float(x) ** 3 + lax.rsqrt(_float(x) ** 2 + 1) + jnp.square(_float(x)),
    "selected": lambda x: jnp.where(_float(x) > 0.1, _float(x), -1.0),
    "sigmoid": lambda x: jax.nn.silu(_convolve(x)) - jnp.tanh(_convolve(x)),
}


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_an_operation_equals_jax(name):
    flat, model = _translate(_FUNCTIONS[name])
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    expected = _FUNCTIONS[name](images)
    np.testing.assert_allclose(run_onnx(model, images=images), expected, atol=3e-6)
    np.testing.assert_allclose(evaluate(flat, images)[0], expected, atol=3e-6)


@pytest.mark.parametrize(
    "function",
    [
        _FUNCTIONS["two biases"],
        # The six columns of the transposed result are not the six channels.
        lambda x: _swap(_convolve(x)) + _SHIFT,
        lambda x: (y := _convolve(x)) * (_swap(_swap(y)) + _SHIFT),
        lambda x: (y := lax.max(_convolve(x), 0.0)) * lax.min(y, 0.3),
        lambda x: (y := lax.max(_convolve(x), 0.0)) * lax.min(_swap(y), 0.3),
    ],
    ids=["two biases", "columns", "transposed", "relu used twice", "transposed relu"],
)
def test_operations_are_fused_only_if_the_result_is_equal(function):
    # `flatten` would add a bias in advance.
    traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((BATCH, 4, 6, 3), np.uint8))
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    result = run_onnx(_model(traced), images=images)
    np.testing.assert_allclose(result, function(images), atol=3e-6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.sort(_float(x)), "the JAX operation sort, which has no translation"),
        (lambda x: lax.cumsum(_float(x), 1), "the JAX operation cumsum, which has no translation"),
        (lambda x: x.astype(jnp.int8), "dtype int8"),
        (lambda x: _pool(x, window=(1, 2, 2, 3)), "over other axes than height and width"),
        (lambda x: _pool(x, strides=(1, 1, 1, 2)), "over other axes than height and width"),
        (lambda x: _pool(x, pads=(0, 0, 0, 1)), "over other axes than height and width"),
        (lambda x: _pool(x, pads=(0, 2, 0, 0)), "pads images by a whole window"),
        (lambda x: _pool(x, base_dilation=(1, 2, 2, 1)), "gaps between the pixels"),
        (lambda x: _pool(x, window_dilation=(1, 2, 2, 1)), "dilated windows"),
    ],
)
def test_an_unknown_operation_is_named_in_one_line(function, message):
    with pytest.raises(ExportError, match=message) as caught:
        _translate(function)
    assert "\n" not in str(caught.value)


def test_equal_constants_are_stored_once():
    graph = Graph()
    first, second = (graph.constant(np.arange(5)) for _ in range(2))
    assert first == second != graph.constant(np.arange(5.0))
