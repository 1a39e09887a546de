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

SPECIFICATION = {"name": "cnn"} | {name: key.default for name, key in NETWORKS["cnn"].keys.items()}
PREPROCESSING = Preprocessing(image_size=(8, 8))


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

    narrowed = prune.narrow(model, variables, (8, 8), kept)

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
    narrowed = prune.narrow(model, variables, (8, 8), channels)
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

    scores = prune.importance(
        model, as_float32(variables), PREPROCESSING, batches, prune.widths(section)
    )

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


def test_a_network_with_shared_channels_is_refused():
    with pytest.raises(ConfigError, match="the network resnet18 cannot be pruned"):
        prune.widths({"name": "resnet18"})
