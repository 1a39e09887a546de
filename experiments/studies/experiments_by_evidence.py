"""Simulates the error rates and the sample sizes of `cnn_jax compare` and `cnn_jax experiment`.

    python experiments/studies/experiments_by_evidence.py [--runs=2000] [--units=5000] [--seed=0]
        [--tables replay labels equal effects ratio delays]

The program prints Markdown tables. In each simulated run, someone looks at the result after every
label or unit, and stops at the first decision. For comparison, the same runs are decided by a
z-test at the 5 % level with the same looks, and by an asymptotic confidence sequence. The default
takes about two minutes; --runs=20000 --units=20000 is the longer version.
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
from scipy.stats import norm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from cnn_jax.quality.sequential import (
    CHECK_LEVEL,
    LEVEL,
    betting_e_values,
    confidence_sequence,
    effect_scores,
    ratio_e_values,
    sign_e_values,
)

# The number of runs that are simulated at once, to limit the memory.
_CHUNK = 25
# The z-test is not looked at before this number of units, because it is invalid for fewer units.
_FIRST_LOOK = 100


def chunks(runs: int) -> Iterator[int]:
    """Yields the numbers of runs that are simulated at once."""
    for start in range(0, runs, _CHUNK):
        yield min(_CHUNK, runs - start)


def first_decisions(is_decided: np.ndarray) -> np.ndarray:
    """Returns for each run the number of observations at the first decision; inf without one."""
    first = is_decided.argmax(axis=1) + 1.0
    return np.where(is_decided.any(axis=1), first, math.inf)


def replay(
    gain: float, loss: float, labels: int, runs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Simulates comparisons by logged images.

    Args:
      gain: The probability that only the challenger is correct.
      loss: The probability that only the champion is correct.
      labels: The number of labels in each run.
      runs: The number of runs.
      rng: The generator of the random numbers.

    Returns:
      The number of labels at the first decision of each run, for "better" and for "worse".
    """
    rate, found = gain + loss, []
    # Only images that exactly one version classifies correctly change the e-values.
    count = math.ceil(rate * labels + 6 * math.sqrt(rate * labels))
    for size in chunks(runs):
        positions = np.cumsum(rng.geometric(rate, (size, count)), axis=1)
        is_gain = rng.random((size, count)) < gain / rate
        gains, losses = np.cumsum(is_gain, axis=1), np.cumsum(~is_gain, axis=1)
        pair = []
        for first, second in ((gains, losses), (losses, gains)):
            is_decided = sign_e_values(first, second) >= math.log(2 / LEVEL)
            position = np.where(is_decided & (positions <= labels), positions, np.inf)
            pair.append(position.min(axis=1))
        found.append(pair)
    better, worse = np.concatenate(found, axis=1)
    return better, worse


def fixed_size(first: float, second: float) -> int:
    """Returns the labels of an A/B test of two accuracies with 80 % power at the 5 % level.

    Each image is answered by one of the two versions, and the test looks once at the end.
    """
    mean = (first + second) / 2
    total = norm.isf(LEVEL / 2) * math.sqrt(2 * mean * (1 - mean))
    total += norm.isf(0.2) * math.sqrt(first * (1 - first) + second * (1 - second))
    return 2 * math.ceil((total / (second - first)) ** 2)


Outcomes = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def binary(champion: float, challenger: float) -> Outcomes:
    """Returns a function that draws 0 or 1 for each unit, with the chances of the two arms."""
    return lambda arms, rng: (rng.random(arms.shape) < np.where(arms, challenger, champion)).astype(
        float
    )


