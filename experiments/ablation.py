"""What each part of the recipe is worth: variants of it over seeds, in one table.

    python experiments/ablation.py --grid=ladder --workdir=DIR [--seeds=3] [--jobs=2]
        [--variants=NAME,...] [--expect=FILE] [ARGUMENT of cnn_jax.main...]

such as --config=configs/eurosat.py --config.data.source=folder:PATH --config.train.epochs=45.
The seed draws the weights, the order of the images and the division into splits; the same
seeds are used for all variants, so that their differences are paired.

Every run is one of the training command in the folder DIR/VARIANT-SEED. Grids share
variants: in one DIR no run is made twice. Started again, what is finished is kept and what
was cut off goes on. Seeds come before variants, so that an interrupted table is fair.
--jobs=N trains N at a time, each on its share of the cores; on few cores that is faster,
because a small network cannot keep several busy.

Left in DIR: for each grid GRID.md, the table, which is also printed, and GRID.png; and
results.json, with the figures, versions, commit and data fingerprint of all runs in DIR.
--expect compares with such a file: a run with the same versions on the same kind of machine
and as many cores has the same figures to the last digit.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from cnn_jax import cli  # noqa: E402
from cnn_jax.errors import ConfigError, UserError  # noqa: E402
from cnn_jax.run_directory import write_text  # noqa: E402

TRAIN = (sys.executable, "-m", "cnn_jax.main")
# What a finished run has come to, in its folder.
_RECORD = "ablation.json"
# Exit codes of a training that was interrupted and is saved, and of one whose call is wrong.
_START_AGAIN, _USAGE = cli.START_AGAIN, 2

_NO_AUGMENTATION = {
    "augment.flip": "none",
    "augment.rotation": 0,
    "augment.zoom": 0,
    "augment.contrast": 0,
}
# The recipe's own rate, 1e-3, from the first step to the last.
_CONSTANT_RATE = {"optimizer.final_learning_rate": 1e-3}
_LARGE = {"optimizer.warmup_epochs": 1.0}

# What each variant changes of the recipe.
VARIANTS: dict[str, Mapping[str, Any]] = {
    "recipe": {},
    # Each step of the ladder adds to the one before; the recipe is the last.
    "plain": {
        **_NO_AUGMENTATION,
        **_CONSTANT_RATE,
        "model.batch_norm": False,
        "model.dropout": 0,
    },
    "batch_norm": {**_NO_AUGMENTATION, **_CONSTANT_RATE, "model.dropout": 0},
    "dropout": {**_NO_AUGMENTATION, **_CONSTANT_RATE},
    "no_batch_norm": {"model.batch_norm": False},
    "rate_1e-3": _CONSTANT_RATE,
    "rate_1e-4": {"optimizer.learning_rate": 1e-4, "optimizer.final_learning_rate": 1e-4},
    **{f"batch_{size}": {"train.batch_size": size} for size in (16, 64, 128, 256)},
    **{f"dropout_{share}": {"model.dropout": share} for share in (0, 0.3, 0.7)},
    "no_augmentation": _NO_AUGMENTATION,
    "mixup": {"augment.mixup_probability": 1},
    "cutmix": {"augment.cutmix_probability": 1},
    "mixup_cutmix": {"augment.mixup_probability": 0.5, "augment.cutmix_probability": 0.5},
    "no_smoothing": {"train.label_smoothing": 0},
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},
    # Adam's step does not grow with the gradient, so besides the linear rule (Goyal et al.
    # 2017) the square-root rule (Krizhevsky 2014; Malladi et al. 2022 for adaptive
    # optimizers) and the rate as it is are tried.
    "batch_256_same": {"train.batch_size": 256, **_LARGE},
    "batch_256_root": {"train.batch_size": 256, "optimizer.learning_rate": 2.8e-3, **_LARGE},
    "batch_256_linear": {"train.batch_size": 256, "optimizer.learning_rate": 8e-3, **_LARGE},
    "batch_512_root": {"train.batch_size": 512, "optimizer.learning_rate": 4e-3, **_LARGE},
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """Variants that belong into one table.

    Attributes:
      variants: Names, and what the table calls them.
      is_ladder: Whether each is compared with the one before it, or all with the recipe.
      published: The specification's own test accuracies, in percent.
    """

    variants: Mapping[str, str]
    is_ladder: bool = False
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)


GRIDS = {
    "ladder": Grid(
        {
            "plain": "plain CNN",
            "batch_norm": "with BatchNorm",
            "dropout": "with dropout 0.5",
            "recipe": "with augmentation and schedule (final)",
        },
        is_ladder=True,
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
            "recipe": "cosine from 1e-3 to 1e-4",
            "rate_1e-3": "1e-3, constant",
            "rate_1e-4": "1e-4, constant",
        }
    ),
    "batch_size": Grid(
        {
            "batch_16": "16",
            "recipe": "32",
            "batch_64": "64",
            "batch_128": "128",
            "batch_256": "256",
        }
    ),
    "dropout": Grid(
        {"dropout_0": "0", "dropout_0.3": "0.3", "recipe": "0.5", "dropout_0.7": "0.7"}
    ),
    "augmentation": Grid(
        {
            "no_augmentation": "off",
            "recipe": "on",
            "mixup": "on, and MixUp",
            "cutmix": "on, and CutMix",
            "mixup_cutmix": "on, and MixUp or CutMix",
        }
    ),
    "label_smoothing": Grid({"no_smoothing": "0", "recipe": "0.1"}),
    "precision": Grid({"float32": "float32", "bfloat16": "bfloat16"}),
    "large_batch": Grid(
        {
            "recipe": "32, rate 1e-3",
            "batch_256_same": "256, rate 1e-3",
            "batch_256_root": "256, rate 2.8e-3 (square root)",
            "batch_256_linear": "256, rate 8e-3 (linear)",
            "batch_512_root": "512, rate 4e-3 (square root)",
        }
    ),
}

# What the table shows of the test split.
_METRICS = ("accuracy", "precision", "recall", "f1")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--grid", default="ladder", help=f"one or more of {', '.join(GRIDS)}, or all"
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--variants", metavar="NAME,...", help="only these of the grids")
    parser.add_argument("--expect", type=pathlib.Path, metavar="FILE", help="a results.json")
    flags, arguments = parser.parse_known_args(argv)
    if min(flags.seeds, flags.jobs) < 1:
        raise ConfigError("--seeds and --jobs: must be 1 or more")
    names = list(GRIDS) if flags.grid == "all" else flags.grid.split(",")
    wanted = choose(names, flags.variants)
    flags.workdir.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(flags.workdir / f"{variant}-{seed}", variant, seed, tuple(arguments))
        for seed in range(flags.seeds)
        for variant in wanted
    ]
    results = train_all(runs, flags.jobs)
    write_tables(names, wanted, results, flags.workdir)
    if flags.expect:
        compare(results, json.loads(flags.expect.read_text()))
    if failed := [result for result in results if "error" in result]:
        raise UserError(f"{len(failed)} of {len(results)} runs failed; the table says which")


def choose(names: Sequence[str], only: str | None) -> list[str]:
    """The variants of the grids of these names, each once, or only some of them.

    Raises:
      ConfigError: There is no such grid or variant.
    """
    if unknown := [name for name in names if name not in GRIDS]:
        raise ConfigError(f"--grid: there is no {unknown[0]}; there are {', '.join(GRIDS)}")
    variants = list(dict.fromkeys(variant for name in names for variant in GRIDS[name].variants))
    chosen = only.split(",") if only else variants
    if unknown := [variant for variant in chosen if variant not in variants]:
        raise ConfigError(f"--variants: {unknown[0]} is none of {', '.join(variants)}")
    return chosen


def write_tables(
    names: Sequence[str],
    wanted: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    folder: pathlib.Path,
) -> None:
    """Prints and writes the tables and plots of grids, and all figures."""
    with_any = [name for name in names if set(wanted) & set(GRIDS[name].variants)]
    # A single row is no comparison, unless it is all that there is.
    with_several = [name for name in names if len(set(wanted) & set(GRIDS[name].variants)) > 1]
    for name in with_several or with_any[:1]:
        grid = GRIDS[name]
        of_grid = {
            variant: [result for result in results if result["variant"] == variant]
            for variant in grid.variants
            if variant in wanted
        }
        table = make_table(grid, of_grid)
        print(f"\n{name}\n\n{table}", flush=True)
        write_text(folder / f"{name}.md", table)
        draw(folder / f"{name}.png", grid, of_grid)
    write_text(folder / "results.json", json.dumps(read_all(folder), indent=1) + "\n")


def read_all(folder: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """The finished runs in a folder by variant, without what says where its data lay."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob(f"*/{_RECORD}")):
        run = json.loads(path.read_text())
        del run["flags"]
        runs.setdefault(run["variant"], []).append(run)
    return runs


