"""Compares the speed and the accuracy of several ways to decode and downscale a JPEG.

    python experiments/benchmarks/bench_decode.py [--images=FOLDER] [--repetitions=15]

A JPEG decoder can downscale the picture in its cosine transform. Here the decoder may do so
while the picture stays at least k times as large as the output. The program prints, for each k
and for outputs of 64 x 64 and 224 x 224 pixels:

- differences from the full decode in grey levels: the mean over all images, the mean of the
  worst image, and the largest difference of a single value;
- the milliseconds of CPU time for pictures of 500 x 375 and 4000 x 3000 pixels.

This project uses `full`. The images are square crops of the photographs that scikit-learn
contains, or the JPEG files below FOLDER.
"""

import argparse
import io
import math
import pathlib
import statistics
import time
from collections.abc import Callable

import numpy as np
import simplejpeg
from common import seconds_of_each
from PIL import Image
from sklearn.datasets import load_sample_images

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.resize import resize

SIDES = (64, 224)
FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0, math.inf)
SIZES = ((500, 375), (4000, 3000))
NUM_CROPS, MAX_FILES = 60, 500


def scaled(encoded: bytes, side: int, factor: float) -> np.ndarray:
    """Decodes a JPEG at `factor` * `side` pixels or more, and resizes it to `side` x `side`."""
    height, width = (int(side) for side in simplejpeg.decode_jpeg_header(encoded)[:2])
    least = min(factor * side, max(height, width))
    pixels = simplejpeg.decode_jpeg(
        encoded, min_height=min(height, math.ceil(least)), min_width=min(width, math.ceil(least))
    )
    return resize(pixels, Preprocessing((side, side)))


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def crops() -> list[bytes]:
    """Returns JPEGs of square crops (66 to 419 pixels) at random positions of photographs."""
    rng = np.random.default_rng(1)
    encoded = []
    for photograph in map(Image.fromarray, load_sample_images().images):
        for _ in range(NUM_CROPS):
            side = int(rng.integers(66, 420))
            left = int(rng.integers(0, photograph.width - side))
            top = int(rng.integers(0, photograph.height - side))
            encoded.append(encode(photograph.crop((left, top, left + side, top + side))))
    return encoded


def milliseconds(work: Callable[[], object], repetitions: int) -> float:
    """Returns the median CPU time of several calls, in milliseconds.

    Other processes hardly affect the CPU time.
    """
    return 1e3 * statistics.median(seconds_of_each(work, repetitions + 1, time.thread_time)[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=pathlib.Path, help="a folder of JPEG files")
    parser.add_argument("--repetitions", type=int, default=15)
    flags = parser.parse_args()
    if flags.images:
        files = sorted(flags.images.rglob("*.jp*g"))
        images = [path.read_bytes() for path in files[:: max(len(files) // MAX_FILES, 1)]]
    else:
        images = crops()
    photograph = Image.fromarray(load_sample_images().images[0])
    large = [encode(photograph.resize(size, Image.Resampling.LANCZOS)) for size in SIZES]
    times = "".join(f"{f'{w} x {h}':>14}" for w, h in SIZES)
    print(f"{len(images)} images; differences in grey levels, then milliseconds by picture size")
    print(f"{'output':>6}{'k':>6}{'mean':>8}{'worst':>8}{'max':>6}{times}")
    for side in SIDES:
        exact = [scaled(encoded, side, math.inf).astype(int) for encoded in images]
        for factor in FACTORS:
            apart = [
                np.abs(scaled(encoded, side, factor) - whole)
                for encoded, whole in zip(images, exact, strict=True)
            ]
            means = [difference.mean() for difference in apart]
            spent = [
                milliseconds(lambda e=e, s=side, k=factor: scaled(e, s, k), flags.repetitions)
                for e in large
            ]
            name = "full" if factor == math.inf else f"{factor:g}"
            print(
                f"{side:>6}{name:>6}{np.mean(means):>8.2f}{max(means):>8.2f}"
                f"{max(difference.max() for difference in apart):>6}"
                + "".join(f"{number:>14.1f}" for number in spent)
            )


if __name__ == "__main__":
    main()
