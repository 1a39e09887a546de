"""The monitor with a trained network and the log of a real server."""

import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from cnn_jax.data.request_log import read_requests
from cnn_jax.inference.bundle import digest, read_reference
from cnn_jax.inference.evaluation import open_as_trained
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.quality import reference_fit, trust
from cnn_jax.quality.image_statistics import image_statistics
from cnn_jax.quality.robustness import load_images
from cnn_jax.system.errors import DataError

sys.path.insert(0, str(REPOSITORY / "tests" / "serve"))
from servers import Served


def _png(rng, channel, noise=False):
    """Returns an image with one brighter channel, or without any class."""
    height, width = 20 + rng.integers(5, size=2)
    pixels = rng.integers(0, 256 if noise else 120, (height, width, 3))
    pixels[..., channel] += 0 if noise else 30
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small network that distinguishes three colours, and its folder of images."""
    from configs import default

    folder, rng = tmp_path_factory.mktemp("monitored"), np.random.default_rng(1)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(80):
            (folder / "images" / name / f"{number}.png").write_bytes(_png(rng, channel))
    config = default.get_config()
    config.data.source = f"folder:{folder / 'images'}"
    config.data.image_size = (16, 16)
    config.model.features, config.model.dense = (4, 8), 16
    config.train.batch_size, config.train.epochs = 16, 15
    config.report.detail = "none"
    from cnn_jax.training.loop import train_and_evaluate

    train_and_evaluate(config, folder / "run")
    return folder / "run"


def _monitor(*flags):
    command = [sys.executable, "-m", "cnn_jax.monitor", *map(str, flags)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def test_a_run_writes_the_statistics_of_its_images(run):
    reference = read_reference(run / "bundle")
    predictor = BundlePredictor.load(run)
    dataset = open_as_trained(predictor)
    indices = dataset.splits["validation"]
    images = load_images(dataset.loader, indices)
    probabilities, embeddings = predictor.predict_with_embeddings(images)
    assert len(reference.statistics) == len(indices)
    np.testing.assert_allclose(reference.statistics[:, 1], probabilities.max(axis=1), atol=1e-5)
    expected = [image_statistics(image) for image in images]
    np.testing.assert_allclose(reference.statistics[:, 2:], expected, rtol=1e-6)
    distances = trust.Distances(reference.class_means, reference.covariance)
    to_classes, _ = distances(embeddings)
    np.testing.assert_allclose(
        reference.statistics[:, 0],
        to_classes[np.arange(len(images)), probabilities.argmax(axis=1)],
        rtol=1e-3,
    )
    train = dataset.splits["train"]
    _, embeddings = predictor.predict_with_embeddings(load_images(dataset.loader, train))
    means, covariance = trust.fit_embedding(embeddings, dataset.source.labels[train], 3)
    np.testing.assert_allclose(reference.class_means, means, atol=1e-4)
    np.testing.assert_allclose(reference.covariance, covariance, atol=1e-3)
    hits = probabilities.argmax(axis=1) == dataset.source.labels[indices]
    assert reference.accuracy == hits.mean()


def test_processes_that_share_the_work_get_the_same_statistics(run):
    predictor = BundlePredictor.load(run)
    dataset = open_as_trained(predictor)
    arguments = predictor, dataset.loader, dataset.splits, dataset.source.labels

    def share(predict, count):
        parts = [np.arange(count)[first::2] for first in range(2)]
        found = [predict(part) for part in parts]
        arrays = []
        for name in ("probabilities", "embeddings", "images"):
            rows = np.empty((count, *getattr(found[0], name).shape[1:]), np.float32)
            for part, predictions in zip(parts, found, strict=True):
                rows[part] = getattr(predictions, name)
            arrays.append(rows)
        return reference_fit.Predictions(*arrays)

    alone = trust.fit_reference(**reference_fit.measure_samples(*arguments)).arrays()
    shared = trust.fit_reference(**reference_fit.measure_samples(*arguments, share=share)).arrays()
    for name, array in alone.items():
        np.testing.assert_allclose(shared[name], array, rtol=1e-3, atol=1e-3)


def test_each_image_is_corrupted_in_different_ways():
    found = [reference_fit.condition(position) for position in range(12)]
    assert len(set(found[:6])) == len(set(found[6:])) == 6
    assert found == [reference_fit.condition(position) for position in range(12)]


def test_noise_at_a_server_is_harm(run, tmp_path):
    """The server logs images of the known kind, then noise; the monitor exits with 0, then 3."""
    log, rng = tmp_path / "log", np.random.default_rng(0)
    flags = (f"--bundle={run}", f"--request_log={log}", "--request_log_images")
    with Served(tmp_path, *flags) as server:

        def send(count, noise):
            rows = read_requests(log, ["time"]).num_rows
            for number in range(count):
                answer = server.post("/predict", _png(rng, number % 3, noise))
                assert answer.status_code == 200
            end = time.monotonic() + 30
            while read_requests(log, ["time"]).num_rows < rows + count:
                assert time.monotonic() < end
                time.sleep(0.1)
            return answer.json()["request_id"]

        send(40, noise=False)
        common = (f"--bundle={run}", f"--log={log}", "--window=20")
        quiet = _monitor(*common, "--json")
        assert quiet.returncode == 0, quiet.stderr
        assert json.loads(quiet.stdout)["state"] in ("no_drift", "drift")
        last = send(40, noise=True)
        page, gauges, output = (tmp_path / name for name in ("m.html", "m.prom", "m.json"))
        files = (f"--page={page}", f"--gauges={gauges}", f"--output={output}")
        noisy = _monitor(*common, *files)
        assert noisy.returncode == 3, noisy.stderr + noisy.stdout
        assert "State: harm." in noisy.stdout
        result = json.loads(output.read_text())
        assert result["digest"] == digest(run / "bundle")
        assert [w["alarm"] for w in result["windows"]][-1]
        assert "cnn_jax_monitor_harm{" in gauges.read_text()
        assert page.read_text().count("data:image/png") >= 24
        # Labels by POST /feedback count too.
        body = json.dumps({"request_id": last, "label": "red"})
        assert server.post("/feedback", body).status_code == 200
        labelled = json.loads(_monitor(*common, "--json").stdout)
        assert labelled["labels"]["count"] == 1


def test_a_bundle_without_statistics_uses_a_file(run, tmp_path):
    from monitor_logs import simulate, write_log

    from cnn_jax.inference.bundle import read_bundle, write_bundle
    from cnn_jax.monitor.__main__ import main
    from cnn_jax.monitor.flags import load_reference

    old = tmp_path / "old"
    write_bundle(read_bundle(run / "bundle"), old)
    rng = np.random.default_rng(0)
    write_log(tmp_path / "log", simulate(rng, rng.integers(3, size=30)), digest=digest(old))
    with pytest.raises(DataError, match="no reference statistics; compute them with"):
        main([f"--bundle={old}", f"--log={tmp_path / 'log'}"])
    file = tmp_path / "reference.safetensors"
    main([f"--bundle={old}", f"--fit_reference={file}"])
    again, first = load_reference(file, digest(old)), read_reference(run / "bundle")
    for name, array in first.arrays().items():
        np.testing.assert_allclose(again.arrays()[name], array, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="has the statistics of the bundle"):
        main([f"--bundle={run}", f"--log={tmp_path / 'log'}", f"--reference={file}"])
    # The simulated log has another number of features.
    with pytest.raises(DataError, match="reference statistics are of"):
        main([f"--bundle={old}", f"--log={tmp_path / 'log'}", f"--reference={file}"])


def test_a_version_of_a_registry_is_found(run, tmp_path):
    import argparse

    from cnn_jax.monitor.flags import open_version
    from cnn_jax.registry.registry import Registry
    from cnn_jax.system.errors import ConfigError

    registry = Registry(tmp_path / "registry")
    registry.add("flowers", run / "bundle")
    registry.promote("flowers", 1)
    flags = {"bundle": None, "registry": str(tmp_path / "registry"), "reference": None}
    for model in ("flowers", "flowers/1", "flowers@champion"):
        served = open_version(argparse.Namespace(**flags, model=model))
        assert (served.name, served.digest) == ("flowers/1", digest(run / "bundle"))
        assert served.reference is not None
    with pytest.raises(ConfigError, match="--bundle, or --registry and --model, must be given"):
        open_version(argparse.Namespace(**flags, model=None))
    with pytest.raises(ConfigError, match="--bundle already names the version"):
        open_version(argparse.Namespace(**(flags | {"bundle": str(run)}), model="flowers"))
