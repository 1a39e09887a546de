"""Tests of ONNX exports in the server."""

import pathlib

import pytest
from exports import registry_with, write_export
from servers import Served

from cnn_jax.inference.exported import load_predictor
from cnn_jax.inference.images import preprocess_for_inference

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(image_folder, tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("export"), image_folder)


@pytest.fixture
def registry(exported, tmp_path):
    return registry_with(exported, tmp_path)


@pytest.mark.parametrize("source", ["bundle", "registry"])
def test_the_server_answers_with_an_export(exported, registry, tmp_path, source):
    image = exported / "golden" / "0.png"
    predictor = load_predictor(exported)
    (expected,) = predictor(preprocess_for_inference(image, predictor.preprocessing)[None])
    flag = f"--bundle={exported}"
    if source == "registry":
        registry.promote("shapes", 1)
        flag = f"--registry={registry.url}"
    with Served(tmp_path, flag, "--max_batch=2") as server:
        answer = server.post("/predict", image.read_bytes())
        assert answer.status_code == 200
        (prediction,) = answer.json()["predictions"]
        top = {one["class"]: one["probability"] for one in prediction["top"]}
        named = dict(zip(predictor.class_names, expected.tolist(), strict=True))
        assert top == pytest.approx(named, abs=1e-5)
        assert server.post("/predict?explain=nonsense", image.read_bytes()).status_code == 400
        maps = pathlib.Path(f"/proc/{server.process.pid}/maps")
        if maps.exists():
            assert "onnxruntime" in maps.read_text()
            assert "jaxlib" not in maps.read_text()
            assert ("obstore" in maps.read_text()) == (source == "registry")
        answer = server.post("/predict?explain=grad_cam", image.read_bytes())
        assert answer.status_code == 400
        assert "maps need the bundle" in answer.json()["error"]
        assert server.end() == 0
