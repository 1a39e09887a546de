"""The generated data set `shapes`: images of geometric shapes in ten classes.

Every image is a function of (seed, index), so a shorter data set is a prefix of a longer one.
A flip, a rotation, a zoom or a change of contrast does not change the label.
"""

import concurrent.futures
import functools
import io
import math
import multiprocessing
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFilter

from cnn_jax.data import Track, no_track
from cnn_jax.data.cache import cache_dir

# This version is part of the name of the data set's folder. Increase the version when any pixel
# changes.
VERSION = 1
NUM_IMAGES = 12_000
CLASS_NAMES = (
    "circle",
    "crescent",
    "cross",
    "ellipse",
    "heart",
    "ring",
    "semicircle",
    "square",
    "star",
    "triangle",
)
# For anti-aliasing, polygons are drawn this many times larger and then averaged to the final size.
_SUPERSAMPLING = 3

# The type of an outline: a closed polygon [n, 2] in the unit disc.
Outline = np.ndarray


def _arc(start: float, stop: float, num: int = 48) -> Outline:
    """Returns points [num, 2] on the unit circle between two angles in radians."""
    angle = np.linspace(start, stop, num)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _regular(corners: int, inner_radius: float | None = None) -> Outline:
    """Returns a regular polygon [n, 2], or a star if `inner_radius` is given."""
    if inner_radius is None:
        return _arc(0, 2 * math.pi, corners + 1)[:-1]
    points = _arc(0, 2 * math.pi, 2 * corners + 1)[:-1]
    points[1::2] *= inner_radius
    return points


def _heart() -> Outline:
    t = np.linspace(0, 2 * math.pi, 64)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1) / 17


def _cross(arm: float) -> Outline:
    corner = [(arm, 1.0), (arm, arm), (1.0, arm), (1.0, -arm), (arm, -arm), (arm, -1.0)]
    points = np.array(corner + [(-x, -y) for x, y in corner])
    return points / math.hypot(1.0, arm)


def _crescent(thickness: float) -> Outline:
    """Returns the outline of a crescent: an arc of the unit circle, and a flatter inner arc."""
    half = 0.75 * math.pi
    outer = _arc(-half, half)
    # The inner arc has the same end points as the outer arc, and is flatter.
    inner = outer[::-1].copy()
    end = math.cos(half)
    inner[:, 0] = end + (inner[:, 0] - end) * (1 - thickness)
    return np.concatenate([outer, inner])


def _outlines(name: str, rng: np.random.Generator) -> tuple[Outline, Outline | None]:
    """Returns a random shape of a class: its outline, and the outline of its hole (or None)."""
    if name == "circle":
        return _arc(0, 2 * math.pi), None
    if name == "ring":
        return _arc(0, 2 * math.pi), _arc(0, 2 * math.pi) * rng.uniform(0.45, 0.65)
    if name == "ellipse":
        return _arc(0, 2 * math.pi) * [1, rng.uniform(0.42, 0.58)], None
    if name == "semicircle":
        return _arc(0, math.pi) - [0, 0.4], None
    if name == "crescent":
        return _crescent(rng.uniform(0.35, 0.5)), None
    if name == "triangle":
        return _regular(3), None
    if name == "square":
        return _regular(4), None
    if name == "star":
        return _regular(5, rng.uniform(0.4, 0.5)), None
    if name == "cross":
        return _cross(rng.uniform(0.25, 0.4)), None
    return _heart(), None


def _draw_polygon(size: tuple[int, int], points: Outline) -> Image.Image:
    """Draws a polygon as an anti-aliased mask of mode "L"; `size` is the mask's (width, height)."""
    scale = _SUPERSAMPLING
    mask = Image.new("L", (size[0] * scale, size[1] * scale), 0)
    ImageDraw.Draw(mask).polygon([(x * scale, y * scale) for x, y in points], fill=255)
    return mask.reduce(scale)


def _place(outline: Outline, centre: np.ndarray, radius: float, angle: float) -> Outline:
    cos, sin = math.cos(angle), math.sin(angle)
    return outline @ np.array([[cos, sin], [-sin, cos]]) * radius + centre


def _texture(rng: np.random.Generator, size: tuple[int, int], strength: float) -> np.ndarray:
    """Returns smooth random noise around 0, float32 [h, w, 1], in grey levels."""
    cells = int(rng.integers(3, 12))
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    fine = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
    return strength * fine[..., None]


def _colour_away_from(rng: np.random.Generator, other: np.ndarray, distance: float) -> np.ndarray:
    """Returns a random RGB colour, float64 [3], that clearly differs from the colour `other`.

    The Euclidean distance between the two colours is at least `distance` grey levels.
    """
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.linalg.norm(colour - other) >= distance:
            return colour


def _scribble(rng: np.random.Generator, size: tuple[int, int], reach: float) -> Image.Image:
    """Draws one piece of clutter as a mask: a line, an arc or an irregular patch."""
    scale = _SUPERSAMPLING
    mask = Image.new("L", (size[0] * scale, size[1] * scale), 0)
    draw = ImageDraw.Draw(mask)
    centre = rng.uniform(0, 1, 2) * size * scale
    radius = rng.uniform(0.3, 1.0) * reach * scale
    width = max(1, int(rng.uniform(0.08, 0.2) * reach * scale))
    kind = rng.integers(3)
    start = rng.uniform(0, 360)
    if kind == 0:
        offset = 1.5 * radius * np.array([math.cos(start), math.sin(start)])
        draw.line([*(centre - offset), *(centre + offset)], fill=255, width=width)
    elif kind == 1:
        box = [*(centre - radius), *(centre + radius)]
        draw.arc(box, start, start + rng.uniform(60, 200), fill=255, width=width)
    else:
        angles = np.sort(rng.uniform(0, 2 * math.pi, 6))
        radii = radius * rng.uniform(0.2, 0.8, 6)
        points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        draw.polygon([tuple(point) for point in points], fill=255)
    return mask.reduce(scale)