def drifting(arms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws 0 or 1 for each unit; the chance falls from 90 % to 10 % and the arms are equal."""
    chance = np.linspace(0.9, 0.1, arms.shape[1])
    return (rng.random(arms.shape) < chance).astype(float)


def ratings(arms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws skewed outcomes between 0 and 1; the arms are equal."""
    return rng.beta(0.2, 3.0, arms.shape)


def live(
    draw: Outcomes, fraction: float, units: int, runs: int, rng: np.random.Generator
) -> dict[str, float]:
    """Simulates experiments with live requests.

    Returns:
      The fraction of the runs that each method decides, with a look after every unit; and the
      fraction of the runs in which the confidence sequence has ever missed an effect of 0.
    """
    decisions = {"e-value": 0, "z-test": 0, "sequence": 0}
    for size in chunks(runs):
        arms = rng.random((size, units)) < fraction
        outcomes = draw(arms, rng)
        scores = effect_scores(arms, outcomes, fraction)
        bound = 1 / min(fraction, 1 - fraction)
        values = np.maximum(betting_e_values(scores, bound), betting_e_values(-scores, bound))
        decisions["e-value"] += (values >= math.log(2 / LEVEL)).any(axis=1).sum()
        late = slice(_FIRST_LOOK, None)
        mean, radius = confidence_sequence(scores)
        decisions["sequence"] += (np.abs(mean) > radius)[:, late].any(axis=1).sum()
        z = np.abs(z_statistics(arms, outcomes))[:, late]
        decisions["z-test"] += (z > norm.isf(LEVEL / 2)).any(axis=1).sum()
    return {name: count / runs for name, count in decisions.items()}


def z_statistics(arms: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Returns the statistic of the two-sample z-test after each unit."""
    sums = []
    for which in (arms, ~arms):
        count = np.maximum(np.cumsum(which, axis=1), 1)
        mean = np.cumsum(which * outcomes, axis=1) / count
        square = np.cumsum(which * outcomes**2, axis=1) / count
        sums.append((mean, np.maximum(square - mean**2, 1e-9) / count))
    (first, first_variance), (second, second_variance) = sums
    return (first - second) / np.sqrt(first_variance + second_variance)


def sizes_until_decision(
    champion: float, challenger: float, units: int, runs: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns the number of units at the decision "better" of each run; inf without it."""
    found = []
    for size in chunks(runs):
        arms = rng.random((size, units)) < 0.5
        scores = effect_scores(arms, binary(champion, challenger)(arms, rng), 0.5)
        found.append(first_decisions(betting_e_values(scores, 2.0) >= math.log(2 / LEVEL)))
    return np.concatenate(found)


def ratio_alarms(
    found: float, fraction: float, units: int, runs: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Simulates the check of the sample ratio.

    Args:
      found: The actual fraction of the challenger.
      fraction: The fraction that the experiment has.
      units: The number of units in each run.
      runs: The number of runs.
      rng: The generator of the random numbers.

    Returns:
      The fraction of the runs with an alarm, and the median number of units at the alarm.
    """
    firsts = []
    for size in chunks(runs):
        selected = np.cumsum(rng.random((size, units)) < found, axis=1)
        others = np.arange(1, units + 1) - selected
        alarm = ratio_e_values(selected, others, fraction) >= -math.log(CHECK_LEVEL)
        firsts.append(first_decisions(alarm))
    first = np.concatenate(firsts)
    return float(np.isfinite(first).mean()), float(np.median(first))


def delays(window: float | None, units: int, runs: int, rng: np.random.Generator) -> float:
    """Simulates rewards that arrive later with the challenger, but are equally frequent.

    The units arrive evenly during 20 days. 30 % of them give a reward, after 0.5 days on average
    with the champion and after 1 day with the challenger. Someone looks every six hours.

    Args:
      window: Only units that arrived at least this number of days ago count, with the rewards of
        this number of days. None: all units count, and a reward that is missing counts as 0.
      units: The number of units in each run.
      runs: The number of runs.
      rng: The generator of the random numbers.

    Returns:
      The fraction of the runs with a decision.
    """
    arrival = np.linspace(0, 20, units)
    looks = np.arange(0, 20, 1 / 4) if window is None else [20 - window]
    total = 0
    for _ in range(runs):
        arms = rng.random(units) < 0.5
        delay = rng.exponential(np.where(arms, 1.0, 0.5))
        delay[rng.random(units) > 0.3] = math.inf
        for look in looks:
            seen = arrival <= look
            waited = look - arrival if window is None else window
            outcomes = (delay <= waited)[seen].astype(float)
            scores = effect_scores(arms[seen], outcomes, 0.5)
            largest = -math.inf
            for values in (betting_e_values(scores, 2.0), betting_e_values(-scores, 2.0)):
                # With a window, a unit never changes, so one look shows all earlier looks.
                largest = max(largest, values[-1] if window is None else values.max())
            if largest >= math.log(2 / LEVEL):
                total += 1
                break
    return total / runs


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def number(count: float) -> str:
    return f"{count:,.0f}" if math.isfinite(count) else "more"


def quantiles(counts: np.ndarray) -> str:
    """Returns the median and the 80 % quantile as two cells of a table."""
    found = [np.quantile(counts, fraction, method="higher") for fraction in (0.5, 0.8)]
    return " | ".join(map(number, found))


def print_replay(runs: int, units: int, rng: np.random.Generator) -> None:
    print("Comparison by logged images; a look after every label.\n")
    print("| gains | losses | better | worse |\n| --- | --- | --- | --- |")
    for gain, loss in ((0.02, 0.02), (0.005, 0.005), (0.1, 0.1), (0.02, 0.01), (0.01, 0.02)):
        better, worse = replay(gain, loss, 2 * units, runs, rng)
        is_better = np.isfinite(better) & (better < worse)
        is_worse = np.isfinite(worse) & (worse < better)
        cells = (gain, loss, is_better.mean(), is_worse.mean())
        print(f"| {' | '.join(map(percent, cells))} |", flush=True)


def print_labels(runs: int, units: int, rng: np.random.Generator) -> None:
    print("Labels until the challenger, which is 1 point better (96 % against 95 %), is found.\n")
    print("| method | median | 80 % of the runs |\n| --- | --- | --- |")
    better, _ = replay(0.02, 0.01, 20_000, runs // 2, rng)
    print(f"| same images, look after every label | {quantiles(better)} |", flush=True)
    print(f"| A/B test, one look at the end | | {fixed_size(0.95, 0.96):,} |")
    first = sizes_until_decision(0.95, 0.96, 60_000, max(runs // 20, 1), rng)
    print(f"| A/B test, look after every label | {quantiles(first)} |", flush=True)


def print_equal(runs: int, units: int, rng: np.random.Generator) -> None:
    print(f"Experiments in which the arms are equal: decisions among {runs:,} runs of {units:,}")
    print(f"units. The last two methods look first after {_FIRST_LOOK} units.\n")
    print("| outcomes | fraction | e-value | confidence sequence | z-test |")
    print("| --- | --- | --- | --- | --- |")
    equal = [
        ("0 or 1, mean 10 %", binary(0.1, 0.1), 0.5),
        ("0 or 1, mean 95 %", binary(0.95, 0.95), 0.5),
        ("0 or 1, mean 10 %", binary(0.1, 0.1), 0.1),
        ("0 or 1, mean falls from 90 % to 10 %", drifting, 0.5),
        ("0 to 1, skewed, mean 6 %", ratings, 0.5),
    ]
    for name, draw, fraction in equal:
        found = live(draw, fraction, units, runs, rng)
        cells = [percent(found[key]) for key in ("e-value", "sequence", "z-test")]
        print(f"| {name} | {fraction} | {' | '.join(cells)} |", flush=True)


def print_effects(runs: int, units: int, rng: np.random.Generator) -> None:
    print("Experiments with an effect: units until the decision.\n")
    print("| means | median | 80 % of the runs |\n| --- | --- | --- |")
    for champion, challenger in ((0.1, 0.15), (0.5, 0.55), (0.1, 0.12)):
        first = sizes_until_decision(champion, challenger, 4 * units, max(runs // 10, 1), rng)
        print(f"| {percent(champion)}, {percent(challenger)} | {quantiles(first)} |", flush=True)


def print_ratio(runs: int, units: int, rng: np.random.Generator) -> None:
    print("The check of the sample ratio at level 0.001.\n")
    print("| expected | actual | alarms | units at the alarm, median |\n| --- | --- | --- | --- |")
    for expected, actual in ((0.5, 0.5), (0.1, 0.1), (0.5, 0.48), (0.5, 0.45), (0.1, 0.08)):
        alarms, first = ratio_alarms(actual, expected, 2 * units, runs, rng)
        cells = [percent(expected), percent(actual), f"{100 * alarms:.2f} %", number(first)]
        print(f"| {' | '.join(cells)} |", flush=True)


def print_delays(runs: int, units: int, rng: np.random.Generator) -> None:
    print("Rewards that arrive later with the challenger, but are equally frequent.\n")
    print("| rule | decisions |\n| --- | --- |")
    for name, window, count in (
        ("a missing reward counts as 0 at once", None, max(runs // 4, 1)),
        ("only units whose window of 7 days has ended", 7.0, runs),
    ):
        print(f"| {name} | {percent(delays(window, units, count, rng))} |", flush=True)


TABLES = {
    "replay": print_replay,
    "labels": print_labels,
    "equal": print_equal,
    "effects": print_effects,
    "ratio": print_ratio,
    "delays": print_delays,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate comparisons and experiments.")
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--units", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    flags = parser.parse_args()
    for name in flags.tables:
        # Each table has its own random numbers, so that it can be computed separately.
        rng = np.random.default_rng([flags.seed, list(TABLES).index(name)])
        TABLES[name](flags.runs, flags.units, rng)
        print()


if __name__ == "__main__":
    main()
