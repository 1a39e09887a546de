"""All keys of a configuration, with their defaults, checks and meanings.

This is the only list of keys. `configs/default.py`, `--help` and the checks of files and flags
are derived from it. The keys of a network are in `cnn_jax.models`. This module does not import
JAX, so that a wrong key is reported at once.
"""

import functools
import hashlib
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from cnn_jax.config.keys import (
    Key,
    boolean,
    choice,
    fraction,
    fraction_below_one,
    integer,
    is_int,
    number,
    numbers,
    positive,
    text,
)
from cnn_jax.models import NETWORKS
from cnn_jax.system.errors import COPY_FIRST, URL, ConfigError, closest, did_you_mean, is_url

# The type of a configuration, which is an `ml_collections.ConfigDict`. The type is Any, because a
# type checker cannot know the keys of a ConfigDict.
Config = Any

SPLITS = ("train", "validation", "test")
# The allowed values of the key data.stratify.
SPLIT_RULES = ("stable", "exact")
# The places where decoded pixels can be kept: nowhere (images are decoded each time), in the cache
# on disk, in memory, or on the device.
RESIDENCIES = ("none", "disk", "memory", "device")
# The keys of the section `data` that can get their values from pretrained weights.
PREPROCESSING_KEYS = ("image_size", "mean", "std", "resize", "crop_ratio", "interpolation")
FLIPS = ("none", "horizontal", "vertical", "horizontal_and_vertical")
SOURCE_FORMS = (
    "shapes, shapes:N, folder:PATH, classes:PATH, splits:PATH, csv:PATH or tfds:NAME[:SPLIT], "
    "also with +log:DIR at its end"
)
# Text in the name of a source before the folder of a request log.
LOG_MARK = "+log:"
_PATH = rf"(?!{URL})((?!\+log:).)+"
SOURCE_PATTERN = re.compile(
    rf"(shapes(:[1-9]\d*)?|(folder|classes|splits|csv|tfds):{_PATH})(\+log:{_PATH})*", re.DOTALL
)
OPTIMIZERS = ("adam", "adamw", "sgd", "lion")
SCHEDULES = ("cosine", "one_cycle")
MONITORS = tuple(f"validation_{name}" for name in ("accuracy", "precision", "recall", "f1", "loss"))


def _pair(image_size: Any) -> tuple[Any, ...]:
    """Converts the value of data.image_size to a tuple (height, width).

    A single number means a square image. If the value is wrong, the tuple may have
    another length.
    """
    sides = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size,)
    return sides * 2 if len(sides) == 1 else sides


