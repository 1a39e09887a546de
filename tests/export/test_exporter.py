import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import write_images
from exports import write_test_bundle
from PIL import Image

from cnn_jax import evaluate, predict, robustness
from cnn_jax.data.decode import decode
from cnn_jax.export import __main__ as command
from cnn_jax.export import certificate, exporter, onnx_model
from cnn_jax.export.function import ExportError
from cnn_jax.inference import evaluation
from cnn_jax.inference import exported as exported_models
from cnn_jax.inference.bundle import digest, read_bundle
from cnn_jax.inference.exported import OnnxPredictor, load_predictor
from cnn_jax.inference.images import preprocess_for_inference
from cnn_jax.inference.predictor import BundlePredictor, TrainedPredictor
from cnn_jax.system.errors import BundleError, ConfigError, DataError

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def bundle(image_folder, tmp_path_factory):
    return write_test_bundle(tmp_path_factory.mktemp("bundle") / "bundle", image_folder)


@pytest.fixture(scope="module")
def exported(bundle, tmp_path_factory):
    """The folder of an export to ONNX."""
    folder = tmp_path_factory.mktemp("export") / "onnx"
    exporter.export(bundle, folder)
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def test_the_certificate_has_all_facts(bundle, exported):
    statement = json.loads((exported / "certificate.json").read_text())
    assert statement["bundle_sha256"] == digest(bundle)
    assert statement["comparison"].keys() == {"validation", "test"}
    for split, count in (("validation", 12), ("test", 6)):
        values = statement["comparison"][split]
        assert values["count"] == count
        assert values["agreement"] == 1
        assert values["largest_difference"] < 5e-6
        assert values["before"]["accuracy"] == values["after"]["accuracy"]
        assert values["accuracy_lost"] == {"mean": 0, "interval": [0, 0]}
    assert statement["versions"].keys() >= {"cnn_jax", "jax", "onnx", "onnxruntime"}
    measured = statement["measured"]
    assert measured["milliseconds_per_image"].keys() == {"1", "32"}
    assert measured["machine"]["processor"]
    assert 10e6 < measured["peak_memory_bytes"] < 250e6


def test_the_golden_images_have_their_probabilities(exported):
    statement = json.loads((exported / "certificate.json").read_text())
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    pixels_session = onnxruntime.InferenceSession(exported / "pixels.onnx")
    preprocessing = OnnxPredictor(exported).preprocessing
    # The test split has six images.
    names = [*(f"golden/{i}.png" for i in range(6)), "golden/orientation.jpg", "golden/alpha.png"]
    assert [record["file"] for record in statement["golden"]] == names
    for record in statement["golden"]:
        path = exported / record["file"]
        images = preprocess_for_inference(path, preprocessing)[None]
        (probabilities,) = session.run(None, {"images": images})[0]
        np.testing.assert_allclose(probabilities, record["probabilities"], atol=1e-6)
        pixels = decode(path.read_bytes())
        (probabilities,) = pixels_session.run(None, {"pixels": pixels})[0]
        np.testing.assert_allclose(probabilities, record["probabilities"], atol=0.01)


def test_two_golden_images_need_their_orientation_and_their_transparency(exported):
    plain = np.asarray(Image.open(exported / "golden" / "0.png"), int)
    turned = np.asarray(Image.open(exported / "golden" / "orientation.jpg"), int)
    assert turned.shape == (plain.shape[1], plain.shape[0], 3)
    assert np.abs(np.rot90(turned, -1) - plain).mean() < 5
    assert np.abs(decode((exported / "golden" / "orientation.jpg").read_bytes()) - plain).mean() < 5
    last = np.asarray(Image.open(exported / "golden" / "5.png"), float)
    rgba = np.asarray(Image.open(exported / "golden" / "alpha.png"), float)
    np.testing.assert_array_equal(rgba[..., :3], last)
    opacity = rgba[..., 3:] / 255
    assert set(opacity[0, [0, -1], 0]) == {0, 1}
    pixels = decode((exported / "golden" / "alpha.png").read_bytes())
    np.testing.assert_allclose(pixels, opacity * last + (1 - opacity) * 255, atol=1)


