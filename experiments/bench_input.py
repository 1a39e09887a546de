"""Compares the input pipeline with PyTorch's DataLoader and with tf.data.

    pip install -e '.[bench]' && python experiments/bench_input.py --images=FOLDER

Prints images a second from JPEG files to augmented uint8 batches of 32, for the
JPEGs of FOLDER (class/image.jpg; by default the embedded shapes) and for
pictures of 500 x 375 pixels made of them, at 224 x 224 and 64 x 64. Beside it
stand the ratio to the better of the two peers that decode each time, and the
peak memory of all processes together (proportional set size, which counts what
was read of a memory-mapped cache as well).

Each measurement is a process of its own, whose start is not counted. All flip
with probability 1/2, rotate by up to 0.2 of a turn, and change zoom and contrast
by up to 0.2. PyTorch does it with Pillow in its worker processes, tf.data in the
threads of one process, cnn_jax in worker processes or in two threads or more.
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

import numpy as np
import psutil  # type: ignore[import-not-found]
from PIL import Image

# The packages compared are imported where they are used: a process that measures
# one of them must not hold the others in its memory.

BATCH_SIZE = 32
SIDES = (224, 64)
ROTATION, ZOOM, CONTRAST = 0.2, 0.2, 0.2
# Images of the folder, and pictures made of them.
NUM_IMAGES, NUM_PICTURES = 2_000, 400
TILE, TILES, PICTURE = 64, (8, 6), (500, 375)
# Batches and seconds before a measurement: workers start, tf.data tunes itself.
WARM_BATCHES, WARM_SECONDS = 8, 1.5
SECONDS_BETWEEN_SAMPLES = 0.05
_JPEG = b"\xff\xd8\xff"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A row of the table.

    Attributes:
      name: As the table has it.
      kind: "cnn_jax", "torch" or "tensorflow": also the module that it needs.
      residency: Of `open_dataset`, or for TensorFlow "memory" or "none".
      workers: Worker processes.
    """

    name: str
    kind: str
    residency: str = "none"
    workers: int = 0

    @property
    def is_peer(self) -> bool:
        return self.kind != "cnn_jax" and self.residency == "none"


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
        Pipeline("tf.data", "tensorflow"),
        Pipeline("tf.data, cache in memory", "tensorflow", "memory"),
    ]


def cnn_jax_batches(pipeline: Pipeline, folder: str, side: int) -> Generator[object, None, None]:
    from cnn_jax.data.augment import Augmentation
    from cnn_jax.data.dataset import open_dataset
    from cnn_jax.data.pipeline import training_batches
    from cnn_jax.data.sources import open_source
    from cnn_jax.data.splits import Division
    from cnn_jax.preprocessing import Preprocessing

    dataset = open_dataset(
        open_source(f"folder:{folder}"),
        Division(),
        Preprocessing((side, side)),
        residency=pipeline.residency,
        workers=pipeline.workers,
    )
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
    """What a PyTorch DataLoader reads: position to augmented uint8 tensor."""

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
        pixels = np.asarray(image, np.float32)
        mean = pixels.mean((0, 1))
        pixels = (pixels - mean) * np.float32(1 + CONTRAST * contrast) + mean
        return torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8))


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
        image = tf.io.decode_jpeg(tf.io.read_file(file), channels=3)
        return tf.image.resize(image, (side, side))

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
    """Of an endless stream, after its start."""
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
    """Copies JPEGs spread over a source into `folder`/CLASS."""
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
    """Pictures as a camera's, reduced: each shows many images side by side."""
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


def measure(pipeline: Pipeline, folder: str, side: int, seconds: float) -> tuple[float, float]:
    """Images a second, and peak megabytes, in a process of its own."""
    arguments = json.dumps([dataclasses.asdict(pipeline), folder, side, seconds])
    command = [sys.executable, __file__, f"--measure={arguments}"]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{pipeline.name}: {errors.read().decode(errors='replace')}")
        return float(output.read()), peak / 1e6


def _measure_here(arguments: str) -> None:
    fields, folder, side, seconds = json.loads(arguments)
    pipeline = Pipeline(**fields)
    with contextlib.closing(BATCHES[pipeline.kind](pipeline, folder, side)) as batches:
        print(images_per_second(batches, seconds))


def _memory(pid: int) -> int:
    """Bytes of a process and all that it started; shared pages are divided among them."""
    total = 0
    with contextlib.suppress(psutil.Error):  # It has just ended.
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().pss
    return total


def _print_header() -> None:
    distributions = importlib.metadata.packages_distributions()
    print(f"{os.cpu_count()} CPUs, Python {platform.python_version()}")
    modules = ("cnn_jax", "jax", "grain", "cv2", "simplejpeg", "PIL", "torch", "tensorflow")
    names = [distributions[module][0] for module in modules if module in distributions]
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))


def _print_rows(
    setting: str, rows: list[Pipeline], results: dict[Pipeline, list[tuple[float, float]]]
) -> None:
    speeds = {row: statistics.median(speed for speed, _ in results[row]) for row in results}
    best = max((speeds[row] for row in speeds if row.is_peer), default=math.nan)
    for row in rows:
        if row not in results:
            print(f"{setting}  {row.name:<24}  {'not installed':>13}")
            continue
        peak = statistics.median(peak for _, peak in results[row])
        print(f"{setting}  {row.name:<24}  {speeds[row]:>8,.0f}", end="")
        print(f"  {speeds[row] / best:>5.2f}  {peak:>7,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", help="a folder class/image.jpg; by default shapes")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of a measurement")
    parser.add_argument("--workers", type=int, default=2, help="of all that have worker processes")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        _measure_here(flags.measure)
        return

    rows = pipelines(flags.workers)
    installed = [row for row in rows if importlib.util.find_spec(row.kind)]
    results = collections.defaultdict(lambda: collections.defaultdict(list))
    with tempfile.TemporaryDirectory() as temporary:
        folders = {
            "images": pathlib.Path(temporary, "images"),
            "500 x 375": pathlib.Path(temporary, "pictures"),
        }
        write_images(f"folder:{flags.images}" if flags.images else "shapes", folders["images"])
        write_pictures(*folders.values())
        os.environ["CNN_JAX_CACHE"] = str(pathlib.Path(temporary, "cache"))
        settings = list(itertools.product(folders, SIDES))
        for source, side in settings:  # Fill the cache.
            measure(Pipeline("cnn_jax", "cnn_jax", "disk"), str(folders[source]), side, 0)
        for repetition in range(flags.repetitions):
            for source, side in settings:
                for row in installed:
                    print(
                        f"\r{repetition + 1}: {source}, {side}, {row.name:<24}",
                        end="",
                        file=sys.stderr,
                    )
                    result = measure(row, str(folders[source]), side, flags.seconds)
                    results[source, side][row].append(result)
    print(file=sys.stderr)

    _print_header()
    print(f"{'source':<9}  pixels  {'pipeline':<24}  {'images/s':>8}  ratio  peak MB")
    for source, side in settings:
        _print_rows(f"{source:<9}  {side:>6}", rows, results[source, side])


if __name__ == "__main__":
    main()
