"""What a configuration may say, checked before any data is read."""

import dataclasses
import hashlib
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from cnn_jax.config import files
from cnn_jax.config.files import Config, check_key
from cnn_jax.data.augment import FLIPS
from cnn_jax.data.dataset import RESIDENCIES
from cnn_jax.data.decode import LARGEST_MAX_PIXELS
from cnn_jax.data.pipeline import BALANCES
from cnn_jax.data.preprocessing import INTERPOLATIONS, RESIZES
from cnn_jax.data.sources import FORMS, PATTERN, absolute
from cnn_jax.data.splits import RULES, SPLITS, group_expression
from cnn_jax.models import MODELS, compute_dtype
from cnn_jax.system.errors import ConfigError

MONITORS = tuple(f"validation_{name}" for name in ("accuracy", "precision", "recall", "f1", "loss"))
# How much of the report a run makes at its end.
DETAILS = ("full", "figures", "none")


@dataclasses.dataclass(frozen=True)
class _Field:
    """What one key may hold: a test, and the same in words."""

    requirement: str
    accepts: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _int(low: int) -> _Field:
    return _Field(f"an integer, {low} or more", lambda v: _is_int(v) and v >= low)


def _number(requirement: str, accepts: Callable[[float], bool]) -> _Field:
    return _Field(f"a number {requirement}", lambda v: _is_number(v) and accepts(v))


def _numbers(count: int, requirement: str, accepts: Callable[[float], bool]) -> _Field:
    def all_accepted(value: Any) -> bool:
        is_sequence = isinstance(value, tuple | list) and len(value) == count
        return is_sequence and all(_is_number(v) and accepts(v) for v in value)

    return _Field(f"{count} numbers {requirement}", all_accepted)


def _choice(options: tuple[str, ...]) -> _Field:
    return _Field(f"one of {', '.join(options)}", lambda v: v in options)


def _boolean() -> _Field:
    return _Field("True or False", lambda v: isinstance(v, bool))


def _is_group(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return not value or bool(group_expression(value))
    except ConfigError:
        return False


_FIELDS: dict[str, _Field] = {
    "seed": _Field("an integer from 0 to 2**32 - 1", lambda v: _is_int(v) and 0 <= v < 2**32),
    "precision": _choice(("auto", "float32", "bfloat16")),
    "data.source": _Field(
        FORMS,
        lambda v: isinstance(v, str) and bool(PATTERN.fullmatch(v)),
    ),
    "data.split": _Field(
        "three shares for train, validation and test, each above 0, that sum to 1",
        lambda v: _numbers(3, "", lambda share: share > 0).accepts(v) and math.isclose(sum(v), 1.0),
    ),
    "data.stratify": _choice(RULES),
    "data.group": _Field("a pattern such as {class}/{track}, or empty", _is_group),
    "data.keep_splits": _boolean(),
    "data.image_size": _Field(
        "a side in pixels, or (height, width), each 1 or more",
        lambda v: all(_is_int(side) and side > 0 for side in _pair(v)) and len(_pair(v)) == 2,
    ),
    "data.resize": _choice(RESIZES),
    "data.crop_ratio": _number("above 0, at most 1", lambda v: 0 < v <= 1),
    "data.interpolation": _choice(INTERPOLATIONS),
    "data.mean": _numbers(3, "from 0 to 255", lambda v: 0 <= v <= 255),
    "data.std": _numbers(3, "above 0", lambda v: v > 0),
    "data.cache": _choice(("auto", *RESIDENCIES)),
    "data.workers": _int(-1),
    "data.max_pixels": _Field(  # The upper end is Pillow's own limit.
        f"an integer from 1 to {LARGEST_MAX_PIXELS}",
        lambda v: _is_int(v) and 1 <= v <= LARGEST_MAX_PIXELS,
    ),
    "data.white_level": _number("0 (by the file) or more", lambda v: v >= 0),
    "data.max_unreadable": _number("from 0 to 1", lambda v: 0 <= v <= 1),
    "data.allow_outside": _boolean(),
    "augment.flip": _choice(FLIPS),
    "augment.rotation": _number("from 0 to 1 (a full turn)", lambda v: 0 <= v <= 1),
    "augment.zoom": _number("from 0 to below 1", lambda v: 0 <= v < 1),
    "augment.contrast": _number("from 0 to 1", lambda v: 0 <= v <= 1),
    "augment.mixup_probability": _number("from 0 to 1", lambda v: 0 <= v <= 1),
    "augment.mixup_alpha": _number("above 0", lambda v: v > 0),
    "augment.cutmix_probability": _number("from 0 to 1", lambda v: 0 <= v <= 1),
    "augment.cutmix_alpha": _number("above 0", lambda v: v > 0),
    "augment.place": _choice(("auto", "host", "device")),
    "model.name": _choice(tuple(MODELS)),
    "model.features": _Field(
        "one or more channel counts, each 1 or more",
        lambda v: (
            isinstance(v, tuple | list) and len(v) > 0 and all(_is_int(n) and n > 0 for n in v)
        ),
    ),
    "model.dense": _int(0),
    "model.dropout": _number("from 0 to below 1", lambda v: 0 <= v < 1),
    "model.batch_norm": _boolean(),
    "optimizer.learning_rate": _number("above 0", lambda v: v > 0),
    "optimizer.final_learning_rate": _number("0 or more", lambda v: v >= 0),
    "optimizer.decay_epochs": _int(0),
    "optimizer.warmup_epochs": _number("0 or more", lambda v: v >= 0),
    "optimizer.l2": _number("0 or more", lambda v: v >= 0),
    "train.batch_size": _int(1),
    "train.steps_per_execution": _int(0),
    "train.accumulation_steps": _int(1),
    "train.epochs": _int(1),
    "train.label_smoothing": _number("from 0 to below 1", lambda v: 0 <= v < 1),
    "train.balance": _choice(BALANCES),
    "train.patience": _int(1),
    "train.monitor": _choice(MONITORS),
    "checkpoint.keep": _int(1),
    "checkpoint.every_steps": _int(0),
    "checkpoint.restore_step": _int(0),
    "checkpoint.init_from": _Field("a path, or empty", lambda v: isinstance(v, str)),
    "report.detail": _choice(DETAILS),
    "report.splits": _Field(
        f"one or more of {', '.join(SPLITS)}, each once",
        lambda v: (
            isinstance(v, tuple | list) and len(v) == len(set(v)) > 0 and set(v) <= set(SPLITS)
        ),
    ),
    "mesh.data": _Field(
        "an integer, 1 or more, or -1", lambda v: _is_int(v) and (v >= 1 or v == -1)
    ),
    "mesh.model": _int(1),
}


def _pair(image_size: Any) -> tuple[Any, ...]:
    sides = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size,)
    return sides * 2 if len(sides) == 1 else sides


