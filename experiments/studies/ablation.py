"""Ablation study: trains variants of a configuration over several seeds, and compares accuracies.

    python experiments/studies/ablation.py --grid=ladder --workdir=DIR [--seeds=3] [--folds=5]
        [--jobs=2] [--together] [--variants=NAME,...] [--expect=FILE] [ARGUMENT of cnn_jax.main...]

The arguments are, for example, --config=configs/eurosat.py --config.data.source=folder:PATH
--config.train.epochs=45. This configuration is the recipe, and each variant changes a part of
the recipe. The seed determines the weights, the order of the images and, unless
--config.data.split_seed is given, the assignment of the images to splits. All variants use the
same seeds, so that the differences between variants are paired.

--folds=N is a cross-validation, for small data sets. Each variant and seed is trained N times, and
each image is in the test split of exactly one of these runs. The table then also has the accuracy
of the pooled test predictions, with the 95 % interval for the number of all images.

Every run is a training in the folder DIR/VARIANT-SEED, or DIR/VARIANT-SEED-FOLDofN. Grids share
their variants, so no run in DIR is repeated. A new start keeps finished runs and resumes
interrupted ones. All variants are trained with the first seed before the next seed, so an
interrupted table is fair.
--jobs=N trains N runs at the same time, each on an equal part of the cores; this is faster,
because a small network cannot use several cores well.
--together is for a GPU: all seeds of a variant are trained in one program (see --members in
docs/runs.md), and all seeds have the same splits. A run is then in the folder
DIR/VARIANT/seed-SEED, or DIR/VARIANT-FOLDofN/seed-SEED.

The results in DIR are, for each grid, the table GRID.md, which is also printed, and the plot
GRID.png; and results.json with the metrics, versions, commit and data fingerprint of all runs
in DIR. A cross-validation also writes cross_validation.json, with the pooled metrics, and the
pooled predictions VARIANT-SEED-N.csv. --expect=FILE compares the results with an earlier
results.json: a run with the same versions, processor and number of cores has exactly the same
metrics.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import io
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from cnn_jax.config import files, schema  # noqa: E402
from cnn_jax.config.schema import Config  # noqa: E402
from cnn_jax.data.augment import Augmentation  # noqa: E402
from cnn_jax.export.certificate import describe_machine  # noqa: E402
from cnn_jax.system import cli  # noqa: E402
from cnn_jax.system.atomic import write_text  # noqa: E402
from cnn_jax.system.errors import ConfigError, UserError  # noqa: E402
from cnn_jax.training.metrics import (  # noqa: E402
    bootstrap_intervals,
    summarize,
    wilson_interval,
)
from cnn_jax.training.run_directory import INDIFFERENT_KEYS  # noqa: E402
from experiments.benchmarks.common import child_environment  # noqa: E402
from experiments.studies.ablation_table import METRICS, Grid, draw, make_table  # noqa: E402

# With -P and PYTHONPATH, the command trains with this repository's `cnn_jax`, even if another
# version is installed.
TRAIN = (sys.executable, "-P", "-m", "cnn_jax.main")
# The name of the results file in the folder of a finished run.
_RECORD = "ablation.json"
# The flag --expect compares these keys of each result.
_COMPARED = ("test", "validation", "epochs", "fingerprint")
# If results differ, the program also compares these keys, because their values may be the cause.
_CIRCUMSTANCES = ("versions", "processor", "cores", "commit")
# The exit codes of a training run that was interrupted and saved, and of an invalid command line.
_START_AGAIN, _USAGE = cli.START_AGAIN, 2

_NO_MIXING = {"augment.mixup_probability": 0, "augment.cutmix_probability": 0}
_NO_AUGMENTATION = {
    **{f"augment.{name}": value for name, value in dataclasses.asdict(Augmentation()).items()},
    **_NO_MIXING,
}
_CONSTANT_RATE = {"optimizer.learning_rate": 1e-3, "optimizer.final_learning_rate": 1e-3}
_LARGE = {"optimizer.warmup_epochs": 1.0}

# For each variant, the configuration keys in which the variant differs from the recipe.
VARIANTS: dict[str, Mapping[str, Any]] = {
    "recipe": {},
    # The grid (set of variants) "ladder" consists of plain, batch_norm, dropout and recipe. Each
    # variant adds a part to the previous variant.
    "plain": {
        **_NO_AUGMENTATION,
        **_CONSTANT_RATE,
        "model.batch_norm": False,
        "model.dropout": 0,
    },
    "batch_norm": {
        **_NO_AUGMENTATION,
        **_CONSTANT_RATE,
        "model.batch_norm": True,
        "model.dropout": 0,
    },
    "dropout": {
        **_NO_AUGMENTATION,
        **_CONSTANT_RATE,
        "model.batch_norm": True,
        "model.dropout": 0.5,
    },
    "no_batch_norm": {"model.batch_norm": False},
    "rate_1e-3": _CONSTANT_RATE,
    "rate_1e-4": {"optimizer.learning_rate": 1e-4, "optimizer.final_learning_rate": 1e-4},
    **{f"batch_{size}": {"train.batch_size": size} for size in (16, 64, 128, 256)},
    **{f"dropout_{rate}": {"model.dropout": rate} for rate in (0, 0.3, 0.7)},
    "no_augmentation": _NO_AUGMENTATION,
    "mixup": {**_NO_MIXING, "augment.mixup_probability": 1},
    "cutmix": {**_NO_MIXING, "augment.cutmix_probability": 1},
    "mixup_cutmix": {"augment.mixup_probability": 0.5, "augment.cutmix_probability": 0.5},
    "no_smoothing": {"train.label_smoothing": 0},
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},
    # The linear rule for large batches assumes that a step grows with the gradient, but a step of
    # Adam does not grow with the gradient. So three rules are compared: the linear rule (Goyal et
    # al. 2017), the square-root rule (Krizhevsky 2014; Malladi et al. 2022 for adaptive
    # optimizers), and the unchanged learning rate.
    "batch_256_same": {"train.batch_size": 256, **_LARGE},
    "batch_256_root": {"train.batch_size": 256, "optimizer.learning_rate": 2.8e-3, **_LARGE},
    "batch_256_linear": {"train.batch_size": 256, "optimizer.learning_rate": 8e-3, **_LARGE},
    "batch_512_root": {"train.batch_size": 512, "optimizer.learning_rate": 4e-3, **_LARGE},
}


GRIDS = {
    "ladder": Grid(
        {
            "plain": "plain CNN",
            "batch_norm": "with BatchNorm",
            "dropout": "with dropout 0.5",
            "recipe": "with augmentation and schedule (final)",
        },
        base="",
        published={"plain": 87.2, "batch_norm": 89.1, "dropout": 90.3, "recipe": 92.1},
    ),
    "left_out": Grid(
        {
            "recipe": "the recipe",
            "no_batch_norm": "without BatchNorm",
            "dropout_0": "without dropout",
            "no_augmentation": "without augmentation",
            "rate_1e-3": "without a schedule (1e-3 throughout)",
            "no_smoothing": "without label smoothing",
        }
    ),
    "learning_rate": Grid(
        {
            "recipe": "from {optimizer.learning_rate} to {optimizer.final_learning_rate}, cosine",
            "rate_1e-3": "1e-3, constant",
            "rate_1e-4": "1e-4, constant",
        }
    ),
    "batch_size": Grid(
        {
            "batch_16": "16",
            "recipe": "{train.batch_size}",
            "batch_64": "64",
            "batch_128": "128",
            "batch_256": "256",
        }
    ),
    "dropout": Grid(
        {"dropout_0": "0", "dropout_0.3": "0.3", "recipe": "{model.dropout}", "dropout_0.7": "0.7"}
    ),
    "augmentation": Grid(
        {
            "no_augmentation": "off",
            "recipe": "as the recipe has it",
            "mixup": "and MixUp",
            "cutmix": "and CutMix",
            "mixup_cutmix": "and MixUp or CutMix",
        }
    ),
    "label_smoothing": Grid({"no_smoothing": "0", "recipe": "{train.label_smoothing}"}),
    "precision": Grid({"float32": "float32", "bfloat16": "bfloat16"}, base="float32"),
    "large_batch": Grid(
        {
            "recipe": "{train.batch_size}, rate {optimizer.learning_rate}",
            "batch_256_same": "256, rate 1e-3",
            "batch_256_root": "256, rate 2.8e-3 (square root)",
            "batch_256_linear": "256, rate 8e-3 (linear)",
            "batch_512_root": "512, rate 4e-3 (square root)",
        }
    ),
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--grid", default="ladder", help=f"one or more of {', '.join(GRIDS)}, or all"
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from seed 0 (3)")
    parser.add_argument(
        "--folds", type=int, default=0, help="folds of a cross-validation (0: none)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at the same time (1)")
    parser.add_argument(
        "--together", action="store_true", help="train the seeds of a variant in one program"
    )
    parser.add_argument("--variants", metavar="NAME,...", help="only these variants of the grids")
    parser.add_argument("--expect", type=pathlib.Path, metavar="FILE", help="a results.json")
    parser.add_argument(
        "--config", default=str(REPOSITORY / "configs" / "default.py"), metavar="FILE"
    )
    flags, overrides = parser.parse_known_args(argv)
    if min(flags.seeds, flags.jobs) < 1:
        raise ConfigError("--seeds and --jobs: must be 1 or more")
    if flags.together and flags.seeds < 2:
        raise ConfigError("--together: needs --seeds=2 or more")
    if flags.folds and flags.folds < 3:
        raise ConfigError(f"--folds: must be 3 or more, or 0, got {flags.folds}")
    names = list(GRIDS) if flags.grid == "all" else flags.grid.split(",")
    wanted = choose(names, flags.variants)
    expected = read_expected(flags.expect) if flags.expect else None
    recipe = files.load(flags.config, overrides)
    flags.workdir.mkdir(parents=True, exist_ok=True)
    members = flags.seeds if flags.together else 0
    runs = [
        Run(
            flags.workdir,
            variant,
            seed,
            flags.config,
            tuple(overrides),
            fold,
            flags.folds,
            members,
        )
        for seed in range(flags.seeds)
        for fold in range(max(flags.folds, 1))
        for variant in wanted
    ]
    if expected is not None:
        check_expected(runs, expected)
    results = train_all(runs, flags.jobs)
    pooled = pool_all(runs, results, flags.workdir) if flags.folds else {}
    write_tables(names, wanted, results, recipe, flags.workdir, pooled)
    if expected is not None:
        compare(results, expected)
    if failed := [result for result in results if "error" in result]:
        raise UserError(f"{len(failed)} of {len(results)} runs failed; the table says which")


def choose(names: Sequence[str], only: str | None) -> list[str]:
    """Returns the distinct variants of the named grids, filtered by the argument `only`.

    Raises:
      ConfigError: A grid or variant does not exist.
    """
    if unknown := [name for name in names if name not in GRIDS]:
        raise ConfigError(f"--grid: there is no {unknown[0]}; there are {', '.join(GRIDS)}")
    variants = list(dict.fromkeys(variant for name in names for variant in GRIDS[name].variants))
    chosen = list(dict.fromkeys(only.split(","))) if only else variants
    if unknown := [variant for variant in chosen if variant not in variants]:
        raise ConfigError(f"--variants: {unknown[0]} is none of {', '.join(variants)}")
    return chosen


def write_tables(
    names: Sequence[str],
    wanted: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    recipe: Config,
    folder: pathlib.Path,
    pooled: Mapping[str, str],
) -> None:
    """Writes results.json, and a table and a plot for each grid of variants; prints the tables.

    Args:
      names: The names of the grids.
      wanted: The variants that were trained.
      results: The results of the runs.
      recipe: The configuration of the recipe.
      folder: The folder of the study.
      pooled: The pooled accuracy of each variant as text; empty without a cross-validation.
    """
    values = schema.flat(recipe)
    with_any = [name for name in names if set(wanted) & set(GRIDS[name].variants)]
    # A table with a single row compares nothing, so such a table is shown only if no table has
    # several rows.
    with_several = [name for name in names if len(set(wanted) & set(GRIDS[name].variants)) > 1]
    for name in with_several or with_any[:1]:
        grid = GRIDS[name].named(values)
        grid_runs = {
            variant: [result for result in results if result["variant"] == variant]
            for variant in grid.variants
            if variant in wanted
        }
        table = make_table(grid, grid_runs, pooled)
        print(f"\n{name}\n\n{table}", flush=True)
        write_text(folder / f"{name}.md", table)
        draw(folder / f"{name}.png", grid, grid_runs)
    write_text(folder / "results.json", json.dumps(read_all(folder), indent=1) + "\n")


def read_all(folder: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the results of all finished runs in a folder, by variant.

    The settings of the runs are left out, because they contain the path of the data.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted([*folder.glob(f"*/{_RECORD}"), *folder.glob(f"*/seed-*/{_RECORD}")]):
        run = json.loads(path.read_text())
        del run["settings"]
        runs.setdefault(run["variant"], []).append(run)
    return runs


def pool_all(
    runs: Sequence["Run"], results: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> dict[str, str]:
    """Pools the test predictions of each cross-validation whose runs are all finished.

    Writes the pooled metrics to cross_validation.json, and the predictions to a CSV file for each
    variant and seed.

    Returns:
      The pooled test accuracy of each variant with its 95 % interval, as text. With several seeds,
      it is the mean accuracy, and the interval is for a single seed.

    Raises:
      UserError: An image was tested several times or never.
    """
    folds: dict[tuple[str, int], list[Run]] = {}
    for run, result in zip(runs, results, strict=True):
        if "error" not in result:
            folds.setdefault((run.variant, run.seed), []).append(run)
    pooled: dict[str, dict[str, Any]] = {}
    for (variant, seed), members in folds.items():
        if len(members) == members[0].folds:
            name = f"{variant}-{seed}-{members[0].folds}"
            metrics, predictions = pool(members)
            write_text(folder / f"{name}.csv", predictions, errors="surrogateescape")
            pooled.setdefault(variant, {})[str(seed)] = metrics
    write_text(folder / "cross_validation.json", json.dumps(pooled, indent=1) + "\n")
    texts = {}
    for variant, metrics_of_seeds in pooled.items():
        accuracy = statistics.mean(metrics["accuracy"] for metrics in metrics_of_seeds.values())
        count = next(iter(metrics_of_seeds.values()))["count"]
        low, high = wilson_interval(accuracy * count, count)
        texts[variant] = f"{100 * accuracy:.2f} % ({100 * low:.2f} to {100 * high:.2f})"
    return texts


def pool(runs: Sequence["Run"]) -> tuple[dict[str, Any], str]:
    """Pools the test predictions of the runs of a cross-validation.

    Returns:
      The metrics of all images, with 95 % intervals, as JSON types; and the predictions as CSV with
      the columns id, label, predicted, confidence and fold.

    Raises:
      UserError: An image was tested several times or never.
    """
    rows: dict[str, dict[str, str]] = {}
    total = 0
    for run in runs:
        report = run.folder / "report"
        scores = json.loads((report / "metrics.json").read_text())
        total = sum(scores[split]["count"] for split in schema.SPLITS)
        path = report / "predictions.csv"
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            for row in csv.DictReader(file):
                if row["id"] in rows:
                    raise UserError(f"{run.folder}: {row['id']} was tested in another fold too")
                rows[row["id"]] = row | {"fold": run.fold_name}
    if len(rows) != total:
        raise UserError(f"{runs[0].folder}: {len(rows)} of {total} images were tested")
    names = sorted({row[key] for row in rows.values() for key in ("label", "predicted")})
    confusion = np.zeros((len(names), len(names)), int)
    for row in rows.values():
        confusion[names.index(row["label"]), names.index(row["predicted"])] += 1
    metrics = {key: value for key, value in summarize(confusion, 0.0).items() if key in METRICS}
    accuracy = wilson_interval(float(np.trace(confusion)), len(rows))
    intervals = {"accuracy": accuracy, **bootstrap_intervals(confusion)}
    file = io.StringIO()
    writer = csv.DictWriter(file, list(next(iter(rows.values()))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    return {**metrics, "count": len(rows), "confidence_intervals": intervals}, file.getvalue()


# The variant, the seed and the name of the fold of a run.
_RunKey = tuple[str, int, str]


def run_key(run: Mapping[str, Any]) -> _RunKey:
    """Returns the variant, the seed and the fold of a result, such as "2of5", or "" for no fold."""
    return run["variant"], run["seed"], run.get("fold", "")


def read_expected(path: pathlib.Path) -> dict[_RunKey, dict[str, Any]]:
    """Reads the results of all runs from a results.json, by variant, seed and fold.

    Raises:
      ConfigError: The file does not exist, or has another format.
    """
    try:
        variants = json.loads(path.read_text())
        return {run_key(run): run for runs in variants.values() for run in runs}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"--expect: {path} is no results.json: {error}") from error


def check_expected(runs: Sequence["Run"], expected: Mapping[_RunKey, Mapping[str, Any]]) -> None:
    """Raises ConfigError if the file of `--expect` lacks the results of a run."""
    if missing := [run for run in runs if (run.variant, run.seed, run.fold_name) not in expected]:
        raise ConfigError(f"--expect: has no {missing[0].variant} of seed {missing[0].seed}")


def compare(
    results: Sequence[Mapping[str, Any]],
    expected: Mapping[_RunKey, Mapping[str, Any]],
) -> None:
    """Prints for each run whether the results equal the expected results of the same run.

    Raises:
      UserError: The results of a run differ from the expected results.
    """
    differing = 0
    for result in results:
        run = expected[run_key(result)]
        different = [key for key in _COMPARED if result.get(key) != run.get(key)]
        differing += bool(different)
        message = f"{', '.join(different)} differ" if different else "the same"
        elsewhere = [key for key in _CIRCUMSTANCES if result.get(key) != run.get(key)]
        if different and elsewhere:
            message += f" (and so do {', '.join(elsewhere)})"
        fold = f", fold {result['fold']}" if "fold" in result else ""
        print(f"{result['variant']}, seed {result['seed']}{fold}: {message}")
    if differing:
        raise UserError(f"{differing} runs differ from what was expected")


@dataclasses.dataclass(frozen=True)
class Run:
    """The training of one variant with one seed.

    Attributes:
      study_folder: The folder of the study.
      variant: A key of `VARIANTS`.
      seed: The value of the key `seed`.
      config_file: The configuration file of the recipe.
      overrides: Flags that change keys of the recipe, for all variants.
      fold: The value of the key `data.fold`.
      folds: The value of the key `data.folds`.
      members: The number of seeds that are trained in one program; 0 if each run is one program.
    """

    study_folder: pathlib.Path
    variant: str
    seed: int
    config_file: str
    overrides: tuple[str, ...]
    fold: int = 0
    folds: int = 0
    members: int = 0

    @property
    def fold_name(self) -> str:
        """The fold and the number of folds, such as "2of5"; "" without a cross-validation."""
        return f"{self.fold}of{self.folds}" if self.folds else ""

    @property
    def name(self) -> str:
        """The variant, the seed and the fold."""
        return "-".join(filter(None, (self.variant, str(self.seed), self.fold_name)))

    @property
    def folder(self) -> pathlib.Path:
        """The folder of the run."""
        if self.members:
            return self.group_folder / f"seed-{self.seed}"
        return self.study_folder / self.name

    @property
    def group_folder(self) -> pathlib.Path:
        """The folder of the runs that are trained in one program."""
        return self.study_folder / "-".join(filter(None, (self.variant, self.fold_name)))

    @property
    def command(self) -> list[str]:
        """The training command of the run, or of all runs that are trained in one program."""
        if not self.members:
            return [*TRAIN, f"--workdir={self.folder}", *self._config_flags()]
        first = dataclasses.replace(self, seed=0)
        flags = [f"--members={self.members}", f"--workdir={self.group_folder}"]
        return [*TRAIN, *flags, *first._config_flags()]

    def _config_flags(self) -> list[str]:
        return [f"--config={self.config_file}", *self.flags()]

    def flags(self) -> list[str]:
        """Returns the flags that set the configuration of the training command."""
        changes = {"seed": self.seed, "report.detail": "none", **VARIANTS[self.variant]}
        has_split_seed = any("data.split_seed" in flag for flag in self.overrides)
        if self.members and not has_split_seed:
            changes["data.split_seed"] = 0
        if self.folds:
            # `pool` compares the number of tested images with the sum over all splits.
            changes |= {
                "data.folds": self.folds,
                "data.fold": self.fold,
                "report.splits": schema.SPLITS,
            }
        return [*self.overrides, *(f"--config.{key}={value}" for key, value in changes.items())]

    def settings(self) -> dict[str, Any]:
        """Returns the values of all configuration keys that affect the results, as JSON types.

        Raises:
          ConfigError: The configuration is invalid.
        """
        config = files.load(self.config_file, self.flags())
        try:
            schema.validate(config, num_devices=1)
        except ConfigError as error:
            raise ConfigError(f"{self.variant}: {error}") from error
        leaves = {k: v for k, v in schema.flat(config).items() if k not in INDIFFERENT_KEYS}
        return json.loads(json.dumps(leaves))


class Trainings:
    """A pool of training processes, each on an equal part of the cores."""

    def __init__(self, jobs: int):
        self._processes: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._is_ending = False
        cores = sorted(os.sched_getaffinity(0))
        self._shares = [cores[job::jobs] or cores for job in range(jobs)]

    def run(self, run: Run) -> subprocess.CompletedProcess[str]:
        """Runs the training command in a separate process, and waits until the process ends."""
        with self._lock:
            if self._is_ending:
                raise KeyboardInterrupt
            share = self._shares.pop()
            # On Linux this sets the cores of the current thread; the new process inherits them.
            os.sched_setaffinity(0, share)
            process = subprocess.Popen(
                run.command,
                env=child_environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                # The terminal sends Ctrl-C only to this process, which then ends the training
                # processes.
                start_new_session=True,
            )
            self._processes.add(process)
        try:
            _, stderr = process.communicate()
        finally:
            with self._lock:
                self._processes.discard(process)
                self._shares.append(share)
        return subprocess.CompletedProcess(process.args, process.returncode, "", stderr)

    def end(self) -> None:
        """Tells all training processes to save their state and to end."""
        with self._lock:
            self._is_ending = True
            for process in self._processes:
                process.send_signal(signal.SIGTERM)


def train_all(runs: Sequence[Run], jobs: int) -> list[dict[str, Any]]:
    """Trains the unfinished runs; returns the result or the error of each run.

    Raises:
      ConfigError: A folder has a run with other settings, or a configuration is wrong.
      KeyboardInterrupt: Ctrl-C or SIGTERM was received; all runs are saved.
    """
    # All configurations are validated here, so that an invalid configuration is reported before
    # any training starts.
    settings = [run.settings() for run in runs]
    trainings, commit_name = Trainings(jobs), commit()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        groups: dict[pathlib.Path, list[int]] = {}
        for number, run in enumerate(runs):
            groups.setdefault(run.group_folder if run.members else run.folder, []).append(number)

        def train_group(numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
            group = [(runs[number], settings[number]) for number in numbers]
            return dict(zip(numbers, train(group, commit_name, trainings), strict=True))

        futures = [pool.submit(train_group, numbers) for numbers in groups.values()]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            trainings.end()
            raise
    results = {number: result for future in futures for number, result in future.result().items()}
    return [results[number] for number in range(len(runs))]


def train(
    group: Sequence[tuple[Run, Mapping[str, Any]]], commit_name: str, trainings: Trainings
) -> list[dict[str, Any]]:
    """Returns the results of runs; starts or resumes their training if one is not finished.

    Args:
      group: Runs that are trained by the same process, and their settings.
      commit_name: The commit of the code.
      trainings: The pool of training processes.

    Raises:
      ConfigError: A folder has a run with other settings, or the command line is wrong.
      KeyboardInterrupt: The training was interrupted and is saved.
    """
    finished = [read_finished(run, settings) for run, settings in group]
    if all(finished):
        return [found for found in finished if found]
    first, _ = group[0]
    print(f"{' and '.join(run.name for run, _ in group)} ...", file=sys.stderr, flush=True)
    done = trainings.run(first)
    message = done.stderr.splitlines()[-1:] or [f"exit code {done.returncode}"]
    if done.returncode in (_START_AGAIN, -signal.SIGTERM):
        raise KeyboardInterrupt
    # The command also ends with this exit code if another process uses the folder of the run.
    if done.returncode == _USAGE:
        raise ConfigError(message[0].removeprefix("error: "))
    error = message[0] if done.returncode else None
    return [
        found or write_finished(run, settings, commit_name, error)
        for found, (run, settings) in zip(finished, group, strict=True)
    ]


def read_finished(run: Run, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the result of a run; None if the run is not finished.

    Raises:
      ConfigError: The folder has a run with other settings.
    """
    with contextlib.suppress(FileNotFoundError):
        found = json.loads((run.folder / _RECORD).read_text())
        # A run that was trained before a key existed was trained with the default of the key.
        known = {key: declared.default for key, declared in schema.keys().items()}
        trained = json.loads(json.dumps(known)) | found["settings"]
        different = {key for key in settings if trained.get(key) != settings[key]}
        if different:
            raise ConfigError(
                f"--workdir: {run.folder} holds a run of other {', '.join(sorted(different))}; use "
                "another folder"
            )
        return found
    return None


