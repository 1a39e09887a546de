"""Dynamic batching: images of many requests go to the device together.

One thread computes. While it does, what arrives gathers; when it is free it takes the oldest
image, of another program than the last if there is one, and what else waits for the same. So an
image that comes alone waits for nobody, and the busier it is, the larger are the batches. One
that nobody waits for any more is never computed.
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

# The first estimate of an image's time, until one was measured.
_SECONDS_PER_IMAGE = 0.01
# What a new measurement weighs in the estimate.
_WEIGHT = 0.1
# Seconds after which a batch that is still computed means that the device hangs.
_HANGING_SECONDS = 60.0
# Seconds in which it must have come to its end when the server ends.
_CLOSING_SECONDS = 10.0

_LATE = "the time of the request was up before its images were computed"


class Overloaded(UserError):  # noqa: N818  (said of who asks)
    """There are as many images in the house as may be.

    Attributes:
      retry_after: Whole seconds after which there should be room.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"too many images at once; try again in {retry_after} s")
        self.retry_after = retry_after


class Late(UserError):  # noqa: N818  (the same)
    """A request's time was up before its images were computed."""


# uint8 [size, height, width, 3] -> one result an image, which can be iterated over.
_Run = Callable[[np.ndarray], Iterable[Any]]
# An image, uint8 [height, width, 3]; DataError if it cannot be used.
_Read = Callable[[], Pixels]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Something that is computed of a batch of images.

    Attributes:
      run: From uint8 [size, height, width, 3] to one result an image.
      seconds: How long it takes for each size that is compiled, in growing order.
    """

    run: _Run
    seconds: dict[int, float]

    @property
    def largest(self) -> int:
        return max(self.seconds)

    def best_size(self, count: int) -> int:
        """The compiled size by which so many waiting images cost the least time each.

        On a CPU, where time grows with size, that is the next smaller one, and the rest waits
        for its turn; on an accelerator the next larger one, which is padded.
        """
        return min(self.seconds, key=lambda size: self.seconds[size] / min(size, count))


def measure(run: _Run, one: Pixels, sizes: Sequence[int]) -> Program:
    """A program that is compiled and warm for batches of these sizes.

    Args:
      run: As of `Program`.
      one: An image, uint8 [height, width, 3].
      sizes: Numbers of images, 1 among them.
    """
    seconds = {}
    for size in sorted(sizes):
        images = np.repeat(one[None], size, axis=0)
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
    """What has become of an image.

    Attributes:
      result: Of the program, for this image.
      pixels: The image as it was computed, uint8 [height, width, 3].
      decoded: Seconds that decoding has taken.
      queued: Seconds for which it has waited, for a thread to decode it and for the device.
      computed: Seconds that its batch has taken.
      together: Images of its batch.
    """

    result: Any
    pixels: Pixels
    decoded: float
    queued: float
    computed: float
    together: int


@dataclasses.dataclass(eq=False)
class _Request:
    """A request that waits.

    Attributes:
      program: What is to be computed of its images.
      came: When it came, in seconds of `time.monotonic`.
      future: Of the loop that waits for it; its result are `found`.
      found: Of each image what has become of it, None as long as it is not known.
      missing: How many these are.
    """

    program: Program
    came: float
    future: "asyncio.Future[list[Any]]"
    found: list[Any]
    missing: int


@dataclasses.dataclass(eq=False)
class _Encoded:
    """An image that waits to be decoded.

    Attributes:
      request: The one that it belongs to.
      place: In it.
      read: Decodes it.
    """

    request: _Request
    place: int
    read: _Read


@dataclasses.dataclass(eq=False)
class _Work:
    """An image that waits to be computed.

    Attributes:
      request: The one that it belongs to.
      place: In it.
      pixels: uint8 [height, width, 3].
      decoded: Seconds that decoding has taken.
      arrived: When it was done, in seconds of `time.monotonic`.
    """

    request: _Request
    place: int
    pixels: Pixels
    decoded: float
    arrived: float


class Engine:
    """A thread that computes, threads that decode, and who may come in."""

    def __init__(
        self,
        capacity: int,
        max_wait: float = 0.0,
        decoders: int = 2,
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ):
        """Nothing is started yet.

        Args:
          capacity: Images that may be in the house at once, decoded, waiting or computed.
          max_wait: Seconds for which an image may be held back for others to join it.
          decoders: Threads.
          on_batch: Called after each batch with its images and seconds, in the loop.
        """
        self.capacity = capacity
        self._max_wait = max_wait
        self._on_batch = on_batch
        self._inside = 0
        self._per_image = _SECONDS_PER_IMAGE
        # Decodings of a request at once: one with many large images leaves room for others.
        self._decoders_per_request = max(1, decoders // 2)
        self._decoders = concurrent.futures.ThreadPoolExecutor(decoders, "decode")
        # One: what a body becomes when it is parsed is many times as large.
        self._parser = concurrent.futures.ThreadPoolExecutor(1, "parse")
        self._waiting: collections.deque[_Work] = collections.deque()
        # Weak: one that is served no more shall be freed though nobody asks for another.
        self._last: Callable[[], Program | None] = lambda: None
        self._computing_since: float | None = None
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._compute_all, name="compute", daemon=True)

    def start(self) -> None:
        """Starts, for the event loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def inside(self) -> int:
        """Images in the house."""
        return self._inside

    @property
    def is_alive(self) -> bool:
        """Whether it computes, or would."""
        since = self._computing_since
        is_hanging = since is not None and time.monotonic() - since > _HANGING_SECONDS
        return self._thread.is_alive() and not is_hanging

    @contextlib.contextmanager
    def admitted(self, images: int) -> Iterator[None]:
        """Within, so many images more are in the house.

        Raises:
          Overloaded: There is no room for them.
        """
        if self._inside + images > self.capacity:
            raise Overloaded(max(1, math.ceil(self._inside * self._per_image)))
        self._inside += images
        try:
            yield
        finally:
            self._inside -= images

    async def compute(
        self, program: Program, reads: Sequence[_Read], deadline: float
    ) -> list[Computed | DataError]:
        """The program's results for a request's images, each computed with others.

        Args:
          program: What is computed.
          reads: Of each image what decodes it, called on a thread; one at least.
          deadline: In seconds of `time.monotonic`.

        Returns:
          Of each image its result, or why it cannot be used.

        Raises:
          Late: The deadline has come before them.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        count, now = len(reads), time.monotonic()
        request = _Request(program, now, future, [None] * count, count)
        images = [_Encoded(request, place, read) for place, read in enumerate(reads)]
        step = self._decoders_per_request
        lanes = [collections.deque(images[first::step]) for first in range(min(count, step))]
        for lane in lanes:
            self._decoders.submit(self._decode, lane)
        # Cancelled with who waits for it, and at the deadline, which the threads look for.
        try:
            async with asyncio.timeout(max(0.0, deadline - now)):
                return await future
        except TimeoutError as error:
            raise Late(_LATE) from error
        finally:
            # What is left waits for a thread with all that it holds, and nobody counts it.
            for lane in lanes:
                lane.clear()

    async def draw(self, call: Callable[[], T], deadline: float) -> T:
        """What a call returns that is made on a thread for images.

        Raises:
          Late: Its turn has come after the deadline.
        """
        return await self._on_thread(self._decoders, call, deadline)

    async def parse(self, call: Callable[[], T], deadline: float) -> T:
        """The same on the thread for bodies, one after the other."""
        return await self._on_thread(self._parser, call, deadline)

    async def _on_thread(
        self, threads: concurrent.futures.Executor, call: Callable[[], T], deadline: float
    ) -> T:
        # Whoever leaves takes the call along, with all that it holds.
        calls = [call]

        def run() -> T:
            if time.monotonic() > deadline or not calls:
                raise Late("the time of the request was up before its images were read")
            return calls.pop()()

        try:
            return await self._loop.run_in_executor(threads, run)
        finally:
            calls.clear()

    def close(self) -> bool:
        """Ends the threads, for which nobody may be waiting any more; False if one hangs."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            return False
        for threads in (self._decoders, self._parser):
            threads.shutdown(cancel_futures=True)
        return True

    # On a thread that decodes.

    def _decode(self, lane: collections.deque[_Encoded]) -> None:
        """Decodes the first of some images of a request; the others are for later.

        In between come those of other requests. From here an image goes on to the thread that
        computes, without a word to the loop, which would take both their time.
        """
        try:
            image = lane.popleft()
        except IndexError:
            return  # Nobody waits for them any more.
        start = time.monotonic()
        try:
            pixels = image.read()
        except DataError as error:
            self._loop.call_soon_threadsafe(_found, image.request, image.place, error)
        except Exception as error:  # Of any kind: who waits must hear of it.
            self._loop.call_soon_threadsafe(_fail, image.request, error)
            return
        else:
            now = time.monotonic()
            work = _Work(image.request, image.place, pixels, now - start, now)
            with self._changed:
                self._waiting.append(work)
                self._changed.notify()
        if lane:
            self._decoders.submit(self._decode, lane)

    # On the thread that computes.

    def _compute_all(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._compute(batch)
            del batch  # While it waits for the next, nothing of this one is held.

    def _next_batch(self) -> list[_Work] | None:
        """Images of one program, the oldest first; None when there is no more to do."""
        with self._changed:
            while not self._waiting:
                if self._is_closing:
                    return None
                self._changed.wait()
            self._gather()
            if not self._waiting:
                return []
            program = self._next_program()
            alike = [work for work in self._waiting if work.request.program is program]
            batch = alike[: program.best_size(len(alike))]
            taken = set(map(id, batch))
            self._waiting = collections.deque(w for w in self._waiting if id(w) not in taken)
            return batch

    def _next_program(self) -> Program:
        """That of the oldest image, but for images of another that wait as well.

        So who asks for much of one kind holds up nobody who asks for another.
        """
        last = self._last()
        others = (
            work.request.program for work in self._waiting if work.request.program is not last
        )
        program = next(others, self._waiting[0].request.program)
        self._last = weakref.ref(program)
        return program

    def _gather(self) -> None:
        """Waits until there is a whole batch, or the oldest image has waited enough.

        What nobody waits for any more is dropped.
        """
        program = self._waiting[0].request.program
        until = self._waiting[0].arrived + self._max_wait
        while True:
            self._drop()
            alike = sum(work.request.program is program for work in self._waiting)
            left = until - time.monotonic()
            if self._is_closing or left <= 0 or not alike or alike >= program.largest:
                return
            self._changed.wait(left)

    def _drop(self) -> None:
        """Takes out what nobody waits for, since they have left or their time is up."""
        self._waiting = collections.deque(w for w in self._waiting if not w.request.future.done())

    def _compute(self, batch: Sequence[_Work]) -> None:
        """Computes a batch, and tells those who wait."""
        start = self._computing_since = time.monotonic()
        try:
            results = self._run(batch)
        except Exception as error:  # Of any kind: the thread must go on.
            self._loop.call_soon_threadsafe(_fail_all, batch, error)
            return
        finally:
            self._computing_since = None
        seconds = time.monotonic() - start
        self._per_image += _WEIGHT * (seconds / len(batch) - self._per_image)
        computed = [
            Computed(
                result=result,
                pixels=work.pixels,
                decoded=work.decoded,
                queued=start - work.request.came - work.decoded,
                computed=seconds,
                together=len(batch),
            )
            for work, result in zip(batch, results, strict=True)
        ]
        self._loop.call_soon_threadsafe(self._tell, batch, computed)

    def _run(self, batch: Sequence[_Work]) -> list[Any]:
        """One result for each image."""
        program = batch[0].request.program
        missing = program.best_size(len(batch)) - len(batch)
        images = [work.pixels for work in batch]
        results = list(program.run(np.stack(images + images[-1:] * missing)))[: len(batch)]
        if len(results) < len(batch):
            raise RuntimeError(f"{len(results)} results of {len(batch)} images")
        return results

    def _tell(self, batch: Sequence[_Work], computed: Sequence[Computed]) -> None:
        for work, of_work in zip(batch, computed, strict=True):
            _found(work.request, work.place, of_work)
        self._on_batch(len(batch), computed[0].computed)


def _found(request: _Request, place: int, found: Computed | DataError) -> None:
    """Notes what has become of an image; with the last one the request has its answer."""
    request.found[place] = found
    request.missing -= 1
    if not request.missing and not request.future.done():
        request.future.set_result(request.found)


def _fail_all(batch: Sequence[_Work], error: Exception) -> None:
    for work in batch:
        _fail(work.request, error)


def _fail(request: _Request, error: Exception) -> None:
    if not request.future.done():
        request.future.set_exception(error)
