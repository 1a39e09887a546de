"""Tests of ONNX exports in a registry."""

import json
import pathlib

import numpy as np
import pytest
from exports import registry_with, write_export

from cnn_jax.inference.bundle import digest
from cnn_jax.inference.exported import load_predictor
from cnn_jax.registry.ledger import Gates, RegistryError
from cnn_jax.system.errors import BundleError

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(image_folder, tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("export"), image_folder)


@pytest.fixture
def registry(exported, tmp_path):
    return registry_with(exported, tmp_path)


def test_an_export_is_a_version_with_its_metrics_and_all_files(registry, exported, tmp_path):
    version = registry.resolve("shapes", 1)
    metrics = json.loads((exported / "bundle.json").read_text())["metrics"]
    assert version.bundle.digest == digest(exported)
    assert version.bundle.test_metric("accuracy") == metrics["test"]["accuracy"]
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    for is_copy in (False, True):
        folder = registry.fetch(version, tmp_path / "copies", is_copy=is_copy)
        for name in files:
            assert (folder / name).read_bytes() == (exported / name).read_bytes()
    images = np.zeros((1, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(load_predictor(folder)(images), load_predictor(exported)(images))


def test_the_gates_use_the_metrics_of_the_export(registry, exported):
    accuracy = json.loads((exported / "bundle.json").read_text())["metrics"]["test"]["accuracy"]
    with pytest.raises(RegistryError, match="min_accuracy"):
        registry.promote("shapes", 1, gates=Gates(min_accuracy=accuracy + 0.01))
    registry.promote("shapes", 1, gates=Gates(min_accuracy=accuracy))
    assert registry.resolve("shapes").number == 1


@pytest.mark.parametrize("name", ["model.onnx", "golden/0.png", "certificate.json", "bundle.json"])
def test_a_changed_file_in_the_registry_is_detected(registry, name):
    version = registry.resolve("shapes", 1)
    (path,) = pathlib.Path(registry.url.removeprefix("file://")).glob(f"bundles/*/{name}")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match="is damaged"):
        registry.verify(version)
    with pytest.raises(BundleError, match="is damaged"):
        registry.promote("shapes", 1)
