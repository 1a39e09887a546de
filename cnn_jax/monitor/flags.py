"""The flags of `cnn_jax monitor` and `cnn_jax label` that name a version and its request log."""

import argparse
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable

import safetensors
import safetensors.numpy

from cnn_jax.inference.bundle import digest, find_bundle, read_reference, serialize_reference
from cnn_jax.monitor.rows import Rows, read_rows
from cnn_jax.monitor.windows import LAST, MAX_DROP, WINDOW
from cnn_jax.quality.drift import LEVEL
from cnn_jax.quality.reference import Reference
from cnn_jax.registry.flags import add_registry_flag
from cnn_jax.registry.ledger import CHAMPION, parse_reference
from cnn_jax.registry.registry import Registry
from cnn_jax.system import cli
from cnn_jax.system.atomic import write_bytes
from cnn_jax.system.errors import ConfigError, DataError

_SECONDS_PER_DAY = 86_400.0
# The key of the bundle's digest in the metadata of a file with reference statistics.
_DIGEST = "bundle"
_MIN_WINDOW = 20


@dataclasses.dataclass(frozen=True)
class Served:
    """The version that the flags name.

    Attributes:
      name: MODEL/VERSION in the registry, or the bundle's folder; for messages.
      digest: The digest of the bundle.
      reference: The reference statistics; None if the bundle has none.
    """

    name: str
    digest: str
    reference: Reference | None


def add_version_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a version: --registry, --model, --bundle and --reference."""
    add_registry_flag(parser)
    parser.add_argument(
        "--model",
        metavar="MODEL[@ALIAS|/VERSION]",
        help=f"a model of the registry, and a version; by default the alias {CHAMPION}",
    )
    parser.add_argument(
        "--bundle", type=cli.path, metavar="RUN", help="a run or a bundle, instead of a registry"
    )
    parser.add_argument(
        "--reference",
        type=cli.path,
        metavar="FILE",
        help="reference statistics of a bundle without them; `monitor --fit_reference` writes them",
    )


def add_log_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name rows of request logs: --log and --days."""
    cli.add_log_flag(parser)
    parser.add_argument(
        "--days",
        type=cli.number("above 0", lambda value: value > 0),
        metavar="DAYS",
        help="use only the rows of this number of days; by default all rows",
    )


def add_measure_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of the tests: --window, --last, --level and --max_drop."""
    parser.add_argument(
        "--window",
        type=_at_least(_MIN_WINDOW),
        default=WINDOW,
        metavar="N",
        help=f"number of images in a window, {_MIN_WINDOW} or more ({WINDOW})",
    )
    parser.add_argument(
        "--last",
        type=_at_least(2),  # An alarm needs two windows.
        default=LAST,
        metavar="N",
        help=f"number of latest windows to test, 2 or more ({LAST})",
    )
    parser.add_argument(
        "--level",
        type=cli.number("above 0 and at most 0.5", lambda value: 0 < value <= 0.5),
        default=LEVEL,
        metavar="P",
        help=f"probability that a window without drift differs ({LEVEL})",
    )
    parser.add_argument(
        "--max_drop",
        type=cli.fraction,
        default=MAX_DROP,
        metavar="RATIO",
        help=f"decrease of the accuracy that is accepted, 0 to 1 ({MAX_DROP})",
    )


def _at_least(least: int) -> Callable[[str], int]:
    """Returns an argparse type for integers that are not smaller than `least`."""

    def convert(text: str) -> int:
        if (number := cli.natural(text)) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {number}")
        return number

    return convert


def open_version(flags: argparse.Namespace) -> Served:
    """Returns the version that the flags name.

    Raises:
      ConfigError: The flags name no version.
      BundleError: The bundle is damaged.
      DataError: The file of --reference belongs to another bundle.
    """
    if flags.bundle is not None:
        if flags.model is not None:
            raise ConfigError("--model: is for --registry; --bundle already names the version")
        path = find_bundle(flags.bundle)
        name = str(flags.bundle)
        own_digest, reference = digest(path), read_reference(path)
    else:
        if not flags.registry or flags.model is None:
            raise ConfigError("--bundle, or --registry and --model, must be given")
        registry = Registry(flags.registry)
        model, selector = parse_reference(flags.model)
        version = registry.resolve(model, CHAMPION if selector is None else selector)
        name, own_digest = str(version), version.bundle.digest
        with tempfile.TemporaryDirectory(prefix="cnn_jax-") as directory:
            reference = read_reference(registry.fetch(version, directory))
    if flags.reference is not None:
        reference = load_reference(pathlib.Path(flags.reference), own_digest)
    return Served(name, own_digest, reference)


def open_rows(flags: argparse.Namespace, served: Served) -> Rows:
    """Reads the rows of a version that the flags name.

    Raises:
      ConfigError: No log is named.
      DataError: The log has no rows of the version, or cannot be read.
    """
    if not flags.log:
        raise ConfigError("--log must be given")
    since = 0.0 if flags.days is None else time.time() - flags.days * _SECONDS_PER_DAY
    return read_rows(flags.log, served.digest, since)


def save_reference(reference: Reference, bundle_digest: str, path: pathlib.Path) -> None:
    """Writes the reference statistics of a bundle that lacks them to a file.

    Raises:
      OSError: The file cannot be written.
    """
    write_bytes(path, serialize_reference(reference, {_DIGEST: bundle_digest}))


def load_reference(path: pathlib.Path, bundle_digest: str) -> Reference:
    """Reads a file of `save_reference`.

    Raises:
      DataError: The file cannot be read, or has the statistics of another bundle.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            own = (file.metadata() or {}).get(_DIGEST)
        reference = Reference.from_arrays(safetensors.numpy.load_file(path))
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise DataError(f"--reference: {path} cannot be read: {error}") from error
    if own != bundle_digest:
        raise DataError(
            f"--reference: {path} has the statistics of the bundle {str(own)[:12]}, not of "
            f"{bundle_digest[:12]}; write the file again with --fit_reference"
        )
    return reference