_SECTIONS: dict[str, dict[str, Key]] = {
    "": {
        "seed": integer(
            0,
            "Determines the initial weights and all random numbers, and the splits unless "
            "data.split_seed is set.",
            0,
            2**32 - 1,
        ),
        "precision": choice(
            "auto",
            "The dtype of the computation; auto: bfloat16 on GPU and TPU, float32 on CPU. With "
            "float32, GPUs multiply in TF32 and TPUs in bfloat16 unless the environment has "
            "JAX_DEFAULT_MATMUL_PRECISION=highest.",
            ("auto", "float32", "bfloat16"),
        ),
    },
    "data": {
        "source": text(
            "shapes",
            f"The labelled images: {SOURCE_FORMS}.",
            SOURCE_FORMS,
            lambda v: bool(SOURCE_PATTERN.fullmatch(v)),
        ),
        "split": Key(
            (0.7, 0.2, 0.1),
            "three fractions for train, validation and test, each above 0, that sum to 1",
            lambda v: (
                isinstance(v, tuple | list)
                and len(v) == len(SPLITS)
                and all(isinstance(part, int | float) and part > 0 for part in v)
                and math.isclose(sum(v), 1.0)
            ),
            "The fractions of train, validation and test images, in each class.",
        ),
        "split_seed": integer(
            -1, "The seed that determines the splits; -1: the value of seed.", -1, 2**32 - 1
        ),
        "folds": Key(
            0,
            "an integer, 3 or more, or 0",
            lambda v: is_int(v) and (v == 0 or v >= 3),
            "The number of parts of the data in a cross-validation, in place of data.split; 0: "
            "no cross-validation.",
        ),
        "fold": integer(
            0, "The part that is the test split; the next part is the validation split.", low=0
        ),
        "stratify": choice(
            "stable",
            "stable: if images are added, the others keep their splits; exact: the fractions "
            "are exact, and a few images change their split if images are added.",
            SPLIT_RULES,
        ),
        "group": text(
            "",
            'A pattern such as "{class}/{track}"; images with equal parts are in the same split.',
            "a pattern such as {class}/{track}, or empty",
            lambda v: not v or bool(re.search(r"\{\w+\}", v)),
        ),
        "keep_splits": boolean(
            True,
            "Whether to use the train, validation and test splits of the data, if it has them.",
        ),
        "image_size": Key(
            (32, 32),
            "a side in pixels, or (height, width), each 1 or more",
            lambda v: all(is_int(side) and side > 0 for side in _pair(v)) and len(_pair(v)) == 2,
            "The height and width of the network's input in pixels, or one number for both.",
        ),
        "resize": choice(
            "stretch",
            "How images get data.image_size; stretch: without regard to their shape; crop: scaled "
            "to cover it, then cropped to the centre; pad: scaled to fit, then padded with grey.",
            ("stretch", "crop", "pad"),
        ),
        "crop_ratio": number(
            1.0,
            "The side of the crop as a fraction of the scaled image's shorter side.",
            "above 0, at most 1",
            lambda v: 0 < v <= 1,
        ),
        "interpolation": choice(
            "bilinear",
            "The filter of the resize, with antialiasing if the image becomes smaller.",
            ("bilinear", "bicubic"),
        ),
        "mean": numbers(
            (127.5, 127.5, 127.5),
            "The values subtracted from R, G and B; the defaults map images to [-1, 1].",
            "from 0 to 255",
            lambda v: 0 <= v <= 255,
        ),
        "std": numbers(
            (127.5, 127.5, 127.5),
            "The divisors of R, G and B after the subtraction of the mean.",
            "above 0",
            lambda v: v > 0,
        ),
        "preprocessing": choice(
            "weights",
            "weights: the keys above that have their defaults get the values of model.pretrained; "
            "mean_std: only data.mean and data.std do; config: no key does.",
            ("weights", "mean_std", "config"),
        ),
        "cache": choice(
            "auto",
            "Where decoded images are stored; auto: the fastest place with enough space.",
            ("auto", *RESIDENCIES),
        ),
        "workers": integer(
            -1, "The processes that decode and augment images; -1: chosen automatically.", low=-1
        ),
        # The upper limit, 178,956,970 pixels, is Pillow's limit. Pillow refuses to open larger
        # images.
        "max_pixels": integer(
            50_000_000,
            "The largest number of pixels of an image; larger images are not decoded.",
            1,
            178_956_970,
        ),
        "white_level": number(
            0.0,
            "The value of white in 16-bit and float images; 0: the largest value of the file's "
            "type.",
            "0 (the file's type) or more",
            lambda v: v >= 0,
        ),
        "max_unreadable": fraction(
            0.01, "The largest fraction of unreadable images, which are left out."
        ),
        "allow_outside": boolean(
            False, "Whether links and paths may point outside the data's folder."
        ),
    },
    "augment": {
        "flip": choice(
            "horizontal",
            "The axes along which images are flipped at random.",
            FLIPS,
        ),
        "rotation": number(
            0.2,
            "The largest rotation in both directions, as a fraction of a full turn.",
            "from 0 to 1 (a full turn)",
            lambda v: 0 <= v <= 1,
        ),
        "zoom": fraction_below_one(
            0.2,
            "The largest zoom in or out, as a fraction.",
        ),
        "contrast": fraction(0.2, "The largest change of contrast up or down, as a fraction."),
        "crop_area": number(
            1.0,
            "The smallest area of a random crop, as a fraction of the image; 1: no crops.",
            "above 0, at most 1",
            lambda v: 0 < v <= 1,
        ),
        "trivial_augment": boolean(
            False, "Whether each image gets one random operation of TrivialAugment."
        ),
        "erasing_probability": fraction(
            0.0, "The fraction of images in which a box gets a random colour (random erasing)."
        ),
        "mixup_probability": fraction(
            0.0, "The fraction of images that MixUp blends with another image."
        ),
        "mixup_alpha": positive(
            0.2,
            "The weight of the other image is drawn from Beta(alpha, alpha).",
        ),
        "cutmix_probability": fraction(
            0.0, "The fraction of images that get a box of another image (CutMix)."
        ),
        "cutmix_alpha": positive(1.0, "The area of the box is drawn from Beta(alpha, alpha)."),
        "place": choice(
            "auto",
            "Where images are augmented; auto: on the host if the device is a CPU.",
            ("auto", "host", "device"),
        ),
    },
    "model": {
        "name": choice(
            "cnn",
            "The network; the other keys of this section depend on it.",
            tuple(NETWORKS),
        ),
    },
    "optimizer": {
        "algorithm": choice(
            "adam",
            "The optimizer; adamw is adam with optimizer.weight_decay, sgd has momentum.",
            OPTIMIZERS,
        ),
        "momentum": fraction_below_one(
            0.9, "The part of its previous step that sgd adds to a step; for sgd only."
        ),
        "schedule": choice(
            "cosine",
            "cosine: a cosine decay after optimizer.warmup_epochs; one_cycle: a rise from 1/25 of "
            "the learning rate, then a cosine decay.",
            SCHEDULES,
        ),
        "learning_rate": positive(
            1e-3,
            "The learning rate at the start of the cosine decay.",
        ),
        "final_learning_rate": number(
            1e-4, "The learning rate at the end of the cosine decay.", "0 or more", lambda v: v >= 0
        ),
        "decay_epochs": integer(
            0, "The length of the decay in epochs; 0: train.epochs of the first start.", low=0
        ),
        "warmup_epochs": number(
            0.0,
            "The number of epochs in which the learning rate rises; with one_cycle, 0 means 30 % "
            "of the decay.",
            "0 or more",
            lambda v: v >= 0,
        ),
        "l2": number(
            1e-4,
            "The weight of the L2 penalty on the kernels of convolutions and dense layers; with "
            "pretrained weights, on the kernel of the head only.",
            "0 or more",
            lambda v: v >= 0,
        ),
        "weight_decay": number(
            0.0,
            "The decoupled weight decay (AdamW) of the kernels: each step subtracts this part, "
            "times the learning rate.",
            "0 or more",
            lambda v: v >= 0,
        ),
        "stage_decay": number(
            1.0,
            "The learning rate of a stage is this number times that of the next stage; 1: all "
            "stages have the same learning rate.",
            "above 0, at most 1",
            lambda v: 0 < v <= 1,
        ),
        "head_learning_rate": number(
            0.0,
            "The learning rate of the head at the start of the decay; 0: optimizer.learning_rate.",
            "0 or more",
            lambda v: v >= 0,
        ),
    },
    "train": {
        "from_stage": text(
            "",
            "The first stage of the network that is trained, or head; earlier stages keep their "
            "weights. Empty: all stages are trained.",
            "the name of a stage, or empty",
            lambda v: True,
        ),
        "probe": boolean(
            False,
            "Whether to fit the head to the features of the initial network before the first step.",
        ),
        "batch_size": integer(32, "The number of images in a step, on all devices.", low=1),
        "steps_per_execution": integer(
            0, "The steps of one dispatch; 0: 8 if the images are on a GPU or TPU, else 1.", low=0
        ),
        "accumulation_steps": integer(
            1, "The number of parts of a batch that are computed one after the other.", low=1
        ),
        "epochs": integer(
            22,
            "The passes over the training images; the specification has 45. With train.probe it "
            "may be 0.",
            low=0,
        ),
        "ema": fraction_below_one(
            0.0,
            "The decay of a moving average of the weights, such as 0.999, which validation and the "
            "bundle use; 0: no average.",
        ),
        "label_smoothing": fraction_below_one(
            0.1,
            "The probability that the target spreads over all classes.",
        ),
        "balance": choice(
            "none",
            "loss: rare classes have larger weights; sampling: they are drawn more often.",
            ("none", "loss", "sampling"),
        ),
        "patience": integer(
            10, "The number of epochs without a better train.monitor before training stops.", low=1
        ),
        "monitor": choice(
            "validation_accuracy", "The metric that decides which epoch is the best.", MONITORS
        ),
    },
    "distill": {
        "bundles": text(
            "",
            "The paths of bundles or runs, with commas between them, whose mean prediction is an "
            "additional target of training (teachers).",
            "paths on this machine with commas between them, or empty",
            lambda v: not v or all(p.strip() and not is_url(p.strip()) for p in v.split(",")),
        ),
        "weight": number(
            0.5,
            "The weight of the teachers' predictions in the loss; the labels have the rest.",
            "above 0, at most 1",
            lambda v: 0 < v <= 1,
        ),
        "temperature": positive(
            2.0, "The logits of the teachers and of the network are divided by it."
        ),
        "sha256": text(
            "",
            "The sha256 of the teachers; a run sets it when it starts.",
            "a sha256, or empty",
            lambda v: not v or bool(re.fullmatch(r"[0-9a-f]{64}", v)),
        ),
    },
    "checkpoint": {
        "keep": integer(
            2,
            "The number of latest checkpoints to keep, besides the best and its predecessor.",
            low=1,
        ),
        "every_steps": integer(
            0, "The steps between checkpoints; 0: checkpoints only at the end of epochs.", low=0
        ),
        "restore_step": integer(0, "The step of a checkpoint to return to, once; 0: none.", low=0),
        "init_from": text(
            "",
            "The path of a bundle or a run with the initial weights of a new run.",
            "a path on this machine, or empty",
            lambda v: not is_url(v),
        ),
    },
    "report": {
        "detail": choice(
            "full",
            "figures: no explanations and no corruptions in the report; none: no report.",
            ("full", "figures", "none"),
        ),
        "splits": Key(
            SPLITS,
            f"one or more of {', '.join(SPLITS)}, each once",
            lambda v: (
                isinstance(v, tuple | list) and len(v) == len(set(v)) > 0 and set(v) <= set(SPLITS)
            ),
            "The splits to measure at the end; the report needs all of them.",
        ),
        "reference": boolean(
            True,
            "Whether to write reference statistics for `cnn_jax monitor` into the bundle; they "
            "need OpenCV.",
        ),
    },
    "mesh": {
        "data": Key(
            -1,
            "an integer, 1 or more, or -1",
            lambda v: is_int(v) and (v >= 1 or v == -1),
            "The number of devices that share a batch; -1: all devices.",
        ),
        "model": integer(1, "The number of devices that share the large parameters.", low=1),
    },
}


