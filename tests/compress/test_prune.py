import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_variables
from numpy_layers import as_float32, conv, dense, norm, pool
from numpy_layers import random_variables as float64_variables

from cnn_jax.compress import prune
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.models import NETWORKS
from cnn_jax.models.network import forward, forward_flops, make_model
from cnn_jax.system.errors import ConfigError
from cnn_jax.training.loss import cross_entropy

SPECIFICATION = {"name": "cnn"} | {name: key.default for name, key in NETWORKS["cnn"].keys.items()}
PREPROCESSING = Preprocessing(image_size=(8, 8))
RESNET_SIZE = (16, 16)


def _section(features, dense, batch_norm=True):
    return SPECIFICATION | {"features": features, "dense": dense, "batch_norm": batch_norm}


def _images(count):
    return np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("features", "dense", "batch_norm"),
    [([6], 5, True), ([4, 6], 0, True), ([4, 6, 5], 7, False), ([4, 6, 5, 6], 7, True)],
)
def test_channels_without_outgoing_weights_change_no_logit(features, dense, batch_norm):
    """The statistics, scales and shifts of BatchNorm of the removed channels are arbitrary."""
    section = _section(features, dense, batch_norm)
    model = make_model(section, 3, "float32")
    variables = jax.tree.map(np.array, random_variables(model, jnp.zeros((1, 8, 8, 3))))
    kept = {
        stage: np.arange(width)[np.arange(width) % 3 != 1]
        for stage, width in prune.widths(section).items()
    }
    layers = [f"conv{i + 1}" for i in range(len(features))] + ["dense"] * (dense > 0) + ["head"]
    for stage, layer in zip(kept, layers[1:], strict=True):
        removed = np.setdiff1d(np.arange(prune.widths(section)[stage]), kept[stage])
        variables["params"][layer]["kernel"][..., removed, :] = 0

    narrowed = prune.narrow(model, variables, kept)

    new_widths = {stage: len(positions) for stage, positions in kept.items()}
    smaller = make_model(prune.with_widths(section, new_widths), 3, "float32")
    shapes = jax.eval_shape(smaller.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert jax.tree.map(np.shape, narrowed) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    logits, expected = (
        forward(network, jax.tree.map(jnp.asarray, arrays), jnp.asarray(_images(5)), PREPROCESSING)
        for network, arrays in ((smaller, narrowed), (model, variables))
    )
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.parametrize(("features", "dense"), [([16, 32], 48), ([20, 100], 40)])
def test_a_network_that_keeps_everything_is_unchanged(features, dense):
    section = _section(features, dense)
    model = make_model(section, 3, "float32")
    variables = random_variables(model, jnp.zeros((1, 8, 8, 3)))
    widths = prune.choose_widths(section, 3, (8, 8), 1.0)
    assert prune.with_widths(section, widths) == section
    scores = {stage: np.arange(width) % 5.0 for stage, width in widths.items()}
    channels = prune.most_important(scores, widths)
    narrowed = prune.narrow(model, variables, channels)
    jax.tree.map(np.testing.assert_array_equal, narrowed, variables)


def _numpy_losses(variables, gates, images, labels):
    """Returns the loss of each image if the outputs of stages are multiplied by gates."""
    params, stats = variables["params"], variables["batch_stats"]
    x = images / 127.5 - 1
    for i in (1, 2):
        x = np.maximum(conv(x, **params[f"conv{i}"]), 0)
        x = norm(x, **params[f"norm{i}"], **stats[f"norm{i}"]) * gates[f"conv{i}"]
        x = pool(x) if i == 1 else x.mean(axis=(1, 2))
    x = np.maximum(dense(x, **params["dense"]), 0) * gates["embedding"]
    logits = dense(x, **params["head"])
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]


def test_the_importance_is_the_derivative_with_respect_to_a_gate():
    """The derivative of each image's loss is a finite difference in float64."""
    section = _section([4, 6], 5)
    model = make_model(section, 3, "float32")
    variables = float64_variables(model, (8, 8))
    images, labels = _images(7), np.array([0, 1, 2, 2, 1, 0, 1])
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]

    scores = prune.importance(model, as_float32(variables), PREPROCESSING, batches)

    ones = {stage: np.ones(width) for stage, width in prune.widths(section).items()}
    for stage, width in prune.widths(section).items():
        for channel in range(width):
            step = 1e-5 * (np.arange(width) == channel)
            high, low = (
                _numpy_losses(variables, ones | {stage: 1 + sign * step}, images, labels)
                for sign in (1, -1)
            )
            expected = np.abs((high - low) / 2e-5).mean()
            assert scores[stage][channel] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_most_important_channels_keep_their_order():
    scores = {"conv1": np.array([3.0, 1.0, 5.0, 2.0]), "embedding": np.array([1.0, 1.0])}
    channels = prune.most_important(scores, {"conv1": 3, "embedding": 1})
    assert {stage: kept.tolist() for stage, kept in channels.items()} == {
        "conv1": [0, 2, 3],
        "embedding": [0],
    }


@pytest.mark.parametrize("keep", [0.2, 0.3, 0.6])
def test_the_chosen_network_is_the_largest_within_the_operations(keep):
    def flops(widths):
        section = prune.with_widths(SPECIFICATION, widths)
        return forward_flops(make_model(section, 10, "float32"), (32, 32))

    original = prune.widths(SPECIFICATION)
    widths = prune.choose_widths(SPECIFICATION, 10, (32, 32), keep)
    assert all(width % 16 == 0 and width >= 16 for width in widths.values())
    assert flops(widths) <= keep * flops(original)
    # A network with 16 more channels in each layer would be too large.
    larger = {stage: min(width + 16, original[stage]) for stage, width in widths.items()}
    assert flops(larger) > keep * flops(original)


