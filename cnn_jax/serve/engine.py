"""Dynamic batching: images of many requests are computed in one batch.

One thread computes. Images that arrive while it computes wait in a queue. When the thread is
free, it takes the oldest image and the other waiting images of the same program. If images of
another program wait, it takes those first, so that programs alternate. An image that arrives at
an idle engine is computed at once; under load the batches grow. An image whose request has been
cancelled or has timed out is never computed.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from cnn_jax.data.decode import Pixels
from cnn_jax.system.errors import DataError, UserError

T = TypeVar("T")

# The estimated seconds per image until a batch has been measured.
_SECONDS_PER_IMAGE = 0.01
# The weight of a new measurement in the moving average of that estimate.
_WEIGHT = 0.1
# If a batch takes longer than this, the device hangs.
_HANGING_SECONDS = 60.0
# Seconds that a running batch may take during shutdown.
_CLOSING_SECONDS = 10.0


class Overloaded(UserError):  # noqa: N818 (the client's error, not the server's)
    """The maximum number of images is in flight.

    Attributes:
      retry_after: Whole seconds after which the client should try again.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"too many images at once; try again in {retry_after} s")
        self.retry_after = retry_after


class DeadlineExceeded(UserError):  # noqa: N818 (as above)
    """The deadline of a request passed before its images were computed."""