def test_the_readme_runs_on_all_golden_images(exported):
    readme = (exported / "README.md").read_text()
    assert len(readme.splitlines()) <= 20
    code = "\n".join(line[4:] for line in readme.splitlines() if line.startswith("    "))
    records = json.loads((exported / "certificate.json").read_text())["golden"]
    codes = [code.replace("golden/0.png", record["file"]) for record in records]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(codes)],
        cwd=exported,
        capture_output=True,
        text=True,
        check=True,
    )
    printed = [float(number) for number in re.findall(r"[\d.]+(?:e-\d+)?", result.stdout)]
    expected = np.concatenate([record["probabilities"] for record in records])
    np.testing.assert_allclose(printed, expected, atol=3e-4)


def test_an_export_is_a_predictor_with_the_bundles_results(bundle, exported):
    loaded, original = load_predictor(exported), load_predictor(bundle)
    assert isinstance(loaded, OnnxPredictor)
    assert isinstance(original, BundlePredictor)
    assert isinstance(loaded, TrainedPredictor)
    assert loaded.class_names == original.class_names
    assert loaded.preprocessing == original.preprocessing
    assert loaded.data == original.data
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    np.testing.assert_allclose(loaded(images), original(images), atol=5e-6)
    with pytest.raises(ValueError, match="of uint8, got"):
        loaded(images[:, :8])


def test_a_batch_is_computed_in_parts_so_that_the_memory_stays_small(exported, monkeypatch):
    loaded = OnnxPredictor(exported)
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    expected = loaded(images)
    sizes, session = [], loaded._session

    def run(outputs, inputs):
        sizes.append(len(inputs["images"]))
        return session.run(outputs, inputs)

    monkeypatch.setattr(loaded, "_session", types.SimpleNamespace(run=run))
    monkeypatch.setattr(exported_models, "_PIXELS_OF_CORE", 16 * 16)
    monkeypatch.setattr(exported_models, "num_cores", lambda: 2)
    np.testing.assert_allclose(loaded(images), expected, atol=1e-6)
    assert sizes == [2, 2, 1]
    monkeypatch.setattr(exported_models, "_PIXELS_OF_CORE", 1)
    np.testing.assert_allclose(loaded(images), expected, atol=1e-6)
    assert sizes[3:] == [1] * 5
    assert loaded(images[:0]).shape == (0, expected.shape[1])


@pytest.mark.parametrize("name", ["predict", "evaluate", "robustness"])
def test_commands_accept_an_export_in_place_of_a_bundle(name, bundle, exported, tmp_path):
    outputs = []
    for path in (bundle, exported):
        flags = [f"--bundle={path}", f"--output={tmp_path / 'out'}"]
        if name == "predict":
            predict.main([*flags, "--input", str(exported / "golden")])
        elif name == "evaluate":
            evaluate.main(flags)
        else:
            robustness.main([*flags, "--sample=3"])
        outputs.append((tmp_path / "out").read_text())
    first, second = (re.findall(r"[\d.]*\d", output) for output in outputs)
    assert len(first) > 10
    np.testing.assert_allclose(np.array(first, float), np.array(second, float), atol=1e-3)