@functools.cache
def keys(network: str | None = None) -> Mapping[str, Key]:
    """Returns a mapping from the name of each key, such as "train.epochs", to the key.

    Args:
      network: The value of model.name, whose keys are included; None includes the keys of all
        networks.
    """
    found = {}
    for section, members in _SECTIONS.items():
        own = dict(members)
        if section == "model":
            for name in NETWORKS if network is None else [network]:
                own |= NETWORKS[name].keys
        found |= {f"{section}.{name}".lstrip("."): key for name, key in own.items()}
    return found


def default_config(network: str = "cnn") -> Config:
    """Returns a new configuration for a network, in which every key has its default value."""
    from ml_collections import ConfigDict

    config: Config = ConfigDict()
    for name, key in keys(network).items():
        section, _, own_name = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[own_name] = key.default
    config.model.name = network
    return config


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the value of each key of a configuration by its full name, such as "train.epochs".

    Args:
      config: A configuration, or a nested dictionary, for example from JSON. Lists become tuples.
      prefix: A text before each name.

    Raises:
      ValueError: The value is not a dictionary.
    """
    if not hasattr(config, "items"):
        raise ValueError("it must be an object with a value for each key")
    values = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = tuple(value) if isinstance(value, list) else value
    return values


def image_size(config: Config) -> tuple[int, int]:
    """Returns the value of data.image_size as (height, width)."""
    height, width = _pair(config.data.image_size)
    return height, width


def digest(config: Config) -> str:
    """Returns the sha256 of a resolved configuration, in hexadecimal."""
    return hashlib.sha256(config.to_json(sort_keys=True).encode()).hexdigest()


# The functions below handle the names of keys.


def check_key(key: str, network: str | None = None) -> None:
    """Checks that a key exists.

    Args:
      key: The name of a key, such as "train.epochs".
      network: The value of model.name, if it is known.

    Raises:
      ConfigError: There is no such key; the message suggests a similar one.
    """
    if any(name.startswith(f"{key}.") for name in keys()):
        raise ConfigError(f"config.{key}: is a section; set one of its keys")
    if key in keys(network):
        return
    if key in keys():
        if key == "model.pretrained":
            others = ", ".join(name for name in NETWORKS if key in keys(name))
            raise ConfigError(
                f"config.{key}: the network {network} has no pretrained weights; set model.name to "
                f"the network of the weights: {others}"
            )
        own = ", ".join(f"model.{name}" for name in NETWORKS[network or "cnn"].keys)
        raise ConfigError(
            f"config.{key}: the network {network} has no such key; it has {own}"
            f"{_networks_hint(_name(key))}"
        )
    near = closest_key(key)
    hint = f"; did you mean {near}?" if near else ""
    raise ConfigError(f"config.{key}: there is no such key{hint}")


def _networks_hint(name: str) -> str:
    """Returns a hint for an error message: the names of up to three networks that have a key."""
    owners = [network for network in NETWORKS if name in NETWORKS[network].keys]
    if len(owners) == 1:
        return f"; the network {owners[0]} has it: set model.name={owners[0]}"
    named = ", ".join(owners[:3]) + (f" and {len(owners) - 3} more" if len(owners) > 3 else "")
    return f"; the networks {named} have it: set model.name to one of them"


def closest_key(key: str) -> str | None:
    """Returns an existing key that is similar to an unknown key; None if no key is similar.

    The result is a key in a section with a similar name, if the name of the key is similar. Else
    it is the first key of this section that begins with the words of the unknown name. Else it is
    the only key that has this name in any section.
    """
    section, _, name = key.rpartition(".")
    near_section = closest(section, sorted({known.rpartition(".")[0] for known in keys()}))
    own = {_name(known): known for known in keys() if known.rpartition(".")[0] == near_section}
    longer = (known for known in own if known.startswith(f"{name}_"))
    if near := closest(name, own) or next(longer, None):
        return own[near]
    same = [known for known in keys() if _name(known) == name]
    return same[0] if len(same) == 1 else None


def full_key(name: str) -> str:
    """Returns the full name of a key; `name` may omit the section if only one section has the key.

    Raises:
      ConfigError: There is no such key, or several sections have a key of this name.
    """
    same = [key for key in keys() if _name(key) == name]
    if not same and "." not in name and not any(key.startswith(f"{name}.") for key in keys()):
        hint = did_you_mean(name, map(_name, keys()))
        raise ConfigError(f"{name}: there is no such key{hint}")
    if name in keys() or not same:
        check_key(name)
        return name
    if len(same) > 1:
        raise ConfigError(f"config: {name!r} may be {' or '.join(same)}; write one of them")
    return same[0]


def _name(key: str) -> str:
    """Returns the name of a key without its section."""
    return key.rpartition(".")[2]


# The functions below check the values of keys.


def wrong_value(key: str, value: object, network: str | None = None) -> ConfigError:
    """Returns the error for a value that a key does not accept."""
    declared = keys(network)[key]
    hint = (
        source_hint(value) if key == "data.source" else did_you_mean(str(value), declared.options)
    )
    return ConfigError(f"config.{key}: must be {declared.requirement}, got {value!r}{hint}")


def source_hint(value: object) -> str:
    """Returns a hint such as "; did you mean folder:PATH?" if a value is a path or a URL; else "".

    A value is a path if it has a slash, or if such a file or folder exists.
    """
    if not isinstance(value, str) or not value or SOURCE_PATTERN.fullmatch(value):
        return ""
    if "://" in value:
        return f"; {COPY_FIRST}"
    if "/" not in value and not pathlib.Path(value).expanduser().exists():
        return ""
    return f"; did you mean {path_source(value)}?"


def path_source(path: str) -> str:
    """Returns the name of the source for a path: csv:PATH for a table, else folder:PATH."""
    return f"{'csv' if path.lower().endswith('.csv') else 'folder'}:{path}"


def check_value(key: str, value: object, network: str | None = None) -> None:
    """Raises ConfigError if a key does not accept the value; the key must exist."""
    if not keys(network)[key].accepts(value):
        raise wrong_value(key, value, network)


def validate(config: Config, num_devices: int) -> None:
    """Checks that the keys exist and accept their values, and that the values are compatible.

    Args:
      config: A configuration.
      num_devices: The number of devices of the run.

    Raises:
      ConfigError: A key is unknown or missing, or its value is not accepted.
    """
    values = flat(config)
    network: str = values.get("model.name", "cnn")
    check_value("model.name", network)
    for key in values:
        check_key(key, network)
    for key, declared in keys(network).items():
        if key not in values:
            raise ConfigError(f"config.{key}: is missing; it must be {declared.requirement}")
        check_value(key, values[key], network)

    if "image_size" not in weights_preprocessing_keys(config):
        check_image_size(config)
    if values.get("model.pretrained") and values["checkpoint.init_from"]:
        raise ConfigError(
            "config.checkpoint.init_from: must be empty if model.pretrained is set, because a run "
            "starts from one of them"
        )
    if values["data.crop_ratio"] != 1 and values["data.resize"] != "crop":
        raise ConfigError(
            "config.data.crop_ratio: must be 1 unless data.resize=crop, got "
            f"{values['data.crop_ratio']}"
        )
    if values["report.detail"] != "none" and len(values["report.splits"]) < len(SPLITS):
        raise ConfigError(
            "config.report.splits: must contain all splits, which the report needs; or set "
            "report.detail=none"
        )
    if values["data.fold"] >= max(values["data.folds"], 1):
        raise ConfigError(
            f"config.data.fold: must be below data.folds = {values['data.folds']}, or 0, got "
            f"{values['data.fold']}"
        )
    _check_mixing(values)
    _check_parallelism(values, num_devices)
    if values["optimizer.final_learning_rate"] > values["optimizer.learning_rate"]:
        raise ConfigError(
            "config.optimizer.final_learning_rate: must not be above optimizer.learning_rate = "
            f"{values['optimizer.learning_rate']}, got {values['optimizer.final_learning_rate']}"
        )
    if not values["train.epochs"] and not values["train.probe"]:
        raise ConfigError("config.train.epochs: must be at least 1 unless train.probe=True, got 0")
    if values["optimizer.algorithm"] == "adamw" and not values["optimizer.weight_decay"]:
        raise ConfigError(
            "config.optimizer.weight_decay: must be above 0 with optimizer.algorithm=adamw, such "
            "as 0.01, got 0"
        )
    decay = "optimizer.decay_epochs" if values["optimizer.decay_epochs"] else "train.epochs"
    if values["train.epochs"] and values["optimizer.warmup_epochs"] >= values[decay]:
        raise ConfigError(
            f"config.optimizer.warmup_epochs: must be below {decay} = "
            f"{values[decay]}, got {values['optimizer.warmup_epochs']}"
        )


def weights_preprocessing_keys(config: Config) -> tuple[str, ...]:
    """Returns the keys of the section `data` that get their values from the pretrained weights.

    Such a key keeps its value if the value differs from the default.
    """
    if not config.model.get("pretrained"):
        return ()
    return {"weights": PREPROCESSING_KEYS, "mean_std": ("mean", "std"), "config": ()}[
        config.data.preprocessing
    ]


def check_image_size(config: Config) -> None:
    """Raises ConfigError if the network does not accept images of the size `data.image_size`."""
    divisor = NETWORKS[config.model.name].size_divisor(config.model.to_dict())
    size = image_size(config)
    if any(side % divisor for side in size):
        raise ConfigError(
            f"config.data.image_size: must be a multiple of {divisor} for the network "
            f"{config.model.name}, got {' x '.join(map(str, size))}"
        )


def _check_mixing(values: Mapping[str, Any]) -> None:
    """Raises ConfigError if mixing probabilities exceed 1 in total, or if a batch is too small."""
    mixup, cutmix = values["augment.mixup_probability"], values["augment.cutmix_probability"]
    if mixup + cutmix > 1:
        raise ConfigError(
            "config.augment.cutmix_probability: must be at most 1 - augment.mixup_probability = "
            f"{1 - mixup:g}, got {cutmix}"
        )
    batch, parts = values["train.batch_size"], values["train.accumulation_steps"]
    if mixup + cutmix > 0 and batch < 2 * parts:
        raise ConfigError(
            "config.train.batch_size: must be at least twice train.accumulation_steps = "
            f"{parts}, so that each image can be mixed with another one, got {batch}"
        )


def _check_parallelism(values: Mapping[str, Any], num_devices: int) -> None:
    """Raises ConfigError if the mesh does not match the number of devices or the batch size."""
    model, data = values["mesh.model"], values["mesh.data"]
    if num_devices % model:
        raise ConfigError(
            f"config.mesh.model: must divide the number of devices, {num_devices}, got {model}"
        )
    data_devices = num_devices // model
    if data not in (-1, data_devices):
        raise ConfigError(
            f"config.mesh.data: {num_devices} devices with mesh.model = {model} make "
            f"{data_devices}, got {data}"
        )
    batch, parts = values["train.batch_size"], values["train.accumulation_steps"]
    if batch % (data_devices * parts):
        each = f"the {data_devices} devices that share a batch" if data_devices > 1 else ""
        times = f"train.accumulation_steps = {parts}" if parts > 1 else ""
        raise ConfigError(
            f"config.train.batch_size: must be a multiple of "
            f"{' times '.join(filter(None, (each, times)))}, got {batch}"
        )
