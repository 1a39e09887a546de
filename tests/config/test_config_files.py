"""Tests of configuration files, their imports, and flags."""

import json
import pathlib
import sys

import pytest
from conftest import REPOSITORY

from cnn_jax.config import files, schema
from cnn_jax.config.resolve import resolve
from cnn_jax.models import NETWORKS
from cnn_jax.system.errors import ConfigError

SHIPPED = REPOSITORY / "configs"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the working directory during the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _with_epochs(epochs: int, before: str = "from configs import default") -> str:
    return (
        f"{before}\ndef get_config():\n    config = default.get_config()\n"
        f"    config.train.epochs = {epochs}\n    return config\n"
    )


@pytest.mark.parametrize(
    "text", ["folder", "folder.py", "configs/folder.py", "configs/folder", str(SHIPPED / "folder")]
)
def test_a_shipped_configuration_is_found_from_any_directory(here, text):
    assert files.find(text).samefile(SHIPPED / "folder.py")
    assert files.read(files.find(text)).train.epochs == 45


def test_a_name_of_two_files_is_refused(here, monkeypatch):
    own = _write(here / "folder.py", _with_epochs(7))
    assert files.find("folder.py") == pathlib.Path("folder.py")
    assert files.find("./folder").samefile(own)
    with pytest.raises(ConfigError) as error:
        files.find("folder")
    assert "--config=./folder.py or --config=/" in str(error.value)
    _write(here / "other.py", _with_epochs(8))
    assert files.find("other") == pathlib.Path("other.py")
    # In the folder `configs`, ./folder.py and the configuration `folder` are one file, so the name
    # is not ambiguous.
    monkeypatch.chdir(SHIPPED)
    assert files.find("folder").samefile(SHIPPED / "folder.py")
    monkeypatch.setenv("HOME", str(here))
    assert files.find("~/other.py") == here / "other.py"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("fodler", "; did you mean folder?"),
        ("eurosta.py", "; did you mean eurosat?"),
        ("resnet", ""),
        ("elsewhere/folder.py", "; did you mean folder?"),
        ("./default", "; did you mean default?"),
    ],
)
def test_an_unknown_name_lists_the_shipped_files(here, text, hint):
    with pytest.raises(ConfigError) as error:
        files.find(text)
    assert str(error.value) == (
        f"--config: there is no file {text!r}; the shipped files are best, cifar10, default, "
        f"eurosat, fast, finetune, folder, probe, smoke, spec_224{hint}"
    )


def test_a_folder_without_a_run_is_refused(here):
    (here / "data").mkdir()
    with pytest.raises(ConfigError, match=r"'data' is a folder without a config\.json; the"):
        files.find("data")
    _write(here / "run" / "config.json", "{}")
    assert files.find("run") == pathlib.Path("run/config.json")


@pytest.mark.parametrize(
    "before",
    [
        "from configs import default",
        "from configs import folder as default",
        "import neighbour as default",
        "from . import neighbour as default",
        "from configs import neighbour as default",
        "from configs import above as default",
        "from configs.sub import neighbour as default",
        "from elsewhere import default",
        "from cnn_jax.config.schema import Config\nfrom configs import default",
    ],
)
@pytest.mark.parametrize("name", ["mine.py", "folder.py", "größer = 1.5.py"])
def test_a_file_in_any_folder_may_import_others(here, before, name):
    """A configuration may import from `configs`, its own folder, and the working directory."""
    folder = here / "a b" / "configs" / "sub"
    path = _write(folder / name, _with_epochs(3, before))
    _write(folder / "neighbour.py", _with_epochs(99))
    _write(folder.parent / "above.py", _with_epochs(98))
    _write(here / "elsewhere" / "default.py", _with_epochs(97))
    modules, paths = dict(sys.modules), list(sys.path)
    config = files.read(path)
    assert config.train.epochs == 3
    assert config.data.image_size == ((64, 64) if "folder" in before else (32, 32))
    assert sys.path == paths
    assert {name: sys.modules.get(name) for name in modules} == modules
    assert not {"neighbour", "configs.neighbour"} & sys.modules.keys()


