import dataclasses
import importlib.util
import re

import pytest
from conftest import REPOSITORY

from cnn_jax.config import files, schema
from cnn_jax.config.keys import choice, integer, number
from cnn_jax.config.resolve import resolve
from cnn_jax.models import NETWORKS, NetworkEntry
from cnn_jax.models.network import make_model
from cnn_jax.system.errors import ConfigError
from configs import default

CONFIG_FILES = sorted((REPOSITORY / "configs").glob("*.py"))


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_configuration_file_is_valid_and_shows_its_command(path):
    module = _load(path)
    schema.validate(module.get_config(), num_devices=1)
    command = f"cnn_jax train --config=configs/{path.name}"
    assert command in module.__doc__


def test_spec_224_has_the_values_of_the_specification():
    config = _load(REPOSITORY / "configs" / "spec_224.py").get_config()
    assert schema.image_size(config) == (224, 224)
    assert (config.train.batch_size, config.train.epochs) == (32, 45)
    assert (config.optimizer.learning_rate, config.optimizer.final_learning_rate) == (1e-3, 1e-4)
    assert config.train.label_smoothing == 0.1
    assert (config.augment.rotation, config.augment.zoom, config.augment.contrast) == (0.2,) * 3
    assert config.augment.flip == "horizontal"
    assert tuple(config.model.features) == (32, 64, 128)
    assert (config.model.dense, config.model.dropout, config.model.batch_norm) == (256, 0.5, True)
    assert tuple(config.data.split) == (0.7, 0.2, 0.1)


INVALID = [
    ("seed", -1),
    ("precision", "float16"),
    ("data.source", ""),
    ("data.split", (0.7, 0.2, 0.2)),
    ("data.split", (0.8, 0.2, 0.0)),
    ("data.split", (0.5, 0.5)),
    ("data.image_size", (32, 30)),
    ("data.image_size", (0, 0)),
    ("data.image_size", (32.0, 32.0)),
    ("data.image_size", (32, 32, 3)),
    ("data.resize", "fit"),
    ("data.crop_ratio", 0.0),
    ("data.crop_ratio", 1.1),
    ("data.crop_ratio", 0.875),  # A crop ratio below 1 is valid only with data.resize=crop.
    ("data.interpolation", "nearest"),
    ("data.mean", (127.5, 127.5)),
    ("data.mean", (127.5, 127.5, 300.0)),
    ("data.std", (1.0, 0.0, 1.0)),
    ("data.cache", "ram"),
    ("optimizer.decay_epochs", -1),
    ("train.accumulation_steps", 0),
    ("train.steps_per_execution", -1),
    ("checkpoint.keep", 0),
    ("checkpoint.every_steps", -1),
    ("checkpoint.restore_step", 1.5),
    ("mesh.data", 0),
    ("mesh.model", 0),
    ("data.stratify", "random"),
    ("data.split_seed", -2),
    ("data.split_seed", 2**32),
    ("data.folds", 2),
    ("data.fold", 1),  # Without data.folds, there is no fold 1.
    ("data.group", "class/track"),
    ("data.keep_splits", 1),
    ("data.max_unreadable", 1.5),
    ("data.allow_outside", "yes"),
    ("train.balance", "class"),
    ("data.workers", -2),
    ("data.max_pixels", 0),
    ("augment.flip", "sideways"),
    ("augment.rotation", 1.5),
    ("augment.zoom", 1.0),
    ("augment.contrast", -0.1),
    ("augment.mixup_probability", 1.5),
    ("augment.mixup_alpha", 0.0),
    ("augment.cutmix_probability", -0.1),
    ("augment.cutmix_alpha", float("inf")),
    ("augment.place", "moon"),
    ("model.name", "no network"),
    ("model.features", ()),
    ("model.features", (32, 0)),
    ("model.dense", -1),
    ("model.dropout", 1.0),
    ("optimizer.learning_rate", 0.0),
    ("optimizer.learning_rate", float("nan")),
    ("optimizer.final_learning_rate", 1.0),
    ("optimizer.warmup_epochs", 22.0),
    ("optimizer.l2", -1e-4),
    ("optimizer.algorithm", "adagrad"),
    ("optimizer.momentum", 1.0),
    ("optimizer.schedule", "linear"),
    ("train.ema", 1.0),
    ("augment.crop_area", 0.0),
    ("augment.trivial_augment", 1),
    ("augment.erasing_probability", 1.1),
    ("distill.bundles", "runs/a,"),
    ("distill.weight", 0.0),
    ("distill.temperature", 0.0),
    ("distill.sha256", "abc"),
    ("train.batch_size", 0),
    ("train.batch_size", 30),
    ("train.epochs", 0),
    ("train.label_smoothing", 1.0),
    ("train.patience", 0),
    ("train.monitor", "test_accuracy"),
    ("report.detail", "some"),
    ("report.splits", ()),
    ("report.splits", ("validation", "validation")),
    ("report.splits", ("holdout",)),
    ("report.splits", ("train", "validation")),  # A report needs the metrics of all splits.
]


