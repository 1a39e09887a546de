"""Decides between the two versions of an experiment; the results are plain JSON values."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from cnn_jax.experiment.observations import MAX_SKEW, Observations, Unit
from cnn_jax.quality.sequential import (
    CHECK_LEVEL,
    LEVEL,
    betting_e_values,
    confidence_sequence,
    decide,
    effect_scores,
    ratio_e_values,
    sign_e_values,
)
from cnn_jax.registry.split import ARMS, CHALLENGER_ARM, CHAMPION_ARM, Experiment
from cnn_jax.system.text import utc

# The number of points of a curve.
_POINTS = 200
# A unit is slow if its slowest image takes longer than a limit: the quantile _SLOW_QUANTILE of
# these times in the first _FIRST_UNITS units.
_FIRST_UNITS, _SLOW_QUANTILE = 100, 0.95
# The largest exponent of an e-value in a result: JSON has no infinity.
_MAX_LOG = 700.0


def analyse_pairs(correct: Bool[np.ndarray, "n 2"]) -> dict[str, Any]:
    """Compares two versions by their predictions for the same images.

    Args:
      correct: Whether the challenger and the champion classify each image correctly, in the order
        in which the labels arrived.

    Returns:
      The number of images, the number of correct images of each arm, gains and losses, the
      difference in accuracy with its interval, the e-values, the decision, and the curve.
    """
    challenger, champion = correct[:, 0], correct[:, 1]
    gains, losses = np.cumsum(challenger & ~champion), np.cumsum(champion & ~challenger)
    better, worse = sign_e_values(gains, losses), sign_e_values(losses, gains)
    scores = challenger.astype(float) - champion
    counts = {"gains": int(gains[-1]), "losses": int(losses[-1])} if len(correct) else {}
    return {
        "images": len(correct),
        "correct": dict(zip(ARMS, correct.sum(axis=0)[::-1].tolist(), strict=True)),
        **counts,
        **_comparison(scores, better, worse),
    }


def analyse(experiment: Experiment, observations: Observations, now: float) -> dict[str, Any]:
    """Analyses an experiment.

    Args:
      experiment: The experiment.
      observations: The observations of the experiment.
      now: The present time, in seconds since the epoch. The window of a unit must have ended.

    Returns:
      The experiment; "arms", "checks", "decision" and "reason"; for a shadow, the values of
      `analyse_pairs`, else the difference of the mean outcomes with its interval and the curve.
    """
    if experiment.is_shadow:
        result = analyse_pairs(np.array(observations.pairs, bool).reshape(-1, 2))
        agreements = observations.agreements
        result["agreement"] = float(np.mean(agreements)) if agreements else None
        arms: dict[str, dict[str, Any]] = {arm: {} for arm in ARMS}
        checks = []
    else:
        result, arms, checks = _analyse_units(experiment, observations.units, now)
    for arm, values in arms.items():
        times = observations.milliseconds[arm]
        values["version"] = experiment.versions[arm]
        values["images"] = len(times)
        values["failures"] = observations.failures[arm]
        for name, quantile in (("median", 0.5), ("p95", 0.95)):
            values[f"{name}_milliseconds"] = float(np.quantile(times, quantile)) if times else None
    checks += [
        _check(
            "assignment",
            observations.misplaced == 0,
            f"{observations.misplaced:,} images were answered by another version than the "
            "experiment assigns",
        ),
        _check(
            "clocks",
            observations.skew <= MAX_SKEW,
            f"the clocks of the servers differ by {max(observations.skew, 0):.1f} s or more",
        ),
    ]
    result["decision"], result["reason"] = _conclusion(result["decision"], checks)
    return {
        "experiment": dataclasses.asdict(experiment),
        "arms": arms,
        **result,
        "checks": checks,
    }


def _analyse_units(
    experiment: Experiment, units: Sequence[Unit], now: float
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Returns the result, the values of each arm, and the checks of an experiment with units."""
    complete = [unit for unit in units if unit.start + experiment.window <= now]
    outcomes = [unit.outcome(experiment.outcome) for unit in complete]
    used = [unit for unit, value in zip(complete, outcomes, strict=True) if value is not None]
    values = np.array([value for value in outcomes if value is not None], float)
    is_challenger = _in_challenger(used)
    fraction = experiment.fraction
    scores = effect_scores(is_challenger, values, fraction)
    result = {
        "units": len(used),
        **_comparison(scores, *_two_sided(scores, fraction)),
        "times": [utc(used[i].start + experiment.window) for i in _chosen(len(used))],
    }
    arms = {
        arm: {
            "units": sum(unit.arm == arm for unit in units),
            "pending": sum(unit.arm == arm for unit in units[len(complete) :]),
            "with_outcome": int(in_arm.sum()),
            "mean": float(values[in_arm].mean()) if in_arm.any() else None,
        }
        for arm, in_arm in ((CHAMPION_ARM, ~is_challenger), (CHALLENGER_ARM, is_challenger))
    }
    checks = [_check_ratio("sample ratio", "units", units, fraction)]
    if experiment.outcome != "reward":
        checks.append(_check_ratio("feedback ratio", "units with feedback", used, fraction))
    failed = np.array([unit.failures > 0 for unit in units], float)
    checks.append(_check_guard("failures", "failed requests", units, failed, fraction))
    times = np.array([unit.milliseconds for unit in units])
    if len(units) > _FIRST_UNITS:
        limit = np.nanquantile(times[:_FIRST_UNITS], _SLOW_QUANTILE)
        # A comparison with NaN is false: units without an answer are not slow.
        slow = (times[_FIRST_UNITS:] > limit).astype(float)
        description = f"answers that took more than {limit:.0f} ms"
        checks.append(_check_guard("latency", description, units[_FIRST_UNITS:], slow, fraction))
    return result, arms, checks


