"""Compares three methods on few images of each class: from scratch, probe and fine-tuning.

    python experiments/studies/few_images.py --folder=PATH --pretrained=FILE --output=DIR
        [--sizes 10 30 100 300] [--seeds=3] [--image_size=64] [--methods scratch probe finetune]

--folder has one sub-folder for each class. For each seed and each size n, n random images of each
class are the training split, and n / 4 other images, at least 5, are the validation split. The
test split has 100 images of each class, the same for all sizes of a seed. The methods are:

- "scratch": the configuration `eurosat`, for at least 1,500 steps;
- "probe": the configuration `probe`;
- "finetune": the configuration `finetune`, for at least 400 steps.

--pretrained contains weights of the network tf_efficientnet_lite0. The images are not cropped,
because satellite images have no border that may be cut off. The program prints a Markdown table
with the test accuracy (mean and standard deviation over seeds), and writes results.json and
few_images.png to DIR. A result that is in results.json already is not computed again.
"""

import argparse
import csv
import json
import math
import pathlib
import sys
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from cnn_jax.config import files
from cnn_jax.config.schema import Config
from cnn_jax.system.console import Console
from cnn_jax.system.runtime import keep_freed_memory
from cnn_jax.training.loop import train_and_evaluate
from experiments.studies.ablation_table import mean_and_deviation, percent

METHODS = ("scratch", "probe", "finetune")
_TEST_IMAGES = 100
# The minimum number of training steps of each method; the probe takes no training steps.
_STEPS = {"scratch": 1_500, "finetune": 400}


def write_table(folder: pathlib.Path, size: int, seed: int, path: pathlib.Path) -> int:
    """Writes a table of images with their classes and splits.

    Args:
      folder: The folder with one sub-folder for each class.
      size: The number of training images of each class.
      seed: The seed of the random choice.
      path: The CSV file to write.

    Returns:
      The number of training images.
    """
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    validation = max(5, size // 4)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for number, entry in enumerate(classes):
            images = sorted(entry.iterdir())
            order = np.random.default_rng([seed, number]).permutation(len(images))
            test, others = order[:_TEST_IMAGES], order[_TEST_IMAGES:]
            parts = {
                "test": test,
                "train": others[:size],
                "validation": others[size : size + validation],
            }
            for split, positions in parts.items():
                for position in positions:
                    writer.writerow([str(images[position].resolve()), entry.name, split])
    return size * len(classes)


def make_config(method: str, flags: argparse.Namespace, table: pathlib.Path, seed: int) -> Config:
    """Returns the configuration of a method for a table of images."""
    config = files.load("eurosat" if method == "scratch" else method)
    config.seed = seed
    config.data.source = f"csv:{table}"
    config.data.image_size = (flags.image_size, flags.image_size)
    config.data.allow_outside = True
    config.report.detail = "none"
    if method != "scratch":
        config.data.preprocessing = "mean_std"
        config.model.pretrained = str(flags.pretrained)
    return config


def measure(flags: argparse.Namespace, method: str, size: int, seed: int) -> float:
    """Trains with a method; returns the test accuracy."""
    folder = flags.output / f"{method}-{size}-{seed}"
    table = flags.output / f"{size}-{seed}.csv"
    train_images = write_table(flags.folder, size, seed, table)
    config = make_config(method, flags, table, seed)
    if method in _STEPS:
        steps_per_epoch = math.ceil(train_images / config.train.batch_size)
        config.train.epochs = max(config.train.epochs, math.ceil(_STEPS[method] / steps_per_epoch))
        config.train.patience = config.train.epochs
    report = train_and_evaluate(config, folder, Console(is_silent=True))
    return report["test"]["accuracy"]


def accuracies(results: dict[str, float], method: str, size: int) -> list[float]:
    """Returns the test accuracies of a method and a size, one for each seed."""
    return [value for key, value in results.items() if key.startswith(f"{method}-{size}-")]


def draw(results: dict[str, float], flags: argparse.Namespace) -> None:
    """Draws the accuracy against the number of images of each class."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    names = {"scratch": "random weights", "probe": "probe", "finetune": "fine-tuned"}
    for method in flags.methods:
        rows = [mean_and_deviation(accuracies(results, method, size)) for size in flags.sizes]
        means, deviations = 100 * np.array(rows).T
        axes.errorbar(flags.sizes, means, deviations, marker="o", capsize=3, label=names[method])
    axes.set_xscale("log")
    axes.set_xticks(flags.sizes, [str(size) for size in flags.sizes])
    axes.minorticks_off()
    axes.set_xlabel("training images of each class")
    axes.set_ylabel("test accuracy in %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(flags.output / "few_images.png", dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Runs the comparison, and writes its table and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--pretrained", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    flags = parser.parse_args()
    flags.output = flags.output.resolve()
    flags.output.mkdir(parents=True, exist_ok=True)
    flags.folder, flags.pretrained = flags.folder.resolve(), flags.pretrained.resolve()
    keep_freed_memory()
    path = flags.output / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(flags.seeds):
        for size in flags.sizes:
            for method in flags.methods:
                key = f"{method}-{size}-{seed}"
                if key not in results:
                    results[key] = measure(flags, method, size, seed)
                    path.write_text(json.dumps(results, indent=1))
                    print(f"{key}: {results[key]:.2%}", flush=True)
    print(f"| images of each class | {' | '.join(flags.methods)} |")
    print(f"| --- | {' | '.join('---' for _ in flags.methods)} |")
    for size in flags.sizes:
        values = [accuracies(results, method, size) for method in flags.methods]
        cells = [f"{percent(found, digits=1)} ({len(found)})" for found in values]
        print(f"| {size} | {' | '.join(cells)} |")
    draw(results, flags)


if __name__ == "__main__":
    main()
