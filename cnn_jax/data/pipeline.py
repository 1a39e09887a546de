"""From a source to a stream of batches, with Grain.

Batch i, and every random draw in it, is a function of (source, seed, i): the
stream can be entered anywhere, and no number of threads or worker processes
changes it.
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
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.source import Source
from cnn_jax.system.errors import DataError

logger = logging.getLogger(__name__)

NumpyBatch = dict[str, np.ndarray]

# As many batches as no run has.
_ENDLESS = 2**40


@dataclasses.dataclass(frozen=True, eq=False)
class Loader:
    """How to turn positions in a source into arrays of pixels.

    Attributes:
      source: Where the images are.
      preprocessing: The size of every image of a batch.
      pixels: All images in this size, in memory or memory-mapped; None if each is
        decoded when it is wanted.
      rows: The row in `pixels` of each example.
      on_device: The pixels are on the device already: a batch has their rows alone.
      workers: Worker processes that decode; 0 means threads of this process.
    """

    source: Source
    preprocessing: Preprocessing
    pixels: UInt8[np.ndarray, "rows height width 3"] | None = None
    rows: Int[np.ndarray, " n"] | None = None
    on_device: bool = False
    workers: int = 0

    def load(self, indices: Int[np.ndarray, " batch"]) -> NumpyBatch:
        """{"image": uint8 [B, H, W, 3], "label": int32 [B]} of these examples.

        Instead of "image" it has "row", int32 [B], if the pixels are on the device.

        Raises:
          DataError: An image cannot be decoded.
        """
        labels = self.source.labels[indices]
        if self.pixels is not None and self.rows is not None:
            rows = self.rows[indices]
            if self.on_device:
                return {"row": rows.astype(np.int32), "label": labels}
            images = np.asarray(self.pixels[rows])
        else:
            images = np.empty((len(indices), *self.preprocessing.image_size, 3), np.uint8)
            for row, index in enumerate(indices.tolist()):
                images[row] = load_image(self.source, index, self.preprocessing)
        return {"image": images, "label": labels}


def load_image(
    source: Source, index: int, preprocessing: Preprocessing
) -> UInt8[np.ndarray, "height width 3"]:
    """Reads, decodes and resizes one image of a source.

    Raises:
      DataError: It cannot be read or decoded; the message names it.
    """
    try:
        with scan.one_large_file_at_a_time(source, index):
            encoded = scan.read_example(source, index, preprocessing.max_pixels)
            return load(
                encoded,
                preprocessing.image_size,
                preprocessing.max_pixels,
                preprocessing.white_level,
            )
    except DataError as error:
        raise DataError(f"{source.name}: {source.ids[index]} {error}") from error


def choose_workers(requested: int) -> int:
    """Worker processes for `data.workers`, where -1 means as many as help."""
    if requested >= 0:
        return requested
    # A machine of few cores needs them all for the training step.
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
    """Loads the pixels, and moves them unless `place` is "device", or None: nowhere."""
    if rows is not None:
        draws = {name: values[rows] for name, values in draws.items()}
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
    stop: int | None = None,
    balanced: bool = False,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> contextlib.closing[Generator[NumpyBatch, None, None]]:
    """The training stream from batch `start` on, which is endless unless `stop` is given.

    The examples are shuffled anew for each pass. A batch may span two passes,
    so that every batch is full and no example is seen more often than another.
    A balanced stream takes its examples from each class in turn, in a new order
    each round, and passes over each class by itself: no class is seen more often
    than another, and no example more often than another of its class.

    Args:
      loader: Loads the pixels.
      indices: Positions of the training split in the loader's source.
      batch_size: Examples in a batch.
      augmentation: What to draw.
      place: Where pixels are moved: "host" (here), or "device", in which case a
        batch carries the draws "matrix" and "contrast" for `train_step`.
      seed: Seed of the shuffles and draws.
      start: Number of batches to leave out; costs nothing.
      stop: The number of the first batch that is not wanted: none is read ahead from there on.
      balanced: Whether all classes are seen equally often.
      rows: Those of each batch to load, if other processes load the others; the draws
        are those of the whole batch.

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
    """Positions 0 to size - 1 without end, in a new order for each pass.

    (Grain's own shuffle costs several times as much as all else that is done for
    a small image.)
    """

    def __init__(self, size: int, seed: int):
        self._size = size
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, places: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The positions that stand at these places of the endless sequence."""
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
            # Threads that read ahead may be in this pass or in the one before.
            before = {n: self._orders[n] for n in (number - 1,) if n in self._orders}
            self._orders = before | {number: order}
        return order


class _ClassesInTurn:
    """Positions of one class after the other, each class in passes of its own.

    The classes take their turns in a new order each round: neighbours in the
    alphabet are often alike, and would make up whole batches.
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
        """The positions that stand at these places of the endless sequence."""
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
    """Every example once, in order; the last batch is padded, its mask False there.

    Padding repeats the split's first example, so that every batch has one shape.
    Of each batch, `rows` are loaded, or all of them.
    """
    own_rows = np.arange(batch_size) if rows is None else rows

    def load(batch: int) -> NumpyBatch:
        positions = batch * batch_size + own_rows
        mask = positions < len(indices)
        return loader.load(indices[np.where(mask, positions, 0)]) | {"mask": mask}

    dataset = grain.MapDataset.range(math.ceil(len(indices) / batch_size)).map(load)
    return contextlib.closing(_iterate(dataset, workers=0))


def _iterate(dataset: grain.MapDataset, workers: int) -> Generator[NumpyBatch, None, None]:
    """Reads ahead on threads, or in worker processes; closing it ends them."""
    if workers == 0:
        threads = max(2, min(16, scan.num_cores()))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        iterator = iter(dataset.to_iter_dataset(options))
        start = contextlib.nullcontext()
    else:
        if not flags.FLAGS.is_parsed():  # Grain hands absl's flags to its workers.
            flags.FLAGS.mark_as_parsed()
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        prefetch = dataset.to_iter_dataset(one_thread).mp_prefetch
        iterator = iter(prefetch(options, _end_with_the_main_process))
        start = _ctrl_c_held_back()
    with contextlib.closing(iterator), _workers_that_die():
        with start:  # The first batch starts the workers.
            first = list(itertools.islice(iterator, 1))
        yield from first
        del first
        yield from iterator


@contextlib.contextmanager
def _workers_that_die() -> Iterator[None]:
    """Says in one line that a worker process was killed.

    Raises:
      DataError: It was.
    """
    try:
        yield
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):  # Grain's words.
            raise
        raise DataError(
            "a worker process that reads the data was killed, perhaps for want of memory; the same "
            "command goes on from the latest checkpoint, and data.workers=0 needs no such process"
        ) from error


def _end_with_the_main_process(worker: int, workers: int) -> None:
    """Lets a worker end when the main process does, which may be killed and not end it."""
    main_process = multiprocessing.parent_process()
    assert main_process is not None

    def wait() -> None:
        multiprocessing.connection.wait([main_process.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Processes started within never get Ctrl-C; this one gets it at the end.

    A terminal sends Ctrl-C to all processes of a command. It is for the main
    one to finish its step, save and end the others.
    """
    # What it warns of, batches in shared memory that nobody took, it also clears away.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    # It lets Ctrl-C through again when it starts, so it has to be there already.
    resource_tracker.ensure_running()
    sys.warnoptions.pop()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
