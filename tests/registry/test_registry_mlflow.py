import base64
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import free_port
from PIL import Image
from registry_tools import figures, vary

import cnn_jax
from cnn_jax.inference.predictor import BundlePredictor, predict_batch
from cnn_jax.registry import __main__ as command
from cnn_jax.registry import mlflow
from cnn_jax.registry.ledger import RegistryError
from cnn_jax.registry.pyfunc import PyfuncModel
from cnn_jax.registry.registry import Registry
from cnn_jax.system.errors import BundleError, ConfigError, DataError

pytest_plugins = ["registry_fixtures"]
needs_mlflow = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mlflow", "pandas"))),
    reason="mlflow or pandas is not installed",
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
    with pytest.raises(ConfigError, match=r"^--mlflow: .* needs mlflow.*pip install 'cnn_jax\["):
        export(registry, "sqlite:///mlflow.db")


def test_the_mlflow_uri_is_required(registry, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"^--mlflow is required, unless \$MLFLOW_TRA"):
        command.main(["export", "flowers", f"--registry={registry.url}"])


def test_an_onnx_export_needs_no_onnxruntime_on_this_machine(tmp_path, monkeypatch):
    (tmp_path / "bundle.json").write_text('{"export": {}}')
    version = mlflow.importlib.metadata.version

    def find(name):
        if name in ("onnxruntime", "pandas"):
            raise mlflow.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(mlflow.importlib.metadata, "version", find)
    requires = ["onnxruntime-gpu>=9", 'onnxruntime>=1.20; extra == "onnx"']
    monkeypatch.setattr(mlflow.importlib.metadata, "requires", lambda name: requires)
    found = mlflow._requirements(tmp_path)
    numpy = f"numpy=={np.__version__}"
    assert found == ["onnxruntime>=1.20", numpy, "pandas", f"cnn_jax=={cnn_jax.__version__}"]


@needs_mlflow
def test_a_failure_of_the_requirements_creates_no_run(registry, uri, client, monkeypatch):
    def fail(bundle):
        raise ConfigError("no requirements")

    monkeypatch.setattr(mlflow, "_requirements", fail)
    with contextlib.suppress(ConfigError):
        export(registry, uri)
    assert not client.search_runs([mlflow._experiment(client)])


def export(registry, uri, selector="champion"):
    return mlflow.export_version(registry, registry.resolve("flowers", selector), uri)


@needs_mlflow
def test_versions_are_exported_once(registry, uri, client, capsys):
    flags = [f"--mlflow={uri}", f"--registry={registry.url}"]
    command.main(["export", "flowers/1", *flags])
    command.main(["export", "flowers", *flags])
    assert capsys.readouterr().out.splitlines() == [
        "exported flowers/1: it is flowers version 1 in MLflow",
        "flowers@mine is version 1 in MLflow",
        "exported flowers/3: it is flowers version 2 in MLflow",
        "flowers@champion is version 2 in MLflow",
    ]
    version = client.get_model_version_by_alias("flowers", "champion")
    assert version.tags["cnn_jax.digest"] == registry.resolve("flowers").bundle.digest
    assert version.tags["cnn_jax.version"] == "3"
    assert version.tags["test_accuracy"] == "0.7"
    assert version.description == "note 2"
    assert client.get_run(version.run_id).data.metrics == pytest.approx(
        {"test_accuracy": 0.7, "test_f1": 0.25}
    )
    assert export(registry, uri) == [
        "flowers/3 is already flowers version 2 in MLflow",
        "flowers@champion is version 2 in MLflow",
    ]
    assert len(client.search_model_versions("name = 'flowers'")) == 2


def images():
    """Returns three PNG files of different sizes and colours."""
    files = []
    for size, colour in ((20, "red"), (16, "green"), (40, "blue")):
        file = io.BytesIO()
        Image.new("RGB", (size, size), colour).save(file, "PNG")
        files.append(file.getvalue())
    return files


def expected_probabilities(registry):
    predictor = BundlePredictor.load(registry.fetch(registry.resolve("flowers"), "unused"))
    return [prediction.probabilities for prediction in predict_batch(predictor, images())]


