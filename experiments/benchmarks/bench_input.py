"""Compares the speed of this project's input pipeline with PyTorch's DataLoader and tf.data.

    pip install -e '.[bench]' && python experiments/benchmarks/bench_input.py --images=FOLDER

Prints images a second from JPEG files to augmented uint8 batches of 32, for the
JPEGs of FOLDER (class/image.jpg; by default the embedded shapes) and for
pictures of 500 x 375 pixels made from them, at 224 x 224 and 64 x 64. The numbers are
medians of --repetitions; the rows take turns. Further columns are the ratio to the better
of the two peers that decode each time, and the peak memory of all processes, from a
separate run (proportional set size; it includes the pages of a memory-mapped cache, which
the system can reclaim). The benchmark takes about half an hour.

cnn_jax and the two peers do the same work: they decode every JPEG at its full size, with the
accurate transform and interpolated colours, and average all pixels when they make it smaller
(antialiasing). By default, tf.data computes a pixel of the resized image from at most four pixels
of the picture. This is the row "tf.data, no antialias", which is not a peer.

Each measurement is a process; its start is not counted. For cnn_jax, the scan of new data
before the first training is not counted either. All pipelines flip with
probability 1/2, rotate by up to 0.2 of a turn, and change zoom and contrast by up
to 0.2; tf.data and cnn_jax reflect the picture at its edges, Pillow leaves black.
PyTorch and cnn_jax decode in as many worker processes, cnn_jax in threads as well
(and in as many processes as it would take itself, if that is another number),
tf.data in the threads of one process.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from typing import IO

import numpy as np
import psutil  # type: ignore[import-not-found]
from PIL import Image

# The compared packages are imported in functions, because a process that measures one package
# must not load the other packages.

BATCH_SIZE = 32
SIDES = (224, 64)
ROTATION, ZOOM, CONTRAST = 0.2, 0.2, 0.2
# The maximum number of images read from the folder, and the number of collages made from these
# images.
NUM_IMAGES, NUM_PICTURES = 2_000, 400
TILE, TILES, PICTURE = 64, (8, 6), (500, 375)
# The warm-up takes at least this number of batches and seconds. In the warm-up, workers start and
# tf.data tunes its settings.
WARM_BATCHES, WARM_SECONDS = 8, 1.5
SECONDS_BETWEEN_SAMPLES = 0.05
_JPEG = b"\xff\xd8\xff"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The settings of one measured input pipeline, and its name in the table.

    Attributes:
      name: The name in the table.
      kind: The name of the required module: "cnn_jax", "torch" or "tensorflow".
      residency: The argument `residency` of `open_dataset`; for TensorFlow "memory" or "none".
      workers: The number of worker processes.
      antialias: Whether TensorFlow resizes with antialiasing, as the other pipelines do.
    """

    name: str
    kind: str
    residency: str = "none"
    workers: int = 0
    antialias: bool = True

    @property
    def is_peer(self) -> bool:
        """Whether the pipeline does the same work as cnn_jax without a cache."""
        return self.kind != "cnn_jax" and self.residency == "none" and self.antialias


def pipelines(workers: int) -> list[Pipeline]:
    from cnn_jax.data.pipeline import choose_workers

    cold = [
        Pipeline(f"cnn_jax, {f'{count} workers' if count else 'threads'}", "cnn_jax", workers=count)
        for count in sorted({0, workers, choose_workers(-1)})
    ]
    return [
        *cold,
        Pipeline("cnn_jax, cache on disk", "cnn_jax", "disk"),
        Pipeline("cnn_jax, cache in memory", "cnn_jax", "memory"),
        Pipeline(f"PyTorch, {workers} workers", "torch", workers=workers),
        Pipeline("tf.data, antialias", "tensorflow"),
        Pipeline("tf.data, no antialias", "tensorflow", antialias=False),
        Pipeline("tf.data, cache in memory", "tensorflow", "memory"),
    ]


