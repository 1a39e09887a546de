"""Predictors: functions that take images and return class probabilities.

Importing this module imports no training code.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.inference.batching import BATCH_SIZE, join_batches, map_batches, split_batches
from cnn_jax.inference.bundle import Bundle, find_bundle, read_bundle
from cnn_jax.inference.images import AnyImage, ImageReader, describe_image, single_images
from cnn_jax.inference.protocol import (
    EnsembleLike,
    Predictor,
    TrainedPredictor,
    check_images,
)
from cnn_jax.models.network import Network, abstract_variables, forward, make_model, stages
from cnn_jax.system import runtime
from cnn_jax.system.errors import BundleError, DataError

logger = logging.getLogger(__name__)

# On a CPU, the program for one image contains the weights as constants if they have at most this
# number of bytes. XLA then arranges them for its convolutions once, and not for each image. The
# program needs their memory once more, and each predictor compiles its own.
_MAX_CONSTANT_BYTES = 2**26
_PredictOne = Callable[[np.float32, np.ndarray], Array]


class BundlePredictor(TrainedPredictor):
    """A predictor that runs the network of a bundle.

    Attributes:
      class_names: The classes in the order of the probabilities.
      preprocessing: The preprocessing from an image to the network's input.
      temperature: The logits are divided by the temperature before the softmax.
      data: The description of the training data; see `Bundle`.
      metrics: The metrics by split; see `Bundle`.
      model: The network.
      variables: The parameters and statistics of the network, on the device. They may be replaced,
        and so may the temperature, but not the network and the preprocessing.
      runs_once: Whether the process predicts only one batch; see `__init__`.
    """

    runs_once = False
    # The variables and the program for one image, after the first call with one image.
    _predict_one: tuple[Mapping[str, Any], _PredictOne] | None = None

    def __init__(self, bundle: Bundle, runs_once: bool = False):
        """Creates the predictor of a bundle.

        Args:
          bundle: The bundle.
          runs_once: Whether the process predicts only one batch. The program is then slower, but
            on a CPU it can be found in the cache of compiled programs.

        Raises:
          BundleError: The weights do not fit the network.
        """
        self.class_names = bundle.class_names
        self.preprocessing = bundle.preprocessing
        self.temperature = bundle.temperature
        self.data = bundle.data
        self.metrics = bundle.metrics
        self.model = make_model(bundle.model, len(bundle.class_names), bundle.precision)
        _check_weights(self.model, bundle)
        self.variables = jax.device_put(bundle.variables)
        self.runs_once = runs_once

    def __getstate__(self) -> dict[str, Any]:
        """Returns what pickle stores: all attributes without the compiled program."""
        return self.__dict__ | {"_predict_one": None}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "BundlePredictor":
        """Reads a bundle, verifies it, and returns its predictor.

        Args:
          path: A bundle, or a run that has a bundle.

        Raises:
          BundleError: There is no bundle, or the bundle is damaged.
        """
        return cls(read_bundle(find_bundle(path)))

    def __call__(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> Float[np.ndarray, "batch classes"]:
        """Returns the class probabilities of preprocessed images; see `Predictor`.

        Raises:
          ValueError: The images are not uint8, or their size is not the bundle's.
        """
        check_images(images, self.preprocessing)
        if len(images) != 1 or self.runs_once:
            return np.asarray(self.dispatch(images))
        variables, run = self._predict_one or (None, None)
        if run is None or variables is not self.variables:
            variables = self.variables
            run = self._make_predict_one(variables)
            self._predict_one = variables, run
        return np.asarray(run(np.float32(self.temperature), images))

    def _make_predict_one(self, variables: Mapping[str, Any]) -> _PredictOne:
        """Returns the fastest function (temperature, images) -> probabilities for one image."""
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
        if jax.default_backend() != "cpu" or weight_bytes > _MAX_CONSTANT_BYTES:
            run = jit_prediction(self.model, self.preprocessing)
            return functools.partial(run, variables)
        run = functools.partial(_probabilities, self.model, self.preprocessing, variables)
        return jax.jit(run, compiler_options=runtime.compiler_options())

    def dispatch(self, images: UInt8[np.ndarray, "batch height width 3"]) -> Array:
        """Starts the computation of the class probabilities; does not wait for the result."""
        run = jit_prediction(self.model, self.preprocessing, is_storable=self.runs_once)
        return run(self.variables, np.float32(self.temperature), images)

    def predict_with_embeddings(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> tuple[Float[np.ndarray, "batch classes"], Float[np.ndarray, "batch features"]]:
        """Returns the class probabilities and the embeddings of preprocessed images, both float32.

        The embedding is the input of the network's last layer. One forward pass computes both.

        Raises:
          ValueError: The images are not uint8, or their size is not the bundle's.
        """
        check_images(images, self.preprocessing)
        run = _compiled_with_embeddings(self.model, self.preprocessing)
        probabilities, embeddings = run(self.variables, np.float32(self.temperature), images)
        return np.asarray(probabilities), np.asarray(embeddings)


@functools.lru_cache(64)
def jit_prediction(
    model: Network,
    preprocessing: Preprocessing,
    platform: str | None = None,
    is_storable: bool = False,
) -> Callable[..., Array]:
    """Returns the jitted function (variables, temperature, images) -> class probabilities.

    The weights are arguments of the function, so bundles with the same network and preprocessing
    share it.

    Args:
      model: The network.
      preprocessing: The mean and the standard deviation of the normalisation.
      platform: See `runtime.compiler_options`.
      is_storable: See `runtime.compiler_options`.
    """
    run = functools.partial(_probabilities, model, preprocessing)
    return jax.jit(run, compiler_options=runtime.compiler_options(platform, is_storable))


def _probabilities(
    model: Network,
    preprocessing: Preprocessing,
    variables: PyTree,
    temperature: Array | np.float32,
    images: Array,
) -> Array:
    """Returns the class probabilities of images."""
    return jax.nn.softmax(forward(model, variables, images, preprocessing) / temperature)


@functools.lru_cache(64)
def _compiled_with_embeddings(
    model: Network, preprocessing: Preprocessing
) -> Callable[..., tuple[Array, Array]]:
    """Returns the compiled function for both probabilities and embeddings in float32."""

    def run(variables: PyTree, temperature: Array, images: Array) -> tuple[Array, Array]:
        outputs = stages(model, variables, images, preprocessing)
        probabilities = jax.nn.softmax(outputs["logits"] / temperature)
        return probabilities, outputs["embedding"].astype(jnp.float32)

    return jax.jit(run, compiler_options=runtime.compiler_options())


@functools.cache
def compiled_stages(
    choose: Callable[[dict[str, Array]], PyTree], model: Network, preprocessing: Preprocessing
) -> Callable[[PyTree, UInt8[np.ndarray, "batch height width 3"]], PyTree]:
    """Returns the compiled function from (variables, images) to outputs of a network's stages.

    Args:
      choose: A function from the outputs of all stages, by name, to the wanted outputs.
      model: The network.
      preprocessing: The mean and the standard deviation of the normalisation.
    """

    def run(variables: PyTree, images: Array) -> PyTree:
        return choose(stages(model, variables, images, preprocessing))

    return jax.jit(run, compiler_options=runtime.compiler_options())


def _check_weights(model: Network, bundle: Bundle) -> None:
    """Raises BundleError if the names or shapes of the weights do not match the network."""

    def shapes(variables: PyTree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.leaves_with_path(variables)
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

    expected = shapes(abstract_variables(model, bundle.preprocessing.image_size))
    found = shapes(bundle.variables)
    if expected != found:
        differing = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        raise BundleError(
            f"the bundle's weights do not fit the network that it describes: {differing[0]} is "
            f"{found.get(differing[0], 'absent')}, not {expected.get(differing[0], 'wanted')}"
        )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or the reason why the image could not be read.

    Attributes:
      predicted: The name of the most probable class; None after an error.
      confidence: The probability of that class, 0 to 1; None after an error.
      probabilities: float32 [C], in the order of `class_names`; None after an error.
      error: The reason why the image could not be read; None if it could.
      disagreement: The disagreement of an ensemble's predictions in nats, 0 or more; None after
        an error, and for other predictors. See `calibration.mutual_information`.
    """

    predicted: str | None = None
    confidence: float | None = None
    probabilities: np.ndarray | None = None
    error: str | None = None
    disagreement: float | None = None


