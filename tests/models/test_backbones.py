"""Tests of the convolutional backbones: parameter counts, stages and training mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models.convolutions import convolve_and_normalize
from cnn_jax.models.efficientnet import EfficientNet, InvertedResidual, _Row
from cnn_jax.models.network import abstract_variables, count_parameters, make_model
from cnn_jax.models.resnet import BasicBlock, ResNet

_FROZEN = functools.partial(
    convolve_and_normalize, use_running_average=True, dtype=jnp.dtype("float32")
)


def _make(name, num_classes=10, train_from="", **keys):
    keys = {"embedding": "last", "dropout": 0.0, "batch_norm_statistics": "frozen"} | keys
    return make_model({"name": name, **keys}, num_classes, "float32", train_from)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # The parameter counts that torchvision and timm publish for 1,000 classes.
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("efficientnet_b0", 5_288_548),
        ("efficientnet_lite0", 4_652_008),
        ("tf_efficientnet_lite1", 5_416_680),
        ("tf_efficientnet_lite2", 6_092_072),
    ],
)
def test_networks_have_the_published_numbers_of_parameters(name, parameters):
    assert count_parameters(_make(name, num_classes=1000), (64, 64)) == parameters


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_each_layer_belongs_to_a_stage(name):
    model = _make(name)
    layers = abstract_variables(model, (32, 32))["params"]
    stages = {model.find_stage(layer) for layer in layers}
    assert stages == set(model.stage_names) - {"embedding"}


def test_stages_have_the_names_and_shapes_of_the_tables():
    def shapes(model):
        images = jnp.zeros((2, 64, 96, 3))
        variables = abstract_variables(model, (64, 96))
        outputs = {}

        def run(variables, images):
            outputs.update(model.apply(variables, images, method="stages"))

        jax.eval_shape(run, variables, images)
        assert tuple(outputs) == tuple(model.stage_names)
        return {name: output.shape[1:] for name, output in outputs.items()}

    assert shapes(_make("resnet50")) == {
        "stem": (32, 48, 64),
        "layer1": (16, 24, 256),
        "layer2": (8, 12, 512),
        "layer3": (4, 6, 1024),
        "layer4": (2, 3, 2048),
        "embedding": (2048,),
        "logits": (10,),
    }
    assert shapes(_make("efficientnet_b0")) == {
        "stem": (32, 48, 32),
        "blocks_0": (32, 48, 16),
        "blocks_1": (16, 24, 24),
        "blocks_2": (8, 12, 40),
        "blocks_3": (4, 6, 80),
        "blocks_4": (4, 6, 112),
        "blocks_5": (2, 3, 192),
        "blocks_6": (2, 3, 320),
        "conv_head": (2, 3, 1280),
        "embedding": (1280,),
        "logits": (10,),
    }


def _tiny_resnet(**fields):
    return ResNet(num_classes=3, blocks=(1, 1), block=BasicBlock, **fields)


def _train(model, variables, images):
    rngs = {"dropout": jax.random.key(1)}
    return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)


def test_frozen_statistics_are_those_of_inference():
    model = _tiny_resnet()
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    (logits, updates), expected = jax.jit(
        lambda *inputs: (_train(model, *inputs), model.apply(*inputs))
    )(variables, images)
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])


def test_statistics_of_the_batch_are_used_in_the_trained_stages_only():
    model = _tiny_resnet(batch_norm_statistics="batch", train_from="layer2")
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    _, updates = jax.jit(functools.partial(_train, model))(variables, images)
    changed = {
        layer
        for layer, old in variables["batch_stats"].items()
        if not all(
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(old), jax.tree.leaves(updates["batch_stats"][layer]), strict=True
            )
        )
    }
    assert changed == {"layer2_0"}


def test_the_folded_normalisation_has_the_gradients_of_two_layers():

    class Layers(BasicBlock):
        pass

    images = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 4))
    scale, bias, mean = (jax.random.normal(jax.random.key(i), (4,)) for i in (2, 3, 4))
    variance = jnp.array([0.5, 1.0, 2.0, 3.0])
    folded = Layers(4, 4, 1, _FROZEN)
    variables = folded.init(jax.random.key(0), images)

    def expected(kernel, scale, bias):
        x = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        per_channel = [v[None, None, None] for v in (mean, variance, scale, bias)]
        m, v, s, b = per_channel
        x = jax.nn.relu((x - m) / jnp.sqrt(v + 1e-5) * s + b)
        return jnp.sum(jax.nn.relu(x + images) ** 2)

    def actual(kernel, scale, bias):
        params = dict(variables["params"])
        params["conv1"], params["bn1"] = {"kernel": kernel}, {"scale": scale, "bias": bias}
        # The second convolution is the identity.
        params["conv2"] = {"kernel": jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4))}
        stats = dict(variables["batch_stats"])
        stats["bn1"] = {"mean": mean, "var": variance}
        stats["bn2"] = {"mean": jnp.zeros(4), "var": jnp.ones(4) - 1e-5}
        return jnp.sum(folded.apply({"params": params, "batch_stats": stats}, images) ** 2)

    gradients = [
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(kernel, scale, bias)
        for f in (actual, expected)
    ]
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4 * np.abs(e).max()),
        *gradients,
    )


def test_drop_path_skips_the_block_of_whole_images():
    row = _Row(expansion=1, kernel_size=3, stride=1, features=8, blocks=1)

    def make(is_training):
        return InvertedResidual(
            row=row,
            stride=1,
            squeeze_excite=False,
            drop_path=0.5,
            is_training=is_training,
            activation=jax.nn.relu6,
            conv_norm=_FROZEN,
            dtype=jnp.dtype("float32"),
        )

    images = jax.random.normal(jax.random.key(0), (64, 4, 4, 8))
    variables = make(False).init(jax.random.key(0), images)
    branch = make(False).apply(variables, images) - images
    dropped = make(True).apply(variables, images, rngs={"dropout": jax.random.key(1)}) - images
    is_skipped = np.asarray(jnp.all(dropped == 0, axis=(1, 2, 3)))
    assert 16 < is_skipped.sum() < 48
    np.testing.assert_allclose(dropped[~is_skipped], 2 * branch[~is_skipped], rtol=1e-4, atol=1e-4)


def test_drop_path_grows_with_the_block_and_stops_at_frozen_stages(monkeypatch):
    probabilities = []
    call = InvertedResidual.__call__

    def record(self, x):
        probabilities.append(self.drop_path if self.is_training else None)
        return call(self, x)

    monkeypatch.setattr(InvertedResidual, "__call__", record)
    model = EfficientNet(num_classes=3, is_lite=True, drop_path=0.16, train_from="blocks_2")
    images = jnp.zeros((1, 32, 32, 3))
    variables = abstract_variables(model, (32, 32))
    probabilities.clear()
    jax.eval_shape(lambda v: _train(model, v, images)[0], variables)
    expected = [None] * 3 + [0.01 * i for i in range(3, 16)]
    assert probabilities[:3] == expected[:3]
    np.testing.assert_allclose(probabilities[3:], expected[3:])
