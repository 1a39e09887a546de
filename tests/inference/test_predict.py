import csv
import dataclasses
import io
import pathlib
import pickle
import zipfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bundles import MODEL, make_bundle
from conftest import TRAINING_MODULES, imported_modules
from PIL import Image

from cnn_jax import predict
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.explain.features import embeddings
from cnn_jax.inference import images as image_kinds
from cnn_jax.inference import predictor as predictors
from cnn_jax.inference.bundle import write_bundle
from cnn_jax.inference.images import list_images, preprocess_for_inference
from cnn_jax.inference.predictor import BATCH_SIZE, BundlePredictor, jit_prediction, predict_batch
from cnn_jax.models.network import make_model
from cnn_jax.predict import write_predictions
from cnn_jax.serve.engine import Program
from cnn_jax.serve.versions import Version
from cnn_jax.system.errors import BundleError, DataError


@pytest.fixture(scope="module")
def predictor():
    return BundlePredictor(make_bundle())


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
    hot = BundlePredictor(dataclasses.replace(make_bundle(), temperature=2.0))(images)
    root = np.sqrt(predictor(images))
    np.testing.assert_allclose(hot, root / root.sum(), atol=1e-6)


def test_images_of_another_size_are_refused(predictor):
    with pytest.raises(ValueError, match=r"must be \[B, 16, 16, 3\]"):
        predictor(_pixels(0, (20, 20))[None])


def test_all_kinds_of_images_give_the_same_pixels(tmp_path):
    preprocessing = Preprocessing(image_size=(8, 12))
    pixels = _pixels()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    expected = preprocess_for_inference(pixels, preprocessing)
    assert expected.shape == (8, 12, 3)
    assert expected.dtype == np.uint8
    for image in (path, str(path), path.read_bytes(), Image.fromarray(pixels)):
        np.testing.assert_array_equal(preprocess_for_inference(image, preprocessing), expected)


def test_grey_becomes_rgb_at_the_default_size():
    out = preprocess_for_inference(np.full((5, 7), 9, np.uint8))
    np.testing.assert_array_equal(out, np.full((224, 224, 3), 9))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("no/such/file.jpg", "No such file"),
        ("bad\0name", "null byte"),
        (b"nonsense", "not an image"),
        (np.ones((4, 4, 3)), "has float values from 1 to 1, none .*white_level=1, or .*pass uint8"),
        (np.full((4, 4), 255, np.uint16), "has 16-bit values from 255 to 255, none of which"),
        (np.full((4, 4, 3), 4095, np.uint16), "white_level=4095, or .*; or pass uint8"),
        (np.full((4, 4, 1), 9, np.int64), "has 64-bit signed values from 9 to 9, none of which"),
        (np.zeros((4, 4, 5), np.uint8), r"\[height, width, 1, 3 or 4\], got \[4, 4, 5\]"),
        (np.zeros((4, 4, 4), np.uint16), "RGBA only as uint8, got uint16"),
        (np.zeros((0, 4, 3), np.uint8), r"got \[0, 4, 3\]"),
        (np.zeros((3, 4, 5), np.uint8), r"\[3, 4, 5\]; channels come last"),
        (np.array(3, np.uint8), r"got \[\]"),
        (np.array(["a"] * 4).reshape(2, 2), "must be uint8, got <U1"),
        (b"", "is empty"),
        (io.BytesIO(), "has nothing left to read"),
        (io.StringIO("text"), "must return bytes, got a str; open it with mode 'rb'"),
        (pathlib.Path(), "is a folder"),
        (Image.new("RGB", (100, 100)), "more than max_pixels = 99"),
    ],
)
def test_an_unreadable_image_has_a_clear_error(image, reason):
    with pytest.raises(DataError, match=reason):
        preprocess_for_inference(image, Preprocessing(image_size=(8, 8), max_pixels=99))


def test_an_array_may_have_one_three_or_four_channels():
    preprocessing = Preprocessing(image_size=(20, 30))
    rgb, grey = _pixels(), _pixels()[..., :1]
    alpha = np.full_like(grey, 255)
    for array, expected in (
        (rgb, rgb),
        (jnp.asarray(rgb), rgb),
        (grey, np.repeat(grey, 3, -1)),
        (grey[..., 0], np.repeat(grey, 3, -1)),
        (np.concatenate([rgb, alpha], -1), rgb),
        (np.concatenate([rgb, 0 * alpha], -1), np.full_like(rgb, 255)),
        (rgb[::-1, ::-1], rgb[::-1, ::-1]),
    ):
        np.testing.assert_array_equal(preprocess_for_inference(array, preprocessing), expected)


