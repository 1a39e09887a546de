"""What a study tries next, and what it gives up: functions of (seed, number, what is known).

A worker can be killed between any two writes to the study's storage. So nothing here has
a state of its own: whoever goes on with a trial draws the same parameters for it and comes
to the same decisions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from cnn_jax.tune.space import Space

# One trial in so many goes on beyond a rung, to so many times its epochs (Li et al. 2018).
REDUCTION = 3
# The largest of the numbers whose multiples, modulo 1, lie the most evenly.
_GOLDEN = (math.sqrt(5) - 1) / 2


class SeededSampler(BaseSampler):
    """The tree-structured Parzen estimator (Bergstra et al. 2011), seeded for each trial.

    Optuna's own carries a random state from trial to trial, which a worker that is
    started again would not have.
    """

    def __init__(self, space: Space, seed: int, first: Mapping[str, Any] | None = None):
        """A sampler of a space, whose first trial gets the values of `first`, as far as it has any.

        They must be in the space.
        """
        # A parameter of one value is never asked for, and would spoil the estimate of the others.
        self._space = {key: values for key, values in space.items() if not values.single()}
        self._seed = seed
        self._first = {key: value for key, value in (first or {}).items() if key in self._space}

    def _tpe(self, trial: FrozenTrial, name: str = "") -> TPESampler:
        entropy = [self._seed, trial.number, *name.encode()]
        return TPESampler(seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All of the space: its parameters are drawn together."""
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values for a trial, by those before it; none while there are few."""
        if trial.number == 0:
            return self._first
        return self._tpe(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A value at random, for the first trials."""
        sampler = self._tpe(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


class SuccessiveHalving(BasePruner):
    """Asynchronous successive halving, in one bracket or in those of Hyperband.

    After Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", section 3.
    Their algorithm pauses a trial at a rung and may take it up again later. Here it is judged
    there once, against those that have been there before it, as Optuna and Ray Tune do: so
    the first to come always goes on.

    Optuna's own notes in the storage which rungs a trial has passed before it has decided,
    and decides otherwise if it is asked again. This one looks at the reported values alone.
    """

    def __init__(self, max_epochs: int, brackets: int):
        """Trials of at most so many epochs.

        Args:
          max_epochs: Of a trial that is not pruned, 1 or more.
          brackets: Into how many the trials are divided, from 0 for no pruning to
            `num_brackets(max_epochs)` for Hyperband.
        """
        self._max_epochs = max_epochs
        self._brackets = brackets

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether a trial that has just reported an epoch should end there."""
        epoch = trial.last_step
        if not self._brackets or epoch is None:
            return False
        bracket = bracket_of(trial.number, self._max_epochs, self._brackets)
        if epoch not in rungs(self._max_epochs, bracket):
            return False
        others = [
            _merit(other, epoch, study.direction)
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number
            and epoch in other.intermediate_values
            and bracket_of(other.number, self._max_epochs, self._brackets) == bracket
        ]
        return not goes_on(_merit(trial, epoch, study.direction), others)


def _merit(trial: FrozenTrial, epoch: int, direction: StudyDirection) -> float:
    """How good a trial was by the end of an epoch that it has; larger is better."""
    until = {step: value for step, value in trial.intermediate_values.items() if step <= epoch}
    best = best_value(until, direction)
    assert best is not None
    return merit(best, direction)


def merit(value: float, direction: StudyDirection) -> float:
    """A value of the study, or its negative: larger is better."""
    return value if direction == StudyDirection.MAXIMIZE else -value


def best_value(curve: Mapping[int, float], direction: StudyDirection) -> float | None:
    """The best of a trial's epochs, whose network its run keeps; None if there is none."""
    choose = max if direction == StudyDirection.MAXIMIZE else min
    return choose(curve.values(), default=None)


def goes_on(value: float, others: Sequence[float]) -> bool:
    """Whether a value is among the best third of all at its rung; of one or two, the best.

    Larger is better. A value that equals the last of the best is among them.
    """
    promoted = max(1, (len(others) + 1) // REDUCTION)
    return sum(other > value for other in others) < promoted


def num_brackets(max_epochs: int) -> int:
    """The brackets of Hyperband, one for each number of rungs from the most to none.

    The most are as many as leave a whole epoch before the first.
    """
    return math.floor(math.log(max_epochs, REDUCTION) + 1e-9) + 1


def rungs(max_epochs: int, bracket: int) -> list[int]:
    """After which epochs the trials of a bracket are judged.

    After ..., a ninth and a third of all epochs, rounded; in each bracket once less than in
    the one before, and in the last never.
    """
    count = num_brackets(max_epochs) - 1 - bracket
    return [round(max_epochs / REDUCTION**rung) for rung in range(count, 0, -1)]


def bracket_of(number: int, max_epochs: int, brackets: int) -> int:
    """The bracket of a trial by its number.

    The brackets get trials in the proportions of Hyperband (Li et al. 2018, algorithm 1),
    by which each costs about as much as the others, and spread evenly.
    """
    last = num_brackets(max_epochs) - 1
    weights = [
        math.ceil((last + 1) / (last - bracket + 1) * REDUCTION ** (last - bracket))
        for bracket in range(brackets)
    ]
    shares = np.cumsum(weights) / sum(weights)
    return int(np.searchsorted(shares, (number * _GOLDEN) % 1, side="right"))
