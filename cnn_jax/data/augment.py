"""Image augmentation in two steps: draw random parameters, then apply them to a batch of images.

The random parameters of an image are a contrast factor and a 2 x 3 matrix, which combines flip,
rotation and zoom in one resampling. `draw` draws the parameters on the host with NumPy.
`apply_on_device` (JAX) and `apply_on_host` (OpenCV) apply them. The transformations are those of
the Keras layers `RandomFlip`, `RandomRotation`, `RandomZoom` and `RandomContrast`, in this order,
with `fill_mode="reflect"` and bilinear interpolation.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, UInt8

# The names of the arrays that `draw` returns. `apply_on_device` and `apply_on_host` have parameters
# with the same names.
_DRAWS = ("matrix", "contrast")


def _range(default: Any, words: str) -> Any:
    """Creates a field of `Augmentation`.

    Args:
      default: The value that does not change the images.
      words: The text for any other value, with "{}" in the place of the value.
    """
    return dataclasses.field(default=default, metadata={"words": words})


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The ranges from which the random parameters of augmentation are drawn.

    The default of each range does not change the images.

    Attributes:
      flip: One of `schema.FLIPS`; each named axis is mirrored with probability 1/2.
      rotation: The largest angle in both directions, as a fraction of a full turn.
      zoom: The sampled window's side is 1 - zoom to 1 + zoom times the image's side.
      contrast: The contrast factor is 1 - contrast to 1 + contrast.
    """

    flip: str = _range("none", "flip {}")
    rotation: float = _range(0.0, "rotation up to {:g}")
    zoom: float = _range(0.0, "zoom up to {:g}")
    contrast: float = _range(0.0, "contrast up to {:g}")

    @classmethod
    def from_config(cls, augment: Any) -> "Augmentation":
        """Creates an `Augmentation` from the section `augment` of a configuration.

        Missing keys get their defaults.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: augment[name] for name in names if name in augment})

    def is_identity(self) -> bool:
        return self == Augmentation()

    def describe(self) -> str:
        """Describes the ranges as text, such as "flip horizontal, rotation up to 0.2"."""
        values = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return ", ".join(
            field.metadata["words"].format(value).replace("_", " ")
            for field, value in values
            if value != field.default
        )


def affine_matrix(
    mirror_x: np.ndarray,
    mirror_y: np.ndarray,
    angle: np.ndarray,
    window: np.ndarray,
    image_size: tuple[int, int],
) -> Float[np.ndarray, "batch 2 3"]:
    """Returns the affine matrices [A | t] that map output coordinates (x, y) to input coordinates.

    Args:
      mirror_x: bool [B], mirror left and right.
      mirror_y: bool [B], mirror top and bottom.
      angle: float [B], radians; positive turns the picture counter-clockwise.
      window: float [B], side of the sampled window divided by the image's side; a value
        above 1 zooms out.
      image_size: (height, width) in pixels.

    Returns:
      float32 [B, 2, 3]. The image's centre, ((width - 1) / 2, (height - 1) / 2), is fixed.
    """
    cos, sin = window * np.cos(angle), window * np.sin(angle)
    sign_x, sign_y = np.where(mirror_x, -1, 1), np.where(mirror_y, -1, 1)
    linear = np.stack(
        [np.stack([sign_x * cos, -sign_x * sin], -1), np.stack([sign_y * sin, sign_y * cos], -1)],
        axis=-2,
    )
    height, width = image_size
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = centre - linear @ centre
    return np.concatenate([linear, offset[..., None]], axis=-1).astype(np.float32)


def draw(
    rng: np.random.Generator,
    augmentation: Augmentation,
    batch_size: int,
    image_size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Draws the random parameters of a batch: "matrix" [B, 2, 3] and "contrast" [B], float32."""
    angle = augmentation.rotation * 2 * math.pi
    # Each random number is drawn even if its augmentation is off, so that a change of one
    # augmentation does not change the random numbers of another augmentation.
    coin_x, coin_y = rng.random(batch_size) < 0.5, rng.random(batch_size) < 0.5
    matrix = affine_matrix(
        mirror_x=coin_x & ("horizontal" in augmentation.flip),
        mirror_y=coin_y & ("vertical" in augmentation.flip),
        angle=rng.uniform(-1, 1, batch_size) * angle,
        window=1 + rng.uniform(-1, 1, batch_size) * augmentation.zoom,
        image_size=image_size,
    )
    contrast = 1 + rng.uniform(-1, 1, batch_size) * augmentation.contrast
    return {"matrix": matrix, "contrast": contrast.astype(np.float32)}


