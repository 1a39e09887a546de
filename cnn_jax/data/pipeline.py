"""Streams of training and evaluation batches from a source, with Grain.

Batch i and its random draws are a function of (source, seed, i). So a stream can start at
any batch, and the number of threads or worker processes does not change the batches.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags
from jaxtyping import Int, UInt8

from cnn_jax.data import augment, scan
from cnn_jax.data.augment import Augmentation
from cnn_jax.data.decode import load
from cnn_jax.data.preprocessing import Preprocessing, unscaled
from cnn_jax.data.row_cache import CachedRows
from cnn_jax.data.source import Source
from cnn_jax.system.errors import DataError

logger = logging.getLogger(__name__)

NumpyBatch = dict[str, np.ndarray]

# The number of batches in a stream whose `stop` is None. No run needs so many batches.
_ENDLESS = 2**40


@dataclasses.dataclass(frozen=True, eq=False)
class Loader:
    """An object that loads examples of a source as batches.

    Attributes:
      source: The images.
      preprocessing: How images are decoded and resized.
      pixels: The resized image of each example, in memory or memory-mapped; None if an image is
        decoded each time that it is loaded.
      on_device: Whether the pixels are on the device. A batch then contains row numbers
        instead of images.
      workers: The number of worker processes that decode; 0: threads of this process.
    """

    source: Source
    preprocessing: Preprocessing
    pixels: UInt8[np.ndarray, "n height width 3"] | CachedRows | None = None
    on_device: bool = False
    workers: int = 0

    def load(self, indices: Int[np.ndarray, " batch"]) -> NumpyBatch:
        """Loads the examples at these positions in the source, and returns them as a batch.

        Returns:
          {"image": uint8 [B, H, W, 3], "label": int32 [B]}. If the pixels are on the device,
          "row", int32 [B], takes the place of "image".

        Raises:
          DataError: An image cannot be decoded.
        """
        labels = self.source.labels[indices]
        if self.pixels is not None and self.on_device:
            return {"row": indices.astype(np.int32), "label": labels}
        if self.pixels is not None:
            images = self.pixels[indices]
        else:
            images = np.empty((len(indices), *self.preprocessing.image_size, 3), np.uint8)
            for row, index in enumerate(indices.tolist()):
                images[row] = load_image(self.source, index, self.preprocessing)
        return {"image": images, "label": labels}


def load_image(
    source: Source, index: int, preprocessing: Preprocessing
) -> UInt8[np.ndarray, "height width 3"]:
    """Reads, decodes and resizes one image of a source.

    Args:
      source: The images. Images of a request log already have the size of the network's input.
      index: The position of the image in the source.
      preprocessing: How the image is decoded and resized.

    Raises:
      DataError: The image cannot be read or decoded; the message names the image.
    """
    if source.logged is not None and source.logged[index]:
        preprocessing = unscaled(preprocessing)
    try:
        with scan.one_large_file_at_a_time(source, index):
            encoded = scan.read_example(source, index, preprocessing.max_pixels)
            return load(encoded, preprocessing)
    except DataError as error:
        raise DataError(f"{source.name}: {source.ids[index]} {error}") from error


def choose_workers(requested: int) -> int:
    """Returns the number of worker processes for a value of `data.workers`; -1 means automatic."""
    if requested >= 0:
        return requested
    # With few cores, no worker processes are used, because the training step needs all cores.
    return 0 if scan.num_cores() < 4 else min(16, scan.num_cores() - 1)


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


def _load_training_batch(
    draws: NumpyBatch, loader: Loader, place: str | None, rows: np.ndarray | None
) -> NumpyBatch:
    """Loads the images of a training batch, and augments them if `place` is "host".

    If `place` is "device", the batch contains the draws, and the training step applies them. If
    `place` is None, there is no augmentation.
    """
    if rows is not None:
        draws = {name: values[rows] for name, values in draws.items()}
    batch = loader.load(draws["index"])
    batch["mask"] = np.ones(len(draws["index"]), bool)
    if place is None:
        return batch
    if place == "device":
        return batch | augment.draws_in(draws)
    image = augment.apply_on_host(batch["image"], **augment.draws_in(draws))
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
    stop: int | None = None,
    balanced: bool = False,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> contextlib.closing[Generator[NumpyBatch, None, None]]:
    """Returns a stream of training batches that starts at batch `start` and ends before `stop`.

    Each pass over the examples has a new order. A batch may span two passes, so every batch
    is full and all examples are used equally often. A balanced stream takes one example of
    each class per round, with a new order of the classes in each round and separate passes
    over each class. So all classes are used equally often, and all examples of a class.

    Args:
      loader: Loads the images.
      indices: Positions of the training split in the loader's source.
      batch_size: The number of examples in a batch.
      augmentation: The ranges of the random draws.
      place: Where images are augmented: "host" (in this stream), or "device". With "device" a
        batch contains the arrays of `augment.draw` for the training step.
      seed: The seed of the orders and draws.
      start: The number of the first batch. Earlier batches are not computed.
      stop: The number after the last batch; no later batch is read ahead. None: the stream is
        endless.
      balanced: Whether all classes are used equally often.
      rows: The rows of each batch that this process loads; None: all rows. Other processes
        load the other rows. The draws are made for the whole batch.

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
        rows=rows,
        place=None if augmentation.is_identity() else place,
    )
    if balanced:
        order = _ClassesInTurn(loader.source.labels[indices], seed)
    else:
        order = _Passes(len(indices), seed)
    dataset = (
        grain.MapDataset.range(_ENDLESS)
        .seed(seed)
        .map(functools.partial(_positions, order=order, batch_size=batch_size))
        .random_map(add_draws)
        .slice(slice(start, stop))
        .map(load)
    )
    return contextlib.closing(_iterate(dataset, loader.workers))


