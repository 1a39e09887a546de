"""Tests of the exported web page in a browser. ONNX Runtime Web comes from the npm registry."""

import hashlib
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
from conftest import show_at, write_images
from exports import write_test_bundle
from PIL import Image

from cnn_jax.export import exporter, web
from cnn_jax.inference.exported import load_predictor
from cnn_jax.inference.images import preprocess_for_inference
from cnn_jax.system.errors import ConfigError

pytest.importorskip("onnxruntime")


def test_the_npm_package_is_required_and_verified(tmp_path):
    with pytest.raises(ConfigError, match=r"--npm_package is required; `npm pack onnxruntime-web@"):
        web.page_files(None)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        web.page_files(str(tmp_path / "absent.tgz"))
    (tmp_path / "other.tgz").write_bytes(b"x")
    with pytest.raises(ConfigError, match="is not the package onnxruntime-web@"):
        web.page_files(str(tmp_path / "other.tgz"))


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The file of the npm package: $CNN_JAX_NPM_PACKAGE, or downloaded."""
    if path := os.environ.get("CNN_JAX_NPM_PACKAGE"):
        return path
    folder = tmp_path_factory.mktemp("npm")
    if shutil.which("npm") is None:
        pytest.skip("there is no npm")
    command = ["npm", "pack", web.PACKAGE, "--fetch-retries=0"]
    result = subprocess.run(command, cwd=folder, capture_output=True, timeout=300)
    if result.returncode:
        pytest.skip("the npm registry does not answer")
    return str(next(folder.glob("*.tgz")))


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "int8"])
def folder(request, package, tmp_path_factory):
    """The folder of an export to a web page, for images of about 20 x 20 pixels."""
    parent = tmp_path_factory.mktemp("web")
    write_images(parent / "images", per_class=30)
    bundle = write_test_bundle(parent / "bundle", parent / "images")
    exporter.export(
        bundle, parent / "page", "web", int8=request.param, max_loss=0.2, npm_package=package
    )
    return parent / "page"


class _Server:
    """Serves a folder, and counts the requests."""

    def __init__(self, folder):
        requests = self.requests = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(folder))

            def log_message(self, *args):
                requests.append(self.path)

        Handler.extensions_map = Handler.extensions_map | {".mjs": "text/javascript"}
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def served(folder):
    server = _Server(folder)
    yield server
    server.close()


def _wait(browser, script):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60).until(lambda _: browser.execute_script(f"return {script}"))


def _text(browser, name):
    return browser.execute_script(f"return document.getElementById('{name}').textContent")


def _open(browser, url, width=390):
    browser.get_log("browser")
    show_at(browser, url, width)
    return _wait(
        browser,
        "!document.getElementById('file').disabled || !document.getElementById('problem').hidden",
    )


def test_the_page_agrees_with_the_golden_images(browser, folder, served):
    _open(browser, served.url)
    message = _text(browser, "check")
    statement = json.loads((folder / "certificate.json").read_text())
    golden = statement["golden"]
    assert [record["file"] for record in golden][-2:] == [
        "golden/orientation.jpg",
        "golden/alpha.png",
    ]
    assert f"{len(golden)} of {len(golden)} test images agree" in message
    # The certificate was measured with model.onnx. The page loads pixels.onnx.
    assert statement["sha256"].keys() == {statement["model"], "pixels.onnx"}
    for name, sha256 in statement["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
    assert float(re.search(r"([\d.]+\d)\.$", message)[1]) <= 0.05
    assert [line for line in browser.get_log("browser") if line["level"] != "DEBUG"] == []
    # The page fits on a telephone.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_an_image_of_any_size_gets_the_predictors_result(browser, folder, served, tmp_path):
    predictor = load_predictor(folder)
    _open(browser, served.url, 1000)
    for height, width in ((40, 61), (200, 130)):
        noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        path = tmp_path / f"{height}.png"
        Image.fromarray(noise).save(path)
        (expected,) = predictor(preprocess_for_inference(path, predictor.preprocessing)[None])
        browser.execute_script("document.getElementById('took').textContent = ''")
        browser.find_element("id", "file").send_keys(str(path))
        _wait(browser, "document.getElementById('took').textContent")
        assert _text(browser, "result-title") == predictor.class_names[expected.argmax()]
        first = browser.find_element("css selector", "#bars .probability").text
        assert float(first.removesuffix(" %")) == pytest.approx(100 * expected.max(), abs=5)
        # The result has the focus, so that a screen reader reads it.
        assert browser.switch_to.active_element.get_attribute("id") == "result-title"
    assert all(path.startswith("/") for path in served.requests)


def test_a_file_that_is_no_image_is_an_error(browser, served, tmp_path):
    _open(browser, served.url)
    path = tmp_path / "text.png"
    path.write_text("no image")
    browser.find_element("id", "file").send_keys(str(path))
    _wait(browser, "!document.getElementById('problem').hidden")
    assert "this image cannot be classified" in _text(browser, "problem")


@pytest.mark.parametrize("change", ["probabilities", "class"])
def test_a_wrong_model_is_refused(browser, folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "copy")
    statement = json.loads((copy / "certificate.json").read_text())
    if change == "class":
        statement["golden"][0]["predicted"] = "another"
    else:
        statement["golden"][0]["probabilities"][0] += 0.1
    pathlib.Path(copy / "certificate.json").write_text(json.dumps(statement))
    server = _Server(copy)
    try:
        _open(browser, server.url)
        assert "the model is wrong in this browser: 1 of" in _text(browser, "problem")
        assert not browser.find_element("id", "file").is_enabled()
    finally:
        server.close()
