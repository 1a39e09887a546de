"""What a client may ask: how much, for how long, and how it is told that it was too much."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Collection, Iterator
from typing import Any

from starlette.requests import Request
from starlette.types import Receive

from cnn_jax.system.errors import closest

# Seconds for which a body may pause.
_PAUSE_SECONDS = 10.0
# Bytes of a body for which there is room while large ones take all of theirs.
_SMALL = 1_000_000


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take.

    Attributes:
      body_bytes: Of a request.
      all_bytes: Of the bodies of all requests that are under way; small ones may have as much
        again as one large request.
      pixels: Width times height of an image, by its header.
      images: In a request.
      explained: Of these, if maps are asked for.
      seconds: From a request's headers to its answer.
    """

    body_bytes: int = 20_000_000
    all_bytes: int = 50_000_000
    pixels: int = 25_000_000
    images: int = 64
    explained: int = 8
    seconds: float = 30.0


class Refused(Exception):  # noqa: N818  (the server is in order)
    """A request that is answered with an error.

    Attributes:
      status: Of HTTP.
      reason: In one word or two, for programs.
      headers: Of the answer.
    """

    def __init__(self, status: int, reason: str, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class ClientLeft(Exception):  # noqa: N818
    """Nobody is there to be answered."""


def check_query(request: Request, known: Collection[str] = ()) -> None:
    """Checks the names of the parameters behind a path.

    Raises:
      Refused: One is not known, or is given more than once.
    """
    if not request.url.query:
        return
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in known:
            close = closest(name, known)
            hint = "this path takes none"
            if known:
                hint = f"did you mean {close}?" if close else f"there are {', '.join(known)}"
            raise Refused(400, "parameter", f"there is no parameter {name[:100]!r}; {hint}")
        if names.count(name) > 1:
            raise Refused(400, "parameter", f"{name}: is given more than once")


class Bodies:
    """Reads the bodies of requests, and holds all of them together to a size."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self.held = 0

    @contextlib.asynccontextmanager
    async def read(
        self, receive: Receive, content_length: str | None, deadline: float
    ) -> AsyncIterator[bytes]:
        """A request's body, which counts until it is let go.

        Args:
          receive: Of the request, of which nothing was read.
          content_length: The header.
          deadline: In seconds of `time.monotonic`.

        Raises:
          Refused: It is too large or too slow, or there is no room for it.
          ClientLeft: It will not come to its end.
        """
        announced = int(content_length) if content_length and content_length.isdecimal() else 0
        if announced > self._limits.body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        with self._counted() as count:
            try:
                async with asyncio.timeout(None) as pause:
                    _wait_for_more(pause, deadline)
                    async for part in _parts(receive):
                        count(len(part))
                        parts.append(part)
                        _wait_for_more(pause, deadline)
            except TimeoutError as error:
                raise Refused(
                    408,
                    "slow",
                    f"the body did not come in {self._limits.seconds:g} s, or paused for too long",
                    connection="close",
                ) from error
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            yield body

    @contextlib.contextmanager
    def _counted(self) -> Iterator[Any]:
        own = 0

        def count(size: int) -> None:
            nonlocal own
            if own + size > self._limits.body_bytes:
                raise self._too_large()
            room = self._limits.all_bytes
            if own + size <= _SMALL:
                room += self._limits.body_bytes
            if self.held + size > room:
                raise Refused(
                    429,
                    "busy",
                    "too much is being sent at once; try again in 1 s",
                    connection="close",
                    retry_after="1",
                )
            own += size
            self.held += size

        try:
            yield count
        finally:
            self.held -= own

    def _too_large(self) -> Refused:
        most = self._limits.body_bytes
        return Refused(413, "too_large", f"a body may have {most:,} bytes", connection="close")


def _wait_for_more(timeout: asyncio.Timeout, deadline: float) -> None:
    """Gives a body some seconds for its next part, but none beyond its deadline."""
    left = min(deadline - time.monotonic(), _PAUSE_SECONDS)
    timeout.reschedule(asyncio.get_running_loop().time() + left)


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        if part := message.get("body", b""):
            yield part
        if not message.get("more_body", False):
            return


@contextlib.asynccontextmanager
async def unless_client_leaves(receive: Receive) -> AsyncIterator[None]:
    """Cancels what is done within as soon as nobody waits for it.

    Args:
      receive: Of a request whose body was read.

    Raises:
      ClientLeft: Before it was done.
    """
    working = asyncio.current_task()
    assert working is not None
    cancelled_before, has_left = working.cancelling(), False

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        # At once, so that the block cannot come to its end in between.
        has_left = True
        working.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        yield
    except asyncio.CancelledError:
        # As in `asyncio.timeout`: if somebody else has cancelled as well, that counts.
        if has_left and working.uncancel() <= cancelled_before:
            raise ClientLeft from None
        raise
    finally:
        watching.cancel()