def cnn_jax_batches(pipeline: Pipeline, folder: str, side: int) -> Generator[object, None, None]:
    from cnn_jax.data.augment import Augmentation
    from cnn_jax.data.dataset import open_dataset
    from cnn_jax.data.pipeline import training_batches
    from cnn_jax.data.preprocessing import Preprocessing
    from cnn_jax.data.sources import open_source
    from cnn_jax.data.splits import Division

    dataset = open_dataset(
        open_source(f"folder:{folder}"),
        Division(),
        Preprocessing((side, side)),
        residency=pipeline.residency,
        workers=pipeline.workers,
    )
    if dataset.residency != pipeline.residency:
        sys.exit("the temporary folder has no room for the cache; choose another with TMPDIR")
    with training_batches(
        dataset.loader,
        np.arange(len(dataset.source)),
        batch_size=BATCH_SIZE,
        augmentation=Augmentation("horizontal", ROTATION, ZOOM, CONTRAST),
        place="host",
        seed=0,
    ) as batches:
        yield from batches


class PillowDataset:
    """A PyTorch dataset that decodes and augments JPEG files with Pillow."""

    def __init__(self, paths: list[str], side: int):
        self._paths, self._side = paths, side

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> object:
        import torch  # type: ignore[import-not-found]

        side = (self._side, self._side)
        flip, *uniform = torch.rand(4).tolist()
        turn, zoom, contrast = (2 * number - 1 for number in uniform)
        angle, window = 2 * math.pi * ROTATION * turn, 1 + ZOOM * zoom
        sign, centre = (-1 if flip < 0.5 else 1), (self._side - 1) / 2
        cos, sin = window * math.cos(angle), window * math.sin(angle)
        matrix = (
            *(sign * cos, -sign * sin, centre - centre * sign * (cos - sin)),
            *(sin, cos, centre - centre * (sin + cos)),
        )
        with Image.open(self._paths[index]) as file:
            image = file.convert("RGB").resize(side, Image.Resampling.BILINEAR)
        image = image.transform(side, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        pixels = np.array(image, np.float32)
        mean = pixels.mean((0, 1))
        pixels -= mean
        pixels *= 1 + CONTRAST * contrast
        pixels += mean
        return torch.from_numpy(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))


def torch_batches(pipeline: Pipeline, folder: str, side: int) -> Generator[object, None, None]:
    from torch.utils import data  # type: ignore[import-not-found]

    dataset = PillowDataset(_paths(folder), side)
    sampler = data.RandomSampler(dataset, num_samples=10**9)
    yield from data.DataLoader(dataset, BATCH_SIZE, sampler=sampler, num_workers=pipeline.workers)


def tensorflow_batches(pipeline: Pipeline, folder: str, side: int) -> Generator[object, None, None]:
    import tensorflow as tf  # type: ignore[import-not-found]

    def uniform(reach: float):
        return tf.random.uniform([], -reach, reach)

    def load(file):
        content = tf.io.read_file(file)
        image = tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")
        return tf.image.resize(image, (side, side), antialias=pipeline.antialias)

    def augment(image):
        angle, window = 2 * math.pi * uniform(ROTATION), 1 + uniform(ZOOM)
        sign, centre = tf.where(tf.random.uniform([]) < 0.5, -1.0, 1.0), (side - 1) / 2
        cos, sin = window * tf.cos(angle), window * tf.sin(angle)
        matrix = [
            *(sign * cos, -sign * sin, centre - centre * sign * (cos - sin)),
            *(sin, cos, centre - centre * (sin + cos)),
            *(0.0, 0.0),
        ]
        image = tf.raw_ops.ImageProjectiveTransformV3(
            images=image[None],
            transforms=tf.stack(matrix)[None],
            output_shape=(side, side),
            interpolation="BILINEAR",
            fill_mode="REFLECT",
            fill_value=0.0,
        )[0]
        image = tf.cast(image, tf.float32)
        mean = tf.reduce_mean(image, (0, 1))
        image = (image - mean) * (1 + uniform(CONTRAST)) + mean
        return tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)

    paths = _paths(folder)
    dataset = tf.data.Dataset.from_tensor_slices(paths)
    if pipeline.residency == "memory":
        decoded = dataset.map(lambda file: tf.cast(load(file), tf.uint8), tf.data.AUTOTUNE)
        dataset = decoded.cache().shuffle(len(paths)).repeat().map(augment, tf.data.AUTOTUNE)
    else:
        shuffled = dataset.shuffle(len(paths)).repeat()
        dataset = shuffled.map(lambda file: augment(load(file)), tf.data.AUTOTUNE)
    batched = dataset.batch(BATCH_SIZE, num_parallel_calls=tf.data.AUTOTUNE)
    yield from batched.prefetch(tf.data.AUTOTUNE)


