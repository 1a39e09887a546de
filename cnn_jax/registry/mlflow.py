"""Logs runs to MLflow, and registers versions of a registry as models of MLflow.

Each bundle is stored once, in an MLflow run, as a model of the flavor `python_function`; see
`registry.pyfunc`. The run has the digest of the bundle as a tag, so that it is found again. MLflow
assigns its own version numbers, which may differ from the numbers in the registry.

Log or export the same bundle from only one process at a time. Two processes at the same time could
store it twice.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import pathlib
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import cnn_jax
from cnn_jax.config import schema
from cnn_jax.registry.ledger import METRICS, RegistryError, Version
from cnn_jax.system.errors import ConfigError, UserError, error_line, hide_passwords

if TYPE_CHECKING:  # Importing obstore would delay each training run by 0.1 s.
    from cnn_jax.registry.registry import Registry

logger = logging.getLogger(__name__)

VARIABLE = "MLFLOW_TRACKING_URI"
_MODEL = "model"
_DIGEST_TAG = "cnn_jax.digest"
_VERSION_TAG = "cnn_jax.version"
_SOURCE_TAG = "mlflow.source.name"
_TRAINING, _EXPORT = "cnn_jax train", "cnn_jax registry export"
_MAX_PARAMS = 100  # MLflow's limit for one request.
_MAX_TEXT = 6000  # MLflow's limit for the value of a parameter, in characters.


def tracking_uri(flag: str | None) -> str | None:
    """Returns the MLflow server or database to which a run is logged, or None.

    Args:
      flag: The value of --mlflow; by default the variable MLFLOW_TRACKING_URI is used.

    Raises:
      ConfigError: The flag is given, but MLflow is not installed. If only the variable is set, a
        warning is logged instead, because the variable may be meant for other programs.
    """
    uri = flag or os.environ.get(VARIABLE) or None
    missing = [name for name in ("mlflow", "pandas") if importlib.util.find_spec(name) is None]
    if uri is None or not missing:
        return uri
    problem = f"needs {missing[0]}, which is not installed: pip install 'cnn_jax[mlflow]'"
    if flag:
        raise ConfigError(f"--mlflow {problem}")
    logger.warning("the run is not logged to $%s, which %s", VARIABLE, problem)
    return None


def log_run(workdir: str | os.PathLike[str], uri: str) -> str:
    """Logs a finished training run: parameters, metrics of each epoch, report and bundle.

    The MLflow experiment is $MLFLOW_EXPERIMENT_NAME, by default "cnn_jax".

    Args:
      workdir: The folder of the run.
      uri: MLflow's tracking URI.

    Returns:
      A line that says where the run is.

    Raises:
      BundleError: The run has no bundle.
      RegistryError: MLflow reports an error.
    """
    from cnn_jax.inference.bundle import digest

    workdir = pathlib.Path(workdir)
    with _one_line_errors(uri):
        client = _client(uri)
        bundle_digest = digest(workdir / "bundle")
        run = _find_run(client, bundle_digest, _TRAINING)
        if run is not None:
            return f"{hide_passwords(uri)} already has this run as {run.info.run_id}"
        name = workdir.resolve().name
        with _new_run(client, name, bundle_digest, workdir / "bundle", _TRAINING) as run_id:
            _log_params(client, run_id, schema.flat(_read_json(workdir / "config.json")))
            lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            for record in map(json.loads, lines):
                _log_metrics(client, run_id, record, record["epoch"])
            report = _read_json(workdir / "report" / "metrics.json")
            for split in ("train", "validation", "test"):
                final = {
                    f"{split}_{metric}": report.get(split, {}).get(metric) for metric in METRICS
                }
                # The metrics of each epoch already have the names train_... and validation_...
                prefix = "" if split == "test" else "final_"
                _log_metrics(client, run_id, {prefix + name: v for name, v in final.items()})
            client.log_artifacts(run_id, str(workdir / "report"), "report")
        return f"{hide_passwords(uri)} run {run_id}"


def _read_json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _log_params(client: Any, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    logged = [Param(name, str(value)[:_MAX_TEXT]) for name, value in params.items()]
    for start in range(0, len(logged), _MAX_PARAMS):
        client.log_batch(run_id, params=logged[start : start + _MAX_PARAMS])


def _log_metrics(client: Any, run_id: str, values: Mapping[str, Any], step: int = 0) -> None:
    """Logs the finite numbers among the values; "step" and "epoch" are the axis, not metrics."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    logged = [
        Metric(name, float(value), now, step)
        for name, value in values.items()
        if name not in ("step", "epoch") and type(value) in (int, float) and math.isfinite(value)
    ]
    client.log_batch(run_id, metrics=logged)


def export_version(registry: "Registry", version: Version, uri: str) -> list[str]:
    """Registers a version and its aliases in MLflow, under the name of its model.

    A version that MLflow already has is not registered again.

    Args:
      registry: The registry of the version.
      version: The version.
      uri: MLflow's tracking and registry URI.

    Returns:
      A line for the version, and a line for each alias.

    Raises:
      ConfigError: MLflow is not installed.
      BundleError: The version is damaged.
      RegistryError: MLflow reports an error.
    """
    name = version.model
    with _one_line_errors(uri):
        client = _client(uri)
        _create_model(client, name)
        found = client.search_model_versions(f"name = '{name}'")
        numbers = {v.tags.get(_DIGEST_TAG): str(v.version) for v in found}
        number = numbers.get(version.bundle.digest)
        lines = [f"{version} is already {name} version {number} in MLflow"]
        if number is None:
            number = _export_bundle(client, registry, version)
            lines = [f"exported {version}: it is {name} version {number} in MLflow"]
        aliases = registry.models[name].version_aliases(version.number)
        return lines + [_export_alias(client, name, alias, number) for alias in aliases]


