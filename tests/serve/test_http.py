"""Tests of the server's HTTP connections, with a minimal application."""

import asyncio
import contextlib
import re
import socket
import threading
import time

import pytest

from cnn_jax.serve import http


async def application(scope, receive, send):
    """An ASGI application that sends an error, a large body, or the length of the request's body.

    The path of the request selects the response.
    """
    if scope["type"] != "http":
        return
    if scope["path"] == "/refused":
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": b"no"})
        return
    if scope["path"] == "/large":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(20_000_000)})
        return
    if scope["path"] == "/small":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(40_000)})
        return
    length = 0
    while (message := await receive())["type"] == "http.request":
        length += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d bytes" % length})


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a server with changed limits, and returns the server's port."""
    with contextlib.ExitStack() as stack:

        def serve(send_buffer=None, **limits):
            for name, value in limits.items():
                monkeypatch.setattr(http, name, value)
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            if send_buffer:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
            server = http.make_server(application, 0, 1, lambda: None)
            thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
            thread.start()

            def end():
                server.should_exit = True
                thread.join()

            stack.callback(end)
            while not server.started:
                time.sleep(0.01)
            return listener.getsockname()[1]

        yield serve


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def rest_of(connection):
    """Returns all bytes that the server sends before it closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65_536):
            found += piece
    return found


def test_requests_are_answered(serve):
    with connect(serve()) as connection:
        for body in (b"", b"12345"):
            head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
            answer = connection.recv(65_536)
            while b"bytes" not in answer:
                answer += connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b"%d bytes" % len(body) in answer


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: a\r\n"])
def test_unfinished_headers_time_out(serve, sent):
    port = serve(_HEADER_SECONDS=0.5)
    start = time.monotonic()
    with connect(port) as connection:
        connection.sendall(sent)
        answer = rest_of(connection)
    assert 0.4 < time.monotonic() - start < 5
    assert answer.startswith(b"HTTP/1.1 400")


def test_slow_bytes_do_not_extend_the_timeout(serve):
    port = serve(_HEADER_SECONDS=0.5)
    start = time.monotonic()
    with connect(port) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\n")
        while time.monotonic() - start < 5:
            connection.sendall(b"X: a\r\n")
            time.sleep(0.1)
    assert time.monotonic() - start < 3


def test_each_request_of_a_connection_has_the_timeout(serve):
    port = serve(_HEADER_SECONDS=0.5)
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        # The timeout for headers does not apply between two requests.
        time.sleep(0.8)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n")
        start = time.monotonic()
        assert rest_of(connection).startswith((b"HTTP/1.1 400", b"0\r\n", b"7\r\n"))
        assert 0.4 < time.monotonic() - start < 5


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_long_headers_are_refused_and_a_long_body_is_not(serve, end):
    port = serve(_MAX_HEADER_BYTES=1_000)
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 2_000 + end)
        assert rest_of(connection).startswith(b"HTTP/1.1 400")
    with connect(port) as connection:
        head = b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(head + b"a" * 100_000)
        answer = rest_of(connection)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"100000 bytes" in answer


def test_a_silent_connection_is_closed(serve):
    port = serve(_KEEP_ALIVE_SECONDS=0.3)
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        start = time.monotonic()
        assert re.match(rb"HTTP/1.1 200", rest_of(connection))
        assert 0.2 < time.monotonic() - start < 5


def test_the_number_of_connections_is_limited(serve):
    port = serve(_MAX_CONNECTIONS=3)
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(port)) for _ in range(2)]
        for one in busy:
            one.sendall(head)
        idle = stack.enter_context(connect(port))
        time.sleep(0.3)
        # The server closes the idle connection to make room for this connection.
        with connect(port) as another:
            another.sendall(head)
            assert rest_of(idle) == b""
            time.sleep(0.3)
            with connect(port) as one_more:
                assert rest_of(one_more) == b""
            for one in (*busy, another):
                one.sendall(b"abc")
                assert rest_of(one).startswith(b"HTTP/1.1 200")


def test_stalled_requests_make_room_for_others(serve):
    port = serve(_MAX_CONNECTIONS=3, _STALLED_SECONDS=0.3)
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(connect(port)) for _ in range(3)]
        for one in stalled:
            one.sendall(head)
            time.sleep(0.2)
        with connect(port) as another:
            another.sendall(head)
            assert rest_of(stalled[0]) == b""  # This client has paused longest.
            another.sendall(b"abc")
            assert rest_of(another).startswith(b"HTTP/1.1 200")
        for one in stalled[1:]:
            one.sendall(b"abc")
            assert rest_of(one).startswith(b"HTTP/1.1 200")


def send_until_closed(connection, piece, most):
    """Sends a piece repeatedly until the server closes the connection; returns the bytes sent."""
    sent = 0
    with contextlib.suppress(ConnectionError, TimeoutError):
        while sent < most:
            connection.sendall(piece)
            sent += len(piece)
    return sent


def test_trailers_are_refused(serve):
    with connect(serve(_LINGER_BYTES=1_000_000)) as connection:
        head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
        connection.sendall(head)
        line = b"X-A: " + b"a" * 1_000 + b"\r\n"
        assert send_until_closed(connection, line * 100, 20_000_000) < 15_000_000
    with connect(serve(_LINGER_BYTES=1_000_000)) as connection:
        connection.sendall(head)
        assert send_until_closed(connection, b"a" * 100_000, 20_000_000) < 15_000_000


def test_headers_after_a_request_in_flight_are_limited(serve):
    with connect(serve(_LINGER_BYTES=1_000_000)) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nx")
        connection.sendall(b"xGET / HTTP/1.1\r\n")
        line = b"X-A: " + b"a" * 1_000 + b"\r\n"
        assert send_until_closed(connection, line * 100, 20_000_000) < 15_000_000


@pytest.mark.parametrize("size", [10, 5_000_000])
def test_a_sending_client_can_read_its_refusal(serve, size):
    with connect(serve(_HEADER_SECONDS=0.5)) as connection:
        head = b"POST /refused HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size
        connection.sendall(head)
        time.sleep(0.2)
        connection.sendall(b"x" * (size // 2))
        time.sleep(0.2)
        answer = rest_of(connection)
        assert answer.startswith(b"HTTP/1.1 413")
        assert answer.endswith(b"\r\n\r\nno")
        assert answer.count(b"HTTP/1.1") == 1


def test_a_refused_client_cannot_send_forever(serve):
    with connect(serve(_LINGER_SECONDS=0.5)) as connection:
        connection.sendall(
            b"POST /refused HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\n"
        )
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 5:
                connection.sendall(b"x" * 1000)
                time.sleep(0.05)
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("path", [b"/large", b"/small"])
def test_a_client_that_does_not_read_is_aborted(serve, monkeypatch, path):
    is_lost = threading.Event()
    lose = http._Protocol.connection_lost
    monkeypatch.setattr(
        http._Protocol, "connection_lost", lambda *args: (is_lost.set(), lose(*args))
    )
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
        connection.connect(("127.0.0.1", serve(send_buffer=4_096, _READ_SECONDS=0.5)))
        connection.sendall(b"GET %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % path)
        assert is_lost.wait(5)


_UPGRADE = (
    b"POST / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 3\r\n"
    b"Host: a\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\nUpgrade: h2c\r\n\r\nabc"
)
_PLAIN = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n12345"
_LAST = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n\r\nxy"


@pytest.mark.parametrize("step", [1, 7, 1_000])
def test_upgrade_headers_are_ignored(serve, step):
    """Requests with and without an Upgrade header follow each other, in packets of any size."""
    sent = _UPGRADE + _PLAIN + _UPGRADE + _UPGRADE + _LAST
    with connect(serve()) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(sent), step):
            connection.sendall(sent[start : start + step])
            time.sleep(0.001)
        answer = rest_of(connection)
    assert re.findall(rb"(\d) bytes", answer) == [b"3", b"5", b"3", b"3", b"2"]
    assert answer.count(b"HTTP/1.1 200") == 5


def test_many_upgrade_headers_are_ignored(serve):
    """All requests are answered, although they arrive in one packet."""
    one = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with connect(serve()) as connection:
        connection.sendall(one * 3_000 + _LAST)
        answer = rest_of(connection)
    assert answer.count(b"HTTP/1.1 200") == 3_001


@pytest.mark.parametrize("body", [0, 100_000])
def test_the_number_of_waiting_requests_is_limited(serve, monkeypatch, body):
    """All requests are answered, also if the head of one is divided between pieces."""
    waiting = []
    append = http._Protocol.on_headers_complete

    def on_headers_complete(self):
        append(self)
        waiting.append(len(self.pipeline))

    monkeypatch.setattr(http._Protocol, "on_headers_complete", on_headers_complete)
    one = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % body + b"a" * body
    count = 1_000 if not body else 50
    port = serve(_MAX_PIPELINED=10, _PIECE_BYTES=1_000, _HEADER_SECONDS=1)
    with connect(port) as connection:
        sender = threading.Thread(target=connection.sendall, args=(one * count + _LAST,))
        sender.start()
        assert rest_of(connection).count(b"HTTP/1.1 200") == count + 1
        sender.join()
    assert max(waiting) < 10 + 1_000 / len(one)


def test_connect_is_refused(serve):
    with connect(serve()) as connection:
        connection.sendall(b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n")
        assert rest_of(connection).startswith(b"HTTP/1.1 400")


def test_pipelined_requests_are_not_long_headers(serve):
    port = serve(_MAX_HEADER_BYTES=1_000)
    one = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n" + b"a" * 900
    last = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with connect(port) as connection:
        connection.sendall(one * 20 + last[:30])
        time.sleep(0.2)
        connection.sendall(last[30:])
        assert rest_of(connection).count(b"HTTP/1.1 200") == 21
