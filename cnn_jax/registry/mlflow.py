"""Copies model versions and aliases between a registry of this package and an MLflow registry.

A version in MLflow has the bundle's files as artifacts and the bundle's digest as a tag. A bundle
whose digest MLflow already has is not copied again. MLflow assigns new version numbers, which may
differ from the numbers in this registry.

Run only one export at a time. Two exports at the same time could create a version twice.
"""

import contextlib
import importlib
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from cnn_jax.registry import ledger
from cnn_jax.registry.ledger import METRICS, RegistryError, Version
from cnn_jax.registry.registry import Registry
from cnn_jax.registry.store import error_line, hide_passwords
from cnn_jax.system.errors import BundleError, ConfigError, UserError, printable

# The MLflow experiment of all exported bundles. MLflow stores artifacts in runs, and runs in
# experiments.
_EXPERIMENT = "cnn_jax"
_ARTIFACTS = "bundle"
_DESCRIPTION = "bundle.json"
_DIGEST_TAG = "cnn_jax.digest"
_VERSION_TAG = "cnn_jax.version"


def export_versions(
    registry: Registry, name: str, selector: str | int | None, uri: str
) -> Iterator[str]:
    """Copies versions of a model, and the aliases of these versions, to MLflow.

    Damaged versions are skipped.

    Args:
      registry: The registry to export from.
      name: The name of the model, the same in MLflow.
      selector: A version number, an alias, or None for all versions.
      uri: MLflow's tracking and registry URI.

    Yields:
      A line for each version or alias that was copied, existed already, or was skipped.

    Raises:
      ConfigError: MLflow is not installed.
      BundleError: A version is damaged; raised after the other versions were copied.
      RegistryError: The version does not exist, or MLflow reports an error.
    """
    model = ledger.find(registry.models, name)
    if selector is None:
        versions = [version for _, version in sorted(model.versions.items())]
    else:
        versions = [registry.resolve(name, selector)]
    with _one_line_errors(uri):
        client = _client(uri)
        _create_model(client, name)
        exported = _versions_by_digest(client, name)
        damaged = []
        for version in versions:
            number = exported.get(version.bundle.digest)
            if number is None:
                try:
                    number = _export_version(client, registry, version)
                except BundleError as error:
                    damaged.append(str(version))
                    yield f"skipped {version}: {error}"
                    continue
                yield f"exported {version}: it is {name} version {number} in MLflow"
            else:
                yield f"{version} is already {name} version {number} in MLflow"
            for alias in model.version_aliases(version.number):
                yield _export_alias(client, name, alias, number)
        if damaged:
            raise BundleError(f"not exported, because damaged: {', '.join(damaged)}")


def _create_model(client: Any, name: str) -> None:
    try:
        client.create_registered_model(name)
    except _exception() as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions_by_digest(client: Any, name: str) -> dict[str, str]:
    """Returns the MLflow version number of each exported bundle of a model, by bundle digest."""
    versions = client.search_model_versions(f"name = '{name}'")
    return {v.tags[_DIGEST_TAG]: str(v.version) for v in versions if _DIGEST_TAG in v.tags}


def _export_version(client: Any, registry: Registry, version: Version) -> str:
    """Uploads a bundle as artifacts of a new MLflow run; returns the new MLflow version number."""
    bundle = version.bundle
    metrics = {f"test_{metric}": bundle.test_metric(metric) for metric in METRICS}
    metrics = {metric: value for metric, value in metrics.items() if value is not None}
    with tempfile.TemporaryDirectory() as directory:
        folder = registry.fetch(version, directory)
        run = client.create_run(_experiment(client), run_name=str(version)).info
        client.log_artifacts(run.run_id, str(folder), _ARTIFACTS)
    for metric, value in metrics.items():
        client.log_metric(run.run_id, metric, value)
    with contextlib.redirect_stdout(sys.stderr):  # MLflow prints the URL of the run to stdout.
        client.set_terminated(run.run_id)
    created = client.create_model_version(
        version.model,
        source=f"{run.artifact_uri}/{_ARTIFACTS}",
        run_id=run.run_id,
        description=version.note or None,
        tags={
            _DIGEST_TAG: bundle.digest,
            _VERSION_TAG: str(version.number),
            **{metric: f"{value:.6g}" for metric, value in metrics.items()},
        },
    )
    return str(created.version)


def _experiment(client: Any) -> str:
    """Returns the id of the MLflow experiment of exported bundles; creates a missing experiment."""
    experiment = client.get_experiment_by_name(_EXPERIMENT)
    return experiment.experiment_id if experiment else client.create_experiment(_EXPERIMENT)


def _export_alias(client: Any, name: str, alias: str, number: str) -> str:
    try:
        client.set_registered_model_alias(name, alias, number)
    except _exception() as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        return f"skipped {name}@{alias}: {error_line(error)}"  # MLflow refuses some alias names.
    return f"{name}@{alias} is version {number} in MLflow"


