"""Tests of exports to LiteRT, whose packages are in another environment.

$CNN_JAX_LITERT_PYTHON names its Python. The tests that need LiteRT are skipped without it.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from exports import network_case, write_test_bundle

from cnn_jax.export import exporter, litert
from cnn_jax.export.function import ExportError
from cnn_jax.inference.exported import load_predictor
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


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_every_network_equals_the_predictor(python, name, int8):
    case = network_case(name)
    size = case.predictor.preprocessing.image_size
    if name == "convnext_tiny":  # A bug of LiteRT 0.5.
        with pytest.raises(ExportError, match=r"cannot convert the network: .*batch_matmul"):
            litert.convert(case.function, size, python, int8=int8)
        return
    model = litert.convert(case.function, size, python, int8=int8)
    exported = litert.LitertPredictor(case.predictor, model, python)
    for batch in (1, 7):
        probabilities = exported(case.images[:batch])
        limit = 0.15 if int8 else 5e-6
        np.testing.assert_allclose(probabilities, case.expected[:batch], atol=limit)
    exported.close()


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
