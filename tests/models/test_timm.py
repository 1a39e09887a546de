"""Compares each network with timm's network; both have the same random weights.

`experiments/checks/reference_logits.py` writes the files in `references/` with timm.
"""

import jax
import numpy as np
import pytest

from cnn_jax.models import NETWORKS
from cnn_jax.models.network import make_model
from cnn_jax.models.pretrained import convert
from experiments.checks import reference_logits


@pytest.mark.parametrize("name", reference_logits.NETWORKS)
def test_logits_and_feature_maps_equal_those_of_timm(name):
    reference = reference_logits.load_reference(name)
    section = {key: value.default for key, value in NETWORKS[name].keys.items()}
    model = make_model({"name": name, **section}, reference_logits.NUM_CLASSES, "float32")
    image = reference_logits.random_image(reference["image_size"])
    variables = convert(reference_logits.random_state(reference["shapes"]))

    expected = jax.eval_shape(model.init, jax.random.key(0), image)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, expected)
    lowered = jax.jit(lambda *inputs: model.apply(*inputs, method="stages")).lower(variables, image)
    # Without LLVM's optimisations, the compilation takes half as long.
    stages = lowered.compile({"xla_backend_optimization_level": 0})(variables, image)
    maps = stages[reference["stage"]]
    _assert_close(maps.mean((1, 2)), reference["stage_mean"])
    _assert_close(stages["logits"], reference["logits"])


def _assert_close(actual, expected):
    """Asserts that errors are at most 1e-4 times the largest expected value (at least 1)."""
    tolerance = 1e-4 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
