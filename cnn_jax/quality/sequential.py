"""Tests and intervals that stay valid if they are looked at after every observation.

An e-value is a number that is at least 1 / level with at most the probability `level`, if the null
hypothesis is true. This also holds for the largest of the e-values after 1, 2, 3, ... observations
(Ville's inequality). So a test may end at any moment. Each function returns the logarithms of the
e-values after each observation. The observations are along the last axis.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import betainc, betaln

# The probability of a wrong decision between two versions, in either direction.
LEVEL = 0.05
# The probability of a false alarm of one check.
CHECK_LEVEL = 0.001
# The parameter of the beta distribution over the probability of a gain. The beta distribution over
# the fraction of the units has the weight of this number of units.
_SIGN_PRIOR, _RATIO_WEIGHT = 4.0, 100.0
# The bets, as fractions of the largest bet that cannot lose everything.
_BETS = 0.9 * 2.0 ** (-np.arange(21) / 2)
# The confidence sequence is narrowest after about this number of observations.
_NARROWEST = 2_000


class Decision(NamedTuple):
    """A decision between two versions.

    Attributes:
      direction: 1 if the challenger is better, -1 if it is worse, 0 without a decision.
      observations: The number of observations at the decision; 0 without a decision.
    """

    direction: int
    observations: int


def decide(
    better: Float[np.ndarray, " n"], worse: Float[np.ndarray, " n"], level: float = LEVEL
) -> Decision:
    """Returns the first decision between two versions; later observations do not change it.

    A watch that must find a later deterioration compares `worse` itself with its limit.

    Args:
      better: The logarithms of the e-values against "the challenger is not better".
      worse: The logarithms of the e-values against "the challenger is not worse".
      level: The probability of a decision if both versions are equal, above 0 and below 1.
    """
    is_decided = np.maximum(better, worse) >= np.log(2 / level)
    if not is_decided.any():
        return Decision(0, 0)
    first = int(is_decided.argmax())
    return Decision(1 if better[first] > worse[first] else -1, first + 1)


def sign_e_values(
    gains: Int[np.ndarray, "*batch"], losses: Int[np.ndarray, "*batch"]
) -> Float[np.ndarray, "*batch"]:
    """Tests the hypothesis that a gain is at most as probable as a loss.

    The e-value is the mean likelihood ratio against equal probabilities. The mean is over a
    symmetric beta distribution of the probability of a gain, restricted to values above 1/2
    (Robbins, "Statistical methods related to the law of the iterated logarithm", 1970).

    Args:
      gains: The number of gains so far, such as images that only the challenger classifies
        correctly.
      losses: The number of losses so far.

    Returns:
      The logarithms of the e-values.
    """
    first, second = gains + _SIGN_PRIOR, losses + _SIGN_PRIOR
    ratio = betaln(first, second) - betaln(_SIGN_PRIOR, _SIGN_PRIOR) + (gains + losses) * np.log(2)
    with np.errstate(divide="ignore"):  # With many losses the probability can become 0.
        return np.asarray(ratio + np.log(2 * betainc(second, first, 0.5)))


def ratio_e_values(
    selected: Int[np.ndarray, "*batch"], others: Int[np.ndarray, "*batch"], fraction: float
) -> Float[np.ndarray, "*batch"]:
    """Tests the hypothesis that each unit is selected with a given probability.

    The e-value is the mean likelihood ratio over a beta distribution with the mean `fraction`
    (Lindon and Malek, "Anytime-valid inference for multinomial count data", NeurIPS 2022).

    Args:
      selected: The number of selected units so far.
      others: The number of other units so far.
      fraction: The probability, above 0 and below 1.

    Returns:
      The logarithms of the e-values.
    """
    first, second = _RATIO_WEIGHT * fraction, _RATIO_WEIGHT * (1 - fraction)
    likelihood = selected * np.log(fraction) + others * np.log1p(-fraction)
    evidence = betaln(first + selected, second + others) - betaln(first, second)
    return np.asarray(evidence - likelihood)


def effect_scores(
    in_challenger: Bool[np.ndarray, "*batch n"],
    outcomes: Float[np.ndarray, "*batch n"],
    fraction: float,
) -> Float[np.ndarray, "*batch n"]:
    """Returns a score of each unit, whose expectation is the effect of the challenger on the unit.

    The effect is the outcome with the challenger minus the outcome with the champion. The
    expectation is over the assignment only, so nothing is assumed about the outcomes. The mean of
    the earlier outcomes is subtracted from each outcome. This reduces the variance.

    Args:
      in_challenger: Whether the unit is assigned to the challenger.
      outcomes: The outcomes, 0 to 1.
      fraction: The probability that a unit is assigned to the challenger, above 0 and below 1.

    Returns:
      The scores; the absolute value is at most 1 / min(fraction, 1 - fraction).
    """
    count = np.arange(outcomes.shape[-1])
    earlier_mean = (np.cumsum(outcomes, axis=-1) - outcomes + 0.5) / (count + 1)
    weights = np.where(in_challenger, 1 / fraction, -1 / (1 - fraction))
    return weights * (outcomes - earlier_mean)


def betting_e_values(
    scores: Float[np.ndarray, "*batch n"], bound: float
) -> Float[np.ndarray, "*batch n"]:
    """Tests the hypothesis that the conditional expectation of each score is at most 0.

    The e-value is the capital of a gambler, who starts with 1 and bets on positive scores. The
    capital is the mean over several constant bets ("diversified Kelly betting" in Waudby-Smith and
    Ramdas, "Estimating means of bounded random variables by betting", JRSS B 2023).

    Args:
      scores: The scores.
      bound: The largest possible absolute value of a score.

    Returns:
      The logarithms of the e-values.
    """
    total = np.zeros(scores.shape)
    # A capital that is too small for a float becomes 0; one that is too large becomes infinite.
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        for bet in _BETS:
            total += np.cumprod(1 + bet / bound * scores, axis=-1)
        return np.log(total / len(_BETS))


def confidence_sequence(
    scores: Float[np.ndarray, "*batch n"], level: float = LEVEL
) -> tuple[Float[np.ndarray, "*batch n"], Float[np.ndarray, "*batch n"]]:
    """Returns intervals that all contain the mean, with a probability of about 1 - level.

    The intervals are asymptotic: they are too narrow for fewer than about 100 scores.

    Source: Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and
    asymptotic confidence sequences", Annals of Statistics 2024, theorem 2.2.

    Args:
      scores: The scores, whose conditional expectations have the mean to estimate.
      level: The probability that an interval does not contain the mean, above 0 and below 1.

    Returns:
      The mean of the scores so far, and half of the width of the interval.
    """
    count = np.arange(1, scores.shape[-1] + 1)
    mean = np.cumsum(scores, axis=-1) / count
    # Without the additional 1, intervals would be empty as long as all scores are equal.
    variance = np.maximum((np.cumsum(scores**2, axis=-1) + 1) / count - mean**2, 0)
    log = -2 * np.log(level)
    rho2 = (log + np.log(log) + 1) / _NARROWEST
    spread = count * rho2 + 1
    radius = np.sqrt(variance * 2 * spread / (count**2 * rho2) * np.log(np.sqrt(spread) / level))
    return mean, radius
