"""Functions that all commands use to start and exit, to parse flags and to write output."""

import argparse
import codecs
import contextlib
import errno
import gc
import json
import logging
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NoReturn

from cnn_jax.system.errors import (
    COPY_FIRST,
    ConfigError,
    Interrupted,
    UserError,
    closest,
    did_you_mean,
    is_url,
    printable,
)
from cnn_jax.system.text import fill

_STDOUT = 1  # The file descriptor of stdout.
# The exit code EX_TEMPFAIL of sysexits.h: "temporary failure; the user is invited to retry".
START_AGAIN = 75
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
# The seconds of the units of `duration`.
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def run(main: Callable[[Sequence[str]], None], if_interrupted: int = 130) -> NoReturn:
    """Runs the `main` function of a command with the command-line arguments, and exits.

    A `UserError` is printed as one line.

    Args:
      main: The command; it takes the arguments without the program's name.
      if_interrupted: The exit code after Ctrl-C or SIGTERM.

    The other exit codes are 0 after success, 2 if the command line or the configuration must
    be changed, and 1 after any other failure.
    """
    # The imported objects are used until the end, so the collector need not visit them.
    gc.freeze()
    gc.enable()
    messages = logging.StreamHandler()
    messages.setFormatter(_MessageFormatter("%(levelname)s: %(message)s"))
    # force=True removes the handler that absl added when Orbax imported absl.
    logging.basicConfig(handlers=[messages], level=logging.WARNING, force=True)
    # Pillow, Orbax (through absl) and asyncio log errors that they also raise as exceptions.
    for library, level in (
        ("PIL", "CRITICAL"),
        ("absl", "CRITICAL"),
        ("asyncio", "CRITICAL"),
        ("tensorboardX", "ERROR"),
    ):
        logging.getLogger(library).setLevel(level)
    sys.unraisablehook = _hide_late_callback_errors
    # Pillow warns about a fault of an image if Pillow can correct the fault. All other faults raise
    # an error.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if sys.stdout is not None:
        codecs.register_error("cnn_jax.escape", _escape)
        sys.stdout.reconfigure(errors="cnn_jax.escape")  # type: ignore[attr-defined]
    for name in _INTERRUPTS:
        signal.signal(name, interrupt)
    are_all_done = False  # Whether all processes of the run have finished.
    try:
        main(sys.argv[1:])
        code, are_all_done = 0, True
    except UserError as error:
        code = _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        print("interrupted" + (f": {error}" if error.args else ""), file=sys.stderr)
        code, are_all_done = if_interrupted, isinstance(error, Interrupted)
    except BrokenPipeError:  # The program that reads stdout, such as `head`, has exited.
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        code = 0
    except OSError as error:
        if error.errno is None:
            raise
        where = error.filename or "a file"
        advice = "; free some space, then start the same command again" * (
            error.errno == errno.ENOSPC
        )
        code = _fail(f"{where}: {error.strerror}{advice}", 1)
    except Exception:
        if not _has_other_processes():
            raise
        traceback.print_exc()
        code = 1
    if not are_all_done and _has_other_processes():
        # A normal exit would wait for the other processes, which wait for this process.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    r"""A codec error handler that replaces a character that the encoding of stdout lacks.

    A byte of a file name that is not UTF-8 stays the same byte; any other character becomes
    an escape sequence, such as \u732b.
    """
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


class _MessageFormatter(logging.Formatter):
    """A formatter that wraps one-line log messages at the width of the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if "\n" in text else fit(text, sys.stderr)


def columns() -> int:
    """Returns $COLUMNS if it is set, else the width of the terminal, or 80 without a terminal."""
    return shutil.get_terminal_size().columns


def fit(text: str, file: Any) -> str:
    """Wraps a line at the terminal's width if `file` (a text file or None) is a terminal."""
    return fill(text, columns()) if file is not None and file.isatty() else text


