"""Compares ways to compute the mean and the variance that BatchNorm uses in inference.

    python experiments/studies/batch_statistics.py --config=configs/folder.py --epochs=10
        [--seeds=3] [--every=1] [--json=FILE] --config.data.source=folder:PATH

In training, BatchNorm normalises with the statistics of each batch, so the statistics for
inference affect no training step. One training per seed is therefore enough for all methods:
after an epoch, the same parameters are evaluated with the statistics of each method, on the
validation and test splits.

- "average M": the running average with momentum M that starts from mean 0 and variance 1.
- "corrected M": the running average with momentum M, with the bias correction of Adam.
- "growing": momentum (1 + t) / (10 + t) at step t, at most 0.99.
- "images N": estimated after the epoch from N batches of training images (all batches of an
  epoch if it has fewer), without augmentation (`cnn_jax.training.step.update_statistics`).
- "augmented N": the same, with augmentation.

For each method it prints means and standard deviations over seeds: the validation accuracy
after the first three epochs and after the last one, and the test accuracy of the epoch with
the best validation accuracy, which is the one that a run keeps.
"""

import argparse
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from cnn_jax.config import files, schema
from cnn_jax.config.resolve import resolve
from cnn_jax.config.schema import Config
from cnn_jax.data import no_track, pipeline
from cnn_jax.data.augment import Augmentation
from cnn_jax.models.network import make_model
from cnn_jax.system.runtime import compiler_options, keep_freed_memory
from cnn_jax.training.loop import open_dataset
from cnn_jax.training.metrics import Metrics
from cnn_jax.training.optimizer import make_optimizer, make_schedule
from cnn_jax.training.step import Statistics, TrainStep, eval_step, update_statistics
from experiments.studies.ablation_table import percent

AVERAGES = ["average 0.99", "average 0.9", "corrected 0.99", "corrected 0.95", "growing"]
# A record holds the number of an epoch, and the validation and test accuracy of each method.
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/folder.py")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="measure every N-th epoch, from 4 on")
    parser.add_argument("--json", type=pathlib.Path, help="write all accuracies to this file, too")
    flags, overrides = parser.parse_known_args()
    keep_freed_memory()
    runs = []
    for seed in range(flags.seeds):
        start = time.perf_counter()
        settings = [f"--config.seed={seed}", f"--config.train.epochs={flags.epochs}"]
        config = files.load(flags.config, [*overrides, *settings])
        schema.validate(config, num_devices=1)
        runs.append(train_and_compare(resolve(config), flags.every))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if flags.json:
            flags.json.write_text(json.dumps(runs, indent=1) + "\n")
    print_table(runs)


def train_and_compare(config: Config, every: int) -> list[Record]:
    """Trains a network; returns the accuracies of all methods after each measured epoch.

    The measured epochs are the first three, every `every`-th epoch, and the last.
    """
    dataset = open_dataset(config, no_track)
    indices = dataset.splits["train"]
    steps = math.ceil(len(indices) / config.train.batch_size)
    model = make_model(config.model.to_dict(), len(dataset.source.class_names), config.precision)
    preprocessing = dataset.loader.preprocessing
    schedule = make_schedule(
        config.optimizer.learning_rate,
        config.optimizer.final_learning_rate,
        total_steps=config.train.epochs * steps,
        warmup_steps=0,
    )
    jit = functools.partial(jax.jit, compiler_options=compiler_options())
    network = {"model": model, "preprocessing": preprocessing}
    train_step = TrainStep(
        optimizer=make_optimizer(schedule, config.optimizer.l2),
        seed=config.seed,
        label_smoothing=config.train.label_smoothing,
        **network,
    )
    step = jit(train_step)
    add_batch = jit(functools.partial(update_statistics, **network))
    evaluate = jit(functools.partial(eval_step, **network))
    augmentation = Augmentation.from_config(config.augment)

    def batches(augmentation: Augmentation, count: int) -> Any:
        return pipeline.training_batches(
            dataset.loader,
            indices,
            batch_size=config.train.batch_size,
            augmentation=augmentation,
            place="host",
            seed=config.seed,
            stop=count,
        )

    def estimate(variables: PyTree, augmentation: Augmentation, count: int) -> PyTree:
        found = Statistics.empty(variables["batch_stats"])
        with batches(augmentation, count) as stream:
            for batch in stream:
                found = add_batch(found, variables, batch)
        return found.batch_stats

    def accuracies(variables: PyTree) -> dict[str, float]:
        found = {}
        for split in ("validation", "test"):
            totals = Metrics.empty(model.num_classes)
            with pipeline.evaluation_batches(
                dataset.loader, dataset.splits[split], config.train.batch_size
            ) as stream:
                for batch in stream:
                    totals = totals.merge(evaluate(variables, batch))
            found[split] = totals.compute()["accuracy"]
        return found

    state = train_step.init_state()
    averages = dict.fromkeys(AVERAGES, state.batch_stats)
    empty = Statistics.empty(state.batch_stats)
    records = []
    with batches(augmentation, config.train.epochs * steps) as stream:
        for number, batch in enumerate(stream, 1):
            # These are the statistics with which the training step normalises this batch.
            batch_values = add_batch(empty, state.variables, batch).batch_stats
            averages = update_averages(averages, batch_values, jnp.float32(number))
            state, _ = step(state, batch)
            epoch, rest = divmod(number, steps)
            if rest or not (epoch <= 3 or epoch % every == 0 or epoch == config.train.epochs):
                continue
            found: dict[str, PyTree] = dict(averages)
            for most in (32, 256):
                count = min(most, steps)
                found[f"images {most}"] = estimate(state.variables, Augmentation(), count)
                found[f"augmented {most}"] = estimate(state.variables, augmentation, count)
            records.append(
                {
                    "epoch": epoch,
                    "accuracies": {
                        method: accuracies({"params": state.params, "batch_stats": batch_stats})
                        for method, batch_stats in found.items()
                    },
                }
            )
    return records


@jax.jit
def update_averages(
    averages: Mapping[str, PyTree], batch_values: PyTree, step: Array
) -> dict[str, PyTree]:
    """Returns the running averages of all methods after batch number `step`, counted from 1."""

    def update(method: str, average: PyTree) -> PyTree:
        kind, _, number = method.partition(" ")
        momentum = float(number or 0.99)
        if kind == "corrected":
            momentum *= (1 - momentum ** (step - 1)) / (1 - momentum**step)
        elif kind == "growing":
            momentum = jnp.minimum(momentum, (1 + step) / (10 + step))
        return jax.tree.map(lambda a, b: momentum * a + (1 - momentum) * b, average, batch_values)

    return {method: update(method, average) for method, average in averages.items()}


def print_table(runs: list[list[Record]]) -> None:
    """Prints a Markdown table with a row for each method; `runs` holds the records of each seed."""
    print("| statistics | epoch 1 | epoch 2 | epoch 3 | last epoch | test, best epoch |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method in runs[0][0]["accuracies"]:

        def validation(record: Record, method: str = method) -> float:
            return record["accuracies"][method]["validation"]

        columns = [[validation(run[at]) for run in runs] for at in (0, 1, 2, -1)]
        columns.append([max(run, key=validation)["accuracies"][method]["test"] for run in runs])
        print(f"| {method} | {' | '.join(map(percent, columns))} |")


if __name__ == "__main__":
    main()