def compare(
    results: Sequence[Mapping[str, Any]], expected: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Prints for each run whether it has come to what a results.json says.

    Raises:
      UserError: One has not.
    """
    by_run = {(run["variant"], run["seed"]): run for runs in expected.values() for run in runs}
    differing = 0
    for result in results:
        run = by_run.get((result["variant"], result["seed"]))
        if run is None:
            continue
        keys = ("test", "validation", "epochs", "fingerprint")
        different = [key for key in keys if result.get(key) != run.get(key)]
        differing += bool(different)
        same = "the same" if not different else f"{', '.join(different)} differ"
        print(f"{result['variant']}, seed {result['seed']}: {same}")
    if differing:
        raise UserError(f"{differing} runs differ from what was expected")


# Runs.


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
      folder: Where.
      variant: Of `VARIANTS`.
      seed: Of the configuration.
      arguments: Of the training command, for all variants.
    """

    folder: pathlib.Path
    variant: str
    seed: int
    arguments: tuple[str, ...]

    def flags(self) -> list[str]:
        """The arguments of the training command but the folder."""
        changes = {"seed": self.seed, "report.detail": "none", **VARIANTS[self.variant]}
        return [*self.arguments, *(f"--config.{key}={value}" for key, value in changes.items())]


class Trainings:
    """Training processes that are under way, to be ended together."""

    def __init__(self, jobs: int):
        self._processes: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._is_ending = False
        cores = sorted(os.sched_getaffinity(0))
        self._shares = [cores[job::jobs] or cores for job in range(jobs)]

    def run(self, run: Run) -> subprocess.CompletedProcess[str]:
        """Trains in a process of its own."""
        with self._lock:
            if self._is_ending:
                raise KeyboardInterrupt
            share = self._shares.pop()
            # Of this thread alone, and of what it starts.
            os.sched_setaffinity(0, share)
            process = subprocess.Popen(
                [*TRAIN, f"--workdir={run.folder}", *run.flags()],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C reaches it once, from here.
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
        """Has all of them save and end."""
        with self._lock:
            self._is_ending = True
            for process in self._processes:
                process.send_signal(signal.SIGTERM)


def train_all(runs: Sequence[Run], jobs: int) -> list[dict[str, Any]]:
    """Trains what is not done yet; what each run has left, or why it failed.

    Raises:
      ConfigError: A folder holds a run of other arguments, or the arguments are wrong.
      KeyboardInterrupt: After Ctrl-C or SIGTERM, once all runs are saved.
    """
    trainings = Trainings(jobs)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, run, trainings) for run in runs]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            trainings.end()
            raise
    return [future.result() for future in futures]


