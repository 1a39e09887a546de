"""From a source to a stream of batches, with Grain.

Batch i, and every random draw in it, is a function of (source, seed, i): the
stream can be entered anywhere, and no number of threads or worker processes
changes it.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import signal
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from cnn_jax.data import Track, augment, no_track
from cnn_jax.data.augment import Augmentation
from cnn_jax.data.sources import DecodedSource, Source, fingerprint, load_image, open_source
from cnn_jax.data.splits import split_by_id
from cnn_jax.errors import DataError
from cnn_jax.preprocessing import Preprocessing

NumpyBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Loader:
    """How to turn positions in a source into arrays of pixels.

    Attributes:
      source: Where the images are.
      preprocessing: The size of every image of a batch.
      workers: Worker processes; 0 means threads of this process.
    """

    source: Source
    preprocessing: Preprocessing
    workers: int = 0

    def load(self, indices: np.ndarray) -> NumpyBatch:
        """{"image": uint8 [B, H, W, 3], "label": int32 [B]} of these examples."""
        images = np.empty((len(indices), *self.preprocessing.image_size, 3), np.uint8)
        for row, index in enumerate(indices):
            images[row] = load_image(self.source, int(index), self.preprocessing)
        return {"image": images, "label": self.source.labels[indices]}


def choose_workers(requested: int, source: Source) -> int:
    """Worker processes for `data.workers`, where -1 means as many as help.

    Decoded images are always served by threads: a copy of them for each process
    could exceed the machine, and there is too little left to do.
    """
    if isinstance(source, DecodedSource):
        return 0
    if requested >= 0:
        return requested
    # A machine of few cores needs them all for the training step.
    return 0 if (os.cpu_count() or 1) < 4 else min(16, (os.cpu_count() or 1) - 1)


def _add_draws(
    positions: np.ndarray,
    rng: np.random.Generator,
    *,
    indices: np.ndarray,
    augmentation: Augmentation,
    image_size: tuple[int, int],
) -> NumpyBatch:
    draws = augment.draw(rng, augmentation, len(positions), image_size)
    return {"index": indices[positions]} | draws


def _load_training_batch(draws: NumpyBatch, loader: Loader, place: str | None) -> NumpyBatch:
    """Loads the pixels, and moves them unless `place` is "device", or None: nowhere."""
    batch = loader.load(draws["index"])
    batch["mask"] = np.ones(len(draws["index"]), bool)
    if place is None:
        return batch
    if place == "device":
        return batch | {"matrix": draws["matrix"], "contrast": draws["contrast"]}
    image = augment.apply_on_host(batch["image"], draws["matrix"], draws["contrast"])
    return batch | {"image": image}


def training_batches(
    loader: Loader,
    indices: np.ndarray,
    *,
    batch_size: int,
    augmentation: Augmentation,
    place: str,
    seed: int,
    start: int = 0,
) -> contextlib.closing[Generator[NumpyBatch, None, None]]:
    """The endless training stream, from batch `start` on.

    The examples are shuffled anew for each pass. A batch may span two passes,
    so that every batch is full and no example is seen more often than another.

    Args:
      loader: Loads the pixels.
      indices: Positions of the training split in the loader's source.
      batch_size: Examples in a batch.
      augmentation: What to draw.
      place: Where pixels are moved: "host" (here), or "device", in which case a
        batch carries the draws "matrix" and "contrast" for `train_step`.
      seed: Seed of the shuffles and draws.
      start: Number of batches to leave out; costs nothing.

    Returns:
      A context manager that closes the stream and ends its workers. A batch is
      {"image": uint8 [B, H, W, 3], "label": int32 [B], "mask": bool [B], ...}.
    """
    add_draws = functools.partial(
        _add_draws,
        indices=indices,
        augmentation=augmentation,
        image_size=loader.preprocessing.image_size,
    )
    load = functools.partial(
        _load_training_batch,
        loader=loader,
        place=None if augmentation.is_identity() else place,
    )
    dataset = (
        grain.MapDataset.range(len(indices))
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size)
        .random_map(add_draws)
        .slice(slice(start, None))
        .map(load)
    )
    return contextlib.closing(_iterate(dataset, loader.workers))


def evaluation_batches(
    loader: Loader, indices: np.ndarray, batch_size: int
) -> contextlib.closing[Generator[NumpyBatch, None, None]]:
    """Every example once, in order; the last batch is padded, its mask False there.

    Padding repeats the split's first example, so that every batch has one shape.
    """

    def load(batch: int) -> NumpyBatch:
        positions = np.arange(batch * batch_size, (batch + 1) * batch_size)
        mask = positions < len(indices)
        return loader.load(indices[np.where(mask, positions, 0)]) | {"mask": mask}

    dataset = grain.MapDataset.range(math.ceil(len(indices) / batch_size)).map(load)
    return contextlib.closing(_iterate(dataset, workers=0))


def _iterate(dataset: grain.MapDataset, workers: int) -> Generator[NumpyBatch, None, None]:
    """Reads ahead on threads, or in worker processes; closing it ends them."""
    if workers == 0:
        threads = max(2, min(16, os.cpu_count() or 1))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        iterator = iter(dataset.to_iter_dataset(options))
        start = contextlib.nullcontext()
    else:
        if not flags.FLAGS.is_parsed():  # Grain hands absl's flags to its workers.
            flags.FLAGS.mark_as_parsed()
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        iterator = iter(dataset.to_iter_dataset(one_thread).mp_prefetch(options))
        start = _ctrl_c_held_back()
    with contextlib.closing(iterator):
        with start:  # The first batch starts the workers.
            first = list(itertools.islice(iterator, 1))
        yield from first
        del first
        yield from iterator


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Processes started within never get Ctrl-C; this one gets it at the end.

    A terminal sends Ctrl-C to all processes of a command. It is for the main
    one to finish its step, save and end the others.
    """
    # It lets Ctrl-C through again when it starts, so it has to be there already.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A source, divided.

    Attributes:
      loader: Loads from the source.
      splits: For each name in `SPLITS`, positions in the source.
      fingerprint: Changes with any example's identity, class or size.
    """

    loader: Loader
    splits: dict[str, np.ndarray]
    fingerprint: str

    @property
    def source(self) -> Source:
        return self.loader.source


def open_dataset(
    config: Any, preprocessing: Preprocessing, seed: int, track: Track = no_track
) -> Dataset:
    """Opens, divides and, if it fits in memory, decodes a data set.

    Args:
      config: The `data` section of a configuration.
      preprocessing: The size of the images.
      seed: Seed of the division.
      track: Shows progress.

    Raises:
      DataError: The source cannot be used, or a split of it would be empty.
    """
    source = open_source(config.source, track)
    splits = split_by_id(source.ids, source.labels, config.split, seed)
    for name, indices in splits.items():
        if not len(indices):
            raise DataError(
                f"{source.name}: no image is left for {name}; each class needs three images "
                f"or more, and these have {len(source)} images of {len(source.class_names)} classes"
            )
    identity = fingerprint(source)
    if config.cache == "memory" or (config.cache == "auto" and _fits(source, preprocessing)):
        source = DecodedSource(source, preprocessing, track)
    loader = Loader(source, preprocessing, choose_workers(config.workers, source))
    return Dataset(loader, splits, identity)


def _fits(source: Source, preprocessing: Preprocessing) -> bool:
    """Whether all decoded images take at most a quarter of the machine's memory."""
    decoded = len(source) * math.prod(preprocessing.image_size) * 3
    return decoded <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
