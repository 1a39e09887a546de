"""Image corruptions of five families (noise, blur, weather, digital, quality) at five severities.

The module has the 19 common corruptions of ImageNet-C (Hendrycks & Dietterich, "Benchmarking
Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019) with the constants
of the authors' code, and four more in the family `quality`. Each corruption is a pure function
of (image, severity, seed): uint8 [h, w, 3] RGB of any size gives the same shape, severity is 1 to
5, and the seed, 0 or more, determines all random numbers. The functions are thread-safe.

**Size.** The constants of ImageNet-C are for images of 224 pixels. All lengths in pixels (radii,
widths of blurs, displacements, the grain of fog, frost, snow and spatter) are multiplied by
min(h, w) / 224. A small image therefore looks like a large image that was corrupted first and
reduced afterwards, and at 224 pixels the lengths are the published values. CIFAR-10-C and
Tiny-ImageNet-C do almost the same with constants of their own, which also change grey levels
less. Grey levels, fractions of pixels, JPEG qualities, and `pixelate`, which is a ratio of the
image's own pixels, are the same at every size.

**Differences from the published code.** Grey levels are rounded, not truncated, and intermediate
results are not rounded. Frost is generated, not photographed (see `frost`). Motion blur follows
the definition of ImageMagick's (see `motion_blur`). Random numbers come from
`np.random.default_rng([seed, severity])`.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image

from cnn_jax.data.augment import opencv

SEVERITIES = (1, 2, 3, 4, 5)

Corruption = Callable[[np.ndarray, int, int], np.ndarray]
# An RGB or single-channel image with values from 0 to 1. The underscores tell jaxtyping not to
# compare the sizes of different images.
_Unit = Float32[np.ndarray, "_height _width _*channels"]

# The side, in pixels, of the images for which the constants of ImageNet-C were chosen.
_SIDE = 224
# The maximum aspect ratio of an overlay, such as fog. The overlay of a longer image is stretched,
# because an image of 1 x 1000 pixels would need an overlay of 224 x 224,000 pixels.
_MAX_ASPECT_RATIO = 4

_T = TypeVar("_T")


def _choose(severity: int, values: Sequence[_T]) -> _T:
    """Returns the value for a severity, 1 to 5, from a sequence of one value per severity."""
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be 1 to 5, got {severity}")
    return values[severity - 1]


def _rng(seed: int, severity: int) -> np.random.Generator:
    """Returns the random number generator of a corruption for a seed and a severity."""
    return np.random.default_rng([seed, severity])


def _unit(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Scales grey levels to the range 0 to 1."""
    return image.astype(np.float32) / np.float32(255)


def _levels(image: np.ndarray) -> UInt8[np.ndarray, "_height _width 3"]:
    """Converts values from 0 to 1 to rounded grey levels; values outside this range are clipped."""
    return np.clip(image * np.float32(255) + np.float32(0.5), 0, 255).astype(np.uint8)


def _scale(image: np.ndarray) -> float:
    """Returns the shorter side of an image, divided by 224, the side of ImageNet-C's images."""
    return min(image.shape[:2]) / _SIDE


def _layer_size(image: np.ndarray) -> tuple[int, int]:
    """Returns the (height, width) of an overlay, such as fog; the shorter side has 224 pixels."""
    height, width = (
        min(round(side / _scale(image)), _MAX_ASPECT_RATIO * _SIDE) for side in image.shape[:2]
    )
    return height, width


