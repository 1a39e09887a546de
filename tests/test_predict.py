import csv
import dataclasses
import io
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_bundle import MODEL, make_bundle

from cnn_jax import predict
from cnn_jax.bundle import write_bundle
from cnn_jax.errors import BundleError, DataError
from cnn_jax.models import make_model
from cnn_jax.predict import Predictor, list_images, predict_batch, preprocess_for_inference
from cnn_jax.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def predictor():
    return Predictor(make_bundle())


def _pixels(seed=0, size=(20, 30)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def test_probabilities_are_the_softmax_of_the_networks_logits(predictor):
    bundle = make_bundle()
    images = np.stack([_pixels(i, (16, 16)) for i in range(5)])
    model = make_model(MODEL, 3, "float32")
    logits = model.apply(bundle.variables, (jnp.array(images, jnp.float32) - 127.5) / 127.5)
    probabilities = predictor(images)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


def test_the_temperature_divides_the_logits(predictor):
    images = _pixels(0, (16, 16))[None]
    hot = Predictor(dataclasses.replace(make_bundle(), temperature=2.0))(images)
    root = np.sqrt(predictor(images))
    np.testing.assert_allclose(hot, root / root.sum(), atol=1e-6)


def test_images_of_another_size_are_refused(predictor):
    with pytest.raises(ValueError, match=r"must be \[B, 16, 16, 3\]"):
        predictor(_pixels(0, (20, 20))[None])


def test_every_kind_of_image_is_the_same_image(tmp_path):
    preprocessing = Preprocessing(image_size=(8, 12))
    pixels = _pixels()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    expected = preprocess_for_inference(pixels, preprocessing)
    assert expected.shape == (8, 12, 3)
    assert expected.dtype == np.uint8
    for image in (path, str(path), path.read_bytes(), Image.fromarray(pixels)):
        np.testing.assert_array_equal(preprocess_for_inference(image, preprocessing), expected)


def test_grey_pixels_become_rgb_and_the_default_is_the_specifications_size():
    out = preprocess_for_inference(np.full((5, 7), 9, np.uint8))
    np.testing.assert_array_equal(out, np.full((224, 224, 3), 9))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("no/such/file.jpg", "No such file"),
        ("bad\0name", "null byte"),
        (b"nonsense", "not an image"),
        (np.zeros((4, 4, 3)), "must be uint8, got float64"),
        (np.zeros((4, 4, 4), np.uint8), r"must be \[height, width, 3\], got \[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"must be \[height, width, 3\]"),
        (Image.new("RGB", (100, 100)), "more than max_pixels = 99"),
    ],
)
def test_what_is_no_image_is_one_clear_error(image, reason):
    with pytest.raises(DataError, match=reason):
        preprocess_for_inference(image, Preprocessing(image_size=(8, 8), max_pixels=99))


def test_a_bad_image_spoils_no_other(predictor, caplog):
    good = [_pixels(i) for i in range(4)]
    mixed = [good[0], b"nonsense", good[1], "no/such/file.jpg", good[2], good[3]]
    predictions = predict_batch(predictor, mixed)
    assert [prediction.error is None for prediction in predictions] == [1, 0, 1, 0, 1, 1]
    assert predictions[1].predicted is None
    assert "No such file" in str(predictions[3].error)
    assert "no/such/file.jpg" in caplog.text
    assert "image 1 (bytes)" in caplog.text
    alone = [predict_batch(predictor, [image])[0] for image in good]
    for together, single in zip([predictions[i] for i in (0, 2, 4, 5)], alone, strict=True):
        np.testing.assert_allclose(together.probabilities, single.probabilities, atol=1e-6)
        assert together.predicted == single.predicted


@pytest.mark.parametrize("count", [0, 1, predict.BATCH_SIZE, predict.BATCH_SIZE + 3])
def test_any_number_of_images(predictor, count):
    images = [_pixels(i, (16, 16)) for i in range(count)]
    predictions = predict_batch(predictor, images)
    assert len(predictions) == count
    if count:
        expected = predictor(np.stack(images))
        actual = np.stack([prediction.probabilities for prediction in predictions])
        np.testing.assert_allclose(actual, expected, atol=1e-6)
        best = expected.argmax(axis=1)
        names = [predictor.class_names[i] for i in best]
        assert [prediction.predicted for prediction in predictions] == names
        np.testing.assert_allclose(
            [prediction.confidence for prediction in predictions], expected.max(axis=1), atol=1e-6
        )


