"""The connections, with an application of three lines."""

import asyncio
import contextlib
import re
import socket
import threading
import time

import pytest

from cnn_jax.serve import http


async def application(scope, receive, send):
    """Answers with the length of the body."""
    if scope["type"] != "http":
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
    """Starts a server with other limits; its port."""
    with contextlib.ExitStack() as stack:

        def serve(**limits):
            for name, value in limits.items():
                monkeypatch.setattr(http, name, value)
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            server = http.make_server(application, 0, 1, lambda: None)
            server.capture_signals = contextlib.nullcontext  # In a thread there are none.
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
    """What comes until the server hangs up."""
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
def test_headers_that_do_not_come_to_an_end_are_not_waited_for(serve, sent):
    port = serve(_HEADER_SECONDS=0.5)
    start = time.monotonic()
    with connect(port) as connection:
        connection.sendall(sent)
        answer = rest_of(connection)
    assert 0.4 < time.monotonic() - start < 5
    assert answer.startswith(b"HTTP/1.1 400")


def test_a_byte_now_and_then_buys_no_time(serve):
    port = serve(_HEADER_SECONDS=0.5)
    start = time.monotonic()
    with connect(port) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\n")
        while time.monotonic() - start < 5:
            connection.sendall(b"X: a\r\n")
            time.sleep(0.1)
    assert time.monotonic() - start < 3


def test_the_second_request_of_a_connection_has_the_same_time(serve):
    port = serve(_HEADER_SECONDS=0.5)
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        # Between two requests it may be quiet for longer.
        time.sleep(0.8)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n")
        start = time.monotonic()
        assert rest_of(connection).startswith((b"HTTP/1.1 400", b"0\r\n", b"7\r\n"))
        assert 0.4 < time.monotonic() - start < 5


def test_long_headers_are_refused_and_a_long_body_is_not(serve):
    port = serve(_MOST_HEADER_BYTES=1_000)
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 2_000)
        assert rest_of(connection).startswith(b"HTTP/1.1 400")
    with connect(port) as connection:
        head = b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(head + b"a" * 100_000)
        answer = rest_of(connection)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"100000 bytes" in answer


def test_a_connection_that_is_quiet_is_closed(serve):
    port = serve(_KEEP_ALIVE_SECONDS=0.3)
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        start = time.monotonic()
        assert re.match(rb"HTTP/1.1 200", rest_of(connection))
        assert 0.2 < time.monotonic() - start < 5


def test_no_more_connections_than_there_is_room_for(serve):
    port = serve(_CONNECTIONS=3)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(port)) for _ in range(3)]
        time.sleep(0.3)
        with connect(port) as one_more:
            assert rest_of(one_more) == b""
        held[0].close()
        time.sleep(0.3)
        with connect(port) as another:
            another.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert rest_of(another).startswith(b"HTTP/1.1 200")
