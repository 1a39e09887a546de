import collections
import subprocess
import sys

import numpy as np
import optuna
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import Trial, TrialState, create_trial

from cnn_jax.tune import search
from cnn_jax.tune.search import SeededSampler, SuccessiveHalving

SPACE = {
    "a.rate": FloatDistribution(1e-4, 1.0, log=True),
    "b.size": CategoricalDistribution([8, 16, 32]),
    "c.count": IntDistribution(1, 9),
}


@pytest.mark.parametrize(
    ("value", "others", "expected"),
    [
        (0.1, [], True),
        (0.5, [0.4], True),
        (0.5, [0.6], False),
        (0.5, [0.5], True),
        (0.5, [0.6, 0.4], False),  # One of 3 trials is promoted.
        (0.6, [0.5, 0.4], True),
        (0.5, [0.6, 0.4, 0.3, 0.2], False),  # One of 5 trials is promoted.
        (0.5, [0.6, 0.4, 0.3, 0.2, 0.1], True),  # Two of 6 trials are promoted.
        (0.5, [0.7, 0.6, 0.3, 0.2, 0.1], False),
        (0.5, [0.7, 0.5, 0.3, 0.2, 0.1], True),  # The value equals the second best value.
        (0.5, [0.7, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5], False),
    ],
)
def test_the_best_third_is_promoted(value, others, expected):
    assert search.is_promoted(value, others) is expected


@pytest.mark.parametrize(
    ("max_epochs", "expected"),
    [
        (1, [[]]),
        (2, [[]]),
        (3, [[1], []]),
        (8, [[3], []]),
        (9, [[1, 3], [3], []]),
        (15, [[2, 5], [5], []]),
        (27, [[1, 3, 9], [3, 9], [9], []]),
        (28, [[1, 3, 9], [3, 9], [9], []]),
        (45, [[2, 5, 15], [5, 15], [15], []]),
        (243, [[3**n for n in range(first, 5)] for first in range(6)]),
    ],
)
def test_the_rungs_of_all_brackets(max_epochs, expected):
    """The rungs for R epochs are R / 3, R / 9, ... (Li et al. 2018, algorithm 1)."""
    count = search.num_brackets(max_epochs)
    assert [search.rungs(max_epochs, bracket) for bracket in range(count)] == expected


@pytest.mark.parametrize(
    ("max_epochs", "weights"),
    [
        # The weights are from Li et al. 2018, algorithm 1: ceil((s_max + 1) / (s + 1) * 3**s) for s
        # = s_max, ..., 0.
        (1, [1]),
        (3, [3, 2]),
        (15, [9, 5, 3]),
        (27, [27, 12, 6, 4]),
        (81, [81, 34, 15, 8, 5]),
    ],
)
def test_brackets_get_trials_in_the_proportions_of_hyperband(max_epochs, weights):
    brackets = search.num_brackets(max_epochs)
    for trials in (sum(weights), 1000):
        bracket_counts = collections.Counter(
            search.bracket_number(number, max_epochs, brackets) for number in range(trials)
        )
        expected = np.array(weights) / sum(weights) * trials
        found = np.array([bracket_counts[bracket] for bracket in range(brackets)])
        assert found.sum() == trials
        np.testing.assert_allclose(found, expected, atol=2)


def test_trials_are_spread_evenly_over_brackets():
    """Of any 17 consecutive trials, the three brackets have about 9, 5 and 3 trials."""
    numbers = np.array([search.bracket_number(number, 15, 3) for number in range(300)])
    for first in range(len(numbers) - 17):
        counts = np.bincount(numbers[first : first + 17], minlength=3)
        np.testing.assert_allclose(counts, [9, 5, 3], atol=2)


def test_all_trials_are_in_a_single_bracket():
    assert {search.bracket_number(number, 15, 1) for number in range(50)} == {0}


