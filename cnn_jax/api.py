"""Training and its results as Python functions and objects, for notebooks and scripts."""

import base64
import datetime
import functools
import html
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.cells import cell_len

from cnn_jax.config import files, schema
from cnn_jax.config.schema import SOURCE_PATTERN, Config, path_source
from cnn_jax.inference.bundle import find_bundle
from cnn_jax.inference.exported import load_predictor
from cnn_jax.inference.images import AnyImage, list_images, single_images
from cnn_jax.inference.predictor import Prediction, predict_batch
from cnn_jax.registry.mlflow import log_run, tracking_uri
from cnn_jax.report.run_report import report_after_training
from cnn_jax.system.compilation_cache import keep_compiled
from cnn_jax.system.console import Console, default_console
from cnn_jax.system.errors import ConfigError, Interrupted, UserError, is_url
from cnn_jax.system.runtime import keep_freed_memory
from cnn_jax.training import summary
from cnn_jax.training.backup import Backup
from cnn_jax.training.loop import train_and_evaluate
from cnn_jax.training.metrics import HEADLINE

logger = logging.getLogger(__name__)

# The largest number of predictions that a table shows.
_ROWS_SHOWN = 20
# The charts that a notebook shows for a report; `Report.figures` contains all charts.
_CHARTS_SHOWN = ("loss", "accuracy", "confusion")


def train(
    source: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | ConfigDict = "folder",
    workdir: str | os.PathLike[str] | None = None,
    backup: str | None = None,
    console: Console | None = None,
    mlflow: str | None = None,
    **changes: Any,
) -> "Run":
    """Trains and evaluates a classifier, and writes its bundle and report, like `cnn_jax train`.

    The same call with the same `workdir` continues an interrupted run. At the end, this function
    shows the test metrics and the path of the report.

    Args:
      source: A folder with one sub-folder for each class, a CSV file, or any value of
        `data.source`, such as "tfds:NAME"; by default the source of the configuration.
      config: The name of a shipped configuration, the path of a configuration file, or a
        configuration.
      workdir: The run's folder; by default a new folder below `runs`, whose path is shown.
      backup: The URL of a copy of the run's folder, such as s3://BUCKET/PATH. If the folder is
        missing on this machine, it is restored from the copy.
      console: The place where progress is shown; by default the notebook, or stderr.
      mlflow: The MLflow server or database to which the finished run is logged; by default the
        variable MLFLOW_TRACKING_URI. If MLflow reports an error, a warning is logged instead.
      **changes: New values of configuration keys: by the full key
        (`**{"data.image_size": 64}`), only by the name if it is unique (`image_size=64`), or
        by section (`data={"image_size": 64}`).

    Returns:
      The finished run.

    Raises:
      ConfigError: A key does not exist or cannot have this value, or the folder contains
        another run.
      DataError: The data cannot be used.
      TrainingError: Training cannot continue.
      Interrupted: Ctrl-C was pressed; the state is saved, and the message says how to continue.
    """
    if workdir is not None and is_url(os.fspath(workdir)):
        raise ConfigError(
            f"workdir: must be a folder, got {workdir}; backup={str(workdir)!r} keeps a copy of "
            "the folder there"
        )
    uri = tracking_uri(mlflow)
    new_config = _changed_config(config, changes, source)
    folder = pathlib.Path(workdir).expanduser() if workdir is not None else _new_folder(new_config)
    console = console or default_console()
    keep_freed_memory()
    keep_compiled()
    try:
        copy = None if backup is None else Backup(backup)
        train_and_evaluate(new_config, folder, console, backup=copy)
        page_or_command = report_after_training(folder, new_config, console)
        if copy is not None:
            copy.copy()  # The report is new.
    except KeyboardInterrupt as error:
        progress = str(error).partition(";")[0] or "interrupted"
        message = f"{progress}; the same call with workdir={str(folder)!r} continues"
        # "from None" omits the cause, so that a script shows one traceback, which ends with the
        # message.
        raise Interrupted(message) from None
    run = Run(folder, folder / "bundle")
    console.facts(_results(run, page_or_command))
    if uri is not None:
        try:
            console.facts({"mlflow": log_run(folder, uri)})
        except UserError as error:
            logger.warning("the run is not logged: %s; the same call tries it again", error)
    return run


def _results(run: "Run", page_or_command: str) -> dict[str, str]:
    """Returns the lines shown after training: the test metrics, and the report's path or command.

    Args:
      run: The finished run.
      page_or_command: The path of the report, or the command that writes it.
    """
    lines = {"report": page_or_command}
    if test := run.metrics.get("test"):
        lines = {"test": summary.describe_metrics(test)} | lines
    return lines


