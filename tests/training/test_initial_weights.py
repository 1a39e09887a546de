"""Pretrained weights in the state of a new run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from cnn_jax.models.pretrained import PretrainedWeights, convert
from cnn_jax.system.errors import ConfigError
from cnn_jax.training import initial_weights, sharding
from cnn_jax.training.step import TrainState

CONFIG = ConfigDict(
    {
        "model": {"name": "resnet18", "pretrained": "a/b@0"},
        "checkpoint": {"init_from": ""},
    }
)
STATE_DICT = {
    "conv1.weight": (8, 3, 2, 2),
    "bn1.weight": (8,),
    "bn1.bias": (8,),
    "bn1.running_mean": (8,),
    "bn1.running_var": (8,),
    "bn1.num_batches_tracked": (),
    "fc.weight": (5, 8),
    "fc.bias": (5,),
}


def _state_dict(**changes):
    rng = np.random.default_rng(0)
    shapes = STATE_DICT | {name.replace("__", "."): shape for name, shape in changes.items()}
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
        if shape is not None
    }


def _weights(state_dict, class_names=None):
    variables = convert(state_dict)
    return PretrainedWeights("a/b@0", "0", "", "resnet18", {}, class_names, variables)


def _state(classes, head_inputs=8):
    """A state with large parameters that are split over the devices, and small ones that aren't."""
    variables = convert(_state_dict(fc__weight=(classes, head_inputs), fc__bias=(classes,)))
    mesh = sharding.make_mesh(jax.device_count())

    def put(array):
        spec = [None] * (array.ndim - 1) + ["model"] if array.ndim == 4 else []
        return jax.device_put(0 * array, NamedSharding(mesh, PartitionSpec(*spec)))

    variables = jax.tree.map(put, variables)
    return TrainState(jnp.zeros((), jnp.int32), variables["params"], variables["batch_stats"], ())


def test_everything_but_the_head_is_copied_with_the_shardings_of_the_state():
    state, weights = _state(classes=2), _weights(_state_dict())
    new, description = initial_weights.start_from(weights, CONFIG, state, ["cat", "dog"])
    expected = weights.variables
    for part in ("conv1", "bn1"):
        jax.tree.map(np.testing.assert_array_equal, new.params[part], expected["params"][part])
    jax.tree.map(np.testing.assert_array_equal, new.batch_stats, expected["batch_stats"])
    assert jax.tree.map(lambda a: a.sharding, new) == jax.tree.map(lambda a: a.sharding, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert not np.any(new.params["head"]["kernel"])
    assert description == (
        "a/b@0, all weights except head: new classes (the weights have 5 classes without names)"
    )


def test_the_head_is_copied_if_the_classes_are_the_same():
    names = ["a", "b", "c", "d", "e"]
    weights = _weights(_state_dict(), names)
    new, description = initial_weights.start_from(weights, CONFIG, _state(5), names)
    assert description == "a/b@0, all weights"
    kernel = new.params["head"]["kernel"]
    np.testing.assert_array_equal(kernel, weights.variables["params"]["head"]["kernel"])
    # The same names in another order are other classes.
    new, description = initial_weights.start_from(weights, CONFIG, _state(5), names[::-1])
    assert description.endswith("except head: new classes (the weights have 5 classes)")
    assert not np.any(new.params["head"]["kernel"])
    # The head sees all stages.
    _, description = initial_weights.start_from(weights, CONFIG, _state(5, 24), names)
    assert description.endswith("except head: another embedding")


def test_weights_without_a_head():
    weights = _weights(_state_dict(fc__weight=None, fc__bias=None))
    _, description = initial_weights.start_from(weights, CONFIG, _state(2), ["cat", "dog"])
    assert description.endswith("except head: the weights have no head")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn1__bias": None}, "a/b@0 does not fit the network resnet18: 1 missing (bn1/bias)"),
        (
            {"bn1__running_mean": None, "bn1__running_var": None, "bn1__weight": (4,)},
            "2 missing (bn1/mean, bn1/var); 1 of another shape (bn1/scale is 4 instead of 8)",
        ),
        (
            {f"layer1__{i}__conv1__weight": (8, 8, 1, 1) for i in range(9)},
            "9 unused (layer1_0/conv1/kernel, layer1_1/conv1/kernel, ...)",
        ),
        (
            {"conv1__weight": (8, 1, 2, 2)},
            "its images have 1 channel (conv1/kernel is 2 x 2 x 1 x 8), and cnn_jax trains on "
            "images with 3 channels; choose other weights",
        ),
        (
            {"conv1__weight": (8, 12, 2, 2)},
            "its images have 12 channels (conv1/kernel is 2 x 2 x 12 x 8)",
        ),
        (
            {"conv1__weight": (8, 3, 7, 7)},
            "1 of another shape (conv1/kernel is 7 x 7 x 3 x 8 instead of 2 x 2 x 3 x 8)",
        ),
    ],
)
def test_weights_of_another_network_are_one_line(changes, message):
    weights = _weights(_state_dict(**changes))
    with pytest.raises(ConfigError) as caught:
        initial_weights.start_from(weights, CONFIG, _state(2), ["cat", "dog"])
    assert str(caught.value).startswith("config.model.pretrained: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