@pytest.mark.parametrize(("key", "value"), INVALID)
def test_an_invalid_value_is_one_line_with_its_key(key, value):
    config = default.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError) as error:
        schema.validate(config, num_devices=4)
    assert str(error.value).startswith(f"config.{key}: must")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("key", schema.keys("cnn"))
def test_a_wrong_type_and_a_missing_key_are_errors(key):
    config = default.get_config()
    section, _, name = key.rpartition(".")
    owner = config[section] if section else config
    with config.ignore_type():
        owner[name] = {"a"}
    with pytest.raises(ConfigError, match=rf"config\.{key}: must be .* got {{'a'}}"):
        schema.validate(config, num_devices=1)
    del owner[name]
    with pytest.raises(ConfigError, match=rf"config\.{key}: is missing"):
        schema.validate(config, num_devices=1)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimizer.learning_rat", "; did you mean optimizer.learning_rate?"),
        ("train.batchsize", "; did you mean train.batch_size?"),
        ("zzz", ""),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(key, hint):
    config = default.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({key: 1}) if "." not in key else setattr(
            config[key.split(".")[0]], key.split(".")[1], 1
        )
    with pytest.raises(ConfigError) as error:
        schema.validate(config, num_devices=1)
    assert str(error.value) == f"config.{key}: there is no such key{hint}"


@pytest.mark.parametrize(
    ("value", "expected"), [(64, (64, 64)), ((64,), (64, 64)), ([32, 64], (32, 64))]
)
def test_an_image_size_may_be_one_side(value, expected):
    config = default.get_config()
    with config.ignore_type():
        config.data.image_size = value
    schema.validate(config, num_devices=1)
    assert schema.image_size(config) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch_size": 30}, r"batch_size: must be a multiple of the 4 devices"),
        ({"mesh.model": 3}, r"mesh\.model: must divide the number of devices, 4, got 3"),
        ({"mesh.data": 4, "mesh.model": 2}, r"4 devices with mesh\.model = 2 make 2, got 4"),
        (
            {"train.accumulation_steps": 3},
            r"of the 4 devices that share a batch times train\.accumulation_steps = 3, got 32",
        ),
        (
            {"optimizer.algorithm": "adamw"},
            r"weight_decay: must be above 0 with optimizer\.algorithm=adamw, such as 0\.01, got 0",
        ),
        (
            {"optimizer.warmup_epochs": 5, "optimizer.decay_epochs": 5},
            r"warmup_epochs: must be below optimizer\.decay_epochs = 5, got 5",
        ),
        ({"data.image_size": (18, 20)}, "image_size: must be a multiple of 4 .*, got 18 x 20$"),
        ({"model.name": "resnet1"}, "must be one of .*, got 'resnet1'; did you mean resnet18"),
    ],
)
def test_wrong_or_contradicting_values_are_refused(changes, message):
    config = default.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        schema.validate(config, num_devices=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"augment.mixup_probability": 0.7, "augment.cutmix_probability": 0.4},
            r"augment\.cutmix_probability: must be at most 1 - augment\.mixup_probability = 0\.3, "
            r"got 0\.4",
        ),
        (
            {"augment.mixup_probability": 0.1, "train.accumulation_steps": 32},
            r"train\.batch_size: must be at least twice train\.accumulation_steps = 32, so that "
            "each image can be mixed with another one, got 32",
        ),
    ],
)
def test_impossible_mixing_is_refused(changes, message):
    config = default.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        schema.validate(config, num_devices=1)


@pytest.mark.parametrize("mixup", [0.0, 0.07, 0.35, 1.0])
def test_all_images_may_be_mixed(mixup):
    config = default.get_config()
    config.update_from_flattened_dict(
        {
            "augment.mixup_probability": mixup,
            "augment.cutmix_probability": 1 - mixup,
            "train.accumulation_steps": 16,
        }
    )
    schema.validate(config, num_devices=1)


def test_a_mesh_that_fits_the_devices_is_accepted():
    config = default.get_config()
    config.update_from_flattened_dict(
        {"mesh.data": 2, "mesh.model": 2, "train.accumulation_steps": 16}
    )
    schema.validate(config, num_devices=4)


