"""Tests of the study of training options, whose runs are replaced with known accuracies."""

import json

import pytest

from cnn_jax.config import schema
from configs import default
from experiments.studies import training_options


def test_the_table_has_paired_differences_and_seconds():
    """The differences are 1 and 3 points: mean 2, and 12.706 * sqrt(2) / sqrt(2) around it."""
    results = {
        "recipe": {
            0: {"accuracy": 0.90, "seconds": 10.0},
            1: {"accuracy": 0.80, "seconds": 14.0},
        },
        "ema 0.99": {
            0: {"accuracy": 0.91, "seconds": 20.0},
            1: {"accuracy": 0.83, "seconds": 21.0},
        },
    }
    assert training_options.make_table(results).splitlines()[2:] == [
        "| recipe | 85.00 ± 7.07 % |  | 12 |",
        "| ema 0.99 | 87.00 ± 5.66 % | +2.00 (-10.71 to +14.71) | 20 |",
    ]


@pytest.mark.parametrize("option", training_options.OPTIONS)
def test_every_option_is_a_valid_configuration(option):
    config = default.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(dict(training_options.OPTIONS[option]))
    schema.validate(config, num_devices=1)


def test_teachers_and_continuations_have_the_seed_of_their_recipe(tmp_path, monkeypatch):
    def train(config, run, _):
        assert (config.seed, config.train.epochs) == (2, 10)
        _write(run, 3.0)
        return {"test": {"accuracy": 0.7 if config.distill.bundles else 0.5}}

    def _write(run, seconds):
        run.mkdir()
        (run / "metrics.jsonl").write_text(json.dumps({"seconds": seconds}) + "\n")

    def make_soup(run, workdir, members, epochs, console):
        assert (run, members, epochs) == (tmp_path / "recipe-2", 3, 2)
        workdir.mkdir()
        for number in (1, 2, 3):
            _write(workdir / f"continuation-{number}", number)
        return {"test": 0.8}

    monkeypatch.setattr(training_options, "train_and_evaluate", train)
    monkeypatch.setattr(training_options, "make_soup", make_soup)
    found = [
        training_options.measure(option, 2, tmp_path, "default", ["--config.train.epochs=10"])
        for option in ("recipe", "distilled", "soup")
    ]
    assert [result["accuracy"] for result in found] == [0.5, 0.7, 0.8]
    assert [result["seconds"] for result in found] == [3, 3, 6]
