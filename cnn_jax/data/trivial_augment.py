"""TrivialAugment: one random operation of a random strength for each image.

The operations and the strengths are from the search space "Wide" of Müller and Hutter 2021,
"TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", table 1, in the version of
torchvision. There are two differences: the operations that move pixels turn and shear the image
around its centre, and `cnn_jax.data.augment` applies them in the same resampling as the other
augmentations. The other operations are Pillow's, and their equivalents in JAX.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image, ImageEnhance, ImageOps

# The operations that change grey levels, then those that move pixels.
LEVEL_OPERATIONS = (
    *("identity", "autocontrast", "equalize", "solarize", "posterize"),
    *("color", "contrast", "brightness", "sharpness"),
)
OPERATIONS = (*LEVEL_OPERATIONS, "rotate", "shear_x", "shear_y", "translate_x", "translate_y")
# The number of strengths, from none to the largest.
_LEVELS = 31
# The weights of R, G and B in Pillow's grey level, in units of 2**-16.
_GREY = (19595.0, 38470.0, 7471.0)


class Draws(NamedTuple):
    """The operations of a batch.

    Attributes:
      operation: int32 [B], the position in `LEVEL_OPERATIONS`.
      strength: float32 [B]: a factor for color, contrast, brightness and sharpness, a threshold for
        solarize, a number of bits for posterize.
      linear: float [B, 2, 2], which maps output to input coordinates relative to the centre.
      offset: float [B, 2], which is added to the input coordinates (x, y), in pixels.
    """

    operation: Int[np.ndarray, " batch"]
    strength: Float[np.ndarray, " batch"]
    linear: Float[np.ndarray, "batch 2 2"]
    offset: Float[np.ndarray, "batch 2"]


def draw(rng: np.random.Generator, batch_size: int) -> Draws:
    """Draws an operation and its strength for each image."""
    operation = rng.integers(0, len(OPERATIONS), batch_size)
    level = rng.integers(0, _LEVELS, batch_size) / (_LEVELS - 1)
    return make_draws(operation, level, rng.random(batch_size) < 0.5)


def make_draws(operation: np.ndarray, level: np.ndarray, is_negative: np.ndarray) -> Draws:
    """Returns the parameters of operations.

    Args:
      operation: int [B], the position in `OPERATIONS`.
      level: float [B], the strength from 0 (none, or the weakest) to 1 (the strongest).
      is_negative: bool [B], the direction of operations that have two directions.
    """
    signed = np.where(is_negative, -level, level)

    def values(name: str, chosen: np.ndarray) -> np.ndarray:
        return np.where(operation == OPERATIONS.index(name), chosen, 0.0)

    angle = values("rotate", np.deg2rad(135.0) * signed)
    cos, sin = np.cos(angle), np.sin(angle)
    shear_x, shear_y = values("shear_x", 0.99 * signed), values("shear_y", 0.99 * signed)
    linear = np.stack([np.stack([cos, shear_x - sin], -1), np.stack([shear_y + sin, cos], -1)], -2)
    offset = np.stack([values(f"translate_{axis}", 32.0 * signed) for axis in "xy"], -1)
    strength = np.select(
        [operation == OPERATIONS.index(name) for name in ("solarize", "posterize")],
        [255.0 * (1 - level), 8.0 - np.round(6 * level)],
        1 + 0.99 * signed,
    )
    is_level = operation < len(LEVEL_OPERATIONS)
    return Draws(
        operation=np.where(is_level, operation, 0).astype(np.int32),
        strength=strength.astype(np.float32),
        linear=linear,
        offset=offset,
    )


def apply_on_host(
    image: UInt8[np.ndarray, "height width 3"], operation: int, strength: float
) -> UInt8[np.ndarray, "height width 3"]:
    """Applies one of `LEVEL_OPERATIONS` with Pillow; see `Draws` for the strength."""
    if operation == 0:
        return image
    picture = Image.fromarray(image)
    functions: dict[str, Callable[[], Image.Image]] = {
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "solarize": lambda: ImageOps.solarize(picture, strength),  # pyright: ignore[reportArgumentType]
        "posterize": lambda: ImageOps.posterize(picture, int(strength)),
        "color": lambda: ImageEnhance.Color(picture).enhance(strength),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(strength),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(strength),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(strength),
    }
    return np.asarray(functions[LEVEL_OPERATIONS[operation]]())


def apply_on_device(
    images: Float[Array, "batch height width 3"],
    operation: Int[Array, " batch"],
    strength: Float[Array, " batch"],
) -> Float[Array, "batch height width 3"]:
    """Applies `LEVEL_OPERATIONS` to images in JAX; the grey levels are whole numbers, 0 to 255.

    Autocontrast, and factors for which a result is nearly a whole number, may give a level less or
    more than Pillow.
    """
    functions = (
        lambda image, _: image,
        _autocontrast,
        _equalize,
        lambda image, threshold: jnp.where(image < threshold, image, 255 - image),
        lambda image, bits: image - image % jnp.exp2(8 - bits),
        lambda image, factor: _blend(_grey(image), image, factor),
        lambda image, factor: _blend(jnp.floor(jnp.mean(_grey(image)) + 0.5), image, factor),
        lambda image, factor: _blend(jnp.zeros(()), image, factor),
        lambda image, factor: _blend(_smooth(image), image, factor),
    )
    return jax.vmap(lambda image, i, value: jax.lax.switch(i, functions, image, value))(
        images, operation, strength
    )


def _blend(base: Array, image: Array, factor: Array) -> Array:
    """Returns base + factor * (image - base), truncated as in Pillow's `Image.blend`."""
    return jnp.floor(jnp.clip(base + factor * (image - base), 0, 255))


def _grey(image: Array) -> Array:
    """Returns the grey image [height, width, 1]; the sums of whole numbers are exact in float32."""
    weighted = sum(weight * image[..., i : i + 1] for i, weight in enumerate(_GREY))
    return jnp.floor((weighted + 2**15) / 2**16)


def _autocontrast(image: Array, _: Array) -> Array:
    low, high = (reduce(image, axis=(0, 1), keepdims=True) for reduce in (jnp.min, jnp.max))
    stretched = jnp.floor((image - low) * 255 / jnp.maximum(high - low, 1))
    return jnp.where(high > low, stretched, image)


def _equalize(image: Array, _: Array) -> Array:
    def equalize(channel: Array) -> Array:
        levels = channel.astype(jnp.int32)
        histogram = jnp.zeros(256, jnp.int32).at[levels].add(1)
        step = (levels.size - histogram[jnp.max(levels)]) // 255
        before = jnp.cumsum(histogram) - histogram
        table = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table[levels].astype(channel.dtype), channel)

    return jax.vmap(equalize, in_axes=-1, out_axes=-1)(image)


def _smooth(image: Array) -> Array:
    """Applies Pillow's filter `SMOOTH`, which leaves the pixels at the border unchanged."""
    rows = image[:-2] + image[1:-1] + image[2:]
    squares = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inner = jnp.floor((squares + 4 * image[1:-1, 1:-1]) / 13 + 0.5)
    return image.at[1:-1, 1:-1].set(inner)
