import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from bundles import make_bundle
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnn_jax import robustness as command
from cnn_jax.data import scan
from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.files import open_folder
from cnn_jax.data.splits import Division
from cnn_jax.inference import evaluation
from cnn_jax.inference.bundle import write_bundle
from cnn_jax.inference.calibration import expected_calibration_error
from cnn_jax.inference.evaluation import predict_split
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.quality import robustness
from cnn_jax.quality.corruptions import CORRUPTIONS, IMAGENET_C
from cnn_jax.quality.image_statistics import image_statistics
from cnn_jax.system.errors import ConfigError, DataError


def _open(folder):
    return open_dataset(open_folder(folder), Division(rule="exact"), make_bundle().preprocessing)


@pytest.fixture
def predictor(image_folder):
    bundle = make_bundle()
    bundle.data["fingerprint"] = _open(image_folder).fingerprint
    return BundlePredictor(bundle)


class _Threshold:
    """A predictor that returns class 1 if the first value of an image is above 99, else class 0."""

    def __init__(self):
        self.class_names = ["dark", "light"]
        self.preprocessing = make_bundle().preprocessing

    def __call__(self, images):
        is_light = (images[:, 0, 0, 0] > 99)[:, np.newaxis]
        return np.where(is_light, [0.25, 0.75], [0.75, 0.25]).astype(np.float32)


def _subtract(step):
    """Returns a corruption that subtracts `step` * `severity` grey levels."""

    def corruption(image, severity, seed):
        return np.maximum(image.astype(int) - step * severity, 0).astype(np.uint8)

    return corruption


# The grey levels of 100 uniform images, which `_Threshold` classifies as light. Subtracting 10,
# 20, 30, 40 or 50 makes more and more of the images dark.
LEVELS = np.repeat([105, 115, 125, 135, 250], [9, 1, 15, 5, 70])


def _light_images():
    images = np.broadcast_to(LEVELS[:, None, None, None], (100, 16, 16, 3)).astype(np.uint8)
    return images, np.ones(100, np.int32)


def test_robustness_metrics_equal_an_example_by_hand():
    """The error rates of snow are 0.09, 0.1, 0.25, 0.3 and 0.3; the error rate of fog is 0."""
    corruptions = {"snow": _subtract(10), "fog": _subtract(0), "crop": _subtract(60)}
    result = robustness.measure(_Threshold(), *_light_images(), corruptions)
    assert result["count"] == 100
    assert result["clean"] == {
        "accuracy": 1.0,
        "confidence": 0.75,
        "expected_calibration_error": 0.25,
    }
    assert list(result["corruptions"]) == ["snow", "fog", "crop"]
    snow, fog, crop = result["corruptions"].values()
    assert [metrics["accuracy"] for metrics in snow["severities"]] == [0.91, 0.9, 0.75, 0.7, 0.7]
    assert snow["accuracy"] == pytest.approx(0.792)
    assert snow["confidence"] == 0.75
    errors = [0.16, 0.15, 0, 0.05, 0.05]
    assert [f["expected_calibration_error"] for f in snow["severities"]] == pytest.approx(errors)
    assert snow["expected_calibration_error"] == pytest.approx(np.mean(errors))
    assert snow["first_severity_10_points_lower"] == 2
    assert fog["first_severity_10_points_lower"] is None
    assert crop["first_severity_10_points_lower"] == 1
    assert [snow["family"], fog["family"], crop["family"]] == ["weather", "weather", "quality"]
    # The result is the mean of 0.208 for snow and 0 for fog. Crop does not count, because it is not
    # a corruption of ImageNet-C.
    assert result["mean_corruption_error"] == pytest.approx(0.104)
    assert result["relative_mean_corruption_error"] == pytest.approx(0.104)


def test_the_relative_error_subtracts_the_error_on_clean_images():
    images, labels = _light_images()
    labels[:40] = 0
    result = robustness.measure(_Threshold(), images, labels, {"fog": _subtract(10)})
    clean = result["clean"]["accuracy"]
    assert clean == 0.6
    assert result["relative_mean_corruption_error"] == pytest.approx(
        result["mean_corruption_error"] - 0.4
    )
    only_crop = robustness.measure(_Threshold(), images, labels, {"crop": _subtract(1)})
    assert only_crop["mean_corruption_error"] is None
    assert only_crop["relative_mean_corruption_error"] is None