def train(run: Run, trainings: Trainings) -> dict[str, Any]:
    """What a run has left, which is made if it is not there."""
    record = run.folder / _RECORD
    with contextlib.suppress(FileNotFoundError):
        found = json.loads(record.read_text())
        if found["flags"] != run.flags():
            raise ConfigError(
                f"--workdir: {run.folder} holds a run of {' '.join(found['flags'])}; use another "
                "folder, or the same arguments"
            )
        return found
    print(f"{run.folder.name} ...", file=sys.stderr, flush=True)
    done = trainings.run(run)
    told = done.stderr.splitlines()[-1:] or [f"exit code {done.returncode}"]
    if done.returncode in (_START_AGAIN, -signal.SIGTERM):
        raise KeyboardInterrupt
    if done.returncode == _USAGE:  # So would all others.
        raise ConfigError(told[0].removeprefix("error: "))
    provenance = {"variant": run.variant, "seed": run.seed, "flags": run.flags()}
    if done.returncode:
        print(f"{run.folder.name} failed: {told[0]}", file=sys.stderr, flush=True)
        return {**provenance, "error": told[0]}
    found = {**provenance, **read_run(run.folder), "cores": len(os.sched_getaffinity(0))}
    write_text(record, json.dumps(found, indent=1) + "\n")
    print(f"{run.folder.name}: {found['test']['accuracy']:.2%}", file=sys.stderr, flush=True)
    return found


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """Figures of a finished run, and what they depend on."""
    figures = json.loads((folder / "report" / "metrics.json").read_text())
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bundle = json.loads((folder / "bundle" / "bundle.json").read_text())
    return {
        "test": {key: figures["test"][key] for key in _METRICS},
        "validation": {key: figures["validation"][key] for key in _METRICS},
        "epochs": len(epochs),
        "seconds_per_epoch": statistics.median(epoch["seconds"] for epoch in epochs),
        "seconds": sum(epoch["seconds"] for epoch in epochs),
        "fingerprint": bundle["data"]["fingerprint"],
        "versions": bundle["versions"],
        "commit": commit(),
        "machine": platform.machine(),
    }