def predict_batch(
    predictor: Predictor,
    images: AnyImage | Iterable[AnyImage],
    reader: ImageReader | None = None,
) -> list[Prediction]:
    """Predicts images of any form and size; an unusable image does not affect the other images.

    Args:
      predictor: A loaded bundle or any other predictor.
      images: One image in a form that `preprocess_for_inference` accepts, which is a batch of
        one; or an iterable of such images: a list, a tuple, a generator, or an array
        uint8 [b, h, w, 1, 3 or 4]. A generator may reuse its memory, because each image is
        copied before the next one is requested.
      reader: A reader that several calls share, so that there is only one warning in all of
        them; by default a new reader for this call.

    Returns:
      One prediction for each image, in the order of the images. The prediction of an unusable
      image has the reason, which is also logged. A warning names the first image whose values
      do not seem to suit the network's white level.

    Raises:
      TypeError: `images`, or one of the images, has none of these forms.
    """
    reader = reader or ImageReader(predictor.preprocessing)
    predictions: list[Prediction] = []
    rows: list[int] = []  # The index in `predictions` of each image in `batch`.
    batch = np.empty((BATCH_SIZE, *predictor.preprocessing.image_size, 3), np.uint8)

    def read_batches() -> Iterator[UInt8[np.ndarray, "_batch height width 3"]]:
        for row, image in enumerate(single_images(images)):
            predictions.append(Prediction())
            try:
                batch[len(rows)] = reader.read(image, describe_image(image, row))
            except DataError as error:
                logger.warning("%s: %s", describe_image(image, row), error)
                predictions[row] = Prediction(error=str(error))
                continue
            rows.append(row)
            if len(rows) == BATCH_SIZE:
                yield batch
                rows.clear()
        if rows:
            yield batch[: len(rows)]

    def predict(
        images: UInt8[np.ndarray, "batch height width 3"],
    ) -> tuple[Float[np.ndarray, "batch classes"], Float[np.ndarray, " batch"]]:
        if isinstance(predictor, EnsembleLike):
            return predictor.predict_with_disagreement(images)
        return predictor(images), np.full(len(images), np.nan, np.float32)

    for results in map_batches(predict, read_batches()):
        for row, probabilities, disagreement in zip(rows, *results, strict=True):
            predictions[row] = _prediction(probabilities, predictor.class_names, disagreement)
    return predictions