BATCHES = {
    "cnn_jax": cnn_jax_batches,
    "torch": torch_batches,
    "tensorflow": tensorflow_batches,
}


def _paths(folder: str) -> list[str]:
    return sorted(str(file) for file in pathlib.Path(folder).rglob("*.jpg"))


def images_per_second(batches: Generator[object, None, None], seconds: float) -> float:
    """Returns the images per second of an endless stream of batches, after a warm-up."""
    start = time.perf_counter()
    warm = 0
    while warm < WARM_BATCHES or time.perf_counter() < start + WARM_SECONDS:
        next(batches)
        warm += 1
    start = time.perf_counter()
    count = 0
    while time.perf_counter() < start + seconds:
        next(batches)
        count += BATCH_SIZE
    return count / (time.perf_counter() - start)


def write_images(source_name: str, folder: pathlib.Path) -> None:
    """Copies a sample of the JPEG files of a data source into the folders `folder`/CLASS."""
    from cnn_jax.data.sources import open_source

    source = open_source(source_name)
    for index in np.unique(np.linspace(0, len(source) - 1, NUM_IMAGES).astype(int)).tolist():
        encoded = source.read(source.keys[index])
        if encoded.startswith(_JPEG):
            file = folder / source.class_names[source.labels[index]] / f"{index}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded)
    if not folder.exists():
        sys.exit(f"{source_name} has no JPEGs")


