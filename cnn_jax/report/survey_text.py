"""Formats the survey of a data set as text for the terminal."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from cnn_jax.data.findings import count
from cnn_jax.data.splits import SPLITS, Division
from cnn_jax.data.survey import Cluster, Survey
from cnn_jax.system.errors import printable
from cnn_jax.system.text import FACT_INDENT, facts, shorten, table

# The maximum numbers of classes, clusters and image names in a list, and the maximum width of a
# class name. Only the list of unreadable files is never shortened.
_MAX_CLASSES = 60
_MAX_CLUSTERS = 5
_MAX_NAMES = 4
_NAME_WIDTH = 32


def summarize(survey: Survey, width: int | None = None) -> str:
    """Formats the survey of a data set as text.

    Args:
      survey: The survey of a data set.
      width: The width of the terminal, in columns; None for no limit.
    """
    source, findings = survey.source, survey.findings
    classes = count(len(source.class_names), "class", "classes")
    rows = {
        "data": f"{printable(source.name)}: {count(len(source), 'image')} of {classes}",
        "division": _division(survey.division),
        "classes": _class_table(survey, width),
        "balance": f"the largest class has {findings.imbalance:.1f} times the images of the "
        f"smallest; too small for every split: {_names(survey.too_small)}",
        "resolution": _resolutions(survey),
        "aspect": _aspect_ratios(survey),
        "files": f"format {_counts(survey.formats)}; colour mode {_counts(survey.modes)}",
        "values": "\n".join(value_range.describe() for value_range in findings.values) or "none",
        "channels": _channels(survey),
        "unreadable": "\n".join(f"{printable(u.id)} {u.reason}" for u in findings.unreadable)
        or "none",
        "rotated": f"{len(findings.rotated):,} by EXIF: "
        + _names([source.ids[i] for i in findings.rotated])
        if findings.rotated
        else "none",
        "equal": _duplicates(survey, survey.exact, "exact duplicates"),
        "alike": _duplicates(
            survey, survey.near, f"near duplicates, up to {survey.distance} of 64 bits"
        ),
        "ignored": _counts(list(source.ignored.items())),
        "warnings": "\n".join(survey.warnings) or "none",
    }
    if len(findings.unreadable) > 1:
        rows["unreadable"] = f"{len(findings.unreadable):,}\n{rows['unreadable']}"
    return "\n".join(facts(rows, width))


def _division(division: Division) -> str:
    fractions = " : ".join(f"{fraction:g}" for fraction in division.fractions)
    group = f", {printable(division.group)} stays together" if division.group else ""
    own = "" if division.keep_splits else ", the data's own splits are not used"
    return f"{fractions}, {division.rule}, seed {division.seed}{group}{own}"


def _class_table(survey: Survey, width: int | None) -> str:
    """Returns a table of the number of images by class and split.

    With many classes, the table shows only the smallest and the largest classes.
    """
    counts = np.column_stack([survey.counts, survey.counts.sum(axis=1)])
    shown = np.arange(len(counts))
    if len(shown) > _MAX_CLASSES:
        by_size = np.argsort(counts[:, -1], kind="stable")
        shown = np.r_[by_size[: _MAX_CLASSES // 2], by_size[-_MAX_CLASSES // 2 :]]

    def row(name: str, numbers: Iterable[int]) -> tuple[str, ...]:
        return (shorten(printable(name), _NAME_WIDTH), *(f"{number:,}" for number in numbers))

    rows: list[Sequence[str] | str] = [
        row(survey.source.class_names[label], counts[label].tolist()) for label in shown
    ]
    if len(shown) < len(counts):
        between = count(len(counts) - len(shown), "class", "classes")
        rows.insert(_MAX_CLASSES // 2, f"... {between} between")
    rows.append(row("all", counts.sum(axis=0).tolist()))
    room = None if width is None else width - FACT_INDENT
    return table(("class", *SPLITS, "all"), rows, room, min_column=10)


def _resolutions(survey: Survey) -> str:
    resolutions = survey.resolutions
    if not resolutions:
        return "none"
    (width, height), _ = resolutions[0]
    if len(resolutions) == 1:
        return f"all {width} x {height} pixels"
    smallest = min((size for size, _ in resolutions), key=math.prod)
    largest = max((size for size, _ in resolutions), key=math.prod)
    common = [f"{w} x {h} ({number:,})" for (w, h), number in resolutions[:3]]
    return (
        f"{len(resolutions):,} different, from {smallest[0]} x {smallest[1]} to "
        f"{largest[0]} x {largest[1]} pixels (width x height); most often {', '.join(common)}"
    )


def _aspect_ratios(survey: Survey) -> str:
    ratios = survey.aspect_ratios
    if not len(ratios):
        return "none"
    low, median, high = np.quantile(ratios, (0, 0.5, 1))
    return f"width / height from {low:.3g} to {high:.3g}, median {median:.3g}"


def _channels(survey: Survey) -> str:
    if survey.mean is None or survey.std is None:
        return "none"
    mean, std = (" ".join(f"{x:.2f}" for x in values) for values in (survey.mean, survey.std))
    return f"mean {mean}, standard deviation {std} (R G B, grey levels 0 to 255)"


def _duplicates(survey: Survey, clusters: Sequence[Cluster], noun: str) -> str:
    """Describes clusters of duplicates: their number, and the images of the first clusters."""
    if not clusters:
        return f"no {noun}"
    labels = sum(cluster.different_labels for cluster in clusters)
    splits = sum(cluster.different_splits for cluster in clusters)
    images = sum(len(cluster.images) for cluster in clusters)
    lines = [
        f"{count(len(clusters), 'set')} of {noun} ({images:,} images): {labels:,} with different "
        f"labels, {splits:,} in different splits"
    ]
    for cluster in clusters[:_MAX_CLUSTERS]:
        marks = [
            *(["different labels"] if cluster.different_labels else []),
            *(["different splits"] if cluster.different_splits else []),
        ]
        names = _names([survey.source.ids[i] for i in survey.varied(cluster)])
        lines.append(f"  {names}" + (f" ({', '.join(marks)})" if marks else ""))
    if len(clusters) > _MAX_CLUSTERS:
        lines.append(f"  ... {len(clusters) - _MAX_CLUSTERS:,} more; --json has them all")
    return "\n".join(lines)


def _counts(counts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{printable(name)} {number:,}" for name, number in counts) or "none"


def _names(names: Sequence[str]) -> str:
    """Lists the first four names, and states the number of remaining names."""
    rest = len(names) - _MAX_NAMES
    shown = ", ".join(printable(name) for name in names[:_MAX_NAMES]) or "none"
    return shown + (f" and {rest:,} more" if rest > 0 else "")
