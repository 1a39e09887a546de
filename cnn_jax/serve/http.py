"""HTTP connections: uvicorn's protocol with additional limits.

This module changes the following behaviour of uvicorn:
- It waits forever for the end of a request's headers, and for a client that does not read.
- It stores headers and trailers of any size, and all requests that arrive in one packet.
- When it refuses a request, it closes the connection even if the client is still sending. Then the
  client cannot read the error.
- It skips the body of a request with an Upgrade header.
- After a shutdown by a signal, it raises the same signal again.
"""

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cnn_jax.serve.responses import new_request_id

# Maximum size of the headers of a request, in bytes.
_MAX_HEADER_BYTES = 32_768
# Maximum seconds until a client has sent all headers of a request.
_HEADER_SECONDS = 10.0
# Maximum seconds between two requests on the same connection.
_KEEP_ALIVE_SECONDS = 75
# Maximum seconds for which bytes may wait in the write buffer because the client does not read.
_READ_SECONDS = 30.0
# If the server refuses a request while the body is still arriving, the server continues to read the
# body, for at most this number of seconds and bytes. If the server closed the connection at once,
# the client could not read the error.
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 32_000_000
# Maximum number of connections. Beyond this number, the server aborts a connection that is idle, or
# whose client has paused for _STALLED_SECONDS seconds in the middle of a request.
_MAX_CONNECTIONS, _STALLED_SECONDS = 1_000, 1.0
# If this number of requests waits on a connection until an earlier one is answered, no further
# requests are parsed. Without the limit, one packet of 256 kB could contain 14,000 requests, which
# need 30 MB. The parser gets pieces of this number of bytes, because it cannot stop within a piece.
_MAX_PIPELINED, _PIECE_BYTES = 100, 2**14


class _Parser:
    """A wrapper of httptools's parser that ignores Upgrade headers.

    The parser of httptools skips the body of a request with an Upgrade header and everything after
    it. Some Java clients send such a header with their first request. A server may ignore it (RFC
    9110, section 7.8).
    """

    def __init__(self, protocol: "_Protocol"):
        self._protocol = protocol
        self._restart()

    def _restart(self) -> None:
        self._parser = httptools.HttpRequestParser(self._protocol)
        # The setting that uvicorn makes, for data after a request with "Connection: close".
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def feed_data(self, data: bytes) -> None:
        rest = memoryview(data)
        while True:
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("CONNECT is not supported") from upgrade
                # Parse the request again, without the header.
                head = self._protocol.head_without_upgrade()
                self._restart()
                self._parser.feed_data(head)
                rest = rest[upgrade.args[0] :]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


