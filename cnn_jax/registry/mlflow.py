"""Versions and aliases to and from an MLflow registry, for who has one.

A version there has the bundle's files as its artifacts, and the bundle's digest as a tag, by which
it is known again: doing the same twice changes nothing. Their version numbers are MLflow's own.

One exporter at a time: MLflow keeps two who export the same version at once not apart, and would
have it twice.
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
from cnn_jax.registry.ledger import FIGURES, RegistryError, Version
from cnn_jax.registry.registry import Registry
from cnn_jax.registry.store import hidden, reason
from cnn_jax.system.errors import BundleError, ConfigError, UserError, printable

_EXPERIMENT = "cnn_jax"  # MLflow keeps artifacts with runs, and runs in experiments.
_ARTIFACTS = "bundle"
_DESCRIPTION = "bundle.json"
_DIGEST_TAG = "cnn_jax.digest"
_VERSION_TAG = "cnn_jax.version"


def export(registry: Registry, name: str, which: str | int | None, uri: str) -> Iterator[str]:
    """Copies versions of a model to MLflow, and makes the aliases there point to them.

    A version that is damaged is passed over.

    Args:
      registry: Where they are.
      name: The model, here and there.
      which: A version, an alias that points to one, or None for all.
      uri: MLflow's tracking and registry URI.

    Yields:
      A line for each thing that was done, found done, or passed over.

    Raises:
      ConfigError: MLflow is not installed.
      BundleError: At the end: some of it is damaged.
      RegistryError: There is no such version, or MLflow says that it cannot be done.
    """
    model = ledger.find(registry.models, name)
    if which is None:
        versions = [version for _, version in sorted(model.versions.items())]
    else:
        versions = [registry.resolve(name, which)]
    with _explained(uri):
        client = _client(uri)
        _make_model(client, name)
        there = _versions_by_digest(client, name)
        damaged = []
        for version in versions:
            number = there.get(version.bundle.digest)
            if number is None:
                try:
                    number = _export_version(client, registry, version)
                except BundleError as error:
                    damaged.append(str(version))
                    yield f"left out {version}: {error}"
                    continue
                yield f"exported {version}: it is {name} version {number} in MLflow"
            else:
                yield f"{version} is {name} version {number} in MLflow already"
            for alias in model.aliases_of(version.number):
                yield _export_alias(client, name, alias, number)
        if damaged:
            raise BundleError(f"not exported, as damaged: {', '.join(damaged)}")


def _make_model(client: Any, name: str) -> None:
    try:
        client.create_registered_model(name)
    except _exception() as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions_by_digest(client: Any, name: str) -> dict[str, str]:
    """MLflow's version numbers, by the digest of the bundle that they say they are."""
    found = client.search_model_versions(f"name = '{name}'")
    return {one.tags[_DIGEST_TAG]: str(one.version) for one in found if _DIGEST_TAG in one.tags}


def _export_version(client: Any, registry: Registry, version: Version) -> str:
    """Uploads a bundle as the artifacts of a run; returns the number of the version made of it."""
    bundle = version.bundle
    figures = {f"test_{figure}": bundle.test(figure) for figure in FIGURES}
    figures = {figure: value for figure, value in figures.items() if value is not None}
    with tempfile.TemporaryDirectory() as directory:
        folder = registry.fetch(version, directory)
        run = client.create_run(_experiment(client), run_name=str(version)).info
        client.log_artifacts(run.run_id, str(folder), _ARTIFACTS)
    for figure, value in figures.items():
        client.log_metric(run.run_id, figure, value)
    with contextlib.redirect_stdout(sys.stderr):  # It prints where the run can be seen.
        client.set_terminated(run.run_id)
    made = client.create_model_version(
        version.model,
        source=f"{run.artifact_uri}/{_ARTIFACTS}",
        run_id=run.run_id,
        description=version.note or None,
        tags={
            _DIGEST_TAG: bundle.digest,
            _VERSION_TAG: str(version.number),
            **{figure: f"{value:.6g}" for figure, value in figures.items()},
        },
    )
    return str(made.version)


def _experiment(client: Any) -> str:
    """The id of the experiment for exported bundles."""
    found = client.get_experiment_by_name(_EXPERIMENT)
    return found.experiment_id if found else client.create_experiment(_EXPERIMENT)


def _export_alias(client: Any, name: str, alias: str, number: str) -> str:
    try:
        client.set_registered_model_alias(name, alias, number)
    except _exception() as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        return f"left out {name}@{alias}: {reason(error)}"  # MLflow allows fewer names.
    return f"{name}@{alias} is version {number} in MLflow"


