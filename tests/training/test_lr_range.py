import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from test_distillation import _config

from cnn_jax.system.console import Console
from cnn_jax.system.errors import TrainingError
from cnn_jax.training import lr_range

RATES = np.geomspace(1e-5, 1.0, 101)


def _losses(steepest, divergence):
    """A loss that falls fastest at one rate, and rises from another on."""
    log = np.log10(RATES)
    fall = 2.3 - 1.5 / (1 + np.exp(-(log - np.log10(steepest)) / 0.25))
    return fall + 4 * np.maximum(log - np.log10(divergence), 0)


def test_the_suggestion_is_a_tenth_of_the_rate_of_divergence():
    """The loss is 2.3 again at 0.1 * 10 ** (1.5 / 4), which is 0.237."""
    result = lr_range.analyse(RATES, _losses(1e-3, 0.1))
    assert result.steepest == pytest.approx(1e-3, rel=0.13)  # A step is a factor of 1.12.
    assert result.divergence == pytest.approx(0.237, rel=0.2)
    assert result.suggestion == result.divergence / 10
    assert result.describe() == (
        f"--config.optimizer.learning_rate={result.suggestion:.2g} (the loss falls fastest at "
        f"{result.steepest:.2g}; training diverges at {result.divergence:.2g})"
    )


def test_without_divergence_the_suggestion_is_the_steepest_rate():
    result = lr_range.analyse(RATES, _losses(1e-3, 1.0))
    assert result.divergence is None
    assert result.suggestion == result.steepest == pytest.approx(1e-3, rel=0.13)
    assert result.describe().endswith("training does not diverge up to 1)")


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_a_divergence(seed):
    noise = np.random.default_rng(seed).normal(0, 0.1, len(RATES))
    result = lr_range.analyse(RATES, _losses(1e-3, 1.0) + noise)
    assert result.divergence is None
    with pytest.raises(TrainingError, match="the loss does not fall between learning rates of"):
        lr_range.analyse(RATES, 2.3 + noise)


def test_the_suggestion_is_not_below_the_first_rate():
    result = lr_range.analyse(RATES[40:], _losses(1e-3, 3e-3)[40:])
    assert result.divergence < 10 * RATES[40]
    assert result.suggestion == RATES[40]


def test_a_loss_that_is_not_finite_is_a_divergence():
    result = lr_range.analyse(RATES[:60], _losses(1e-3, 1.0)[:60], float(RATES[60]))
    assert result.divergence == RATES[60]


def test_losses_are_averaged_over_the_steps_around():
    losses = 20 - np.arange(20.0)
    losses[10] -= 3
    smoothed = lr_range.analyse(np.geomspace(1e-5, 1, 20), losses).smoothed
    assert smoothed[[0, 5, 9, 10, 11]].tolist() == [19.5, 15.0, 10.0, 9.0, 8.0]


def test_a_range_test_of_a_network(image_folder, tmp_path):
    """The rates grow exponentially; a network diverges at a rate of 100, and learns at 1e-2."""
    config = _config(image_folder, **{"model.batch_norm": False})
    result = lr_range.measure(config, 40, 1e-4, 100.0, Console(is_silent=True))
    count = len(result.rates)
    assert count < 40
    np.testing.assert_allclose(result.rates, np.geomspace(1e-4, 100, 40)[:count], rtol=1e-5)
    assert 0.1 < result.divergence < 100
    assert result.suggestion == result.divergence / 10
    lr_range.draw(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 2000
    with pytest.raises(TrainingError, match="diverges at once, at a learning rate of 10000; use"):
        lr_range.measure(config, 40, 1e4, 1e6, Console(is_silent=True))


def test_a_range_test_starts_after_the_probe(image_folder, monkeypatch):
    found, expected = [], lr_range.analyse(RATES, _losses(1e-3, 0.1))
    monkeypatch.setattr(lr_range, "analyse", lambda _, losses, __: found.append(losses) or expected)
    for probe in (False, True):
        config = _config(image_folder, **{"train.probe": probe, "model.dropout": 0.0})
        lr_range.measure(config, 20, 1e-6, 1e-5, Console(is_silent=True))
    assert found[1][0] < found[0][0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--low=1", "--high=0.1"), "error: --high: must be above --low=1, got 0.1"),
        (("--steps=5",), "error: --steps: must be 20 or more, got 5"),
        (("--output=nowhere/x.png",), "error: --output: must be a .png file in an existing folder"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    command = (sys.executable, "-m", "cnn_jax", "lr_range", *flags)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
