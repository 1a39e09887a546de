"""What all commands do alike at their start and end."""

import argparse
import contextlib
import logging
import os
import pathlib
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NoReturn

from cnn_jax.errors import ConfigError, UserError, printable

_STDOUT = 1  # The file descriptor.


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a command's `main` on the command line's arguments, and exits.

    The exit code is 0 when all was done, 2 after a usage or configuration error
    (argparse exits with 2 as well), 130 after Ctrl-C or SIGTERM, and 1 after any
    other failure. Of an error that the user can mend, one line is shown.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for library in ("absl", "tensorboardX"):  # Their warnings are not for users.
        logging.getLogger(library).setLevel(logging.ERROR)
    # Pillow warns of what it makes good; what it cannot is an error.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if sys.stdout is not None:  # File names need not be UTF-8.
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[attr-defined]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main(sys.argv[1:])
        code = 0
    except UserError as error:
        code = _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        print("interrupted" + (f": {error}" if error.args else ""), file=sys.stderr)
        code = 130
    except BrokenPipeError:  # Whoever read the output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        code = 0
    except OSError as error:
        if error.errno is None:
            raise
        code = _fail(f"{error.filename or 'a file'}: {error.strerror}", 1)
    sys.exit(code)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt  # So that SIGTERM cleans up as Ctrl-C does.


def _fail(message: str, code: int) -> int:
    print("error:", printable(" ".join(message.splitlines())), file=sys.stderr)
    return code


def path(text: str) -> str:
    """The argparse type of a path: not empty, and `~` is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return str(pathlib.Path(text).expanduser())


def share(text: str) -> float:
    """The argparse type of a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text!r}")
    return value


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[IO[str]]:
    """A text file to write to, or stdout if `path` is None.

    Raises:
      ConfigError: The file cannot be created, or stdout is closed.
    """
    if path is None:
        if sys.stdout is None:
            raise ConfigError("stdout is closed; name a file with --output")
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        file = pathlib.Path(path).open(  # noqa: SIM115
            "w", encoding="utf-8", errors="surrogateescape", newline=""
        )
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error.strerror}") from error
    with file:
        yield file
