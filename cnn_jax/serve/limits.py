"""Limits on the size, time and parameters of requests, and the related exceptions."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Collection, Iterator

import pydantic
from starlette.requests import Request
from starlette.types import Receive

from cnn_jax.serve.fairness import Quota
from cnn_jax.system.errors import closest

# Maximum seconds between two received parts of a request's body.
_PAUSE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one request and of all requests in flight."""

    body_bytes: int = 20_000_000  # The size of a request's body.
    all_bytes: int = 100_000_000  # The size of all bodies in flight together; see `Quota`.
    pixels: int = 25_000_000  # Width times height of an image, according to its header.
    all_pixels: int = 500_000_000  # The pixels of all images in flight; see `Quota`.
    images: int = 64  # The images in a request.
    explained: int = 8  # The images in a request for explanation maps.
    seconds: float = 30.0  # From the headers of a request to its answer.

    @property
    def request_pixels(self) -> int:
        """Maximum number of pixels of a request's images, because a client may use only half."""
        return self.all_pixels // 2

    def check_count(self, images: int, explain: bool = False) -> None:
        """Checks the number of images in a request, which may ask for explanation maps.

        Raises:
          Refused: There are too many images, or none.
        """
        if not images:
            raise Refused(400, "no_image", "there is no image in the request")
        limit = self.explained if explain else self.images
        if images > limit:
            kind = "images with maps" if explain else "images"
            message = f"a request may have at most {limit} {kind}"
            raise Refused(413, "too_many", message)


class Refused(Exception):  # noqa: N818 (the client's error, not the server's)
    """Raised if the server refuses a request; the client receives this error.

    Attributes:
      status: The HTTP status.
      reason: An identifier of the error for programs, such as "too_large".
      headers: Headers of the answer.
    """

    def __init__(self, status: int, reason: str, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class ClientDisconnected(Exception):  # noqa: N818
    """Raised if the client closed the connection before the answer was sent."""


def check_query(request: Request, known: Collection[str] = ()) -> None:
    """Checks that a path accepts all query parameters of a request.

    Raises:
      Refused: A parameter is not among the `known` ones, or is given more than once.
    """
    if not request.url.query:
        return
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in known:
            close = closest(name, known)
            hint = "this path takes no parameters"
            if known:
                hint = f"did you mean {close}?" if close else f"use {', '.join(known)}"
            raise Refused(400, "parameter", f"there is no parameter {name[:100]!r}; {hint}")
        if names.count(name) > 1:
            raise Refused(400, "parameter", f"the parameter {name} is given more than once")


def first_problem(error: pydantic.ValidationError) -> str:
    """Returns the name and the problem of the first invalid field of a request."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


class Bodies:
    """Reads the bodies of requests, and limits the total size of all bodies in memory."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._quota = Quota(limits.all_bytes)

    @property
    def num_bytes(self) -> int:
        """The total size of the bodies in memory."""
        return self._quota.used

    @contextlib.asynccontextmanager
    async def read(
        self, receive: Receive, content_length: str | None, deadline: float, client: str
    ) -> AsyncIterator[bytes]:
        """Reads a request's body, and counts its size towards the total until the context ends.

        Args:
          receive: The ASGI channel of a request whose body has not been read.
          content_length: The value of the Content-Length header; None without this header.
          deadline: In seconds of `time.monotonic`.
          client: The client that sends the body.

        Raises:
          Refused: The body is too large or too slow, or the total size of the bodies is too large.
          ClientDisconnected: The client disconnected before the end of the body.
        """
        announced = int(content_length) if content_length and content_length.isdecimal() else 0
        self._check_size(announced)
        parts: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(None) as pause:
                    _extend(pause, deadline)
                    async for part in _parts(receive):
                        self._check_size(size + len(part))
                        self._add(len(part), client)
                        size += len(part)
                        parts.append(part)
                        _extend(pause, deadline)
            except TimeoutError as error:
                message = (
                    f"the body did not arrive within {self._limits.seconds:g} s, or paused for "
                    f"more than {_PAUSE_SECONDS:g} s"
                )
                raise Refused(408, "slow", message) from error
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            yield body
        finally:
            self._quota.add(client, -size)

    @contextlib.contextmanager
    def hold(self, size: int, client: str) -> Iterator[None]:
        """Counts a body that is kept after its request towards the total until the context ends.

        Raises:
          Refused: The total size of the bodies would be too large.
        """
        self._add(size, client)
        try:
            yield
        finally:
            self._quota.add(client, -size)

    def _add(self, size: int, client: str) -> None:
        if not self._quota.fits(client, size):
            message = "the requests in flight are too large; try again in 1 s"
            raise Refused(429, "busy", message, retry_after="1")
        self._quota.add(client, size)

    def _check_size(self, size: int) -> None:
        if size > (limit := self._limits.body_bytes):
            raise Refused(413, "too_large", f"a body may have at most {limit:,} bytes")


def _extend(timeout: asyncio.Timeout, deadline: float) -> None:
    """Resets a timeout to `_PAUSE_SECONDS` from now, but not beyond the request's deadline."""
    left = min(deadline - time.monotonic(), _PAUSE_SECONDS)
    timeout.reschedule(asyncio.get_running_loop().time() + left)


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        if part := message.get("body", b""):
            yield part
        if not message.get("more_body", False):
            return


@contextlib.asynccontextmanager
async def cancel_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancels the code inside the context when the client disconnects.

    Args:
      receive: The ASGI channel of a request whose body has been read.

    Raises:
      ClientDisconnected: The client disconnected before the end of the context.
    """
    task = asyncio.current_task()
    assert task is not None
    cancelled_before, is_disconnected = task.cancelling(), False

    async def watch() -> None:
        nonlocal is_disconnected
        while (await receive())["type"] != "http.disconnect":
            pass
        # There must be no await between the next two lines, because the context could then end
        # after the flag is set and before the task is cancelled.
        is_disconnected = True
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    except asyncio.CancelledError:
        # If other code has also cancelled the task, raise CancelledError as `asyncio.timeout` does.
        if is_disconnected and task.uncancel() <= cancelled_before:
            raise ClientDisconnected from None
        raise
    finally:
        watcher.cancel()
