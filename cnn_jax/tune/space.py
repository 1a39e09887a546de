"""A search space: the configuration keys that a study varies, and their ranges."""

import ast
import math
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

import jax
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from cnn_jax.config import schema
from cnn_jax.config.schema import Config
from cnn_jax.system.errors import ConfigError

Space = Mapping[str, BaseDistribution]

# Sections of the configuration whose keys may differ between trials. The images and the epochs must
# be the same in all trials, because the trials are compared after each epoch.
_SECTIONS = ("augment.", "model.", "optimizer.", "train.")
_KEYS = ("precision", "data.image_size")
_NOT_VARIED = ("train.epochs", "train.patience", "train.monitor", "optimizer.decay_epochs")


def load_space(file: str, config: Config) -> dict[str, BaseDistribution]:
    """Calls `get_space()` of a Python file, and returns the search space, sorted by key.

    Args:
      file: The file; its function returns a dictionary from keys of the configuration to
        distributions of Optuna. A tuple among the choices of a key is written as text,
        such as "(16, 32, 64)".
      config: The valid configuration whose keys are varied.

    Raises:
      ConfigError: The file does not exist or fails, a key does not exist or cannot be
        varied, or a range contains an impossible value.
    """
    if not pathlib.Path(file).is_file():
        raise ConfigError(f"--space: there is no file {file!r}")
    try:
        functions = runpy.run_path(file)
        space = functions["get_space"]() if "get_space" in functions else None
    except (Exception, SystemExit) as error:  # The file is Python code, which can raise any error.
        raise ConfigError(f"--space: {file}: {type(error).__name__}: {error}") from error
    if "get_space" not in functions:
        raise ConfigError(f"--space: {file} has no function get_space")
    if not isinstance(space, dict) or not space:
        raise ConfigError(f"--space: {file}: get_space must return a dictionary that is not empty")
    try:
        for key, distribution in space.items():
            _check(str(key), distribution, config)
        _check_combinations(space, config)
    except ConfigError as error:
        raise ConfigError(f"--space: {file}: {error}") from error
    return dict(sorted(space.items()))


def _check(key: str, distribution: Any, config: Config) -> None:
    """Raises ConfigError if a study cannot vary the key with this distribution."""
    schema.check_key(key, config.model.name)
    if key in _NOT_VARIED or not (key in _KEYS or key.startswith(_SECTIONS)):
        raise ConfigError(f"config.{key}: must be the same in all trials of a study")
    kinds = FloatDistribution | IntDistribution | CategoricalDistribution
    if not isinstance(distribution, kinds):
        raise ConfigError(
            f"config.{key}: must be a FloatDistribution, IntDistribution or "
            f"CategoricalDistribution of Optuna, got {distribution!r}"
        )
    current = _values(config)[key]
    for value in _extremes(distribution):
        if isinstance(value, tuple | list):
            raise ConfigError(
                f'config.{key}: a tuple among the choices is written as text, such as "(16, 32)"'
            )
        schema.check_value(key, _parse(value, current))


def _check_combinations(space: Space, config: Config) -> None:
    """Raises ConfigError if a key's value is invalid in every tested combination with other keys.

    Values of two keys may contradict each other; a trial with such values fails. But each bound
    or choice of a key must be valid with the configuration's values of the other keys, or with
    the lowest or the highest values of the other keys.
    """
    ends = [
        {key: _extremes(distribution)[end] for key, distribution in space.items()}
        for end in (0, -1)
    ]
    for key, distribution in space.items():
        for value in _extremes(distribution):
            errors = []
            for others in ({}, *ends):
                try:
                    schema.validate(configured(config, {**others, key: value}), jax.device_count())
                except ConfigError as error:
                    errors.append(error)
            if len(errors) == 1 + len(ends):
                raise errors[0]


def _extremes(distribution: BaseDistribution) -> list[Any]:
    """Returns all choices of a categorical distribution, or the two ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def _values(config: Config) -> dict[str, Any]:
    """Returns the values of all keys, with data.image_size as (height, width)."""
    return schema.flat(config) | {"data.image_size": schema.image_size(config)}


def _parse(value: Any, current: Any) -> Any:
    """Converts a value of a search space to a configuration value, for example text to a tuple."""
    if isinstance(current, tuple | list) and isinstance(value, str):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value  # A later check of the configuration reports this value.
    return value


def configured(config: Config, params: Mapping[str, Any]) -> Config:
    """Returns a copy of the configuration with the values of `params`."""
    changed = config.copy_and_resolve_references()
    current = _values(config)
    with changed.ignore_type():
        for key, value in params.items():
            section, _, name = key.rpartition(".")
            changed_section = changed[section] if section else changed
            changed_section[name] = _parse(value, current[key])
    return changed


def base_values(config: Config, space: Space) -> dict[str, Any]:
    """Returns the values of the configuration that are in the search space, by key.

    The values have the form of the space: for example, a tuple is a text.
    """
    found = {}
    for key, value in _values(config).items():
        distribution = space.get(key)
        if isinstance(distribution, CategoricalDistribution):
            for choice in distribution.choices:
                if _values(configured(config, {key: choice}))[key] == value:
                    found.setdefault(key, choice)
        elif distribution is not None:
            # A range of data.image_size contains the sides of squares.
            sides = set(value) if isinstance(value, tuple) else {value}
            if len(sides) == 1 and _is_in_range(min(sides), distribution):
                found[key] = min(sides)
    return found


def _is_in_range(value: float, distribution: BaseDistribution) -> bool:
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    steps = (value - distribution.low) / (distribution.step or math.inf)
    is_on_step = math.isclose(steps, round(steps), abs_tol=1e-8)
    return distribution.low <= value <= distribution.high and is_on_step


def describe(distribution: BaseDistribution) -> dict[str, Any]:
    """Returns a distribution as a JSON value with its kind and its range or choices."""
    if isinstance(distribution, CategoricalDistribution):
        return {"kind": "categorical", "choices": list(distribution.choices)}
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    kind = "int" if isinstance(distribution, IntDistribution) else "float"
    described = {"kind": kind, "low": distribution.low, "high": distribution.high}
    step = distribution.step
    has_step = step is not None and not (kind == "int" and step == 1)
    return described | {"log": distribution.log} | ({"step": step} if has_step else {})


def short(value: Any) -> str:
    """Formats a value for a line of text; a float has three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
