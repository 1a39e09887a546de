"""Tests of the rows and windows of the monitor, with simulated request logs."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monitor_logs import DIGEST, NAMES, make_reference, simulate, write_labels, write_log

from cnn_jax.monitor.gauges import describe_gauges
from cnn_jax.monitor.rows import growing_sample, random_order, random_sample, read_rows
from cnn_jax.monitor.windows import measure
from cnn_jax.quality import drift, trust
from cnn_jax.quality.reference import Predictions
from cnn_jax.system.errors import DataError


@pytest.fixture(scope="module")
def reference():
    return make_reference()


def _log(tmp_path, *noises, size=100, seed=1):
    """Writes one window of images for each noise; returns the keys and the true classes."""
    rng = np.random.default_rng(seed)
    keys, labels = [], []
    for number, noise in enumerate(noises):
        truth = rng.integers(3, size=size)
        start = time.time() - 10 - size * (len(noises) - number)
        keys += write_log(tmp_path / "log", simulate(rng, truth, noise), start)
        labels += truth.tolist()
    return keys, labels


def test_rows_have_the_values_of_the_log(tmp_path):
    rng = np.random.default_rng(0)
    written = simulate(rng, rng.integers(3, size=7))
    keys = write_log(tmp_path / "log", written)
    rows = read_rows([tmp_path / "log"], DIGEST)
    assert rows.keys == keys
    assert rows.class_names == NAMES
    assert (rows.model, rows.version) == ("shapes", 1)
    assert rows.warnings == []
    np.testing.assert_array_equal(rows.labels, [-1] * 7)
    np.testing.assert_array_equal(np.diff(rows.times).round(3), [1] * 6)
    for name in ("probabilities", "embeddings", "images"):
        np.testing.assert_array_equal(getattr(rows.predictions, name), getattr(written, name))


def test_rows_of_two_logs_are_sorted_by_time(tmp_path):
    rng = np.random.default_rng(0)
    start = time.time() - 100
    late = write_log(tmp_path / "a", simulate(rng, np.zeros(3, int)), start + 10)
    early = write_log(tmp_path / "b", simulate(rng, np.zeros(3, int)), start)
    assert read_rows([tmp_path / "a", tmp_path / "b"], DIGEST).keys == early + late
    assert read_rows([tmp_path / "a", tmp_path / "b"], DIGEST, start + 5).keys == late


def test_duplicate_rows_are_left_out_with_a_warning(tmp_path):
    rng = np.random.default_rng(0)
    keys = write_log(tmp_path / "log", simulate(rng, np.zeros(4, int)))
    write_log(tmp_path / "log", simulate(rng, np.zeros(4, int)), ids=[k[0] for k in keys])
    rows = read_rows([tmp_path / "log"], DIGEST)
    assert sorted(rows.keys) == sorted(keys)
    assert len(rows.warnings) == 1
    assert "4 rows have the request id and the image index of another row" in rows.warnings[0]


def test_rows_from_the_future_are_left_out_with_a_warning(tmp_path):
    rng = np.random.default_rng(0)
    keys = write_log(tmp_path / "log", simulate(rng, np.zeros(4, int)))
    write_log(tmp_path / "log", simulate(rng, np.zeros(5, int)), time.time() + 1000)
    rows = read_rows([tmp_path / "log"], DIGEST)
    assert rows.keys == keys
    assert rows.warnings == ["5 rows are from the future: left out; set the clocks of the servers"]


def test_a_log_of_another_model_is_an_error(tmp_path):
    rng = np.random.default_rng(0)
    write_log(tmp_path / "log", simulate(rng, np.zeros(4, int)), digest="e" * 64, name="flowers")
    with pytest.raises(
        DataError, match=r"no predictions of the bundle d{12}; .* flowers/1 \(e{12}"
    ):
        read_rows([tmp_path / "log"], DIGEST)
    with pytest.raises(DataError, match="is not a request log"):
        read_rows([tmp_path], DIGEST)


def test_rows_of_an_exported_model_or_an_ensemble_are_an_error(tmp_path):
    rng = np.random.default_rng(0)
    whole = simulate(rng, np.zeros(4, int))
    without = Predictions(whole.probabilities, np.zeros((4, 0), np.float32), whole.images)
    write_log(tmp_path / "log", without)
    with pytest.raises(DataError, match="an exported model or an ensemble answered; serve"):
        read_rows([tmp_path / "log"], DIGEST)


def test_the_latest_label_is_valid_and_skewed_clocks_are_reported(tmp_path):
    rng = np.random.default_rng(0)
    keys = write_log(tmp_path / "log", simulate(rng, np.zeros(4, int)))
    now = time.time()
    write_labels(tmp_path / "log", {keys[0]: "star", keys[1]: "star"}, now)
    write_labels(tmp_path / "log", {keys[0]: "circle"}, now - 5)
    write_labels(tmp_path / "log", {keys[1]: "square", keys[2]: "fish"}, now + 5)
    rows = read_rows([tmp_path / "log"], DIGEST)
    np.testing.assert_array_equal(rows.labels, [2, 1, 3, -1])
    assert rows.warnings == []
    write_labels(tmp_path / "log", {keys[3]: "circle"}, now - 1000)
    rows = read_rows([tmp_path / "log"], DIGEST)
    assert rows.labels[3] == 0
    assert rows.warnings == [
        "1 image has a label that is older than the request; set the clocks of the servers"
    ]


def test_rows_of_deleted_files_are_not_read(tmp_path):
    rng = np.random.default_rng(0)
    keys = write_log(tmp_path / "log", simulate(rng, np.zeros(4, int)))
    write_log(
        tmp_path / "log", simulate(rng, np.zeros(2, int)), time.time() - 1000, subfolder="labelled"
    )
    assert read_rows([tmp_path / "log"], DIGEST).keys == keys


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_the_random_sample_is_a_prefix_of_the_random_order(flags):
    keys = [(f"{i:032x}", 0) for i in range(len(flags))]
    is_labelled = np.array(flags)
    order = random_order(keys)
    sample = random_sample(keys, is_labelled)
    assert not (sample & ~is_labelled).any()
    smallest = sorted(range(len(keys)), key=lambda i: order[i])
    expected = []
    for i in smallest:
        if not is_labelled[i]:
            break
        expected.append(i)
    assert sorted(expected) == np.flatnonzero(sample).tolist()


def test_windows_without_drift_are_quiet(tmp_path, reference):
    _log(tmp_path, 0, 0, 0, size=250)
    result = measure(read_rows([tmp_path / "log"], DIGEST), reference)
    assert result["state"] == "no_drift"
    assert (result["images"], result["waiting"]) == (750, 0)
    assert [w["alarm"] for w in result["windows"]] == [False] * 3
    for window in result["windows"]:
        assert window["estimated_accuracy"] == pytest.approx(
            result["reference"]["accuracy"], abs=0.03
        )


def test_two_bad_windows_in_a_row_are_harm(tmp_path, reference):
    _, labels = _log(tmp_path, 0, 0.8, 0, 0.8, 0.8)
    rows = read_rows([tmp_path / "log"], DIGEST)
    result = measure(rows, reference, window=100)
    assert [w["differs"] for w in result["windows"]] == [False, True, False, True, True]
    assert [w["alarm"] for w in result["windows"]] == [False, False, False, False, True]
    assert result["state"] == "harm"
    accuracy = (rows.predictions.classes == labels)[-200:].mean()
    estimates = [w["estimated_accuracy"] for w in result["windows"][-2:]]
    assert np.mean(estimates) == pytest.approx(accuracy, abs=0.2)
    assert measure(rows, reference, window=100, max_drop=0.9)["state"] == "drift"


def test_one_bad_window_is_no_drift(tmp_path, reference):
    """A single window may differ by chance, so the state changes only after a second one."""
    _log(tmp_path, 0, 0.8)
    result = measure(read_rows([tmp_path / "log"], DIGEST), reference, window=100)
    assert [w["differs"] for w in result["windows"]] == [False, True]
    assert result["state"] == "no_drift"


def test_drift_of_the_images_without_errors_is_not_harm(tmp_path, reference):
    rng = np.random.default_rng(3)
    for number in range(2):
        clean = simulate(rng, rng.integers(3, size=100))
        brighter = Predictions(
            clean.probabilities, clean.embeddings, clean.images + np.array([40, 0, 0])
        )
        write_log(tmp_path / "log", brighter, time.time() - 500 + 150 * number)
    result = measure(read_rows([tmp_path / "log"], DIGEST), reference, window=100)
    assert result["windows"][-1]["alarm"]
    assert result["state"] == "drift"


def test_statistics_and_estimates_of_a_window_are_those_of_its_rows(tmp_path, reference):
    _log(tmp_path, 0.2, 0.4, size=60)
    rows = read_rows([tmp_path / "log"], DIGEST)
    result = measure(rows, reference, window=50)
    assert (len(result["windows"]), result["waiting"]) == (2, 20)
    distances = trust.Distances(reference.class_means, reference.covariance)
    part = rows.predictions[50:100]
    expected = drift.window_p_values(
        reference.statistics,
        reference.class_counts,
        trust.statistics(distances, part),
        np.bincount(part.classes, minlength=3),
    )
    assert result["windows"][1]["p_values"] == expected
    estimate = trust.estimate_accuracy(reference, distances, part)
    assert result["windows"][1]["estimated_accuracy"] == estimate
    only = measure(rows, reference, window=50, last=1)["windows"]
    assert only == [result["windows"][1] | {"alarm": False}]


def test_the_growing_sample_ignores_chosen_labels_and_later_images():
    """The first 100 images are labelled in the random order, and the mistakes of all images."""
    keys = [(f"{number:032x}", 0) for number in range(5000)]
    order = random_order(keys)
    is_labelled = np.zeros(5000, bool)
    is_labelled[np.flatnonzero(order[:2000] < 0.05)] = True
    sample = growing_sample(keys[:2000], is_labelled[:2000])
    assert (sample == is_labelled[:2000]).all()
    assert 70 < sample.sum() < 130
    is_labelled[::16] = True  # Labels that do not follow the random order.
    later = growing_sample(keys, is_labelled)
    assert (later[:2000] >= sample).all()
    assert later.sum() - sample.sum() < 5
    assert random_sample(keys, is_labelled).sum() < 10
    for number in (1, 10, 1000):
        part = growing_sample(keys[:number], is_labelled[:number])
        assert (part == later[:number]).all()


def test_labels_of_a_random_sample_prove_harm_without_drift(tmp_path, reference):
    """Images of a new class look like known images, so only labels show the errors."""
    keys, _ = _log(tmp_path, 0, 0)
    order = random_order(keys)
    sample = [keys[i] for i in np.argsort(order)[:60]]
    write_labels(tmp_path / "log", dict.fromkeys(sample, "fish"))
    result = measure(read_rows([tmp_path / "log"], DIGEST), reference, window=100)
    assert not result["windows"][-1]["alarm"]
    labels = result["labels"]
    assert (labels["count"], labels["new_class"], labels["sample"]) == (60, 60, 60)
    assert labels["accuracy"] == 0
    assert labels["interval"][1] < 0.1
    assert result["state"] == "harm"
    gauges = describe_gauges(result | {"model": "m", "version": 1}, 0.0).splitlines()
    own = '{model="m",version="1"}'
    assert {f"cnn_jax_monitor_harm{own} 1.0", f"cnn_jax_monitor_drift{own} 0.0"} <= set(gauges)


def test_one_wrong_label_is_no_harm(tmp_path, reference):
    keys, _ = _log(tmp_path, 0, 0)
    write_labels(tmp_path / "log", {keys[int(random_order(keys).argmin())]: "fish"})
    result = measure(read_rows([tmp_path / "log"], DIGEST), reference, window=100)
    assert (result["labels"]["sample"], result["labels"]["accuracy"]) == (1, 0)
    # Exact: if the accuracy is 97.5 %, the only label is wrong with a probability of 2.5 %.
    assert result["labels"]["interval"] == pytest.approx([0, 0.975])
    assert result["state"] == "no_drift"


def test_labels_of_chosen_images_are_no_random_sample(tmp_path, reference):
    keys, _ = _log(tmp_path, 0, 0)
    order = random_order(keys)
    chosen = [keys[i] for i in np.argsort(-order)[:60]]
    write_labels(tmp_path / "log", dict.fromkeys(chosen, "fish"))
    result = measure(read_rows([tmp_path / "log"], DIGEST), reference, window=100)
    assert (result["labels"]["count"], result["labels"]["sample"]) == (60, 0)
    assert result["state"] == "no_drift"


def test_too_few_images_are_no_data(tmp_path, reference):
    _log(tmp_path, 0, size=40)
    result = measure(read_rows([tmp_path / "log"], DIGEST), reference, window=50)
    assert (result["state"], result["windows"], result["waiting"]) == ("no_data", [], 40)


def test_statistics_of_another_network_are_an_error(tmp_path, reference):
    rng = np.random.default_rng(0)
    part = simulate(rng, np.zeros(30, int))
    write_log(
        tmp_path / "log", Predictions(part.probabilities, part.embeddings[:, :4], part.images)
    )
    with pytest.raises(DataError, match="reference statistics are of"):
        measure(read_rows([tmp_path / "log"], DIGEST), reference, window=20)


def test_gauges_have_the_text_format_of_prometheus(tmp_path, reference):
    from prometheus_client.parser import text_string_to_metric_families

    keys, _ = _log(tmp_path, 0.9, 0.9)
    write_labels(tmp_path / "log", dict.fromkeys(keys, "star"))
    result = measure(read_rows([tmp_path / "log"], DIGEST), reference, window=100)
    result |= {"model": 'a "b"\\c', "version": 3}
    families = list(text_string_to_metric_families(describe_gauges(result, 5.0)))
    samples = {(s.name, s.labels.get("test")): s for family in families for s in family.samples}
    for sample in samples.values():
        assert sample.labels["model"] == 'a "b"\\c'
        assert sample.labels["version"] == "3"
    assert samples["cnn_jax_monitor_harm", None].value == 1
    assert samples["cnn_jax_monitor_drift", None].value == 1
    assert samples["cnn_jax_monitor_run_timestamp_seconds", None].value == 5
    assert samples["cnn_jax_monitor_labelled_accuracy", None].value == result["labels"]["accuracy"]
    latest = result["windows"][-1]
    estimate = samples["cnn_jax_monitor_estimated_accuracy", None].value
    assert estimate == latest["estimated_accuracy"]
    for test in drift.TESTS:
        assert samples["cnn_jax_monitor_p_value", test].value == latest["p_values"][test]
