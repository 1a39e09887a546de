"""Functions that read configuration files and `--config` flags before JAX is imported."""

import argparse
import contextlib
import importlib.machinery
import importlib.util
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import textwrap
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cnn_jax.config.schema import (
    Config,
    check_key,
    check_value,
    closest_key,
    default_config,
    flat,
    keys,
    path_source,
    wrong_value,
)
from cnn_jax.models import NETWORKS
from cnn_jax.system.cli import Parser
from cnn_jax.system.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

_PREFIX = "--config."
# The folders of the configurations and search spaces that ship with this package. A wheel contains
# these folders inside the package, and a checkout contains them beside the package.
_SHIPPED = {"configs": "configs", "spaces": "experiments/spaces"}


def shipped_folder(name: str = "configs") -> pathlib.Path:
    """Returns the folder of the configurations or search spaces that ship with this package.

    Args:
      name: "configs" or "spaces".
    """
    package = pathlib.Path(__file__).resolve().parents[1]
    folders = (package / name, package.parent / _SHIPPED[name])
    return next(folder for folder in folders if (folder / "default.py").is_file())


def shipped_names(folder: str = "configs") -> list[str]:
    """Returns the names, without ".py", of the configurations or search spaces of this package."""
    return sorted(path.stem for path in shipped_folder(folder).glob("[!_]*.py"))


def find(text: str, flag: str = "--config", folder: str = "configs") -> pathlib.Path:
    """Returns the path of the file that the flag `--config=text` or `--space=text` names.

    Args:
      text: A path (with or without `.py`), the folder of a run, which contains config.json,
        or the name of a shipped file, also as `NAME.py`, `configs/NAME.py` and
        `experiments/spaces/NAME.py`.
      flag: The flag, for messages.
      folder: The shipped folder, "configs" or "spaces".

    Raises:
      ConfigError: There is no such file, or the text is both the path of a file and the name of
        a shipped file.
    """
    path = pathlib.Path(text).expanduser()
    if path.is_file():
        return path
    candidates = [path.with_name(f"{path.name}.py")] if path.name else []
    if folder == "configs":
        candidates.append(path / "config.json")
    own = next((candidate for candidate in candidates if candidate.is_file()), None)
    shipped = shipped_folder(folder) / f"{path.name.removesuffix('.py')}.py"
    parent = os.path.dirname(text)  # noqa: PTH120  "./NAME" never means a shipped file.
    is_shipped = parent in ("", _SHIPPED[folder]) and shipped.is_file()
    if own is not None and is_shipped and not own.samefile(shipped):
        raise ConfigError(
            f"{flag}: {text!r} is a file here and the name of a shipped file; write "
            f"{flag}=./{own} or {flag}={shipped}"
        )
    if own is not None or is_shipped:
        return own or shipped
    names = shipped_names(folder)
    hint = did_you_mean(path.name.removesuffix(".py"), names)
    problem = (
        f"{text!r} is a folder without a config.json"
        if path.is_dir()
        else f"there is no file {text!r}"
    )
    raise ConfigError(f"{flag}: {problem}; the shipped files are {', '.join(names)}{hint}")


def read(path: pathlib.Path) -> Config:
    """Reads a configuration file.

    Args:
      path: A Python file with a function `get_config()` that returns an
        `ml_collections.ConfigDict`, or the config.json of a run.

    Raises:
      ConfigError: The file raises an error, or does not contain a configuration.
    """
    if path.suffix == ".json":
        return _read_json(path)
    from ml_collections import ConfigDict

    try:
        with _importable(path):
            module = _run(path, "configs.__main__")
            if not callable(getattr(module, "get_config", None)):
                raise ConfigError(f"--config: {path} has no function get_config")
            config = module.get_config()
    except ConfigError:
        raise
    except SyntaxError as error:
        where = f"{error.filename or path}" + (f", line {error.lineno}" if error.lineno else "")
        raise ConfigError(f"--config: {where}: SyntaxError: {error.msg}") from error
    except (Exception, SystemExit) as error:  # The file is a program, which may raise any error.
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise ConfigError(f"--config: {where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"--config: {path}: get_config must return an ml_collections.ConfigDict, got "
            f"{type(config).__name__}"
        )
    return config