def test_few_shapes_are_compiled_and_none_for_other_weights():
    # Of a size that no other test has.
    bundle = dataclasses.replace(make_bundle(), preprocessing=Preprocessing(image_size=(18, 18)))
    other = dataclasses.replace(bundle, temperature=3.0)
    for predictor in (Predictor(bundle), Predictor(other)):
        for count in range(1, 20):
            predict_batch(predictor, [_pixels(i, (18, 18)) for i in range(count)])
        program = predict._compiled(predictor.model, predictor.preprocessing)
        assert program._cache_size() == 6  # 1, 2, 4, 8, 16, 32.


def test_weights_of_another_network_are_refused():
    bundle = dataclasses.replace(make_bundle(), class_names=["one", "two"])
    with pytest.raises(BundleError, match=r"head.*is \(3,\), not \(2,\)"):
        Predictor(bundle)


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("predict") / "bundle"
    write_bundle(make_bundle(), path)
    return path


def _run(argv, capfd):
    predict.main(argv)
    return list(csv.DictReader(io.StringIO(capfd.readouterr().out)))


def test_the_command_on_a_folder_and_on_a_file(bundle_path, image_folder, tmp_path, capfd):
    rows = _run([f"--bundle={bundle_path}", f"--input={image_folder}"], capfd)
    assert len(rows) == 60
    assert [row["path"] for row in rows] == sorted(map(str, image_folder.rglob("*.png")))
    assert {row["predicted"] for row in rows} <= {"blue", "green", "red"}

    output = tmp_path / "out.csv"
    one = pathlib.Path(rows[7]["path"])
    predict.main([f"--bundle={bundle_path}", f"--input={one}", f"--output={output}"])
    with output.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["predicted"] == rows[7]["predicted"]
    assert float(row["confidence"]) == pytest.approx(float(rows[7]["confidence"]), abs=2e-6)


def test_the_command_fails_after_all_others_are_done(bundle_path, image_folder, tmp_path, capfd):
    (tmp_path / "broken.jpg").write_bytes(b"nonsense")
    (tmp_path / "good.png").write_bytes((image_folder / "red" / "000.png").read_bytes())
    with pytest.raises(DataError, match="1 of 2 images could not be read"):
        predict.main([f"--bundle={bundle_path}", f"--input={tmp_path}"])
    broken, good = csv.DictReader(io.StringIO(capfd.readouterr().out))
    assert "not an image" in broken["error"]
    assert good["predicted"]


@pytest.mark.parametrize(("name", "reason"), [("nowhere", "no file or folder"), ("", "no image")])
def test_an_input_without_images_is_an_error(bundle_path, tmp_path, name, reason):
    with pytest.raises(DataError, match=reason):
        predict.main([f"--bundle={bundle_path}", f"--input={tmp_path / name}"])


def test_importing_it_brings_no_training_code():
    code = "import sys, cnn_jax.predict; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = ("tensorflow_datasets", "tensorflow", "optax", "orbax", "grain", "cv2", "matplotlib")
    heavy += ("scipy", "torch", "tensorboardX", "tensorstore", "imagehash", "ml_collections")
    training = ("cnn_jax.loop", "cnn_jax.step", "cnn_jax.optimizer", "cnn_jax.data.pipeline")
    assert not set(modules) & {*heavy, *training}


def test_what_is_left_out_of_a_folder_is_said(tmp_path, caplog):
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere.png")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link.png").symlink_to("../elsewhere.png")
    with pytest.raises(DataError, match=r"left out: 1 links out of the folder: .*--allow_outside"):
        list_images(folder)
    assert list_images(folder, allow_outside=True) == [folder / "link.png"]
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "notes.txt").write_text("x")
    assert list_images(folder) == [folder / "a.png"]
    assert "1 images (left out: 1 links out of the folder, 1 not images" in caplog.text
