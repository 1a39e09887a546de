"""Configuration files and `--config` flags, before anything heavy is imported.

`configs/default.py` is the only list of keys: it is run to know their names and defaults, and
read as text to show their comments.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import importlib.machinery
import importlib.util
import io
import json
import logging
import os
import pathlib
import shutil
import sys
import textwrap
import tokenize
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cnn_jax.system.errors import ConfigError

logger = logging.getLogger(__name__)

# An `ml_collections.ConfigDict`, whose keys a type checker cannot see.
Config = Any

_PREFIX = "--config."
# The least similarity (`difflib`, 0 to 1) of a name that is suggested. Below it lie other
# words of the same section, such as model.width beside model.dense.
_SIMILARITY = 0.75


# The folders that come with the package: in a wheel inside it, in a checkout beside it.
_SHIPPED = {"configs": "configs", "spaces": "experiments/spaces"}


def shipped_folder(name: str = "configs") -> pathlib.Path:
    """The folder of the shipped configurations, or of the shipped "spaces" of `tune`."""
    package = pathlib.Path(__file__).resolve().parents[1]
    folders = (package / name, package.parent / _SHIPPED[name])
    return next(folder for folder in folders if (folder / "default.py").is_file())


def shipped_names(folder: str = "configs") -> list[str]:
    """The names by which `find` knows the files of a shipped folder."""
    return sorted(path.stem for path in shipped_folder(folder).glob("[!_]*.py"))


def find(text: str, flag: str = "--config", folder: str = "configs") -> pathlib.Path:
    """The file that `--config=text` or `--space=text` means.

    Args:
      text: A path (with or without `.py`), the folder of a run, which has config.json, or the
        name of a shipped file, also as `NAME.py`, `configs/NAME.py` and
        `experiments/spaces/NAME.py`.
      flag: The flag, for messages.
      folder: The shipped folder, "configs" or "spaces".

    Raises:
      ConfigError: There is no such file, or a file and a shipped one share the name.
    """
    path = pathlib.Path(text).expanduser()
    if path.is_file():
        return path
    candidates = [path.with_name(f"{path.name}.py")] if path.name else []
    if folder == "configs":
        candidates.append(path / "config.json")
    own = next((candidate for candidate in candidates if candidate.is_file()), None)
    shipped = shipped_folder(folder) / f"{path.name.removesuffix('.py')}.py"
    parent = os.path.dirname(text)  # noqa: PTH120  "./NAME" is no shipped file.
    is_shipped = parent in ("", _SHIPPED[folder]) and shipped.is_file()
    if own is not None and is_shipped and not own.samefile(shipped):
        raise ConfigError(
            f"{flag}: {text!r} is a file here and the name of a shipped one; write "
            f"{flag}=./{own} or {flag}={shipped}"
        )
    if own is not None or is_shipped:
        return own or shipped
    names = shipped_names(folder)
    close = _closest(path.name.removesuffix(".py"), names)
    hint = f"; did you mean {close}?" if close else ""
    what = (
        f"{text!r} is a folder without a config.json"
        if path.is_dir()
        else f"there is no file {text!r}"
    )
    raise ConfigError(f"{flag}: {what}, and the shipped ones are {', '.join(names)}{hint}")


def read(path: pathlib.Path) -> Config:
    """The `ml_collections.ConfigDict` of a configuration file.

    Args:
      path: A Python file whose `get_config()` returns it, or the config.json of a run.

    Raises:
      ConfigError: The file fails, or is no configuration.
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
    except (Exception, SystemExit) as error:  # A configuration is a program: anything can fail.
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
    """Runs a file as a module of that name, which its own imports can see."""
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importable(path: pathlib.Path) -> Iterator[None]:
    """Lets a configuration file import other ones wherever it lies.

    The file is a module of a package `configs`, which consists of the file's own folder, of
    folders above it that have this name, and of the shipped configurations. So `from configs
    import default`, `from . import default` and `import neighbour` work. Modules and paths are
    afterwards as they were.
    """
    folder = path.resolve().parent
    package = types.ModuleType("configs")
    above = [parent for parent in folder.parents if parent.name == "configs"]
    package.__path__ = [str(place) for place in (folder, *above, shipped_folder())]
    modules, paths = dict(sys.modules), list(sys.path)
    _forget_configs()
    sys.modules["configs"] = package
    # A console script, unlike `python -m`, does not find the modules of the working directory.
    sys.path[:0] = [str(folder), str(pathlib.Path.cwd())]
    try:
        namesake = shipped_folder() / path.name
        if namesake.is_file() and not namesake.samefile(path):
            # A file that imports the shipped one of its own name does not import itself.
            setattr(package, path.stem, _run(namesake, f"configs.{path.stem}"))
        yield
    finally:
        sys.path[:] = paths
        _forget_configs()
        for name in sys.modules.keys() - modules.keys():
            file = getattr(sys.modules[name], "__file__", None)
            if file and pathlib.Path(file).resolve().parent == folder:
                del sys.modules[name]  # Another folder may have a neighbour of this name.
        sys.modules |= {name: modules[name] for name in modules if _is_config(name)}


def _is_config(module: str) -> bool:
    return module == "configs" or module.startswith("configs.")


def _forget_configs() -> None:
    for name in [name for name in sys.modules if _is_config(name)]:
        del sys.modules[name]


