"""Tests that each network in `models.NETWORKS` behaves as `models.network.Network` documents."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_variables

from cnn_jax.models import NETWORKS
from cnn_jax.models.network import make_model

# Each layer that changes only the outputs of later stages, and the first of these stages. The class
# token belongs to "patch_embed", but the output of "patch_embed" contains only patches.
_CHANGED_LATER = {"cls_token": "blocks_2"}

# The field values of a small network, by class name.
_SMALL = {
    "ResNet": {"blocks": (1, 1, 1, 1)},
    "EfficientNet": {"width": 0.2, "depth": 0.1},
    "ConvNeXt": {"blocks": (1, 1, 2, 1), "features": (8, 12, 16, 20)},
    "VisionTransformer": {"features": 24, "depth": 6},
}


def _make_small(name, precision="float32"):
    model = make_model(_section(name), 3, precision)
    return model.clone(**_SMALL.get(type(model).__name__, {}))


def _section(name, **values):
    defaults = {key: value.default for key, value in NETWORKS[name].keys.items()}
    return {"name": name, **defaults, **values}


def _image_size(name):
    divisor = NETWORKS[name].size_divisor(_section(name))
    return 2 * (max(16 // divisor * divisor, divisor),)


class _Case:
    """A network with random variables, and its compiled stages."""

    def __init__(self, name):
        self.model = _make_small(name)
        rng = np.random.default_rng(0)
        self.image = rng.normal(size=(2, *_image_size(name), 3)).astype(np.float32)
        self.variables = random_variables(self.model, self.image)
        self.params = self.variables["params"]
        outputs = jax.eval_shape(self._stages, self.variables, self.image)
        self.zeros = {stage: jnp.zeros(out.shape) for stage, out in outputs.items()}
        lowered = jax.jit(self._compute).lower(self.variables, self.image, self.zeros)
        # Without LLVM's optimisations, the compilation takes half as long.
        self._compiled = lowered.compile({"xla_backend_optimization_level": 0})
        self.outputs, self.logits = self.run()

    def run(self, params=None, offsets=None):
        """Returns the outputs of all stages, and the logits of `__call__`."""
        variables = self.variables | ({} if params is None else {"params": params})
        return self._compiled(variables, self.image, self.zeros | (offsets or {}))

    def changed_stages(self, **changes):
        """Returns the stages whose outputs change if `run` is called with `changes`."""
        outputs, _ = self.run(**changes)
        return [
            stage
            for stage in self.model.stage_names
            if not np.array_equal(outputs[stage], self.outputs[stage])
        ]

    def _stages(self, variables, image, offsets=None):
        outputs = self.model.apply(variables, image, offsets=offsets, method="stages")
        self.order = list(outputs)  # JAX sorts the keys of a dictionary that a function returns.
        return outputs

    def _compute(self, variables, image, offsets):
        return self._stages(variables, image, offsets), self.model.apply(variables, image)


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    return _Case(request.param)


def test_outputs_have_the_order_of_the_stages(case):
    assert case.order == list(case.model.stage_names)
    assert case.order[-2:] == ["embedding", "logits"]
    ranks = [case.outputs[stage].ndim for stage in case.order]
    assert ranks == [4] * (len(ranks) - 2) + [2, 2]
    np.testing.assert_array_equal(case.logits, case.outputs["logits"])


def test_a_layer_changes_its_stage_and_no_earlier_stage(case):
    names = list(case.model.stage_names)
    for layer, values in case.params.items():
        changed = jax.tree.map(lambda leaf: 1.1 * leaf + 0.1, values)
        stage = _CHANGED_LATER.get(layer, case.model.find_stage(layer))
        assert stage in names, f"find_stage({layer!r}) is {stage!r}, which is no stage"
        changes = case.changed_stages(params=case.params | {layer: changed})
        message = f"find_stage({layer!r}) is {stage!r}, but the layer changes {changes}"
        assert changes == names[names.index(stage) :], message


def test_an_offset_changes_its_stage_and_all_later_stages(case):
    names = list(case.model.stage_names)
    for i, stage in enumerate(names):
        offset = case.zeros[stage].at[:, 0].set(1.0)
        assert case.changed_stages(offsets={stage: offset}) == names[i:]


def test_the_first_layer_the_embedding_and_the_head_are_as_declared(case):
    head = case.params["head"]
    embedding = np.asarray(case.outputs["embedding"], np.float64)
    logits = embedding @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(case.outputs["logits"], logits, atol=1e-5)
    mean_maps = case.outputs[case.order[-3]].mean((1, 2))
    is_mean = mean_maps.shape == embedding.shape and np.allclose(mean_maps, embedding, atol=1e-5)
    message = f"embedding_is_mean_map must be {is_mean}"
    assert case.model.embedding_is_mean_map == is_mean, message
    assert case.model.first_kernel(case.params).shape[2] == 3


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_used_up_to_the_logits(name):
    model = _make_small(name, "bfloat16")
    image = jax.ShapeDtypeStruct((1, *_image_size(name), 3), jnp.float32)
    dtypes = {}

    def run(image):
        outputs, variables = model.init_with_output(jax.random.key(0), image, method="stages")
        dtypes.update({stage: output.dtype for stage, output in outputs.items()})
        return variables

    variables = jax.eval_shape(run, image)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    assert dtypes.pop("logits") == jnp.float32
    wrong = {stage: dtype.name for stage, dtype in dtypes.items() if dtype != jnp.bfloat16}
    assert not wrong, f"stages that are not computed in the dtype of the network: {wrong}"


@pytest.mark.parametrize("name", [n for n in NETWORKS if "drop_path" in NETWORKS[n].keys])
def test_the_probability_of_drop_path_grows_with_the_depth(name):
    model = make_model(_section(name, drop_path=0.3, dropout=0.5), 3, "float32")
    rates, is_random = [], []

    def record(next_function, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            rates.append(context.module.rate)
            is_random.append(not context.module.deterministic)
        return next_function(*args, **kwargs)

    image = jax.ShapeDtypeStruct((1, *_image_size(name), 3), jnp.float32)
    for train in (True, False):
        rates.clear()
        is_random.clear()
        with nn.intercept_methods(record):
            rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
            jax.eval_shape(functools.partial(model.init, train=train), rngs, image)
        assert rates[-1] == 0.5  # The last rate is the dropout rate of the head.
        assert rates[:-1] == sorted(rates[:-1])
        assert rates[0] < 0.05
        assert 0.25 < rates[-2] <= 0.3
        assert set(is_random) == {train}