def make_study(curves=(), direction="maximize", **options):
    """Returns a study with a running trial for each of the given curves."""
    study = optuna.create_study(direction=direction, **options)
    for curve in curves:
        values = dict(enumerate(curve, start=1))
        study.add_trial(create_trial(state=TrialState.RUNNING, intermediate_values=values))
    return study


def is_pruned(study, number, max_epochs, brackets):
    pruner = SuccessiveHalving(max_epochs, brackets)
    return pruner.prune(study, study.get_trials(deepcopy=False)[number])


def expected_pruned(curves, number, max_epochs, brackets, direction):
    """Returns whether a trial is below the top third of all trials at the rung, as in the paper."""
    epoch = len(curves[number])
    mine = search.bracket_number(number, max_epochs, brackets) if brackets else 0
    third = 3 if max_epochs <= 10 else 4
    rungs = [{1, third}, {third}, set()][mine]
    if not brackets or epoch not in rungs:
        return False
    best = max if direction == "maximize" else min
    reached = {
        other: best(curve[:epoch])
        for other, curve in enumerate(curves)
        if len(curve) >= epoch and search.bracket_number(other, max_epochs, brackets) == mine
    }
    ranking = sorted(reached.values(), reverse=direction == "maximize")
    last = ranking[max(1, len(ranking) // 3) - 1]
    return reached[number] < last if direction == "maximize" else reached[number] > last


@settings(max_examples=150, deadline=None)
@given(
    curves=st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=14),
    max_epochs=st.integers(9, 12),
    brackets=st.integers(0, 3),
    direction=st.sampled_from(["maximize", "minimize"]),
)
def test_halving_equals_a_slow_reference(curves, max_epochs, brackets, direction):
    study = make_study(curves, direction)
    decisions = [is_pruned(study, i, max_epochs, brackets) for i in range(len(curves))]
    assert decisions == [
        expected_pruned(curves, i, max_epochs, brackets, direction) for i in range(len(curves))
    ]
    # A second call gives the same answer, because the pruner stores nothing.
    assert decisions == [is_pruned(study, i, max_epochs, brackets) for i in range(len(curves))]
    assert not any(trial.system_attrs or trial.user_attrs for trial in study.trials)
    assert not study._storage.get_study_system_attrs(study._study_id)


def test_a_trial_is_judged_by_its_best_epoch_so_far():
    """Trial 0 is not pruned, because its best epoch counts, and not its last epoch."""
    study = make_study([(0.9, 0.1, 0.1), (0.1, 0.1, 0.8), (0.2, 0.1, 0.1)])
    assert [is_pruned(study, number, 9, 1) for number in range(3)] == [False, True, True]


def test_a_trial_is_compared_at_the_same_epoch():
    """Trial 1 is not pruned: up to the third epoch, it was better than trial 0."""
    study = make_study([(0.2, 0.1, 0.1, 0.9), (0.5, 0.1, 0.1)])
    assert not is_pruned(study, 1, 9, 1)


def test_without_reports_nothing_is_pruned():
    assert not is_pruned(make_study([()]), 0, 9, 1)


def value_of(params):
    """A fake objective function with its minimum at a.rate = 0.01, b.size = 16 and c.count = 6."""
    rate, size, count = (params[key] for key in SPACE)
    return (np.log10(rate) + 2) ** 2 + abs(np.log2(size) - 4) / 4 + (count - 6) ** 2 / 50


def finished(params, distributions=None):
    distributions = distributions or SPACE
    return create_trial(params=params, distributions=distributions, value=value_of(params))


def make_history(count):
    rng = np.random.default_rng(0)
    study = make_study(direction="minimize")
    for _ in range(count):
        params = {
            "a.rate": float(10 ** rng.uniform(-4, 0)),
            "b.size": int(rng.choice([8, 16, 32])),
            "c.count": int(rng.integers(1, 10)),
        }
        study.add_trial(finished(params))
    return study


def next_params(study, seed=0, stored=None):
    """Returns the next trial's parameters; a killed worker has saved the parameters `stored`.

    The study is unchanged afterwards.
    """
    study.sampler = SeededSampler(SPACE, seed)
    stored = stored or {}
    study.add_trial(
        create_trial(
            state=TrialState.RUNNING,
            params=stored,
            distributions={key: SPACE[key] for key in stored},
        )
    )
    trial = Trial(study, study.get_trials()[-1]._trial_id)
    params = {
        "a.rate": trial.suggest_float("a.rate", 1e-4, 1.0, log=True),
        "b.size": trial.suggest_categorical("b.size", [8, 16, 32]),
        "c.count": trial.suggest_int("c.count", 1, 9),
    }
    study.tell(trial, state=TrialState.FAIL)
    return params


@pytest.mark.parametrize("history", [0, 5, 12])
def test_all_workers_draw_the_same_parameters_for_a_trial(history):
    expected = next_params(make_history(history))
    assert next_params(make_history(history)) == expected
    assert next_params(make_history(history), seed=1) != expected


@pytest.mark.parametrize("history", [3, 12])
def test_a_partly_stored_trial_gets_the_same_missing_parameters(history):
    expected = next_params(make_history(history))
    for count in (1, 2, 3):
        stored = dict(list(expected.items())[:count])
        assert next_params(make_history(history), stored=stored) == expected


def test_only_the_first_trial_has_the_first_values():
    """Parameters for which no first value is given are drawn as usual."""
    first = {"b.size": 32, "c.count": 7, "of.another": 1}
    study = make_study(direction="minimize", sampler=SeededSampler(SPACE, 0, first))
    other = make_study(direction="minimize", sampler=SeededSampler(SPACE, 0))
    drawn = [study.ask(SPACE).params for _ in range(5)]
    expected = [other.ask(SPACE).params for _ in range(5)]
    assert drawn == [expected[0] | {"b.size": 32, "c.count": 7}, *expected[1:]]


def test_trials_get_different_parameters():
    """Trials with an equal history get different parameters, because their numbers differ.

    Each trial fails, and failed trials do not change the history.
    """
    study = make_history(4)
    drawn = [next_params(study) for _ in range(40)]
    rates = np.log10([params["a.rate"] for params in drawn])
    assert len(set(rates)) == 40
    counts = collections.Counter(params["c.count"] for params in drawn)
    assert len(counts) == 9
    assert -2.5 < rates.mean() < -1.5
    # Two parameters of the same trial are hardly correlated.
    assert abs(np.corrcoef(rates, [params["c.count"] for params in drawn])[0, 1]) < 0.4


def test_another_process_draws_the_same_parameters():
    code = (
        "import sys; sys.path[:0] = ['tests/tune', 'tests']\n"
        "from test_search import make_history, next_params\n"
        "print([next_params(make_history(count)) for count in (3, 12)])"
    )
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = [next_params(make_history(count)) for count in (3, 12)]
    assert output.splitlines()[-1] == str(expected)


def test_later_trials_use_the_estimator_of_optuna():
    study = make_history(14)
    drawn = next_params(study, seed=7)
    seed = np.random.SeedSequence([7, 14]).generate_state(1)[0]
    other = make_history(14)
    other.sampler = TPESampler(seed=int(seed))
    assert other.ask(SPACE).params == drawn


# A warning for a density that is not a number would fail this test.
@pytest.mark.filterwarnings("error")
def test_a_parameter_with_one_value_does_not_change_others():
    single = {"d.one": FloatDistribution(0.5, 0.5), "e.one": CategoricalDistribution([1])}

    def drawn(space):
        study = make_study(direction="minimize", sampler=SeededSampler(space, seed=0))
        for _ in range(13):
            trial = study.ask(space)
            study.tell(trial, value_of(trial.params))
        return [trial.params for trial in study.trials]

    expected = [params | {"d.one": 0.5, "e.one": 1} for params in drawn(SPACE)]
    assert drawn(SPACE | single) == expected