class _Passes:
    """An endless sequence of passes over the positions 0 to size - 1, each in a new random order.

    For small images, Grain's own shuffle takes several times as long as all other work.
    """

    def __init__(self, size: int, seed: int):
        self._size = size
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, places: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Returns the elements of this infinite sequence at the indices `places`."""
        passes, offsets = np.divmod(places, self._size)
        positions = np.empty_like(places)
        for number in np.unique(passes).tolist():
            is_here = passes == number
            positions[is_here] = self._order(number)[offsets[is_here]]
        return positions

    def _order(self, number: int) -> Int[np.ndarray, " size"]:
        order = self._orders.get(number)
        if order is None:
            order = np.random.default_rng([self._seed, number]).permutation(self._size)
            # Some threads that read ahead may still need the order of the previous pass.
            before = {n: self._orders[n] for n in (number - 1,) if n in self._orders}
            self._orders = before | {number: order}
        return order


class _ClassesInTurn:
    """An endless sequence of positions that contains one example of each class per round.

    Each round has a new order of the classes. In a fixed order, a batch would contain classes that
    are neighbours in the alphabet and therefore often similar.
    """

    def __init__(self, labels: Int[np.ndarray, " n"], seed: int):
        classes = np.unique(labels)
        seeds = np.random.SeedSequence(seed).generate_state(len(classes) + 1).tolist()
        self._turns = _Passes(len(classes), seeds.pop())
        self._members = [np.flatnonzero(labels == label) for label in classes]
        self._passes = [
            _Passes(len(members), class_seed)
            for members, class_seed in zip(self._members, seeds, strict=True)
        ]

    def __call__(self, places: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Returns the elements of this infinite sequence at the indices `places`."""
        rounds, turns = places // len(self._members), self._turns(places)
        positions = np.empty_like(places)
        for turn in np.unique(turns).tolist():
            is_turn = turns == turn
            positions[is_turn] = self._members[turn][self._passes[turn](rounds[is_turn])]
        return positions


def _positions(
    batch: int, order: Callable[[np.ndarray], np.ndarray], batch_size: int
) -> Int[np.ndarray, " batch"]:
    return order(np.arange(batch * batch_size, (batch + 1) * batch_size))


def evaluation_batches(
    loader: Loader,
    indices: np.ndarray,
    batch_size: int,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> contextlib.closing[Generator[NumpyBatch, None, None]]:
    """Returns a stream of batches with every example once and in order; the last batch is padded.

    Padding repeats the split's first example, so that all batches have the same shape. The mask
    is False for padding.

    Args:
      loader: Loads the images.
      indices: Positions of the split in the loader's source.
      batch_size: The number of examples in a batch.
      rows: The rows of each batch that this process loads; None: all rows.
    """
    own_rows = np.arange(batch_size) if rows is None else rows

    def load(batch: int) -> NumpyBatch:
        positions = batch * batch_size + own_rows
        mask = positions < len(indices)
        return loader.load(indices[np.where(mask, positions, 0)]) | {"mask": mask}

    dataset = grain.MapDataset.range(math.ceil(len(indices) / batch_size)).map(load)
    return contextlib.closing(_iterate(dataset, workers=0))


def _iterate(dataset: grain.MapDataset, workers: int) -> Generator[NumpyBatch, None, None]:
    """Yields the batches of a data set; threads or worker processes load the batches in advance."""
    if workers == 0:
        threads = max(2, min(16, scan.num_cores()))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        iterator = iter(dataset.to_iter_dataset(options))
        start = contextlib.nullcontext()
    else:
        # Grain passes absl's flags to its worker processes, so the flags must be marked as parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        prefetch = dataset.to_iter_dataset(one_thread).mp_prefetch
        iterator = iter(prefetch(options, _end_with_the_main_process))
        start = _ctrl_c_held_back()
    with contextlib.closing(iterator), _workers_that_die():
        with start:  # Loading the first batch starts the worker processes.
            first = list(itertools.islice(iterator, 1))
        yield from first
        del first
        yield from iterator


@contextlib.contextmanager
def _workers_that_die() -> Iterator[None]:
    """Converts Grain's error about a dead worker process to a one-line DataError."""
    try:
        yield
    except RuntimeError as error:
        # Grain raises a plain RuntimeError, so the error is recognized by its message.
        if "Worker process was terminated" not in str(error):
            raise
        raise DataError(
            "a worker process that reads the data was killed, perhaps because memory ran out; the "
            "same command continues from the latest checkpoint; data.workers=0 uses no processes"
        ) from error


def _end_with_the_main_process(worker: int, workers: int) -> None:
    """Makes a worker process end when the main process ends, even if the main process is killed."""
    main_process = multiprocessing.parent_process()
    assert main_process is not None

    def wait() -> None:
        multiprocessing.connection.wait([main_process.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Blocks SIGINT in processes that start in this context; delays SIGINT in the main process.

    A terminal sends Ctrl-C to all processes of a command. Only the main process handles it:
    it finishes its step, saves and ends the workers.
    """
    # Python's resource tracker removes batches that remain in shared memory, and warns about them.
    # This option hides the warning.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    # The resource tracker unblocks SIGINT when it starts, so it must start before SIGINT is
    # blocked.
    resource_tracker.ensure_running()
    sys.warnoptions.pop()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
