"""Compares image corruptions with their published definitions, computed in float64.

The expected images are computed with SciPy, NumPy or loops. The images have a side of 224 pixels,
for which the constants of ImageNet-C were chosen. The tests draw the same random
numbers from the same generator, so that images are compared pixel by pixel. The difference is at
most half a grey level, because the corruptions round, and a little more where float32 rounds.
"""

import colorsys
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_image

from cnn_jax.quality import corruptions
from cnn_jax.quality.corruptions import CORRUPTIONS, FAMILIES, IMAGENET_C, SEVERITIES

# The constants of these corruptions are scaled to the image size. So it hardly matters whether an
# image is corrupted before or after downscaling.
SCALED = (
    *("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "elastic_transform"),
    *("snow", "frost", "fog", "spatter"),
)
# These corruptions do not use their seed.
NOT_RANDOM = {
    *("defocus_blur", "zoom_blur", "gaussian_blur", "brightness", "contrast", "pixelate"),
    *("jpeg_compression", "saturate", "resolution", "jpeg_quality", "darkness"),
}
# By definition, a higher severity of these corruptions does not always change an image more: glass
# blur has a varying number of rounds, elastic transform and saturate have two modes, frost has
# another texture at each severity, fog varies its decay, and snow has fewer flakes at severity 3
# than at severity 2.
NOT_MONOTONE = {"glass_blur", "elastic_transform", "saturate", "frost", "fog", "snow"}


@pytest.fixture(scope="module")
def photograph():
    """A photograph of a temple and the sky, with smooth and detailed parts, uint8 [224, 224, 3]."""
    return np.ascontiguousarray(load_sample_image("china.jpg")[120:344, 180:404])


def _rng(seed, severity):
    return np.random.default_rng([seed, severity])


def _assert_equal(levels, expected, tolerance=0.52):
    """Compares grey levels with expected values, which are first clipped to [0, 1]."""
    expected = np.clip(np.asarray(expected, np.float64), 0, 1) * 255
    np.testing.assert_allclose(levels, expected, rtol=0, atol=tolerance)


def _each(*constants):
    return pytest.mark.parametrize(("severity", "constant"), list(enumerate(constants, start=1)))


def _reduced(image, side):
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


# The following tests check how constants for 224 pixels are scaled to other image sizes.


def test_taps_are_distributed_to_whole_pixels():
    np.testing.assert_array_equal(corruptions._taps(2, 1.0), np.eye(5))
    # The taps of the kernel lie at -1, -0.5, 0, 0.5 and 1. Two pixels share the tap at -0.5, and
    # two pixels share the tap at 0.5.
    halves = [[1, 0.5, 0, 0, 0], [0, 0.5, 1, 0.5, 0], [0, 0, 0, 0.5, 1]]
    np.testing.assert_array_equal(corruptions._taps(2, 0.5), halves)
    # The taps of the kernel lie at -2, 0 and 2. Each tap is two pixels long, so that every pixel
    # gets a weight.
    twice = [
        *([0.25, 0, 0], [0.5, 0, 0], [0.25, 0.25, 0], [0, 0.5, 0]),
        *([0, 0.25, 0.25], [0, 0, 0.5], [0, 0, 0.25]),
    ]
    np.testing.assert_array_equal(corruptions._taps(1, 2.0), twice)
    for scale in (0.1, 0.3, 1.7):
        np.testing.assert_allclose(corruptions._taps(3, scale).sum(axis=0), 1)


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_an_affine_map_is_converted_between_scales(scale):
    """When an image is scaled, the pixel centre p moves to scale * (p + 0.5) - 0.5."""
    matrix = np.array([[1.1, 0.2, 5], [-0.3, 0.9, -7]])
    point = np.array([30.0, 50.0])
    mapped = corruptions._scaled_affine(matrix, scale) @ [*(scale * (point + 0.5) - 0.5), 1]
    np.testing.assert_allclose(mapped, scale * (matrix @ [*point, 1] + 0.5) - 0.5)


# Tests of the noise corruptions.


def _clipped_normal(mean, deviation):
    """Returns the mean and the standard deviation of a normal variable clipped to [0, 1]."""
    z = np.linspace(-8, 8, 200_001)
    weights = np.exp(-(z**2) / 2)
    values = np.clip(mean + deviation * z, 0, 1)
    first, second = (np.average(values**power, weights=weights) for power in (1, 2))
    return first, math.sqrt(second - first**2)


@pytest.mark.parametrize("level", [51, 128, 204])
@pytest.mark.parametrize(
    ("name", "constants", "is_proportional"),
    [
        ("gaussian_noise", (0.08, 0.12, 0.18, 0.26, 0.38), False),
        ("speckle_noise", (0.15, 0.2, 0.35, 0.45, 0.6), True),
    ],
)
def test_normal_noise_has_the_published_deviation(name, constants, is_proportional, level):
    image = np.full((300, 300, 3), level, np.uint8)
    for severity, constant in enumerate(constants, start=1):
        noisy = CORRUPTIONS[name](image, severity, 7)
        deviation = constant * level / 255 if is_proportional else constant
        mean, deviation = _clipped_normal(level / 255, deviation)
        assert noisy.mean() == pytest.approx(255 * mean, abs=0.7)
        assert noisy.std() == pytest.approx(255 * deviation, rel=0.01)
        # The noise is independent between the channels of a pixel, and between pixels.
        flat = noisy.reshape(-1, 3).astype(float)
        assert np.abs(np.corrcoef(flat.T) - np.eye(3)).max() < 0.02
        assert abs(np.corrcoef(flat[1:, 0], flat[:-1, 0])[0, 1]) < 0.02


@_each(60, 25, 12, 5, 3)
def test_shot_noise_is_poisson_noise(severity, constant):
    """Each value is a Poisson variable with mean value * constant, divided by the constant."""
    image = np.full((300, 300, 3), 77, np.uint8)
    noisy = CORRUPTIONS["shot_noise"](image, severity, 7)
    counts = np.arange(200)
    probabilities = scipy.stats.poisson.pmf(counts, 77 / 255 * constant)
    values = np.clip(counts / constant, 0, 1)
    mean = probabilities @ values
    deviation = math.sqrt(probabilities @ values**2 - mean**2)
    assert noisy.mean() == pytest.approx(255 * mean, abs=0.6)
    assert noisy.std() == pytest.approx(255 * deviation, rel=0.01)
    assert len(np.unique(noisy)) <= constant + 1
    assert corruptions.shot_noise(np.zeros((9, 9, 3), np.uint8), severity, 0).max() == 0


@_each(0.03, 0.06, 0.09, 0.17, 0.27)
def test_impulse_noise_is_half_salt_half_pepper(severity, constant):
    image = np.full((300, 300, 3), 128, np.uint8)
    noisy = CORRUPTIONS["impulse_noise"](image, severity, 7)
    fractions = [(noisy == level).mean() for level in (0, 255, 128)]
    assert fractions == pytest.approx([constant / 2, constant / 2, 1 - constant], abs=0.003)
    # Each channel of a pixel changes independently.
    changed = (noisy != 128).reshape(-1, 3)
    assert changed.any(axis=1).mean() == pytest.approx(1 - (1 - constant) ** 3, abs=0.006)


# Tests of the blur corruptions.
@_each(1, 2, 3, 4, 6)
def test_gaussian_blur_equals_scipy(photograph, severity, constant):
    expected = scipy.ndimage.gaussian_filter(
        photograph / 255, (constant, constant, 0), mode="nearest", truncate=4
    )
    _assert_equal(CORRUPTIONS["gaussian_blur"](photograph, severity, 0), expected)


@_each((3, 0.1, 3), (4, 0.5, 3), (6, 0.5, 3), (8, 0.5, 3), (10, 0.5, 5))
def test_defocus_blur_averages_over_a_soft_disk(photograph, severity, constant):
    radius, sigma, size = constant
    y, x = np.mgrid[-12:13, -12:13]
    disk = (x**2 + y**2 <= radius**2) / np.sum(x**2 + y**2 <= radius**2)
    taps = np.exp(-0.5 * (np.arange(-(size // 2), size // 2 + 1) / sigma) ** 2)
    taps /= taps.sum()
    # In the published code, the array of a large disk has no margin, so the Gaussian blur mirrors
    # the values at the border of the array.
    if radius >= 8:
        disk = disk[12 - radius : radius - 12, 12 - radius : radius - 12]
    for axis in (0, 1):
        disk = scipy.ndimage.convolve1d(disk, taps, axis, mode="mirror")
    expected = scipy.ndimage.convolve(photograph / 255, disk[..., np.newaxis], mode="mirror")
    _assert_equal(CORRUPTIONS["defocus_blur"](photograph, severity, 0), expected)


def _shuffled_by_the_published_loop(values, draws, reach):
    """Runs the loop of ImageNet-C: it copies pixels, although its code looks like a swap.

    `draws` holds (dx, dy) for each pixel.
    """
    height, width = values.shape
    values = values.copy()
    for y in range(height - reach, reach, -1):
        for x in range(width - reach, reach, -1):
            dx, dy = draws[:, y, x]
            values[y, x] = values[y + dy, x + dx]
    return values


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    reach=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_glass_blurs_shuffle_is_the_published_loop(height, width, reach, seed):
    origin = corruptions._shuffled(np.random.default_rng(seed), height, width, reach, 1.0)
    draws = np.random.default_rng(seed).integers(-reach, reach, (2, height, width))
    positions = np.arange(height * width).reshape(height, width)
    expected = _shuffled_by_the_published_loop(positions, draws, reach)
    np.testing.assert_array_equal(origin.reshape(height, width), expected)


def test_the_published_swap_copies():
    """A tuple assignment does not swap two rows of a NumPy array, because the rows are views."""
    image = np.array([[1, 1, 1], [2, 2, 2]])
    image[0], image[1] = image[1], image[0]
    np.testing.assert_array_equal(image, [[2, 2, 2], [2, 2, 2]])


@_each((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
def test_glass_blur_blurs_shuffles_and_blurs(photograph, severity, constant):
    sigma, reach, rounds = constant
    rng, blur = _rng(5, severity), (sigma, sigma, 0)
    image = scipy.ndimage.gaussian_filter(photograph / 255, blur, mode="nearest")
    for _ in range(rounds):
        draws = rng.integers(-reach, reach, (2, 224, 224))
        positions = np.arange(224 * 224).reshape(224, 224)
        image = image.reshape(-1, 3)[_shuffled_by_the_published_loop(positions, draws, reach)]
    expected = scipy.ndimage.gaussian_filter(image, blur, mode="nearest")
    _assert_equal(CORRUPTIONS["glass_blur"](photograph, severity, 5), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_glass_blur_moves_pixels_less_in_a_small_image(axis):
    """Grey levels encode pixel positions, in units of 1/224 of the image side."""
    moved = {}
    for side in (56, 224):
        levels = np.indices((side, side))[axis] * (224 // side)
        image = np.repeat(levels[..., np.newaxis], 3, axis=2).astype(np.uint8)
        change = CORRUPTIONS["glass_blur"](image, 5, 0).astype(float) - image
        moved[side] = change[side // 8 : -side // 8, side // 8 : -side // 8].std()
    # In a small image, the final blur covers fewer pixels, so it removes less of the change.
    assert moved[224] < moved[56] < 3 * moved[224]


def _smeared(image, radius, sigma, angle):
    """Applies ImageMagick's motion blur: a weighted sum of images shifted by whole pixels."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    total = np.zeros_like(image)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        dy = math.ceil(step * math.sin(math.radians(angle)) - 0.5)
        dx = math.ceil(step * math.cos(math.radians(angle)) - 0.5)
        y = np.clip(np.arange(image.shape[0]) + dy, 0, image.shape[0] - 1)
        x = np.clip(np.arange(image.shape[1]) + dx, 0, image.shape[1] - 1)
        total += weight * image[y[:, np.newaxis], x]
    return total


@_each((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
def test_motion_blur_equals_imagemagick(photograph, severity, constant):
    for seed in range(3):
        angle = _rng(seed, severity).uniform(-45, 45)
        expected = _smeared(photograph / 255, *constant, angle)
        _assert_equal(CORRUPTIONS["motion_blur"](photograph, severity, seed), expected)


def _clipped_zoom(image, factor):
    """Magnifies the centre of an image like the function `clipped_zoom` in ImageNet-C's code."""
    side = image.shape[0]
    cut = math.ceil(side / factor)
    top = (side - cut) // 2
    image = scipy.ndimage.zoom(
        image[top : top + cut, top : top + cut], (factor, factor, 1)[: image.ndim], order=1
    )
    trim = (image.shape[0] - side) // 2
    return image[trim : trim + side, trim : trim + side]


@_each((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
def test_zoom_blur_averages_magnified_images(photograph, severity, constant):
    image = photograph / 255
    factors = np.arange(1, *constant)
    layers = [image, *(_clipped_zoom(image, factor) for factor in factors)]
    # The tolerance is 1, because OpenCV rounds positions to a fraction of a pixel.
    _assert_equal(CORRUPTIONS["zoom_blur"](photograph, severity, 0), np.mean(layers, axis=0), 1)


# Tests of the weather corruptions.
@_each(
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
def test_snow_is_thresholded_magnified_and_blurred_noise(photograph, severity, constant):
    mean, deviation, factor, threshold, radius, sigma, weight = constant
    rng = _rng(5, severity)
    cut = math.ceil(224 / factor)
    noise = np.zeros((224, 224))
    top = (224 - cut) // 2
    noise[top : top + cut, top : top + cut] = rng.standard_normal((cut, cut), np.float32)
    flakes = _clipped_zoom(mean + deviation * noise, factor)
    flakes[flakes < threshold] = 0
    flakes = _smeared(np.clip(flakes, 0, 1), radius, sigma, rng.uniform(-135, -45))
    image = photograph / 255
    grey = image @ [0.299, 0.587, 0.114]
    pale = weight * image + (1 - weight) * np.maximum(image, 1.5 * grey[..., np.newaxis] + 0.5)
    expected = np.clip(pale + (flakes + np.rot90(flakes, 2))[..., np.newaxis], 0, 1) * 255
    difference = np.abs(CORRUPTIONS["snow"](photograph, severity, 5) - expected)
    # OpenCV rounds positions. The rounding can raise the value of a flake above the threshold, so a
    # few pixels may differ more.
    assert difference.mean() < 0.4
    assert np.quantile(difference, 0.99) < 2


def test_plasma_follows_the_diamond_square_algorithm():
    """Each point of the plasma is the mean of four neighbours on a torus, plus random noise."""
    side, decay = 8, 1.7
    surface = np.zeros((side, side))
    rng = np.random.default_rng(3)
    step, amplitude = side, 100.0
    while step >= 2:
        half, count = step // 2, side // step
        draws = [(2 * rng.random((count, count), np.float32) - 1) * amplitude**2 for _ in range(3)]
        grid = list(itertools.product(range(count), range(count)))
        for kind, (down, right) in enumerate([(half, half), (0, half), (half, 0)]):
            for i, j in grid:
                y, x = i * step + down, j * step + right
                around = (
                    [(-half, -half), (-half, half), (half, -half), (half, half)]
                    if kind == 0
                    else [(-half, 0), (half, 0), (0, -half), (0, half)]
                )
                neighbours = [surface[(y + dy) % side, (x + dx) % side] for dy, dx in around]
                surface[y, x] = np.mean(neighbours) + draws[kind][i, j]
        step, amplitude = half, amplitude / decay
    expected = (surface - surface.min()) / (surface.max() - surface.min())
    plasma = corruptions._plasma(np.random.default_rng(3), side, decay)
    np.testing.assert_allclose(plasma, expected, atol=1e-5)


@_each((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
def test_fog_adds_plasma_and_keeps_the_lightest_value(photograph, severity, constant):
    strength, decay = constant
    plasma = corruptions._plasma(_rng(5, severity), 256, decay)[:224, :224, np.newaxis]
    dim = (photograph // 2).astype(np.uint8)
    expected = (dim / 255 + strength * plasma) * dim.max() / (int(dim.max()) + 255 * strength)
    _assert_equal(CORRUPTIONS["fog"](dim, severity, 5), expected)


@_each((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
def test_frost_adds_a_part_of_a_texture_with_the_published_weights(photograph, severity, constant):
    image_weight, frost_weight = constant
    rng = _rng(5, severity)
    texture = corruptions._frost_texture(int(rng.integers(5)))
    y, x = rng.integers(0, [1024 - 224 + 1] * 2)
    part = texture[y : y + 224, x : x + 224]
    expected = (image_weight * photograph + frost_weight * part) / 255
    _assert_equal(CORRUPTIONS["frost"](photograph, severity, 5), expected)


# ImageNet-C takes its frost from five photographs. Each row has the mean red, green and blue of a
# photograph, and the standard deviation of its grey levels, which are the means of the three
# channels. The values were measured on the files of imagecorruptions 1.1.2.
PHOTOGRAPHS = [
    ((78, 149, 166), 19),
    ((201, 205, 214), 22),
    ((201, 205, 214), 22),
    ((138, 153, 165), 29),
    ((112, 123, 135), 43),
]


@pytest.mark.parametrize("number", range(5))
def test_frost_has_the_colours_and_contrasts_of_the_photographs(number):
    texture = corruptions._frost_texture(number).astype(float)
    colour, deviation = PHOTOGRAPHS[number]
    np.testing.assert_allclose(texture.mean(axis=(0, 1)), colour, atol=1)
    assert texture.mean(axis=2).std() == pytest.approx(deviation, rel=0.03)


def test_frost_uses_all_textures():
    black = np.zeros((32, 32, 3), np.uint8)
    hues = {tuple((corruptions.frost(black, 5, s).mean((0, 1)) // 30).tolist()) for s in range(40)}
    assert len(hues) >= 4


@_each((0.65, 0.3, 1, 0.65, 1.5), (0.67, 0.4, 1, 0.65, 1.5))
def test_mud_covers_where_smoothed_noise_is_high(photograph, severity, constant):
    mean, deviation, sigma, threshold, softness = constant
    severity += 3
    noise = _rng(5, severity).standard_normal((224, 224), np.float32)
    liquid = scipy.ndimage.gaussian_filter(mean + deviation * noise, sigma, mode="nearest")
    mud = scipy.ndimage.gaussian_filter((liquid > threshold) * 1.0, softness, mode="nearest")
    mud = np.where(mud < 0.8, 0, mud)[..., np.newaxis]
    expected = photograph / 255 * (1 - mud) + mud * np.array([63, 42, 20]) / 255
    spattered = CORRUPTIONS["spatter"](photograph, severity, 5)
    # Pixels near a threshold may differ, because of rounding errors.
    assert np.mean(np.abs(spattered - 255 * expected) > 0.52) < 1e-3


@_each((4, 0.69, 0.6), (3, 0.68, 0.6), (2, 0.68, 0.5))
def test_water_is_an_embossed_distance_to_the_drops_edges(severity, constant):
    sigma, threshold, strength = constant
    noise = _rng(5, severity).standard_normal((224, 224), np.float32)
    liquid = scipy.ndimage.gaussian_filter(0.65 + 0.3 * noise, sigma, mode="nearest")
    levels = (np.where(liquid < threshold, 0, liquid) * 255).astype(np.uint8)
    edges = cv2.Canny(levels, 50, 150)
    distance = np.minimum(scipy.ndimage.distance_transform_edt(edges == 0), 20)
    distance = cv2.blur(distance, (3, 3)).astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = cv2.blur(cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, emboss), (3, 3))
    shine = levels * relief.astype(float)
    expected = strength * (shine / shine.max())[..., np.newaxis] * np.array([175, 238, 238])
    spattered = CORRUPTIONS["spatter"](np.zeros((224, 224, 3), np.uint8), severity, 5)
    # OpenCV's distances are approximate, and the histogram equalisation magnifies the differences.
    assert np.abs(spattered - expected).mean() < 0.25 * expected.mean()
    assert np.corrcoef(spattered.ravel(), expected.ravel())[0, 1] > 0.95


def test_water_is_uniform_far_from_edges_and_may_be_absent():
    y, x = np.mgrid[:224, :224]
    drop = ((x - 112) ** 2 + (y - 112) ** 2 < 80**2).astype(np.float32)
    shine = corruptions._shaded(drop)
    # All pixels of `middle` are more than 20 pixels from the edge of the drop, and distances are
    # clipped at 20.
    middle = shine[75:150, 75:150]
    assert middle.min() == middle.max() > 0
    assert shine.max() == 1
    with np.errstate(all="raise"):
        assert not corruptions._shaded(np.zeros((224, 224), np.float32)).any()


# The pairs belong to the severities 1 to 5. Each pair is the mean and the root mean square of the
# change in grey levels when the code of imagecorruptions 1.1.2 corrupts `photograph`. The values
# were computed over ten or more seeds (0, 1, 2, ...).
PUBLISHED = {
    "snow": [(39.4, 43.1), (60.4, 66.6), (60.2, 67.5), (71.2, 80.8), (81.9, 90.8)],
    "spatter": [(0.7, 5.5), (4.0, 14.4), (7.2, 18.9), (-8.9, 34.4), (-14.4, 44.0)],
    "fog": [(-0.3, 52.2), (-0.3, 57.9), (-0.7, 63.3), (-0.2, 64.2), (0.4, 67.7)],
    "frost": [(56.7, 61.3), (66.2, 75.8), (70.6, 83.5), (66.6, 80.8), (68.7, 84.9)],
}
# The tolerance for random differences between the published means and the means over the seeds of
# the test. The published means of snow, spatter, fog and frost vary by 0.5, 1, 13 and 25 grey
# levels between seeds.
CHANCE = {"snow": 1.5, "spatter": 1.5, "fog": 8, "frost": 15}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weather_is_as_strong_as_published(photograph, name):
    for severity, (mean, deviation) in zip(SEVERITIES, PUBLISHED[name], strict=True):
        change = [
            CORRUPTIONS[name](photograph, severity, seed).astype(np.float32) - photograph
            for seed in range(20 if name in ("fog", "frost") else 5)
        ]
        assert np.mean(change) == pytest.approx(mean, abs=CHANCE[name])
        assert np.sqrt(np.mean(np.square(change))) == pytest.approx(deviation, abs=CHANCE[name])


def _change_hsv(image, change):
    """Applies a function to the HSV values of each pixel, with Python's `colorsys`."""
    pixels = [change(*colorsys.rgb_to_hsv(*pixel)) for pixel in image.reshape(-1, 3) / 255]
    rgb = [colorsys.hsv_to_rgb(*pixel) for pixel in pixels]
    return np.array(rgb).reshape(image.shape)


@pytest.fixture
def colours():
    """An image of random colours, with greys from black to white in the first row."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    colours[0] = np.linspace(0, 255, 20).round()[:, np.newaxis]
    return colours


@_each(0.1, 0.2, 0.3, 0.4, 0.5)
def test_brightness_adds_to_the_value(colours, severity, constant):
    expected = _change_hsv(colours, lambda h, s, v: (h, s, min(v + constant, 1)))
    _assert_equal(CORRUPTIONS["brightness"](colours, severity, 0), expected)


@_each((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
def test_saturate_changes_the_saturation(colours, severity, constant):
    factor, increase = constant
    expected = _change_hsv(colours, lambda h, s, v: (h, min(s * factor + increase, 1), v))
    _assert_equal(CORRUPTIONS["saturate"](colours, severity, 0), expected)


# Tests of the digital corruptions.
@_each(0.4, 0.3, 0.2, 0.1, 0.05)
def test_contrast_shrinks_about_the_channels_means(colours, severity, constant):
    image = colours / 255
    means = image.mean(axis=(0, 1))
    expected = means + constant * (image - means)
    _assert_equal(CORRUPTIONS["contrast"](colours, severity, 0), expected)


@_each((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
def test_elastic_transform_moves_corners_and_then_pixels(photograph, severity, constant):
    strength, sigma, shift = (244 * value for value in constant)
    rng = _rng(5, severity)
    # The corners lie 74 pixels from the centre (112, 112) in each direction.
    corners = np.array([[186, 186], [186, 38], [38, 38]], float)
    moved = corners + rng.uniform(-shift, shift, (3, 2))
    # This matrix maps the moved corners to the original corners, both as positions (x, y).
    affine = np.linalg.solve(np.hstack([moved, np.ones((3, 1))]), corners)
    y, x = np.mgrid[:224, :224].astype(float)
    from_x, from_y = np.moveaxis(np.stack([x, y, np.ones_like(x)], -1) @ affine, -1, 0)

    def sample(image, y, x, mode):
        channels = [
            scipy.ndimage.map_coordinates(image[..., channel], [y, x], order=1, mode=mode)
            for channel in range(3)
        ]
        return np.stack(channels, axis=-1)

    turned = sample(photograph / 255, from_y, from_x, "mirror")
    noise = 2 * rng.random((2, 224, 224), np.float32) - 1
    shift_x, shift_y = (
        strength * scipy.ndimage.gaussian_filter(layer, sigma, mode="reflect", truncate=3)
        for layer in noise.astype(float)
    )
    expected = sample(turned, y + shift_y, x + shift_x, "reflect") * 255
    difference = np.abs(CORRUPTIONS["elastic_transform"](photograph, severity, 5) - expected)
    # Rounding to grey levels causes a mean difference of 0.25. OpenCV also rounds the positions.
    assert difference.mean() < 0.4
    assert np.quantile(difference, 0.999) < 2


@_each(0.6, 0.5, 0.4, 0.3, 0.25)
def test_pixelate_keeps_a_fraction_of_the_pixels(photograph, severity, constant):
    pixelated = CORRUPTIONS["pixelate"](photograph, severity, 0)
    if constant in (0.5, 0.25):  # With these constants, each block consists of whole pixels.
        side = int(1 / constant)
        blocks = photograph.reshape(224 // side, side, 224 // side, side, 3).mean(axis=(1, 3))
        expected = blocks.repeat(side, axis=0).repeat(side, axis=1) / 255
        _assert_equal(pixelated, expected, 1)
    distinct_rows = 1 + (np.abs(np.diff(pixelated.astype(int), axis=0)).sum(axis=(1, 2)) > 0).sum()
    kept = int(224 * constant)
    assert kept <= distinct_rows <= 2 * kept


@_each(25, 18, 15, 10, 7)
def test_jpeg_compression_is_that_of_another_encoder(photograph, severity, constant):
    _, encoded = cv2.imencode(".jpg", photograph[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, constant])
    expected = cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1] / 255
    difference = CORRUPTIONS["jpeg_compression"](photograph, severity, 0) - 255 * expected
    assert np.abs(difference).mean() < 0.5


# Tests of the quality corruptions.
@_each(90, 75, 60, 45, 30)
def test_jpeg_quality_has_its_own_scale(photograph, severity, constant):
    compressed = CORRUPTIONS["jpeg_quality"](photograph, severity, 0)
    np.testing.assert_array_equal(compressed, corruptions._as_jpeg(photograph, constant))


@_each(1.5, 2, 3, 4, 6)
def test_resolution_reduces_and_enlarges(photograph, severity, constant):
    image = photograph[:216, :216]
    side, halves = round(216 / constant), round(2 * constant)
    reduced = image.repeat(2, axis=0).repeat(2, axis=1)
    reduced = reduced.reshape(side, halves, side, halves, 3).mean(axis=(1, 3))
    enlarged = scipy.ndimage.zoom(
        reduced, (216 / side, 216 / side, 1), order=1, mode="nearest", grid_mode=True
    )
    _assert_equal(CORRUPTIONS["resolution"](image, severity, 0), enlarged / 255, 1.2)


@_each(0.75, 0.5, 0.35, 0.25, 0.15)
def test_darkness_multiplies_grey_levels(colours, severity, constant):
    _assert_equal(CORRUPTIONS["darkness"](colours, severity, 0), constant * colours / 255)


@_each(0.9, 0.8, 0.7, 0.6, 0.5)
def test_crop_shows_a_part_of_the_image(severity, constant):
    """The grey levels of each pixel encode the pixel's position in the original image."""
    side = 200
    y, x = np.mgrid[:side, :side].astype(np.uint8)
    positions = np.stack([y, x, x], axis=-1)
    for seed in range(5):
        cropped = CORRUPTIONS["crop"](positions, severity, seed).astype(float)
        lengths = cropped[..., :2].max(axis=(0, 1)) - cropped[..., :2].min(axis=(0, 1)) + 1
        np.testing.assert_allclose(lengths, side * constant, atol=1)
        # The crop is enlarged with interpolation, so neighbouring pixels have similar positions.
        assert np.abs(np.diff(cropped[:, 0, 0])).max() <= 2
    corners = [corruptions.crop(positions, severity, seed)[0, 0].tolist() for seed in range(20)]
    assert len({y for y, _, _ in corners}) > 8
    assert len({x for _, x, _ in corners}) > 8


# Tests of all corruptions.
def test_there_are_19_corruptions_of_imagenet_c_and_4_more():
    assert len(IMAGENET_C) == 19
    assert len(CORRUPTIONS) == 23
    assert list(FAMILIES) == ["noise", "blur", "weather", "digital", "quality"]
    assert [len(family) for family in FAMILIES.values()] == [4, 5, 5, 5, 4]
    assert set(CORRUPTIONS) - set(IMAGENET_C) == {"resolution", "jpeg_quality", "darkness", "crop"}
    for name, function in CORRUPTIONS.items():
        assert function.__name__ == name


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 300), (31, 33), (230, 225)])
def test_corruptions_keep_any_image_size(name, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    before = image.copy()
    for severity in (1, 5) if size != (31, 33) else SEVERITIES:
        corrupted = CORRUPTIONS[name](image, severity, 3)
        assert corrupted.shape == image.shape
        assert corrupted.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("level", [0, 128, 255])
def test_uniform_images_are_corrupted_without_warnings(name, level):
    """Corruptions of uniform images, whose contrast is zero, must not divide by zero."""
    image = np.full((16, 16, 3), level, np.uint8)
    with np.errstate(all="raise"):
        corrupted = CORRUPTIONS[name](image, 3, 0)
    if name.endswith("blur") or name in ("contrast", "pixelate", "resolution", "crop"):
        np.testing.assert_array_equal(corrupted, image)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_functions_of_image_severity_and_seed(photograph, name):
    image = _reduced(photograph, 40)
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first = CORRUPTIONS[name](image, 2, 9)
    rows = [(severity, seed) for severity in SEVERITIES for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        corrupted_images = list(pool.map(lambda row: CORRUPTIONS[name](image, *row), rows))
    for row, corrupted in zip(rows, corrupted_images, strict=True):
        np.testing.assert_array_equal(corrupted, CORRUPTIONS[name](image, *row))
    np.testing.assert_array_equal(CORRUPTIONS[name](image, 2, 9), first)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    is_same = np.array_equal(CORRUPTIONS[name](image, 2, 10), first)
    assert is_same == (name in NOT_RANDOM)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("severity", [0, 6, -1])
def test_another_severity_is_refused(name, severity):
    with pytest.raises(ValueError, match="severity must be 1 to 5"):
        CORRUPTIONS[name](np.zeros((4, 4, 3), np.uint8), severity, 0)


@pytest.mark.parametrize("side", [64, 128])
def test_a_higher_severity_changes_the_image_more(photograph, side):
    image = _reduced(photograph, side)
    for name, corruption in CORRUPTIONS.items():
        distances = [
            np.mean(
                [
                    np.square(corruption(image, severity, seed).astype(np.float32) - image).mean()
                    for seed in range(6)
                ]
            )
            for severity in SEVERITIES
        ]
        if name in NOT_MONOTONE:
            assert min(distances) > 10, name
        else:
            assert sorted(distances) == distances, name


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("side", [56, 112])
def test_a_small_image_looks_like_a_reduced_large_image(photograph, name, side):
    small = _reduced(photograph, side)
    for severity in SEVERITIES:
        reduced = _reduced(CORRUPTIONS[name](photograph, severity, 5), side).astype(float)
        # A blur of less than one pixel is inaccurate, so 1.5 grey levels are allowed.
        difference = np.abs(reduced - CORRUPTIONS[name](small, severity, 5)).mean()
        assert difference < 0.4 * np.abs(reduced - small).mean() + 1.5, severity


@pytest.mark.parametrize("name", SCALED)
def test_a_large_image_looks_like_an_enlarged_small_image(photograph, name):
    smooth = scipy.ndimage.gaussian_filter(photograph, (2, 2, 0))
    large = cv2.resize(smooth, (448, 448), interpolation=cv2.INTER_LINEAR)
    for severity in (1, 3, 5):
        reduced = _reduced(CORRUPTIONS[name](large, severity, 5), 224).astype(float)
        difference = np.abs(reduced - CORRUPTIONS[name](smooth, severity, 5)).mean()
        assert difference < 0.3 * np.abs(reduced - smooth).mean() + 0.5, severity