class _Reader:
    """A file-like object whose `read` returns `result`, or raises it if it is an exception."""

    def __init__(self, result):
        self.result = result

    def read(self):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_unreadable_file_objects_have_a_reason(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    closed = (tmp_path / "image.png").open("rb")
    closed.close()
    with (tmp_path / "image.png").open(encoding="utf-8") as text:
        for file, reason in (
            (text, "open it with mode 'rb'"),
            (closed, "closed file"),
            (_Reader(zipfile.BadZipFile("bad CRC")), "cannot be read: bad CRC"),
            (_Reader(None), "must return bytes, got a NoneType"),
        ):
            with pytest.raises(DataError, match=reason):
                preprocess_for_inference(file)


def _all_kinds(folder):
    """Returns the same picture in every supported form, for example as a path and as an array."""
    path = folder / "image.png"
    Image.fromarray(_pixels()).save(path)
    encoded = path.read_bytes()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("image.png", encoded)
    return {
        "path": path,
        "str": str(path),
        "numpy str": np.str_(path),
        "bytes": encoded,
        "bytearray": bytearray(encoded),
        "memoryview": memoryview(encoded),
        "buffer": io.BytesIO(encoded),
        "open file": path.open("rb"),
        "zip member": zipfile.ZipFile(folder / "images.zip").open("image.png"),
        "reader": _Reader(encoded),
        "pillow": Image.fromarray(_pixels()),
        "open pillow": Image.open(path),
        "array": _pixels(),
        "jax array": jnp.asarray(_pixels()),
        "array-like": _Tensor(_pixels()),
    }


class _Tensor:
    """An array-like object, such as a tensor of another library, that NumPy can convert."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


@pytest.mark.filterwarnings("ignore:unclosed")
def test_one_image_is_a_batch_of_one(predictor, tmp_path):
    """A single image gets one prediction, and not one for each row or byte (keras-io#431)."""
    (expected,) = predict_batch(predictor, [_pixels()])
    for kind, image in _all_kinds(tmp_path).items():
        predictions = predict_batch(predictor, image)
        assert len(predictions) == 1, kind
        assert predictions[0].error is None, kind
        np.testing.assert_array_equal(predictions[0].probabilities, expected.probabilities)
    (grey,) = predict_batch(predictor, _pixels()[..., 0])
    assert grey.error is None


@pytest.mark.filterwarnings("ignore:unclosed")
def test_any_iterable_of_images_is_accepted(predictor, tmp_path):
    images = list(_all_kinds(tmp_path).values())
    (expected,) = predict_batch(predictor, [_pixels()])
    for made in (iter(images), tuple(_all_kinds(tmp_path).values())):
        result = predict_batch(predictor, made)
        assert [prediction.predicted for prediction in result] == [expected.predicted] * len(images)
    pixels = np.stack([_pixels(seed) for seed in range(3)])
    paths = np.array([tmp_path / "image.png", tmp_path / "none.png"], object)
    assert len(predict_batch(predictor, paths)) == 2
    assert len(predict_batch(predictor, paths.astype(str))) == 2
    assert predict_batch(predictor, np.array([])) == []
    expected = [prediction.probabilities for prediction in predict_batch(predictor, list(pixels))]
    for batch in (pixels, jnp.asarray(pixels), _Tensor(pixels), (one for one in pixels)):
        result = [prediction.probabilities for prediction in predict_batch(predictor, batch)]
        np.testing.assert_array_equal(result, expected)


def test_a_generator_may_reuse_its_memory(predictor):
    """Predictions are correct even if a generator writes each frame to the same array.

    The frames have the input size of the network, so no resize copies them.
    """
    frames = [_pixels(seed, (16, 16)) for seed in range(5)]

    def reused():
        memory = np.empty((16, 16, 3), np.uint8)
        for frame in frames:
            memory[:] = frame
            yield memory

    expected = [prediction.probabilities for prediction in predict_batch(predictor, frames)]
    result = [prediction.probabilities for prediction in predict_batch(predictor, reused())]
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (5, "one image or an iterable of images such as a list, got an int; an image is a path"),
        (None, "got a NoneType"),
        ({"a": "a.png"}, "got a dict"),
        ({"a.png"}, "got a set"),
        (np.zeros((3, 20, 30), np.uint8), r"got \[3, 20, 30\]; channels come last"),
        (np.zeros((5, 3, 20, 30), np.uint8), r"got \[5, 3, 20, 30\]; channels come last"),
        (np.zeros((5, 20, 30), np.uint8), r"must be \[batch, height, width, 1, 3 or 4\]"),
        (np.zeros(5, np.uint8), r"got \[5\] of uint8"),
        (np.array(None), r"got \[\] of object"),
        (np.array(["a.png"], "S"), r"got \[1\] of \|S5"),
    ],
)
def test_an_unsupported_argument_for_images_is_one_error(images, message):
    # During tests, a type checker rejects wrong arguments of `predict_batch` before its body runs,
    # so this test calls another function.
    with pytest.raises(TypeError, match=message):
        image_kinds.single_images(images)


