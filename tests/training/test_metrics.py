import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.training import metrics
from cnn_jax.training.metrics import (
    Metrics,
    bootstrap_intervals,
    confidence_intervals,
    full_report,
    per_class,
    summarize,
    wilson_interval,
)


def _logits(predictions, num_classes):
    return 10.0 * jnp.eye(num_classes)[jnp.array(predictions)]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 6).flatmap(
        lambda classes: st.lists(
            st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)),
            min_size=1,
            max_size=40,
        ).map(lambda pairs: (classes, pairs))
    )
)
def test_metrics_equal_scikit_learn_with_absent_classes(case):
    num_classes, pairs = case
    labels, predictions = map(list, zip(*pairs, strict=True))
    classes = list(range(num_classes))
    confusion = sklearn.metrics.confusion_matrix(labels, predictions, labels=classes)
    expected = sklearn.metrics.precision_recall_fscore_support(
        labels, predictions, labels=classes, zero_division=0
    )
    actual = per_class(confusion)
    for key, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose(actual[key], values, err_msg=key)

    summary = summarize(confusion, loss_sum=3.0)
    macro = sklearn.metrics.precision_recall_fscore_support(
        labels, predictions, labels=classes, zero_division=0, average="macro"
    )
    np.testing.assert_allclose([summary[key] for key in ("precision", "recall", "f1")], macro[:3])
    np.testing.assert_allclose(
        summary["accuracy"], sklearn.metrics.accuracy_score(labels, predictions)
    )
    np.testing.assert_allclose(summary["loss"], 3.0 / len(labels))


def test_the_forms_of_a_sum_by_class_are_equal():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, 50).astype(np.float32)
    labels = rng.integers(0, 4, 50)
    expected = [values[labels == label].sum() for label in range(5)]
    for form in (metrics._scatter_by_class, metrics._sum_by_class):
        np.testing.assert_array_equal(form(jnp.asarray(values), jnp.asarray(labels), 5), expected)


def test_merged_batches_equal_the_whole_without_padding():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 20).astype(np.int32)
    whole = Metrics.from_logits(jnp.array(logits), jnp.array(labels), jnp.ones(20, bool))

    merged = Metrics.empty(4)
    for start in range(0, 20, 8):
        rows = np.arange(start, start + 8)
        mask = rows < 20
        rows = np.where(mask, rows, 0)
        batch = Metrics.from_logits(
            jnp.array(logits[rows]), jnp.array(labels[rows]), jnp.array(mask)
        )
        merged = merged.merge(batch)

    np.testing.assert_array_equal(merged.confusion, whole.confusion)
    np.testing.assert_allclose(merged.loss_sum, whole.loss_sum, rtol=1e-6)
    assert int(whole.confusion.sum()) == 20


def test_a_masked_row_with_infinite_loss_is_ignored():
    logits = jnp.array([[0.0, 0.0], [jnp.inf, jnp.nan]])
    metrics = Metrics.from_logits(logits, jnp.array([0, 1]), jnp.array([True, False]))
    np.testing.assert_allclose(metrics.loss_sum, [np.log(2), 0], rtol=1e-6)