def test_each_image_has_its_own_seed_and_prediction():
    """Each image has its own seed and prediction, even if the images do not fit into one batch."""
    seen = {}

    def corruption(image, severity, seed):
        seen.setdefault(severity, []).append(seed)
        return image

    levels = np.random.default_rng(0).integers(0, 256, 150)
    images = np.broadcast_to(levels[:, None, None, None], (150, 16, 16, 3)).astype(np.uint8)
    labels = (levels > 99).astype(np.int32)
    labels[[0, 70, 149]] ^= 1
    result = robustness.measure(_Threshold(), images, labels, {"fog": corruption})
    for metrics in (result["clean"], *result["corruptions"]["fog"]["severities"]):
        assert metrics["accuracy"] == 147 / 150
    assert len(set(seen[1])) == 150
    assert sorted(seen[1]) == sorted(seen[5])
    before = set(seen[1])
    seen.clear()
    robustness.measure(_Threshold(), images[:20], labels[:20], {"fog": corruption})
    assert set(seen[1]) < before
    seen.clear()
    robustness.measure(_Threshold(), images, labels, {"fog": corruption}, seed=1)
    assert not set(seen[1]) & before


def test_read_ahead_keeps_the_order_and_stops_with_its_reader():
    started = []

    def work(item):
        started.append(item)
        return 2 * item

    assert list(robustness.read_ahead(work, range(20))) == list(range(0, 40, 2))
    started.clear()
    reader = robustness.read_ahead(work, range(10_000))
    assert next(reader) == 0
    reader.close()
    assert len(started) < 100

    def fail(item):
        raise ValueError(f"no {item}")

    with pytest.raises(ValueError, match="no 0"):
        list(robustness.read_ahead(fail, range(3)))


def test_a_bundle_is_measured_under_all_corruptions(predictor, image_folder):
    dataset = _open(image_folder)
    indices = np.arange(0, 60, 10)
    images = robustness.load_images(dataset.loader, indices)
    labels = dataset.source.labels[indices]
    result = robustness.measure(predictor, images, labels, seed=3)
    assert set(result["corruptions"]) == set(CORRUPTIONS)
    seeds = np.random.default_rng(3).integers(2**32, size=6).tolist()
    corrupted = [CORRUPTIONS["glass_blur"](i, 4, s) for i, s in zip(images, seeds, strict=True)]
    probabilities = predictor(np.stack(corrupted))
    metrics = result["corruptions"]["glass_blur"]["severities"][3]
    assert metrics["accuracy"] == (probabilities.argmax(axis=1) == labels).mean()
    assert metrics["confidence"] == pytest.approx(probabilities.max(axis=1).mean(), rel=1e-5)
    assert metrics["expected_calibration_error"] == pytest.approx(
        expected_calibration_error(probabilities, labels), abs=1e-5
    )
    errors = [1 - result["corruptions"][name]["accuracy"] for name in IMAGENET_C]
    assert result["mean_corruption_error"] == pytest.approx(np.mean(errors))
    assert robustness.measure(predictor, images, labels, seed=3) == result


def test_wrong_image_sizes_and_no_images_are_refused(predictor):
    labels = np.zeros(2, np.int32)
    with pytest.raises(ValueError, match=r"must be \(16, 16, 3\), got \(1, 16, 3\)"):
        robustness.measure(predictor, np.zeros((2, 1, 16, 3), np.uint8), labels)
    with pytest.raises(ValueError, match="no images"):
        robustness.measure(predictor, np.zeros((0, 16, 16, 3), np.uint8), labels[:0])


@pytest.mark.parametrize(
    ("clean", "accuracies", "expected"),
    [
        (0.9, [0.81, 0.8, 0.2], 2),
        (0.9, [0.9, 0.95, 0.801], None),
        (0.3, [0.2], 1),  # In floating point, 0.3 - 0.2 is smaller than 0.1.
        (0.9, [0.7, 0.95, 0.7], 1),
        (0.05, [0, 0, 0], None),
    ],
)
def test_first_severity_at_which_accuracy_is_ten_points_lower(clean, accuracies, expected):
    assert robustness.first_severity_lower(clean, accuracies) == expected


def test_examples_show_an_image_under_all_corruptions():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    shown = robustness.examples(image, seed=5)
    assert list(shown) == list(CORRUPTIONS)
    for name, images in shown.items():
        assert images.shape == (5, 20, 30, 3)
        np.testing.assert_array_equal(images[3], CORRUPTIONS[name](image, 4, 5))