@pytest.mark.parametrize("value", [5, None, [[1, 2], [3, 4]], {"b64": ""}])
def test_unsupported_objects_raise_a_type_error_with_the_kinds(predictor, value):
    with pytest.raises(TypeError, match="a path, the bytes of an image file, an open binary file"):
        image_kinds._read(value)
    with pytest.raises(TypeError):
        predict_batch(predictor, [_pixels(), value])


def test_the_predictor_refuses_floats(predictor):
    """If float images from 0 to 1 were accepted, they would be treated as black images."""
    with pytest.raises((TypeError, ValueError), match=r"uint8|UInt8"):
        predictor(np.zeros((1, 16, 16, 3), np.float32))


def test_a_bad_image_affects_no_other(predictor, caplog):
    good = [_pixels(i) for i in range(4)]
    mixed = [good[0], b"nonsense", good[1], "no/such/file.jpg", good[2], good[3]]
    predictions = predict_batch(predictor, mixed)
    assert [prediction.error is None for prediction in predictions] == [1, 0, 1, 0, 1, 1]
    assert predictions[1].predicted is None
    assert "No such file" in str(predictions[3].error)
    assert "no/such/file.jpg" in caplog.text
    assert "image 1 (bytes)" in caplog.text
    singles = [predict_batch(predictor, [image])[0] for image in good]
    for batched, single in zip([predictions[i] for i in (0, 2, 4, 5)], singles, strict=True):
        np.testing.assert_allclose(batched.probabilities, single.probabilities, atol=1e-6)
        assert batched.predicted == single.predicted


@pytest.mark.parametrize("count", [0, 1, BATCH_SIZE, BATCH_SIZE + 3])
def test_any_number_of_images_is_predicted(predictor, count):
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


