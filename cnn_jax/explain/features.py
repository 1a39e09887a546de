"""What the parts of a network respond to, and what they are worth to it.

Permutation importance (Breiman 2001; Fisher, Rudin and Dominici 2019): how much worse the
predictions become when one input of a model is exchanged among the examples, so that it says
nothing any more of the one it stands with, while all others stay.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.explain.maps import Images
from cnn_jax.inference import calibration
from cnn_jax.inference.predictor import BATCH_SIZE, Predictor, predict_pixels
from cnn_jax.models.network import stages
from cnn_jax.system import runtime

# Exchanges of each feature, and of each region, whose mean counts. The standard error over 64
# images of a region's mean is 6 % larger after two exchanges than after five, which take 2.5 times
# as long (measured on photographs of two classes).
REPETITIONS, REGION_EXCHANGES = 5, 2
# Regions on a side of an image.
REGIONS = 4


def feature_maps(
    predictor: Predictor, images: Images
) -> dict[str, Float[np.ndarray, "batch height width channel"]]:
    """The feature maps of every convolution, by its name, float32."""
    return _run(_feature_maps, predictor, images)


def embeddings(predictor: Predictor, images: Images) -> Float[np.ndarray, "batch features"]:
    """What the head sees of each image: the hidden layer's features, float32."""
    parts = [
        _run(_embedding, predictor, images[start : start + BATCH_SIZE])
        for start in range(0, len(images), BATCH_SIZE)
    ]
    return np.concatenate(parts)


def _feature_maps(stages: dict[str, Array]) -> dict[str, Array]:
    return {name: array for name, array in stages.items() if array.ndim == 4}


def _embedding(stages: dict[str, Array]) -> Array:
    return stages["embedding"]


def _run(choose: Callable[[dict[str, Array]], PyTree], predictor: Predictor, images: Images) -> Any:
    """What is chosen of the stages of the network, float32."""
    run = _compiled(choose, predictor.model, predictor.preprocessing)
    missing = (1 << (len(images) - 1).bit_length()) - len(images)
    padded = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)], mode="edge")
    found = jax.device_get(run(predictor.variables, padded))
    return jax.tree.map(lambda array: np.asarray(array, np.float32)[: len(images)], found)


@functools.cache
def _compiled(
    choose: Callable[[dict[str, Array]], PyTree], model: nn.Module, preprocessing: Preprocessing
) -> Callable[[PyTree, Images], PyTree]:
    def run(variables: PyTree, images: Array) -> PyTree:
        return choose(stages(model, variables, images, preprocessing))

    return jax.jit(run, compiler_options=runtime.compiler_options())


def first_filters(predictor: Predictor) -> Float[np.ndarray, "features height width 3"]:
    """The kernels that look at the image itself, float32.

    Raises:
      ValueError: The network begins with something else than a convolution.
    """
    for layer in predictor.variables["params"].values():
        kernel = np.asarray(layer.get("kernel", 0.0))
        if kernel.ndim == 4 and kernel.shape[2] == 3:
            return kernel.transpose(3, 0, 1, 2).astype(np.float32)
    raise ValueError("the network has no convolution over three channels")


def feature_importance(
    predictor: Predictor,
    embedding: Float[np.ndarray, "n features"],
    labels: Int[np.ndarray, " n"],
    seed: int = 0,
) -> Float[np.ndarray, " features"]:
    """What the loss (nats) gains when one feature of `embedding` is exchanged among the images.

    The mean of five exchanges. Below 0, the network would do better without it on these images.
    """
    head = predictor.variables["params"]["head"]
    kernel = np.asarray(head["kernel"], np.float64)
    logits = embedding @ kernel + np.asarray(head["bias"], np.float64)

    def loss(logits: np.ndarray) -> float:
        shifted = logits / predictor.temperature
        shifted -= shifted.max(axis=1, keepdims=True)
        of_labels = shifted[np.arange(len(labels)), labels]
        return float((np.log(np.exp(shifted).sum(axis=1)) - of_labels).mean())

    base = loss(logits)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(labels)) for _ in range(REPETITIONS)]
    importance = np.zeros(embedding.shape[1])
    for feature, column in enumerate(embedding.T):
        if not column.any():  # A unit that is never active.
            continue
        for order in orders:
            change = (column[order] - column)[:, None] * kernel[feature]
            importance[feature] += (loss(logits + change) - base) / REPETITIONS
    return importance


def most_exciting(
    embedding: Float[np.ndarray, "n features"], feature: int, count: int
) -> Int[np.ndarray, " count"]:
    """The images that excite a feature most, the most first; only such as excite it at all."""
    order = np.argsort(-embedding[:, feature], kind="stable")[:count]
    return order[embedding[order, feature] > 0]


def region_importance(
    predictor: Predictor,
    images: Images,
    labels: Int[np.ndarray, " n"],
    seed: int = 0,
) -> dict[str, Any]:
    """What accuracy and loss lose when a region of the images is exchanged among them.

    Returns:
      "accuracy" and "loss" of the images as they are; "accuracy_lost" and "loss_gained", lists
      [4][4] of means over two exchanges, for each region by row and column.
    """
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(images)) for _ in range(REGION_EXCHANGES)]

    def measure(images: Images) -> tuple[float, float]:
        probabilities = predict_pixels(predictor, images)
        accuracy = float((probabilities.argmax(axis=1) == labels).mean())
        return accuracy, calibration.negative_log_likelihood(probabilities, labels)

    accuracy, loss = measure(images)
    changes = np.zeros((2, REGIONS, REGIONS))
    for row, rows in enumerate(_spans(images.shape[1])):
        for column, columns in enumerate(_spans(images.shape[2])):
            for order in orders:
                changed = images.copy()
                changed[:, rows, columns] = images[order][:, rows, columns]
                after = measure(changed)
                changes[:, row, column] += (accuracy - after[0], after[1] - loss)
    changes /= REGION_EXCHANGES
    return {
        "accuracy": accuracy,
        "loss": loss,
        "accuracy_lost": changes[0].tolist(),
        "loss_gained": changes[1].tolist(),
    }


def _spans(side: int) -> list[slice]:
    edges = np.linspace(0, side, REGIONS + 1).round().astype(int)
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