def _run(path: pathlib.Path, name: str) -> types.ModuleType:
    """Runs a file as a module, and adds the module to `sys.modules` under a name."""
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importable(path: pathlib.Path) -> Iterator[None]:
    """Lets a configuration file import other configuration files inside this context.

    The file is a module of a package `configs`, which consists of the file's own folder, of
    parent folders with the name `configs`, and of the shipped configurations. Therefore
    `from configs import default`, `from . import default` and `import neighbour` work. The
    context manager restores `sys.modules` and `sys.path` when the context ends.
    """
    folder = path.resolve().parent
    package = types.ModuleType("configs")
    above = [parent for parent in folder.parents if parent.name == "configs"]
    package.__path__ = [str(path) for path in (folder, *above, shipped_folder())]
    modules, paths = dict(sys.modules), list(sys.path)
    _forget_configs()
    sys.modules["configs"] = package
    # A console script, unlike `python -m`, cannot import modules from the working directory.
    sys.path[:0] = [str(folder), str(pathlib.Path.cwd())]
    try:
        namesake = shipped_folder() / path.name
        if namesake.is_file() and not namesake.samefile(path):
            # A user's file such as default.py can import the shipped file of the same name, because
            # the shipped file is imported first.
            setattr(package, path.stem, _run(namesake, f"configs.{path.stem}"))
        yield
    finally:
        sys.path[:] = paths
        _forget_configs()
        for name in sys.modules.keys() - modules.keys():
            file = getattr(sys.modules[name], "__file__", None)
            if file and pathlib.Path(file).resolve().parent == folder:
                # Otherwise, a file in another folder could import this module by mistake.
                del sys.modules[name]
        sys.modules |= {name: modules[name] for name in modules if _is_config(name)}


def _is_config(module: str) -> bool:
    """Returns whether a module is the package `configs` or a module in `configs`."""
    return module == "configs" or module.startswith("configs.")


def _forget_configs() -> None:
    """Removes the package `configs` and its modules from the imported modules."""
    for name in [name for name in sys.modules if _is_config(name)]:
        del sys.modules[name]


def _read_json(path: pathlib.Path) -> Config:
    """Reads the config.json of a run; missing keys get their default values.

    Raises:
      ConfigError: The file is not JSON, or has a key that does not exist.
    """
    try:
        values = flat(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config: {path} is not a configuration: {error}") from error
    network = values.get("model.name", "cnn")
    try:
        check_value("model.name", network)
        for key in values:
            check_key(key, network)
    except ConfigError as error:
        raise ConfigError(f"--config: {path}: {error}") from error
    config = default_config(network)
    with config.ignore_type():
        config.update_from_flattened_dict(values)
    if missing := [key for key in keys(network) if key not in values]:
        logger.warning(
            "%s does not have %s: the defaults of configs/default.py are used",
            path,
            ", ".join(missing),
        )
    return config


def load(file: str, overrides: Sequence[str] | Mapping[str, str] = ()) -> Config:
    """Reads a configuration file and changes the values of some keys.

    Args:
      file: The value of `--config`; see `find`.
      overrides: `--config.KEY=VALUE` flags, or the values as text by key. If a key has
        several flags, the last one is used. A different model.name selects another
        section `model`, with the values that the file sets if that network has these keys.

    Raises:
      ConfigError: There is no such file, the file raises an error, or a key does not exist
        or does not accept its value.
    """
    from absl import flags
    from ml_collections import config_flags

    if not isinstance(overrides, Mapping):
        overrides = read_overrides(overrides)
    path = find(file)
    config = read(path)
    network = str(overrides.get("model.name", config.model.name))
    check_value("model.name", network)
    if network != config.model.name:
        config.model = network_section(network, config.model)
    for key in overrides:
        check_key(key, network)
    command = [sys.argv[0], *(f"--config.{key}={value}" for key, value in overrides.items())]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
    try:
        values(command)
    except flags.IllegalFlagValueError as error:
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?):", str(error), re.DOTALL)
        raise wrong_value(wrong[1], wrong[2], network) if wrong else error from error
    except (AttributeError, KeyError, TypeError, flags.Error) as error:
        raise ConfigError(f"--config: {path}: {error}") from error
    return values.config


def network_section(network: str, section: Config) -> Config:
    """Converts a section `model` to another network; keeps the changed values of common keys.

    Args:
      network: The name of the network.
      section: The section `model` of the other network. The values in it that differ from the
        other network's defaults are kept if `network` has these keys too.
    """
    changed = default_config(network).model
    defaults = default_config(section.name).model
    with changed.ignore_type():
        for key, value in section.items():
            if key != "name" and key in changed and value != defaults[key]:
                changed[key] = value
    return changed