def _hide_late_callback_errors(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hides errors that threads of TensorStore raise after Orbax has raised the real error."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def interrupt(signum: int, frame: object) -> NoReturn:
    """Raises KeyboardInterrupt for a command's first signal; a second signal ends the process."""
    for name in _INTERRUPTS:
        signal.signal(name, signal.SIG_DFL)
    raise KeyboardInterrupt


@contextlib.contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM inside the context.

    An interrupted import would raise a misleading error.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _has_other_processes() -> bool:
    """Returns whether `jax.distributed` connects this process to other processes."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _fail(message: str, code: int) -> int:
    message = printable(" ".join(message.splitlines()))
    print(fit(f"error: {message}", sys.stderr), file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """A parser that reports a usage error in one line and suggests a correction.

    A misspelt flag, choice or sub-command is reported before a missing flag. `run` exits with
    code 2 after such an error. Flags cannot be abbreviated.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        arguments = sys.argv[1:] if args is None else list(args)
        self._check_flags(arguments)
        return super().parse_known_args(arguments, namespace)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        flags, rest = self.parse_known_args(args, namespace)
        if rest:
            raise self.unexpected(rest[0])
        return flags

    def unexpected(self, argument: str) -> ConfigError:
        """Returns the error for an unknown argument, with a suggestion of a similar flag."""
        flag, equals, value = argument.partition("=")
        near = self.suggest(flag) if flag.startswith("-") else None
        hint = f"did you mean {near}{equals}{value}?" if near else "see --help"
        return ConfigError(f"unexpected argument {argument!r}; {hint}")

    def is_known(self, argument: str) -> bool:
        """Returns whether an argument such as --FLAG or --FLAG=VALUE is a flag of this command."""
        return argument.partition("=")[0] in self._option_string_actions

    def suggest(self, flag: str) -> str | None:
        """Returns the known flag that is most similar to a misspelt flag, or None."""
        return closest(flag, self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError for an error that argparse found."""
        message = re.sub(r"^argument ", "", message)
        required = re.match(r"the following arguments are required: (.*)", message)
        raise ConfigError(f"{required[1]}: is required; see --help" if required else message)

    def _check_flags(self, arguments: Sequence[str]) -> None:
        """Raises ConfigError for the first unknown flag.

        argparse itself would report a missing required flag first.
        """
        has_commands = self._subparsers is not None
        for argument in arguments:
            if argument == "--" or (has_commands and not argument.startswith("-")):
                # The parser of a sub-command checks the arguments after the sub-command's name.
                return
            if not argument.startswith("--"):
                continue
            if not self.is_known(argument):
                raise self.unexpected(argument)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Checks that a value is a valid choice for its flag, or the name of a sub-command."""
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        flag = "/".join(action.option_strings)
        what = f"{flag}: there is no" if flag else "there is no command"
        raise ConfigError(
            f"{what} {value!r}{did_you_mean(str(value), names)}; there are {', '.join(names)}"
        )


def path(text: str) -> str:
    """An argparse type that converts text to a path, and expands `~`."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if is_url(text):
        raise argparse.ArgumentTypeError(f"must be a path, got {text}; {COPY_FIRST}")
    return str(pathlib.Path(text).expanduser())


def add_bundle_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag --bundle, which names a trained network."""
    parser.add_argument(
        "--bundle",
        required=True,
        type=path,
        metavar="RUN",
        help="the folder of a run or of a bundle",
    )


def add_log_flag(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Adds the flag --log, which names request logs."""
    parser.add_argument(
        "--log",
        required=required,
        nargs="+",
        action="extend",
        type=path,
        metavar="DIR",
        help="request logs: the folders of the flag --request_log of the servers",
    )


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --bundle and the flags that name the images to read."""
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
        "--allow_outside", action="store_true", help="follow links that lead out of the folder"
    )


def natural(text: str) -> int:
    """An argparse type that converts text to an integer, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer, 0 or more, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """An argparse type that converts text to an integer, 1 or more."""
    number = natural(text)
    if not number:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def number(requirement: str, accepts: Callable[[float], bool]) -> Callable[[str], float]:
    """Returns an argparse type for numbers that meet a requirement.

    Args:
      requirement: The accepted numbers in words, for the message.
      accepts: A function that returns whether a number is accepted. The function is not called
        for infinity and NaN.
    """

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and accepts(value)):
            raise argparse.ArgumentTypeError(f"must be {requirement}, got {text!r}")
        return value

    return convert


fraction = number("from 0 to 1", lambda value: 0 <= value <= 1)
not_negative = number("0 or more", lambda value: value >= 0)


def duration(text: str) -> float:
    """An argparse type that converts a time such as 1h30m, or 90 for seconds, to seconds."""
    parts = re.fullmatch(r"(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s?)?", text)
    seconds = sum(
        int(part.rstrip("dhms")) * _SECONDS.get(part[-1], 1)
        for part in (parts.groups() if parts else ())
        if part
    )
    if not seconds:
        raise argparse.ArgumentTypeError(f"must be a time such as 90m or 1h30m, got {text!r}")
    return float(seconds)


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[IO[str]]:
    """Opens a text file for writing, or yields stdout if `path` is None.

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
    """Writes a value as JSON, in ASCII if the encoding of the file lacks a character."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=1, allow_nan=False)
    file.write(text + "\n")
