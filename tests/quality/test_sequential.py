"""Tests of e-values and confidence sequences, against independent computations."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta, binom

from cnn_jax.quality import sequential
from cnn_jax.quality.sequential import (
    betting_e_values,
    confidence_sequence,
    decide,
    effect_scores,
    ratio_e_values,
    sign_e_values,
)

counts = st.integers(0, 60)
probabilities = st.floats(0.02, 0.98)


def sign(gains, losses):
    return math.exp(sign_e_values(np.array(gains), np.array(losses)))


def ratio(selected, others, fraction):
    return math.exp(ratio_e_values(np.array(selected), np.array(others), fraction))


@pytest.mark.parametrize(("gains", "losses"), [(0, 0), (1, 0), (0, 1), (7, 2), (2, 7), (40, 11)])
def test_sign_e_value_equals_an_integral_of_likelihood_ratios(gains, losses):
    def integrand(chance):
        likelihood_ratio = (2 * chance) ** gains * (2 * (1 - chance)) ** losses
        return 2 * beta.pdf(chance, 4, 4) * likelihood_ratio

    expected, _ = quad(integrand, 0.5, 1)
    assert sign(gains, losses) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("fraction", [0.5, 0.1])
@pytest.mark.parametrize(("selected", "others"), [(0, 0), (3, 1), (1, 30), (25, 25)])
def test_ratio_e_value_equals_an_integral_of_likelihood_ratios(selected, others, fraction):
    def integrand(chance):
        likelihood_ratio = (chance / fraction) ** selected * (
            (1 - chance) / (1 - fraction)
        ) ** others
        return beta.pdf(chance, 100 * fraction, 100 * (1 - fraction)) * likelihood_ratio

    expected, _ = quad(integrand, 0, 1, limit=200)
    assert ratio(selected, others, fraction) == pytest.approx(expected, rel=1e-6)


@given(counts, counts, st.floats(0, 0.5))
def test_sign_e_value_does_not_grow_on_average_without_gains(gains, losses, chance):
    """The expected next e-value is at most the present one if gains are not more probable."""
    expected = chance * sign(gains + 1, losses) + (1 - chance) * sign(gains, losses + 1)
    assert expected <= sign(gains, losses) * (1 + 1e-9)


@given(counts, counts, probabilities)
def test_ratio_e_value_stays_the_same_on_average(selected, others, fraction):
    expected = fraction * ratio(selected + 1, others, fraction)
    expected += (1 - fraction) * ratio(selected, others + 1, fraction)
    assert expected == pytest.approx(ratio(selected, others, fraction), rel=1e-9)


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 1)), max_size=12),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0.05, 0.95),
)
def test_betting_e_value_does_not_grow_on_average_without_effect(past, first, second, fraction):
    """The next unit has any two outcomes, of which the challenger's is not better."""
    champion, challenger = max(first, second), min(first, second)
    expected = 0.0
    for in_challenger, outcome, chance in (
        (True, challenger, fraction),
        (False, champion, 1 - fraction),
    ):
        arms = np.array([arm for arm, _ in past] + [in_challenger])
        outcomes = np.array([one for _, one in past] + [outcome])
        scores = effect_scores(arms, outcomes, fraction)
        values = np.exp(betting_e_values(scores, 1 / min(fraction, 1 - fraction)))
        expected += chance * values[-1]
    before = values[-2] if past else 1.0
    assert expected <= before * (1 + 1e-9)


def test_false_positives_are_bounded_over_all_outcomes():
    """All 2^16 sequences of gains and losses with equal probability; a look after each."""
    gains = np.array(list(itertools.product([0, 1], repeat=16)))
    better = sign_e_values(gains.cumsum(axis=1), (1 - gains).cumsum(axis=1))
    for threshold in (2.0, 5.0, 20.0):
        assert (np.exp(better).max(axis=1) >= threshold).mean() <= 1 / threshold
    # The test has power: with three gains to one loss it often decides.
    weights = binom.pmf(gains.sum(axis=1), 16, 0.75) / binom.pmf(gains.sum(axis=1), 16, 0.5) / 2**16
    assert ((np.exp(better).max(axis=1) >= 5) * weights).sum() > 0.4


def test_betting_e_value_is_the_mean_capital_of_constant_bets():
    scores = np.array([0.5, -1.5, 2.0, 0.1])
    capitals = []
    for power in range(21):
        capital = 1.0
        for score in scores:
            capital *= 1 + 0.9 * 2 ** (-power / 2) / 2.0 * score
        capitals.append(capital)
    found = np.exp(betting_e_values(scores, 2.0))
    assert found[-1] == pytest.approx(np.mean(capitals), rel=1e-12)
    assert found[0] == pytest.approx(1 + 0.5 / 2 * np.mean(sequential._BETS))


def test_score_has_the_effect_as_expectation():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 6))
    fraction, means = 0.3, np.zeros(6)
    for arms in itertools.product([False, True], repeat=6):
        arms = np.array(arms)
        chance = np.prod(np.where(arms, fraction, 1 - fraction))
        means += chance * effect_scores(arms, np.where(arms, first, second), fraction)
    np.testing.assert_allclose(means, first - second, atol=1e-12)


def test_score_is_within_its_bound():
    rng = np.random.default_rng(1)
    for fraction in (0.1, 0.5, 0.8):
        outcomes = rng.integers(0, 2, (50, 30)).astype(float)
        scores = effect_scores(rng.random((50, 30)) < fraction, outcomes, fraction)
        assert np.abs(scores).max() <= 1 / min(fraction, 1 - fraction)


def test_many_sequences_are_computed_at_once():
    rng = np.random.default_rng(0)
    arms, outcomes = rng.random((3, 8)) < 0.5, rng.random((3, 8))
    scores = effect_scores(arms, outcomes, 0.5)
    for row in range(3):
        np.testing.assert_allclose(scores[row], effect_scores(arms[row], outcomes[row], 0.5))
        together, alone = betting_e_values(scores, 2.0)[row], betting_e_values(scores[row], 2.0)
        np.testing.assert_allclose(together, alone)
        np.testing.assert_allclose(
            confidence_sequence(scores)[1][row], confidence_sequence(scores[row])[1]
        )


def test_decision_is_the_first_and_stays():
    low, high = 0.0, math.log(40)
    better = np.array([low, high, low, low])
    worse = np.array([low, low, low, high + 5])
    assert decide(better, worse) == (1, 2)
    assert decide(worse, better) == (-1, 2)
    assert decide(better - 1e-6, np.full(4, low)) == (0, 0)
    assert decide(np.empty(0), np.empty(0)) == (0, 0)


def test_confidence_sequence_equals_the_published_formula():
    scores = np.random.default_rng(0).normal(size=500)
    mean, radius = confidence_sequence(scores, 0.05)
    for n in (1, 17, 500):
        part = scores[:n]
        rho = math.sqrt((-2 * math.log(0.05) + math.log(-2 * math.log(0.05)) + 1) / 2000)
        expected = math.sqrt(part.var() + 1 / n) * math.sqrt(
            2 * (n * rho**2 + 1) / (n**2 * rho**2) * math.log(math.sqrt(n * rho**2 + 1) / 0.05)
        )
        assert (mean[n - 1], radius[n - 1]) == pytest.approx((part.mean(), expected))


def test_large_counts_give_finite_evidence():
    assert sign_e_values(np.array(10**6), np.array(10**6 - 20_000)) > 50
    assert sign_e_values(np.array(0), np.array(10**5)) == -np.inf
    assert sign_e_values(np.array(10**5), np.array(0)) > 6e4
