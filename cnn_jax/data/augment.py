"""Image augmentation in two steps: draw random parameters, then apply them to a batch of images.

The random parameters of an image are a contrast factor and a 2 x 3 matrix, which combines crop,
flip, rotation and zoom in one resampling; TrivialAugment and random erasing add others. `draw`
draws the parameters on the host with NumPy. `apply_on_device` (JAX) and `apply_on_host` (OpenCV and
Pillow) apply them. Flip, rotation, zoom and contrast do the same as the Keras layers `RandomFlip`,
`RandomRotation`, `RandomZoom` and `RandomContrast`, in this order, with `fill_mode="reflect"` and
bilinear interpolation.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Int, UInt8

from cnn_jax.data import trivial_augment

# The names of the arrays that `draw` returns. `apply_on_device` and `apply_on_host` have parameters
# with the same names. The arrays after the first two are only returned if they have an effect.
_DRAWS = ("matrix", "contrast", "operation", "strength", "box", "colour")
# The ranges of the area of a box, as a fraction of the image's, and of its width divided by its
# height; and the number of boxes that are drawn to find one that fits into the image. The values
# for crops are from Szegedy et al. 2015, "Going Deeper with Convolutions", section 6; the values
# for erasing are from Zhong et al. 2020, "Random Erasing Data Augmentation", table 1. torchvision
# has the same values.
_CROP_RATIOS, _ERASED_AREAS, _ERASED_RATIOS = (3 / 4, 4 / 3), (0.02, 1 / 3), (0.3, 3.3)
_TRIES = 10


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
      crop_area: The area of a random crop is crop_area to 1 times the image's. The crop is then
        scaled to the size of the image.
      trivial_augment: Whether to apply TrivialAugment.
      erasing_probability: The probability that a box gets a random colour.
    """

    flip: str = _range("none", "flip {}")
    rotation: float = _range(0.0, "rotation up to {:g}")
    zoom: float = _range(0.0, "zoom up to {:g}")
    contrast: float = _range(0.0, "contrast up to {:g}")
    crop_area: float = _range(1.0, "crops of {:g} of the area or more")
    trivial_augment: bool = _range(False, "TrivialAugment")
    erasing_probability: float = _range(0.0, "random erasing of {:g} of the images")

    @classmethod
    def from_config(cls, augment: Any) -> "Augmentation":
        """Creates an `Augmentation` from the section `augment` of a configuration.

        Missing keys get their defaults.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: augment[name] for name in names if name in augment})

    def is_identity(self) -> bool:
        """Returns whether the augmentation leaves all images unchanged."""
        return self == Augmentation()

    def describe(self) -> str:
        """Describes the ranges as text, such as "flip horizontal, rotation up to 0.2"."""
        values = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return ", ".join(
            field.metadata["words"].format(value).replace("_", " ")
            for field, value in values
            if value != field.default
        )


class Affine(NamedTuple):
    """A map from output to input coordinates, relative to the image's centre.

    Attributes:
      linear: float [B, 2, 2].
      offset: float [B, 2], the offset (x, y) in pixels.
    """

    linear: Float[np.ndarray, "batch 2 2"]
    offset: Float[np.ndarray, "batch 2"]


def affine_matrix(
    mirror_x: np.ndarray,
    mirror_y: np.ndarray,
    angle: np.ndarray,
    window: np.ndarray,
    image_size: tuple[int, int],
    first: Affine | None = None,
    last: Affine | None = None,
) -> Float[np.ndarray, "batch 2 3"]:
    """Returns the affine matrices [A | t] that map output coordinates (x, y) to input coordinates.

    Args:
      mirror_x: bool [B], mirror left and right.
      mirror_y: bool [B], mirror top and bottom.
      angle: float [B], radians; positive turns the picture counter-clockwise.
      window: float [B], side of the sampled window divided by the image's side; a value
        above 1 zooms out.
      image_size: (height, width) in pixels.
      first: A transformation of the image before the flip.
      last: A transformation of the image after the zoom.

    Returns:
      float32 [B, 2, 3]. Flip, rotation and zoom keep the image's centre,
      ((width - 1) / 2, (height - 1) / 2), in its place.
    """
    cos, sin = window * np.cos(angle), window * np.sin(angle)
    sign_x, sign_y = np.where(mirror_x, -1, 1), np.where(mirror_y, -1, 1)
    linear = np.stack(
        [np.stack([sign_x * cos, -sign_x * sin], -1), np.stack([sign_y * sin, sign_y * cos], -1)],
        axis=-2,
    )
    moved = np.zeros((len(linear), 2))
    # The matrices map output to input positions, so the first transformation is the leftmost.
    if last is not None:
        linear, moved = linear @ last.linear, np.einsum("bij,bj->bi", linear, last.offset)
    if first is not None:
        linear = first.linear @ linear
        moved = np.einsum("bij,bj->bi", first.linear, moved) + first.offset
    height, width = image_size
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    offset = centre - linear @ centre + moved
    return np.concatenate([linear, offset[..., None]], axis=-1).astype(np.float32)


def draw(
    rng: np.random.Generator,
    augmentation: Augmentation,
    batch_size: int,
    image_size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Draws the random parameters of a batch.

    Args:
      rng: The generator. The result is a function of its state and of the other arguments.
      augmentation: The ranges of the parameters.
      batch_size: The number of images, B.
      image_size: (height, width) of the images in pixels.

    Returns:
      "matrix" [B, 2, 3] and "contrast" [B], float32. With TrivialAugment, also its "operation" and
      "strength"; see `trivial_augment.Draws`. With random erasing, also "box", int32 [B, 4], the
      top, left, bottom and right edge of the erased pixels, and "colour", uint8 [B, 3].
    """
    angle = augmentation.rotation * 2 * math.pi
    # Each random number is drawn even if its augmentation is off, so that a change of one
    # augmentation does not change the random numbers of another augmentation.
    coin_x, coin_y = rng.random(batch_size) < 0.5, rng.random(batch_size) < 0.5
    angles = rng.uniform(-1, 1, batch_size) * angle
    window = 1 + rng.uniform(-1, 1, batch_size) * augmentation.zoom
    contrast = 1 + rng.uniform(-1, 1, batch_size) * augmentation.contrast
    # These augmentations need many random numbers, so each has its own generator, which draws only
    # if the augmentation is on.
    seeds = rng.integers(0, 2**63, 3)
    draws, crop, move = {}, None, None
    if augmentation.crop_area < 1:
        crop_rng = np.random.default_rng(seeds[0])
        crop = _draw_crop(crop_rng, augmentation.crop_area, batch_size, image_size)
    if augmentation.trivial_augment:
        trivial = trivial_augment.draw(np.random.default_rng(seeds[1]), batch_size)
        move = Affine(trivial.linear, trivial.offset)
        draws |= {"operation": trivial.operation, "strength": trivial.strength}
    if augmentation.erasing_probability:
        probability = augmentation.erasing_probability
        erasing_rng = np.random.default_rng(seeds[2])
        draws["box"] = _draw_erased_box(erasing_rng, probability, batch_size, image_size)
        draws["colour"] = erasing_rng.integers(0, 256, (batch_size, 3), np.uint8)
    matrix = affine_matrix(
        mirror_x=coin_x & ("horizontal" in augmentation.flip),
        mirror_y=coin_y & ("vertical" in augmentation.flip),
        angle=angles,
        window=window,
        image_size=image_size,
        first=crop,
        last=move,
    )
    return {"matrix": matrix, "contrast": contrast.astype(np.float32)} | draws


