import re

import pytest
from conftest import REPOSITORY
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from cnn_jax.config import schema
from cnn_jax.system.errors import ConfigError
from cnn_jax.tune.space import base_values, configured, describe, load_space
from configs import default, eurosat, finetune

SPACES = REPOSITORY / "experiments" / "spaces"
HEAD = "from optuna.distributions import *\n"


@pytest.fixture
def load(tmp_path):
    """A function that writes text to a file, and loads the search space from the file."""

    def load(text):
        file = tmp_path / "space.py"
        file.write_text(text)
        return load_space(str(file), default.get_config())

    return load


def of(key, distribution):
    """Returns the text of a Python file that defines a search space with one key."""
    return f"{HEAD}def get_space():\n    return {{{key!r}: {distribution}}}\n"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("default", default),
        ("default", eurosat),
        ("recipe", default),
        ("recipe", eurosat),
        ("finetune", finetune),
    ],
)
def test_both_ends_of_a_shipped_space_are_valid(name, config):
    config = config.get_config()
    space = load_space(str(SPACES / f"{name}.py"), config)
    assert list(space) == sorted(space)
    for end in (0, -1):
        params = {}
        for key, distribution in space.items():
            description = describe(distribution)
            params[key] = description.get(
                "choices", [description.get("low"), description.get("high")]
            )[end]
        schema.validate(configured(config, params), num_devices=1)


def test_every_shipped_space_is_tested():
    assert sorted(path.stem for path in SPACES.glob("*.py")) == ["default", "finetune", "recipe"]


@pytest.mark.parametrize(
    ("name", "config", "key"),
    [("finetune", default, "model.embedding"), ("default", finetune, "model.features")],
)
def test_a_space_for_another_network_is_an_error_of_one_line(name, config, key):
    with pytest.raises(ConfigError, match=rf"config\.{key}: the network \w+ has no such key"):
        load_space(str(SPACES / f"{name}.py"), config.get_config())


def test_a_space_is_sorted_by_key(load):
    space = load(
        f"{HEAD}def get_space():\n"
        "    return {'train.batch_size': IntDistribution(8, 64, log=True),\n"
        "            'model.dropout': FloatDistribution(0, 0.5)}\n"
    )
    assert list(space.items()) == [
        ("model.dropout", FloatDistribution(0, 0.5)),
        ("train.batch_size", IntDistribution(8, 64, log=True)),
    ]


