"""Divides limited quantities and threads between the clients of the server."""

import collections
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterable


class Quota:
    """A limited quantity that all clients share, such as the number of images in flight.

    A client may use at most as much as then remains free. So one client can use half of the
    quantity. If n clients use as much as they can, each of them uses the fraction 1 / (n + 1), and
    the same fraction remains free. The method is that of Choudhury and Hahne,
    "Dynamic queue length thresholds for shared-memory packet switches", 1998.

    Attributes:
      limit: The maximum of the quantity.
      used: The quantity that all clients use together.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.used = 0
        self._by_client: dict[str, int] = {}

    def fits(self, client: str, amount: int) -> bool:
        """Returns whether a client may use a further amount; it may always use 0."""
        own = self._by_client.get(client, 0) + amount
        return not amount or own <= self.limit - self.used - amount

    def add(self, client: str, amount: int) -> None:
        """Adds an amount, which may be negative, to the quantity that a client uses."""
        own = self._by_client.get(client, 0) + amount
        self.used += amount
        self._by_client[client] = own
        if not own:
            del self._by_client[client]


class FairThreads:
    """Threads that run calls; the clients take turns, and so do the requests of a client."""

    def __init__(self, num_threads: int, name: str):
        self._executor = concurrent.futures.ThreadPoolExecutor(num_threads, name)
        self._lock = threading.Lock()
        # The waiting calls of each request, by client. The first request of the first client is
        # next.
        self._waiting: dict[str, collections.deque[collections.deque[Callable[[], None]]]] = {}

    def submit(
        self, client: str, calls: Iterable[Callable[[], None]]
    ) -> collections.deque[Callable[[], None]]:
        """Schedules the calls of a request.

        Args:
          client: The client that has sent the request.
          calls: The calls, which must not raise.

        Returns:
          The calls that still wait. Clear it to cancel them.
        """
        request = collections.deque(calls)
        count = len(request)
        if request:
            with self._lock:
                self._waiting.setdefault(client, collections.deque()).append(request)
        for _ in range(count):
            self._executor.submit(self._run_next)
        return request

    def shut_down(self) -> None:
        """Cancels the waiting calls, and waits for the running calls."""
        self._executor.shutdown(cancel_futures=True)

    def _run_next(self) -> None:
        with self._lock:
            call = self._take()
        if call is not None:  # There is no call if a request was cancelled.
            call()

    def _take(self) -> Callable[[], None] | None:
        """Removes and returns the call that is next; returns None if no call waits."""
        call = None
        while self._waiting and call is None:
            client = next(iter(self._waiting))
            requests = self._waiting.pop(client)
            request = requests.popleft()
            with contextlib.suppress(IndexError):  # The calls may have been cancelled.
                call = request.popleft()
            if request:
                requests.append(request)
            if requests:
                self._waiting[client] = requests  # The client is last now.
        return call