def test_an_export_is_served_without_importing_jax(exported):
    code = (
        "import sys, cnn_jax.serve.server, cnn_jax.serve.loader\n"
        "from cnn_jax.inference.exported import read_model\n"
        "from cnn_jax.serve.versions import make_version\n"
        "version = make_version('name', 1, read_model(sys.argv[1]), 'digest', 10_000, (1, 2))\n"
        "assert version.explain_program is None\n"
        "print('jax' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, exported], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"


def test_explanations_need_a_bundle(exported):
    with pytest.raises(BundleError, match=r"is an exported model, .* name the bundle from which"):
        BundlePredictor.load(exported)
    with pytest.raises(BundleError, match="is an exported model"):
        read_bundle(exported)


@pytest.mark.parametrize(
    "file", ["model.onnx", "pixels.onnx", "certificate.json", "golden/0.png", "README.md"]
)
def test_a_changed_file_is_refused(copied, file):
    content = bytearray((copied / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / file).write_bytes(content)
    with pytest.raises(BundleError, match=f"{file} is damaged"):
        load_predictor(copied)
    (copied / file).unlink()
    with pytest.raises(BundleError, match=f"there is no .*{file}"):
        load_predictor(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": None}, "is not a bundle: TypeError"),
        ({"class_names": ["a", "b"]}, r"model.onnx does not fit bundle.json: .*\[3\].*\[2\]"),
        ({"preprocessing": None}, "is not a bundle: TypeError"),
        ({"export": None, "files": {}}, "is not a bundle: TypeError"),
        ({"temperature": ...}, "is not a bundle: KeyError"),
    ],
)
def test_a_damaged_description_is_one_line(copied, changes, message):
    description = json.loads((copied / "bundle.json").read_text()) | changes
    description = {key: value for key, value in description.items() if value is not ...}
    (copied / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(BundleError, match=message) as caught:
        load_predictor(copied)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_do_not_fit_the_model(copied):
    description = json.loads((copied / "bundle.json").read_text())
    description["preprocessing"]["image_size"] = [24, 16]
    (copied / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(BundleError, match=r"\[16, 16, 3\].*, and bundle.json .*\[24, 16, 3\]"):
        load_predictor(copied)


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_a_file_that_is_no_model_is_one_line(copied, content):
    (copied / "model.onnx").write_bytes(content)
    description = json.loads((copied / "bundle.json").read_text())
    description["files"]["model.onnx"]["sha256"] = hashlib.sha256(content).hexdigest()
    (copied / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(BundleError, match=r"model.onnx cannot be loaded by ONNX Runtime") as caught:
        load_predictor(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_file_outside_the_folder_is_refused(copied, name):
    description = json.loads((copied / "bundle.json").read_text())
    description["files"][name] = {"sha256": "0"}
    (copied / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(BundleError, match="outside the folder"):
        load_predictor(copied)


@pytest.mark.parametrize("file_format", ["onnx", "stablehlo"])
def test_two_exports_have_the_same_bytes(bundle, tmp_path, file_format):
    for name in ("first", "second"):
        exporter.export(bundle, tmp_path / name, file_format)
    files = [
        {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("first", "second")
    ]
    # The measured times differ, and bundle.json has the sha256 of the certificate.
    statements = [json.loads(content.pop("certificate.json")) for content in files]
    for statement, content in zip(statements, files, strict=True):
        del statement["measured"], content["bundle.json"]
    assert statements[0] == statements[1]
    assert files[0] == files[1]


def test_stablehlo_states_its_compatibility_and_is_not_loaded(bundle, tmp_path):
    exporter.export(bundle, tmp_path / "out", "stablehlo")
    statement = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert statement["platforms"] == ["cpu", "cuda", "tpu"]
    assert statement["compatibility"]["newer_jax_reads_it_for_days"] == 180
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "6 months" in readme
    code = "\n".join(line[4:] for line in readme.splitlines() if line.startswith("    "))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True)
    with pytest.raises(BundleError, match="an export to stablehlo, which cnn_jax does not load"):
        load_predictor(tmp_path / "out")


def test_a_bfloat16_bundle_is_compared_in_both_precisions(image_folder, tmp_path):
    path = write_test_bundle(tmp_path / "bundle", image_folder, precision="bfloat16")
    values = exporter.export(path, tmp_path / "out")["comparison"]["test"]
    assert values["largest_difference_in_float32"] < 5e-6
    assert 1e-4 < values["largest_difference"] < 0.05
    assert values["before"]["loss"] == evaluate_test_split(path)["loss"]
    assert values["before"]["loss"] != values["after"]["loss"]


def evaluate_test_split(path):
    predictor = load_predictor(path)
    return evaluation.evaluate(predictor, evaluation.open_as_trained(predictor))


@pytest.mark.parametrize("int8", [False, True])
def test_other_data_changes_neither_the_metrics_nor_the_ranges(bundle, tmp_path, int8):
    write_images(tmp_path / "images", per_class=20, seed=3)
    source = f"folder:{tmp_path / 'images'}"
    options = {"int8": int8, "max_loss": 1.0}
    statement = exporter.export(bundle, tmp_path / "other", source=source, **options)
    usual = exporter.export(bundle, tmp_path / "usual", **options)
    assert statement["data"] == source != usual["data"]
    assert statement["comparison"] != usual["comparison"]
    assert statement["sha256"] == usual["sha256"]
    assert statement.get("calibration_data") == (usual["data"] if int8 else None)
    assert load_predictor(tmp_path / "other").metrics == read_bundle(bundle).metrics
    metrics = load_predictor(tmp_path / "usual").metrics
    assert metrics["test"] == usual["comparison"]["test"]["after"]


def test_onnxruntime_may_come_from_another_package(bundle, tmp_path, monkeypatch):
    version = importlib.metadata.version

    def find(name):
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", find)
    statement = exporter.export(bundle, tmp_path / "out")
    assert statement["versions"]["onnxruntime"] == onnxruntime.__version__


def _wrong_model(monkeypatch, change):
    original = exporter._make_onnx

    def make(predictor, batches):
        model = original(predictor, batches)
        run = model.predictor
        wrong = exporter.FunctionPredictor(run, lambda images: change(run(images)))
        return dataclasses.replace(model, predictor=wrong)

    monkeypatch.setattr(exporter, "_make_onnx", make)


def test_nothing_is_written_if_accuracy_is_lost(bundle, tmp_path, monkeypatch):
    before = certificate.compare_probabilities

    def always_right(probabilities, after, labels, names):
        return before(np.eye(3, dtype=np.float32)[labels], after, labels, names)

    monkeypatch.setattr(certificate, "compare_probabilities", always_right)
    with pytest.raises(ExportError, match=r"loses [\d.]+ points .* \(100.00 % to .* nothing was"):
        exporter.export(bundle, tmp_path / "out", max_loss=0.1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_if_a_probability_differs(bundle, tmp_path, monkeypatch):
    _wrong_model(monkeypatch, lambda p: p + np.float32([0.002, -0.001, -0.001]))
    with pytest.raises(ExportError, match=r"differs by 2.0e-03 .* nothing was written"):
        exporter.export(bundle, tmp_path / "out", max_loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_if_the_graph_resizes_wrongly(bundle, tmp_path, monkeypatch):
    right = onnx_model.pixels_model
    monkeypatch.setattr(certificate, "_PIXELS_LIMIT", 1e-3)

    def wrong(*arguments):
        model = right(*arguments)
        for node in model.graph.node:
            if node.op_type == "Resize":
                kept = [
                    one for one in node.attribute if one.name == "coordinate_transformation_mode"
                ]
                del node.attribute[:]
                node.attribute.extend(kept)
        return model

    monkeypatch.setattr(onnx_model, "pixels_model", wrong)
    with pytest.raises(ExportError, match="the model that resizes images itself has other prob"):
        exporter.export(bundle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_data_without_images_to_compare_is_refused():
    with pytest.raises(ExportError, match="no validation images and no test images"):
        certificate.check({}, 0.005, is_exact=False)


def test_images_are_read_before_the_process_of_the_model_starts(bundle, tmp_path, monkeypatch):
    def fail(*arguments):
        raise DataError("0.png cannot be read")

    monkeypatch.setattr(certificate, "golden_images", fail)
    monkeypatch.setattr(exporter, "_make_onnx", None)
    with pytest.raises(DataError, match=r"0\.png"):
        exporter.export(bundle, tmp_path / "out")


def test_an_image_that_is_gone_is_named(bundle, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    source = f"folder:{tmp_path / 'images'}"
    dataset = evaluation.open_as_trained(load_predictor(bundle), source)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(DataError, match=rf"^{source}: blue/\d+\.png cannot be read: No such file"):
        certificate.golden_images(dataset, 10**6, 0.0)


def test_an_earlier_export_survives_a_failed_replacement(bundle, copied, monkeypatch):
    rename = pathlib.Path.rename

    def fail(path, target):
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        exporter.export(bundle, copied)
    assert load_predictor(copied).class_names == ["blue", "green", "red"]
    assert [path.name for path in copied.parent.iterdir()] == ["copy"]


def test_the_interval_of_the_loss_is_that_of_paired_differences():
    labels = np.array([0, 0, 0, 0])
    before = np.array([[0.9, 0.1]] * 4, np.float32)
    after = np.array([[0.9, 0.1]] * 3 + [[0.2, 0.8]], np.float32)
    compared = certificate.compare_probabilities(before, after, labels, ["a", "b"])
    half = 1.96 * np.std([0, 0, 0, 1]) / 2
    assert compared["accuracy_lost"]["mean"] == 0.25
    np.testing.assert_allclose(
        compared["accuracy_lost"]["interval"], [0.25 - half, 0.25 + half], rtol=1e-3
    )
    assert compared["agreement"] == 0.75
    assert compared["largest_difference"] == pytest.approx(0.7)
    assert compared["loss_gained"]["mean"] == pytest.approx(np.log(0.9 / 0.2) / 4)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(("lost", "passes"), [(0.005, True), (0.0051, False), (np.nan, False)])
def test_the_limit_of_the_loss_is_inclusive(split, lost, passes):
    fine = {"accuracy_lost": {"mean": 0.0}, "largest_difference": 0.3}
    metrics = {"before": {"accuracy": 0.9}, "after": {"accuracy": 0.9}}
    comparison = {"validation": fine | metrics, "test": fine | metrics}
    comparison[split] = comparison[split] | {"accuracy_lost": {"mean": lost}}
    if passes:
        certificate.check(comparison, 0.005, is_exact=False)
    else:
        with pytest.raises(ExportError, match=f"on the {split} split"):
            certificate.check(comparison, 0.005, is_exact=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--format=coreml"],
            "--format: there is no 'coreml'; there are onnx, litert, stablehlo, web",
        ),
        (["--format=stablehlo", "--int8"], "--int8: --format=stablehlo has no 8-bit models"),
        (["--max_loss=2"], "--max_loss: must be from 0 to 1, got '2'"),
        (["--int=8"], "unexpected argument '--int=8'"),
        (["--output="], "--output: must not be empty"),
    ],
)
def test_a_wrong_flag_is_one_line(bundle, tmp_path, flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        command.main([f"--bundle={bundle}", f"--output={tmp_path / 'out'}", *flags])
    assert "\n" not in str(caught.value)


def test_other_files_are_not_replaced(bundle, exported, tmp_path, copied):
    with pytest.raises(ConfigError, match="has files that are not of an exported model, such as "):
        exporter.export(bundle, image_output := bundle.parent)
    assert image_output.exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        exporter.export(bundle, tmp_path / "file")
    (copied / "model.onnx").write_bytes(b"")
    (copied / "golden" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"such as golden/notes\.txt; name another folder"):
        exporter.export(bundle, copied)
    (copied / "golden" / "notes.txt").unlink()
    exporter.export(bundle, copied)
    assert load_predictor(copied).class_names == ["blue", "green", "red"]


@pytest.mark.parametrize(
    ("file_format", "package"), [("onnx", "onnx"), ("stablehlo", "flatbuffers")]
)
def test_a_missing_package_is_named_with_its_extra(
    bundle, tmp_path, monkeypatch, file_format, package
):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"the package {package} is not installed: pip install 'cnn_jax\[{file_format}\]'"
    with pytest.raises(ConfigError, match=message):
        exporter.export(bundle, tmp_path / "out", file_format)


def test_an_export_cannot_be_loaded_without_onnx_runtime(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime is not installed: pip install 'cnn_jax\["):
        load_predictor(exported)


def test_a_full_disk_leaves_nothing_behind(bundle, tmp_path, monkeypatch):
    def fail(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        exporter.export(bundle, tmp_path / "out")
    assert caught.value.filename is not None
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_main_facts(bundle, tmp_path, capsys):
    command.main([f"--bundle={bundle}", f"--output={tmp_path / 'out'}"])
    output = capsys.readouterr().out
    assert "test: accuracy" in output
    assert "agreement 100.00 %" in output
    assert output.endswith(f"{tmp_path / 'out'}/certificate.json\n")
