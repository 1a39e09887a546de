"""A look at a data set before training.

    cnn_jax inspect --source=folder:PATH [--output=DIR] [--json]

prints what is in it and what is wrong with it, as text or as JSON. With
`--output`, DIR/index.html shows the same with pictures, and DIR/inspection.json
holds all of it. Files that cannot be read are named, and no number of them is
too large. Nothing is written elsewhere.
"""

import argparse
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cnn_jax.config.schema import SOURCE_FORMS, SPLIT_RULES, SPLITS
from cnn_jax.data import Track, no_track
from cnn_jax.data.files import check_output
from cnn_jax.data.findings import count
from cnn_jax.data.preprocessing import MAX_PIXELS
from cnn_jax.data.sources import absolute, listed_folder, open_source
from cnn_jax.data.splits import Division
from cnn_jax.data.survey import MAX_DISTANCE, NEAR_DISTANCE, Cluster, Survey, survey
from cnn_jax.system import cli
from cnn_jax.system.console import Console
from cnn_jax.system.errors import ConfigError, printable

# Of what may be a long list, except of unreadable files, the text shows so much.
_MAX_CLASSES = 60
_MAX_SHOWN = 5
_MAX_NAMED = 4


def inspect_source(
    source: str,
    division: Division | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    allow_outside: bool = False,
    distance: int = NEAR_DISTANCE,
    track: Track = no_track,
    white_level: float = 0.0,
) -> Survey:
    """Looks at every image of a source once.

    Args:
      source: One of `schema.SOURCE_FORMS`.
      division: How training would divide it; the default is that of
        `configs/default.py`.
      max_pixels: A larger image counts as unreadable.
      allow_outside: Whether links in a folder, or paths in a table, may lead out of it.
      distance: Near duplicates are images whose perceptual hashes differ in at most
        so many of 64 bits.
      track: Shows progress.
      white_level: `data.white_level`.

    Returns:
      What was found; its `to_dict()` is what the command gives as JSON, and
      `summarize` makes the text of it.

    Raises:
      ConfigError: No source has a name of this form, or the division's group is no
        pattern.
      DataError: The source is not there, is not a set of labelled images, or the
        group does not describe an id.
    """
    listing = open_source(absolute(source), track, allow_outside)
    return survey(listing, division or Division(), max_pixels, distance, track, white_level)


def summarize(found: Survey) -> str:
    """What was found, in lines for a terminal."""
    source, findings = found.source, found.findings
    classes = count(len(source.class_names), "class", "classes")
    rows = {
        "data": f"{printable(source.name)}: {count(len(source), 'image')} of {classes}",
        "division": _division(found.division),
        "classes": "\n".join(_class_table(found)),
        "balance": f"the largest class has {findings.imbalance:.1f} times the images of the "
        f"smallest; too small for every split: {_some(found.too_small, _MAX_NAMED)}",
        "resolution": _resolutions(found),
        "aspect": _aspect_ratios(found),
        "files": f"format {_counts(found.formats)}; colour mode {_counts(found.modes)}",
        "values": "\n".join(one.describe() for one in findings.values) or "none",
        "channels": _channels(found),
        "unreadable": "\n".join(f"{printable(u.id)} {u.reason}" for u in findings.unreadable)
        or "none",
        "rotated": f"{len(findings.rotated):,} by EXIF: "
        + _some([source.ids[i] for i in findings.rotated], _MAX_NAMED)
        if findings.rotated
        else "none",
        "equal": "\n".join(_duplicates(found, found.exact, "exact duplicates")),
        "alike": "\n".join(
            _duplicates(found, found.near, f"near duplicates, up to {found.distance} of 64 bits")
        ),
        "ignored": _counts(list(source.ignored.items())),
        "warnings": "\n".join(found.warnings) or "none",
    }
    if len(findings.unreadable) > 1:
        rows["unreadable"] = f"{len(findings.unreadable):,}\n{rows['unreadable']}"
    return "\n".join(_facts(rows))