def _create_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _export_bundle(client: Any, registry: "Registry", version: Version) -> str:
    """Registers a version, and stores its bundle in a new run unless a run already has it."""
    bundle = version.bundle
    metrics = {f"test_{metric}": bundle.test_metric(metric) for metric in METRICS}
    run = _find_run(client, bundle.digest)
    if run is None:
        with tempfile.TemporaryDirectory() as directory:
            folder = registry.fetch(version, directory)
            with _new_run(client, str(version), bundle.digest, folder, _EXPORT) as run_id:
                _log_metrics(client, run_id, metrics)
        run = client.get_run(run_id)
    created = client.create_model_version(
        version.model,
        source=f"{run.info.artifact_uri}/{_MODEL}",
        run_id=run.info.run_id,
        description=version.note or None,
        tags={
            _DIGEST_TAG: bundle.digest,
            _VERSION_TAG: str(version.number),
            **{metric: f"{value:.6g}" for metric, value in metrics.items() if value is not None},
        },
    )
    return str(created.version)


def _export_alias(client: Any, name: str, alias: str, number: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.set_registered_model_alias(name, alias, number)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        return f"skipped {name}@{alias}: {error_line(error)}"  # MLflow refuses some alias names.
    return f"{name}@{alias} is version {number} in MLflow"


def _find_run(client: Any, digest: str, source: str | None = None) -> Any:
    """Returns the finished MLflow run that has a bundle, or None.

    If `source` is given, only runs of this command are searched.
    """
    condition = f"tags.`{_DIGEST_TAG}` = '{digest}' and attributes.status = 'FINISHED'"
    if source is not None:
        condition += f" and tags.`{_SOURCE_TAG}` = '{source}'"
    return next(iter(client.search_runs([_experiment(client)], condition, max_results=1)), None)


def _experiment(client: Any) -> str:
    """Returns the id of the MLflow experiment; creates a missing experiment."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "cnn_jax"
    experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id if experiment else client.create_experiment(name)


@contextlib.contextmanager
def _new_run(
    client: Any, name: str, digest: str, bundle: pathlib.Path, source: str
) -> Iterator[str]:
    """Creates an MLflow run with a bundle; yields its id, and marks it as finished or failed."""
    requirements = _requirements(bundle)  # If this fails, no run is created.
    tags = {_DIGEST_TAG: digest, _SOURCE_TAG: source}
    run_id = client.create_run(_experiment(client), tags=tags, run_name=name).info.run_id
    status = "FAILED"
    try:
        with tempfile.TemporaryDirectory() as directory:
            # MLflow gives the copy the name of the folder.
            link = pathlib.Path(directory) / "bundle"
            link.symlink_to(bundle.resolve())
            _save_model(link, pathlib.Path(directory) / _MODEL, requirements)
            client.log_artifacts(run_id, str(pathlib.Path(directory) / _MODEL), _MODEL)
        yield run_id
        status = "FINISHED"
    finally:
        with contextlib.redirect_stdout(sys.stderr):  # MLflow prints the URL of the run to stdout.
            client.set_terminated(run_id, status)


def _requirements(bundle: pathlib.Path) -> list[str]:
    """Returns the packages that a bundle needs, in the form of pip.

    The requirement of a package is the version that is installed on this machine. If the package is
    not installed (such as onnxruntime, if onnxruntime-gpu is installed), the requirement is copied
    from the metadata of cnn_jax.
    """
    is_export = "export" in _read_json(bundle / "bundle.json")
    names = (*(("onnxruntime",) if is_export else ("jax", "flax")), "numpy", "pandas")
    return [*map(_requirement, names), f"cnn_jax=={cnn_jax.__version__}"]


def _requirement(name: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{name}=={importlib.metadata.version(name)}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in importlib.metadata.requires("cnn_jax") or ():
            if re.match(rf"{name}(?![\w.-])", requirement):
                return requirement.partition(";")[0].strip()
    return name


def _save_model(bundle: pathlib.Path, target: pathlib.Path, requirements: list[str]) -> None:
    """Writes a bundle as a model of MLflow's `python_function` flavor."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    from cnn_jax.registry import pyfunc

    names = _read_json(bundle / "bundle.json")["class_names"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow asks for an example of an input.
        mlflow.pyfunc.save_model(
            target,
            loader_module=pyfunc.__name__,
            data_path=str(bundle),
            pip_requirements=requirements,
            signature=ModelSignature(
                Schema([ColSpec(DataType.binary, pyfunc.COLUMN)]),
                Schema([ColSpec(DataType.double, name) for name in names]),
            ),
        )


def _client(uri: str) -> Any:
    import mlflow

    # With MLflow's default number of retries, MLflow reports a missing server after four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextlib.contextmanager
def _one_line_errors(uri: str) -> Iterator[None]:
    """Converts all errors of MLflow, its database and its storage to one-line errors."""
    # Hide MLflow's warnings about failed connections to a database, because MLflow also raises the
    # last error.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    shown = hide_passwords(uri)
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        advice = "'cnn_jax[mlflow]'" if error.name in ("mlflow", "pandas") else error.name
        raise ConfigError(
            f"--mlflow: {shown} needs {error.name}, which is not installed: pip install {advice}"
        ) from error
    except Exception as error:
        raise RegistryError(f"MLflow at {shown}: {error_line(error)}") from error
