import importlib.util
import os
import pathlib
import shutil
import sys

import pytest
from registry_tools import aliases, figures, outline, vary

from cnn_jax.inference.bundle import digest
from cnn_jax.registry import __main__ as command
from cnn_jax.registry import mlflow
from cnn_jax.registry.ledger import RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.system.errors import BundleError, ConfigError

pytest_plugins = ["registry_fixtures"]
needs_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed"
)


@pytest.fixture
def registry(bundle, tmp_path):
    """A registry with versions 1 and 3 of a model. Alias champion is at 3; alias mine is at 1."""
    registry = Registry(tmp_path / "registry")
    for i in range(3):
        path = vary(bundle, tmp_path / str(i), metrics=figures(0.5 + i / 10, f1=0.25))
        registry.add("flowers", path, f"note {i}")
    registry.remove("flowers", 2)
    registry.promote("flowers", 3)
    registry.promote("flowers", 1, "mine")
    return registry


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """An empty MLflow database; all tests share this file, because its creation takes seconds."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture
def uri(empty, tmp_path, monkeypatch):
    """The URI of a copy of the empty MLflow database; artifacts are stored in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{shutil.copy(empty, tmp_path / 'mlflow.db')}"


@pytest.fixture
def client(uri):
    import mlflow

    return mlflow.MlflowClient(uri, uri)