def _save_twelve_bits(folder, count=3):
    """Saves 16-bit images with values from 0 to 4095, and returns the paths of the files."""
    paths = [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(np.array([[0, 4095], [7, 100]], np.uint16)).save(path)
    return paths


def test_several_dark_images_give_one_warning(predictor, tmp_path, caplog):
    paths = _save_twelve_bits(tmp_path)
    assert None not in [prediction.predicted for prediction in predict_batch(predictor, paths)]
    (record,) = caplog.records
    assert f"{paths[0]}: has 16-bit values from 0 to 4095, and 65535 is white" in record.message
    predict_batch(predictor, [_pixels(), paths[1].read_bytes()])
    assert "image 1 (bytes): has 16-bit values" in caplog.records[1].message
    preprocess_for_inference(Image.open(paths[2]))
    assert "image (PngImageFile): has 16-bit values" in caplog.records[2].message
    bundle = make_bundle()
    preprocessing = dataclasses.replace(bundle.preprocessing, white_level=4095.0)
    predict_batch(BundlePredictor(dataclasses.replace(bundle, preprocessing=preprocessing)), paths)
    assert len(caplog.records) == 3


def test_values_above_the_white_level_give_one_warning(caplog):
    preprocessing = Preprocessing(image_size=(8, 8), white_level=1.0)
    preprocess_for_inference(np.array([[0, 1.05]]), preprocessing)
    assert not caplog.records
    preprocess_for_inference(np.array([[0, 255.0]]), preprocessing)
    (record,) = caplog.records
    assert "image (ndarray): has float values from 0 to 255, and 1 is white" in record.message
    assert "\n" not in record.message


def test_the_command_warns_once_for_all_batches(predictor, tmp_path, caplog):
    paths = _save_twelve_bits(tmp_path, 65)
    with (tmp_path / "out.csv").open("w") as file:
        write_predictions(predictor, paths, file)
    assert len(caplog.records) == 1


def test_a_server_warns_once_of_each_version(predictor, tmp_path, caplog):
    content = _save_twelve_bits(tmp_path)[0].read_bytes()
    for number in (1, 2):
        version = Version(
            "shapes",
            number,
            predictor,
            predictor.preprocessing,
            *[mock.Mock(spec=Program)] * 2,
            {},
            "",
            (1,),
            0.0,
        )
        version.read(content)
        version.read(content)
        assert len(caplog.records) == number
        assert f"an image for shapes, version {number}: has 16-bit" in caplog.records[-1].message


def test_programs_are_few_and_shared_between_weights():
    # No other test uses this image size, so no program for this size is compiled before this test.
    bundle = dataclasses.replace(make_bundle(), preprocessing=Preprocessing(image_size=(18, 18)))
    other = dataclasses.replace(bundle, temperature=3.0)
    for predictor in (BundlePredictor(bundle), BundlePredictor(other)):
        for count in range(1, 20):
            predict_batch(predictor, [_pixels(i, (18, 18)) for i in range(count)])
        program = jit_prediction(predictor.model, predictor.preprocessing, is_storable=False)
        # The five programs are for the batch sizes 2, 4, 8, 16 and 32.
        assert program._cache_size() == 5


@pytest.mark.parametrize("max_bytes", [0, 2**26])
def test_the_program_for_one_image_has_the_present_weights(monkeypatch, max_bytes):
    monkeypatch.setattr(predictors, "_MAX_CONSTANT_BYTES", max_bytes)
    predictor, other = BundlePredictor(make_bundle(0)), BundlePredictor(make_bundle(1))
    images = np.stack([_pixels(i, (16, 16)) for i in range(2)])
    np.testing.assert_allclose(predictor(images[:1]), predictor(images)[:1], atol=1e-6)
    predictor.variables = other.variables
    np.testing.assert_allclose(predictor(images[:1]), other(images)[:1], atol=1e-6)
    predictor.temperature = 3.0
    np.testing.assert_allclose(predictor(images[:1]), predictor(images)[:1], atol=1e-6)
    loaded = pickle.loads(pickle.dumps(predictor))
    np.testing.assert_array_equal(loaded(images[:1]), predictor(images[:1]))


def test_weights_of_another_network_are_refused():
    bundle = dataclasses.replace(make_bundle(), class_names=["one", "two"])
    with pytest.raises(BundleError, match=r"head.*is \(3,\), not \(2,\)"):
        BundlePredictor(bundle)


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("predict") / "bundle"
    write_bundle(make_bundle(), path)
    return path


def _run(argv, capfd):
    predict.main(argv)
    return list(csv.DictReader(io.StringIO(capfd.readouterr().out)))


def test_the_command_reads_folders_and_files(bundle_path, image_folder, tmp_path, capfd):
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


def test_the_command_fails_after_all_other_images_are_predicted(
    bundle_path, image_folder, tmp_path, capfd
):
    (tmp_path / "broken.jpg").write_bytes(b"nonsense")
    (tmp_path / "good.png").write_bytes((image_folder / "red" / "000.png").read_bytes())
    with pytest.raises(DataError, match="1 of 2 images could not be read"):
        predict.main([f"--bundle={bundle_path}", f"--input={tmp_path}"])
    broken, good = csv.DictReader(io.StringIO(capfd.readouterr().out))
    assert "not an image" in broken["error"]
    assert good["predicted"]


def test_several_inputs_give_each_image_once(bundle_path, image_folder, tmp_path, capfd):
    (tmp_path / "a[1].png").write_bytes((image_folder / "red" / "000.png").read_bytes())
    red, first = image_folder / "red", image_folder / "red" / "000.png"
    inputs = [str(first), f"{red}/00?.png", str(tmp_path / "a[1].png"), f"{image_folder}/gr*"]
    rows = _run([f"--bundle={bundle_path}", "--input", *inputs, "--input", str(first)], capfd)
    expected = [*sorted(red.glob("00?.png")), tmp_path / "a[1].png"]
    expected += sorted((image_folder / "green").glob("*.png"))
    assert [row["path"] for row in rows] == list(map(str, expected))
    rows = _run([f"--bundle={bundle_path}", f"--input={image_folder}/**/*.png"], capfd)
    assert len(rows) == 60
    with pytest.raises(DataError, match=r"--input: no file matches .*\*\.jpg"):
        predict.main([f"--bundle={bundle_path}", f"--input={tmp_path}/*.jpg"])


def test_a_missing_file_among_several_inputs_has_its_error(bundle_path, image_folder, capfd):
    good, missing = image_folder / "red" / "000.png", image_folder / "missing.png"
    with pytest.raises(DataError, match="1 of 2 images could not be read"):
        predict.main([f"--bundle={bundle_path}", "--input", str(missing), str(good)])
    rows = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    assert [row["path"] for row in rows] == [str(missing), str(good)]
    assert rows[0]["error"] == "No such file or directory"
    assert rows[1]["predicted"]


def test_a_pattern_leaves_out_output_folders(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "photos/dog.png", "photos/maps/0_grad_cam.png", "more/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for folder in ("photos/maps", "more"):
        (tmp_path / folder / "explanations.json").touch()

    def listed(*inputs):
        caplog.clear()
        return list(map(str, image_kinds.list_inputs(inputs)))

    for pattern in ("**/*.png", "./**/*.png"):
        assert listed(pattern) == ["cat.png", "photos/dog.png"]
        (message,) = caplog.messages
        assert message == f"{pattern}: 2 matches (left out: 2 folders that cnn_jax wrote)"
    assert listed(f"{tmp_path}/**/*.png") == [f"{tmp_path}/cat.png", f"{tmp_path}/photos/dog.png"]
    # The pattern matches the output folder photos/maps, but the images in this folder are left out.
    assert listed("photos/*") == ["photos/dog.png"]
    assert listed("photos/**") == ["photos/dog.png"]
    with pytest.raises(DataError, match=r"no file matches \*/0.png \(left out: 1 folder "):
        listed("*/0.png")
    # An output folder is read if the pattern contains the name of the folder.
    for named in ("photos/maps/*.png", "photos/maps", "photos/maps/0_grad_cam.png"):
        assert listed(named) == ["photos/maps/0_grad_cam.png"]
        assert caplog.messages == [] or named == "photos/maps"


def test_further_columns_have_the_next_most_probable_classes(
    bundle_path, image_folder, tmp_path, capfd
):
    (tmp_path / "broken.jpg").write_bytes(b"nonsense")
    flags = [f"--bundle={bundle_path}", f"--input={image_folder / 'red'}"]
    plain = _run(flags, capfd)
    assert list(plain[0]) == ["path", "predicted", "confidence", "error"]
    two, all_of_them = _run([*flags, "--top=2"], capfd), _run([*flags, "--top=9"], capfd)
    assert list(two[0]) == [*plain[0], "predicted_2", "confidence_2"]
    assert list(all_of_them[0]) == [*two[0], "predicted_3", "confidence_3"]
    for short, row in zip(plain, all_of_them, strict=True):
        assert {key: row[key] for key in short} == short
        names = [row[key] for key in ("predicted", "predicted_2", "predicted_3")]
        values = [float(row[key]) for key in ("confidence", "confidence_2", "confidence_3")]
        assert sorted(names) == ["blue", "green", "red"]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=2e-6)
    flags[1] = f"--input={tmp_path}"
    with pytest.raises(DataError, match="1 of 1 images"):
        predict.main([*flags, "--top=2"])
    (row,) = csv.DictReader(io.StringIO(capfd.readouterr().out))
    assert (row["error"], row["predicted_2"]) == ("is not an image of a known format", "")


def test_a_run_is_accepted_as_a_bundle(bundle_path, tmp_path):
    assert BundlePredictor.load(bundle_path.parent).class_names == ["blue", "green", "red"]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="is a run without a bundle, which is written when tr"):
        BundlePredictor.load(tmp_path)
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BundleError, match=r"bundle is not a bundle: there is no .*bundle\.json"):
        BundlePredictor.load(tmp_path)


