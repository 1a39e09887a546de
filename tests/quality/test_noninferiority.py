import itertools

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, norm

from cnn_jax.quality.noninferiority import compare, score_statistic, worse_classes


def score(gains, losses, images, margin):
    return float(score_statistic(np.array(gains), np.array(losses), images, margin))


def test_score_interval_equals_a_published_example():
    """For 1 gain and 7 losses in 21 pairs, the published 95 % interval is -0.517 to -0.026.

    Source: Tango's interval for the example of table 2 in Fagerland, Lydersen and Laake,
    "Recommended tests and confidence intervals for paired binomial proportions", Statistics in
    Medicine 33, 2014. The table has 1, 1, 7 and 12 pairs.
    """

    def bound(quantile, low, high):
        return brentq(lambda difference: score(1, 7, 21, -difference) - quantile, low, high)

    assert bound(norm.isf(0.025), -0.9, -0.3) == pytest.approx(-0.517, abs=5e-4)
    assert bound(norm.ppf(0.025), -0.2, 0.5) == pytest.approx(-0.026, abs=5e-4)


@pytest.mark.parametrize(
    ("gains", "losses", "images", "margin"),
    [(20, 25, 1240, 0.01), (0, 3, 100, 0.1), (7, 0, 50, 0.05), (300, 280, 900, 0.02)],
)
def test_score_equals_a_numerical_maximum_of_the_likelihood(gains, losses, images, margin):
    """The test maximises the likelihood numerically; the tested code uses a formula."""

    def deviance(rate):
        others = images - gains - losses
        parts = (
            (losses, rate),
            (gains, rate - margin),
            (others, 1 - 2 * rate + margin),
        )
        return -sum(count * np.log(part) for count, part in parts if count)

    bounds = (margin + 1e-12, (1 + margin) / 2 - 1e-12)
    rate = minimize_scalar(deviance, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    variance = (2 * rate - margin - margin**2) / images
    expected = ((gains - losses) / images + margin) / np.sqrt(variance)
    assert score(gains, losses, images, margin) == pytest.approx(expected, rel=1e-4)


def test_score_without_differences_is_known():
    """If no prediction differs, the score is sqrt(n m / (1 - m)) for n images and margin m."""
    assert score(0, 0, 99, 0.1) == pytest.approx(np.sqrt(11.0))


def test_score_is_computed_for_many_studies_at_once():
    rng = np.random.default_rng(0)
    gains, losses = rng.integers(0, 50, (2, 4, 5))
    statistics = score_statistic(gains, losses, 500, 0.02)
    assert statistics.shape == (4, 5)
    for index in np.ndindex(4, 5):
        assert statistics[index] == score(gains[index], losses[index], 500, 0.02)


def test_worse_classes_equal_a_closed_test_procedure():
    """Holm's method finds the same classes as a closed test with Bonferroni for each set."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(60):
        gains, losses = rng.poisson(4, 5), rng.poisson([4, 4, 8, 14, 22], 5)
        p_values = [
            binomtest(int(loss), int(loss + gain), 0.5, alternative="greater").pvalue
            for gain, loss in zip(gains, losses, strict=True)
        ]
        sets = [s for size in range(1, 6) for s in itertools.combinations(range(5), size)]
        expected = [
            all(min(p_values[i] for i in s) * len(s) <= 0.05 for s in sets if k in s)
            for k in range(5)
        ]
        assert worse_classes(gains, losses).tolist() == expected
        found += sum(expected)
    assert 60 < found < 180


def test_holm_stops_at_the_first_large_p_value():
    """Two of three classes have p = 10 / 512; neither is worse, because 3 p is above 5 %."""
    assert not worse_classes(np.array([1, 1, 0]), np.array([8, 8, 0])).any()


def test_a_class_without_differences_is_not_worse():
    assert not worse_classes(np.zeros(3, int), np.zeros(3, int)).any()


def make_predictions(images, gains, losses):
    """Returns whether each prediction is correct, for a new and an old classifier."""
    new, old = np.ones(images, bool), np.ones(images, bool)
    old[:gains] = False
    new[gains : gains + losses] = False
    return new, old


def test_counts_are_by_class():
    new, old = make_predictions(60, 4, 2)
    labels = np.array([0, 0, 0, 1, 1, 2, *[3] * 54])
    comparison = compare(new, old, labels, ["a", "b", "c", "d"], 0.1)
    assert comparison.classes == {"a": (3, 3, 0), "b": (2, 1, 1), "c": (1, 0, 1)}
    assert (comparison.images, comparison.gains, comparison.losses) == (60, 4, 2)
    assert (comparison.candidate_correct, comparison.reference_correct) == (58, 56)
    assert comparison.p_value == pytest.approx(norm.sf(score(4, 2, 60, 0.1)))
    assert comparison.is_not_worse


def test_both_tests_must_pass():
    """A new classifier must pass both the test of all images and the test of each class."""
    new, old = make_predictions(5000, 10, 10)
    evenly = np.arange(5000) % 10
    assert compare(new, old, evenly, list("abcdefghij"), 0.01).is_not_worse
    concentrated = evenly.copy()
    concentrated[:10], concentrated[10:20] = 0, 7
    comparison = compare(new, old, concentrated, list("abcdefghij"), 0.01)
    assert comparison.p_value < 1e-6
    assert comparison.worse_classes == ("h",)
    assert not comparison.is_not_worse
    few = compare(*make_predictions(200, 4, 4), np.zeros(200, int), ["a"], 0.01)
    assert few.worse_classes == ()
    assert not few.is_not_worse


def test_needed_images_give_the_promised_power():
    """If 4 % of the predictions differ, 2,473 images give a power of 80 % in a simulation."""
    comparison = compare(*make_predictions(1000, 20, 20), np.zeros(1000, int), ["a"], 0.01)
    needed = comparison.images_needed
    assert needed == pytest.approx(0.04 * (1.6449 + 0.8416) ** 2 / 0.01**2, rel=1e-3)
    rng = np.random.default_rng(0)
    gains, losses, _ = rng.multinomial(needed, [0.02, 0.02, 0.96], 4000).T
    power = (score_statistic(gains, losses, needed, 0.01) >= norm.isf(0.05)).mean()
    assert power == pytest.approx(0.8, abs=0.03)
