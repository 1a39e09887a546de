"""Divides limited quantities and threads between the clients of the server."""

import collections
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple


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


class Call(NamedTuple):
    """A call that waits for a thread; `cost` is proportional to its run time."""

    cost: int
    run: Callable[[], None]


class FairThreads:
    """Threads that run calls, and divide their time fairly between the clients.

    Each client with waiting calls has a tag, and the client with the smallest tag is next. Each
    call adds its cost to the tag of its client. A client that had no waiting call gets no credit
    for that time: it starts behind the tag of the last call that was started. So new clients
    cannot delay a waiting client forever. (The method follows self-clocked fair queueing;
    Golestani, 1994.) The requests of one client take turns.
    """

    def __init__(self, num_threads: int, name: str):
        self._executor = concurrent.futures.ThreadPoolExecutor(num_threads, name)
        self._lock = threading.Lock()
        self._num_running = 0
        # The waiting calls of each request, by client.
        self._waiting: dict[str, collections.deque[collections.deque[Call]]] = {}
        # The tags of clients with waiting calls, and all other tags above `_last_tag`.
        self._tags: dict[str, int] = {}
        # The tag of the last call that was started.
        self._last_tag = 0

    def submit(self, client: str, calls: Sequence[Call]) -> collections.deque[Call]:
        """Schedules the calls of a request.

        Args:
          client: The client that has sent the request.
          calls: The calls, which must not raise.

        Returns:
          The calls that still wait. Clear it to cancel them.
        """
        request = collections.deque(calls)
        if not calls:
            return request
        with self._lock:
            if client not in self._waiting:
                self._waiting[client] = collections.deque()
                start = self._last_tag + calls[0].cost
                self._tags[client] = max(self._tags.get(client, 0), start)
            self._waiting[client].append(request)
        for _ in calls:
            self._executor.submit(self._run_next)
        return request

    def shut_down(self) -> None:
        """Cancels the waiting calls, and waits for the running calls."""
        self._executor.shutdown(cancel_futures=True)

    def _run_next(self) -> None:
        with self._lock:
            call = self._take()
            self._num_running += 1
        if call is not None:  # There is no call if a request was cancelled.
            call.run()
        with self._lock:
            self._num_running -= 1
            if not self._waiting and not self._num_running:
                self._tags.clear()

    def _take(self) -> Call | None:
        """Removes and returns the call that is next; returns None if no call waits."""
        while self._waiting:
            client = min(self._waiting, key=self._tags.__getitem__)
            requests = self._waiting[client]
            request = requests.popleft()
            call = None
            with contextlib.suppress(IndexError):  # The calls may have been cancelled.
                call = request.popleft()
            if request:
                requests.append(request)
            if not requests:
                del self._waiting[client]
            if call is not None:
                self._start(client, call.cost)
                return call
        return None

    def _start(self, client: str, cost: int) -> None:
        """Adds the cost of a call to the tag of its client, and forgets tags without effect."""
        tag = self._tags[client]
        self._tags[client] = tag + cost
        if tag > self._last_tag:
            self._last_tag = tag
            self._tags = {n: t for n, t in self._tags.items() if t > tag or n in self._waiting}