def import_versions(
    registry: Registry,
    name: str,
    selector: str | int | None,
    uri: str,
    with_aliases: bool = True,
) -> Iterator[str]:
    """Copies versions of a model, and the aliases of these versions, from MLflow.

    Bundles that the registry already has are not downloaded. Damaged versions are skipped.

    Args:
      registry: The registry to import to. A registry that does not exist is created.
      name: The name of the model, the same in MLflow.
      selector: MLflow's version number, an alias, or None for all versions that are bundles.
      uri: MLflow's tracking and registry URI.
      with_aliases: Whether to copy the aliases too.

    Yields:
      A line for each version or alias that was copied, existed already, or was skipped.

    Raises:
      ConfigError: MLflow is not installed.
      BundleError: No selected version is a bundle, or a version is damaged; raised after the
        other versions were copied.
      RegistryError: The version does not exist, or MLflow reports an error.
    """
    with _one_line_errors(uri):
        client = _client(uri)
        aliases = client.get_registered_model(name).aliases if with_aliases else {}
        bundles, damaged = 0, []
        for source in _select(client, name, selector):
            number = str(source.version)
            if _DIGEST_TAG not in source.tags and not _is_bundle(client, source, uri):
                yield f"skipped {name} version {number} of MLflow: it is not a bundle"
                continue
            bundles += 1
            try:
                version, line = _import_version(client, registry, source, uri)
                yield line
                for alias in sorted(a for a, v in aliases.items() if str(v) == number):
                    yield _import_alias(registry, name, alias, version)
            except BundleError as error:
                damaged.append(number)
                yield f"skipped {name} version {number} of MLflow: {error}"
        if not bundles:
            raise BundleError(f"MLflow has no bundle at {name}{_suffix(selector)}")
        if damaged:
            numbers = ", ".join(damaged)
            raise BundleError(f"not imported, because damaged: {name} version {numbers} of MLflow")


def _suffix(selector: str | int | None) -> str:
    if selector is None:
        return ""
    return f"@{selector}" if isinstance(selector, str) else f"/{selector}"


def _select(client: Any, name: str, selector: str | int | None) -> list[Any]:
    """Returns the selected MLflow versions, the oldest version first."""
    if selector is None:
        versions = client.search_model_versions(f"name = '{name}'")
        return sorted(versions, key=lambda version: int(version.version))
    if isinstance(selector, str):
        return [client.get_model_version_by_alias(name, selector)]
    return [client.get_model_version(name, str(selector))]


def _is_bundle(client: Any, source: Any, uri: str) -> bool:
    """Returns whether the artifacts of an MLflow version include a file named bundle.json."""
    location = client.get_model_version_download_uri(source.name, str(source.version))
    artifacts = _artifacts().list_artifacts(artifact_uri=location, tracking_uri=uri)
    return any(pathlib.PurePosixPath(item.path).name == _DESCRIPTION for item in artifacts)


def _import_version(client: Any, registry: Registry, source: Any, uri: str) -> tuple[int, str]:
    """Imports an MLflow version; returns its number in the registry, and a line to print."""
    from cnn_jax.inference.bundle import digest

    label = f"{source.name} version {source.version}"
    tag = source.tags.get(_DIGEST_TAG)
    if tag is not None:
        if version := registry.find_digest(source.name, tag):
            return version.number, f"{label} is already {version}"
        if not _is_bundle(client, source, uri):
            raise BundleError(f"it has a tag {_DIGEST_TAG}, but no {_DESCRIPTION}")
    location = client.get_model_version_download_uri(source.name, str(source.version))
    with tempfile.TemporaryDirectory() as directory:
        folder = _artifacts().download_artifacts(
            artifact_uri=location, dst_path=directory, tracking_uri=uri
        )
        if tag not in (None, digest(folder)):
            raise BundleError(f"its digest differs from its tag {_DIGEST_TAG}")
        added = registry.add(source.name, folder, f"version {source.version} of MLflow")
    if not added.is_new:
        return added.version.number, f"{label} is already {added.version}"
    return added.version.number, f"imported {label} as {added.version}"


def _import_alias(registry: Registry, name: str, alias: str, number: int) -> str:
    try:
        entry = registry.promote(name, number, alias, note="as in MLflow")
    except ConfigError as error:
        return f"skipped {name}@{printable(alias)}: {error}"
    return f"{name}@{alias} is {'already ' * (entry is None)}version {number}"


def _client(uri: str) -> Any:
    # With MLflow's default number of retries, MLflow reports a missing server after four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return importlib.import_module("mlflow").MlflowClient(tracking_uri=uri, registry_uri=uri)


def _artifacts() -> Any:
    return importlib.import_module("mlflow.artifacts")


def _exception() -> Any:
    return importlib.import_module("mlflow.exceptions").MlflowException


@contextlib.contextmanager
def _one_line_errors(uri: str) -> Iterator[None]:
    """Converts errors of MLflow, its database and its artifact store to one-line errors.

    MLflow and these libraries raise exceptions of many types. Therefore every exception except
    UserError is converted.
    """
    try:
        # Hide MLflow's warnings about failed connections to a database, because MLflow also raises
        # the last error.
        logging.getLogger(importlib.import_module("mlflow").__name__).setLevel(logging.ERROR)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--mlflow needs mlflow, which is not installed: pip install 'cnn_jax[mlflow]'"
        ) from error
    shown = hide_passwords(uri)
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--mlflow: {shown} needs {error.name}, which is not installed: "
            f"pip install {error.name}"
        ) from error
    except Exception as error:
        raise RegistryError(f"MLflow at {shown}: {error_line(error)}") from error