def image_size(config: Config) -> tuple[int, int]:
    """`data.image_size` as (height, width)."""
    height, width = _pair(config.data.image_size)
    return height, width


def load(file: str, overrides: Sequence[str] | Mapping[str, str] = ()) -> Config:
    """The configuration of a file, with some of its keys changed.

    Args:
      file: What `--config` takes; see `files.find`.
      overrides: `--config.KEY=VALUE` flags, of which the last of a key counts; or the values,
        as text, by key.

    Raises:
      ConfigError: There is no such file, it fails, or a key does not exist or cannot have
        this value.
    """
    if not isinstance(overrides, Mapping):
        overrides = files.read_overrides(overrides)
    path = files.find(file)
    config = files.read(path)
    command = [sys.argv[0], *(f"--config.{key}={value}" for key, value in overrides.items())]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
    try:
        values(command)
    except flags.IllegalFlagValueError as error:
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?):", str(error), re.DOTALL)
        raise wrong_value(*wrong.groups()) if wrong else error from error
    except (AttributeError, KeyError, TypeError, flags.Error) as error:
        raise ConfigError(f"--config: {path}: {error}") from error
    return values.config


def resolve(config: Config, present: Mapping[str, Any] | None = None) -> Config:
    """A copy in which everything that depends on the circumstances is written out.

    `precision` and `augment.place` are no longer "auto" and `optimizer.decay_epochs`
    no longer 0, and a folder's path is absolute, so that the same run means the same
    numbers elsewhere. (`train.steps_per_execution` may be 0 until the data is open.)

    Args:
      config: As a file under `configs/` gives it.
      present: The configuration, every key flat, of the run that goes on, if one
        does: what was automatic stays as it was decided then.

    Raises:
      ConfigError: Keys contradict each other.
    """
    present = present or {}
    resolved = config.copy_and_resolve_references()
    with resolved.ignore_type():
        if config.precision == "auto":
            resolved.precision = present.get("precision", compute_dtype("auto").name)
        if not config.optimizer.decay_epochs:
            resolved.optimizer.decay_epochs = present.get(
                "optimizer.decay_epochs", config.train.epochs
            )
        if not config.train.steps_per_execution:
            resolved.train.steps_per_execution = present.get("train.steps_per_execution", 0)
        if config.checkpoint.init_from:
            path = pathlib.Path(config.checkpoint.init_from).expanduser()
            resolved.checkpoint.init_from = str(path.resolve())
        resolved.data.source = absolute(config.data.source)
        resolved.data.image_size = image_size(config)
        if config.augment.place == "auto":
            # On a CPU, OpenCV works beside the step, which XLA would hold up.
            on_cpu = jax.default_backend() == "cpu"
            default = "host" if on_cpu else "device"
            resolved.augment.place = present.get("augment.place", default)
        if resolved.augment.place == "host" and config.data.cache == "device":
            raise ConfigError(
                "config.data.cache: what is on the device can only be augmented there; "
                "set augment.place=device too"
            )
    return resolved


