import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import as_float32, conv, dense, norm, pool, random_variables

from cnn_jax.config.schema import default_config
from cnn_jax.models.cnn import CNN
from cnn_jax.models.network import (
    count_parameters,
    forward_flops,
    make_model,
    updates_statistics,
)
from cnn_jax.system.errors import ConfigError


def test_each_layer_has_the_parameters_of_the_specification():
    model = CNN(num_classes=10)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))

    def count(collection):
        return {
            layer: sum(leaf.size for leaf in jax.tree.leaves(leaves))
            for layer, leaves in variables[collection].items()
        }

    assert count("params") == {
        "conv1": 896,
        "norm1": 64,
        "conv2": 18_496,
        "norm2": 128,
        "conv3": 73_856,
        "norm3": 256,
        "dense": 33_024,
        "head": 2_570,
    }
    assert sum(count("params").values()) == count_parameters(model, (224, 224)) == 129_290
    assert sum(count("batch_stats").values()) == 448


def _numpy_forward(variables, x, train=False):
    """Computes the logits in NumPy and float64."""
    params, stats = variables["params"], variables["batch_stats"]
    for i in (1, 2, 3):
        x = np.maximum(conv(x, **params[f"conv{i}"]), 0)
        moments = (
            {"mean": x.mean(axis=(0, 1, 2)), "var": x.var(axis=(0, 1, 2))}
            if train
            else stats[f"norm{i}"]
        )
        x = norm(x, **params[f"norm{i}"], **moments)
        if i < 3:
            x = pool(x)
    x = x.mean(axis=(1, 2))
    x = np.maximum(dense(x, **params["dense"]), 0)
    return dense(x, **params["head"])


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
@pytest.mark.parametrize("train", [False, True])
def test_forward_equals_numpy_float64(size, train):
    model = CNN(num_classes=10, dropout=0.0)
    variables = random_variables(model, size)
    images = np.random.default_rng(1).uniform(-1, 1, (4, *size, 3))
    expected = _numpy_forward(variables, images, train)

    actual = model.apply(
        as_float32(variables), as_float32(images), train=train, mutable=["batch_stats"]
    )[0]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)


def test_training_mode_stores_the_statistics_of_the_batch():
    model = CNN(num_classes=3, features=(4,), dense=8)
    images = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    variables = model.init(jax.random.key(0), images)
    _, updates = model.apply(
        variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)}
    )
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    activations = np.maximum(conv(np.asarray(images, np.float64), **params["conv1"]), 0)
    stats = updates["batch_stats"]["norm1"]
    np.testing.assert_allclose(stats["mean"], activations.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], activations.var((0, 1, 2)), rtol=1e-4)


def test_dropout_is_active_in_training_only():
    model = CNN(num_classes=3, features=(4,), dense=64, dropout=0.5)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = model.init(jax.random.key(0), images)

    def apply(seed, train):
        return model.apply(
            variables,
            images,
            train=train,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(seed)},
        )[0]

    assert not np.allclose(apply(0, train=True), apply(1, train=True))
    np.testing.assert_array_equal(apply(0, train=False), apply(1, train=False))


def test_without_batch_norm_there_are_no_statistics():
    config = {"name": "cnn", "features": [4, 8], "dense": 16, "dropout": 0.0, "batch_norm": False}
    model = make_model(config, num_classes=3, precision="float32")
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert set(variables) == {"params"}
    assert set(variables["params"]) == {"conv1", "conv2", "dense", "head"}


def test_bfloat16_keeps_parameters_and_logits_in_float32():
    model = CNN(num_classes=10, dtype=jnp.dtype("bfloat16"))
    images = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))
    variables = model.init(jax.random.key(0), images)
    logits, updates = model.apply(
        variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)}
    )
    leaves = jax.tree.leaves((variables, updates, logits))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    jaxpr = str(jax.make_jaxpr(lambda v, x: model.apply(v, x))(variables, images))
    convolutions = [line for line in jaxpr.splitlines() if "conv_general_dilated" in line]
    assert len(convolutions) == 3
    assert all("bf16[" in line.split("=")[0] for line in convolutions)
    exact = CNN(num_classes=10).apply(variables, images)
    np.testing.assert_allclose(model.apply(variables, images), exact, atol=0.05)


