"""The sampler and the pruner of a study; both are stateless.

A worker can be killed between any two writes to the study's storage. Therefore nothing in
this module keeps a state: a worker that continues a trial draws the same parameters and
makes the same decisions.
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

# At a rung, trials are compared after the same number of epochs, and the best of every REDUCTION
# trials continues. The next rung is after REDUCTION times as many epochs (Li et al. 2018).
REDUCTION = 3
# Multiples of the golden ratio, modulo 1, are spread more evenly than multiples of other numbers.
_GOLDEN = (math.sqrt(5) - 1) / 2


class SeededSampler(BaseSampler):
    """The tree-structured Parzen estimator (Bergstra et al. 2011), with a new seed for each trial.

    The sampler of Optuna keeps a random state between trials, and a restarted worker would
    lose this state.
    """

    def __init__(self, space: Space, seed: int, first: Mapping[str, Any] | None = None):
        """Creates a sampler.

        Args:
          space: The distribution of each parameter.
          seed: The seed; each trial also uses its number.
          first: Values of the first trial, which must be in the space. A parameter without
            a value is drawn at random.
        """
        # Parameters with a single value are left out: Optuna never samples such a parameter, and
        # the parameter would distort the estimate of the other parameters.
        self._space = {key: values for key, values in space.items() if not values.single()}
        self._seed = seed
        self._first = {key: value for key, value in (first or {}).items() if key in self._space}

    def _tpe(self, trial: FrozenTrial, name: str = "") -> TPESampler:
        entropy = [self._seed, trial.number, *name.encode()]
        return TPESampler(seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Returns the whole space, because all parameters are drawn jointly."""
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draws a trial's values with Optuna's TPE; returns {} until enough trials have finished.

        The first trial has the values `first`.
        """
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
        """Draws a random value of a parameter; Optuna calls this method for the first trials."""
        sampler = self._tpe(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


class SuccessiveHalving(BasePruner):
    """Asynchronous successive halving, in one bracket or in the brackets of Hyperband.

    See Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", section 3.
    The algorithm of the paper pauses a trial at a rung and may resume the trial later. This
    class, like Optuna and Ray Tune, judges a trial once at each rung, against the trials that
    reached the rung earlier; the first trial at a rung always continues.

    The pruner of Optuna writes the passed rungs to the storage before the decision, and may
    decide differently at a second call. This class only reads the reported values.
    """

    def __init__(self, max_epochs: int, brackets: int):
        """Creates a pruner.

        Args:
          max_epochs: The number of epochs of a trial that is not pruned, 1 or more.
          brackets: The number of brackets, from 0 (no pruning) to
            `num_brackets(max_epochs)` (Hyperband).
        """
        self._max_epochs = max_epochs
        self._brackets = brackets

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Returns whether a trial should end after the epoch that it has just reported."""
        epoch = trial.last_step
        if not self._brackets or epoch is None:
            return False
        bracket = bracket_number(trial.number, self._max_epochs, self._brackets)
        if epoch not in rungs(self._max_epochs, bracket):
            return False
        others = [
            _merit(other, epoch, study.direction)
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number
            and epoch in other.intermediate_values
            and bracket_number(other.number, self._max_epochs, self._brackets) == bracket
        ]
        return not is_promoted(_merit(trial, epoch, study.direction), others)


def _merit(trial: FrozenTrial, epoch: int, direction: StudyDirection) -> float:
    """Returns the merit of a trial's best value up to an epoch; a larger merit is better."""
    until = {step: value for step, value in trial.intermediate_values.items() if step <= epoch}
    best = best_value(until, direction)
    assert best is not None
    return merit(best, direction)


def merit(value: float, direction: StudyDirection) -> float:
    """Returns a value, negated if the study minimizes, so that a larger result is better."""
    return value if direction == StudyDirection.MAXIMIZE else -value


def best_value(curve: Mapping[int, float], direction: StudyDirection) -> float | None:
    """Returns the best value of a trial over its epochs; None if there are no epochs."""
    choose = max if direction == StudyDirection.MAXIMIZE else min
    return choose(curve.values(), default=None)


def is_promoted(value: float, others: Sequence[float]) -> bool:
    """Returns whether a trial is in the best third at a rung, and therefore continues.

    If there are one or two values, only the trial with the best value continues. A trial whose
    value equals the lowest promoted value also continues.

    Args:
      value: The result of `merit` for the trial; larger is better.
      others: The results of `merit` for the trials that reached the rung earlier.
    """
    promoted = max(1, (len(others) + 1) // REDUCTION)
    return sum(other > value for other in others) < promoted


def num_brackets(max_epochs: int) -> int:
    """Returns the number of Hyperband's brackets: one bracket for each possible number of rungs.

    The first bracket has the most rungs; its first rung is after at least one epoch.

    Args:
      max_epochs: The number of epochs of a trial that is not pruned, 1 or more.
    """
    return math.floor(math.log(max_epochs, REDUCTION) + 1e-9) + 1


def rungs(max_epochs: int, bracket: int) -> list[int]:
    """Returns the rungs of a bracket: the epochs after which trials of the bracket may be pruned.

    The epochs are ..., 1/9 and 1/3 of all epochs, rounded. Each bracket has one rung fewer
    than the bracket before it, and the last bracket has no rung.

    Args:
      max_epochs: See `num_brackets`.
      bracket: The number of the bracket, from 0.
    """
    count = num_brackets(max_epochs) - 1 - bracket
    return [round(max_epochs / REDUCTION**rung) for rung in range(count, 0, -1)]


def bracket_number(number: int, max_epochs: int, brackets: int) -> int:
    """Returns the bracket of the trial with a given number.

    The brackets have the proportions of Hyperband (Li et al. 2018, algorithm 1), so that all
    brackets cost about the same. Trials with consecutive numbers are spread over the brackets.

    Args:
      number: The number of the trial, from 0.
      max_epochs: See `num_brackets`.
      brackets: The number of brackets that the study uses, 1 or more.
    """
    last = num_brackets(max_epochs) - 1
    weights = [
        math.ceil((last + 1) / (last - bracket + 1) * REDUCTION ** (last - bracket))
        for bracket in range(brackets)
    ]
    ends = np.cumsum(weights) / sum(weights)
    return int(np.searchsorted(ends, (number * _GOLDEN) % 1, side="right"))
