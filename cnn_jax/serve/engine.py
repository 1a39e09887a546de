"""Dynamic batching: images of several requests are processed together in one batch.

A single thread computes all batches. Images that arrive during a computation wait in a queue. When
the thread is free, it makes a batch of the oldest image and of other waiting images that need the
same program, in turn from each client. Images for a program other than the program of the last
batch come first, so that programs alternate. An image that arrives while the engine is idle
is computed at once. Under load the batches grow. An image of a cancelled or timed-out request is
not computed.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from cnn_jax.data.decode import Pixels
from cnn_jax.serve.fairness import FairThreads, Quota
from cnn_jax.serve.limits import Refused
from cnn_jax.system.errors import DataError

T = TypeVar("T")

# A program is timed three times, or until this number of seconds has passed.
_TIMING_SECONDS = 0.2
# A batch size is a gain if it multiplies the best time per image by less than this factor.
_GAIN = 0.95
# If a batch takes longer than this number of seconds, the device is considered to hang. If the
# event loop runs no callback for this number of seconds, the event loop is considered to hang.
_HANGING_SECONDS = 60.0
# Seconds between two callbacks that show that the event loop runs.
_BEAT_SECONDS = 1.0
# An image with more pixels is large: separate threads decode it. Decoding 4 million pixels takes
# about 40 ms.
LARGE_PIXELS = 4_000_000
# Maximum seconds that the shutdown waits for a running batch.
_CLOSING_SECONDS = 10.0


class Overloaded(Refused):
    """Raised if a request would exceed a limit on the images in flight."""

    def __init__(self):
        message = "too many images are in flight; try again in 1 s"
        super().__init__(429, "busy", message, retry_after="1")


class DeadlineExceeded(Refused):
    """Raised if the deadline of a request passed before the request's images were processed."""

    def __init__(self, message: str):
        super().__init__(503, "late", message, retry_after="1")


@contextlib.asynccontextmanager
async def ending_at(deadline: float, message: str) -> AsyncIterator[None]:
    """Raises DeadlineExceeded at the deadline, in seconds of `time.monotonic`."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded(message) from error


# A function that maps a batch of images, uint8 [size, height, width, 3], to one result per image.
_Run = Callable[[np.ndarray], Iterable[Any]]
# A function that decodes one image to uint8 [height, width, 3], or raises DataError.
_Read = Callable[[], Pixels]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function that is compiled for several batch sizes."""

    run: _Run
    seconds: dict[int, float]  # The run time by compiled batch size, in increasing order of size.

    @property
    def largest_size(self) -> int:
        return max(self.seconds)

    def best_size(self, count: int) -> int:
        """Returns the batch size with the least time per image for `count` waiting images.

        On a CPU the time grows with the batch size. The best size is the next smaller compiled
        size, and the remaining images wait. On an accelerator the best size is the next larger
        compiled size, and the batch is padded.
        """
        return min(self.seconds, key=lambda size: self.seconds[size] / min(size, count))


def time_program(run: _Run, image: Pixels, sizes: Sequence[int]) -> Program:
    """Compiles and times a program for several batch sizes, the smallest first.

    Sizes that cannot help are left out: if two sizes in a row do not reduce the time per image,
    larger sizes are not compiled. On a CPU this halves the time until the server is ready.

    Args:
      run: The function to compile; see `Program.run`.
      image: An example image, uint8 [height, width, 3].
      sizes: The batch sizes to compile, including 1.
    """
    seconds: dict[int, float] = {}
    best, num_without_gain = math.inf, 0
    for size in sorted(sizes):
        images = np.repeat(image[None], size, axis=0)
        run(images)  # The first call compiles the program, so its time is not measured.
        times: list[float] = []
        while len(times) < 3 and sum(times) < _TIMING_SECONDS:
            start = time.perf_counter()
            run(images)
            times.append(time.perf_counter() - start)
        seconds[size] = min(times)
        num_without_gain = 0 if seconds[size] / size < _GAIN * best else num_without_gain + 1
        best = min(best, seconds[size] / size)
        if num_without_gain == 2:
            break
    return Program(run, seconds)


@dataclasses.dataclass(frozen=True)
class Computed:
    """The result for an image."""

    result: Any  # The program's result for this image.
    pixels: Pixels  # The decoded image, uint8 [height, width, 3].
    seconds: float  # The time to decode the image, to wait and to compute.


@dataclasses.dataclass(eq=False)
class _Request:
    """A request whose images are in flight."""

    program: Program
    client: str
    future: "asyncio.Future[list[Any]]"  # Receives `results` when all results are known.
    results: list[Any]  # The result or error of each image; None while it is not known yet.
    missing: int  # The number of results that are not known yet.
    start: float  # In seconds of `time.monotonic`.


@dataclasses.dataclass(eq=False)
class _DecodedImage:
    """A decoded image that waits for the compute thread."""

    request: _Request
    index: int  # The image's index in the request.
    pixels: Pixels  # uint8 [height, width, 3].
    decode_end: float  # In seconds of `time.monotonic`.