def commit() -> str:
    """The repository's commit, with a + if files differ from it; empty outside of git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ("git", "-C", str(REPOSITORY))
        name = subprocess.check_output([*git, "rev-parse", "--short=10", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
        return name.strip() + "+" * bool(changed.strip())
    return ""


# The table.


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample's standard deviation, 0 of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired_difference(
    values: Mapping[int, float], base: Mapping[int, float]
) -> tuple[float, float | None]:
    """The mean of the differences by seed, and half of its 95 % confidence interval.

    By Student's t over the seeds that both have; None for the interval of one seed.
    """
    differences = [values[seed] - base[seed] for seed in values if seed in base]
    mean, deviation = mean_and_deviation(differences)
    count = len(differences)
    if count < 2:
        return mean, None
    return mean, float(scipy.stats.t.ppf(0.975, count - 1)) * deviation / count**0.5


def make_table(grid: Grid, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table: a row for each variant, in percent and percentage points."""
    head = ["", *(f"test {name}" for name in ("accuracy", "precision", "recall", "F1"))]
    against = "the row before" if grid.is_ladder else "the recipe"
    head += ["validation accuracy", f"accuracy against {against}", "epochs", "s an epoch", "seeds"]
    if grid.published:
        head.append("the specification's")
    rows = [head, ["---"] * len(head)]
    base: dict[int, float] = {}
    if not grid.is_ladder:
        base = _by_seed(results.get("recipe", ()))
    for variant, of_variant in results.items():
        done = [result for result in of_variant if "error" not in result]
        row = [grid.variants[variant]]
        accuracies = _by_seed(of_variant)
        if done:
            row += [_percent([result["test"][key] for result in done]) for key in _METRICS]
            row.append(_percent([result["validation"]["accuracy"] for result in done]))
            row.append(
                _difference(accuracies, base) if variant != "recipe" or grid.is_ladder else ""
            )
            row.append(f"{statistics.mean(result['epochs'] for result in done):.3g}")
            row.append(f"{statistics.median(r['seconds_per_epoch'] for r in done):.3g}")
        else:
            row += [""] * (len(_METRICS) + 4)
        failures = [result for result in of_variant if "error" in result]
        row.append(str(len(done)) + "".join(f"; {f['seed']}: {f['error']}" for f in failures))
        if grid.published:
            row.append(f"{grid.published[variant]} %" if variant in grid.published else "")
        rows.append(row)
        if grid.is_ladder:
            base = accuracies
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _by_seed(results: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Test accuracies of the runs that have one, by seed."""
    return {r["seed"]: r["test"]["accuracy"] for r in results if "error" not in r}


def _percent(shares: Sequence[float]) -> str:
    mean, deviation = mean_and_deviation([100 * share for share in shares])
    return f"{mean:.2f} ± {deviation:.2f} %" if len(shares) > 1 else f"{mean:.2f} %"


def _difference(values: Mapping[int, float], base: Mapping[int, float]) -> str:
    if not values.keys() & base.keys():
        return ""
    mean, half = paired_difference(values, base)
    if half is None:
        return f"{100 * mean:+.2f}"
    return f"{100 * mean:+.2f} ({100 * (mean - half):+.2f} to {100 * (mean + half):+.2f})"


# The plot.


def draw(
    path: pathlib.Path, grid: Grid, results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """A row for each variant: a point for each seed, and mean and standard deviation."""
    figure = Figure(figsize=(6.4, 0.9 + 0.42 * len(results)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (variant, of_variant) in enumerate(results.items()):
        values = [100 * accuracy for accuracy in _by_seed(of_variant).values()]
        if values:
            mean, deviation = mean_and_deviation(values)
            axes.plot(values, [place] * len(values), "o", color="#8fb8dd", markersize=5)
            axes.errorbar(mean, place, xerr=deviation, fmt="|", color="#0b3c6f", capsize=4, ms=12)
        if variant in grid.published:
            label = None if axes.get_legend_handles_labels()[1] else "the specification's own"
            axes.plot(grid.published[variant], place, "D", color="#d55e00", ms=4, label=label)
    axes.set_yticks(range(len(results)), [grid.variants[variant] for variant in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel("test accuracy (%)\neach seed; mean and standard deviation")
    axes.grid(axis="x", color="#dfe2e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    figure.savefig(path)


if __name__ == "__main__":
    cli.run(main, if_interrupted=cli.START_AGAIN)
