import base64
import dataclasses
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from bundles import make_bundle
from conftest import REPOSITORY
from PIL import Image

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.explain import __main__ as explain_command
from cnn_jax.explain import pictures
from cnn_jax.explain.maps import grad_cam, methods_for
from cnn_jax.explain.overlay import draw_overlay
from cnn_jax.inference.bundle import write_bundle
from cnn_jax.inference.images import list_images, list_inputs, preprocess_for_inference
from cnn_jax.inference.predictor import BundlePredictor, predict_batch
from cnn_jax.system.errors import ConfigError, DataError


def _make_predictor(**metrics):
    bundle = make_bundle(class_names=("Blue jay", "<b>green</b>", "猫"))
    return BundlePredictor(dataclasses.replace(bundle, metrics=metrics))


@pytest.fixture(scope="module")
def predictor():
    """A predictor whose bundle records a test accuracy above chance (p = 0.001)."""
    return _make_predictor(test={"agreement_p_value": 0.001})


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (40 + i, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"<i>{i}.png")
    return sorted(tmp_path.glob("*.png"))


def test_each_map_has_its_images_size_and_is_on_the_page(predictor, paths, tmp_path):
    output = tmp_path / "out"
    result = pictures.explain(predictor, paths, output, ["all"])
    assert json.loads((output / "explanations.json").read_text()) == result
    names = list(methods_for(predictor))
    assert list(result["methods"]) == names
    for path, image, prediction in zip(
        paths, result["images"], predict_batch(predictor, paths), strict=True
    ):
        assert image["path"] == str(path)
        assert image["predicted"] == image["explained"] == prediction.predicted
        assert image["confidence"] == pytest.approx(prediction.confidence, abs=1e-6)
        for name in names:
            with Image.open(path) as original, Image.open(output / image["pictures"][name]) as map_:
                assert map_.size == original.size
    assert "feature_maps" in result["images"][7]
    assert "feature_maps" not in result["images"][8]
    assert (output / "filters.png").exists()

    page = (output / "index.html").read_text()
    assert "<i>" not in page
    assert "<b>" not in page
    # All images are embedded in the page, so the page does not refer to files.
    assert not re.search(r'(src|href)="(?!data:)', page)
    sources = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(sources) == 10 * (1 + len(names)) + 8 * 2 + 1
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source))).verify()
    for method in result["methods"].values():
        assert method["verdict"] in page


def test_the_colours_are_brightest_where_the_map_is_largest(predictor, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.full((16, 16, 3), 128, np.uint8)).save(path)
    values = np.zeros((16, 16), np.float32)
    values[3, 12] = 1
    names = pictures._save_overlays(tmp_path, 0, path, {"grad_cam": values}, predictor)
    brightness = np.asarray(Image.open(tmp_path / names["grad_cam"]).convert("L"))
    assert np.unravel_index(brightness.argmax(), brightness.shape) == (3, 12)


@pytest.mark.parametrize(
    ("mode", "size", "corner"),
    [
        ("stretch", (32, 16), (24, 3)),
        ("crop", (32, 16), (20, 3)),
        ("crop", (16, 40), (12, 15)),
        (
            "pad",
            (32, 16),
            (24, -1),
        ),  # Row 3 of the map belongs to the padding, so nothing is drawn.
        ("pad", (16, 20), (14, 4)),
    ],
)
def test_a_map_lies_on_the_part_of_the_image_that_was_seen(mode, size, corner):
    """The map has one bright value, which must be drawn at the right position in the image."""
    values = np.zeros((16, 16), np.float32)
    values[3, 12] = 1
    image = Image.new("RGB", size, (128, 128, 128))
    drawn = draw_overlay(image, values, Preprocessing((16, 16), resize=mode))
    assert drawn.size == size
    brightness = np.asarray(drawn.convert("L"), float)
    column, row = corner
    if row < 0:
        assert np.ptp(brightness) < 2
        return
    brightest = np.argwhere(brightness == brightness.max()).mean(axis=0)
    assert np.abs(brightest - (row, column)).max() <= 1
    is_unseen = np.isclose(brightness, 0.4 * 128, atol=1)
    seen = {"stretch": 1, "pad": 1, "crop": 256 / (size[0] * size[1])}[mode]
    assert 1 - is_unseen.mean() == pytest.approx(seen)


def test_a_chosen_class_is_explained(predictor, paths, tmp_path):
    result = pictures.explain(predictor, paths[:2], tmp_path / "out", class_name="猫")
    pixels = np.stack([preprocess_for_inference(p, predictor.preprocessing) for p in paths[:2]])
    for image, row in zip(result["images"], predictor(pixels), strict=True):
        assert image["explained"] == "猫"
        assert image["probability"] == pytest.approx(float(row[2]), abs=1e-6)
    assert grad_cam(predictor, pixels, np.array([2, 2], np.int32)).shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blue jay", "no class 'blue jay'; did you mean Blue jay\\?"),
        ("BlueJay", "did you mean Blue jay"),
        ("zebra", "no class 'zebra'; it has Blue jay, <b>green</b>, 猫"),
    ],
)
def test_an_unknown_class_is_refused_with_a_suggestion(predictor, name, message):
    with pytest.raises(ConfigError, match=message):
        pictures.choose_class(predictor, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grad-cm", "did you mean grad_cam"),
        ("", "the methods are grad_cam, "),
        ("cam", r"needs a network whose head receives the mean feature maps \(model\.dense=0\)"),
    ],
)
def test_an_impossible_method_is_refused(predictor, name, message):
    with pytest.raises(ConfigError, match=message):
        pictures.choose_methods(predictor, [name])


