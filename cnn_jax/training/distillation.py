"""Knowledge distillation: a network also learns from the predictions of trained networks.

The teachers see the same augmented and mixed images as the student, in the same training step.
Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent", section 3.1,
found this better than predictions that are computed once for images without augmentation.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from cnn_jax.config.schema import Config
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.preprocessing import Preprocessing, normalize
from cnn_jax.inference.bundle import Bundle, Ensemble, read_networks
from cnn_jax.models.network import Network, make_model
from cnn_jax.system.errors import ConfigError
from cnn_jax.training.loss import cross_entropy


@dataclasses.dataclass(frozen=True)
class _Teacher:
    """The parts of a teacher that are not arrays.

    Attributes:
      model: The network.
      preprocessing: The preprocessing of the teacher.
      temperature: The calibration temperature, by which the logits are divided.
      columns: The teacher's output for each class of the student.
    """

    model: Network
    preprocessing: Preprocessing
    temperature: float
    columns: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The additional term of the loss: the divergence from the mean prediction of the teachers.

    Attributes:
      teachers: The networks.
      preprocessing: The preprocessing of the student.
      temperature: All logits are divided by this number before the softmax, in addition to the
        teachers' own calibration.
      weight: The weight of this term, above 0, at most 1.
    """

    teachers: tuple[_Teacher, ...]
    preprocessing: Preprocessing
    temperature: float
    weight: float

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        logits: Float[Array, "batch classes"],
        variables: Sequence[PyTree],
    ) -> Float[Array, " batch"]:
        """Returns the loss of each image, weight * temperature**2 * KL(teachers, student).

        The factor temperature**2 keeps the gradient's size (Hinton et al. 2015, section 2.1).

        Args:
          images: The inputs of the student.
          logits: The outputs of the student.
          variables: {"params", "batch_stats"} of each teacher.
        """
        targets = self.targets(images, variables)
        entropy = -jnp.sum(jax.scipy.special.xlogy(targets, targets), axis=-1)
        losses = cross_entropy(logits / self.temperature, targets) - entropy
        return self.weight * self.temperature**2 * losses

    def targets(
        self, images: Float[Array, "batch height width 3"], variables: Sequence[PyTree]
    ) -> Float[Array, "batch classes"]:
        """Returns the mean of the teachers' probabilities at `temperature`."""
        std, mean = (
            jnp.array(values, jnp.float32)[None, None, None]
            for values in (self.preprocessing.std, self.preprocessing.mean)
        )
        levels = images * std + mean
        probabilities = []
        for teacher, arrays in zip(self.teachers, variables, strict=True):
            shape = (len(images), *teacher.preprocessing.image_size, 3)
            inputs = normalize(jax.image.resize(levels, shape, "linear"), teacher.preprocessing)
            logits = cast(Array, teacher.model.apply(arrays, inputs))
            logits = logits[:, jnp.array(teacher.columns)]
            probabilities.append(jax.nn.softmax(logits / (teacher.temperature * self.temperature)))
        return sum(probabilities[1:], probabilities[0]) / len(probabilities)


def open_teachers(config: Config, dataset: Dataset) -> tuple[Distillation, list[PyTree]] | None:
    """Reads the teachers of a run; each member of an ensemble is a teacher.

    Args:
      config: The resolved configuration.
      dataset: The data set of the run.

    Returns:
      The term of the loss, and the variables of each teacher, arrays on the host; None if the
      run has no teachers.

    Raises:
      BundleError: A bundle does not exist, or is damaged.
      ConfigError: A teacher has other classes, or was trained on other splits of the same data.
    """
    distill = config.distill
    if not distill.bundles:
        return None
    teachers, variables = [], []
    for path in distill.bundles.split(","):
        networks = read_networks(path)
        for bundle in networks.members if isinstance(networks, Ensemble) else [networks]:
            _check(bundle, path, config.data.source, dataset)
            teachers.append(
                _Teacher(
                    make_model(bundle.model, len(bundle.class_names), config.precision),
                    bundle.preprocessing,
                    bundle.temperature,
                    tuple(map(bundle.class_names.index, dataset.source.class_names)),
                )
            )
            variables.append(bundle.variables)
    preprocessing = dataset.loader.preprocessing
    term = Distillation(tuple(teachers), preprocessing, distill.temperature, distill.weight)
    return term, variables


def _check(bundle: Bundle, path: str, source: str, dataset: Dataset) -> None:
    """Raises ConfigError if a bundle cannot be the teacher of a network of this data set."""
    classes: Any = dataset.source.class_names
    if set(bundle.class_names) != set(classes):
        other = sorted(set(bundle.class_names) ^ set(classes))
        raise ConfigError(
            f"config.distill.bundles: {path} has other classes than the data ({other[0]!r} is only "
            "in one of them); train the teacher on the same classes"
        )
    is_same_source = bundle.data["source"] == source
    if is_same_source and bundle.data["fingerprint"] != dataset.fingerprint:
        raise ConfigError(
            f"config.distill.bundles: {path} was trained on other splits of this data, so it has "
            "seen test images; train the teacher with the same splits"
        )