def predict_pixels(
    predictor: Predictor,
    images: UInt8[np.ndarray, "n height width 3"],
    padded_size: int | None = None,
) -> Float[np.ndarray, "n classes"]:
    """Returns the class probabilities of any number of preprocessed images.

    Args:
      predictor: A loaded bundle or any other predictor.
      images: Images of the predictor's size.
      padded_size: The number of images in each call of the predictor; see `map_batches`.

    Returns:
      Probabilities, float32.
    """
    return np.concatenate(
        [
            np.empty((0, len(predictor.class_names)), np.float32),
            *map_batches(predictor, split_batches(images), padded_size),
        ]
    )


def predict_versions(
    predictor: Predictor, versions: Iterable[UInt8[np.ndarray, "n height width 3"]]
) -> Float[np.ndarray, "versions n classes"]:
    """Returns the class probabilities of several versions of the same preprocessed images.

    The versions are predicted in common batches of `BATCH_SIZE`, so that only the last batch is
    padded, and one compiled program is enough.

    Args:
      predictor: A loaded bundle or any other predictor.
      versions: Versions of the images, one or more; they are used one after the other.

    Returns:
      Probabilities, float32.
    """
    count = 0

    def counted() -> Iterator[UInt8[np.ndarray, "n height width 3"]]:
        nonlocal count
        for images in versions:
            count += 1
            yield images

    rows = list(map_batches(predictor, join_batches(counted()), BATCH_SIZE))
    return np.concatenate(rows).reshape(count, -1, len(predictor.class_names))


def _prediction(
    probabilities: np.ndarray, class_names: list[str], disagreement: np.floating
) -> Prediction:
    best = int(np.argmax(probabilities))
    return Prediction(
        class_names[best],
        float(probabilities[best]),
        probabilities,
        disagreement=None if np.isnan(disagreement) else float(disagreement),
    )