# Maps uint8 [size, height, width, 3] to an iterable with one result per image.
_Run = Callable[[np.ndarray], Iterable[Any]]
# Returns an image, uint8 [height, width, 3]; raises DataError if the image cannot be used.
_Read = Callable[[], Pixels]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function that is compiled for several batch sizes.

    Attributes:
      run: Maps uint8 [size, height, width, 3] to one result per image.
      seconds: The run time by compiled batch size, in increasing order of size.
    """

    run: _Run
    seconds: dict[int, float]

    @property
    def largest_size(self) -> int:
        return max(self.seconds)

    def best_size(self, count: int) -> int:
        """Returns the compiled batch size with the least time per image for `count` images.

        On a CPU, where the time grows with the size, this is the next smaller size, and the
        remaining images wait. On an accelerator it is the next larger size, which is padded.
        """
        return min(self.seconds, key=lambda size: self.seconds[size] / min(size, count))


def time_program(run: _Run, image: Pixels, sizes: Sequence[int]) -> Program:
    """Compiles and times a program for several batch sizes.

    Args:
      run: The function, as in `Program`.
      image: An example image, uint8 [height, width, 3].
      sizes: The batch sizes; they include 1.
    """
    seconds = {}
    for size in sorted(sizes):
        images = np.repeat(image[None], size, axis=0)
        run(images)  # Compiles.
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run(images)
            times.append(time.perf_counter() - start)
        seconds[size] = min(times)
    return Program(run, seconds)


@dataclasses.dataclass(frozen=True)
class Computed:
    """The result of one image.

    Attributes:
      result: The program's result for this image.
      pixels: The decoded image, uint8 [height, width, 3].
      decode_seconds: The decoding time.
      queue_seconds: The time that the image waited, for a decoder thread and for the device.
      compute_seconds: The run time of the image's batch.
      batch_size: The number of images in that batch, without padding.
    """

    result: Any
    pixels: Pixels
    decode_seconds: float
    queue_seconds: float
    compute_seconds: float
    batch_size: int


@dataclasses.dataclass(eq=False)
class _Request:
    """A request whose images are in flight.

    Attributes:
      program: The program to run on its images.
      arrival_time: In seconds of `time.monotonic`.
      future: Receives `results` when all of them are known.
      results: The result or error of each image; None until it is known.
      missing: The number of results that are not known yet.
    """

    program: Program
    arrival_time: float
    future: "asyncio.Future[list[Any]]"
    results: list[Any]
    missing: int


@dataclasses.dataclass(eq=False)
class _EncodedImage:
    """An image that waits to be decoded.

    Attributes:
      request: The request that the image belongs to.
      index: The image's index in the request.
      read: Decodes the image.
    """

    request: _Request
    index: int
    read: _Read


@dataclasses.dataclass(eq=False)
class _DecodedImage:
    """An image that waits to be computed.

    Attributes:
      request: The request that the image belongs to.
      index: The image's index in the request.
      pixels: uint8 [height, width, 3].
      decode_seconds: The decoding time.
      decode_end: When decoding ended, in seconds of `time.monotonic`.
    """

    request: _Request
    index: int
    pixels: Pixels
    decode_seconds: float
    decode_end: float


class Engine:
    """A compute thread, a pool of decoder threads, and a limit on images in flight."""

    def __init__(
        self,
        capacity: int,
        max_wait: float = 0.0,
        decoders: int = 2,
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ):
        """Creates the engine; `start` starts its threads.

        Args:
          capacity: Maximum number of images in flight: in decoding, waiting or in computation.
          max_wait: Maximum seconds that an image waits for its batch to fill.
          decoders: Number of decoder threads.
          on_batch: Called in the event loop after each batch, with its number of images and its
            seconds.
        """
        self.capacity = capacity
        self._max_wait = max_wait
        self._on_batch = on_batch
        self._in_flight = 0
        self._per_image = _SECONDS_PER_IMAGE
        # A request with many large images must leave decoders for other requests.
        self._decoders_per_request = max(1, decoders // 2)
        self._decoders = concurrent.futures.ThreadPoolExecutor(decoders, "decode")
        # A single thread, because a parsed body can take many times the memory of the body.
        self._parser = concurrent.futures.ThreadPoolExecutor(1, "parse")
        self._waiting: collections.deque[_DecodedImage] = collections.deque()
        # A weak reference, so that an unloaded version's program is freed without another batch.
        self._last: Callable[[], Program | None] = lambda: None
        self._computing_since: float | None = None
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._compute_all, name="compute", daemon=True)

    def start(self) -> None:
        """Starts the compute thread; results go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def in_flight(self) -> int:
        """The number of images in decoding, waiting or in computation."""
        return self._in_flight

    @property
    def is_alive(self) -> bool:
        """Whether the compute thread runs and no batch hangs."""
        since = self._computing_since
        is_hanging = since is not None and time.monotonic() - since > _HANGING_SECONDS
        return self._thread.is_alive() and not is_hanging

    @contextlib.contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Counts images as in flight inside the context.

        Raises:
          Overloaded: More than `capacity` images would be in flight.
        """
        if self._in_flight + images > self.capacity:
            raise Overloaded(max(1, math.ceil(self._in_flight * self._per_image)))
        self._in_flight += images
        try:
            yield
        finally:
            self._in_flight -= images

    async def compute(
        self, program: Program, reads: Sequence[_Read], deadline: float
    ) -> list[Computed | DataError]:
        """Runs a program on the images of a request, batched with images of other requests.

        Args:
          program: The program.
          reads: One function per image, at least one, which decodes the image on a thread.
          deadline: In seconds of `time.monotonic`.

        Returns:
          One result per image, or the error of an image that cannot be used.

        Raises:
          DeadlineExceeded: The deadline passed before all images were computed.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        count, now = len(reads), time.monotonic()
        request = _Request(program, now, future, [None] * count, count)
        images = [_EncodedImage(request, index, read) for index, read in enumerate(reads)]
        step = self._decoders_per_request
        lanes = [collections.deque(images[first::step]) for first in range(min(count, step))]
        for lane in lanes:
            self._decoders.submit(self._decode, lane)
        # A disconnect or the deadline cancels the future; the threads check it.
        try:
            async with asyncio.timeout(max(0.0, deadline - now)):
                return await future
        except TimeoutError as error:
            raise DeadlineExceeded(
                "the request timed out before its images were computed"
            ) from error
        finally:
            # Images that still wait for a decoder are no longer counted as in flight: free them.
            for lane in lanes:
                lane.clear()

    async def run_on_decoder(self, call: Callable[[], T], deadline: float) -> T:
        """Runs a function on a decoder thread.

        Args:
          call: The function.
          deadline: In seconds of `time.monotonic`.

        Raises:
          DeadlineExceeded: The deadline passed before the function could start.
        """
        return await self._run_on_thread(self._decoders, call, deadline)

    async def run_on_parser(self, call: Callable[[], T], deadline: float) -> T:
        """Runs a function on the parser thread, which runs one function at a time.

        Args:
          call: The function.
          deadline: In seconds of `time.monotonic`.

        Raises:
          DeadlineExceeded: The deadline passed before the function could start.
        """
        return await self._run_on_thread(self._parser, call, deadline)

    async def _run_on_thread(
        self, threads: concurrent.futures.Executor, call: Callable[[], T], deadline: float
    ) -> T:
        # On cancellation, drop the closure so that its buffers are freed.
        calls = [call]

        def run() -> T:
            if time.monotonic() > deadline or not calls:
                raise DeadlineExceeded("the request timed out before its images were read")
            return calls.pop()()

        try:
            return await self._loop.run_in_executor(threads, run)
        finally:
            calls.clear()

    def close(self) -> bool:
        """Stops the threads after the last request; returns False if a thread hangs."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            return False
        for threads in (self._decoders, self._parser):
            threads.shutdown(cancel_futures=True)
        return True

    # Methods of the decoder threads.

    def _decode(self, lane: collections.deque[_EncodedImage]) -> None:
        """Decodes the first image of a lane, then submits the lane again for the next image.

        Images of other requests are decoded in between. The decoded image goes directly to the
        compute thread: a detour through the event loop would slow both down.
        """
        try:
            image = lane.popleft()
        except IndexError:
            return  # The request was cancelled or has timed out.
        start = time.monotonic()
        try:
            pixels = image.read()
        except DataError as error:
            self._loop.call_soon_threadsafe(_set_result, image.request, image.index, error)
        except Exception as error:  # The request must get an answer in any case.
            self._loop.call_soon_threadsafe(_fail, image.request, error)
            return
        else:
            now = time.monotonic()
            decoded = _DecodedImage(image.request, image.index, pixels, now - start, now)
            with self._changed:
                self._waiting.append(decoded)
                self._changed.notify()
        if lane:
            self._decoders.submit(self._decode, lane)

    # Methods of the compute thread.

    def _compute_all(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._compute(batch)
            del batch  # Frees the images while the thread waits for the next batch.

    def _next_batch(self) -> list[_DecodedImage] | None:
        """Waits for images; returns images of one program, the oldest first, or None at the end."""
        with self._changed:
            while not self._waiting:
                if self._is_closing:
                    return None
                self._changed.wait()
            self._fill_batch()
            if not self._waiting:
                return []
            program = self._next_program()
            images = [image for image in self._waiting if image.request.program is program]
            batch = images[: program.best_size(len(images))]
            taken = set(map(id, batch))
            self._waiting = collections.deque(w for w in self._waiting if id(w) not in taken)
            return batch

    def _next_program(self) -> Program:
        """Returns the program of the oldest image that needs another program than the last batch.

        If all images need the program of the last batch, returns that program. Alternation keeps
        many requests for one program from delaying requests for another program.
        """
        last = self._last()
        others = (
            image.request.program for image in self._waiting if image.request.program is not last
        )
        program = next(others, self._waiting[0].request.program)
        self._last = weakref.ref(program)
        return program

    def _fill_batch(self) -> None:
        """Waits until a batch is full or the oldest image has waited for `max_wait` seconds."""
        program = self._waiting[0].request.program
        end = self._waiting[0].decode_end + self._max_wait
        while True:
            self._drop_cancelled()
            count = sum(image.request.program is program for image in self._waiting)
            left = end - time.monotonic()
            if self._is_closing or left <= 0 or not count or count >= program.largest_size:
                return
            self._changed.wait(left)

    def _drop_cancelled(self) -> None:
        """Removes the images of requests that were cancelled or have timed out."""
        self._waiting = collections.deque(w for w in self._waiting if not w.request.future.done())

    def _compute(self, batch: Sequence[_DecodedImage]) -> None:
        """Computes a batch and sends its results to the event loop."""
        start = self._computing_since = time.monotonic()
        try:
            results = self._run(batch)
        except Exception as error:  # The thread must continue in any case.
            self._loop.call_soon_threadsafe(_fail_all, batch, error)
            return
        finally:
            self._computing_since = None
        seconds = time.monotonic() - start
        self._per_image += _WEIGHT * (seconds / len(batch) - self._per_image)
        computed = [
            Computed(
                result=result,
                pixels=image.pixels,
                decode_seconds=image.decode_seconds,
                queue_seconds=start - image.request.arrival_time - image.decode_seconds,
                compute_seconds=seconds,
                batch_size=len(batch),
            )
            for image, result in zip(batch, results, strict=True)
        ]
        self._loop.call_soon_threadsafe(self._set_results, batch, computed)

    def _run(self, batch: Sequence[_DecodedImage]) -> list[Any]:
        """Returns one result per image; pads the batch to a compiled size."""
        program = batch[0].request.program
        missing = program.best_size(len(batch)) - len(batch)
        images = [image.pixels for image in batch]
        results = list(program.run(np.stack(images + images[-1:] * missing)))[: len(batch)]
        if len(results) < len(batch):
            raise RuntimeError(f"{len(results)} results of {len(batch)} images")
        return results

    def _set_results(self, batch: Sequence[_DecodedImage], computed: Sequence[Computed]) -> None:
        for image, result in zip(batch, computed, strict=True):
            _set_result(image.request, image.index, result)
        self._on_batch(len(batch), computed[0].compute_seconds)


def _set_result(request: _Request, index: int, result: Computed | DataError) -> None:
    """Stores the result of an image; the last result of a request completes its future."""
    request.results[index] = result
    request.missing -= 1
    if not request.missing and not request.future.done():
        request.future.set_result(request.results)


def _fail_all(batch: Sequence[_DecodedImage], error: Exception) -> None:
    for image in batch:
        _fail(image.request, error)


def _fail(request: _Request, error: Exception) -> None:
    if not request.future.done():
        request.future.set_exception(error)