def _changed_config(
    config: str | os.PathLike[str] | ConfigDict,
    changes: Mapping[str, Any],
    source: str | os.PathLike[str] | None,
) -> Config:
    """Returns a copy of a configuration in which some keys have new values.

    Raises:
      ConfigError: A key does not exist, or the configuration cannot be read.
    """
    changed: Config
    if isinstance(config, ConfigDict):
        changed = config.copy_and_resolve_references()
    else:
        changed = files.load(os.fspath(config))
    values = {schema.full_key(k): v for k, v in schema.flat(dict(changes)).items()}
    if source is not None:
        values["data.source"] = _source(source)
    network = values.get("model.name", changed.model.name)
    schema.check_value("model.name", network)
    with changed.ignore_type(), changed.unlocked():
        if network != changed.model.name:
            changed.model = files.network_section(network, changed.model)
        changed.update_from_flattened_dict(values)
    return changed


def _source(source: str | os.PathLike[str]) -> str:
    """Converts a path to a value of `data.source`; a value such as "tfds:NAME" is unchanged.

    Raises:
      ConfigError: The text is a value of `data.source` and also the name of a file or folder.
    """
    text = os.fspath(source)
    if isinstance(source, str) and SOURCE_PATTERN.fullmatch(text):
        if os.path.lexists(text):
            raise ConfigError(
                f"source: {text!r} is the name of a source, and a file or folder here "
                f"has the same name: write ./{text} or {path_source(text)} for what is here, and "
                f"data={{'source': {text!r}}} for the source"
            )
        return text
    return path_source(text)


def _new_folder(config: Config) -> pathlib.Path:
    """Returns the path of a new folder below `runs`, named after the data and the time."""
    path = pathlib.Path(config.data.source.partition(":")[2] or config.data.source)
    name = re.sub(r"[^\w.-]+", "-", path.absolute().stem)
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = pathlib.Path("runs") / f"{name}-{time}"
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def load(path: str | os.PathLike[str]) -> "Run":
    """Loads a finished run, a bundle, an ensemble or an ONNX export.

    Args:
      path: The folder of the run or of the bundle.

    Raises:
      BundleError: The folder has no bundle, or the bundle is damaged.
    """
    bundle = find_bundle(pathlib.Path(path).expanduser()).absolute()
    is_in_run = bundle.name == "bundle" and (bundle.parent / "config.json").is_file()
    return Run(bundle.parent if is_in_run else None, bundle)