def _facts(rows: Mapping[str, str]) -> list[str]:
    """Aligned `name  text` lines; a text may have several lines."""
    lines = []
    for name, text in rows.items():
        first, *others = text.split("\n")
        lines += [f"{name:<12}{first}", *(f"{'':<12}{line}" for line in others)]
    return lines


def _division(division: Division) -> str:
    shares = " : ".join(f"{share:g}" for share in division.fractions)
    group = f", {printable(division.group)} stays together" if division.group else ""
    own = "" if division.keep_splits else ", whatever splits the data has already"
    return f"{shares}, {division.rule}, seed {division.seed}{group}{own}"


def _class_table(found: Survey) -> list[str]:
    """Images by class and split; of very many classes, the smallest and the largest."""
    counts = np.column_stack([found.counts, found.counts.sum(axis=1)])
    shown = np.arange(len(counts))
    if len(shown) > _MAX_CLASSES:
        by_size = np.argsort(counts[:, -1], kind="stable")
        shown = np.r_[by_size[: _MAX_CLASSES // 2], by_size[-_MAX_CLASSES // 2 :]]
    names = [_shorten(printable(found.source.class_names[label]), 32) for label in shown]
    width = max(map(len, ["class", *names]))

    def line(name: str, columns: Sequence[str]) -> str:
        return "  ".join([f"{name:<{width}}", *(f"{column:>10}" for column in columns)])

    rows = [line(name, [f"{n:,}" for n in counts[i]]) for name, i in zip(names, shown, strict=True)]
    if len(shown) < len(counts):
        between = count(len(counts) - len(shown), "class", "classes")
        rows.insert(_MAX_CLASSES // 2, f"... {between} between")
    total = line("all", [f"{n:,}" for n in counts.sum(axis=0)])
    return [line("class", [*SPLITS, "all"]), *rows, total]


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _resolutions(found: Survey) -> str:
    resolutions = found.resolutions
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


def _aspect_ratios(found: Survey) -> str:
    ratios = found.aspect_ratios
    if not len(ratios):
        return "none"
    low, median, high = np.quantile(ratios, (0, 0.5, 1))
    return f"width / height from {low:.3g} to {high:.3g}, median {median:.3g}"


def _channels(found: Survey) -> str:
    if found.mean is None or found.std is None:
        return "none"
    mean, std = (" ".join(f"{x:.2f}" for x in values) for values in (found.mean, found.std))
    return f"mean {mean}, standard deviation {std} (R G B, grey levels 0 to 255)"


def _duplicates(found: Survey, clusters: Sequence[Cluster], noun: str) -> list[str]:
    """How many there are, and the first few clusters."""
    if not clusters:
        return [f"no {noun}"]
    labels = sum(cluster.different_labels for cluster in clusters)
    splits = sum(cluster.different_splits for cluster in clusters)
    images = sum(len(cluster.images) for cluster in clusters)
    lines = [
        f"{count(len(clusters), 'set')} of {noun} ({images:,} images): {labels:,} with different "
        f"labels, {splits:,} in different splits"
    ]
    for cluster in clusters[:_MAX_SHOWN]:
        marks = [
            *(["different labels"] if cluster.different_labels else []),
            *(["different splits"] if cluster.different_splits else []),
        ]
        names = _some([found.source.ids[i] for i in found.varied(cluster)], _MAX_NAMED)
        lines.append(f"  {names}" + (f" ({', '.join(marks)})" if marks else ""))
    if len(clusters) > _MAX_SHOWN:
        lines.append(f"  ... {len(clusters) - _MAX_SHOWN:,} more; --json has them all")
    return lines


def _counts(counts: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{printable(name)} {number:,}" for name, number in counts) or "none"


def _some(names: Sequence[str], limit: int) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - limit
    shown = ", ".join(printable(name) for name in names[:limit]) or "none"
    return shown + (f" and {rest:,} more" if rest > 0 else "")


def _fractions(text: str) -> tuple[float, ...]:
    """The argparse type of `--split`."""
    try:
        shares = tuple(float(share) for share in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) != len(SPLITS) or min(shares) <= 0 or not math.isclose(sum(shares), 1.0):
        raise argparse.ArgumentTypeError(
            "must be three shares for train, validation and test, each above 0, that sum to 1, "
            f"such as 0.7,0.2,0.1, got {text!r}"
        )
    return shares


def _int(low: int, high: int | None = None) -> Callable[[str], int]:
    """The argparse type of an integer in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            wanted = f"{low} or more" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be an integer, {wanted}, got {text!r}")
        return value

    return parse


def _white_level(text: str) -> float:
    """The argparse type of `--white_level`."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, 0 or more, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    """The command's flags; how it divides by default is how training does."""
    flags = argparse.ArgumentParser(
        prog="cnn_jax inspect",
        description="Look at a data set before training.",
        allow_abbrev=False,
    )
    default = Division()
    shares = ",".join(f"{share:g}" for share in default.fractions)
    flags.add_argument("--source", required=True, help=SOURCE_FORMS)
    flags.add_argument("--output", type=cli.path, metavar="DIR", help="folder for a page to write")
    flags.add_argument("--json", action="store_true", help="print JSON instead of the summary")
    flags.add_argument(
        "--seed", type=_int(0, 2**32 - 1), default=default.seed, help="of the division"
    )
    flags.add_argument(
        "--split",
        type=_fractions,
        default=default.fractions,
        metavar="SHARES",
        help=f"of train, validation and test, {shares} if not given",
    )
    flags.add_argument(
        "--stratify", choices=SPLIT_RULES, default=default.rule, help="data.stratify"
    )
    flags.add_argument(
        "--group", default=default.group, help="what stays together, such as {class}/{track}"
    )
    flags.add_argument(
        "--keep_splits",
        action=argparse.BooleanOptionalAction,
        default=default.keep_splits,
        help="whether the splits that the data has already are kept",
    )
    flags.add_argument(
        "--max_pixels", type=_int(1), default=MAX_PIXELS, help="a larger image is unreadable"
    )
    flags.add_argument(
        "--white_level",
        type=_white_level,
        default=0.0,
        help="data.white_level: the value that is white in 16-bit and float images",
    )
    flags.add_argument(
        "--allow_outside",
        action="store_true",
        help="follow links and paths out of the data's folder",
    )
    flags.add_argument(
        "--distance",
        type=_int(0, MAX_DISTANCE),
        default=NEAR_DISTANCE,
        help="bits of 64 in which the hashes of near duplicates may differ",
    )
    return flags


def _create_output(output: str, source: str) -> pathlib.Path:
    """The folder for the page.

    Raises:
      ConfigError: It cannot be created, or has images of the data.
    """
    folder = pathlib.Path(output)
    data = listed_folder(source)
    if data is not None:
        check_output("--output", folder, data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: cannot create {output}: {error.strerror}") from error
    return folder


def main(argv: Sequence[str]) -> None:
    flags = parser().parse_args(argv)
    console = Console()
    source = absolute(flags.source)
    listing = open_source(source, console.track, flags.allow_outside)
    # Before the pass, which may take long.
    output = None if flags.output is None else _create_output(flags.output, source)
    division = Division(flags.split, flags.seed, flags.stratify, flags.group, flags.keep_splits)
    found = survey(
        listing, division, flags.max_pixels, flags.distance, console.track, flags.white_level
    )
    if output is not None:
        from cnn_jax.report.inspection import write_page

        page = write_page(found, output, console.track)
        console.print(f"wrote {page}")
    with cli.open_output(None) as file:
        # File names need not be UTF-8; escaped, they are JSON whatever they are.
        text = json.dumps(found.to_dict(), indent=1) if flags.json else summarize(found)
        file.write(text + "\n")


if __name__ == "__main__":
    cli.run(main)