def write_finished(
    run: Run, settings: Mapping[str, Any], commit_name: str, error: str | None
) -> dict[str, Any]:
    """Returns the result of a run whose training has just ended, and writes it.

    Args:
      run: The run.
      settings: The settings of the run.
      commit_name: The commit of the code.
      error: The message if the training failed, which is not written; else None.
    """
    what = {"variant": run.variant, "seed": run.seed, "settings": settings}
    what |= {"fold": run.fold_name} if run.folds else {}
    if error is not None:
        print(f"{run.name} failed: {error}", file=sys.stderr, flush=True)
        return {**what, "error": error}
    where = {
        "commit": commit_name,
        "processor": describe_machine()["processor"],
        "cores": len(os.sched_getaffinity(0)),
    }
    found = {**what, **read_run(run.folder), **where}
    write_text(run.folder / _RECORD, json.dumps(found, indent=1) + "\n")
    print(f"{run.name}: {found['test']['accuracy']:.2%}", file=sys.stderr, flush=True)
    return found


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """Returns a finished run's metrics, times, data fingerprint and library versions."""
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bundle = json.loads((folder / "bundle" / "bundle.json").read_text())
    return {
        "test": {key: metrics["test"][key] for key in METRICS},
        "validation": {key: metrics["validation"][key] for key in METRICS},
        "epochs": len(epochs),
        "seconds_per_epoch": statistics.median(epoch["seconds"] for epoch in epochs),
        "seconds": sum(epoch["seconds"] for epoch in epochs),
        "fingerprint": bundle["data"]["fingerprint"],
        "versions": bundle["versions"],
    }


def commit() -> str:
    """Returns the commit hash of the repository, or "" without git; "+" marks changed files."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ("git", "-C", str(REPOSITORY))
        name = subprocess.check_output([*git, "rev-parse", "--short=10", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
        return name.strip() + "+" * bool(changed.strip())
    return ""


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