def bring(
    registry: Registry,
    name: str,
    which: str | int | None,
    uri: str,
    with_aliases: bool = True,
) -> Iterator[str]:
    """Copies versions of a model from MLflow, and makes the aliases here point to them.

    What is here already is not downloaded. A version that is damaged is passed over.

    Args:
      registry: Where to; it is made if it is not there.
      name: The model, here and there.
      which: MLflow's number of a version, an alias that points to one, or None for all that are
        bundles.
      uri: MLflow's tracking and registry URI.
      with_aliases: Whether to move the aliases here.

    Yields:
      A line for each thing that was done, found done, or passed over.

    Raises:
      ConfigError: MLflow is not installed.
      BundleError: What was asked for is no bundle, or, at the end, some of it is damaged.
      RegistryError: There is no such version, or MLflow says that it cannot be done.
    """
    with _explained(uri):
        client = _client(uri)
        aliases = client.get_registered_model(name).aliases if with_aliases else {}
        bundles, damaged = 0, []
        for one in _find(client, name, which):
            if _DIGEST_TAG not in one.tags and not _is_bundle(client, one, uri):
                yield f"left out {name} version {one.version} of MLflow: it is no bundle"
                continue
            bundles += 1
            wanted = sorted(a for a, v in aliases.items() if str(v) == str(one.version))
            try:
                number, line = _import_version(client, registry, one, uri)
                yield line
                for alias in wanted:
                    yield _import_alias(registry, name, alias, number)
            except BundleError as error:
                damaged.append(str(one.version))
                yield f"left out {name} version {one.version} of MLflow: {error}"
        if not bundles:
            raise BundleError(f"MLflow has no bundle at {name}{_suffix(which)}")
        if damaged:
            numbers = ", ".join(damaged)
            raise BundleError(f"not imported, as damaged: {name} version {numbers} of MLflow")


def _suffix(which: str | int | None) -> str:
    return "" if which is None else f"@{which}" if isinstance(which, str) else f"/{which}"


def _find(client: Any, name: str, which: str | int | None) -> list[Any]:
    """MLflow's versions that are asked for, the oldest first."""
    if which is None:
        found = client.search_model_versions(f"name = '{name}'")
        return sorted(found, key=lambda one: int(one.version))
    if isinstance(which, str):
        return [client.get_model_version_by_alias(name, which)]
    return [client.get_model_version(name, str(which))]


def _is_bundle(client: Any, one: Any, uri: str) -> bool:
    """Whether the artifacts of a version look like a bundle; nothing is downloaded."""
    source = client.get_model_version_download_uri(one.name, str(one.version))
    artifacts = _artifacts().list_artifacts(artifact_uri=source, tracking_uri=uri)
    return any(pathlib.PurePosixPath(item.path).name == _DESCRIPTION for item in artifacts)


def _import_version(client: Any, registry: Registry, one: Any, uri: str) -> tuple[int, str]:
    """Adds a version of MLflow; returns its number here and what to say of it."""
    from cnn_jax.inference.bundle import digest

    tag = one.tags.get(_DIGEST_TAG)
    if tag is not None:
        if there := registry.with_digest(one.name, tag):
            return there.number, f"{one.name} version {one.version} is {there} already"
        if not _is_bundle(client, one, uri):
            raise BundleError(f"it has a tag {_DIGEST_TAG}, and no {_DESCRIPTION}")
    source = client.get_model_version_download_uri(one.name, str(one.version))
    with tempfile.TemporaryDirectory() as directory:
        folder = _artifacts().download_artifacts(
            artifact_uri=source, dst_path=directory, tracking_uri=uri
        )
        found = digest(folder)
        if tag not in (None, found):
            raise BundleError(f"its digest is not the one in its tag {_DIGEST_TAG}")
        added = registry.add(one.name, folder, f"version {one.version} of MLflow")
    if not added.is_new:
        return added.version.number, f"{one.name} version {one.version} is {added.version} already"
    return added.version.number, f"imported {one.name} version {one.version} as {added.version}"


def _import_alias(registry: Registry, name: str, alias: str, number: int) -> str:
    try:
        entry = registry.promote(name, number, alias, note="as in MLflow")
    except ConfigError as error:
        return f"left out {name}@{printable(alias)}: {error}"
    return f"{name}@{alias} is version {number}" + " already" * (entry is None)


def _client(uri: str) -> Any:
    # A server that is not there is told in half a minute, not in four.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return importlib.import_module("mlflow").MlflowClient(tracking_uri=uri, registry_uri=uri)


def _artifacts() -> Any:
    return importlib.import_module("mlflow.artifacts")


def _exception() -> Any:
    return importlib.import_module("mlflow.exceptions").MlflowException


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Makes one line of what MLflow, its database or its store of artifacts raises.

    Each of them has errors of its own, so it is every one that is not ours.
    """
    try:
        # It warns in many lines of each try to reach a database, and says the last one's error.
        logging.getLogger(importlib.import_module("mlflow").__name__).setLevel(logging.ERROR)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--mlflow: mlflow is not installed: pip install 'cnn_jax[mlflow]' brings it"
        ) from error
    shown = hidden(uri)
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
        raise RegistryError(f"MLflow at {shown}: {reason(error)}") from error
