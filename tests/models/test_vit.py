import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import assert_images_skip_at_random, random_variables

from cnn_jax.models.network import count_parameters
from cnn_jax.models.vit import Attention, Block, attention_weights, vit_small_patch14_dinov2


def test_the_number_of_parameters_is_that_of_dinov2():
    # The number of parameters of timm's backbone without DINOv2's mask token, plus 385 parameters
    # for each class.
    assert count_parameters(vit_small_patch14_dinov2(num_classes=10), (28, 28)) == 22_060_042


@pytest.mark.parametrize("half", ["ls1", "ls2"])
def test_images_skip_each_half_of_a_block_at_random_in_training_only(half):
    def make(drop_path, is_training):
        return Block(2, drop_path, is_training, jnp.dtype("float32"))

    other = {"ls1": "ls2", "ls2": "ls1"}[half]
    assert_images_skip_at_random(make, (3, 4), zero=other)


def test_attention_equals_a_computation_in_numpy():
    attention = Attention(heads=2, dtype=jnp.dtype("float32"))
    x = np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)
    variables = random_variables(attention, jnp.asarray(x))
    params = jax.tree.map(np.asarray, variables["params"])
    qkv, proj = params["qkv"], params["proj"]
    query, key, value = np.split(x[0].astype(float) @ qkv["kernel"] + qkv["bias"], 3, axis=1)
    heads = []
    for columns in (slice(4), slice(4, 8)):
        weights = np.exp(query[:, columns] @ key[:, columns].T / 2)
        heads.append(weights / weights.sum(1, keepdims=True) @ value[:, columns])
    expected = np.hstack(heads) @ proj["kernel"] + proj["bias"]
    np.testing.assert_allclose(attention.apply(variables, jnp.asarray(x))[0], expected, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_the_gradients_of_attention_weights_are_those_of_softmax(dtype, tolerance):
    rng = np.random.default_rng(0)
    query, key, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.dtype(dtype))
        for shape in ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 5, 6))
    )

    def plain(query, key):
        return jax.nn.softmax(jnp.einsum("bhqc,bhkc->bhqk", query, key))

    value, backward = jax.vjp(attention_weights, query, key)
    in_float32 = [array.astype(jnp.float32) for array in (query, key, weights)]
    expected, plain_backward = jax.vjp(plain, *in_float32[:2])
    np.testing.assert_allclose(value.astype(jnp.float32), expected, atol=tolerance)
    pairs = zip(backward(weights), plain_backward(in_float32[2]), strict=True)
    for actual, gradient in pairs:
        assert actual.dtype == value.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(actual.astype(jnp.float32), gradient, atol=5 * tolerance)


def test_position_embeddings_are_unchanged_for_images_of_the_stored_size():
    model = vit_small_patch14_dinov2(num_classes=3).clone(features=12, depth=2, grid=3)
    image = jnp.zeros((1, 42, 42, 3))
    variables = random_variables(model, image)
    outputs = jax.jit(lambda image: model.apply(variables, image, method="stages"))(image)
    params = jax.tree.map(np.asarray, variables["params"])
    expected = params["pos_embed"][0, 1:].reshape(3, 3, 12) + params["patch_embed"]["proj"]["bias"]
    np.testing.assert_allclose(outputs["patch_embed"][0], expected, atol=1e-6)


def test_blocks_belong_to_the_stage_that_ends_after_them():
    model = vit_small_patch14_dinov2(num_classes=3)
    stages = [model.find_stage(f"blocks_{i}") for i in range(12)]
    ends = ["blocks_2"] * 3 + ["blocks_5"] * 3 + ["blocks_8"] * 3 + ["blocks_10"] * 2
    assert stages == [*ends, "embedding"]
    assert {model.find_stage(name) for name in ("cls_token", "pos_embed")} == {"patch_embed"}