@pytest.mark.parametrize(("name", "reason"), [("nowhere", "no file or folder"), ("", "no image")])
def test_an_input_without_images_is_an_error(bundle_path, tmp_path, name, reason):
    with pytest.raises(DataError, match=reason):
        predict.main([f"--bundle={bundle_path}", f"--input={tmp_path / name}"])


def test_importing_predict_imports_no_training_code():
    loaded = imported_modules("cnn_jax.predict", "cnn_jax.inference.ensemble")
    assert not loaded & {*TRAINING_MODULES, "scipy"}


def test_files_left_out_of_a_folder_are_counted(tmp_path, caplog):
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere.png")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link.png").symlink_to("../elsewhere.png")
    with pytest.raises(DataError, match=r"left out: 1 link out of the folder: .*--allow_outside"):
        list_images(folder)
    assert list_images(folder, allow_outside=True) == [folder / "link.png"]
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "notes.txt").write_text("x")
    assert list_images(folder) == [folder / "a.png"]
    assert (
        "1 images (left out: 1 link out of the folder, 1 file that is not an image" in caplog.text
    )


def test_one_pass_returns_probabilities_and_embeddings():
    predictor = BundlePredictor(make_bundle())
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    probabilities, found = predictor.predict_with_embeddings(images)
    assert probabilities.dtype == found.dtype == np.float32
    np.testing.assert_allclose(probabilities, predictor(images), atol=1e-6)
    np.testing.assert_allclose(found, embeddings(predictor, images), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="images must be"):
        predictor.predict_with_embeddings(images[:, :8])