@needs_mlflow
@pytest.mark.parametrize("kind", ["database", "folder"])
def test_mlflow_loads_a_registered_version(registry, uri, tmp_path, monkeypatch, kind):
    import mlflow as library
    import pandas

    if kind == "folder":
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = (tmp_path / "store").as_uri()
    export(registry, uri)
    before = library.get_tracking_uri(), library.get_registry_uri()
    library.set_tracking_uri(uri)
    library.set_registry_uri(uri)
    try:
        model = library.pyfunc.load_model("models:/flowers@champion")
        requirements = library.pyfunc.get_model_dependencies("models:/flowers@champion")
    finally:
        library.set_tracking_uri(before[0])
        library.set_registry_uri(before[1])
    table = model.predict(pandas.DataFrame({"image": images()}))
    needed = [line.partition("==")[0] for line in pathlib.Path(requirements).read_text().split()]
    assert sorted(needed) == ["cnn_jax", "flax", "jax", "mlflow", "numpy", "pandas"]
    assert list(table.columns) == ["blue", "green", "red"]
    np.testing.assert_allclose(table.to_numpy(), expected_probabilities(registry), atol=1e-6)
    with pytest.raises(DataError, match=r"^the image in row 1 "):
        model.predict(pandas.DataFrame({"image": [images()[0], b"no image"]}))


@needs_mlflow
def test_a_client_cannot_name_a_file_of_the_server(registry, tmp_path):
    """MLflow passes the cells of a CSV body as texts, which `predict_batch` would open as paths."""
    path = tmp_path / "a.png"
    path.write_bytes(images()[0])
    model = PyfuncModel(BundlePredictor.load(registry.fetch(registry.resolve("flowers"), "unused")))
    for image, kind in [(str(path), "str"), (path, "PosixPath"), (None, "NoneType")]:
        with pytest.raises(DataError, match=f"^row 1 must be the bytes of an .* got {kind}$"):
            model.predict({"image": [images()[0], image]})


