"""The flag --registry of all commands that use a registry."""

import argparse
import os

from cnn_jax.system import cli
from cnn_jax.system.errors import ConfigError

_VARIABLE = "CNN_JAX_REGISTRY"


def add_registry_flag(parser: argparse._ActionsContainer) -> None:
    """Adds the flag --registry, whose default is the environment variable CNN_JAX_REGISTRY."""
    parser.add_argument(
        "--registry",
        type=location,
        default=os.environ.get(_VARIABLE) or None,
        metavar="DIR",
        help=f"a registry: a folder, or a URL such as s3://BUCKET/PATH (${_VARIABLE})",
    )


def required_registry(flags: argparse.Namespace) -> str:
    """Returns the registry that --registry names.

    Raises:
      ConfigError: The flag is missing.
    """
    if flags.registry is None:
        raise ConfigError(f"--registry is required, unless ${_VARIABLE} is set")
    return flags.registry


def location(text: str) -> str:
    """Parses a folder or a URL, and refuses an empty text; an argparse type."""
    return text if "://" in text else cli.path(text)


def margin(text: str) -> float:
    """Parses the difference in accuracy that a promotion accepts; an argparse type."""
    value = cli.fraction(text)
    if not 1e-4 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0.0001 and below 1, got {text!r}")
    return value