class _Protocol(HttpToolsProtocol):
    """An HTTP connection that limits the size of headers and closes if the client is too slow."""

    # The time at which the last byte was received.
    last_received = 0.0
    _timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    # Whether the parser is inside a request, and whether the parser is inside the request's
    # headers.
    _is_in_message = False
    _is_in_headers = False
    # The number of bytes since a head, a part of a body or a request was last complete.
    _pending_bytes = 0
    _has_progress = False
    # Received bytes that are parsed when fewer requests wait.
    _unparsed = b""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)  # type: ignore[assignment]

    def head_without_upgrade(self) -> bytes:
        """Returns the request line and the headers of the request, without an Upgrade header."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b\r\n" % pair for pair in self.headers if pair[0] != b"upgrade"]
        return b"".join([*lines, b"\r\n"])

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Call `pause_writing` as soon as one byte waits to be sent. By default, it is called when
        # 64 kB wait; a smaller answer that the client does not read would then keep a closing
        # connection open forever.
        transport.set_write_buffer_limits(0)
        self.last_received = time.monotonic()
        self._start_timer()
        if len(self.connections) > _MAX_CONNECTIONS:
            self._abort_one()

    @property
    def is_idle(self) -> bool:
        """Returns whether the connection is between two requests."""
        return not self._is_in_message and (self.cycle is None or self.cycle.response_complete)

    @property
    def is_stalled(self) -> bool:
        """Returns whether the client has paused in the middle of a request."""
        pause = time.monotonic() - self.last_received
        return self._is_in_message and not self._unparsed and pause > _STALLED_SECONDS

    def _abort_one(self) -> None:
        """Aborts the connection that has been idle or stalled longest, or else this connection."""
        others = [one for one in self.connections if isinstance(one, _Protocol) and one is not self]
        chosen = [one for one in others if one.is_idle] or [one for one in others if one.is_stalled]
        oldest = min(chosen, key=lambda one: one.last_received, default=self)
        self.connections.discard(oldest)
        oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.last_received = time.monotonic()
        if self._timer is None and self.is_idle:
            # Start the timer even if the received bytes are not the start of a request, so that a
            # client cannot keep the connection open with such bytes.
            self._start_timer()
        self._unparsed += data
        self._parse()

    def _parse(self) -> None:
        """Parses the received bytes until too many requests wait."""
        if self._is_in_headers and self._timer is None:
            self._start_timer()
        while self._unparsed and len(self.pipeline) < _MAX_PIPELINED:
            if self.transport.is_closing():
                self._unparsed = b""
                return
            piece = self._unparsed[:_PIECE_BYTES]
            self._unparsed = self._unparsed[_PIECE_BYTES:]
            self._has_progress = False
            super().data_received(piece)
            self._pending_bytes = 0 if self._has_progress else self._pending_bytes + len(piece)
            if self._pending_bytes > _MAX_HEADER_BYTES:
                self._refuse()
        if self._unparsed:
            # The server, and not the client, delays the rest of the request.
            self._stop_timer()
            self.flow.pause_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._unparsed:
            self._parse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_message = self._is_in_headers = True
        if self._timer is None:
            self._start_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_headers:  # Otherwise it is a trailer, which no protocol of this server uses.
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # The parser parses the request again.
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        # `_parse` has not checked the size if all headers arrived in one piece.
        if size > _MAX_HEADER_BYTES:
            raise httptools.HttpParserError("the headers are too long")
        self._is_in_headers = False
        self._has_progress = True
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._has_progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._is_in_message = False
        self._has_progress = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_read_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(_READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_read_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # An error message would damage the response that is being sent.
            return
        request_id = new_request_id()
        answer = json.dumps({"error": msg, "reason": "http", "request_id": request_id})
        body = f"{answer}\n".encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"x-request-id: {request_id}\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(_HEADER_SECONDS, self._refuse)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()

    def _refuse(self) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.send_400_response("the headers are too slow or too long")


class _Lingering:
    """Middleware that closes the connection after a request whose body was not read.

    It first continues to read the body for a while. If the server closed the connection with unread
    bytes, the connection would be reset, and the client would lose the response.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        names = {name for name, _ in scope["headers"]}
        is_read = not names & {b"content-length", b"transfer-encoding"}
        is_open = False

        async def receive_and_watch() -> Message:
            nonlocal is_read
            message = await receive()
            is_read |= message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def send_without_end(message: Message) -> None:
            nonlocal is_open
            if message["type"] == "http.response.start" and not is_read:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                is_open = not is_read
                message = {**message, "more_body": is_open}
            await send(message)

        await self._app(scope, receive_and_watch, send_without_end)
        if not is_open:
            return
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while not is_read and size <= _LINGER_BYTES:
                    size += len((await receive_and_watch()).get("body", b""))
        await send({"type": "http.response.body"})


class Server(uvicorn.Server):
    """A server that, after a signal, answers the requests in flight and then exits normally.

    After the first signal the server reports that it is not ready, so that a load balancer stops
    sending requests. It still accepts requests for `drain` seconds. A second signal skips the
    rest of this time. A third signal ends the server at once.
    """

    def __init__(self, config: uvicorn.Config, drain: float, on_shutdown: Callable[[], None]):
        super().__init__(config)
        self._drain = drain
        self._on_shutdown = on_shutdown
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_draining = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own method records the signal, and raises it again after the shutdown.
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._shut_down)

    def _shut_down(self) -> None:
        if self._is_draining:
            # The second signal sets `should_exit`, and the third signal forces the exit.
            self.force_exit = self.should_exit
            self.should_exit = True
            return
        assert self._loop is not None
        self._is_draining = True
        self._on_shutdown()
        self._loop.call_later(self._drain, self._end)

    def _end(self) -> None:
        self.should_exit = True


def make_server(
    app: ASGIApp,
    drain: float,
    grace: float,
    on_shutdown: Callable[[], None],
    trusted_proxies: Sequence[str] = (),
) -> Server:
    """Creates the HTTP server of an application.

    Args:
      app: The application.
      drain: Seconds from the first signal until the server accepts no further connections.
      grace: Maximum seconds that requests in flight may take after the time `drain`.
      on_shutdown: Called at the first signal.
      trusted_proxies: The addresses of proxies, in addition to this machine, whose header
        X-Forwarded-For gives the address of a client.
    """
    config = uvicorn.Config(
        _Lingering(app),
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=["127.0.0.1", "::1", *trusted_proxies],
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(grace) + 1,
    )
    return Server(config, drain, on_shutdown)


@contextlib.contextmanager
def serving_in_thread(app: ASGIApp, listener: socket.socket) -> Iterator[None]:
    """Serves an application on a new thread with a new event loop, until the context ends."""
    server = make_server(app, drain=0.0, grace=0.0, on_shutdown=lambda: None)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve([listener])), name="health", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