def _draw_boxes(
    rng: np.random.Generator,
    batch_size: int,
    areas: tuple[float, float],
    ratios: tuple[float, float],
    image_size: tuple[int, int],
    otherwise: float,
) -> Float[np.ndarray, "batch 2"]:
    """Draws the width and the height of a box for each image, as fractions of the image's.

    Args:
      rng: The generator.
      batch_size: The number of images.
      areas: The range of the box's area, as a fraction of the image's.
      ratios: The range of the box's width divided by its height; its logarithm is uniform.
      image_size: (height, width) in pixels.
      otherwise: The width and the height if none of `_TRIES` boxes fits into the image.
    """
    shape = (batch_size, _TRIES)
    low, high = np.log(ratios)
    ratio = np.exp(rng.uniform(low, high, shape)) * image_size[0] / image_size[1]
    area = rng.uniform(*areas, shape)
    sides = np.sqrt(np.stack([area * ratio, area / ratio], axis=-1))
    fits = np.all(sides <= 1, axis=-1)
    first = sides[np.arange(batch_size), np.argmax(fits, axis=1)]
    return np.where(fits.any(axis=1)[:, None], first, otherwise)


def _draw_crop(
    rng: np.random.Generator, smallest_area: float, batch_size: int, image_size: tuple[int, int]
) -> Affine:
    sides = _draw_boxes(rng, batch_size, (smallest_area, 1.0), _CROP_RATIOS, image_size, 1.0)
    centres = (rng.random((batch_size, 2)) - 0.5) * (1 - sides)
    return Affine(sides[:, :, None] * np.eye(2), centres * image_size[::-1])


