"""Simulates how often `registry promote --not_worse_than` promotes a candidate.

    python experiments/studies/promotion_by_evidence.py [--studies=20000] [--seed=0]

Each simulated study draws the test images of ten classes of equal size. In the simplest case, 2 %
of the images are classified correctly only by the candidate and 2 % only by the champion. The
margin is 1 point. The program prints a Markdown table with the fraction of the studies in which the
candidate passes the score test, has no class that is worse, and is promoted because both hold.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from cnn_jax.quality.noninferiority import LEVEL, score_statistic, worse_classes

_MARGIN = 0.01


def simulate(
    images: int, rates: Sequence[tuple[float, float]], studies: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Simulates many comparisons of a candidate with a champion.

    Args:
      images: The number of test images in each study, a multiple of the number of classes.
      rates: For each class, the probabilities that only the candidate and only the champion is
        correct.
      studies: The number of studies.
      rng: The generator of the random numbers.

    Returns:
      The fractions of the studies in which the score test passes, no class is worse, and both.
    """
    gains, losses = np.empty((2, studies, len(rates)), np.int64)
    for label, (gain, loss) in enumerate(rates):
        probabilities = [gain, loss, 1 - gain - loss]
        counts = rng.multinomial(images // len(rates), probabilities, size=studies)
        gains[:, label], losses[:, label] = counts[:, 0], counts[:, 1]
    score = score_statistic(gains.sum(axis=1), losses.sum(axis=1), images, _MARGIN)
    passes = norm.sf(score) <= LEVEL
    is_spared = ~worse_classes(gains, losses).any(axis=1)
    return float(passes.mean()), float(is_spared.mean()), float((passes & is_spared).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate promotions by evidence.")
    parser.add_argument("--studies", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    rng = np.random.default_rng(flags.seed)
    equal, better = (0.02, 0.02), (0.02 + 0.1 / 9, 0.02)
    cases: list[tuple[str, list[tuple[float, float]]]] = [
        ("equal", [equal] * 10),
        ("equal, twice as many differences", [(0.04, 0.04)] * 10),
        ("1 point better", [(0.025, 0.015)] * 10),
        ("1 point worse", [(0.015, 0.025)] * 10),
        ("2 points worse", [(0.01, 0.03)] * 10),
        ("in one class, 10 % of the images become wrong", [(0.0, 0.1), *[equal] * 9]),
        ("the same, and the other classes are better", [(0.0, 0.1), *[better] * 9]),
        ("the same, and the class also gains 2 % and loses 2 %", [(0.02, 0.12), *[better] * 9]),
    ]
    print("| candidate | test images | score test passes | no class worse | promoted |")
    print("| --- | --- | --- | --- | --- |")
    for name, rates in cases:
        for images in (1_240, 2_700, 10_000):
            results = simulate(images, rates, flags.studies, rng)
            cells = " | ".join(f"{100 * result:.1f} %" for result in results)
            print(f"| {name} | {images:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
