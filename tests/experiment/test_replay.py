"""Tests of the comparison of two versions by logged images."""

import json
import time

import numpy as np
import pytest
from bundles import encode_png, make_bundle, make_registry
from logs import DAY, START, Log, experiment

from cnn_jax import compare
from cnn_jax.data import request_log
from cnn_jax.experiment.replay import NoLabelsError, replay
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.system.errors import ConfigError, DataError

# Seconds from `START` until after the versions are added. Other tests may run for hours between the
# import of this module and the creation of the registry.
SOON = time.time() - START + DAY


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return make_registry(tmp_path_factory.mktemp("registry"), "flowers")


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), np.uint8))


@pytest.fixture
def log(tmp_path, images):
    """A log of 70 labelled images, whose labels are the classes of version 2."""
    log = Log(tmp_path / "log", experiment())
    predictor = BundlePredictor(make_bundle(1))
    labels = predictor(np.stack(images)).argmax(axis=1)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        request = log.request(
            None, SOON + number, image=encode_png(image), arm="champion", version=1
        )
        log.feedback(request, SOON + 500 + number, label=predictor.class_names[label])
    return log


def run(registry, log, **options):
    first, second = registry.resolve("flowers", 2), registry.resolve("flowers", 1)
    return replay(registry, first, second, [log.folder], **options)


def test_both_versions_predict_the_same_images(registry, log, images):
    result = run(registry, log.write())
    champion = BundlePredictor(make_bundle(0))(np.stack(images)).argmax(axis=1)
    challenger = BundlePredictor(make_bundle(1))(np.stack(images)).argmax(axis=1)
    equal = int((champion == challenger).sum())
    assert result["correct"] == {"champion": equal, "challenger": 70}
    assert (result["images"], result["gains"], result["losses"]) == (70, 70 - equal, 0)
    assert result["versions"] == {"champion": 1, "challenger": 2}


def test_images_before_the_newer_version_are_left_out(registry, log, images):
    request = log.request(None, 0, image=encode_png(images[0] // 2), arm="champion", version=1)
    log.feedback(request, SOON + 999, label="red")
    assert run(registry, log.write())["images"] == 70
    assert run(registry, log, since=START - 1)["images"] == 71


def test_only_the_chosen_images_are_compared(registry, log, images):
    keys = [(f"{number:032x}", 0) for number in (3, 5, 8)]
    assert run(registry, log.write(), keys=keys)["images"] == 3
    with pytest.raises(NoLabelsError, match="of 0 images of flowers"):
        run(registry, log, keys=[])


def test_images_without_a_label_are_not_read(registry, log, images, tmp_path, monkeypatch):
    other = Log(tmp_path / "other", experiment())
    other.request(None, SOON, image=encode_png(images[0]), request_id="f" * 32, version=1)
    folders, opened = [log.write().folder, other.write().folder], set()

    def read(path, columns, condition=None, original=request_log.read_file):
        opened.update({path.parts[-3]} if "image" in (columns or ()) else ())
        return original(path, columns, condition)

    monkeypatch.setattr(request_log, "read_file", read)
    versions = [registry.resolve("flowers", number) for number in (2, 1)]
    assert replay(registry, *versions, folders)["images"] == 70
    assert opened == {"log"}


def test_copies_of_an_image_count_once(registry, log, images):
    for _ in range(3):
        request = log.request(
            None, SOON + 300, image=encode_png(images[0]), arm="champion", version=1
        )
        log.feedback(request, SOON + 999, label="red")
    result = run(registry, log.write())
    assert (result["images"], result["copies"]) == (70, 3)


def test_new_class_is_wrong_for_both_versions(registry, log, images):
    request = log.request(None, SOON, image=encode_png(255 - images[0]), arm="champion", version=1)
    log.feedback(request, SOON + 999, label="violet")
    result = run(registry, log.write())
    assert (result["images"], result["correct"]["challenger"]) == (71, 70)


def test_images_of_another_size_are_resized_with_a_warning(registry, log, images, caplog):
    large = np.repeat(np.repeat(images[0] // 3, 2, axis=0), 2, axis=1)
    request = log.request(None, SOON, image=encode_png(large), arm="champion", version=1)
    log.feedback(request, SOON + 999, label="red")
    assert run(registry, log.write())["images"] == 71
    assert "flowers/2 reads images of 16 x 16 pixels" in caplog.text


@pytest.mark.parametrize(
    ("has_label", "has_image", "advice"),
    [(False, True, "send labels with POST /feedback"), (True, False, "--request_log_images")],
)
def test_log_without_labels_or_images_is_one_error(
    registry, tmp_path, images, has_label, has_image, advice
):
    log = Log(tmp_path / "log", experiment())
    request = log.request(None, SOON, image=encode_png(images[0]) if has_image else None)
    if has_label:
        log.feedback(request, SOON + 1, label="red")
    with pytest.raises(DataError, match=advice):
        run(registry, log.write())


def test_log_of_another_model_is_one_error(registry, tmp_path):
    log = Log(tmp_path / "log", experiment())
    log.request(None, SOON, model="trees")
    with pytest.raises(DataError, match="no images of the model flowers; it has: trees"):
        run(registry, log.write())


def test_same_version_twice_is_one_error(registry, log):
    version = registry.resolve("flowers", 1)
    with pytest.raises(ConfigError, match="both versions are flowers/1"):
        replay(registry, version, version, [log.write().folder])


def test_command_prints_json_and_writes_the_page(registry, log, tmp_path, capfd):
    folder = str(log.write().folder)
    other = str(Log(tmp_path / "other", experiment()).write().folder)
    page = tmp_path / "page.html"
    # The flag --log may be given several times, as for `monitor` and `retrain`.
    logs = ["--log", folder, "--log", other]
    flags = [f"--registry={registry.url}", *logs, "--json", f"--page={page}"]
    compare.main(["flowers", "2", "champion", *flags])
    found = json.loads(capfd.readouterr().out)
    assert found["images"] == 70
    assert "Comparison of two versions of flowers" in page.read_text()