def write_pictures(images: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes collages of small images; a collage has as much detail as a downscaled photograph."""
    paths = _paths(str(images))
    rng = np.random.default_rng(0)
    columns, rows = TILES
    for index in range(NUM_PICTURES):
        picture = Image.new("RGB", PICTURE)
        for i, chosen in enumerate(rng.integers(len(paths), size=columns * rows).tolist()):
            with Image.open(paths[chosen]) as tile:
                resized = tile.convert("RGB").resize((TILE, TILE))
            picture.paste(resized, (i % columns * TILE, i // columns * TILE))
        file = folder / str(index % 10) / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, quality=90)


def measure_speed(pipeline: Pipeline, folder: str, side: int, seconds: float) -> float:
    """Measures the images per second of a pipeline in a separate process."""
    with _measuring(pipeline, folder, side, seconds) as (process, output):
        process.wait()
        output.seek(0)
        return float(output.read() or math.nan)


def measure_memory(pipeline: Pipeline, folder: str, side: int, seconds: float) -> float:
    """Measures the peak memory of a pipeline in MB; the measurement slows the pipeline down."""
    peak = 0
    with _measuring(pipeline, folder, side, seconds) as (process, _):
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    return peak / 1e6


@contextlib.contextmanager
def _measuring(
    pipeline: Pipeline, folder: str, side: int, seconds: float
) -> Generator[tuple[subprocess.Popen, IO[bytes]], None, None]:
    """Starts this script in a new process; yields the process and the file with its output."""
    arguments = json.dumps([dataclasses.asdict(pipeline), folder, side, seconds])
    command = [sys.executable, __file__, f"--measure={arguments}"]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=output, stderr=errors) as process:
            yield process, output
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{pipeline.name}: {errors.read().decode(errors='replace')}")


def _measure_here(arguments: str) -> None:
    fields, folder, side, seconds = json.loads(arguments)
    pipeline = Pipeline(**fields)
    with contextlib.closing(BATCHES[pipeline.kind](pipeline, folder, side)) as batches:
        print(images_per_second(batches, seconds))


def _memory(pid: int) -> int:
    """Returns the proportional set size of a process and its descendants, in bytes."""
    total = 0
    with contextlib.suppress(psutil.Error):  # psutil raises this error if the process has ended.
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().pss
    return total


def _progress(*words: object) -> None:
    """Shows the current activity on a line of the terminal; without arguments, clears the line."""
    if sys.stderr.isatty():
        line = ", ".join(map(str, words))
        print(f"\r{line:<79}\r", end="", file=sys.stderr, flush=True)


def _print_header() -> None:
    distributions = importlib.metadata.packages_distributions()
    print(f"{os.cpu_count()} CPUs, Python {platform.python_version()}")
    modules = ("cnn_jax", "jax", "grain", "cv2", "simplejpeg", "PIL", "torch", "tensorflow")
    names = [distributions[module][0] for module in modules if module in distributions]
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))


def _print_rows(
    setting: str,
    rows: list[Pipeline],
    speeds: dict[Pipeline, list[float]],
    peaks: dict[Pipeline, float],
) -> None:
    medians = {row: statistics.median(speeds[row]) for row in speeds}
    best = max((medians[row] for row in medians if row.is_peer), default=math.nan)
    for row in rows:
        start = f"{setting}  {row.name:<24}"
        if row in medians:
            ratio = medians[row] / best
            print(f"{start}  {medians[row]:>8,.0f}  {ratio:>5.2f}  {peaks[row]:>7,.0f}")
        else:
            print(f"{start}  not installed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", help="a folder class/image.jpg; by default shapes")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="seconds of a measurement")
    parser.add_argument("--workers", type=int, default=2, help="number of worker processes")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        _measure_here(flags.measure)
        return

    rows = pipelines(flags.workers)
    installed = [row for row in rows if importlib.util.find_spec(row.kind)]
    speeds = collections.defaultdict(lambda: collections.defaultdict(list))
    peaks = collections.defaultdict(dict)
    with tempfile.TemporaryDirectory() as temporary:
        images, pictures = pathlib.Path(temporary, "images"), pathlib.Path(temporary, "pictures")
        write_images(f"folder:{flags.images}" if flags.images else "shapes", images)
        write_pictures(images, pictures)
        os.environ["CNN_JAX_CACHE"] = str(pathlib.Path(temporary, "cache"))
        folders = {"images": str(images), "500 x 375": str(pictures)}
        settings = list(itertools.product(folders, SIDES))
        for source, side in settings:
            _progress("filling the cache", source, side)
            measure_speed(Pipeline("", "cnn_jax", "disk"), folders[source], side, 0)
        for (source, side), row in itertools.product(settings, installed):
            _progress("memory", source, side, row.name)
            peak = measure_memory(row, folders[source], side, flags.seconds)
            peaks[source, side][row] = peak
        for repetition in range(flags.repetitions):
            for (source, side), row in itertools.product(settings, installed):
                _progress(f"speed, {repetition + 1}", source, side, row.name)
                speed = measure_speed(row, folders[source], side, flags.seconds)
                speeds[source, side][row].append(speed)
    _progress()

    _print_header()
    print(f"{'source':<9}  pixels  {'pipeline':<24}  images/s  ratio  peak MB")
    for setting in settings:
        source, side = setting
        _print_rows(f"{source:<9}  {side:>6}", rows, speeds[setting], peaks[setting])


if __name__ == "__main__":
    main()
