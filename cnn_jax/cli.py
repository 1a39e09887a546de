"""What all commands do alike at their start and end."""

import contextlib
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from cnn_jax.errors import ConfigError, UserError


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command's `main` on the command line's arguments, and exits.

    The exit code is 0 when all was done, 2 after a usage or configuration error
    (argparse exits with 2 as well), 130 after Ctrl-C and 1 after any other
    failure. Of an error that the user can mend, one line is shown.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if error.args else ''}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[IO[str]]:
    """A text file to write to, or stdout if `path` is None.

    Raises:
      ConfigError: The file cannot be created.
    """
    if path is None:
        yield sys.stdout
        return
    try:
        file = pathlib.Path(path).open("w", encoding="utf-8", newline="")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error.strerror}") from error
    with file:
        yield file
