"""Tests of `cnn_jax.train`, `cnn_jax.load` and the objects that they return, also in a notebook."""

import base64
import html
import io
import json
import signal
import threading
import traceback

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len

import cnn_jax
from cnn_jax import api
from cnn_jax.config import schema
from cnn_jax.inference.predictor import Prediction
from cnn_jax.registry.ledger import RegistryError
from cnn_jax.system import signals
from cnn_jax.system.console import Console, NotebookConsole
from cnn_jax.system.errors import BundleError, ConfigError, DataError, Interrupted
from configs import default

_TINY = {
    "data.image_size": 16,
    "data.stratify": "exact",
    "model.features": (4, 8),
    "model.dense": 16,
    "train.batch_size": 8,
}


class _Recorder(Console):
    """A silent console that records the names and values of a run's table."""

    def __init__(self):
        super().__init__(is_silent=True)
        self.shown = {}

    def facts(self, rows):
        self.shown |= rows


@pytest.fixture(scope="module")
def console():
    return _Recorder()


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory, console):
    workdir = tmp_path_factory.mktemp("api") / "run"
    report = {"detail": "figures"}
    return cnn_jax.train(
        image_folder, workdir=workdir, console=console, epochs=3, report=report, **_TINY
    )


def test_a_run_has_the_requested_configuration(trained, image_folder):
    config = json.loads((trained.workdir / "config.json").read_text())
    assert config["data"]["source"] == f"folder:{image_folder}"
    assert config["data"]["image_size"] == [16, 16]
    assert (config["train"]["epochs"], config["report"]["detail"]) == (3, "figures")
    assert config["model"]["features"] == [4, 8]
    assert config["data"]["mean"] == [127.5] * 3  # The default in configs/default.py.
    assert trained.class_names == ["blue", "green", "red"]
    assert set(trained.metrics) == {"train", "validation", "test"}
    assert [record["epoch"] for record in trained.history] == [1, 2, 3]
    accuracy = trained.metrics["test"]["accuracy"]
    assert repr(trained) == (
        f"<Run {str(trained.workdir)!r}: 3 classes, test accuracy {accuracy:.2%}>"
    )
    assert f"<td>{accuracy:.4f}</td>" in trained._repr_html_()


def test_training_shows_the_time_of_the_steps_after_it(trained, console):
    facts = json.loads((trained.workdir / "report" / "metrics.json").read_text())["run"]
    assert console.shown["time"] == facts["time"]["words"]


def test_training_ends_with_the_test_metrics_and_the_report(trained, console):
    accuracy = trained.metrics["test"]["accuracy"]
    assert console.shown["test"].startswith(f"accuracy {accuracy:.2%}  precision ")
    assert console.shown["report"] == str(trained.report.path)
    assert repr(trained.report) == (
        f"<Report {str(trained.report.path)!r}, test accuracy {accuracy:.2%}>"
    )


def test_two_classes_have_no_third_prediction():
    predictions = [
        Prediction("dog", 0.75, np.array([0.75, 0.25])),
        Prediction(None, None, None, "cannot be read"),
    ]
    table = api.Predictions(predictions, ["a.png", "b.png"], ["dog", "cat"])._repr_html_()
    assert "<th>second</th></tr>" in table
    assert "third" not in table
    assert table.count("<td>") == 6