def _fit(layer: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Resizes an overlay, such as fog, to an image's size; averages pixels of a larger overlay."""
    height, width = image.shape[:2]
    if layer.shape[:2] == (height, width):
        return layer
    cv2 = opencv()
    is_smaller = height <= layer.shape[0] and width <= layer.shape[1]
    how = cv2.INTER_AREA if is_smaller else cv2.INTER_LINEAR
    return cv2.resize(layer, (width, height), interpolation=how)


@functools.lru_cache(maxsize=256)
def _taps(radius: int, scale: float) -> Float[np.ndarray, "pixels taps"]:
    """Returns the weight of each tap of a scaled filter at each pixel.

    Each tap is a box that is one pixel long or, if `scale` is above 1, as long as the distance
    between two taps. A pixel gets the fraction of the box that overlaps it. With a scale below 1
    this is linear interpolation; with scale 1 it is the identity.

    Args:
      radius: The filter has 2 * radius + 1 taps.
      scale: The distance between two taps, in pixels.
    """
    length = max(1.0, scale)
    reach = math.ceil(radius * scale + length / 2 - 0.5)
    pixels = np.arange(-reach, reach + 1)[:, np.newaxis]
    centres = np.arange(-radius, radius + 1) * scale
    ends = np.minimum(pixels + 0.5, centres + length / 2)
    starts = np.maximum(pixels - 0.5, centres - length / 2)
    return np.maximum(ends - starts, 0) / length


def _scaled_kernel(kernel: Float[np.ndarray, "side side"], scale: float) -> np.ndarray:
    """Resizes a kernel along both axes with the weights of `_taps`; keeps the kernel's sum."""
    taps = _taps(len(kernel) // 2, scale)
    return (taps @ kernel @ taps.T).astype(np.float32)


def _gaussian(image: _Unit, sigma: float, scale: float = 1.0) -> _Unit:
    """Blurs an image like SciPy's `gaussian_filter` with mode="nearest" and truncate=4."""
    cv2 = opencv()
    radius = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (_taps(radius, scale) @ (kernel / kernel.sum())).astype(np.float32)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


# Noise corruptions.


def gaussian_noise(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Adds normally distributed noise to each value, as in low light."""
    deviation = _choose(severity, (0.08, 0.12, 0.18, 0.26, 0.38))
    noise = _rng(seed, severity).standard_normal(image.shape, np.float32)
    return _levels(_unit(image) + np.float32(deviation) * noise)


def shot_noise(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Adds Poisson noise, as in very low light.

    The variance of the noise is the value divided by `quanta`.
    """
    quanta = _choose(severity, (60, 25, 12, 5, 3))
    return _levels(_rng(seed, severity).poisson(_unit(image) * np.float32(quanta)) / quanta)


def impulse_noise(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Adds salt-and-pepper noise: sets a fraction of each channel's values to 0 or 255."""
    fraction = _choose(severity, (0.03, 0.06, 0.09, 0.17, 0.27))
    drawn = _rng(seed, severity).random(image.shape, np.float32)
    salted = np.where(drawn < fraction / 2, np.uint8(255), image)
    return np.where((drawn >= fraction / 2) & (drawn < fraction), np.uint8(0), salted)


def speckle_noise(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Adds normally distributed noise in proportion to each value."""
    deviation = _choose(severity, (0.15, 0.2, 0.35, 0.45, 0.6))
    noise = _rng(seed, severity).standard_normal(image.shape, np.float32)
    return _levels(_unit(image) * (1 + np.float32(deviation) * noise))


# Blur corruptions.


def gaussian_blur(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Blurs the image with a Gaussian filter."""
    sigma = _choose(severity, (1, 2, 3, 4, 6))
    return _levels(_gaussian(_unit(image), sigma, _scale(image)))


def defocus_blur(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Blurs the image with a disk-shaped filter, like a lens that is out of focus."""
    radius, softness = _choose(severity, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)))
    cv2 = opencv()
    kernel = _scaled_kernel(_disk(radius, softness), _scale(image))
    return _levels(cv2.filter2D(_unit(image), -1, kernel, borderType=cv2.BORDER_REFLECT_101))


@functools.cache
def _disk(radius: int, softness: float) -> Float[np.ndarray, "side side"]:
    """Returns a disk-shaped filter with a blurred edge.

    The published grid ends at the edge of the two largest disks, and the blur is mirrored there.
    Their sum is therefore 1.01, which makes the image 1 % lighter. This function does the same.

    Args:
      radius: The radius of the disk, in pixels.
      softness: The standard deviation of the blur, in pixels.
    """
    offsets = np.arange(-max(radius, 8), max(radius, 8) + 1)
    disk = (offsets**2 + offsets[:, np.newaxis] ** 2 <= radius**2).astype(np.float64)
    size = (3, 3) if radius <= 8 else (5, 5)
    return opencv().GaussianBlur(disk / disk.sum(), ksize=size, sigmaX=softness)


def glass_blur(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Imitates frosted glass: blurs the image, moves each pixel a little, and blurs again.

    The published loop is meant to swap neighbours. With NumPy's views it does something else:
    each pixel, from the last to the first, gets a copy of the current value of its neighbour.
    `_shuffled` computes the same result for all pixels at once. The distance is scaled with the
    image's size; the grain is one pixel at every size.
    """
    sigma, reach, rounds = _choose(
        severity, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
    )
    cv2, scale, rng = opencv(), _scale(image), _rng(seed, severity)
    height, width = image.shape[:2]
    positions = np.arange(height * width)
    origin = positions
    for _ in range(rounds):
        origin = origin[_shuffled(rng, height, width, reach, scale)]
    # The steps are whole pixels of an image with a side of 224 pixels. In a smaller image, they
    # become fractions of a pixel.
    y, x = np.divmod(positions, width)
    step_y, step_x = origin // width - y, origin % width - x
    from_x = (x + scale * step_x).astype(np.float32).reshape(height, width)
    from_y = (y + scale * step_y).astype(np.float32).reshape(height, width)
    blurred = _gaussian(_unit(image), sigma, scale)
    moved = cv2.remap(blurred, from_x, from_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return _levels(_gaussian(moved, sigma, scale))


def _shuffled(
    rng: np.random.Generator, height: int, width: int, reach: int, scale: float
) -> Int[np.ndarray, " pixels"]:
    """Returns the position from which each pixel gets its value in one pass of the shuffle.

    The shuffle is the step of ImageNet-C's glass blur that moves pixels. A pass visits the pixels
    from the last to the first. It copies to each pixel the current value of a random neighbour, at
    a distance of -reach to reach - 1 pixels. A neighbour at a later position already contains a
    copy of the value of its own neighbour. These chains of copies are followed for all pixels at
    once, with steps that double.

    Args:
      rng: The generator that draws the neighbours.
      height: The height of the image.
      width: The width of the image.
      reach: The largest distance in each direction, in ImageNet-C's pixels.
      scale: The length of a pixel of ImageNet-C in pixels of the image.

    Returns:
      Positions in the image, row by row.
    """
    positions = np.arange(height * width).reshape(height, width)
    # Pixels near the edge keep their values, because their neighbours may lie outside the image.
    before, after = round((reach + 1) * scale), round((reach - 1) * scale)
    is_moved = np.zeros((height, width), bool)
    is_moved[before : height - after, before : width - after] = True
    step_x, step_y = rng.integers(-reach, reach, (2, height, width))
    y = np.clip(np.arange(height)[:, np.newaxis] + step_y, 0, height - 1)
    x = np.clip(np.arange(width) + step_x, 0, width - 1)
    neighbour = np.where(is_moved, y * width + x, positions).ravel()
    is_overwritten = (neighbour > positions.ravel()) & is_moved.ravel()[neighbour]
    end = np.where(is_overwritten, neighbour, positions.ravel())
    while not np.array_equal(end, further := end[end]):
        end = further
    return neighbour[end]


def motion_blur(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Blurs the image along a line, at a random angle of up to 45 degrees from the horizontal.

    This is MotionBlurImage of ImageMagick: the weights along the line are one half of a Gaussian,
    and each tap lies on the nearest whole pixel.
    """
    radius, sigma = _choose(severity, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)))
    angle = _rng(seed, severity).uniform(-45, 45)
    return _levels(_smear(_unit(image), radius, sigma, angle, _scale(image)))


def _smear(image: _Unit, radius: int, sigma: float, angle: float, scale: float) -> _Unit:
    """Applies motion blur to an image, along a line at a given angle.

    Args:
      image: The image, with values from 0 to 1.
      radius: Half the length of the line, in ImageNet-C's pixels.
      sigma: The standard deviation of the weights, in ImageNet-C's pixels.
      angle: The direction of the line in degrees, clockwise; 0 points to the right.
      scale: The length of a pixel of ImageNet-C in pixels of the image.
    """
    cv2 = opencv()
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    y = np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(int)
    x = np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(int)
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1))
    np.add.at(kernel, (2 * radius + y, 2 * radius + x), weights / weights.sum())
    kernel = _scaled_kernel(kernel, scale)
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)


def zoom_blur(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Averages the image with magnified copies of the image, as if the camera moved forward."""
    end, step = _choose(
        severity, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
    )
    cv2, scale = opencv(), _scale(image)
    height, width = image.shape[:2]
    unit = _unit(image)
    total = unit.copy()
    factors = np.arange(1, end, step)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    for factor in factors.tolist():
        (step_x, start_x), (step_y, start_y) = (
            _zoom(round(side / scale), factor) for side in (width, height)
        )
        affine = _scaled_affine(np.array([[step_x, 0, start_x], [0, step_y, start_y]]), scale)
        total += cv2.warpAffine(
            unit, affine, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE
        )
    return _levels(total / np.float32(len(factors) + 1))


def _zoom(side: int, factor: float) -> tuple[float, float]:
    """Returns the linear map from positions in a magnified image to positions in the image.

    ImageNet-C cuts out the middle of the image at whole pixels, magnifies it by SciPy's `zoom`,
    which maps the first and last pixel to themselves, and cuts the result to size.

    Args:
      side: The length of a side, in pixels.
      factor: The magnification.

    Returns:
      (step, start): position i of the magnified side shows position start + step * i.
    """
    cut = math.ceil(side / factor)
    magnified = round(cut * factor)
    step = (cut - 1) / (magnified - 1)
    return step, (side - cut) // 2 + (magnified - side) // 2 * step


def _scaled_affine(matrix: Float[np.ndarray, "2 3"], scale: float) -> Float[np.ndarray, "2 3"]:
    """Adapts an affine map for images of 224 pixels per side to images of another size."""
    # In both coordinate systems, pixel centres have integer coordinates, and the first pixel starts
    # at -0.5.
    shift = 0.5 / scale - 0.5
    linear, offset = matrix[:, :2], matrix[:, 2]
    offset = scale * (offset + linear.sum(axis=1) * shift - shift)
    return np.concatenate([linear, offset[:, np.newaxis]], axis=1)


# Weather corruptions.


def snow(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Makes the image whiter, and adds snowflakes that fall in two directions."""
    mean, deviation, size, threshold, radius, sigma, image_weight = _choose(
        severity,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    )
    cv2, rng = opencv(), _rng(seed, severity)
    height, width = _layer_size(image)
    noise = rng.standard_normal([math.ceil(side / size) for side in (height, width)], np.float32)
    (step_x, start_x), (step_y, start_y) = (_zoom(side, size) for side in (width, height))
    # Only the middle part of the noise is generated, because the magnification cuts off the edges.
    start_x -= (width - noise.shape[1]) // 2
    start_y -= (height - noise.shape[0]) // 2
    flakes = cv2.warpAffine(
        np.float32(mean) + np.float32(deviation) * noise,
        np.array([[step_x, 0, start_x], [0, step_y, start_y]]),
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    flakes[flakes < threshold] = 0
    flakes = _fit(np.clip(flakes, 0, 1), image)
    flakes = _smear(flakes, radius, sigma, rng.uniform(-135, -45), _scale(image))
    unit = _unit(image)
    grey = cv2.cvtColor(unit, cv2.COLOR_RGB2GRAY)[..., np.newaxis]
    weight = np.float32(image_weight)
    pale = weight * unit + (1 - weight) * np.maximum(unit, grey * np.float32(1.5) + np.float32(0.5))
    return _levels(pale + (flakes + np.rot90(flakes, 2))[..., np.newaxis])


def frost(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Adds ice crystals to the image.

    ImageNet-C adds a random part of one of five photographs, whose licence does not allow copies.
    This function uses five generated textures with the mean colours and contrasts of the
    photographs, and the published weights. The strength is therefore that of ImageNet-C, but the
    pattern is not.
    """
    image_weight, frost_weight = _choose(
        severity, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
    )
    rng = _rng(seed, severity)
    height, width = _layer_size(image)
    texture = _frost_texture(int(rng.integers(len(_FROSTS))))
    y, x = rng.integers(0, [_FROST_SIDE - height + 1, _FROST_SIDE - width + 1])
    layer = _fit(texture[y : y + height, x : x + width], image)
    return _levels(
        np.float32(image_weight) * _unit(image) + np.float32(frost_weight) * _unit(layer)
    )


# The mean R, G and B and the standard deviation of each frost photograph of ImageNet-C, in grey
# levels. The second and third photographs have the same values. The published code lists a sixth
# photograph but never chooses it.
_FROSTS = (
    ((78, 149, 166), 19),
    ((201, 205, 214), 22),
    ((201, 205, 214), 22),
    ((138, 153, 165), 29),
    ((112, 123, 135), 43),
)
# The side of a frost texture, in pixels. The frost for an image is cut out of a texture, and is
# never larger than a texture.
_FROST_SIDE = 1024


@functools.cache
def _frost_texture(number: int) -> UInt8[np.ndarray, "1024 1024 3"]:
    """Generates a frost texture: ice feathers on a cloudy background.

    The number is the position of the texture's mean colour and standard deviation in `_FROSTS`.
    """
    cv2, rng = opencv(), np.random.default_rng([number, *b"frost"])
    clouds = _plasma(rng, _FROST_SIDE, 1.7)
    crystals = np.zeros((_FROST_SIDE, _FROST_SIDE), np.uint8)
    for brightness in rng.integers(60, 256, 40).tolist():
        lines = np.concatenate([_feather(rng) for _ in range(40)])
        fixed_point = np.round(lines * 16).astype(np.int32)
        cv2.polylines(crystals, list(fixed_point), False, brightness, 1, cv2.LINE_AA, 4)
    # The thickness of the ice varies, so that some crystals are brighter than others.
    thickness = _plasma(rng, _FROST_SIDE, 2.2)
    pattern = clouds + (0.3 + thickness) * _gaussian(_unit(crystals), 0.6)
    pattern = (pattern - pattern.mean()) / pattern.std()
    colour, deviation = _FROSTS[number]
    levels = np.array(colour, np.float32) + np.float32(deviation) * pattern[..., np.newaxis]
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)


def _feather(rng: np.random.Generator) -> Float[np.ndarray, "lines 2 2"]:
    """Returns the lines of an ice crystal: a stem with barbs that become shorter towards the tip.

    The barbs are at an angle of 60 degrees to the stem.

    Returns:
      The two end points (x, y) of each line, in pixels.
    """
    length, angle = rng.uniform(20, 110), rng.uniform(0, 2 * math.pi)
    root = rng.uniform(0, _FROST_SIDE, 2)
    along = np.arange(4.0, length, rng.uniform(4, 7))[:, np.newaxis]
    stem = np.array([math.cos(angle), math.sin(angle)])
    lines = [np.stack([root, root + length * stem])[np.newaxis]]
    for side in (-1, 1):
        turned = angle + side * math.pi / 3
        barb = np.array([math.cos(turned), math.sin(turned)])
        starts = root + along * stem
        lines.append(np.stack([starts, starts + 0.3 * (length - along) * barb], axis=1))
    return np.concatenate(lines)


def fog(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Adds clouds of fog, and darkens the image so that its lightest value does not change."""
    strength, decay = _choose(severity, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)))
    height, width = _layer_size(image)
    side = 2 ** math.ceil(math.log2(max(height, width)))
    clouds = _plasma(_rng(seed, severity), side, decay)[:height, :width]
    unit = _unit(image)
    lightest = unit.max()
    foggy = unit + np.float32(strength) * _fit(clouds, image)[..., np.newaxis]
    return _levels(foggy * (lightest / (lightest + np.float32(strength))))


def _plasma(rng: np.random.Generator, side: int, decay: float) -> Float32[np.ndarray, "side side"]:
    """Returns a periodic fractal surface of values 0 to 1, made by the diamond-square algorithm.

    Args:
      rng: The generator that draws the noise.
      side: The side of the surface, in pixels: a power of two, 2 or more.
      decay: From each grid to the next finer grid, the amplitude of the noise is divided by the
        square of this number.
    """
    surface = np.zeros((side, side), np.float32)
    step, amplitude = side, 100.0**2
    while step >= 2:
        half = step // 2

        def add_noise(sums: np.ndarray, amplitude: float = amplitude) -> np.ndarray:
            noise = rng.random(sums.shape, np.float32) - np.float32(0.5)
            return sums * np.float32(0.25) + np.float32(2 * amplitude) * noise

        corners = surface[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        surface[half::step, half::step] = add_noise(pairs + np.roll(pairs, -1, axis=1))
        centres = surface[half::step, half::step]
        above = centres + np.roll(centres, 1, axis=0)
        beside = corners + np.roll(corners, -1, axis=1)
        surface[::step, half::step] = add_noise(above + beside)
        left = centres + np.roll(centres, 1, axis=1)
        below = corners + np.roll(corners, -1, axis=0)
        surface[half::step, ::step] = add_noise(left + below)
        step, amplitude = half, amplitude / decay**2
    surface -= surface.min()
    return surface / surface.max()


def spatter(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Adds drops of water (severities 1 to 3) or mud (severities 4 and 5), as on a lens."""
    mean, deviation, sigma, threshold, strength, is_mud = _choose(
        severity,
        (
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
    )
    noise = _rng(seed, severity).standard_normal(_layer_size(image), np.float32)
    liquid = _gaussian(np.float32(mean) + np.float32(deviation) * noise, sigma)
    liquid[liquid < threshold] = 0
    unit = _unit(image)
    if is_mud:
        drops = _gaussian((liquid > threshold).astype(np.float32), strength)
        drops[drops < 0.8] = 0
        drops = _fit(drops, image)[..., np.newaxis]
        return _levels(unit * (1 - drops) + drops * (np.array([63, 42, 20], np.float32) / 255))
    drops = _fit(np.float32(strength) * _shaded(liquid), image)[..., np.newaxis]
    return _levels(unit + drops * (np.array([175, 238, 238], np.float32) / 255))


def _shaded(liquid: Float32[np.ndarray, "height width"]) -> Float32[np.ndarray, "height width"]:
    """Returns the brightness of a layer of water, 0 to 1; the edges of drops are brightest."""
    cv2 = opencv()
    levels = (liquid * 255).astype(np.uint8)
    distance = cv2.distanceTransform(255 - cv2.Canny(levels, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.blur(np.minimum(distance, np.float32(20)), (3, 3)).astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
    relief = cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, emboss)
    shine = levels * cv2.blur(relief, (3, 3)).astype(np.float32)
    brightest = shine.max()
    return shine / brightest if brightest > 0 else shine


def brightness(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Makes the image brighter: increases the value V of each pixel in the HSV colour space."""
    increase = _choose(severity, (0.1, 0.2, 0.3, 0.4, 0.5))
    cv2 = opencv()
    hsv = cv2.cvtColor(_unit(image), cv2.COLOR_RGB2HSV)
    hsv[..., 2] = np.minimum(hsv[..., 2] + np.float32(increase), 1)
    return _levels(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


# Digital corruptions.


def contrast(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Reduces the contrast: moves the values of each channel towards the channel's mean."""
    factor = _choose(severity, (0.4, 0.3, 0.2, 0.1, 0.05))
    unit = _unit(image)
    means = unit.mean(axis=(0, 1))
    return _levels((unit - means) * np.float32(factor) + means)


def elastic_transform(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Distorts the image as a whole (severities 1 and 2) or locally (severities 3 to 5)."""
    # The published code uses 244 pixels and has the comment "should have been 224".
    strength, sigma, shift = (
        244 * constant
        for constant in _choose(
            severity,
            (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            ),
        )
    )
    cv2, scale, rng = opencv(), _scale(image), _rng(seed, severity)
    height, width = image.shape[:2]
    layer_height, layer_width = _layer_size(image)
    # Random shifts of three corners of a centred square define an affine map.
    middle, arm = np.array([layer_width // 2, layer_height // 2]), _SIDE // 3
    corners = (middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])).astype(np.float32)
    moved = corners + rng.uniform(-shift, shift, corners.shape).astype(np.float32)
    affine = _scaled_affine(cv2.getAffineTransform(corners, moved), scale)
    turned = cv2.warpAffine(
        _unit(image), affine, (width, height), borderMode=cv2.BORDER_REFLECT_101
    )
    noise = 2 * rng.random((2, layer_height, layer_width), np.float32) - 1
    shift_x, shift_y = (
        np.float32(scale * strength) * _fit(layer, image) for layer in _smoothed(noise, sigma)
    )
    from_x = np.arange(width, dtype=np.float32) + shift_x
    from_y = np.arange(height, dtype=np.float32)[:, np.newaxis] + shift_y
    bent = cv2.remap(turned, from_x, from_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return _levels(bent)


def _smoothed(
    layers: Float32[np.ndarray, "layers height width"], sigma: float
) -> Float32[np.ndarray, "layers height width"]:
    """Blurs arrays like SciPy's `gaussian_filter` with mode="reflect" and truncate=3.

    For an image that is mirrored at its edges, the blur is a multiplication of its cosine
    transform. The time does not depend on sigma. This matters because a filter may have a thousand
    taps here.
    """
    from scipy.fft import dctn, idctn

    height, width = layers.shape[1:]
    response = _response(height, sigma)[:, np.newaxis] * _response(width, sigma)
    return np.asarray(idctn(dctn(layers, axes=(1, 2)) * response, axes=(1, 2)))


@functools.lru_cache(maxsize=256)
def _response(length: int, sigma: float) -> Float32[np.ndarray, " length"]:
    """Returns the frequency response of a Gaussian blur that is truncated at 3 sigma.

    Each value is the factor by which the blur scales a component of the cosine transform of
    `length` pixels.
    """
    offsets = np.arange(-int(3 * sigma + 0.5), int(3 * sigma + 0.5) + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    cosines = np.cos(math.pi / length * np.arange(length)[:, np.newaxis] * offsets)
    return (cosines @ (weights / weights.sum())).astype(np.float32)


def pixelate(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Reduces the resolution of the image and shows the pixels as large squares."""
    fraction = _choose(severity, (0.6, 0.5, 0.4, 0.3, 0.25))
    height, width = image.shape[:2]
    size = (max(1, int(width * fraction)), max(1, int(height * fraction)))
    reduced = Image.fromarray(image).resize(size, Image.Resampling.BOX)
    return np.array(reduced.resize((width, height), Image.Resampling.BOX))


def jpeg_compression(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Compresses the image as a JPEG of very low quality: 25 (severity 1) to 7 (severity 5)."""
    return _as_jpeg(image, _choose(severity, (25, 18, 15, 10, 7)))


def _as_jpeg(
    image: UInt8[np.ndarray, "height width 3"], quality: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Encodes an image as a JPEG file with Pillow, and decodes the file.

    By default, Pillow halves the resolution of the colours.
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


def saturate(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Reduces (severities 1 and 2) or increases (severities 3 to 5) the HSV saturation.

    At severities 4 and 5 grey becomes reddish, because the hue of grey is 0, which is red.
    """
    factor, increase = _choose(severity, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)))
    cv2 = opencv()
    hsv = cv2.cvtColor(_unit(image), cv2.COLOR_RGB2HSV)
    hsv[..., 1] = np.minimum(hsv[..., 1] * np.float32(factor) + np.float32(increase), 1)
    return _levels(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


# Quality corruptions: defects of ordinary photographs.


def resolution(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Downscales the image by a factor of 1.5 to 6, and enlarges the result smoothly."""
    factor = _choose(severity, (1.5, 2, 3, 4, 6))
    cv2 = opencv()
    height, width = image.shape[:2]
    size = (max(1, round(width / factor)), max(1, round(height / factor)))
    reduced = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.resize(reduced, (width, height), interpolation=cv2.INTER_LINEAR)


def jpeg_quality(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Compresses the image as a JPEG of ordinary quality: 90 (severity 1) to 30 (severity 5).

    `jpeg_compression` has lower qualities.
    """
    return _as_jpeg(image, _choose(severity, (90, 75, 60, 45, 30)))


def darkness(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Multiplies all grey levels by a factor of 0.75 to 0.15, like underexposure."""
    factor = _choose(severity, (0.75, 0.5, 0.35, 0.25, 0.15))
    return _levels(_unit(image) * np.float32(factor))


def crop(
    image: UInt8[np.ndarray, "height width 3"], severity: int, seed: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Crops the image to a fraction, 0.9 to 0.5, of its height and width, and enlarges the crop.

    The position of the crop is random.
    """
    fraction = _choose(severity, (0.9, 0.8, 0.7, 0.6, 0.5))
    cv2, rng = opencv(), _rng(seed, severity)
    height, width = image.shape[:2]
    kept_height, kept_width = max(1, round(height * fraction)), max(1, round(width * fraction))
    y, x = rng.integers(0, [height - kept_height + 1, width - kept_width + 1])
    part = image[y : y + kept_height, x : x + kept_width]
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR)


# The families of corruptions in the order of the paper, and the family "quality". In each family,
# the corruptions that the paper uses only for validation come last.
FAMILIES: dict[str, dict[str, Corruption]] = {
    family: {function.__name__: function for function in functions}
    for family, functions in {
        "noise": (gaussian_noise, shot_noise, impulse_noise, speckle_noise),
        "blur": (defocus_blur, glass_blur, motion_blur, zoom_blur, gaussian_blur),
        "weather": (snow, frost, fog, brightness, spatter),
        "digital": (contrast, elastic_transform, pixelate, jpeg_compression, saturate),
        "quality": (resolution, jpeg_quality, darkness, crop),
    }.items()
}
# All corruptions, by name.
CORRUPTIONS: dict[str, Corruption] = {
    name: function for functions in FAMILIES.values() for name, function in functions.items()
}
# The names of ImageNet-C's 19 corruptions, over which the mean corruption error is computed.
IMAGENET_C = tuple(name for name in CORRUPTIONS if name not in FAMILIES["quality"])