# The functions below parse the command line.


def file_name(text: str) -> str:
    """Checks a file name for argparse; keeps a leading "./", which `pathlib.Path` would remove."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


class ConfigParser(Parser):
    """The parser of a command that accepts `--config` and `--config.KEY=VALUE` flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--config",
            type=file_name,
            default="default",
            metavar="FILE",
            help="a configuration file, RUN/config.json, or a shipped configuration (default)",
        )

    def parse_with_overrides(
        self, argv: Sequence[str]
    ) -> tuple[argparse.Namespace, dict[str, str]]:
        """Parses the flags of a command and its `--config.KEY=VALUE` flags.

        Args:
          argv: The arguments of the command.

        Returns:
          The command's own flags, and the values of configuration keys as text, by key. If a
          key has several flags, the last one is used.

        Raises:
          ConfigError: A flag or key does not exist, or a key has no value.
        """
        if {"-h", "--help"} & set(argv):
            self.formatter_class = argparse.RawDescriptionHelpFormatter
            width = shutil.get_terminal_size().columns - 2
            self.epilog = describe_keys(width, _config_name(argv))
        flags, others = self.parse_known_args(argv)
        return flags, read_overrides(others)

    def suggest(self, flag: str) -> str | None:
        """Returns a known flag that is similar to an unknown flag; None if no flag is similar.

        The flags of configuration keys, such as --config.KEY, are considered too.
        """
        if (near := super().suggest(flag)) is not None:
            return near
        key = closest_key(flag.removeprefix("--"))
        return f"{_PREFIX}{key}" if key else None

    def is_known(self, argument: str) -> bool:
        """Returns whether an argument is a flag of this command or of a configuration key."""
        return argument.startswith(_PREFIX) or super().is_known(argument)


def _config_name(argv: Sequence[str]) -> str:
    """Returns the value of the flag `--config`; does not check the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", default="default")
    with contextlib.suppress(argparse.ArgumentError):
        return parser.parse_known_args(argv)[0].config
    return "default"


def read_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Parses flags `--config.KEY=VALUE` or `--config.KEY VALUE`; returns the values by key.

    Raises:
      ConfigError: A key does not exist or has no value, or an argument is not such a flag.
    """
    overrides = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith(_PREFIX):
            raise _unexpected(argument)
        key, has_value, value = argument.removeprefix(_PREFIX).partition("=")
        check_key(key)
        if not has_value:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif isinstance(keys()[key].default, bool):
                value = "true"
            else:
                raise ConfigError(f"config.{key}: needs a value; write {_PREFIX}{key}=VALUE")
        overrides[key] = value
    return overrides


def _unexpected(argument: str) -> ConfigError:
    """Returns the error for an argument that is not a `--config.KEY` flag."""
    is_path = not argument.startswith("-") and os.path.lexists(argument)
    hint = f"write {_PREFIX}data.source={path_source(argument)}" if is_path else "see --help"
    return ConfigError(f"unexpected argument {argument!r}; {hint}")


def describe_keys(width: int, file: str = "default") -> str:
    """Returns the part of `--help` that describes all configuration keys, by section.

    Args:
      width: The number of columns of the terminal.
      file: The configuration whose values are shown; see `find`.
    """
    values = flat(read(find(file)))
    lines = textwrap.wrap(
        f"configuration keys, set by --config.KEY=VALUE, with the values of {find(file).name}:",
        width,
    )
    own_network = values.get("model.name", "cnn")
    shown = {"": dict(keys(own_network))}
    for network in NETWORKS:
        if network != own_network:
            shown[network] = {f"model.{name}": key for name, key in NETWORKS[network].keys.items()}
    indent = " " * 6
    for network, members in shown.items():
        section = ""
        for name, key in members.items():
            if name.rpartition(".")[0] != section:
                section = name.rpartition(".")[0]
                lines += ["", section + f" (with model.name={network})" * bool(network)]
            value = key.default if network else values.get(name, key.default)
            lines.append(f"  {name} = {value!r}")
            lines += textwrap.wrap(
                key.comment, width, initial_indent=indent, subsequent_indent=indent
            )
    lines += ["", *textwrap.wrap(f"shipped configurations: {', '.join(shipped_names())}", width)]
    return "\n".join(lines)
