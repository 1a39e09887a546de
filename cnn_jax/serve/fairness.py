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
    the same fraction remains free for a further client. The method is that of Choudhury and Hahne,
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

    Of the clients with waiting calls, the client whose earlier calls had the least cost is next. A
    client that had no waiting call gets no credit for that time. (This is start-time fair queueing;
    Goyal, Vin and Cheng, 1996.) The requests of one client take turns.
    """

    def __init__(self, num_threads: int, name: str):
        self._executor = concurrent.futures.ThreadPoolExecutor(num_threads, name)
        self._lock = threading.Lock()
        # The waiting calls of each request, by client.
        self._waiting: dict[str, collections.deque[collections.deque[Call]]] = {}
        # For each client, the total cost of its calls that were started. A client without an entry
        # has the cost `_least_cost`. When a call is started, `_least_cost` becomes the earlier cost
        # of its client.
        self._costs: dict[str, int] = {}
        self._least_cost = 0

    def submit(self, client: str, calls: Sequence[Call]) -> collections.deque[Call]:
        """Schedules the calls of a request.

        Args:
          client: The client that has sent the request.
          calls: The calls, which must not raise.

        Returns:
          The calls that still wait. Clear it to cancel them.
        """
        request = collections.deque(calls)
        with self._lock:
            self._costs = {name: c for name, c in self._costs.items() if c > self._least_cost}
            self._waiting.setdefault(client, collections.deque()).append(request)
        for _ in calls:
            self._executor.submit(self._run_next)
        return request

    def shut_down(self) -> None:
        """Cancels the waiting calls, and waits for the running calls."""
        self._executor.shutdown(cancel_futures=True)

    def _run_next(self) -> None:
        with self._lock:
            call = self._take()
        if call is not None:  # There is no call if a request was cancelled.
            call.run()

    def _take(self) -> Call | None:
        """Removes and returns the call that is next; returns None if no call waits."""
        while self._waiting:
            client = min(self._waiting, key=lambda name: self._costs.get(name, self._least_cost))
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
                self._least_cost = self._costs.get(client, self._least_cost)
                self._costs[client] = self._least_cost + call.cost
                return call
        return None