def test_training_keeps_freed_memory(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(api, "keep_freed_memory", lambda: calls.append("kept"))
    with pytest.raises(DataError):
        cnn_jax.train("nowhere", workdir=tmp_path / "run", console=Console(is_silent=True))
    assert calls == ["kept"]


def test_columns_of_predictions_are_aligned_on_a_terminal():
    names = ["猫.png", "a long name.png"]
    found = [Prediction("犬", 0.75, np.array([0.75, 0.25])) for _ in names]
    lines = repr(api.Predictions(found, names, ["犬", "cat"])).splitlines()
    starts = [[cell_len(line[: line.index(word)]) for word in ("犬", "cat")] for line in lines]
    assert starts[0] == starts[1]


def test_predictions_are_shown_as_a_table(trained, image_folder):
    paths = sorted(image_folder.glob("*/*.png"))
    assert len(trained.predict(image_folder)) == len(paths) == 60
    assert "... 40 more" in repr(trained.predict(image_folder))
    (one,) = trained.predict(paths[0])
    assert one.predicted in trained.class_names
    pixels = np.asarray(Image.open(paths[0]))
    for image in (str(paths[0]), paths[0].read_bytes(), Image.open(paths[0]), pixels):
        (same,) = trained.predict(image)
        np.testing.assert_array_equal(same.probabilities, one.probabilities)
    several = trained.predict(np.stack([pixels, pixels]))
    assert several.names == ["image 0", "image 1"]
    mixed = trained.predict(path for path in (paths[0], "<nowhere>.png"))
    assert f"{one.predicted} {one.confidence:.1%}" in repr(mixed).splitlines()[0]
    assert repr(mixed).splitlines()[1].startswith("<nowhere>.png")
    assert "error: No such file" in repr(mixed)
    assert "&lt;nowhere&gt;.png" in mixed._repr_html_()
    assert repr(trained.predict([])) == "no predictions"


def test_the_report_shows_its_charts(trained):
    report = trained.report
    assert report.path == trained.workdir / "report" / "index.html"
    assert {"loss", "accuracy", "confusion"} <= report.figures.keys()
    assert not any(name.endswith("_dark") for name in report.figures)
    picture = report.figures["loss"]._repr_png_()
    assert Image.open(io.BytesIO(picture)).format == "PNG"
    assert base64.b64encode(picture).decode() in report._repr_html_()
    assert html.escape(str(report.path)) in report._repr_html_()


def test_a_run_is_logged_to_mlflow_on_request(trained, image_folder, monkeypatch):
    logged, console = [], _Recorder()
    monkeypatch.setattr(api, "tracking_uri", lambda uri: uri)
    monkeypatch.setattr(api, "log_run", lambda *arguments: logged.append(arguments) or "run 1")
    options = {"epochs": 3, "report": {"detail": "figures"}, **_TINY}
    for uri in (None, "sqlite:///mlflow.db"):
        cnn_jax.train(image_folder, workdir=trained.workdir, console=console, mlflow=uri, **options)
    assert logged == [(trained.workdir, "sqlite:///mlflow.db")]
    assert console.shown["mlflow"] == "run 1"


def test_a_run_is_returned_although_mlflow_fails(trained, image_folder, monkeypatch, caplog):
    def fail(workdir, uri):
        raise RegistryError(f"MLflow at {uri}: no answer")

    monkeypatch.setattr(api, "tracking_uri", lambda uri: uri)
    monkeypatch.setattr(api, "log_run", fail)
    options = {"epochs": 3, "report": {"detail": "figures"}, **_TINY}
    run = cnn_jax.train(image_folder, workdir=trained.workdir, mlflow="http://x", **options)
    assert run.workdir == trained.workdir
    assert "the run is not logged: MLflow at http://x: no answer" in caplog.text


def test_a_run_or_a_bundle_is_loaded(trained, tmp_path):
    again = cnn_jax.load(trained.workdir)
    assert (repr(again), again.metrics) == (repr(trained), trained.metrics)
    assert cnn_jax.load(str(trained.bundle)).report.path == trained.report.path
    alone = _copied(trained.bundle, tmp_path / "b")
    bundle = cnn_jax.load(alone)
    accuracy = trained.metrics["test"]["accuracy"]
    assert bundle.metrics["test"]["accuracy"] == pytest.approx(accuracy)
    assert bundle.history == []
    with pytest.raises(ConfigError, match="has no report"):
        _ = bundle.report
    with pytest.raises(BundleError):
        cnn_jax.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="is a run without a bundle"):
        cnn_jax.load(tmp_path)


def _copied(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def _configured(config="folder", source=None, **changes):
    return schema.flat(api._changed_config(config, changes, source))


def test_keys_can_be_given_in_three_ways(tmp_path):
    for changes in (
        {"epochs": 3, "image_size": [16, 32]},
        {"train.epochs": 3, "data.image_size": (16, 32)},
        {"train": {"epochs": 3}, "data": {"image_size": (16, 32)}},
    ):
        values = _configured(**changes)
        assert (values["train.epochs"], values["data.image_size"]) == (3, (16, 32))
    config = default.get_config()
    assert _configured(config, epochs=3)["train.epochs"] == 3
    assert config.train.epochs == 22  # The caller's configuration is unchanged.
    assert _configured(source=tmp_path)["data.source"] == f"folder:{tmp_path}"
    assert _configured(source="t.CSV")["data.source"] == "csv:t.CSV"
    assert _configured(source="shapes:100")["data.source"] == "shapes:100"
    assert _configured("smoke")["data.source"] == "shapes:1000"


@pytest.mark.parametrize("source", ["shapes", "shapes:100", "tfds:mnist"])
def test_a_folder_named_like_a_source_is_an_error(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert api._source(source) == source
    (tmp_path / source).mkdir()
    with pytest.raises(ConfigError, match=f"write ./{source} or folder:{source} for") as error:
        cnn_jax.train(source)
    assert "\n" not in str(error.value)
    assert api._source(f"./{source}") == f"folder:./{source}"
    assert api._source(tmp_path / source) == f"folder:{tmp_path / source}"
    assert api._source(f"folder:{source}") == f"folder:{source}"
    assert _configured(data={"source": source})["data.source"] == source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, "epoch: there is no such key; did you mean epochs?"),
        ({"train.epoch": 3}, "did you mean train.epochs?"),
        ({"train": 3}, "config.train: is a section"),
        ({"config": "fodler"}, "did you mean folder?"),
    ],
)
def test_a_wrong_key_is_a_one_line_error(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        cnn_jax.train("nowhere", **changes)
    assert message in str(error.value)
    assert error.value._render_traceback_() == [f"ConfigError: {error.value}"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "kind"), [({}, DataError), ({"epochs": 0}, ConfigError), ({"flip": 3}, ConfigError)]
)
def test_a_failed_start_leaves_no_folder(changes, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind):
        cnn_jax.train("nowhere", **changes)
    assert not list(tmp_path.iterdir())


