"""What all commands share: their start and end, flags, and output."""

import argparse
import codecs
import contextlib
import errno
import json
import logging
import os
import pathlib
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NoReturn

from cnn_jax.system.errors import ConfigError, Interrupted, UserError, printable
from cnn_jax.system.text import fill

_STDOUT = 1  # The file descriptor.
# EX_TEMPFAIL of sysexits.h: "temporary failure; the user is invited to retry".
START_AGAIN = 75
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def run(main: Callable[[Sequence[str]], None], if_interrupted: int = 130) -> NoReturn:
    """Runs a command's `main` on the command line's arguments, and exits.

    The exit code is 0 when all was done, 2 after a usage or configuration error
    (argparse exits with 2 as well), `if_interrupted` after Ctrl-C or SIGTERM, and 1
    after any other failure. Of an error that the user can mend, one line is shown.
    """
    messages = logging.StreamHandler()
    messages.setFormatter(_MessageFormatter("%(levelname)s: %(message)s"))
    # force=True removes the handler that absl added when Orbax imported it.
    logging.basicConfig(handlers=[messages], level=logging.WARNING, force=True)
    # Not for users: Orbax (by absl), asyncio and Pillow log what is raised as well.
    for library, level in (
        ("PIL", "CRITICAL"),
        ("absl", "CRITICAL"),
        ("asyncio", "CRITICAL"),
        ("tensorboardX", "ERROR"),
    ):
        logging.getLogger(library).setLevel(level)
    sys.unraisablehook = _hide_late_callbacks
    # Pillow warns of what it makes good; what it cannot is an error.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if sys.stdout is not None:
        codecs.register_error("cnn_jax.escape", _escape)
        sys.stdout.reconfigure(errors="cnn_jax.escape")  # type: ignore[attr-defined]
    for name in _INTERRUPTS:
        signal.signal(name, interrupt)
    are_all_done = False  # Of the processes of a run.
    try:
        main(sys.argv[1:])
        code, are_all_done = 0, True
    except UserError as error:
        code = _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        print("interrupted" + (f": {error}" if error.args else ""), file=sys.stderr)
        code, are_all_done = if_interrupted, isinstance(error, Interrupted)
    except BrokenPipeError:  # Whoever read the output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        code = 0
    except OSError as error:
        if error.errno is None:
            raise
        where = error.filename or "a file"
        advice = "; with room again, start the same command" * (error.errno == errno.ENOSPC)
        code = _fail(f"{where}: {error.strerror}{advice}", 1)
    except Exception:
        if not _is_one_of_many():
            raise
        traceback.print_exc()
        code = 1
    if not are_all_done and _is_one_of_many():
        # A normal exit would wait for the other processes, and they for this one.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    r"""The error handler of stdout: encodes a character that its encoding does not have.

    A byte of a file name that is not UTF-8 stays that byte; any other character becomes its
    escape, such as \u732b.
    """
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


class _MessageFormatter(logging.Formatter):
    """Formats a log record for stderr."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if "\n" in text else fit(text, sys.stderr)


def columns() -> int:
    """The width of the terminal ($COLUMNS, if set); 80 where there is none."""
    return shutil.get_terminal_size().columns


def fit(text: str, file: Any) -> str:
    """Breaks a line between words if `file`, a text file or None, is a terminal."""
    return fill(text, columns()) if file is not None and file.isatty() else text


def _hide_late_callbacks(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hides that threads of TensorStore find Orbax gone after it has raised why it failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def interrupt(signum: int, frame: object) -> NoReturn:
    """The signal handler of a command: the first one cleans up, the second ends it at once."""
    for name in _INTERRUPTS:
        signal.signal(name, signal.SIG_DFL)
    raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Signals come at the end of what is within: an import that is broken off says nonsense."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_one_of_many() -> bool:
    """Whether this process is connected to others by `jax.distributed`."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _fail(message: str, code: int) -> int:
    message = printable(" ".join(message.splitlines()))
    print(fit(f"error: {message}", sys.stderr), file=sys.stderr)
    return code


def path(text: str) -> str:
    """The argparse type of a path: not empty, and `~` is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return str(pathlib.Path(text).expanduser())


def add_bundle_flag(parser: argparse.ArgumentParser) -> None:
    """The flag --bundle of a command that uses a trained network."""
    parser.add_argument(
        "--bundle", required=True, type=path, metavar="RUN", help="a run, or its bundle RUN/bundle"
    )


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that reads images with a trained network."""
    add_bundle_flag(parser)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        type=path,
        metavar="INPUT",
        help="images, folders of images, and patterns such as 'photos/*.jpg'",
    )
    parser.add_argument(
        "--allow_outside", action="store_true", help="follow links out of the folder"
    )


def natural(text: str) -> int:
    """The argparse type of an integer, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer, 0 or more, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """The argparse type of an integer, 1 or more."""
    number = natural(text)
    if not number:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


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


def write_json(value: Any, file: IO[str]) -> None:
    """Writes a value as JSON, with escapes where the file's encoding lacks a character."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=1, allow_nan=False)
    file.write(text + "\n")