# Tests of `stratified_sample`.


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), max_size=60),
    size=st.integers(0, 70),
    seed=st.integers(0, 9),
)
def test_a_sample_keeps_the_fraction_of_each_class(labels, size, seed):
    labels = np.array(labels, np.int32)
    chosen = robustness.stratified_sample(labels, size, seed)
    assert len(chosen) == min(size, len(labels))
    assert sorted(set(chosen.tolist())) == chosen.tolist()
    np.testing.assert_array_equal(chosen, robustness.stratified_sample(labels, size, seed))
    classes, counts = np.unique(labels, return_counts=True)
    taken = np.array([(labels[chosen] == label).sum() for label in classes])
    shares = min(size, len(labels)) * counts / len(labels)
    assert (np.abs(taken - shares) < 1).all()


def test_a_sample_by_hand():
    """The exact class counts 8.91, 0.99 and 0.1 are rounded by the largest-remainder method."""
    labels = np.repeat([3, 1, 7], [90, 10, 1]).astype(np.int32)
    chosen = robustness.stratified_sample(labels, 10)
    assert np.bincount(labels[chosen], minlength=8).tolist() == [0, 1, 0, 9, 0, 0, 0, 0]
    others = robustness.stratified_sample(labels, 10, seed=1)
    assert not np.array_equal(chosen, others)
    assert labels[robustness.stratified_sample(labels, 1)].tolist() == [3]


# Tests of the accuracy by image quality.


def test_quantiles_by_hand():
    values = np.array([7, 1, 3, 2, 9, 4, 6, 5, 8, 10])
    hits = values > 5
    bins = robustness.accuracy_by_quantile(values, hits)
    assert [(b["from"], b["to"], b["count"]) for b in bins] == [
        (1, 2, 2),
        (3, 4, 2),
        (5, 6, 2),
        (7, 8, 2),
        (9, 10, 2),
    ]
    assert [b["accuracy"] for b in bins] == [0, 0, 0.5, 1, 1]
    for metrics, right in zip(bins, [0, 0, 1, 2, 2], strict=True):
        interval = scipy.stats.binomtest(right, 2).proportion_ci(0.95, "wilson")
        assert metrics["confidence_interval"] == pytest.approx([interval.low, interval.high])


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([5, 5, 5, 5], [4]),
        ([1.0], [1]),
        ([2, 1], [1, 1]),
        ([1, 1, 1, 1, 1, 1, 1, 1, 2, 3], [8, 2]),
        # A value at the edge between two bins belongs to the lower bin.
        ([1, 2, 3, 4, 5, 6], [2, 1, 1, 1, 1]),
        ([], []),
    ],
)
def test_equal_values_share_a_bin(values, counts):
    bins = robustness.accuracy_by_quantile(np.array(values), np.ones(len(values), bool))
    assert [metrics["count"] for metrics in bins] == counts


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 30), min_size=1, max_size=80), num_bins=st.integers(1, 7))
def test_quantile_bins_hold_everything_once_in_order(values, num_bins):
    values = np.array(values)
    hits = values % 2 == 0
    bins = robustness.accuracy_by_quantile(values, hits, num_bins)
    assert 1 <= len(bins) <= num_bins
    for below, above in itertools.pairwise(bins):
        assert below["to"] < above["from"]
    for metrics in bins:
        inside = (values >= metrics["from"]) & (values <= metrics["to"])
        assert metrics["count"] == inside.sum() > 0
        assert metrics["accuracy"] == hits[inside].mean()
    assert sum(metrics["count"] for metrics in bins) == len(values)
    if len(set(values.tolist())) == len(values) >= num_bins:
        assert max(f["count"] for f in bins) - min(f["count"] for f in bins) <= 1


def test_statistics_of_grey_levels():
    image = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
    grey = image @ [0.299, 0.587, 0.114]
    laplacian = scipy.ndimage.laplace(grey, mode="mirror")
    # The statistics round each grey level to a whole number.
    expected = (grey.mean(), laplacian.std(), grey.std())
    assert image_statistics(image) == pytest.approx(expected, rel=2e-3)
    for size in ((1, 1), (1, 5)):
        assert image_statistics(np.full((*size, 3), 77, np.uint8)) == (77, 0, 0)


def test_accuracy_is_measured_by_three_qualities():
    noise = np.random.default_rng(0).integers(-1, 2, (10, 8, 8, 3))
    strength = np.array([9, 2, 5, 1, 7, 3, 8, 4, 6, 10])[:, None, None, None]
    images = (128 + 10 * noise * strength).clip(0, 255).astype(np.uint8)
    hits = strength[:, 0, 0, 0] > 4
    result = robustness.by_quality(images, hits, np.arange(10) * 100)
    assert list(result) == ["sharpness", "brightness", "resolution"]
    assert [metrics["accuracy"] for metrics in result["sharpness"]] == [0, 0, 1, 1, 1]
    assert [metrics["to"] for metrics in result["resolution"]] == [100, 300, 500, 700, 900]
    json.dumps(result, allow_nan=False)


