"""Inspects a data set before training.

    cnn_jax inspect --source=folder:PATH [--output=DIR] [--json]

prints the contents of the data set and its problems, as text or as JSON. With `--output`,
the page DIR/index.html shows the same with pictures, and DIR/inspection.json has all results.
Files that cannot be read are listed; any number of them is allowed. Nothing else is written.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence

from cnn_jax.config.schema import SOURCE_FORMS, SPLIT_RULES, SPLITS
from cnn_jax.data import Track, no_track
from cnn_jax.data.duplicates import MAX_DISTANCE, NEAR_DISTANCE
from cnn_jax.data.files import check_output
from cnn_jax.data.preprocessing import MAX_PIXELS
from cnn_jax.data.sources import absolute, listed_folder, open_source
from cnn_jax.data.splits import Division
from cnn_jax.data.survey import Survey, survey
from cnn_jax.report.survey_text import summarize
from cnn_jax.system import cli
from cnn_jax.system.console import Console
from cnn_jax.system.errors import ConfigError
from cnn_jax.system.text import terminal_width


def inspect_source(
    source: str,
    division: Division | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    allow_outside: bool = False,
    distance: int = NEAR_DISTANCE,
    track: Track = no_track,
    white_level: float = 0.0,
    output: str | None = None,
) -> Survey:
    """Reads every image of a source once and describes the data set.

    Args:
      source: A source in one of the forms `schema.SOURCE_FORMS`.
      division: How training would divide the data; by default as `configs/default.py` does.
      max_pixels: A larger image counts as unreadable.
      allow_outside: Whether links in a folder, or paths in a table, may lead out of the folder.
      distance: Two images are near duplicates if at most this number of the 64 bits of their
        perceptual hashes differ.
      track: Shows progress.
      white_level: `data.white_level`.
      output: The folder for an HTML page; by default no page is written.

    Returns:
      The survey. `to_dict` gives it as JSON types, `survey_text.summarize` as text.

    Raises:
      ConfigError: The source has none of the forms, `division.group` is not a pattern, or the
        folder for the page cannot be created or contains images of the data.
      DataError: The source does not exist, or is not a set of labelled images, or an id does
        not match the pattern of groups.
    """
    source = absolute(source)
    listing = open_source(source, track, allow_outside)
    # Create the output folder before the images are read. Reading may take a long time, and a
    # problem with the folder should be reported at once.
    folder = None if output is None else _create_output(output, source)
    result = survey(listing, division or Division(), max_pixels, distance, track, white_level)
    if folder is not None:
        # This import loads Matplotlib, which is needed only for the page.
        from cnn_jax.report.inspection import write_page

        write_page(result, folder, track)
    return result


def _create_output(output: str, source: str) -> pathlib.Path:
    """Creates the folder for the HTML page.

    Raises:
      ConfigError: The folder cannot be created, or it contains images of the data.
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


def _fractions(text: str) -> tuple[float, ...]:
    """Parses the value of `--split` for argparse."""
    try:
        fractions = tuple(float(fraction) for fraction in text.split(","))
    except ValueError:
        fractions = ()
    if (
        len(fractions) != len(SPLITS)
        or min(fractions) <= 0
        or not math.isclose(sum(fractions), 1.0)
    ):
        raise argparse.ArgumentTypeError(
            "must be three fractions for train, validation and test, each above 0, that sum to "
            f"1, such as 0.7,0.2,0.1, got {text!r}"
        )
    return fractions


def _int(low: int, high: int | None = None) -> Callable[[str], int]:
    """Returns an argparse type: a function that parses an integer from `low` to `high`."""

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


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's flags, which have the same defaults as in training."""
    flags = cli.Parser(
        prog="cnn_jax inspect",
        description="Inspect a data set before training.",
    )
    default = Division()
    fractions = ",".join(f"{fraction:g}" for fraction in default.fractions)
    flags.add_argument("--source", required=True, help=SOURCE_FORMS)
    flags.add_argument("--output", type=cli.path, metavar="DIR", help="folder for a page")
    flags.add_argument("--json", action="store_true", help="print JSON instead of text")
    flags.add_argument(
        "--seed",
        type=_int(0, 2**32 - 1),
        default=default.seed,
        help="seed of the division: data.split_seed, or else the seed of the training",
    )
    flags.add_argument(
        "--split",
        type=_fractions,
        default=default.fractions,
        metavar="FRACTIONS",
        help=f"fractions of train, validation and test ({fractions})",
    )
    flags.add_argument(
        "--stratify", choices=SPLIT_RULES, default=default.rule, help="data.stratify"
    )
    flags.add_argument(
        "--group",
        default=default.group,
        help="data.group: images that stay together, such as {class}/{track}",
    )
    flags.add_argument(
        "--keep_splits",
        action=argparse.BooleanOptionalAction,
        default=default.keep_splits,
        help="use the splits that the data has already",
    )
    flags.add_argument(
        "--max_pixels", type=_int(1), default=MAX_PIXELS, help="a larger image is unreadable"
    )
    flags.add_argument(
        "--white_level",
        type=cli.number("a number, 0 or more", lambda value: value >= 0),
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
        help="maximum number of the 64 hash bits in which near duplicates differ",
    )
    return flags


def main(argv: Sequence[str]) -> None:
    flags = parser().parse_args(argv)
    console = Console()
    result = inspect_source(
        flags.source,
        Division(flags.split, flags.seed, flags.stratify, flags.group, flags.keep_splits),
        max_pixels=flags.max_pixels,
        allow_outside=flags.allow_outside,
        distance=flags.distance,
        track=console.track,
        white_level=flags.white_level,
        output=flags.output,
    )
    if flags.output is not None:
        console.print(f"wrote {pathlib.Path(flags.output) / 'index.html'}")
    with cli.open_output(None) as file:
        if flags.json:  # JSON escapes represent file names that are not valid UTF-8.
            text = json.dumps(result.to_dict(), indent=1)
        else:
            text = summarize(result, terminal_width(sys.stdout))
        file.write(text + "\n")


if __name__ == "__main__":
    cli.run(main)