def test_imports_of_two_folders_are_not_confused(here):
    for epochs in (3, 4):
        _write(here / str(epochs) / "base.py", _with_epochs(epochs))
        text = "import base\ndef get_config():\n    return base.get_config()\n"
        path = _write(here / str(epochs) / "mine.py", text)
        assert files.read(path).train.epochs == epochs


def test_a_link_imports_from_the_folder_of_its_target(here):
    target = _write(here / "there" / "mine.py", _with_epochs(5, "import base as default"))
    _write(here / "there" / "base.py", _with_epochs(1))
    (here / "link.py").symlink_to(target)
    assert files.read(here / "link.py").train.epochs == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "bad.py, line 1: SyntaxError: invalid syntax"),
        ("\0", "bad.py: SyntaxError: source code string cannot contain null bytes"),
        ("x = 1\n", "bad.py has no function get_config"),
        ("get_config = 3\n", "bad.py has no function get_config"),
        ("def get_config():\n    return {}\n", "ml_collections.ConfigDict, got dict"),
        ("def get_config():\n    return nothing\n", "bad.py, line 2: NameError: name 'nothing'"),
        ("import nothing_such\n", "bad.py, line 1: ModuleNotFoundError: No module named"),
        ("def get_config(x):\n    return x\n", "bad.py: TypeError: get_config() missing 1"),
        ("from .. import x\n", "bad.py, line 1: ImportError: attempted relative import"),
        ("raise SystemExit(0)\n", "bad.py, line 1: SystemExit: 0"),
        (_with_epochs(0).replace("train.epochs", "train.x.y"), "line 4: AttributeError"),
    ],
)
def test_a_failing_file_is_one_line_with_its_location(here, text, message):
    path = _write(here / "bad.py", text)
    with pytest.raises(ConfigError) as error:
        files.read(path)
    assert str(error.value).startswith("--config: ")
    assert message in str(error.value) or "null bytes" in message
    assert "\n" not in str(error.value)


def test_the_configuration_of_a_run_is_read_unchanged(here, tiny_config):
    resolved = resolve(tiny_config)
    path = _write(here / "config.json", resolved.to_json())
    again = files.load(str(path), ["--config.train.epochs=9"])
    assert (again.train.epochs, resolved.train.epochs) == (9, 3)
    again.train.epochs = 3
    assert schema.digest(again) == schema.digest(resolved)
    schema.validate(again, num_devices=1)


