"""Tests of the drift tests, against SciPy and simulations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cnn_jax.quality import drift


def test_a_continuous_statistic_has_the_p_value_of_scipy():
    rng = np.random.default_rng(0)
    reference, window = rng.normal(size=2000), rng.normal(0.1, 1, size=250)
    expected = stats.ks_2samp(reference, window, method="asymp").pvalue
    assert drift.statistic_p_value(reference, window) == pytest.approx(expected, rel=0.1)


def test_rounding_noise_between_equal_values_is_no_drift():
    """Half of the confidences are 1; in the window they are 1 - 6e-8, as with another batch."""
    rng = np.random.default_rng(0)

    def draw(size, one):
        return np.where(rng.random(size) < 0.5, one, rng.uniform(0.3, 1, size)).astype(np.float32)

    reference, window = draw(2000, 1.0), draw(250, 1 - 6e-8)
    assert stats.ks_2samp(reference, window).pvalue < 1e-10
    assert drift.statistic_p_value(reference, window) > 0.05


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, 255.0]), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_samples_with_ties_from_one_distribution_have_large_p_values(values, seed):
    rng = np.random.default_rng(seed)
    reference, window = (rng.choice(values, size).astype(np.float32) for size in (1000, 100))
    # The probability of a smaller p-value is at most 1e-5 for each example.
    assert drift.statistic_p_value(reference, window) > 1e-5


def test_constant_statistics_have_p_value_one():
    assert drift.statistic_p_value(np.zeros(100), np.zeros(10)) == 1
    assert drift.statistic_p_value(np.zeros(100), np.ones(10)) < 1e-6


def test_frequent_classes_have_the_chi_square_p_value_of_scipy():
    reference, window = np.array([500, 300, 200]), np.array([100, 100, 50])
    expected = stats.chi2_contingency(np.stack([reference, window]), correction=False).pvalue
    assert drift.classes_p_value(reference, window) == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(
    reference=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    seed=st.integers(0, 1000),
)
def test_each_group_of_classes_has_an_expected_count_of_five(reference, seed):
    reference = np.array(reference)
    window = np.random.default_rng(seed).integers(0, 20, len(reference))
    groups = drift.group_classes(reference, window)
    assert set(groups) == set(range(groups.max() + 1))
    if groups.max() > 0:
        table = np.stack([np.bincount(groups, counts) for counts in (reference, window)])
        assert stats.contingency.expected_freq(table).min() >= 5 - 1e-9
    assert 0 <= drift.classes_p_value(reference, window) <= 1


def test_a_small_rest_of_the_classes_joins_the_last_group():
    """Two of these classes are enough for a group, and the third alone would be too small."""
    groups = drift.group_classes(np.array([40, 40, 40]), np.array([4, 4, 4]))
    np.testing.assert_array_equal(groups, [0, 0, 0])


def test_windows_without_drift_rarely_differ():
    rng = np.random.default_rng(0)

    def draw(size):
        values = rng.normal(size=(size, 5))
        values[:, 1] = np.minimum(values[:, 1], 0.5)  # A statistic with many ties.
        return values, np.bincount(rng.choice(10, size, p=np.arange(1, 11) / 55), minlength=10)

    flags = []
    for _ in range(300):
        p_values = drift.window_p_values(*draw(1500), *draw(250))
        assert tuple(p_values) == drift.TESTS
        flags.append(drift.is_different(list(p_values.values())))
    # At a rate of 1 %, more than 9 of 300 have the probability 0.001.
    assert sum(flags) <= 9


def test_bonferroni_divides_the_level_by_the_number_of_tests():
    assert drift.is_different([0.01 / 6, 1, 1, 1, 1, 1], level=0.01)
    assert not drift.is_different([0.0017, 1, 1, 1, 1, 1], level=0.01)


def test_an_alarm_needs_two_windows_in_a_row():
    flags = np.array([True, False, True, True, True, False])
    expected = [False, False, False, True, True, False]
    np.testing.assert_array_equal(drift.consecutive(flags), expected)
    assert drift.consecutive(np.zeros(0, bool)).shape == (0,)
