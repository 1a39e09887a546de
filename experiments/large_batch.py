"""Which larger batch is as accurate as the specification's 32: recipes over seeds, in a table.

    python experiments/large_batch.py --workdir=DIR [--seeds=3] [ARGUMENT of cnn_jax.main...]

such as --config=configs/eurosat.py --config.data.source=folder:PATH --config.train.epochs=12.
Every run is one of the training command in a folder of its own below --workdir; started
again, finished ones are kept and the one that was cut off goes on. Seeds come before
recipes, so that an interrupted table is fair. Choose by the validation accuracy: the
test's is there to be reported. A recipe counts as equally accurate if its mean over seeds
is not below the first one's by more than that one's standard deviation.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

# Batch size, peak learning rate, epochs of warm-up. Adam's step does not grow with the
# gradient, so besides the linear rule (Goyal et al. 2017) the square-root rule (Krizhevsky
# 2014; Malladi et al. 2022 for adaptive optimizers) and the rate as it is are tried.
RECIPES = (
    (32, 1e-3, 0.0),
    (256, 1e-3, 1.0),
    (256, 2.8e-3, 1.0),
    (256, 8e-3, 1.0),
    (512, 4e-3, 1.0),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    flags, arguments = parser.parse_known_args()
    figures: dict[tuple[int, float, float], list[dict[str, float]]] = {}
    for seed in range(flags.seeds):
        for recipe in RECIPES:
            figures.setdefault(recipe, []).append(run(flags.workdir, recipe, seed, arguments))
    print(f"\n{'batch':>5}  {'rate':>6}  {'warm-up':>7}", end="")
    print(f"  {'validation %':>14}  {'test %':>14}  s/epoch")
    base = figures[RECIPES[0]]
    for recipe, runs in figures.items():
        batch_size, rate, warmup = recipe
        print(
            f"{batch_size:>5}  {rate:>6.4f}  {warmup:>7.1f}"
            f"  {_mean_and_deviation([run['validation'] for run in runs]):>14}"
            f"  {_mean_and_deviation([run['test'] for run in runs]):>14}"
            f"  {statistics.median(run['seconds'] for run in runs):>7.1f}"
            f"  {'as accurate' if _is_as_accurate(runs, base) else 'less accurate'}"
        )


def run(
    workdir: pathlib.Path,
    recipe: tuple[int, float, float],
    seed: int,
    arguments: list[str],
) -> dict[str, float]:
    """Trains, if it is not done; returns accuracies in percent, and seconds an epoch."""
    batch_size, rate, warmup = recipe
    folder = workdir / f"batch{batch_size}_rate{rate:g}_warmup{warmup:g}_seed{seed}"
    print(f"{folder.name} ...", flush=True)
    # A finished run says that it is done; one with other arguments is refused.
    subprocess.run(
        [
            *(sys.executable, "-m", "cnn_jax.main", f"--workdir={folder}", *arguments),
            f"--config.seed={seed}",
            f"--config.train.batch_size={batch_size}",
            f"--config.optimizer.learning_rate={rate}",
            f"--config.optimizer.warmup_epochs={warmup}",
            "--config.report.detail=none",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = json.loads((folder / "report" / "metrics.json").read_text())
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "validation": 100 * found["validation"]["accuracy"],
        "test": 100 * found["test"]["accuracy"],
        "seconds": statistics.median(epoch["seconds"] for epoch in epochs),
    }


def _mean_and_deviation(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if values[1:] else 0:.2f}"


def _is_as_accurate(runs: list[dict[str, float]], base: list[dict[str, float]]) -> bool:
    accuracies, of_base = ([run["validation"] for run in some] for some in (runs, base))
    deviation = statistics.stdev(of_base) if of_base[1:] else 0.0
    return statistics.mean(accuracies) >= statistics.mean(of_base) - deviation


if __name__ == "__main__":
    main()
