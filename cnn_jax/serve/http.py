"""The connections: uvicorn's, with the limits that it does not have.

uvicorn waits for ever for a request that does not come to the end of its headers and for a
client that does not read, keeps whatever there is of headers and trailers, hangs up on those
who still send what is refused, so that they never read why, and raises the signal that has
ended it once more.
"""

import asyncio
import contextlib
import json
import math
import re
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Bytes of a request's line and headers, and of what frames its body beyond that body's size.
_MOST_HEADER_BYTES = 32_768
# Seconds in which the headers must have come.
_HEADER_SECONDS = 10.0
# Seconds for which a connection may wait for its next request.
_KEEP_ALIVE_SECONDS = 75
# Seconds for which a client may read nothing of an answer that is larger than what is buffered.
_READ_SECONDS = 30.0
# Seconds and bytes for which one who still sends is listened to after a refusal.
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 32_000_000
_CONNECTIONS = 1_000
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A wish for another protocol, which may be ignored (RFC 9110, section 7.8). The parser would
# take it for granted and leave out the body. Some clients of Java send it with every first
# request. (Headers that come in pieces just there are answered without their body.)
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_NO_UPGRADE = b"\r\nx-upgrade:"
_END = b"\r\n\r\n"


class _Transport:
    """A transport whose closing is the protocol's to do."""

    def __init__(self, transport: asyncio.Transport, protocol: "_Protocol"):
        self._transport = transport
        self._protocol = protocol

    def close(self) -> None:
        self._protocol.hang_up()

    def is_closing(self) -> bool:
        return self._protocol.is_hanging_up or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Protocol(HttpToolsProtocol):
    """A connection that must say what it wants, soon and briefly, and read the answer."""

    is_hanging_up = False
    # Of the last byte that came.
    last_heard = 0.0
    _timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _end_timers: tuple[asyncio.TimerHandle, ...] = ()
    # Where in a request the connection is.
    _is_in_message = False
    _is_in_headers = False
    # Of this request: bytes of the headers, of the body, and of what frames it.
    _header_bytes = 0
    _body_bytes = 0
    _framing_bytes = 0
    # Of what has just come.
    _body_bytes_now = 0
    _is_too_much = False
    _bytes_after_end = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw = transport
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self.last_heard = time.monotonic()
        self._start_timer()
        if len(self.connections) > _CONNECTIONS:
            self._make_room()

    @property
    def is_idle(self) -> bool:
        """Whether it is between two requests."""
        return not self._is_in_message and (self.cycle is None or self.cycle.response_complete)

    def _make_room(self) -> None:
        """Ends the connection that has been idle for the longest time; this one, if none is."""
        others = [one for one in self.connections if one is not self]
        idle = [one for one in others if isinstance(one, _Protocol) and one.is_idle]
        ended = min(idle, key=lambda one: one.last_heard, default=self)
        self.connections.discard(ended)
        ended._raw.abort()

    def data_received(self, data: bytes) -> None:
        self.last_heard = time.monotonic()
        if self.is_hanging_up:
            self._bytes_after_end += len(data)
            if self._bytes_after_end > _LINGER_BYTES:
                self._raw.abort()
            return
        was_in_headers, was_in_message = self._is_in_headers, self._is_in_message
        if self._timer is None and self.is_idle:
            self._start_timer()  # Even if it is nothing with which a request begins.
        if was_in_headers or not was_in_message:
            head, end, rest = data.partition(_END)
            data = _UPGRADE.sub(_NO_UPGRADE, head) + end + rest
        self._body_bytes_now = 0
        super().data_received(data)
        other = len(data) - self._body_bytes_now
        if self._is_in_headers:
            # What belongs to requests before this one is not counted.
            before = -1 if was_in_headers else data.rfind(_END)
            self._count_header(min(other, len(data) if before < 0 else len(data) - before))
        elif was_in_message and not was_in_headers and self._is_in_message:
            self._framing_bytes += other
            self._is_too_much |= self._framing_bytes > _MOST_HEADER_BYTES + self._body_bytes
        if self._is_too_much:
            self._give_up()

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        self._is_too_much |= self._header_bytes > _MOST_HEADER_BYTES

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_message = self._is_in_headers = True
        self._header_bytes = self._body_bytes = self._framing_bytes = 0
        if self._timer is None:
            self._start_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_headers:
            super().on_header(name, value)
            self._is_too_much |= len(name) + len(value) > _MOST_HEADER_BYTES
        else:
            self._is_too_much = True  # A trailer, for which nobody asks.

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._body_bytes_now += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_message = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_read_timer()
        for timer in self._end_timers:
            timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(_READ_SECONDS, self._raw.abort)

    def resume_writing(self) -> None:
        self._stop_read_timer()
        super().resume_writing()

    def hang_up(self) -> None:
        """Closes: at once, or after one who still sends could read why."""
        if self.transport.is_closing():
            return
        self.is_hanging_up = True
        self._stop_timer()
        end = self.loop.call_later(_READ_SECONDS, self._raw.abort)
        if not self._is_in_message:
            self._end_timers = (end,)
            self._raw.close()
            return
        # Closing with bytes unread would reset the connection, and the answer with it.
        self._end_timers = (end, self.loop.call_later(_LINGER_SECONDS, self._raw.close))
        if self._raw.can_write_eof():
            self._raw.write_eof()
        self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._raw.abort()  # There is another answer under way.
            return
        request_id = uuid.uuid4().hex
        body = json.dumps({"error": msg, "reason": "http", "request_id": request_id}).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"x-request-id: {request_id}\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _give_up(self) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.send_400_response("the headers are too slow or too long")


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
