"""Creates the parts of the server, and runs the server until a signal arrives."""

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import FastAPI

from cnn_jax.data.scan import num_cores
from cnn_jax.serve import http
from cnn_jax.serve.app import is_address, make_app, make_health_app
from cnn_jax.serve.engine import Engine
from cnn_jax.serve.limits import Limits
from cnn_jax.serve.loader import BundleSource, Loader, Source
from cnn_jax.serve.metrics import ServerMetrics
from cnn_jax.serve.service import Models, Service
from cnn_jax.serve.tokens import Tokens
from cnn_jax.system.errors import BundleError, ConfigError

if TYPE_CHECKING:  # Importing pyarrow would delay the start of a server without a request log.
    from cnn_jax.serve.request_log import RequestLog

logger = logging.getLogger(__name__)


def run(
    source: Source,
    flags: argparse.Namespace,
    limits: Limits,
    tokens: Tokens | None = None,
    request_log: "RequestLog | None" = None,
) -> None:
    """Runs the server until SIGTERM or Ctrl-C, then answers the requests in flight and returns.

    Args:
      source: The source of the versions.
      flags: The other flags of the command; see `cnn_jax serve --help`.
      limits: The limits of requests.
      tokens: The access tokens; with None, every client may predict.
      request_log: The log that records answers; with None, no answers are recorded.

    Raises:
      ConfigError: The server cannot listen on the address.
      BundleError: The bundle of a `BundleSource` cannot be served.
    """
    metrics = ServerMetrics()
    max_wait = flags.max_wait_ms / 1000
    engine = Engine(flags.queue, max_wait, num_cores(), limits.all_pixels, metrics.count_batch)
    service = Service(Models(), engine, limits, metrics, request_log)
    listener = _listen(flags.host, flags.port)
    host, port = listener.getsockname()[:2]
    health_listener = None
    if flags.health_port is not None:
        health_listener = _listen(flags.host, flags.health_port, "--health_port")

    is_local = _is_local(flags.host)

    def hosts_without(tokens: Tokens | None) -> list[str]:
        """Returns the host names that a port with these tokens accepts; [] accepts all names."""
        names = flags.allowed_hosts or ()
        is_checked = names or (is_local and tokens is None)
        return [*names, "localhost", flags.host] if is_checked else []

    sizes = [1 << power for power in range(flags.max_batch.bit_length())]
    loader = Loader(service, source, sizes, flags.poll, flags.load_timeout)
    hangs = False

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        stack = contextlib.ExitStack()
        if health_listener is not None:
            stack.enter_context(health_listener)
            health_app = make_health_app(service, hosts_without(None))
            stack.enter_context(http.serving_in_thread(health_app, health_listener))
            health = f"http://{_url_host(host)}:{health_listener.getsockname()[1]}"
            logger.info("health checks on %s/healthz", health)

        async def announce() -> None:
            while not (loader.is_settled and service.models.is_ready()):
                if isinstance(source, BundleSource) and loader.problem:
                    server.should_exit = True  # A retry with the same bundle would fail too.
                    return
                await asyncio.sleep(0.02)
            print(f"ready on http://{_url_host(host)}:{port}/", flush=True)

        tasks = [asyncio.create_task(work) for work in (loader.follow(), announce())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            nonlocal hangs
            if hangs := not await asyncio.to_thread(engine.close):
                logger.error("the device does not answer")
            if request_log is not None and not await asyncio.to_thread(request_log.close):
                hangs = True
            await asyncio.to_thread(stack.close)

    app = make_app(service, tokens, lifespan, hosts_without(tokens), flags.cors_origins or ())
    server = http.make_server(
        app,
        flags.drain,
        limits.seconds,
        service.begin_shutdown,
        flags.trusted_proxies or (),
    )
    if not is_local and tokens is None:
        logger.warning("without --tokens every client that reaches %s can predict", flags.host)
    with listener:
        server.run([listener])
    if hangs or loader.is_busy:
        # End the process at once, because a normal exit of Python would crash, or would wait for a
        # thread that hangs in a network call or in a compiler.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1 if hangs else 0)
    if isinstance(source, BundleSource) and loader.problem:
        raise BundleError(loader.problem)


def _listen(host: str, port: int, flag: str = "--host and --port") -> socket.socket:
    """Opens the listening socket on an address that a flag sets.

    The server calls this before any slow step, so that a port in use is reported at once.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        address = f"{_url_host(host)}:{port}"
        raise ConfigError(f"{flag}: cannot listen on {address}: {error}") from error


def _is_local(host: str) -> bool:
    """Returns whether a listen address is a loopback address, which only this machine reaches."""
    return host.lower() == "localhost" or (
        is_address(host) and ipaddress.ip_address(host).is_loopback
    )


def _url_host(host: str) -> str:
    """Returns a host for a URL: an IPv6 address in brackets, any other host unchanged."""
    return f"[{host}]" if ":" in host else host
