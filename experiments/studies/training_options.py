"""Measures what each option of training gains or loses in test accuracy, and what it costs.

    python experiments/studies/training_options.py --workdir=DIR [--seeds=3] [--options NAME ...]
        [--config=FILE] [--config.KEY=VALUE ...]

The configuration is the recipe. Each option changes a part of it, in a separate run for each
seed. The seed determines the weights, the order of the images and, unless data.split_seed is set,
the splits; so the differences between an option and the recipe are paired. The program prints a
table: the test accuracy, its difference from the recipe in percentage points with a 95 % interval
(Student's t over the seeds), and the seconds of training. The same command continues.

    distilled    the teacher is the run of the recipe with the same seed
    soup         three continuations of this run, a fifth of its epochs each; the seconds are those
                 of the continuations
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from cnn_jax.config import files
from cnn_jax.system import cli
from cnn_jax.system.compilation_cache import keep_compiled
from cnn_jax.system.console import Console
from cnn_jax.training.loop import train_and_evaluate
from cnn_jax.training.soup import make_soup
from experiments.studies.ablation_table import difference_text, percent

RECIPE, DISTILLED, SOUP = "recipe", "distilled", "soup"
_MEMBERS = 3
# The configuration keys in which each option differs from the recipe.
OPTIONS: dict[str, Mapping[str, Any]] = {
    RECIPE: {},
    "ema 0.99": {"train.ema": 0.99},
    "ema 0.999": {"train.ema": 0.999},
    "cosine 3e-3": {"optimizer.learning_rate": 3e-3},
    "one_cycle": {"optimizer.schedule": "one_cycle"},
    "one_cycle 3e-3": {"optimizer.schedule": "one_cycle", "optimizer.learning_rate": 3e-3},
    "adamw": {"optimizer.algorithm": "adamw", "optimizer.weight_decay": 0.05, "optimizer.l2": 0.0},
    "sgd": {
        "optimizer.algorithm": "sgd",
        "optimizer.learning_rate": 0.05,
        "optimizer.final_learning_rate": 5e-3,
    },
    "lion": {
        "optimizer.algorithm": "lion",
        "optimizer.learning_rate": 2e-4,
        "optimizer.final_learning_rate": 2e-5,
    },
    "crops": {"augment.crop_area": 0.5},
    "erasing": {"augment.erasing_probability": 0.25},
    "trivial_augment": {"augment.trivial_augment": True},
    DISTILLED: {},
    SOUP: {},
}


def measure(
    option: str, seed: int, folder: pathlib.Path, config_file: str, overrides: Sequence[str]
) -> dict[str, float]:
    """Trains one option with one seed; returns the test accuracy and the seconds of training."""
    config = files.load(config_file, overrides)
    run = folder / f"{option.replace(' ', '_')}-{seed}"
    recipe = folder / f"{RECIPE}-{seed}"
    console = Console(is_silent=True)
    if option == SOUP:
        epochs = max(1, round(config.train.epochs / 5))
        accuracy = make_soup(recipe, run, _MEMBERS, epochs, console=console)["test"]
        logs = [run / f"continuation-{number}" for number in range(1, _MEMBERS + 1)]
    else:
        changes = {"seed": seed, "report.detail": "none", "report.reference": False}
        changes |= OPTIONS[option]
        if option == DISTILLED:
            changes["distill.bundles"] = str(recipe)
        with config.ignore_type():
            config.update_from_flattened_dict(changes)
        accuracy = train_and_evaluate(config, run, console)["test"]["accuracy"]
        logs = [run]
    lines = [line for log in logs for line in (log / "metrics.jsonl").read_text().splitlines()]
    return {"accuracy": accuracy, "seconds": sum(json.loads(line)["seconds"] for line in lines)}


def make_table(results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """Returns a Markdown table with a row for each option.

    Args:
      results: The result of `measure` by option and seed; the recipe is one of the options.
    """
    lines = [
        "| option | test accuracy | against the recipe | seconds |",
        "| --- | --- | --- | --- |",
    ]
    accuracies = {
        option: {seed: result["accuracy"] for seed, result in by_seed.items()}
        for option, by_seed in results.items()
    }
    for option, by_seed in results.items():
        accuracy = percent(list(accuracies[option].values()))
        base = {} if option == RECIPE else accuracies[RECIPE]
        difference = difference_text(accuracies[option], base)
        seconds = statistics.mean(result["seconds"] for result in by_seed.values())
        lines.append(f"| {option} | {accuracy} | {difference} | {seconds:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=cli.positive, default=3)
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--config", default="default")
    flags, overrides = parser.parse_known_args(argv)
    keep_compiled()
    options = list(dict.fromkeys([RECIPE, *flags.options]))
    results: dict[str, dict[int, dict[str, float]]] = {option: {} for option in options}
    # All options are measured with one seed before the next seed, so that a table that was
    # interrupted compares the same seeds.
    for seed in range(flags.seeds):
        for option in options:
            result = measure(option, seed, flags.workdir, flags.config, overrides)
            results[option][seed] = result
            print(f"{option}, seed {seed}: {result['accuracy']:.2%}", file=sys.stderr, flush=True)
        print(f"\n{seed + 1} seeds\n\n{make_table(results)}", flush=True)


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