class Engine:
    """The threads that decode and process images, with a limit on the images in flight."""

    def __init__(
        self,
        capacity: int,
        max_wait: float = 0.0,
        decoders: int = 2,
        pixels: int = 500_000_000,
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ):
        """Creates the engine without starting its compute thread; see `start`.

        Args:
          capacity: Maximum number of images in flight, which are waiting, in decoding or in
            computation.
          max_wait: Maximum seconds that an image waits for its batch to fill.
          decoders: Number of decoder threads for images that are not large. There are half as many
            further threads for large images, so that large images do not delay other images.
          pixels: Maximum number of pixels of all images in flight, before they are resized.
          on_batch: Called in the event loop after each batch, with the number of images in the
            batch and the run time in seconds.
        """
        self._max_wait = max_wait
        self._on_batch = on_batch
        self._images, self._pixels = Quota(capacity), Quota(pixels)
        self._decoders = FairThreads(decoders, "decode")
        self._large_decoders = FairThreads(max(1, decoders // 2), "decode large")
        # Only one thread parses request bodies, because a parsed body can need many times as
        # much memory as the unparsed body.
        self._parser = FairThreads(1, "parse")
        self._waiting: collections.deque[_DecodedImage] = collections.deque()
        # A weak reference to the program of the last batch, so that the program of an unloaded
        # version is freed even if no further batch arrives.
        self._last: Callable[[], Program | None] = lambda: None
        self._computing_since: float | None = None
        self._last_beat = time.monotonic()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._compute_all, name="compute", daemon=True)

    def start(self) -> None:
        """Starts the compute thread, which sends results to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._beat()

    def _beat(self) -> None:
        self._last_beat = time.monotonic()
        if not self._is_closing:
            self._loop.call_later(_BEAT_SECONDS, self._beat)

    @property
    def in_flight(self) -> int:
        """The number of images in flight: images that wait, are decoded, or are processed."""
        return self._images.used

    @property
    def is_alive(self) -> bool:
        """Returns whether the compute thread runs, and neither a batch nor the event loop hangs.

        This property may be read in any thread.
        """
        since = self._computing_since
        oldest = min(self._last_beat, self._last_beat if since is None else since)
        return self._thread.is_alive() and time.monotonic() - oldest <= _HANGING_SECONDS

    @contextlib.contextmanager
    def admit(self, images: int, pixels: int = 0, client: str = "") -> Iterator[None]:
        """Counts the images of a request as in flight until the context ends.

        Args:
          images: The number of images.
          pixels: The number of pixels of these images together.
          client: The client that has sent the request.

        Raises:
          Overloaded: More images or pixels would be in flight than the limits allow; see `Quota`.
        """
        amounts = ((self._images, images), (self._pixels, pixels))
        if not all(quota.fits(client, amount) for quota, amount in amounts):
            raise Overloaded
        for quota, amount in amounts:
            quota.add(client, amount)
        try:
            yield
        finally:
            for quota, amount in amounts:
                quota.add(client, -amount)

    async def compute(
        self,
        program: Program,
        reads: Sequence[_Read],
        deadline: float,
        pixels: Sequence[int] = (),
        client: str = "",
    ) -> list[Computed | DataError]:
        """Runs a program on the images of a request, batched with the images of other requests.

        Args:
          program: The program.
          reads: Functions that each decode an image; at least one. They run on decoder threads.
          deadline: In seconds of `time.monotonic`.
          pixels: The number of pixels of each image; by default 0.
          client: The client that has sent the request.

        Returns:
          A result for each image; for an image that cannot be used, an error.

        Raises:
          DeadlineExceeded: The deadline passed before all images were computed.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        count = len(reads)
        request = _Request(program, client, future, [None] * count, count, time.monotonic())
        calls = {self._decoders: [], self._large_decoders: []}
        for index, (read, size) in enumerate(zip(reads, pixels or [0] * count, strict=True)):
            threads = self._large_decoders if size > LARGE_PIXELS else self._decoders
            calls[threads].append(functools.partial(self._decode, request, index, read))
        waiting = [threads.submit(client, chosen) for threads, chosen in calls.items()]
        # The future is cancelled if the client disconnects or the deadline passes. The compute
        # thread then drops the images of the request.
        try:
            async with ending_at(deadline, "the request timed out before its images were computed"):
                return await future
        finally:
            # Free the images that still wait for a decoder, because these images no longer count as
            # in flight.
            for one in waiting:
                one.clear()

    async def run_on_decoder(self, call: Callable[[], T], deadline: float, client: str = "") -> T:
        """Runs a function on a decoder thread; see `_run_on_thread`."""
        return await _run_on_thread(self._decoders, call, deadline, client)

    async def run_on_parser(self, call: Callable[[], T], deadline: float, client: str = "") -> T:
        """Runs a function on the parser thread, which runs one function at a time."""
        return await _run_on_thread(self._parser, call, deadline, client)

    def close(self) -> bool:
        """Stops all threads; returns False if the compute thread hangs.

        Call this method only after the last request has ended.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            return False
        for threads in (self._decoders, self._large_decoders, self._parser):
            threads.shut_down()
        return True

    # The next method runs on the decoder threads.

    def _decode(self, request: "_Request", index: int, read: _Read) -> None:
        """Decodes an image of a request.

        The image is passed directly to the compute thread, because a detour through the event loop
        would delay it.
        """
        try:
            pixels = read()
        except DataError as error:
            self._loop.call_soon_threadsafe(_set_result, request, index, error)
        except Exception as error:  # Catch every error, because the client must get a response.
            self._loop.call_soon_threadsafe(_fail, request, error)
        else:
            decoded = _DecodedImage(request, index, pixels, time.monotonic())
            with self._changed:
                self._waiting.append(decoded)
                self._changed.notify()

    # The methods below, except `_set_results`, run on the compute thread.

    def _compute_all(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._compute(batch)
            del batch  # Free the images before the thread waits for the next batch.

    def _next_batch(self) -> list[_DecodedImage] | None:
        """Waits for images; returns the images of the next batch, or None after `close`."""
        with self._changed:
            while not self._waiting:
                if self._is_closing:
                    return None
                self._changed.wait()
            self._fill_batch()
            if not self._waiting:
                return []
            program = self._next_program()
            images = _in_turns(w for w in self._waiting if w.request.program is program)
            batch = images[: program.best_size(len(images))]
            taken = set(map(id, batch))
            self._waiting = collections.deque(w for w in self._waiting if id(w) not in taken)
            return batch

    def _next_program(self) -> Program:
        """Returns the program of the oldest waiting image that needs another program than the last.

        If there is no such image, the last program is returned. Without this alternation, many
        requests for one program could delay the requests for another program.
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
            # Drop the images of requests that were cancelled or have timed out.
            self._waiting = collections.deque(
                w for w in self._waiting if not w.request.future.done()
            )
            count = sum(image.request.program is program for image in self._waiting)
            left = end - time.monotonic()
            if self._is_closing or left <= 0 or not count or count >= program.largest_size:
                return
            self._changed.wait(left)

    def _compute(self, batch: Sequence[_DecodedImage]) -> None:
        """Runs the program on a batch, and sends the results to the event loop."""
        start = self._computing_since = time.monotonic()
        try:
            results = self._run(batch)
        except Exception as error:  # Catch every error, because the compute thread must continue.
            for image in batch:
                self._loop.call_soon_threadsafe(_fail, image.request, error)
            return
        finally:
            self._computing_since = None
        end = time.monotonic()
        self._loop.call_soon_threadsafe(self._set_results, batch, results, start, end)

    def _run(self, batch: Sequence[_DecodedImage]) -> list[Any]:
        """Runs the program on a padded batch; returns one result per image, without the padding."""
        program = batch[0].request.program
        missing = program.best_size(len(batch)) - len(batch)
        images = [image.pixels for image in batch]
        results = list(program.run(np.stack(images + images[-1:] * missing)))[: len(batch)]
        if len(results) < len(batch):
            raise RuntimeError(f"{len(results)} results of {len(batch)} images")
        return results

    def _set_results(
        self, batch: Sequence[_DecodedImage], results: Sequence[Any], start: float, end: float
    ) -> None:
        for image, result in zip(batch, results, strict=True):
            computed = Computed(result, image.pixels, end - image.request.start)
            _set_result(image.request, image.index, computed)
        self._on_batch(len(batch), end - start)


async def _run_on_thread(
    threads: FairThreads, call: Callable[[], T], deadline: float, client: str
) -> T:
    """Runs a function on a thread, for a client.

    Raises:
      DeadlineExceeded: The deadline passed before the function returned.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # If this coroutine is cancelled, drop the function, so that the buffers that the function uses
    # are freed.
    waiting = threads.submit(client, [run])
    try:
        async with ending_at(deadline, "the request timed out before its images were read"):
            return await asyncio.wrap_future(future)
    finally:
        waiting.clear()


def _in_turns(images: Iterable[_DecodedImage]) -> list[_DecodedImage]:
    """Returns the images in an order in which the clients take turns; the oldest is first."""
    counts: collections.Counter[str] = collections.Counter()

    def turn(image: _DecodedImage) -> int:
        counts[image.request.client] += 1
        return counts[image.request.client]

    return sorted(images, key=turn)


def _set_result(request: _Request, index: int, result: Computed | DataError) -> None:
    """Stores the result of an image; completes the request's future after the last result."""
    request.results[index] = result
    request.missing -= 1
    if not request.missing and not request.future.done():
        request.future.set_result(request.results)


def _fail(request: _Request, error: Exception) -> None:
    if not request.future.done():
        request.future.set_exception(error)
