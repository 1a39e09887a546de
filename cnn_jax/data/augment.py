"""Augmentation in two steps: random draws, and their application to the pixels of a batch.

A draw is a 2 x 3 matrix, which combines flip, rotation and zoom in one resampling, and a
contrast factor. `draw` makes draws on the host with NumPy. `apply_on_device` (JAX) and
`apply_on_host` (OpenCV) apply the same draws. The transformations are those of the Keras
layers `RandomFlip`, `RandomRotation`, `RandomZoom` and `RandomContrast`, in this order, with
`fill_mode="reflect"` and bilinear interpolation.
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

# The arrays of `draw`, which are the parameters of `apply_on_device` and `apply_on_host`.
_DRAWS = ("matrix", "contrast")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The ranges of the random draws of augmentation.

    Attributes:
      flip: One of `schema.FLIPS`; each named axis is mirrored with probability 1/2.
      rotation: The largest angle in both directions, as a fraction of a full turn.
      zoom: The sampled window's side is 1 - zoom to 1 + zoom times the image's side.
      contrast: The contrast factor is 1 - contrast to 1 + contrast.
    """

    flip: str = "none"
    rotation: float = 0.0
    zoom: float = 0.0
    contrast: float = 0.0

    @classmethod
    def from_config(cls, augment: Any) -> "Augmentation":
        """Makes an augmentation from the configuration's section `augment`.

        Missing keys get their defaults.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: augment[name] for name in names if name in augment})

    def is_identity(self) -> bool:
        return self == Augmentation()

    def describe(self) -> str:
        """The ranges in words, such as "flip horizontal, rotation up to 0.2"."""
        ranges = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ", ".join(
            f"{name} {value.replace('_', ' ')}"
            if isinstance(value, str)
            else f"{name} up to {value:g}"
            for name, value in ranges.items()
            if value not in ("none", 0)
        )


def affine_matrix(
    mirror_x: np.ndarray,
    mirror_y: np.ndarray,
    angle: np.ndarray,
    window: np.ndarray,
    image_size: tuple[int, int],
) -> Float[np.ndarray, "batch 2 3"]:
    """Returns the matrices [A | t] that map an output pixel (x, y) to its input pixel.

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
    """Makes the random draws for a batch: "matrix" [B, 2, 3] and "contrast" [B], float32."""
    angle = augmentation.rotation * 2 * math.pi
    # All numbers are always drawn, so a change of one range does not change the other draws.
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


def draws_in(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of `draw` that a batch carries, by the parameters of `apply_on_device`."""
    return {name: batch[name] for name in _DRAWS if name in batch}


def apply_on_device(
    images: UInt8[Array, "batch height width channel"],
    matrix: Float[Array, "batch 2 3"],
    contrast: Float[Array, " batch"],
) -> Float[Array, "batch height width channel"]:
    """Applies the draws of `draw` to images in JAX; returns grey levels, float32 in [0, 255]."""
    _, height, width, _ = images.shape
    y, x = jnp.mgrid[:height, :width].astype(jnp.float32)
    output_pixels = jnp.stack([x, y, jnp.ones_like(x)])

    def warp(image: Array, matrix: Array) -> Array:
        source_x, source_y = jnp.einsum(
            "ij,jhw->ihw", matrix, output_pixels, precision=jax.lax.Precision.HIGHEST
        )
        # "reflect" repeats the edge pixel: (d c b a | a b c d | d c b a).
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
    """Imports OpenCV when it is first used, because some accelerator hosts do not have it.

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
    """Applies the draws of `draw` to images with OpenCV; returns rounded grey levels, uint8."""
    cv2 = opencv()
    height, width, channels = images.shape[1:]
    out = np.empty_like(images)
    # A rotation reads pixels across rows. Reading them from a fresh copy, which is in the core's
    # cache, is 1.5 times as fast at 224 x 224 pixels as reading from main memory.
    near = np.empty_like(images[0])
    means = []
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    for image, moved, affine in zip(images, out, matrix, strict=True):
        near[...] = image
        # Named arguments would take 10 % more time for a small image.
        cv2.warpAffine(near, affine, (width, height), moved, flags, cv2.BORDER_REFLECT)
        means.append(cv2.mean(moved)[:channels])
    # (x - mean) * contrast + mean, as a matrix [channel, channel + 1] for each image.
    scale = contrast[:, None, None] * np.eye(channels, dtype=np.float32)
    offset = np.array(means, np.float32) * (1 - contrast[:, None])
    for image, transform in zip(out, np.concatenate([scale, offset[..., None]], 2), strict=True):
        cv2.transform(image, transform, image)
    return out
