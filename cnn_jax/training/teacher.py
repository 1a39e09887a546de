"""Distillation: a trained network whose predictions are a further target in training."""

import pathlib
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.inference.bundle import Bundle, digest, find_bundle, read_bundle
from cnn_jax.models.network import make_model
from cnn_jax.system.errors import BundleError, ConfigError
from cnn_jax.training.loss import distillation
from cnn_jax.training.step import ExtraLoss

_KEY = "config.train.teacher"
# The temperature of both predictions.
_TEMPERATURE = 2.0
# The digest of the bundle, which `resolve_teacher` appends to its path.
_DIGEST = re.compile(r"@[0-9a-f]{64}$")


def resolve_teacher(name: str) -> str:
    """Returns the absolute path of a teacher's bundle, followed by "@" and the bundle's digest.

    Args:
      name: The value of `train.teacher`: the path of a bundle or of a run with a bundle, which a
        digest may follow.

    Raises:
      ConfigError: There is no bundle at the path, or it has another digest.
    """
    path, recorded = pathlib.Path(_DIGEST.sub("", name)).expanduser().resolve(), _DIGEST.search(name)
    try:
        resolved = f"{path}@{digest(find_bundle(path))}"
    except BundleError as error:
        raise ConfigError(f"{_KEY}: {error}") from error
    if recorded is not None and not resolved.endswith(recorded[0]):
        raise ConfigError(
            f"{_KEY}: {path} has changed since the run started; restore the bundle with the "
            f"digest {recorded[0][1:]}, or start a new run with another --workdir"
        )
    return resolved


def open_teacher(
    name: str,
    weight: float,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
) -> ExtraLoss:
    """Returns the loss term that compares the network with a teacher; see `loss.distillation`.

    The teacher sees the same augmented images as the network, in inference mode.

    Args:
      name: The resolved value of `train.teacher`.
      weight: The weight of the term.
      preprocessing: The preprocessing of the run.
      class_names: The classes of the run, in the order of the labels.

    Raises:
      ConfigError: The bundle is damaged, or has other classes or another preprocessing.
    """
    try:
        bundle = read_bundle(find_bundle(_DIGEST.sub("", name)))
    except BundleError as error:
        raise ConfigError(f"{_KEY}: {error}") from error
    _check(bundle, preprocessing, class_names)
    model = make_model(bundle.model, len(class_names), "float32")
    variables = jax.tree.map(jnp.asarray, bundle.variables)

    def extra_loss(images: Array, logits: Array) -> Float[Array, " batch"]:
        targets = jax.lax.stop_gradient(model.apply(variables, images))
        return weight * distillation(logits, targets, _TEMPERATURE)

    return extra_loss


def _check(bundle: Bundle, preprocessing: Preprocessing, class_names: Sequence[str]) -> None:
    """Raises ConfigError if a teacher has other classes, another image size or normalisation."""
    if bundle.class_names != list(class_names):
        raise ConfigError(f"{_KEY}: must have the classes of the run in the same order")
    for key in ("image_size", "mean", "std"):
        theirs, own = (getattr(p, key) for p in (bundle.preprocessing, preprocessing))
        if tuple(theirs) != tuple(own):
            raise ConfigError(
                f"config.data.{key}: must be that of train.teacher, {theirs}, got {own}"
            )