@needs_mlflow
def test_mlflow_serves_a_registered_version(registry, uri, tmp_path):
    export(registry, uri)
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager=local"]
    # MLflow starts the program `uvicorn`, which is beside the interpreter.
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [*command, "--model-uri=models:/flowers@champion", f"--port={port}", "--workers=1"],
        stdout=log,
        stderr=log,
        env=os.environ | {"PATH": path, "MLFLOW_TRACKING_URI": uri},
        start_new_session=True,  # MLflow starts the server in a process of its own.
    )
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/ping").close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.5)
        rows = [[base64.b64encode(image).decode()] for image in images()]
        body = {"dataframe_split": {"columns": ["image"], "data": rows}}
        request = urllib.request.Request(
            f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)["predictions"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()
    assert [list(row) for row in answer] == [["blue", "green", "red"]] * 3
    probabilities = [list(row.values()) for row in answer]
    np.testing.assert_allclose(probabilities, expected_probabilities(registry), atol=1e-6)


@pytest.fixture
def workdir(bundle, tmp_path):
    """The folder of a finished run, with the files that a run is logged from."""
    folder = tmp_path / "runs" / "first"
    shutil.copytree(bundle, folder / "bundle")
    (folder / "report").mkdir()
    (folder / "report" / "index.html").write_text("the report")
    final = {"accuracy": 0.75, "precision": 0.5, "recall": 0.5, "f1": 0.5, "loss": 1.5, "count": 8}
    metrics = dict.fromkeys(("train", "validation", "test"), final)
    (folder / "report" / "metrics.json").write_text(json.dumps(metrics))
    config = {"train": {"epochs": 2}, "data": {"split": [0.7, 0.2, 0.1], "source": "x" * 7000}}
    (folder / "config.json").write_text(json.dumps(config))
    records = [
        {"epoch": epoch, "step": 10 * epoch, "train_loss": 3.0 - epoch, "validation_accuracy": 0.5}
        for epoch in (1, 2)
    ]
    records[0]["train_loss"] = float("nan")
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    return folder


@needs_mlflow
def test_a_run_is_logged_once(workdir, uri, client):
    line = mlflow.log_run(workdir, uri)
    (experiment,) = client.search_experiments(filter_string="name = 'cnn_jax'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert line == f"{uri} run {run.info.run_id}"
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {
        "train.epochs": "2",
        "data.split": "(0.7, 0.2, 0.1)",
        "data.source": "x" * 6000,
    }
    history = client.get_metric_history(run.info.run_id, "validation_accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.5)]
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(2, 1.0)]
    assert run.data.metrics["test_accuracy"] == 0.75
    assert run.data.metrics["final_validation_loss"] == 1.5
    assert {"step", "epoch"}.isdisjoint(run.data.metrics)
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"model", "report"}
    assert mlflow.log_run(workdir, uri) == f"{uri} already has this run as {run.info.run_id}"
    assert len(client.search_runs([experiment.experiment_id])) == 1


@needs_mlflow
def test_a_logged_run_is_registered_without_a_second_copy(workdir, uri, client, tmp_path):
    mlflow.log_run(workdir, uri)
    registry = Registry(tmp_path / "registry")
    registry.add("flowers", workdir / "bundle")
    export(registry, uri, 1)
    (experiment,) = client.search_experiments(filter_string="name = 'cnn_jax'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert client.get_model_version("flowers", "1").run_id == run.info.run_id


@needs_mlflow
def test_an_exported_bundle_does_not_count_as_a_logged_run(workdir, uri, client, tmp_path):
    registry = Registry(tmp_path / "registry")
    registry.add("flowers", workdir / "bundle")
    export(registry, uri, 1)
    run_id = mlflow.log_run(workdir, uri).split()[-1]
    assert client.get_run(run_id).data.params["train.epochs"] == "2"
    assert client.get_model_version("flowers", "1").run_id != run_id


@needs_mlflow
def test_an_exported_bundle_can_be_added_again(registry, uri, client):
    from mlflow import artifacts

    export(registry, uri)
    location = client.get_model_version_download_uri("flowers", "1")
    folder = artifacts.download_artifacts(artifact_uri=location, tracking_uri=uri)
    added = registry.add("flowers", pathlib.Path(folder) / "data" / "bundle")
    assert (added.version.number, added.is_new) == (3, False)


@needs_mlflow
def test_a_run_that_is_not_logged_completely_is_logged_again(workdir, uri, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    records = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").unlink()
    with pytest.raises(RegistryError, match=f"^MLflow at {uri}: .*metrics.jsonl"):
        mlflow.log_run(workdir, uri)
    (workdir / "metrics.jsonl").write_text(records)
    mlflow.log_run(workdir, uri)
    (experiment,) = client.search_experiments(filter_string="name = 'mine'")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]


def test_the_tracking_uri_is_a_flag_or_a_variable(monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert mlflow.tracking_uri(None) is None
    assert mlflow.tracking_uri("http://flag") == "http://flag"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://variable")
    assert mlflow.tracking_uri(None) == "http://variable"
    assert mlflow.tracking_uri("http://flag") == "http://flag"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert mlflow.tracking_uri(None) is None
    (record,) = caplog.records
    assert "is not logged to $MLFLOW_TRACKING_URI, which needs mlflow" in record.getMessage()
    with pytest.raises(ConfigError, match=r"^--mlflow needs mlflow, .*pip install 'cnn_jax\[mlfl"):
        mlflow.tracking_uri("http://flag")


@needs_mlflow
def test_an_alias_not_allowed_by_mlflow_is_skipped(registry, uri):
    registry.promote("flowers", 1, "a.b")
    lines = export(registry, uri, 1)
    assert lines[1].startswith("skipped flowers@a.b: Invalid alias name: 'a.b'")
    assert lines[2] == "flowers@mine is version 1 in MLflow"


def damage(path):
    path.chmod(0o644)
    path.write_bytes(b"x" + path.read_bytes()[1:])


@needs_mlflow
def test_a_damaged_version_is_not_exported(registry, uri, client):
    damage(pathlib.Path(registry.url, registry.resolve("flowers").bundle.path, "bundle.json"))
    with pytest.raises(BundleError, match="is damaged"):
        export(registry, uri)
    assert not client.search_model_versions("name = 'flowers'")
    assert not client.search_runs([mlflow._experiment(client)])


@needs_mlflow
def test_an_invalid_database_is_one_error_line(registry, tmp_path, monkeypatch, caplog):
    """An error message has only one line, although SQLAlchemy's messages have several lines."""
    from mlflow.store.db import utils

    monkeypatch.setattr(utils, "MAX_RETRY_COUNT", 2)
    (tmp_path / "none.db").write_text("no database" * 100)
    uri = f"sqlite:///{tmp_path / 'none.db'}"
    with pytest.raises(RegistryError, match=f"^MLflow at {uri}: .*not a database") as raised:
        export(registry, uri)
    assert "\n" not in str(raised.value)
    assert not [record for record in caplog.records if record.name.startswith("mlflow")]


@needs_mlflow
@pytest.mark.parametrize("error", [OSError, KeyError, RuntimeError])
def test_all_client_errors_are_one_line_without_password(registry, monkeypatch, error):
    class Client:
        def __getattr__(self, name):
            raise error("cannot connect to\npostgresql://ann:s3cret@host or ann:s3cret@host")

    monkeypatch.setattr(mlflow, "_client", lambda uri: Client())
    with pytest.raises(RegistryError) as raised:
        export(registry, "postgresql://ann:s3cret@host")
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
def test_a_missing_server_is_one_line_without_password(registry, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError) as raised:
        export(registry, "http://user:s3cret@127.0.0.1:1")
    message = str(raised.value)
    assert message.startswith("MLflow at http://user:***@127.0.0.1:1: ")
    assert "s3cret" not in message
    assert "\n" not in message