def test_original_pixels_are_those_of_the_files(image_folder, tmp_path, monkeypatch):
    source = _open(image_folder).source
    indices = np.array([59, 3, 20])
    expected = []
    for i in indices:
        with Image.open(image_folder / source.ids[i]) as image:
            expected.append(image.width * image.height)
    preprocessing = make_bundle().preprocessing
    remembered = robustness.original_pixels(source, indices, preprocessing)
    assert remembered.tolist() == expected
    monkeypatch.setattr(scan, "known_records", lambda source, _: [None] * len(source))
    assert robustness.original_pixels(source, indices, preprocessing).tolist() == expected


def test_an_image_that_became_unreadable_is_named(image_folder, tmp_path, monkeypatch):
    shutil.copytree(image_folder, tmp_path / "images")
    source = _open(tmp_path / "images").source
    monkeypatch.setattr(scan, "known_records", lambda source, _: [None] * len(source))
    (tmp_path / "images" / source.ids[7]).write_bytes(b"x")
    with pytest.raises(DataError, match=source.ids[7]):
        robustness.original_pixels(source, np.array([7]), make_bundle().preprocessing)


# Tests of measurements on a split of a data set, and of the command.


def test_loaded_images_are_those_of_the_loader(image_folder):
    loader = _open(image_folder).loader
    indices = np.r_[
        np.arange(59, -1, -1), np.arange(20)
    ]  # The 80 images do not fit into one batch.
    images = robustness.load_images(loader, indices)
    np.testing.assert_array_equal(images, loader.load(indices)["image"])


def test_a_split_is_measured_with_its_qualities(predictor, image_folder):
    few = {name: CORRUPTIONS[name] for name in ("fog", "crop")}
    dataset = _open(image_folder)
    result = robustness.measure_split(predictor, dataset, "all", corruptions=few)
    assert (result["split"], result["split_count"], result["count"]) == ("all", 60, 60)
    probabilities = predict_split(predictor, dataset.loader, np.arange(60))
    hits = probabilities.argmax(axis=1) == dataset.source.labels
    assert result["clean"]["accuracy"] == hits.mean()
    for bins in result["by_quality"].values():
        assert sum(metrics["count"] for metrics in bins) == 60
        right = sum(metrics["count"] * metrics["accuracy"] for metrics in bins)
        assert right == pytest.approx(hits.sum())
    sampled = robustness.measure_split(predictor, dataset, "all", 9, few, seed=2)
    assert (sampled["split_count"], sampled["count"], sampled["seed"]) == (60, 9, 2)
    chosen = robustness.stratified_sample(dataset.source.labels, 9, 2)
    assert np.bincount(dataset.source.labels[chosen]).tolist() == [3, 3, 3]
    assert sampled["clean"]["accuracy"] == hits[chosen].mean()


def test_classes_are_matched_by_name(predictor, image_folder, tmp_path):
    """The folder has only the classes green and red, the second and third class of the bundle."""
    for name in ("green", "red"):
        shutil.copytree(image_folder / name, tmp_path / name)
    dataset = _open(tmp_path)
    indices, labels = evaluation.labelled_split(predictor, dataset, "all")
    assert indices.tolist() == list(range(40))
    assert labels.tolist() == [1] * 20 + [2] * 20
    part = robustness.measure_split(predictor, dataset, "all", corruptions={})
    probabilities = predict_split(predictor, _open(image_folder).loader, np.arange(20, 60))
    assert part["clean"]["accuracy"] == (probabilities.argmax(axis=1) == labels).mean()


def test_an_unknown_class_is_named(predictor, tmp_path, image_folder):
    for name in ("red", "purple"):
        shutil.copytree(image_folder / "red", tmp_path / name)
    with pytest.raises(DataError, match="does not know: purple; it knows blue, green, red"):
        robustness.measure_split(predictor, _open(tmp_path), "all")


def test_other_data_gives_a_warning(predictor, image_folder, tmp_path, caplog):
    for name in ("green", "red"):
        shutil.copytree(image_folder / name, tmp_path / name)
    robustness.measure_split(predictor, _open(image_folder), "test", corruptions={})
    assert not caplog.records
    robustness.measure_split(predictor, _open(tmp_path), "test", corruptions={})
    assert "is not the data that the bundle was trained on" in caplog.text