def test_missing_keys_get_defaults_with_a_warning(here, caplog):
    values = json.loads(schema.default_config().to_json())
    del values["train"]["monitor"]
    values["train"]["epochs"] = 5
    config = files.read(_write(here / "config.json", json.dumps(values)))
    assert (config.train.epochs, config.train.monitor) == (5, "validation_accuracy")
    (record,) = caplog.records
    assert "does not have train.monitor" in record.getMessage()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": {"imag_size": 3}}', "imag_size: there is no such key; did you mean data.image"),
        ('{"data": 3}', "config.data: is a section"),
        ("[1]", "is not a configuration: it must be an object"),
        ("{", "is not a configuration: Expecting property name"),
        ("[" * 100_000, "is not a configuration: "),
    ],
)
def test_invalid_json_configurations_are_refused(here, text, message):
    path = _write(here / "config.json", text)
    with pytest.raises(ConfigError, match=r"config\.json") as error:
        files.read(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--config.data.image_size=32", "--config.data.image_size=48"], "data.image_size", (48,)),
        (
            ["--config.model.features=4,8", "--config.model.features=(2,3)"],
            "model.features",
            (2, 3),
        ),
        (["--config.report.splits=('test',)"] * 2, "report.splits", ("test",)),
        (["--config.data.mean=1.,2.,3."] * 2, "data.mean", (1.0, 2.0, 3.0)),
        (["--config.train.epochs=3", "--config.train.epochs", "4"], "train.epochs", 4),
        (["--config.data.workers", "-1", "--config.seed=1"], "data.workers", -1),
        (["--config.model.batch_norm=True", "--config.model.batch_norm", "no"], None, None),
        (
            ["--config.model.batch_norm=False", "--config.model.batch_norm"],
            "model.batch_norm",
            True,
        ),
        (["--config.model.batch_norm", "false"], "model.batch_norm", False),
        (["--config.optimizer.l2=0", "--config.optimizer.l2=1e-3"], "optimizer.l2", 1e-3),
        (["--config.data.source=folder:/a=b c"], "data.source", "folder:/a=b c"),
        (["--config.data.group="], "data.group", ""),
    ],
)
def test_the_last_value_of_a_repeated_flag_is_used(flags, key, value):
    if key is None:
        with pytest.raises(ConfigError, match="batch_norm: must be True or False, got 'no'"):
            files.load("default", flags)
        return
    assert schema.flat(files.load("default", flags))[key] == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.train.epochs"], "config.train.epochs: needs a value; write --config.train.ep"),
        (["--config.train.epochs", "--config.seed=1"], "config.train.epochs: needs a value"),
        (["--config.train.epochs=3", "4"], "unexpected argument '4'; see --help"),
        (["--config.train"], "config.train: is a section"),
    ],
)
def test_a_flag_without_a_value_is_refused(flags, message):
    with pytest.raises(ConfigError) as error:
        files.read_overrides(flags)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.epoch", "train.epochs"),
        ("train.batchsize", "train.batch_size"),
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("epochs", "train.epochs"),
        ("data.seed", "seed"),
        ("augment.flips", "augment.flip"),
        ("model.drop_out", "model.dropout"),
        ("data.imagesize", "data.image_size"),
        ("report.detials", "report.detail"),
        ("augment.mixup", "augment.mixup_probability"),
        ("model.hidden_units", None),
        ("augment.copy_paste", None),
        ("optimizer.betas", None),
        ("train.criterion", None),
        ("data.root", None),
        ("data.path", None),
        ("mesh.pipeline", None),
        ("zzz", None),
        ("x.y.z", None),
    ],
)
def test_a_key_is_suggested_only_if_it_is_close(wrong, right):
    assert schema.closest_key(wrong) == right


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--wrokdir=x", "unexpected argument '--wrokdir=x'; did you mean --workdir=x?"),
        ("--confg", "unexpected argument '--confg'; did you mean --config?"),
        ("--epochs=3", "unexpected argument '--epochs=3'; did you mean --config.train.epochs=3?"),
        ("--data.group=x", "did you mean --config.data.group=x?"),
        ("--verbose", "unexpected argument '--verbose'; see --help"),
    ],
)
def test_a_wrong_flag_is_reported_before_a_missing_one(argument, message):
    parser = files.ConfigParser()
    parser.add_argument("--workdir", required=True)
    with pytest.raises(ConfigError) as error:
        parser.parse_with_overrides([argument])
    assert message in str(error.value)


@pytest.mark.parametrize("width", [58, 78, 118])
def test_help_has_every_key_with_its_default_and_a_comment(width):
    lines = files.describe_keys(width).splitlines()
    assert all(len(line) <= width for line in lines)
    for network in NETWORKS:
        for key, declared in schema.keys(network).items():
            section = key.rpartition(".")[0]
            is_own = section == "model" and key != "model.name" and network != "cnn"
            title = f"model (with model.name={network})" if is_own else section
            start = lines.index(title) if section else 0
            index = next(
                i for i, line in enumerate(lines) if i >= start and line.startswith(f"  {key} = ")
            )
            assert lines[index].endswith(f"= {declared.default!r}")
            assert lines[index + 1].startswith(" " * 6), f"{key} has no comment"


def test_another_network_keeps_the_values_that_a_file_sets():
    config = files.load("finetune", {"model.name": "resnet50", "model.dropout": "0.4"})
    own = files.load("finetune")
    assert config.model.pretrained == own.model.pretrained == "auto"
    assert config.model.dropout == 0.4
    assert "drop_path" not in config.model
    # The CNN's default dropout, 0.5, is replaced by the default of the ResNet.
    assert files.load("default", {"model.name": "resnet50"}).model.dropout == 0.0
