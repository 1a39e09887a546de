"""A loaded version of a model, compiled and ready to answer requests.

A new version is read, verified, compiled and run on a background thread. Then new requests use the
new version. Requests that started with the old version finish with the old version. After the last
of these requests, the old version is freed.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cnn_jax.data.decode import Pixels
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.inference.bundle import Bundle, Ensemble
from cnn_jax.inference.exported import OnnxPredictor
from cnn_jax.inference.images import ImageReader
from cnn_jax.inference.protocol import TrainedPredictor
from cnn_jax.serve.engine import Program, time_program
from cnn_jax.system import runtime
from cnn_jax.system.errors import BundleError

# The batch sizes to compile by default.
SIZES = (1, 2, 4, 8, 16, 32)
# The sum of an image's probabilities may differ from 1 by at most this value.
_TOLERANCE = 1e-3


class Output(NamedTuple):
    """The result of a program for an image."""

    probabilities: np.ndarray  # float32 [classes].
    # The input of the network's last layer, float32 [features]; an exported model and an ensemble
    # have 0 features.
    embedding: np.ndarray
    # The map of the most probable class, float32 [height, width]; None without a map.
    explanation: np.ndarray | None = None
    # The disagreement of an ensemble's predictions in nats; None for other models.
    disagreement: float | None = None


@dataclasses.dataclass(eq=False)
class Version:
    """A bundle that is compiled and ready to answer requests."""

    model: str  # The name of the model.
    number: int  # 1 or more.
    predictor: TrainedPredictor
    preprocessing: Preprocessing  # Has the server's limit on the pixels of an image.
    predict_program: Program  # Returns an `Output` without a map for each image.
    explain_program: Program | None  # Returns maps; None for an exported model.
    metrics: Mapping[str, Mapping[str, float]]  # The metrics by split, as in the bundle.
    digest: str  # The bundle's digest.
    sizes: tuple[int, ...]  # The batch sizes that the programs may have.
    load_time: float  # In seconds since the epoch.
    in_use: int = 0  # The number of requests in flight that use the version.

    def __post_init__(self):
        self._reader = ImageReader(self.preprocessing)

    @property
    def class_names(self) -> list[str]:
        return self.predictor.class_names

    def read(self, image: bytes | np.ndarray, max_pixels: int | None = None) -> Pixels:
        """Decodes and resizes an image; returns the network's input, uint8 [height, width, 3].

        Args:
          image: The content of an image file, or pixels, uint8 [h, w, 3] or [h, w].
          max_pixels: The largest number of pixels of an image; a larger number than that of
            `preprocessing` has no effect.

        Raises:
          DataError: The image cannot be used.
        """
        name = f"an image for {self.model}, version {self.number}"
        return self._reader.read(image, name, max_pixels)

    @contextlib.contextmanager
    def hold(self) -> Iterator["Version"]:
        """Adds 1 to the number of requests that use the version, until the context ends."""
        self.in_use += 1
        try:
            yield self
        finally:
            self.in_use -= 1


def make_version(
    model: str,
    number: int,
    bundle: Bundle | Ensemble | OnnxPredictor,
    digest: str,
    max_pixels: int,
    sizes: Sequence[int] = SIZES,
    loaded: Sequence[Version] = (),
) -> Version:
    """Creates a version from a bundle: compiles and runs its networks, and checks the outputs.

    If a loaded version has the same network, its compiled programs and measured times are reused.
    This avoids a delay of the requests in flight.

    Args:
      model: The name of the model.
      number: The number of the version.
      bundle: The bundle, the ensemble or the exported model.
      digest: The bundle's digest.
      max_pixels: The server's limit on the pixels of an image. The bundle's limit applies too.
      sizes: The batch sizes to compile.
      loaded: The loaded versions of all models, whose programs may be reused.

    Raises:
      BundleError: The weights do not fit the network, or its outputs are not probabilities.
    """
    predictor, predict, explain = _predictor_and_functions(bundle)
    if isinstance(bundle, OnnxPredictor):
        # Larger batches are computed in parts, so they are not faster.
        sizes = [size for size in sizes if size <= bundle.images_at_once]
    allowed = min(max_pixels, bundle.preprocessing.max_pixels)
    preprocessing = dataclasses.replace(bundle.preprocessing, max_pixels=allowed)
    # Random pixels would need the module numpy.random, which is loaded when it is first used.
    image = np.resize(np.arange(251, dtype=np.uint8), (*preprocessing.image_size, 3))

    _check_probabilities(next(iter(predict(image[None]))).probabilities)
    equal = [other for other in loaded if _has_programs(other, predictor, preprocessing, sizes)]
    if equal:
        predict_program = Program(predict, equal[0].predict_program.seconds)
    else:
        predict_program = time_program(predict, image, sizes)
    # Maps have only one batch size, so their time is not measured. They are only compiled.
    explain_program = Program(explain, {1: 0.0}) if explain else None
    if explain_program:
        explain_program.run(image[None])
    return Version(
        model=model,
        number=number,
        predictor=predictor,
        preprocessing=preprocessing,
        predict_program=predict_program,
        explain_program=explain_program,
        metrics=bundle.metrics,
        digest=digest,
        sizes=tuple(sizes),
        load_time=time.time(),
    )


_Function = Callable[[np.ndarray], Iterable[Output]]


def _predictor_and_functions(
    bundle: Bundle | Ensemble | OnnxPredictor,
) -> tuple[TrainedPredictor, _Function, _Function | None]:
    """Returns a predictor, and the functions that predict and explain.

    An exported model has no function that explains.
    """
    no_embedding = np.empty(0, np.float32)
    if isinstance(bundle, OnnxPredictor):
        return bundle, lambda images: (Output(row, no_embedding) for row in bundle(images)), None
    # JAX is imported only for bundles: without JAX, a server starts faster and needs less memory.
    from cnn_jax.explain import maps
    from cnn_jax.inference.ensemble import EnsemblePredictor, make_predictor
    from cnn_jax.system.compilation_cache import keep_compiled

    runtime.compute_in_calling_thread()
    keep_compiled()
    predictor = make_predictor(bundle)

    def predict(images: np.ndarray) -> list[Output]:
        if isinstance(predictor, EnsemblePredictor):
            probabilities, disagreement = predictor.predict_with_disagreement(images)
            return [
                Output(row, no_embedding, disagreement=value)
                for row, value in zip(probabilities, disagreement.tolist(), strict=True)
            ]
        return list(map(Output, *predictor.predict_with_embeddings(images)))

    def explain(images: np.ndarray) -> list[Output]:
        outputs = predict(images)
        classes = np.array([output.probabilities.argmax() for output in outputs])
        members = predictor.members if isinstance(predictor, EnsemblePredictor) else [predictor]
        class_maps = maps.mean_grad_cam(members, images, classes)
        return [
            output._replace(explanation=class_map)
            for output, class_map in zip(outputs, class_maps, strict=True)
        ]

    return predictor, predict, explain


def _has_programs(
    version: Version,
    predictor: TrainedPredictor,
    preprocessing: Preprocessing,
    sizes: Sequence[int],
) -> bool:
    """Returns whether a predictor can reuse the compiled programs of a version."""
    return (
        not isinstance(version.predictor, OnnxPredictor)
        and not isinstance(predictor, OnnxPredictor)
        and _networks(version.predictor) == _networks(predictor)
        and version.preprocessing == preprocessing
        and version.sizes == tuple(sizes)
    )


def _networks(predictor: Any) -> tuple[Any, ...]:
    """Returns the network and preprocessing of each member of a predictor, and its views."""
    members = getattr(predictor, "members", [predictor])
    views = getattr(predictor, "flip", None), getattr(predictor, "shift", None)
    return *views, *((member.model, member.preprocessing) for member in members)


def _check_probabilities(probabilities: np.ndarray) -> None:
    """Raises BundleError if probabilities are not finite or do not sum to 1."""
    if not np.all(np.isfinite(probabilities)) or abs(probabilities.sum() - 1) > _TOLERANCE:
        raise BundleError("the network's outputs are not probabilities: its weights are damaged")
