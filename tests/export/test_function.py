import jax
import numpy as np
import pytest
from exports import network_case, random_images, small_predictor

from cnn_jax.export.function import evaluate, flat_function
from cnn_jax.models import NETWORKS
from cnn_jax.models.layers import max_pool_2x2


def _primitives(function):
    return [equation.primitive.name for equation in function.jaxpr.eqns]


def _check(predictor, function, atol=5e-6):
    images = random_images(predictor, 3)
    (probabilities,) = evaluate(function, images)
    np.testing.assert_allclose(probabilities, predictor(images), atol=atol)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_flat_function_has_only_standard_operations(name):
    primitives = _primitives(network_case(name).function)
    calls = {"jit", "cond", "custom_jvp_call", "custom_vjp_call", "optimization_barrier"}
    assert not calls & set(primitives)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_no_factor_remains_if_all_scales_are_positive(batch_norm):
    predictor = small_predictor("cnn", features=(4, 8, 12), batch_norm=batch_norm)
    function = flat_function(predictor)
    _check(predictor, function)
    # The softmax has a division.
    assert [name for name in _primitives(function) if name in ("mul", "div")] == ["div"]
    assert _primitives(function).count("reduce_window_max") == 2


@pytest.mark.parametrize("scale", [-1.5, 0.0])
@pytest.mark.parametrize("layer", ["norm1", "norm2"])
def test_a_scale_that_is_not_positive_is_applied_after_relu(layer, scale):
    predictor = small_predictor("cnn", features=(4, 8))
    scales = predictor.variables["params"][layer]["scale"]
    predictor.variables["params"][layer]["scale"] = scales.at[1].set(scale)
    function = flat_function(predictor)
    _check(predictor, function)
    # The scales of the last normalization are folded into the dense layer.
    assert ("mul" in _primitives(function)) == (layer == "norm1")


def test_images_of_odd_sizes_are_pooled_alike():
    predictor = small_predictor("cnn", image_size=(19, 27), features=(4, 8, 12))
    _check(predictor, flat_function(predictor))


def test_the_standard_form_of_the_pool_equals_the_form_for_cpus():
    x = jax.random.normal(jax.random.key(0), (2, 6, 9, 3))
    jaxpr = jax.make_jaxpr(max_pool_2x2)(x)
    assert "reduce_window_max" in str(jaxpr)
    expected = np.asarray(x)[:, :, :8].reshape(2, 3, 2, 4, 2, 3).max((2, 4))
    np.testing.assert_array_equal(max_pool_2x2(x), expected)


def test_a_network_with_all_stages_in_its_embedding_is_flat():
    predictor = small_predictor("resnet18", embedding="stages")
    _check(predictor, flat_function(predictor))