def test_flops_equal_those_of_convolutions_and_dense_layers():
    # Each product of two values outside the zero padding counts as two operations. All other
    # operations are less than 3 % of the total.
    products = 0
    for side, channels_in, channels_out in ((32, 3, 32), (16, 32, 64), (8, 64, 128)):
        products += (3 * side - 2) ** 2 * channels_in * channels_out
    products += 128 * 256 + 256 * 10
    assert forward_flops(CNN(num_classes=10), (32, 32)) == pytest.approx(2 * products, rel=0.03)


def test_stages_equal_a_computation_in_numpy():
    model = CNN(num_classes=10)
    variables = random_variables(model, (8, 12))
    images = np.random.default_rng(1).uniform(-1, 1, (2, 8, 12, 3))
    arguments = as_float32((variables, images))
    stages = model.apply(*arguments, method="stages")
    assert list(stages) == ["conv1", "conv2", "conv3", "embedding", "logits"]
    params = variables["params"]
    x = images
    for i in (1, 2, 3):
        x = np.maximum(conv(x, **params[f"conv{i}"]), 0)
        x = norm(x, **params[f"norm{i}"], **variables["batch_stats"][f"norm{i}"])
        np.testing.assert_allclose(stages[f"conv{i}"], x, atol=1e-5, rtol=1e-5)
        if i < 3:
            x = pool(x)
    embedding = np.maximum(dense(x.mean((1, 2)), **params["dense"]), 0)
    np.testing.assert_allclose(stages["embedding"], embedding, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(stages["logits"], model.apply(*arguments))


def test_offsets_are_added_to_stages():
    model = CNN(num_classes=3, features=(4, 5), dense=8)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = model.init(jax.random.key(0), images)

    def stages(offsets=None):
        return model.apply(variables, images, offsets=offsets, method="stages")

    plain, moved = stages(), stages({"conv1": jnp.ones((2, 8, 8, 4))})
    np.testing.assert_allclose(moved["conv1"], plain["conv1"] + 1, rtol=1e-6)
    assert not np.allclose(moved["logits"], plain["logits"])
    offset = np.random.default_rng(1).normal(size=(2, 4, 4, 5))
    mean = (np.asarray(plain["conv2"]) + offset).mean((1, 2))
    layer = jax.device_get(variables["params"]["dense"])
    expected = np.maximum(dense(mean, **layer), 0)
    actual = stages({"conv2": jnp.asarray(offset, jnp.float32)})["embedding"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    # The logits are linear in the embedding. So the gradient with respect to a value that is added
    # to the embedding is the kernel of the head.
    zeros = jnp.zeros((2, 8))
    gradient = jax.grad(lambda offset: stages({"embedding": offset})["logits"][:, 1].sum())(zeros)
    expected = np.tile(variables["params"]["head"]["kernel"][:, 1], (2, 1))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_without_a_hidden_layer_the_embedding_is_the_mean():
    config = {"name": "cnn", "features": [4], "dense": 0, "dropout": 0.5, "batch_norm": True}
    model = make_model(config, num_classes=3, precision="float32")
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = model.init(jax.random.key(0), images)
    assert set(variables["params"]) == {"conv1", "norm1", "head"}
    stages = model.apply(variables, images, method="stages")
    np.testing.assert_allclose(
        stages["embedding"], stages["conv1"].mean((1, 2)), rtol=1e-5, atol=1e-6
    )


def test_stages_before_the_first_trained_stage_keep_their_statistics():
    model = CNN(num_classes=3, features=(4, 8), dense=8, train_from="conv2")
    images = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    variables = model.init(jax.random.key(0), images)
    _, updates = model.apply(
        variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)}
    )
    before, after = variables["batch_stats"], updates["batch_stats"]
    np.testing.assert_array_equal(after["norm1"]["mean"], before["norm1"]["mean"])
    assert np.abs(after["norm2"]["mean"]).max() > 0
    assert updates_statistics(model, (8, 8))
    assert not updates_statistics(model.clone(train_from="embedding"), (8, 8))
    assert not updates_statistics(model.clone(batch_norm=False), (8, 8))
    assert [model.is_trained_parameter(f"{layer}/bias") for layer in variables["params"]] == [
        layer not in ("conv1", "norm1") for layer in variables["params"]
    ]


def test_an_unknown_first_stage_is_an_error():
    config = default_config().model.to_dict()
    assert make_model(config, 3, "float32", "head").train_from == "logits"
    message = r"from_stage: must be one of conv1, conv2, conv3, embedding, head for the network "
    with pytest.raises(ConfigError, match=message + r"cnn, got 'conv4'; did you mean conv3\?"):
        make_model(config, 3, "float32", "conv4")