def _paint(canvas: np.ndarray, mask: Image.Image, colour: np.ndarray) -> np.ndarray:
    alpha = np.asarray(mask, np.float32)[..., None] / 255
    return canvas * (1 - alpha) + colour * alpha


def render(seed: int, index: int) -> tuple[Image.Image, Image.Image, int]:
    """Draws image `index` of the data set with this seed.

    Returns:
      The image (RGB, before JPEG compression), the mask of the visible part of
      the object (mode "L", 0 or 255, same size) and the label.
    """
    label = index % len(CLASS_NAMES)
    rng = np.random.default_rng([seed, VERSION, index])
    width, height = (int(side) for side in rng.integers(48, 129) * rng.uniform(0.9, 1.1, 2))
    size = (width, height)
    short = min(size)

    ground = rng.uniform(40, 215) + rng.uniform(-30, 30, 3)
    canvas = np.broadcast_to(ground, (height, width, 3)) + _texture(rng, size, rng.uniform(5, 30))
    for _ in range(rng.integers(1, 5)):
        clutter = _scribble(rng, size, 0.2 * short)
        canvas = _paint(canvas, clutter, rng.uniform(0, 255, 3))

    radius = rng.uniform(0.26, 0.42) * short
    margin = np.minimum(0.9 * radius, 0.5 * np.array(size))
    centre = rng.uniform(margin, np.array(size) - margin)
    angle = rng.uniform(0, 2 * math.pi)
    outline, hole = _outlines(CLASS_NAMES[label], rng)
    mask = _draw_polygon(size, _place(outline, centre, radius, angle))
    if hole is not None:
        inside = _draw_polygon(size, _place(hole, centre, radius, angle))
        mask = Image.fromarray(np.asarray(mask) - np.minimum(np.asarray(mask), np.asarray(inside)))
    colour = _colour_away_from(rng, ground, 120)
    canvas = _paint(canvas, mask, colour + _texture(rng, size, rng.uniform(0, 25)))

    visible = np.asarray(mask) > 127
    # In half of the images, one piece of clutter lies in front of the object.
    for _ in range(rng.integers(0, 2)):
        clutter = _scribble(rng, size, 0.2 * short)
        canvas = _paint(canvas, clutter, rng.uniform(0, 255, 3))
        visible &= np.asarray(clutter) <= 127

    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.012) * short))
    noise = rng.standard_normal((height, width, 3)) * rng.uniform(0, 10)
    noisy = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(noisy), Image.fromarray(visible.astype(np.uint8) * 255), label


def _write_example(folder: pathlib.Path, seed: int, index: int) -> None:
    image, mask, label = render(seed, index)
    quality = int(np.random.default_rng([seed, VERSION, index, 1]).integers(50, 95))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    name = CLASS_NAMES[label]
    (folder / "images" / name / f"{index:05d}.jpg").write_bytes(encoded.getvalue())
    mask.save(folder / "masks" / name / f"{index:05d}.png")


def generate(
    num_images: int = NUM_IMAGES,
    seed: int = 0,
    track: Track = no_track,
) -> pathlib.Path:
    """Writes the data set to the cache folder, unless the data set is already there.

    Args:
      num_images: The number of images; image i has class i modulo 10.
      seed: The seed of the images.
      track: Shows progress.

    Returns:
      A folder with `images/CLASS/INDEX.jpg` and `masks/CLASS/INDEX.png`, where a
      mask is 255 on the visible part of the object and 0 elsewhere.
    """
    final = cache_dir() / f"shapes-v{VERSION}-seed{seed}-{num_images}"
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    # The files are written to a temporary folder, which is then renamed. So the final folder is
    # always complete.
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        for kind in ("images", "masks"):
            for name in CLASS_NAMES:
                (partial / kind / name).mkdir(parents=True)
        write = functools.partial(_write_example, partial, seed)
        # The processes are spawned, because "fork" could deadlock: JAX has started threads in this
        # process.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
            done = pool.map(write, range(num_images), chunksize=32)
            for _ in track(done, "generating shapes", num_images):
                pass
        # `mkdtemp` creates a private folder, but the cache may be shared by several users.
        partial.chmod(0o755)
        try:
            partial.rename(final)
        except OSError:
            if not final.exists():  # Another process may have created the same folder.
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def read_masks(
    name: str, ids: Sequence[str], size: tuple[int, int]
) -> Bool[np.ndarray, "n height width"]:
    """Reads the object masks of examples of the data set `shapes`, and resizes the masks.

    Args:
      name: The source's name: "shapes" or "shapes:N".
      ids: The ids of the examples.
      size: (height, width) of the masks in pixels.
    """
    num_images = int(name.partition(":")[2] or NUM_IMAGES)
    folder = generate(num_images) / "masks"
    height, width = size
    masks = np.empty((len(ids), *size), bool)
    for mask, example_id in zip(masks, ids, strict=True):
        image = Image.open(folder / pathlib.PurePosixPath(example_id).with_suffix(".png"))
        mask[:] = np.asarray(image.resize((width, height), Image.Resampling.BOX)) > 127
    return masks
