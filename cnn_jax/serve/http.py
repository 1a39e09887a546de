"""The connections: uvicorn's, with the limits that it does not have.

uvicorn waits for ever for a request that does not come to the end of its headers, keeps
whatever it has of them, and raises the signal that has ended it once more.
"""

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Bytes of a request's line and headers.
_MOST_HEADER_BYTES = 32_768
# Seconds in which they must have come.
_HEADER_SECONDS = 10.0
# Seconds for which a connection may wait for its next request.
_KEEP_ALIVE_SECONDS = 75
_CONNECTIONS = 1_000
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Protocol(HttpToolsProtocol):
    """A connection that must say what it wants, soon and briefly."""

    _timer: asyncio.TimerHandle | None = None
    _in_headers = False
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            self.connections.discard(self)
            transport.abort()
            return
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_headers()  # Of the next request on this connection.
        if self._timer is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        # What has come behind the headers' end does not count.
        if self._timer is not None and self._header_bytes > _MOST_HEADER_BYTES:
            self._give_up()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        self._timer = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.send_400_response("The headers are too slow or too long.")


class Server(uvicorn.Server):
    """A server that ends at the first signal when its requests are done, without another.

    For some seconds before it may say that it is not ready, so that whoever sends requests
    to it takes notice; a second signal ends that.
    """

    def __init__(self, config: uvicorn.Config, drain: float, on_leaving: Callable[[], None]):
        super().__init__(config)
        self._drain = drain
        self._on_leaving = on_leaving
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_leaving = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        if self._is_leaving:
            self.force_exit = self.should_exit  # The third one waits for nothing.
            self.should_exit = True
            return
        assert self._loop is not None
        self._is_leaving = True
        self._on_leaving()
        self._loop.call_later(self._drain, self._end)

    def _end(self) -> None:
        self.should_exit = True


def make_server(app: ASGIApp, drain: float, grace: float, on_leaving: Callable[[], None]) -> Server:
    """A server of an application, for a socket that listens.

    Args:
      app: The application.
      drain: Seconds between the first signal and the end of listening.
      grace: Seconds in which requests may come to their end after that.
      on_leaving: Called at the first signal.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(grace) + 1,
    )
    return Server(config, drain, on_leaving)
