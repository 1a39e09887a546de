"""The versions of models that are served, and how one takes the place of another.

A version comes in when it is loaded, verified, compiled and warm, all of it on a thread beside
those that serve. From then on new requests get it; those that have begun with another end
with it, and when the last has, it is freed.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cnn_jax.data.decode import Pixels
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.explain import maps
from cnn_jax.inference.bundle import Bundle
from cnn_jax.inference.images import ImageReader
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.serve.engine import Program, measure
from cnn_jax.system.errors import BundleError

# Images that are computed at once, if so many wait.
SIZES = (1, 2, 4, 8, 16, 32)
# By how much the probabilities of an image may miss 1 together.
_TOLERANCE = 1e-3


@dataclasses.dataclass(eq=False)
class Version:
    """A bundle that is ready to be asked.

    Attributes:
      model: Its name.
      number: Of the version, 1 or more.
      predictor: The bundle's.
      preprocessing: Its own, with the server's limit of pixels.
      probabilities: Of images, float32 [classes].
      explained: Of images, (probabilities, map): the map of the most probable class,
        float32 [height, width].
      metrics: Of the bundle.
      digest: Of the bundle.
      loaded: When, in seconds since the epoch.
      in_use: Requests that are under way with it.
    """

    model: str
    number: int
    predictor: BundlePredictor
    preprocessing: Preprocessing
    probabilities: Program
    explained: Program
    metrics: Mapping[str, Mapping[str, float]]
    digest: str
    loaded: float
    in_use: int = 0

    @property
    def class_names(self) -> list[str]:
        return self.predictor.class_names

    def read(self, image: bytes | np.ndarray) -> Pixels:
        """An image file's content, or its pixels, as the programs take it.

        Raises:
          DataError: It cannot be used.
        """
        return self._reader.read(image, f"an image for {self.model}, version {self.number}")

    @functools.cached_property
    def _reader(self) -> ImageReader:
        return ImageReader(self.preprocessing)

    @contextlib.contextmanager
    def used(self) -> Iterator["Version"]:
        """Within, a request is under way with it."""
        self.in_use += 1
        try:
            yield self
        finally:
            self.in_use -= 1


def make_version(
    model: str,
    number: int,
    bundle: Bundle,
    digest: str,
    max_pixels: int,
    sizes: Sequence[int] = SIZES,
    served: Sequence[Version] = (),
) -> Version:
    """Makes a bundle ready: compiles, runs and judges it, which takes seconds.

    If one that is served has a network of the same kind, its programs are compiled and
    timed already, and there is little to do that those who are served could notice.

    Args:
      model: A name for it.
      number: Its version.
      bundle: What was read.
      digest: Of it.
      max_pixels: Of an image that is decoded; the bundle may allow fewer.
      sizes: Numbers of images that are computed at once.
      served: Versions that are there.

    Raises:
      BundleError: Its weights are not those of its network, or its answers no probabilities.
    """
    predictor = BundlePredictor(bundle)
    allowed = min(max_pixels, bundle.preprocessing.max_pixels)
    preprocessing = dataclasses.replace(bundle.preprocessing, max_pixels=allowed)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*preprocessing.image_size, 3), np.uint8)

    def explain(images: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        probabilities = predictor(images)
        of_class = maps.grad_cam(predictor, images, probabilities.argmax(axis=1))
        return list(zip(probabilities, of_class, strict=True))

    _judge(predictor(image[None])[0])
    alike = [other for other in served if _is_alike(other, predictor, preprocessing, sizes)]
    if alike:
        probabilities = Program(predictor, alike[0].probabilities.seconds)
        explained = Program(explain, alike[0].explained.seconds)
    else:
        probabilities = measure(predictor, image, sizes)
        explained = measure(explain, image, (1,))
    return Version(
        model=model,
        number=number,
        predictor=predictor,
        preprocessing=preprocessing,
        probabilities=probabilities,
        explained=explained,
        metrics=bundle.metrics,
        digest=digest,
        loaded=time.time(),
    )


def _is_alike(
    version: Version, predictor: BundlePredictor, preprocessing: Preprocessing, sizes: Sequence[int]
) -> bool:
    """Whether a version's programs are those of a predictor, but for the weights."""
    return (
        version.predictor.model == predictor.model
        and version.predictor.preprocessing == predictor.preprocessing
        and version.preprocessing == preprocessing
        and version.probabilities.seconds.keys() == set(sizes)
    )


def _judge(probabilities: np.ndarray) -> None:
    """Raises BundleError if a network's answer says nothing."""
    if not np.all(np.isfinite(probabilities)) or abs(probabilities.sum() - 1) > _TOLERANCE:
        raise BundleError("the network's answers are not probabilities: its weights are damaged")