def identity_draws(batch_size: int, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns parameters, in the format of `draw`, that leave a batch of images unchanged."""
    return draw(np.random.default_rng(0), Augmentation(), batch_size, image_size)


def draws_in(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the random parameters that a batch contains, as arguments for `apply_on_device`."""
    return {name: batch[name] for name in _DRAWS if name in batch}


def apply_on_device(
    images: UInt8[Array, "batch height width channel"],
    matrix: Float[Array, "batch 2 3"],
    contrast: Float[Array, " batch"],
) -> Float[Array, "batch height width channel"]:
    """Augments images in JAX with parameters from `draw`; returns float32 grey levels, 0 to 255."""
    _, height, width, _ = images.shape
    y, x = jnp.mgrid[:height, :width].astype(jnp.float32)
    output_pixels = jnp.stack([x, y, jnp.ones_like(x)])

    def warp(image: Array, matrix: Array) -> Array:
        source_x, source_y = jnp.einsum(
            "ij,jhw->ihw", matrix, output_pixels, precision=jax.lax.Precision.HIGHEST
        )
        # The mode "reflect" repeats the edge pixel: (d c b a | a b c d | d c b a).
        sample = jax.vmap(
            lambda channel: map_coordinates(channel, [source_y, source_x], order=1, mode="reflect"),
            in_axes=-1,
            out_axes=-1,
        )
        return sample(image.astype(jnp.float32))

    warped = jax.vmap(warp)(images, matrix)
    mean = jnp.mean(warped, axis=(1, 2), keepdims=True)
    return jnp.clip((warped - mean) * contrast[:, None, None, None] + mean, 0, 255)


@functools.cache
def opencv() -> ModuleType:
    """Imports OpenCV on first use, because OpenCV is not installed on some accelerator hosts.

    This function also sets OpenCV to use only the calling thread. The callers already run one
    thread per core, and OpenCV's own threads wait actively, which would slow them down.
    """
    import cv2

    cv2.setNumThreads(1)
    return cv2


def apply_on_host(
    images: UInt8[np.ndarray, "batch height width channel"],
    matrix: Float[np.ndarray, "batch 2 3"],
    contrast: Float[np.ndarray, " batch"],
) -> UInt8[np.ndarray, "batch height width channel"]:
    """Augments images in OpenCV with parameters from `draw`; returns uint8 grey levels, rounded."""
    cv2 = opencv()
    height, width, channels = images.shape[1:]
    out = np.empty_like(images)
    # A rotation reads pixels across rows. The image is first copied into the cache of the CPU
    # core: for 224 x 224 pixels, this is 1.5 times as fast as reading from main memory.
    near = np.empty_like(images[0])
    means = []
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    for image, moved, affine in zip(images, out, matrix, strict=True):
        near[...] = image
        # For a small image, keyword arguments would make this call 10 % slower.
        cv2.warpAffine(near, affine, (width, height), moved, flags, cv2.BORDER_REFLECT)
        means.append(cv2.mean(moved)[:channels])
    # The change of contrast, (x - mean) * contrast + mean, is written as a matrix of shape
    # [channel, channel + 1] for each image.
    scale = contrast[:, None, None] * np.eye(channels, dtype=np.float32)
    offset = np.array(means, np.float32) * (1 - contrast[:, None])
    for image, transform in zip(out, np.concatenate([scale, offset[..., None]], 2), strict=True):
        cv2.transform(image, transform, image)
    return out