def _draw_erased_box(
    rng: np.random.Generator, probability: float, batch_size: int, image_size: tuple[int, int]
) -> Int[np.ndarray, "batch 4"]:
    is_erased = rng.random(batch_size) < probability
    sides = _draw_boxes(rng, batch_size, _ERASED_AREAS, _ERASED_RATIOS, image_size, 0.0)
    pixels = np.round(sides[:, ::-1] * image_size) * is_erased[:, None]
    corner = np.floor(rng.random((batch_size, 2)) * (image_size - pixels + 1))
    return np.concatenate([corner, corner + pixels], axis=1).astype(np.int32)


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
    operation: Int[Array, " batch"] | None = None,
    strength: Float[Array, " batch"] | None = None,
    box: Int[Array, "batch 4"] | None = None,
    colour: UInt8[Array, "batch channel"] | None = None,
) -> Float[Array, "batch height width channel"]:
    """Augments images in JAX.

    Args:
      images: Grey levels.
      matrix: See `draw`, like the other parameters. None: the augmentation is off.
      contrast: The factor of the distance of each grey level from the mean of its channel.
      operation: The operations of TrivialAugment.
      strength: The strengths of TrivialAugment.
      box: The boxes of random erasing, in pixels.
      colour: The colours of the boxes.

    Returns:
      Grey levels, float32, 0 to 255, which are not rounded.
    """
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
    out = jnp.clip((warped - mean) * contrast[:, None, None, None] + mean, 0, 255)
    if operation is not None and strength is not None:
        out = trivial_augment.apply_on_device(jnp.round(out), operation, strength)
    if box is not None and colour is not None:
        top, left, bottom, right = (box[:, edge, None, None] for edge in range(4))
        row, column = jnp.mgrid[:1, :height, :width][1:]
        is_erased = (top <= row) & (row < bottom) & (left <= column) & (column < right)
        out = jnp.where(is_erased[..., None], colour[:, None, None].astype(out.dtype), out)
    return out


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
    operation: Int[np.ndarray, " batch"] | None = None,
    strength: Float[np.ndarray, " batch"] | None = None,
    box: Int[np.ndarray, "batch 4"] | None = None,
    colour: UInt8[np.ndarray, "batch channel"] | None = None,
) -> UInt8[np.ndarray, "batch height width channel"]:
    """Augments images in OpenCV and Pillow, with the arguments of `apply_on_device`.

    Returns:
      Rounded grey levels. They differ from the result of `apply_on_device` by rounding only, also
      because OpenCV rounds the positions from which pixels are read.
    """
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
    if operation is not None and strength is not None:
        for image, number, value in zip(out, operation.tolist(), strength.tolist(), strict=True):
            image[...] = trivial_augment.apply_on_host(image, number, value)
    if box is not None and colour is not None:
        for image, (top, left, bottom, right), value in zip(out, box, colour, strict=True):
            image[top:bottom, left:right] = value
    return out
