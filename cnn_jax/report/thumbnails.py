"""Thumbnails: small copies of the images of a data source."""

import pathlib
from collections.abc import Sequence

from PIL import Image

from cnn_jax.data import decode, scan
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.source import Source
from cnn_jax.system.errors import DataError


def load_thumbnail(
    source: Source, index: int, preprocessing: Preprocessing, side: int
) -> Image.Image | None:
    """Reads an image and resizes it so that its longer side has `side` pixels.

    Returns:
      The image with its original aspect ratio; None if the image can no longer be read.
    """
    try:
        with scan.one_large_file_at_a_time(source, index):
            encoded = scan.read_example(source, index, preprocessing.max_pixels)
            pixels = decode.decode(encoded, preprocessing.max_pixels, preprocessing.white_level)
    except DataError:
        return None
    return fit_to_square(pixels, side)


def fit_to_square(pixels: decode.Pixels, side: int) -> Image.Image:
    """Resizes an image so that its longer side has `side` pixels; keeps the aspect ratio."""
    height, width, _ = pixels.shape
    scale = side / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)


def join_in_row(images: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Joins images side by side on a transparent background, `gap` pixels apart."""
    size = sum(image.width + gap for image in images) - gap, max(i.height for i in images)
    row = Image.new("RGBA", size, (0, 0, 0, 0))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row


def save_small(image: Image.Image, path: pathlib.Path) -> None:
    """Saves an image with a palette of 256 colours, which halves the size of the file."""
    image.quantize(256).save(path, optimize=True)