def _read_json(path: pathlib.Path) -> Config:
    """The configuration that a run has written, completed by the defaults.

    Raises:
      ConfigError: It is not JSON, or has a key that does not exist.
    """
    try:
        values = flat(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config: {path} is not a configuration: {error}") from error
    config = default_config()
    try:
        for key in values:
            check_key(key)
    except ConfigError as error:
        raise ConfigError(f"--config: {path}: {error}") from error
    with config.ignore_type():
        config.update_from_flattened_dict(values)
    if missing := [key for key in keys() if key not in values]:
        logger.warning(
            "%s does not have %s: the defaults of configs/default.py are used",
            path,
            ", ".join(missing),
        )
    return config


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of a nested dictionary with its sections' names before it; lists become tuples."""
    if not isinstance(tree, dict):
        value = tuple(tree) if isinstance(tree, list) else tree
        if not prefix:
            raise ValueError("it must be an object with a value for each key")
        return {prefix.removesuffix("."): value}
    return {
        name: value for key in tree for name, value in flat(tree[key], f"{prefix}{key}.").items()
    }


def default_config() -> Config:
    """A new copy of the configuration of `configs/default.py`."""
    return read(shipped_folder() / "default.py")


@functools.cache
def keys() -> Mapping[str, Any]:
    """All keys of a configuration, such as "train.epochs", with their defaults."""
    return flat(default_config().to_dict())


def check_key(key: str) -> None:
    """Raises ConfigError, with the nearest key, if no configuration has this one."""
    if any(name.startswith(f"{key}.") for name in keys()):
        raise ConfigError(f"config.{key}: is a section; set one of its keys")
    if key not in keys():
        near = closest_key(key)
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"config.{key}: there is no such key{hint}")


def closest_key(key: str) -> str | None:
    """The key that was probably meant, if there is one.

    That is the key of nearly this name in nearly this section, or else the only key of exactly
    this name.
    """
    section, _, name = key.rpartition(".")
    near_section = _closest(section, sorted({known.rpartition(".")[0] for known in keys()}))
    own = {_name(known): known for known in keys() if known.rpartition(".")[0] == near_section}
    if near := _closest(name, own):
        return own[near]
    same = [known for known in keys() if _name(known) == name]
    return same[0] if len(same) == 1 else None


def full_key(name: str) -> str:
    """The key of this name, which may be given without its section if no other key has it.

    Raises:
      ConfigError: There is no such key, or more than one.
    """
    same = [key for key in keys() if _name(key) == name]
    if name in keys() or not same:
        check_key(name)
        return name
    if len(same) > 1:
        raise ConfigError(f"config: {name!r} may be {' or '.join(same)}; write one of them")
    return same[0]


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _closest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=_SIMILARITY)), None)


# The command line.


def file_name(text: str) -> str:
    """The argparse type of what `find` takes; "./NAME" stays different from "NAME"."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """A command's own flags, and what its `--config.KEY=VALUE` flags say.

    Returns:
      The flags, and for each key that is given its value as text. The last value of a key
      counts.

    Raises:
      ConfigError: A flag or key does not exist, or a key has no value.
    """
    if {"-h", "--help"} & set(argv):
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = describe_keys(shutil.get_terminal_size().columns - 2)
    # Before argparse misses a flag that is required and misspelt.
    known = [flag for action in parser._actions for flag in action.option_strings]
    for argument in argv:
        flag = argument.partition("=")[0]
        if argument.startswith("--") and flag not in known and not flag.startswith(_PREFIX):
            raise _unexpected(argument, known)
    flags, others = parser.parse_known_args(argv)
    return flags, read_overrides(others)


def read_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """The value, as text, of each key that `--config.KEY=VALUE` or `--config.KEY VALUE` sets.

    Raises:
      ConfigError: There is no such key, it has no value, or an argument is something else.
    """
    overrides = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith(_PREFIX):
            raise _unexpected(argument, [])
        key, has_value, value = argument.removeprefix(_PREFIX).partition("=")
        check_key(key)
        if not has_value:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif isinstance(keys()[key], bool):
                value = "true"
            else:
                raise ConfigError(f"config.{key}: needs a value; write {_PREFIX}{key}=VALUE")
        overrides[key] = value
    return overrides


def _unexpected(argument: str, flags: Sequence[str]) -> ConfigError:
    """The error for an argument that means nothing, with the flag that was probably meant."""
    flag, equals, value = argument.partition("=")
    near = _closest(flag, flags)
    if near is None and flag.startswith("--") and (key := closest_key(flag[2:])):
        near = f"{_PREFIX}{key}"
    hint = f"did you mean {near}{equals}{value}?" if near else "see --help"
    return ConfigError(f"unexpected argument {argument!r}; {hint}")


def describe_keys(width: int) -> str:
    """All keys with default and comment, by section, as `configs/default.py` has them."""
    source = (shipped_folder() / "default.py").read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = textwrap.wrap(
        "configuration keys, set by --config.KEY=VALUE, with the defaults of default.py:", width
    )
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign(targets=[ast.Attribute(value=ast.Name(owner), attr=name)], value=value):
                key = name if owner == "config" else f"{owner}.{name}"
                lines += [f"  {key} = {ast.unparse(value)}"] if name != owner else []
                if comment := comments.get(node.end_lineno or node.lineno):
                    indent = " " * 6
                    lines += textwrap.wrap(
                        comment, width, initial_indent=indent, subsequent_indent=indent
                    )
            case ast.Assign(targets=[ast.Attribute(), ast.Name(section)]):
                lines += ["", section]
    lines += ["", *textwrap.wrap(f"shipped configurations: {', '.join(shipped_names())}", width)]
    return "\n".join(lines)