def test_a_missing_mlflow_is_reported_with_the_command(registry, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for call in (mlflow.export_versions, mlflow.import_versions):
        with pytest.raises(ConfigError, match=r"^--mlflow needs mlflow, .*pip install 'cnn_jax\["):
            list(call(registry, "flowers", None, "sqlite:///mlflow.db"))


def test_the_mlflow_uri_is_required(registry, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("export", "import"):
        with pytest.raises(ConfigError, match=r"^--mlflow is required, unless \$MLFLOW_TRA"):
            command.main([name, "flowers", f"--registry={registry.url}"])


def test_an_unknown_version_is_not_exported(registry):
    with pytest.raises(RegistryError, match="there is no model birds"):
        list(mlflow.export_versions(registry, "birds", None, "sqlite:///mlflow.db"))
    with pytest.raises(RegistryError, match=r"has no version 2 \(it was removed\)"):
        list(mlflow.export_versions(registry, "flowers", 2, "sqlite:///mlflow.db"))


@needs_mlflow
def test_all_versions_survive_a_round_trip(registry, uri, client, tmp_path, capsys):
    exported = [
        "exported flowers/1: it is flowers version 1 in MLflow",
        "flowers@mine is version 1 in MLflow",
        "exported flowers/3: it is flowers version 2 in MLflow",
        "flowers@champion is version 2 in MLflow",
    ]
    command.main(["export", "flowers", f"--mlflow={uri}", f"--registry={registry.url}"])
    assert capsys.readouterr().out.splitlines() == exported
    version = client.get_model_version_by_alias("flowers", "champion")
    assert version.tags["cnn_jax.digest"] == registry.resolve("flowers").bundle.digest
    assert version.tags["cnn_jax.version"] == "3"
    assert version.tags["test_accuracy"] == "0.7"
    assert version.description == "note 2"
    assert client.get_run(version.run_id).data.metrics == pytest.approx(
        {"test_accuracy": 0.7, "test_f1": 0.25}
    )
    again = list(mlflow.export_versions(registry, "flowers", None, uri))
    assert [" is already " in line for line in again] == [True, False] * 2
    assert len(client.search_model_versions("name = 'flowers'")) == 2

    other = Registry(tmp_path / "other")
    assert list(mlflow.import_versions(other, "flowers", None, uri)) == [
        "imported flowers version 1 as flowers/1",
        "flowers@mine is version 1",
        "imported flowers version 2 as flowers/2",
        "flowers@champion is version 2",
    ]
    digests = [registry.resolve("flowers", number).bundle.digest for number in (1, 3)]
    expected = ({1: digests[0], 2: digests[1]}, {"mine": (1,), "champion": (2,)}, 2)
    assert outline(other) == {"flowers": expected}
    other.fetch(other.resolve("flowers"), "unused")
    assert other.log[0].note == "version 1 of MLflow"
    command.main(["import", "flowers", f"--mlflow={uri}", f"--registry={other.url}"])
    assert all(" is already " in line for line in capsys.readouterr().out.splitlines())
    assert outline(Registry(other.url)) == {"flowers": expected}


@needs_mlflow
def test_one_version_survives_a_round_trip(registry, uri, tmp_path):
    lines = list(mlflow.export_versions(registry, "flowers", "champion", uri))
    assert lines[0] == "exported flowers/3: it is flowers version 1 in MLflow"
    assert len(lines) == 2
    for which in (1, "champion"):
        other = Registry(tmp_path / f"other-{which}")
        list(mlflow.import_versions(other, "flowers", which, uri))
        assert aliases(other) == {"champion": 1}


@needs_mlflow
def test_an_alias_not_allowed_by_the_target_is_skipped(registry, uri, client, tmp_path):
    registry.promote("flowers", 1, "a.b")
    lines = list(mlflow.export_versions(registry, "flowers", 1, uri))
    assert lines[1].startswith("skipped flowers@a.b: Invalid alias name: 'a.b'")
    assert lines[2] == "flowers@mine is version 1 in MLflow"
    client.set_registered_model_alias("flowers", "12", "1")
    other = Registry(tmp_path / "other")
    lines = list(mlflow.import_versions(other, "flowers", None, uri))
    assert lines[1].startswith("skipped flowers@12: alias: must not be a number")
    assert aliases(other) == {"mine": 1}


@needs_mlflow
def test_a_version_without_a_bundle_is_not_imported(registry, uri, client, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MLmodel").write_text("flavors: {}")
    client.create_registered_model("flowers")
    client.create_model_version("flowers", source=str(tmp_path / "model"))
    other = Registry(tmp_path / "other")
    with pytest.raises(BundleError, match=r"^MLflow has no bundle at flowers/1$"):
        list(mlflow.import_versions(other, "flowers", 1, uri))
    list(mlflow.export_versions(registry, "flowers", None, uri))
    lines = list(mlflow.import_versions(other, "flowers", None, uri))
    assert lines[0] == "skipped flowers version 1 of MLflow: it is not a bundle"
    assert len(other.models["flowers"].versions) == 2


@needs_mlflow
def test_a_bundle_damaged_in_mlflow_is_not_imported(registry, uri, client, tmp_path):
    list(mlflow.export_versions(registry, "flowers", 1, uri))
    version = client.get_model_version("flowers", "1")
    description = next(tmp_path.glob("mlruns/**/bundle.json"))
    description.chmod(0o644)
    text = description.read_text()
    other = Registry(tmp_path / "other")

    def bring():
        """Runs an import that must fail; returns the only line that the import yields."""
        lines = []
        with pytest.raises(
            BundleError, match=r"^not imported, because damaged: flowers version 1 of ML"
        ):
            # `extend` keeps the items that the import yields before the error.
            lines.extend(mlflow.import_versions(other, "flowers", None, uri))
        (line,) = lines
        return line

    start = "skipped flowers version 1 of MLflow: "
    for damaged in (text.replace("red", "rad"), "{"):
        description.write_text(damaged)
        assert bring() == f"{start}its digest differs from its tag cnn_jax.digest"
    description.unlink()
    assert bring() == f"{start}it has a tag cnn_jax.digest, but no bundle.json"
    description.write_text("{")
    client.delete_model_version_tag("flowers", version.version, "cnn_jax.digest")
    assert "is not a bundle" in bring()
    assert not (tmp_path / "other").exists()


def damage(path):
    path.chmod(0o644)
    path.write_bytes(b"x" + path.read_bytes()[1:])


@needs_mlflow
def test_a_damaged_version_does_not_stop_the_import(registry, uri, tmp_path, capsys):
    list(mlflow.export_versions(registry, "flowers", None, uri))
    first = registry.resolve("flowers", 1).bundle.digest
    for path in tmp_path.glob("mlruns/**/bundle.json"):
        if digest(path.parent) == first:
            damage(path.with_name("weights.safetensors"))
    place = tmp_path / "other"
    with pytest.raises(
        BundleError, match=r"^not imported, because damaged: flowers version 1 of MLflow$"
    ):
        command.main(["import", "flowers", f"--mlflow={uri}", f"--registry={place}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("skipped flowers version 1 of MLflow: ")
    assert lines[1:] == ["imported flowers version 2 as flowers/1", "flowers@champion is version 1"]
    assert aliases(Registry(place)) == {"champion": 1}


@needs_mlflow
def test_a_damaged_version_does_not_stop_the_export(registry, uri, client, capsys):
    damage(pathlib.Path(registry.url, registry.resolve("flowers", 1).bundle.path, "bundle.json"))
    with pytest.raises(BundleError, match=r"^not exported, because damaged: flowers/1$"):
        command.main(["export", "flowers", f"--mlflow={uri}", f"--registry={registry.url}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("skipped flowers/1: ")
    assert lines[1:] == [
        "exported flowers/3: it is flowers version 1 in MLflow",
        "flowers@champion is version 1 in MLflow",
    ]
    (experiment,) = client.search_experiments(filter_string="name = 'cnn_jax'")
    assert len(client.search_runs([experiment.experiment_id])) == 1


@needs_mlflow
def test_a_version_damaged_here_gets_no_alias(registry, uri, client, tmp_path):
    list(mlflow.export_versions(registry, "flowers", None, uri))
    client.set_registered_model_alias("flowers", "next", "1")
    damage(pathlib.Path(registry.url, registry.resolve("flowers", 1).bundle.path, "bundle.json"))
    lines = []
    with pytest.raises(
        BundleError, match=r"^not imported, because damaged: flowers version 1 of MLflow$"
    ):
        lines.extend(mlflow.import_versions(registry, "flowers", None, uri))
    assert lines[-1] == "flowers@champion is already version 3"
    assert "next" not in aliases(registry)


@needs_mlflow
def test_a_known_bundle_is_not_downloaded(registry, uri, monkeypatch):
    list(mlflow.export_versions(registry, "flowers", None, uri))

    def fail():
        raise AssertionError("it is not to be asked for")

    monkeypatch.setattr(mlflow, "_artifacts", fail)
    lines = list(mlflow.import_versions(registry, "flowers", None, uri))
    assert lines[0] == "flowers version 1 is already flowers/1"
    assert lines[2] == "flowers version 2 is already flowers/3"


@needs_mlflow
@pytest.mark.parametrize("flag", ["--no_aliases", "--no-aliases"])
def test_no_aliases_does_not_change_aliases(registry, uri, tmp_path, capsys, flag):
    list(mlflow.export_versions(registry, "flowers", None, uri))
    other = Registry(tmp_path / "other")
    command.main(["import", "flowers", f"--mlflow={uri}", f"--registry={other.url}", flag])
    assert capsys.readouterr().out.splitlines() == [
        "imported flowers version 1 as flowers/1",
        "imported flowers version 2 as flowers/2",
    ]
    assert aliases(other) == {}


@needs_mlflow
def test_an_invalid_database_is_one_error_line(registry, tmp_path, monkeypatch, caplog):
    """An error message has only one line, although SQLAlchemy's messages have several lines."""
    from mlflow.store.db import utils

    monkeypatch.setattr(utils, "MAX_RETRY_COUNT", 2)
    (tmp_path / "none.db").write_text("no database" * 100)
    uri = f"sqlite:///{tmp_path / 'none.db'}"
    for call in (mlflow.export_versions, mlflow.import_versions):
        with pytest.raises(RegistryError, match=f"^MLflow at {uri}: .*not a database") as raised:
            list(call(registry, "flowers", None, uri))
        assert "\n" not in str(raised.value)
    assert not [record for record in caplog.records if record.name.startswith("mlflow")]


@needs_mlflow
@pytest.mark.parametrize("error", [OSError, KeyError, RuntimeError])
def test_all_client_errors_are_one_line_without_password(registry, monkeypatch, error):
    class Client:
        def __getattr__(self, name):
            raise error("cannot connect to\npostgresql://ann:s3cret@host or ann:s3cret@host")

    monkeypatch.setattr(mlflow, "_client", lambda uri: Client())
    for call in (mlflow.export_versions, mlflow.import_versions):
        with pytest.raises(RegistryError) as raised:
            list(call(registry, "flowers", None, "postgresql://ann:s3cret@host"))
        message = str(raised.value)
        assert message.startswith("MLflow at postgresql://ann:***@host: ")
        assert message.count("***") == 3
        assert "s3cret" not in message
        assert "\n" not in message


@needs_mlflow
@pytest.mark.parametrize("value", [None, "true"])
def test_progress_bars_are_off_by_default(uri, monkeypatch, value):
    name = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    monkeypatch.setenv(name, value or "")
    if value is None:
        monkeypatch.delenv(name)
    mlflow._client(uri)
    assert os.environ[name] == (value or "false")


@needs_mlflow
@pytest.mark.parametrize(
    ("name", "which", "message"),
    [
        ("birds", None, "Registered Model with name=birds not found"),
        ("flowers", 7, "version=7.* not found"),
        ("flowers", "nobody", "alias nobody not found"),
    ],
)
def test_unknown_mlflow_names_are_one_error_line(registry, uri, client, name, which, message):
    client.create_registered_model("flowers")
    with pytest.raises(RegistryError, match=f"^MLflow at {uri}: .*{message}") as raised:
        list(mlflow.import_versions(registry, name, which, uri))
    assert "\n" not in str(raised.value)


@needs_mlflow
def test_a_missing_server_is_one_line_without_password(registry, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for call in (mlflow.export_versions, mlflow.import_versions):
        with pytest.raises(RegistryError) as raised:
            list(call(registry, "flowers", None, "http://user:s3cret@127.0.0.1:1"))
        message = str(raised.value)
        assert message.startswith("MLflow at http://user:***@127.0.0.1:1: ")
        assert "s3cret" not in message
        assert "\n" not in message