def digest(config: Config) -> str:
    """The sha256, in hexadecimal, of a resolved configuration."""
    return hashlib.sha256(config.to_json(sort_keys=True).encode()).hexdigest()


def leaves(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of a configuration, its sections' names before it, and its value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def wrong_value(key: str, value: object) -> ConfigError:
    """The error for a value that this key may not have."""
    return ConfigError(f"config.{key}: must be {_FIELDS[key].requirement}, got {value!r}")


def check_value(key: str, value: object) -> None:
    """Raises ConfigError if this key, which exists, may not have this value."""
    if not _FIELDS[key].accepts(value):
        raise wrong_value(key, value)


def validate(config: Config, num_devices: int) -> None:
    """Checks every key and what the keys must be to each other.

    Args:
      config: As a file under `configs/` gives it.
      num_devices: How many devices a batch is divided among.

    Raises:
      ConfigError: A key is unknown, missing, of the wrong type or impossible.
    """
    values = dict(leaves(config))
    for key in values:
        check_key(key)
    for key, field in _FIELDS.items():
        if key not in values:
            raise ConfigError(f"config.{key}: is missing; it must be {field.requirement}")
        check_value(key, values[key])

    divisor = 2 ** (len(values["model.features"]) - 1)
    if any(side % divisor for side in image_size(config)):
        raise ConfigError(
            f"config.data.image_size: must be a multiple of {divisor}, so that "
            f"{len(values['model.features']) - 1} poolings can halve it, "
            f"got {values['data.image_size']!r}"
        )
    if values["data.crop_ratio"] != 1 and values["data.resize"] != "crop":
        raise ConfigError(
            "config.data.crop_ratio: must be 1 unless data.resize=crop, got "
            f"{values['data.crop_ratio']}"
        )
    if values["report.detail"] != "none" and len(values["report.splits"]) < len(SPLITS):
        raise ConfigError(
            "config.report.splits: must be all of them, which the report needs, or "
            "report.detail=none"
        )
    _check_mixing(values)
    _check_parallelism(values, num_devices)
    if values["optimizer.final_learning_rate"] > values["optimizer.learning_rate"]:
        raise ConfigError(
            "config.optimizer.final_learning_rate: must not be above optimizer.learning_rate = "
            f"{values['optimizer.learning_rate']}, got {values['optimizer.final_learning_rate']}"
        )
    decay = "optimizer.decay_epochs" if values["optimizer.decay_epochs"] else "train.epochs"
    if values["optimizer.warmup_epochs"] >= values[decay]:
        raise ConfigError(
            f"config.optimizer.warmup_epochs: must be below {decay} = "
            f"{values[decay]}, got {values['optimizer.warmup_epochs']}"
        )


def _check_mixing(values: Mapping[str, Any]) -> None:
    """Raises ConfigError if images cannot be mixed as often, or there is no other to mix with."""
    mixup, cutmix = values["augment.mixup_probability"], values["augment.cutmix_probability"]
    if mixup + cutmix > 1:
        raise ConfigError(
            "config.augment.cutmix_probability: must not be above 1 together with "
            f"augment.mixup_probability = {mixup}, got {cutmix}"
        )
    batch, parts = values["train.batch_size"], values["train.accumulation_steps"]
    if mixup + cutmix > 0 and batch < 2 * parts:
        raise ConfigError(
            "config.train.batch_size: must be at least twice train.accumulation_steps = "
            f"{parts}, so that an image has others to be mixed with, got {batch}"
        )


def _check_parallelism(values: Mapping[str, Any], num_devices: int) -> None:
    """Raises ConfigError if the devices cannot be arranged so, or not share the batch evenly."""
    model, data = values["mesh.model"], values["mesh.data"]
    if num_devices % model:
        raise ConfigError(
            f"config.mesh.model: must divide the number of devices, {num_devices}, got {model}"
        )
    shares = num_devices // model
    if data not in (-1, shares):
        raise ConfigError(
            f"config.mesh.data: {num_devices} devices with mesh.model = {model} make {shares}, "
            f"got {data}"
        )
    batch, parts = values["train.batch_size"], values["train.accumulation_steps"]
    if batch % (shares * parts):
        each = f"the {shares} devices that share it" if shares > 1 else ""
        times = f"train.accumulation_steps = {parts}" if parts > 1 else ""
        raise ConfigError(
            f"config.train.batch_size: must be a multiple of "
            f"{' times '.join(filter(None, (each, times)))}, got {batch}"
        )