def test_the_operations_are_counted_in_the_given_precision(monkeypatch):
    found = set()

    def record(section, num_classes, precision):
        if num_classes == 3:
            found.add(precision)
        return make_model(section, num_classes, precision)

    monkeypatch.setattr(prune, "make_model", record)
    prune.choose_widths(_section([20], 0), 3, (8, 8), 1.0, "bfloat16")
    assert found == {"bfloat16"}


def test_the_specification_keeps_half_of_each_convolution_for_0_3():
    widths = prune.choose_widths(SPECIFICATION, 10, (224, 224), 0.3)
    assert widths == {"conv1": 16, "conv2": 32, "conv3": 64, "embedding": 144}


def test_widths_that_are_not_multiples_are_rounded_half_up():
    widths = prune.choose_widths(_section([20, 100], 40), 3, (8, 8), 0.5)
    assert widths == {"conv1": 16, "conv2": 48, "embedding": 16}
    assert [prune._reduced(width, 50) for width in (20, 40, 80, 100, 200)] == [16, 16, 48, 48, 96]


def test_layers_below_the_smallest_width_are_not_pruned():
    section = _section([8, 64], 0)
    widths = prune.choose_widths(section, 3, (16, 16), 0.7)
    assert widths == {"conv1": 8, "conv2": 32}


def test_too_few_channels_are_one_line_with_the_smallest_fraction():
    with pytest.raises(ConfigError, match=r"^--keep: must be at least 0\.13 for this network"):
        prune.choose_widths(SPECIFICATION, 10, (32, 32), 0.1)
    assert prune.choose_widths(SPECIFICATION, 10, (32, 32), 0.13)["conv3"] == 16
    with pytest.raises(ConfigError, match=r"must be at least 1\.00 .* got 0\.5$"):
        prune.choose_widths(_section([4, 8], 16), 3, (16, 16), 0.5)


def test_a_network_with_other_blocks_is_refused():
    section = {"name": "convnext_tiny"}
    with pytest.raises(ConfigError, match="the network convnext_tiny cannot be pruned; cnn"):
        prune.widths(section)


def _small_resnet(name):
    """Returns a residual network with two blocks in two groups, and its random variables."""
    section = {"name": name} | {key: one.default for key, one in NETWORKS[name].keys.items()}
    model = make_model(section, 3, "float32").clone(blocks=(1, 1), inner_features=(5, 6))
    images = jnp.zeros((1, *RESNET_SIZE, 3))
    return model, jax.tree.map(np.array, random_variables(model, images))


def _resnet_images():
    return np.random.default_rng(0).integers(0, 256, (3, *RESNET_SIZE, 3), np.uint8)


@pytest.mark.parametrize(("name", "convolutions"), [("resnet18", 1), ("resnet50", 2)])
def test_channels_of_a_block_that_are_zero_change_no_logit(name, convolutions):
    model, variables = _small_resnet(name)
    kept = {}
    for group, width in enumerate(model.inner_features, start=1):
        for i in range(1, convolutions + 1):
            removed = [0, width - 2] if i == 1 else [1, 2]
            norm = variables["params"][f"layer{group}_0"][f"bn{i}"]
            norm["scale"][removed], norm["bias"][removed] = 0, -0.1  # ReLU outputs 0.
            kept[f"layer{group}_0/conv{i}"] = np.setdiff1d(np.arange(width), removed)

    narrowed = prune.narrow(model, variables, kept)

    smaller = model.clone(inner_features=(3, 4))
    assert prune._prunable_channels(model).keys() == kept.keys()
    logits, expected = (
        jax.jit(forward, static_argnums=(0, 3))(network, arrays, _resnet_images(), PREPROCESSING)
        for network, arrays in ((smaller, narrowed), (model, variables))
    )
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_importance_in_a_block_is_the_derivative_with_respect_to_the_next_kernel(name):
    """A factor of a channel is a factor of the part of the next kernel that reads the channel."""
    model, variables = _small_resnet(name)
    labels = np.array([0, 1, 2])

    scores = prune.importance(model, variables, PREPROCESSING, [(_resnet_images(), labels)])

    @jax.jit
    def losses(variables):
        images = jnp.asarray(_resnet_images())
        return cross_entropy(forward(model, variables, images, PREPROCESSING), jnp.array(labels))

    assert len(scores) == (2 if name == "resnet18" else 4)
    for path, score in scores.items():
        block, layer = path.split("/")
        reader = variables["params"][block][f"conv{int(layer[-1]) + 1}"]
        channel, kernel = int(score.argmax()), reader["kernel"]
        found = []
        for factor in (1.001, 0.999):
            reader["kernel"] = kernel.copy()
            reader["kernel"][:, :, channel] *= factor
            found.append(losses(variables))
        reader["kernel"] = kernel
        expected = np.abs((found[0] - found[1]) / 0.002).mean()
        assert score[channel] == pytest.approx(expected, rel=0.02)


def test_the_blocks_of_a_group_keep_the_same_number_of_channels():
    section = {"name": "resnet18", "inner_features": (64, 128, 256, 512)}
    original = prune.widths(section)
    assert len(original) == 8
    assert original["layer2_1/conv1"] == 128
    new_widths = {name: width // 4 for name, width in original.items()}
    assert prune.with_widths(section, new_widths)["inner_features"] == [16, 32, 64, 128]
    # A bundle that was written before the key existed has all channels.
    assert prune.widths({"name": "resnet18"}) == original