def test_the_default_folder_is_new_and_below_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = default.get_config()
    config.data.source = "folder:/data/my flowers/"
    first = api._new_folder(config)
    first.mkdir(parents=True)
    assert first.parent.name == "runs"
    assert first.name.startswith("my-flowers-20")
    assert api._new_folder(config) != first
    config.data.source = "shapes"
    assert api._new_folder(config).name.startswith("shapes-20")


def test_an_interruption_says_how_to_continue(image_folder, tmp_path, monkeypatch):
    listen = signals.listen
    # A deadline of 0.0 has already passed.
    monkeypatch.setattr(signals, "listen", lambda deadline: listen(0.0))
    with pytest.raises(Interrupted) as error:
        cnn_jax.train(image_folder, workdir=tmp_path / "run", console=Console(is_silent=True))
    assert f"the same call with workdir='{tmp_path / 'run'}' continues" in str(error.value)
    assert len(error.value._render_traceback_()) == 1
    assert "".join(traceback.format_exception(error.value)).count("Traceback") == 1
    assert not (tmp_path / "run").exists()


def test_another_thread_does_not_change_signal_handlers(image_folder, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    runs, console = [], Console(is_silent=True)

    def work():
        report = {"detail": "none"}
        workdir = tmp_path / "run"
        runs.append(
            cnn_jax.train(
                image_folder, workdir=workdir, console=console, epochs=1, report=report, **_TINY
            )
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert runs[0].workdir == tmp_path / "run"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_notebook_shows_one_short_output(monkeypatch):
    display = pytest.importorskip("IPython.display", reason="IPython is not installed")
    shown = []

    class Output:
        def update(self, content, raw):
            shown.append(content["text/plain"])

    monkeypatch.setattr(display, "display", lambda content, **flags: Output())
    console = NotebookConsole()
    record = {f"{s}_{m}": 0.5 for s in ("train", "validation") for m in ("loss", "accuracy", "f1")}
    list(console.track(range(10_000), "reading", 10_000))
    with console.training(300, 10) as training:
        training.start([], (), 0)
        for epoch in range(1, 301):
            training.step(10 * epoch, 0.5, 100.0)
            training.epoch(record | {"epoch": epoch, "images_per_second": 9.0}, is_best=False)
    lines = shown[-1].splitlines()
    assert len(lines) < 20
    assert "(290 earlier epochs)" in shown[-1]
    assert " 300/300" in lines[-1]
    assert len(shown) < 400


_NOTEBOOK = [
    "import cnn_jax\n"
    "run = cnn_jax.train(SOURCE, workdir='run', epochs=12, patience=12, "
    "report={'detail': 'figures'}, **TINY)",
    "run",
    "run.predict(SOURCE)",
    "run.report",
    "run.report.figures['confusion']",
    "cnn_jax.train('nowhere')",
    "import os, pathlib, signal, threading, time\n"
    "def interrupt():\n"
    "    while not pathlib.Path('long/metrics.jsonl').exists():\n"
    "        time.sleep(0.1)\n"
    "    os.kill(os.getpid(), signal.SIGINT)\n"
    "threading.Thread(target=interrupt).start()\n"
    "cnn_jax.train(SOURCE, workdir='long', epochs=100_000, patience=100_000, **TINY)",
    "'the kernel is alive'",
]


def test_training_in_a_real_notebook(image_folder, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    cells = [f"SOURCE, TINY = {str(image_folder)!r}, {_TINY!r}", *_NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    client = nbclient.NotebookClient(
        notebook, timeout=600, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [cell.outputs for cell in notebook.cells[1:]]
    training, run, predictions, report, figure, wrong, stopped, alive = outputs

    (progress,) = [output for output in training if output["output_type"] == "display_data"]
    # Apart from the progress, all output consists of warnings from libraries.
    assert sum(str(output).count("\\n") for output in training if output is not progress) < 10
    text = progress["data"]["text/plain"]
    assert text.count("\n") < 50
    assert "12/12" in text
    assert "(2 earlier epochs)" in text
    assert "results     run" in text
    for (shown,) in (run, predictions, report):
        assert "<table>" in shown["data"]["text/html"]
    assert predictions[0]["data"]["text/plain"].endswith("... 40 more")
    assert report[0]["data"]["text/html"].count("data:image/png;base64,") == 3
    assert base64.b64decode(figure[0]["data"]["image/png"]).startswith(b"\x89PNG")
    (error,) = [output for output in wrong if output["output_type"] == "error"]
    assert error["ename"] == "MissingDataError"
    assert len(error["traceback"]) == 1
    (error,) = [output for output in stopped if output["output_type"] == "error"]
    assert error["ename"] == "Interrupted"
    assert "continues" in error["traceback"][0]
    assert sum(str(output).count("\n") for output in stopped) < 60
    assert alive[0]["data"]["text/plain"] == "'the kernel is alive'"


def test_the_errors_to_catch_are_in_one_module():
    from cnn_jax import errors
    from cnn_jax.system import errors as own

    assert errors.UserError is own.UserError
    with pytest.raises(errors.BundleError, match="is not a bundle"):
        cnn_jax.load("nowhere")