def _in_challenger(units: Sequence[Unit]) -> Bool[np.ndarray, " n"]:
    return np.array([unit.arm == CHALLENGER_ARM for unit in units], bool)


def _two_sided(
    scores: Float[np.ndarray, " n"], fraction: float
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Returns the logarithms of the e-values for a positive and for a negative effect."""
    bound = 1 / min(fraction, 1 - fraction)
    return betting_e_values(scores, bound), betting_e_values(-scores, bound)


def _comparison(
    scores: Float[np.ndarray, " n"],
    better: Float[np.ndarray, " n"],
    worse: Float[np.ndarray, " n"],
) -> dict[str, Any]:
    """Returns the difference with its interval, the e-values, the decision and the curve."""
    mean, radius = confidence_sequence(scores)
    chosen = _chosen(len(scores))
    decision = decide(better, worse)
    curve = {
        "count": (chosen + 1).tolist(),
        "difference": mean[chosen].tolist(),
        "low": np.maximum(mean - radius, -1)[chosen].tolist(),
        "high": np.minimum(mean + radius, 1)[chosen].tolist(),
        "better": _plain(better[chosen]),
        "worse": _plain(worse[chosen]),
    }
    last = {name: values[-1] if values else None for name, values in curve.items()}
    return {
        "difference": last["difference"],
        "interval": [last["low"], last["high"]] if len(scores) else None,
        "e_value_better": _largest(better),
        "e_value_worse": _largest(worse),
        "threshold": 2 / LEVEL,
        "decision": {1: "better", -1: "worse", 0: "none"}[decision.direction],
        "decided_after": decision.observations or None,
        "curve": curve,
    }


def _chosen(count: int) -> np.ndarray:
    """Returns the positions of the points of a curve, at most `_POINTS`; the last is included."""
    return np.unique(np.linspace(0, count - 1, min(count, _POINTS)).astype(int))


def _largest(logarithms: Float[np.ndarray, " n"]) -> float:
    """Returns the largest e-value so far, for the decision; 1 before the first observation."""
    return _plain(logarithms.max(initial=0.0, keepdims=True))[0]


def _plain(logarithms: Float[np.ndarray, " n"]) -> list[float]:
    return np.exp(np.minimum(logarithms, _MAX_LOG)).tolist()


def _check(name: str, is_passed: bool, problem: str, is_guard: bool = False) -> dict[str, Any]:
    """Returns the entry of a check in the results: its name, whether it passed, and the problem.

    Args:
      name: The name of the check.
      is_passed: Whether the check has found no problem.
      problem: The problem, as a sentence without a full stop.
      is_guard: True if the problem speaks against the challenger; False if it invalidates the
        comparison.
    """
    described = "" if is_passed else problem
    return {"name": name, "passed": is_passed, "guard": is_guard, "problem": described}


def _check_ratio(
    name: str, described: str, units: Sequence[Unit], fraction: float
) -> dict[str, Any]:
    """Checks that the challenger has the fraction of the units that the experiment gives it."""
    selected = np.cumsum(_in_challenger(units))
    others = np.arange(1, len(units) + 1) - selected
    largest = ratio_e_values(selected, others, fraction).max(initial=-math.inf)
    found = selected[-1] / len(units) if units else fraction
    problem = f"{found:.2%} of the {described} are in the challenger, expected {fraction:.2%}"
    return _check(name, bool(largest < -math.log(CHECK_LEVEL)), problem)


def _check_guard(
    name: str,
    described: str,
    units: Sequence[Unit],
    is_bad: Float[np.ndarray, " n"],
    fraction: float,
) -> dict[str, Any]:
    """Checks that a bad event is not more frequent with the challenger."""
    in_challenger = _in_challenger(units)
    more_bad, _ = _two_sided(effect_scores(in_challenger, is_bad, fraction), fraction)
    is_passed = bool(more_bad.max(initial=-math.inf) < -math.log(CHECK_LEVEL))
    rates = [
        f"{is_bad[which].mean():.2%}" if which.any() else "none"
        for which in (in_challenger, ~in_challenger)
    ]
    problem = (
        f"{rates[0]} of the challenger's units had {described}, and {rates[1]} of the champion's"
    )
    return _check(name, is_passed, problem, is_guard=True)


def _conclusion(decision: str, checks: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Returns the decision after the checks: "better", "worse", "none" or "invalid", and a reason.

    A failed guard means "worse". Any other failed check means "invalid".
    """
    failed = sorted((one for one in checks if not one["passed"]), key=lambda one: one["guard"])
    if not failed:
        return decision, ""
    return "worse" if failed[0]["guard"] else "invalid", failed[0]["problem"]