def test_automatic_values_are_decided_once():
    config = default.get_config()
    first = resolve(config)
    assert (first.precision, first.optimizer.decay_epochs) == ("float32", 22)
    previous = {"precision": "bfloat16", "augment.place": "device", "optimizer.decay_epochs": 7}
    later = resolve(config, previous)
    assert (later.precision, later.optimizer.decay_epochs) == ("bfloat16", 7)
    assert later.augment.place == "device"
    config.precision, config.optimizer.decay_epochs = "float32", 9
    explicit = resolve(config, previous)
    assert (explicit.precision, explicit.optimizer.decay_epochs) == ("float32", 9)
    assert schema.digest(explicit) == schema.digest(explicit.copy_and_resolve_references())
    assert schema.digest(explicit) != schema.digest(later)


@pytest.mark.parametrize(("key", "declared"), schema.keys().items())
def test_the_default_of_a_key_passes_its_check(key, declared):
    assert declared.accepts(declared.default), key
    assert re.fullmatch(r"[^\n]{10,}\.", declared.comment), f"{key} needs a sentence"


def test_the_last_word_of_each_key_is_unique():
    """`cnn_jax.train(path, name="cnn")` names a key by its last word."""
    words = [name.rpartition(".")[2] for name in list(schema.keys())]
    assert len(words) == len(set(words))


def test_the_keys_of_a_network_are_the_fields_of_its_module():
    for name, network in NETWORKS.items():
        model = make_model(schema.default_config(name).model.to_dict(), 3, "float32")
        fields = {field.name for field in dataclasses.fields(model)}
        assert set(network.keys) - {"pretrained"} <= fields - {"num_classes", "dtype", "name"}


@pytest.fixture
def other_network(monkeypatch):
    """A second network, which has an invented key and, like the first network, a key "dropout"."""
    keys = {
        "invented_blocks": integer(2, "Residual blocks.", low=1),
        "dropout": number(0.0, "The dropped fraction.", "below 1", lambda v: v < 1),
    }
    other = NetworkEntry(
        "nowhere:Other", keys, size_divisor=lambda section: 2 ** section["invented_blocks"]
    )
    monkeypatch.setitem(NETWORKS, "other", other)
    monkeypatch.setitem(
        schema._SECTIONS["model"], "name", choice("cnn", "The network.", tuple(NETWORKS))
    )
    schema.keys.cache_clear()
    yield
    monkeypatch.undo()
    schema.keys.cache_clear()


def test_another_network_has_its_own_keys(other_network):
    config = files.load(
        "default", ["--config.model.invented_blocks=3", "--config.model.name=other"]
    )
    assert config.model.to_dict() == {"name": "other", "invented_blocks": 3, "dropout": 0.0}
    schema.validate(config, num_devices=1)
    config.data.image_size = (36, 36)
    with pytest.raises(ConfigError, match="must be a multiple of 8"):
        schema.validate(config, num_devices=1)


def test_a_refused_key_names_the_networks_that_have_it(other_network, monkeypatch):
    monkeypatch.setitem(NETWORKS, "second", NETWORKS["other"])
    with pytest.raises(ConfigError, match=r"; the networks other, second have it: set model\.name"):
        schema.check_key("model.invented_blocks", "cnn")
    for name in ("third", "fourth", "fifth"):
        monkeypatch.setitem(NETWORKS, name, NETWORKS["other"])
    with pytest.raises(ConfigError, match="; the networks other, second, third and 2 more have it"):
        schema.check_key("model.invented_blocks", "cnn")


def test_a_key_of_another_network_is_refused(other_network, tmp_path):
    own = "model.features, model.dense, model.dropout, model.batch_norm"
    message = (
        f"config.model.invented_blocks: the network cnn has no such key; it has {own}; "
        "the network other has it: set model.name=other"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        files.load("default", ["--config.model.invented_blocks=3"])
    config = files.load("default", ["--config.model.name=other"])
    with config.unlocked():
        config.model.features = (1,)
    with pytest.raises(
        ConfigError, match=r"the network other has no such key; it has model\.invented_blocks"
    ):
        schema.validate(config, num_devices=1)
    path = tmp_path / "config.json"
    path.write_text(schema.default_config("other").to_json())
    assert files.load(str(path)).model.to_dict() == {
        "name": "other",
        "invented_blocks": 2,
        "dropout": 0.0,
    }
    with pytest.raises(ConfigError, match=r"model\.name: must be one of cnn, .*other, got 'third'"):
        files.load("default", ["--config.model.name=third"])