def test_method_names_have_several_spellings(predictor):
    spellings = ["gradcam", "Grad-CAM", "grad_cam", "GradCAM++", "smooth-grad"]
    expected = ["grad_cam", "grad_cam_plus_plus", "smooth_grad"]
    assert pictures.choose_methods(predictor, spellings) == expected


def test_unreadable_images_are_listed_beside_the_explained_images(predictor, paths, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    result = pictures.explain(predictor, [tmp_path / "bad.png", paths[0]], tmp_path / "out")
    assert "not an image" in result["images"][0]["error"]
    assert result["images"][1]["error"] is None
    assert "Left out: " in (tmp_path / "out" / "index.html").read_text()


def test_bad_images_are_logged_and_leave_no_output(predictor, tmp_path, caplog):
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="none of 1 images could be read"):
        pictures.explain(predictor, [tmp_path / "bad.png"], tmp_path / "out")
    assert caplog.messages == [f"{tmp_path / 'bad.png'}: is not an image of a known format"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"test": {"agreement_p_value": 0.024}}, ""),
        ({"test": {"agreement_p_value": 0.025}}, "is not shown to be better than guessing"),
        ({"validation": {"agreement_p_value": 0.0}}, ""),
        (
            {"test": {"agreement_p_value": 0.5}, "validation": {"agreement_p_value": 0.0}},
            "is not shown to be better than guessing",
        ),
        ({"train": {"agreement_p_value": 0.0}}, "does not say whether the network is better"),
        ({"test": {"accuracy": 0.9}}, "does not say whether the network is better"),
        ({}, "does not say whether the network is better"),
    ],
)
def test_methods_have_a_verdict_only_if_the_network_has_learned(metrics, reason, paths, tmp_path):
    result = pictures.explain(_make_predictor(**metrics), paths, tmp_path / "out")
    method = result["methods"]["grad_cam"]
    page = (tmp_path / "out" / "index.html").read_text()
    if reason:
        assert reason in result["no_verdict"]
        assert result["no_verdict"] in page
        assert method["verdict"] == "no verdict"
        assert {check["passes"] for check in method["checks"].values()} == {None}
    else:
        assert result["no_verdict"] == ""
        assert re.search("passes|fails", method["verdict"])
        assert method["verdict"] in page


def test_the_command(tmp_path, paths):
    write_bundle(make_bundle(), tmp_path / "bundle")

    def run(*arguments):
        command = [sys.executable, "-m", "cnn_jax.explain", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)

    flags = [f"--bundle={tmp_path / 'bundle'}", f"--input={paths[0]}"]
    done = run(*flags, f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    verdict = (
        "No verdict on the methods: the bundle does not say whether the network is better than "
        "guessing."
    )
    assert done.stdout.splitlines() == [verdict, f"{tmp_path / 'out'}/index.html"]

    (tmp_path / "file").touch()
    done = run(*flags, f"--output={tmp_path / 'file' / 'out'}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --output: cannot create")
    assert "Traceback" not in done.stderr

    weights = tmp_path / "bundle" / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = run(*flags, f"--output={tmp_path / 'out'}")
    assert done.returncode == 1
    assert "is damaged" in done.stderr.splitlines()[-1]


def test_maps_in_the_folder_of_the_images_are_not_explained(paths, tmp_path, capsys):
    write_bundle(make_bundle(), tmp_path / "bundle")
    flags = [f"--bundle={tmp_path}/bundle", f"--input={tmp_path}"]
    for _ in range(2):
        explain_command.main([*flags, f"--output={tmp_path}/maps"])
        explained = json.loads((tmp_path / "maps" / "explanations.json").read_text())["images"]
        assert [image["path"] for image in explained] == list(map(str, paths))
    for arguments in (flags, [flags[0], f"--input={paths[0]}"]):
        with pytest.raises(ConfigError, match=r"^--output: .* holds images of the input"):
            explain_command.main([*arguments, f"--output={tmp_path}"])


@pytest.mark.parametrize(
    ("inputs", "output", "is_refused"),
    [
        (["photos/**"], "photos", True),
        (["photos/**"], "photos/red", True),
        (["photos/**/*.png"], "photos/red", True),
        (["*/red/*.png"], "photos", True),
        (["photos/*/*.png"], "photos/maps", False),
        (["photos/red/*.png"], "photos", False),
        (["photos/[r]ed"], "photos/red", True),
        (["photos"], "photos", True),
        (["photos"], "photos/red", True),
        (["photos"], "photos/maps", False),
        (["photos"], ".", False),
        (["cat.jpg"], ".", True),
        (["cat.jpg", "photos/red/1.png"], "photos/red", True),
        (["cat.jpg"], "photos", False),  # The output folder contains no input image.
        (["cat.jpg", "photos/red/1.png"], "photos", False),
        (["*.jpg"], "photos", False),
    ],
)
def test_maps_must_not_be_written_among_the_images(
    tmp_path, monkeypatch, inputs, output, is_refused
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "red").mkdir(parents=True)
    for name in ("cat.jpg", "photos/red/1.png"):
        (tmp_path / name).touch()
    arguments = (output, inputs, list_inputs(inputs))
    if is_refused:
        with pytest.raises(ConfigError, match=f"^--output: {output} holds images of the input"):
            explain_command._check_output(*arguments)
    else:
        explain_command._check_output(*arguments)


def test_maps_of_a_killed_process_are_not_read_as_images(predictor, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_judge", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pictures.explain(predictor, paths, tmp_path / "maps")
    assert (tmp_path / "maps" / "0000-grad_cam.png").exists()
    assert list_images(tmp_path) == paths