@pytest.mark.parametrize(
    ("key", "distribution", "message"),
    [
        ("optimizer.learning_rat", "FloatDistribution(1e-4, 1)", "mean optimizer.learning_rate?"),
        ("optimizer", "FloatDistribution(1e-4, 1)", "config.optimizer: is a section"),
        (3, "FloatDistribution(1e-4, 1)", "config.3: there is no such key"),
        ("optimizer.learning_rate", "FloatDistribution(0, 1)", "above 0, got 0.0"),
        ("model.dropout", "FloatDistribution(0, 1)", "from 0 to below 1, got 1.0"),
        ("model.dropout", "FloatDistribution(-0.1, 0.5)", "from 0 to below 1, got -0.1"),
        ("train.batch_size", "IntDistribution(0, 64)", "an integer, 1 or more, got 0"),
        ("train.batch_size", "FloatDistribution(8, 64)", "an integer, 1 or more, got 8.0"),
        ("augment.flip", "CategoricalDistribution(['none', 'up'])", "got 'up'"),
        ("model.features", "CategoricalDistribution(['(8, 16)', '(8, 0)'])", "got (8, 0)"),
        ("model.features", "CategoricalDistribution(['8, 16)'])", "got '8, 16)'"),
        ("model.features", "CategoricalDistribution(['name'])", "got 'name'"),
        ("model.features", "CategoricalDistribution([(8, 16)])", "is written as text"),
        ("train.epochs", "IntDistribution(1, 9)", "must be the same in all trials"),
        ("train.patience", "IntDistribution(1, 9)", "must be the same in all trials"),
        ("train.monitor", "CategoricalDistribution(['validation_f1'])", "must be the same"),
        ("optimizer.decay_epochs", "IntDistribution(1, 9)", "must be the same in all trials"),
        ("seed", "IntDistribution(1, 9)", "must be the same in all trials"),
        ("data.source", "CategoricalDistribution(['shapes'])", "must be the same"),
        ("data.split", "CategoricalDistribution(['(0.6, 0.2, 0.2)'])", "must be the same"),
        ("report.detail", "CategoricalDistribution(['none'])", "must be the same"),
        ("model.dropout", "(0, 0.5)", r"must be a FloatDistribution, IntDistribution or"),
        ("model.dropout", "0.5", r"must be a FloatDistribution, IntDistribution or"),
    ],
)
@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
def test_the_error_for_a_wrong_distribution_names_the_key(load, key, distribution, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load(of(key, distribution))
    assert re.match(rf"--space: \S*/space\.py: config\.{key}: ", str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no function get_space"),
        ("get_space = 3\n", "TypeError: 'int' object is not callable"),
        ("x = {}['no']\n", "KeyError: 'no'"),
        ("def get_space():\n    return {}['no']\n", "KeyError: 'no'"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_space(:\n", "SyntaxError: "),
        ("def get_space():\n    return {}\n", "must return a dictionary that is not empty"),
        ("def get_space():\n    return None\n", "must return a dictionary that is not empty"),
        ("def get_space():\n    return ['seed']\n", "must return a dictionary that is not empty"),
    ],
)
def test_a_file_without_a_space_is_an_error(load, text, message):
    with pytest.raises(ConfigError, match=r"^--space: \S*/space\.py") as error:
        load(text)
    assert message in str(error.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(ConfigError, match=r"^--space: there is no file '/.*'$"):
            load_space(str(path), default.get_config())


def test_configured_does_not_change_its_argument():
    base = default.get_config()
    before = schema.flat(base)
    params = {
        "model.features": "(4, 8)",
        "data.image_size": 16,
        "optimizer.learning_rate": 1,  # The base value of this key is a float.
        "augment.flip": "none",
        "precision": "float32",
        "report.splits": ("validation",),
    }
    changed = configured(base, params)
    assert schema.flat(base) == before
    assert schema.flat(changed) == before | params | {"model.features": (4, 8)}
    changed.data.cache = "none"
    assert schema.flat(base) == before


@pytest.mark.parametrize(
    ("distribution", "described"),
    [
        (
            FloatDistribution(1e-3, 0.1, log=True),
            {"kind": "float", "low": 1e-3, "high": 0.1, "log": True},
        ),
        (
            FloatDistribution(0, 1, step=0.5),
            {"kind": "float", "low": 0, "high": 1, "log": False, "step": 0.5},
        ),
        (IntDistribution(1, 4), {"kind": "int", "low": 1, "high": 4, "log": False}),
        (
            IntDistribution(2, 8, step=2),
            {"kind": "int", "low": 2, "high": 8, "log": False, "step": 2},
        ),
        (
            CategoricalDistribution(["(4, 8)", "(8,)"]),
            {"kind": "categorical", "choices": ["(4, 8)", "(8,)"]},
        ),
    ],
)
def test_a_distribution_is_described_as_json(distribution, described):
    assert describe(distribution) == described


@pytest.mark.parametrize(
    ("space", "message"),
    [
        # The final learning rate would be larger than the initial learning rate.
        ({"optimizer.learning_rate": "FloatDistribution(1e-5, 1e-3)"}, "must not be above"),
        ({"data.image_size": "CategoricalDistribution([64, 63])"}, "must be a multiple of 4"),
        (
            {
                "augment.mixup_probability": "FloatDistribution(0.0, 1.0)",
                "augment.cutmix_probability": "FloatDistribution(0.2, 0.5)",
            },
            "mixup_probability",
        ),
    ],
)
def test_a_value_that_is_never_valid_is_refused(tmp_path, space, message):
    file = tmp_path / "space.py"
    entries = ", ".join(f"{key!r}: {text}" for key, text in space.items())
    file.write_text(f"{HEAD}def get_space():\n    return {{{entries}}}\n")
    config = default.get_config()
    if "augment.cutmix_probability" in space:
        config.augment.cutmix_probability = 0.3
    with pytest.raises(ConfigError, match=message):
        load_space(str(file), config)


def test_a_space_may_have_contradictory_combinations(load):
    space = load(
        f"{HEAD}def get_space():\n"
        "    return {'optimizer.learning_rate': FloatDistribution(1e-5, 1e-3),\n"
        "            'optimizer.final_learning_rate': FloatDistribution(1e-6, 1e-4)}\n"
    )
    assert len(space) == 2


def test_base_values_are_the_configurations_values_in_the_space():
    config = default.get_config()
    config.model.features = (16, 32)
    config.augment.zoom = 0.3
    space = {
        "model.features": CategoricalDistribution(["(8, 16)", "(16,32)"]),
        "augment.flip": CategoricalDistribution(["none", "horizontal"]),
        "train.batch_size": IntDistribution(8, 64, log=True),
        "augment.zoom": FloatDistribution(0.0, 0.9, step=0.1),
        "optimizer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        # The base values of these four keys are outside the space: below it, above it, between two
        # steps, and not a choice.
        "model.dropout": FloatDistribution(0.6, 0.9),
        "augment.rotation": FloatDistribution(0.0, 0.1),
        "model.dense": IntDistribution(1, 301, step=100),
        "precision": CategoricalDistribution(["float32", "bfloat16"]),
    }
    assert base_values(config, space) == {
        "model.features": "(16,32)",
        "augment.flip": "horizontal",
        "train.batch_size": 32,
        "augment.zoom": 0.3,
        "optimizer.learning_rate": 1e-3,
    }


@pytest.mark.parametrize(
    ("distribution", "base", "expected"),
    [
        ("CategoricalDistribution([16, 32])", (32, 32), 32),
        ("CategoricalDistribution(['(16, 32)', '(32, 32)'])", 32, "(32, 32)"),
        ("CategoricalDistribution(['(16, 32)', 16])", (32, 16), None),
        ("IntDistribution(16, 64, step=16)", (32, 32), 32),
        ("IntDistribution(16, 64, step=16)", (32, 16), None),
    ],
)
def test_an_image_size_may_be_a_side_or_a_pair(tmp_path, distribution, base, expected):
    config = default.get_config()
    with config.ignore_type():
        config.data.image_size = base
    file = tmp_path / "space.py"
    file.write_text(of("data.image_size", distribution))
    space = load_space(str(file), config)
    assert base_values(config, space).get("data.image_size") == expected
