"""The table and the plot of an ablation study, and functions that other studies use too."""

import dataclasses
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# The metrics on the test split that the table contains.
METRICS = ("accuracy", "precision", "recall", "f1")


@dataclasses.dataclass(frozen=True)
class Grid:
    """A set of variants that are compared in one table.

    Attributes:
      variants: The titles in the table, by name of the variant; {KEY} in a title stands for the
        value of the configuration key KEY.
      base: The variant with which all other variants are compared; "" if each variant is compared
        with the row above it.
      published: The test accuracies of the specification, in percent.
    """

    variants: Mapping[str, str]
    base: str = "recipe"
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def named(self, values: Mapping[str, Any]) -> "Grid":
        """Returns a copy of the grid with the value of KEY in place of each {KEY} in the titles."""

        def fill(name: str) -> str:
            return re.sub(r"\{([\w.]+)\}", lambda key: f"{values[key[1]]:g}", name)

        return dataclasses.replace(self, variants={k: fill(v) for k, v in self.variants.items()})


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation of values (0 for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired_difference(
    values: Mapping[Any, float], base: Mapping[Any, float]
) -> tuple[float, float | None]:
    """Returns the mean difference of paired values, and the half-width of its confidence interval.

    Values of the same seed, and of the same fold of a cross-validation, form a pair. The 95 %
    interval is Student's t over the pairs; it is None for one pair. The training splits of the runs
    overlap, so for other images the interval is too narrow (Nadeau and Bengio 2003, "Inference for
    the Generalization Error").
    """
    import scipy.stats  # This import is slow, and only the table needs SciPy.

    differences = [values[pair] - base[pair] for pair in values if pair in base]
    mean, deviation = mean_and_deviation(differences)
    count = len(differences)
    if count < 2:
        return mean, None
    return mean, float(scipy.stats.t.ppf(0.975, count - 1)) * deviation / count**0.5


def make_table(
    grid: Grid,
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    pooled: Mapping[str, str] | None = None,
) -> str:
    """Returns a Markdown table with a row for each variant; metrics are in percent.

    Args:
      grid: The variants and their titles.
      results: The results of the runs of each variant.
      pooled: The pooled accuracy of each variant of a cross-validation, as text.
    """
    against = grid.variants[grid.base] if grid.base else "the row before"
    head = ["", *(f"test {name}" for name in ("accuracy", "precision", "recall", "F1"))]
    head += ["validation accuracy", f"test accuracy against {against}", "epochs", "s an epoch"]
    head += ["times"] * bool(grid.base) + ["runs" if pooled else "seeds"]
    head += ["pooled test accuracy (95 % interval)"] * bool(pooled)
    head += ["the specification's"] * bool(grid.published)
    rows = [head, ["---"] * len(head)]
    base = results.get(grid.base, ())
    for variant, variant_runs in results.items():
        base_runs = () if variant == grid.base else base
        row = [grid.variants[variant], *_metrics(variant_runs, base_runs)]
        row += [_times(variant_runs, base)] * bool(grid.base)
        failures = "".join(
            f"; {'-'.join(map(str, _pair_key(run)))}: {run['error']}"
            for run in variant_runs
            if "error" in run
        )
        row.append(f"{len(_done(variant_runs))}{failures}")
        if pooled:
            row.append(pooled.get(variant, ""))
        if grid.published:
            row.append(f"{grid.published[variant]} %" if variant in grid.published else "")
        rows.append(row)
        if not grid.base:
            base = variant_runs
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _metrics(runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the cells of a table row, from the test accuracy to the seconds per epoch."""
    done = _done(runs)
    if not done:
        return [""] * (len(METRICS) + 4)
    return [
        *(percent([run["test"][key] for run in done]) for key in METRICS),
        percent([run["validation"]["accuracy"] for run in done]),
        difference_text(_accuracies(runs), _accuracies(base)),
        f"{statistics.mean(run['epochs'] for run in done):.3g}",
        f"{_seconds(done):.3g}",
    ]


def _times(runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> str:
    """Returns the ratio of a variant's time per epoch to the base variant's time, as text."""
    done, base_runs = _done(runs), _done(base)
    return f"{_seconds(done) / _seconds(base_runs):.2f}" if done and base_runs else ""


def _seconds(done: Sequence[Mapping[str, Any]]) -> float:
    """Returns the median of the seconds per epoch over finished runs."""
    return statistics.median(run["seconds_per_epoch"] for run in done)


def _done(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [run for run in runs if "error" not in run]


def _pair_key(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the seed and the fold of a run, which are equal for the runs of a pair."""
    return tuple(run[key] for key in ("seed", "fold") if key in run)


def _accuracies(results: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], float]:
    """Returns the test accuracies of all finished runs, by seed and fold."""
    return {_pair_key(run): run["test"]["accuracy"] for run in _done(results)}


def percent(fractions: Sequence[float], digits: int = 2) -> str:
    """Returns the mean and the standard deviation of fractions as text, in percent."""
    mean, deviation = mean_and_deviation([100 * fraction for fraction in fractions])
    spread = f" ± {deviation:.{digits}f}" if len(fractions) > 1 else ""
    return f"{mean:.{digits}f}{spread} %"


def difference_text(values: Mapping[Any, float], base: Mapping[Any, float]) -> str:
    """Returns the mean paired difference of fractions, and its interval, as text in points.

    The text is empty if there is no pair; see `paired_difference`.
    """
    if not values.keys() & base.keys():
        return ""
    mean, half = paired_difference(values, base)
    if half is None:
        return f"{100 * mean:+.2f}"
    return f"{100 * mean:+.2f} ({100 * (mean - half):+.2f} to {100 * (mean + half):+.2f})"


def draw(
    path: pathlib.Path, grid: Grid, results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Plots each variant's test accuracies, and their mean and standard deviation."""
    # These imports are slow, and only the plot needs Matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.9 + 0.42 * len(results)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (variant, variant_runs) in enumerate(results.items()):
        values = [100 * accuracy for accuracy in _accuracies(variant_runs).values()]
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