def test_a_split_larger_than_the_memory_is_refused(predictor, image_folder, monkeypatch):
    """The 60 images need more than half of the simulated memory, so they are refused."""
    monkeypatch.setattr(robustness, "memory_bytes", lambda: 768 * 60)
    with pytest.raises(DataError, match=r"60 images .* half of the memory; --sample=30 measures"):
        robustness.measure_split(predictor, _open(image_folder), "all")


def test_the_command_prints_json_for_the_training_data(image_folder, tmp_path, capfd):
    bundle = make_bundle()
    bundle.data["source"] = f"folder:{image_folder}"
    bundle.data["fingerprint"] = _open(image_folder).fingerprint
    write_bundle(bundle, tmp_path / "bundle")
    command.main([f"--bundle={tmp_path}", "--json"])
    printed = capfd.readouterr()
    test = json.loads(printed.out)
    assert (test["split"], test["count"], test["seed"]) == ("test", 6, 0)
    assert set(test["corruptions"]) == set(CORRUPTIONS)
    assert set(test["by_quality"]) == {"sharpness", "brightness", "resolution"}
    assert "measuring corruptions" in printed.err
    output = tmp_path / "all.json"
    flags = ["--split=all", "--sample=7", "--seed=4", f"--output={output}"]
    command.main([f"--bundle={tmp_path / 'bundle'}", *flags])
    sampled = json.loads(output.read_text())
    assert (sampled["split_count"], sampled["count"], sampled["seed"]) == (60, 7, 4)
    shown = capfd.readouterr().out
    assert f"all images of folder:{image_folder}: 7 of 60 images" in " ".join(shown.split())
    # Only the first table is read, because the table by image quality also has a row "brightness".
    lines = [line.split() for line in shown.partition("Mean error")[0].splitlines()]
    lines_by_name = {line[0]: line for line in lines if line and line[0] in CORRUPTIONS}
    assert lines_by_name.keys() == CORRUPTIONS.keys()
    for name, line in lines_by_name.items():
        result = sampled["corruptions"][name]
        first = result["first_severity_10_points_lower"]
        assert line[1] == f"{100 * result['accuracy']:.1f}"
        assert line[2:7] == [
            f"{100 * severity['accuracy']:.0f}" for severity in result["severities"]
        ]
        assert line[7] == ("never" if first is None else str(first))
    means = [float(line[1]) for line in lines_by_name.values()]
    assert means == sorted(means)
    assert command.describe(sampled, "title", 60).startswith("title\n\nClean images: accuracy")
    for width in (60, 120):
        text = command.describe(sampled, "title", width)
        assert max(map(len, text.splitlines())) <= width


def test_unreadable_images_are_named_and_left_out(image_folder, tmp_path, caplog):
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "red" / "007.png").write_bytes(b"x")
    bundle = make_bundle()
    bundle.data["source"] = f"folder:{tmp_path / 'images'}"
    write_bundle(bundle, tmp_path / "bundle")
    output = tmp_path / "all.json"
    flags = ["--split=all", "--max_unreadable=0.02", "--sample=1", f"--output={output}"]
    command.main([f"--bundle={tmp_path / 'bundle'}", *flags])
    assert json.loads(output.read_text())["split_count"] == 59
    assert "left out: red/007.png is not an image" in caplog.text


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--bundle={tmp}/none"], 2, "none"),
        (["--bundle={tmp}/bundle", "--source=folder:{tmp}/nowhere"], 2, "nowhere"),
        (["--bundle={tmp}/bundle", "--source=nonsense:x"], 2, "nonsense"),
        (["--bundle={tmp}/bundle", "--output={tmp}/no/folder.json"], 2, "--output: cannot write"),
    ],
)
def test_errors_are_one_line(flags, code, message, image_folder, tmp_path):
    bundle = make_bundle()
    bundle.data["source"] = f"folder:{image_folder}"
    write_bundle(bundle, tmp_path / "bundle")
    process = subprocess.run(
        [sys.executable, "-m", "cnn_jax.robustness", *(f.format(tmp=tmp_path) for f in flags)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.returncode == code
    assert process.stdout == ""
    errors = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    assert process.stderr.splitlines()[-1:] == errors
    assert message in errors[0]


@pytest.mark.parametrize("flag", ["--sample=0", "--sample=x", "--seed=-1", "--split=none"])
def test_a_wrong_flag_is_a_usage_error(flag, tmp_path):
    with pytest.raises(ConfigError, match=flag.split("=")[0]):
        command.main([f"--bundle={tmp_path}", flag])
