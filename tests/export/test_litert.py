"""Tests of exports to LiteRT, whose packages are in another environment.

$CNN_JAX_LITERT_PYTHON names its Python. The tests that need LiteRT are skipped without it.
"""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from bundles import make_bundle
from exports import check_rounded, network_case, random_images, write_test_bundle

from cnn_jax.export import exporter, litert
from cnn_jax.export.function import ExportError
from cnn_jax.inference.evaluation import image_batches, open_as_trained
from cnn_jax.inference.exported import load_predictor
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.models import NETWORKS
from cnn_jax.system.errors import BundleError, ConfigError


@pytest.fixture(scope="session")
def python():
    path = os.environ.get("CNN_JAX_LITERT_PYTHON")
    if path is None:
        pytest.skip("CNN_JAX_LITERT_PYTHON names no Python with LiteRT")
    return path


def test_a_python_without_litert_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"--converter_python is required, .*pip install litert"):
        litert.check_python(None)
    with pytest.raises(ConfigError, match=r"--converter_python: .*absent: No such file"):
        litert.check_python(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"lacks a package \(ModuleNotFoundError: .*litert_conv"):
        litert.check_python(sys.executable)


@pytest.mark.parametrize("count", [1, 200])
def test_a_worker_that_dies_is_an_error_with_its_reason(tmp_path, count):
    """A request of one image stays in the buffer of the pipe, and closing must not raise again."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'ValueError: odd model' >&2\n")
    program.chmod(0o755)
    model = litert.LitertPredictor(BundlePredictor(make_bundle()), b"", str(program))
    model._process.wait()
    message = "LiteRT cannot run the exported model: ValueError: odd model"
    with contextlib.closing(model), pytest.raises(ExportError, match=message):
        model(np.zeros((count, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["float32", "dynamic", "static"])
def test_every_network_equals_the_predictor(python, name, precision):
    case = network_case(name)
    size = case.predictor.preprocessing.image_size
    options: dict = {"int8": precision != "float32"}
    if precision == "static":
        options["batches"] = [random_images(case.predictor, 16)]
    if name == "convnext_tiny":  # A bug of LiteRT 0.5.
        with pytest.raises(ExportError, match=r"cannot convert the network: .*batch_matmul"):
            litert.convert(case.function, size, python, **options)
        return
    model = litert.convert(case.function, size, python, **options)
    exported = litert.LitertPredictor(case.predictor, model, python)
    probabilities = exported(case.images)
    np.testing.assert_allclose(exported(case.images[:1]), probabilities[:1], atol=1e-6)
    exported.close()
    if precision == "float32":
        np.testing.assert_allclose(probabilities, case.expected, atol=5e-6)
    else:
        check_rounded(probabilities, case.expected, limit=0.4)


def test_static_ranges_of_other_images_give_another_model(python):
    """The test fails if the model measures the ranges of each image."""
    case = network_case("cnn")
    size = case.predictor.preprocessing.image_size
    images = random_images(case.predictor, 16)
    model, wrong = (
        litert.convert(case.function, size, python, int8=True, batches=[batch])
        for batch in (images, np.zeros_like(images))
    )
    assert model != wrong
    exported = litert.LitertPredictor(case.predictor, wrong, python)
    probabilities = exported(case.images)
    exported.close()
    with pytest.raises(AssertionError):
        check_rounded(probabilities, case.expected, limit=0.4)


def test_static_ranges_come_from_training_images(python, image_folder, tmp_path, monkeypatch):
    bundle = write_test_bundle(tmp_path / "bundle", image_folder)
    found, convert = [], litert.convert

    def record(*arguments, batches, **options):
        found.extend(batches)
        return convert(*arguments, batches=found, **options)

    monkeypatch.setattr(litert, "convert", record)
    options = {"int8": True, "max_loss": 1.0, "converter_python": python}
    statement = exporter.export(bundle, tmp_path / "s", "litert", static_ranges=True, **options)
    assert statement["static_ranges"]
    dataset = open_as_trained(BundlePredictor.load(bundle))
    training_images = list(image_batches(dataset.loader, dataset.splits["train"]))
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(training_images))
    assert statement["calibration_data"] == statement["data"]
    assert statement["comparison"]["test"]["largest_difference"] < 0.05
    with pytest.raises(ConfigError, match="--static_ranges: needs --format=litert --int8"):
        exporter.export(bundle, tmp_path / "x", static_ranges=True)


def test_a_bundle_is_exported_with_its_certificate(python, image_folder, tmp_path):
    bundle = write_test_bundle(tmp_path / "bundle", image_folder)
    statement = exporter.export(bundle, tmp_path / "out", "litert", converter_python=python)
    assert statement["comparison"]["test"]["largest_difference"] < 5e-6
    assert statement["versions"].keys() >= {"cnn_jax", "litert-converter", "ai-edge-litert"}
    readme = (tmp_path / "out" / "README.md").read_text()
    code = "\n".join(line[4:] for line in readme.splitlines() if line.startswith("    "))
    subprocess.run([python, "-c", code], cwd=tmp_path / "out", check=True, capture_output=True)
    assert len(json.loads((tmp_path / "out" / "certificate.json").read_text())["golden"]) == 8
    with pytest.raises(BundleError, match="an export to litert, which cnn_jax does not load"):
        load_predictor(tmp_path / "out")