class Run:
    """A finished run: its network, metrics and report.

    Attributes:
      workdir: The folder of the run; None for a bundle without a run.
      bundle: The folder of the bundle.
      predictor: The calibrated network.
    """

    def __init__(self, workdir: pathlib.Path | None, bundle: pathlib.Path):
        self.workdir = workdir and workdir.absolute()
        self.bundle = bundle.absolute()
        self.predictor = load_predictor(bundle)

    @property
    def class_names(self) -> list[str]:
        """The class names; the i-th name belongs to the i-th probability of each prediction."""
        return self.predictor.class_names

    @functools.cached_property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """The metrics of each split: "accuracy", "precision", "recall", "f1", "loss", ...

        Raises:
          OSError: The files of the run no longer exist.
        """
        if self.workdir is None:
            return _read_json(self.bundle / "bundle.json")["metrics"]
        metrics = _read_json(self.workdir / "report" / "metrics.json")
        return {
            split: metrics[split] for split in ("train", "validation", "test") if split in metrics
        }

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records in `metrics.jsonl`, one for each epoch; [] if there is only a bundle."""
        if self.workdir is None:
            return []
        lines = (self.workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def report(self) -> "Report":
        """The HTML report of the run and its charts.

        Raises:
          ConfigError: The report has not been written.
        """
        folder = self.workdir / "report" if self.workdir is not None else None
        if folder is None or not (folder / "index.html").is_file():
            where = self.bundle if self.workdir is None else self.workdir
            raise ConfigError(
                f"{where} has no report; cnn_jax report --run=RUN writes the report of a run"
            )
        return Report(folder, self)

    def predict(self, images: AnyImage | Iterable[AnyImage]) -> "Predictions":
        """Predicts the classes of images of any kind and size.

        An unreadable image gets an error and does not affect the other images.

        Args:
          images: A folder of images, one image or several images, as for `predict_batch`.

        Raises:
          DataError: The folder has no images.
          TypeError: `images` is neither an image nor an iterable of images.
        """
        if isinstance(images, str | os.PathLike) and pathlib.Path(images).expanduser().is_dir():
            images = list_images(pathlib.Path(images).expanduser())
        names: list[str] = []

        def collect_names() -> Iterator[AnyImage]:
            for number, image in enumerate(single_images(images)):
                is_path = isinstance(image, str | os.PathLike)
                names.append(str(image) if is_path else f"image {number}")
                yield image

        return Predictions(predict_batch(self.predictor, collect_names()), names, self.class_names)

    def __repr__(self) -> str:
        where = str(self.bundle if self.workdir is None else self.workdir)
        test = self.metrics.get("test")
        result = f", test accuracy {test['accuracy']:.2%}" if test else ""
        return f"<Run {where!r}: {len(self.class_names)} classes{result}>"

    def _repr_html_(self) -> str:
        rows = [
            [split, *(f"{metrics[key]:.4f}" for key in HEADLINE if key in metrics)]
            for split, metrics in self.metrics.items()
        ]
        keys = [key for key in HEADLINE if all(key in m for m in self.metrics.values())]
        return f"<p>{html.escape(repr(self)[1:-1])}</p>" + _table(["", *keys], rows)


class Predictions(list[Prediction]):
    """Predictions in the order of the images; a notebook shows them as a table.

    Attributes:
      names: The path or number of each image.
      class_names: The names of the classes, in the order of `Prediction.probabilities`.
    """

    def __init__(self, predictions: Iterable[Prediction], names: list[str], class_names: list[str]):
        super().__init__(predictions)
        self.names = names
        self.class_names = class_names

    def _columns(self) -> list[str]:
        """Returns the column titles of the table: "image", "predicted", "second" and "third".

        With fewer than three classes, there are fewer columns.
        """
        ranks = ["predicted", "second", "third"]
        return ["image", *ranks[: len(self.class_names)]]

    def _rows(self) -> list[list[str]]:
        rows = []
        for name, prediction in zip(self.names[:_ROWS_SHOWN], self, strict=False):
            if prediction.probabilities is None:
                blanks = [""] * (len(self._columns()) - 2)
                rows.append([name, f"error: {prediction.error}", *blanks])
                continue
            order = np.argsort(-prediction.probabilities, kind="stable")[:3]
            shown = [f"{self.class_names[i]} {prediction.probabilities[i]:.1%}" for i in order]
            rows.append([name, *shown, *[""] * (len(self._columns()) - 1 - len(shown))])
        return rows

    def _rest(self) -> str:
        """Returns a line that says how many predictions the table does not show."""
        return f"... {len(self) - _ROWS_SHOWN} more" if len(self) > _ROWS_SHOWN else ""

    def __repr__(self) -> str:
        rows = self._rows()
        widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell + " " * (width - cell_len(cell))
                for cell, width in zip(row, widths, strict=True)
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, self._rest()]).rstrip() or "no predictions"

    def _repr_html_(self) -> str:
        return _table(self._columns(), self._rows()) + self._rest()


class Figure:
    """A chart of a report; a notebook shows the chart as a picture.

    Attributes:
      path: The PNG file.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __repr__(self) -> str:
        return f"<Figure {str(self.path)!r}>"

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


class Report:
    """The HTML report of a run and its charts.

    Attributes:
      path: The HTML page; it contains all its pictures.
      figures: The charts, by name.
    """

    def __init__(self, folder: pathlib.Path, run: Run):
        self.path = folder / "index.html"
        charts = sorted(path for path in folder.glob("*.png") if not path.stem.endswith("_dark"))
        self.figures = {path.stem: Figure(path) for path in charts}
        self._run = run

    def __repr__(self) -> str:
        test = self._run.metrics.get("test")
        result = f", test accuracy {test['accuracy']:.2%}" if test else ""
        return f"<Report {str(self.path)!r}{result}>"

    def _repr_html_(self) -> str:
        pictures = "".join(
            f'<img alt="{name}" style="max-width: 32%" src="data:image/png;base64,'
            f'{base64.b64encode(self.figures[name]._repr_png_()).decode()}">'
            for name in _CHARTS_SHOWN
            if name in self.figures
        )
        return f"{self._run._repr_html_()}{pictures}<p>{html.escape(str(self.path))}</p>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns an HTML table whose first row contains the column titles."""

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _read_json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