def test_metrics_are_reweighted_to_the_class_frequencies_of_the_data():
    """Classes are drawn with different frequencies, and reweighting cancels the differences."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(12, 3)).astype(np.float32), np.repeat([0, 1, 2], [6, 4, 2])
    # Each example of class 0 is drawn once, of class 1 three times, and of class 2 six times.
    drawn = np.repeat(np.arange(12), np.array([1, 3, 6])[labels])

    def metrics(rows):
        return Metrics.from_logits(
            jnp.array(logits[rows]), jnp.array(labels[rows]), jnp.ones(len(rows), bool)
        )

    plain = metrics(np.arange(12)).compute()
    reweighted = metrics(drawn).compute(np.array([6, 4, 2]))
    assert reweighted == pytest.approx(plain, rel=1e-6)
    assert metrics(drawn).compute() != pytest.approx(plain, rel=1e-3)


def test_rows_of_the_confusion_matrix_are_true_classes():
    metrics = Metrics.from_logits(_logits([2, 2], 3), jnp.array([0, 2]), jnp.ones(2, bool))
    np.testing.assert_array_equal(metrics.confusion, [[0, 0, 1], [0, 0, 0], [0, 0, 1]])


def test_metrics_of_no_example_are_zero():
    assert set(Metrics.empty(3).compute().values()) == {0.0}


def test_full_report_has_class_names_and_json_types():
    report = full_report(np.array([[3, 1], [0, 4]]), np.linspace(0, 2, 8), ["cat", "dog"])
    assert report["count"] == 8
    assert report["loss"] == pytest.approx(1)
    assert json.loads(json.dumps(report)) == report
    assert report["per_class"]["cat"] == {
        "precision": 1.0,
        "recall": 0.75,
        "f1": 6 / 7,
        "support": 4,
    }
    assert report["confusion"] == [[3, 1], [0, 4]]


def test_wilson_interval_equals_scipy():
    for successes, count in ((0, 1), (1, 1), (3, 7), (95, 100), (2700, 2700)):
        expected = scipy.stats.binomtest(successes, count).proportion_ci(0.95, "wilson")
        interval = wilson_interval(successes, count)
        assert interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(2.5, 5) == pytest.approx((0.5 - 0.3296, 0.5 + 0.3296), abs=1e-4)


def test_bootstrap_intervals_equal_resampling_of_examples():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 150)
    predictions = np.where(rng.random(150) < 0.7, labels, rng.integers(0, 3, 150))
    confusion = sklearn.metrics.confusion_matrix(labels, predictions)
    actual = bootstrap_intervals(confusion)
    resampled = {"precision": [], "recall": [], "f1": []}
    for _ in range(1000):
        rows = np.concatenate(
            [rng.choice(np.flatnonzero(labels == c), (labels == c).sum()) for c in range(3)]
        )
        scores = sklearn.metrics.precision_recall_fscore_support(
            labels[rows], predictions[rows], average="macro", zero_division=0
        )
        for key, value in zip(resampled, scores, strict=False):
            resampled[key].append(value)
    for key, values in resampled.items():
        assert actual[key] == pytest.approx(np.percentile(values, (2.5, 97.5)), abs=0.012)


@pytest.mark.parametrize("per_class", [1, 3])
def test_intervals_contain_the_metric_for_small_classes(per_class):
    perfect = bootstrap_intervals(np.eye(50, dtype=int) * per_class)
    assert perfect["f1"] == (1.0, 1.0)
    confusion = np.eye(50, dtype=int) * per_class
    confusion[0, 1] += per_class
    for key, (low, high) in bootstrap_intervals(confusion).items():
        assert low <= summarize(confusion, 0.0)[key] <= high


def test_intervals_contain_the_metric_and_shrink_with_more_examples():
    def intervals(scale):
        confusion = np.array([[8, 2], [1, 9]]) * scale
        losses = np.tile([0.1, 0.5], confusion.sum() // 2)
        return confidence_intervals(confusion, losses), summarize(confusion, losses.sum())

    few, metrics = intervals(1)
    many, _ = intervals(100)
    for key, value in metrics.items():
        assert few[key][0] <= many[key][0] <= value <= many[key][1] <= few[key][1]
    standard_error = np.std([0.1, 0.5] * 10, ddof=1) / np.sqrt(20)
    assert few["loss"] == pytest.approx(
        (0.3 - 1.96 * standard_error, 0.3 + 1.96 * standard_error), rel=1e-4
    )


@pytest.mark.parametrize("losses", [[], [2.0]])
def test_intervals_of_at_most_one_example_are_finite(losses):
    confusion = np.array([[0, len(losses)], [0, 0]])
    intervals = confidence_intervals(confusion, np.array(losses, float))
    assert np.isfinite(list(intervals.values())).all()
