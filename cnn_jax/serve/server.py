"""Puts the parts together and serves until a signal comes."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator

from fastapi import FastAPI

from cnn_jax.data.scan import num_cores
from cnn_jax.serve import http
from cnn_jax.serve.app import make_app
from cnn_jax.serve.engine import Engine
from cnn_jax.serve.limits import Limits
from cnn_jax.serve.loader import Loader, OneBundle, Source
from cnn_jax.serve.metrics import Measures
from cnn_jax.serve.request_log import RequestLog
from cnn_jax.serve.service import Models, Service
from cnn_jax.serve.tokens import Tokens
from cnn_jax.system.errors import BundleError, ConfigError

logger = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a server serves.

    Attributes:
      host: The address that it listens on.
      port: 0 for any that is free.
      limits: Of requests.
      queue: Images that may be in the house at once.
      max_batch: Images that are computed at once.
      max_wait: Seconds for which an image may be held back for others to join it.
      poll: Seconds between two looks for versions.
      drain: Seconds for which it says that it is not ready before it ends.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    limits: Limits = Limits()
    queue: int = 256
    max_batch: int = 32
    max_wait: float = 0.0
    poll: float = 2.0
    drain: float = 0.0

    @property
    def sizes(self) -> list[int]:
        """Numbers of images that are compiled: powers of two."""
        return [1 << power for power in range(self.max_batch.bit_length())]


def run(
    source: Source,
    options: Options,
    tokens: Tokens | None = None,
    request_log: RequestLog | None = None,
) -> None:
    """Serves until SIGTERM or Ctrl-C; requests that are under way are answered first.

    Args:
      source: Of the versions.
      options: How.
      tokens: Who may ask; None: everybody.
      request_log: Where answers are noted, if they are.

    Raises:
      ConfigError: The address cannot be listened on.
      BundleError: The only bundle cannot be served.
    """
    measures = Measures()
    engine = Engine(options.queue, options.max_wait, num_cores(), measures.count_batch)
    service = Service(Models(), engine, options.limits, measures, request_log)
    listener = _listen(options)
    host, port = listener.getsockname()[:2]

    loader = Loader(service, source, options.sizes)
    hangs = False

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        app.state.loader = loader

        async def follow() -> None:
            await loader.look()
            if service.models.is_ready():
                print(f"ready on http://{_in_url(host)}:{port}/", flush=True)
            elif isinstance(source, OneBundle):
                server.should_exit = True  # It will not become any better.
                return
            await loader.follow(options.poll)

        following = asyncio.create_task(follow())
        try:
            yield
        finally:
            following.cancel()
            nonlocal hangs
            hangs = not await asyncio.to_thread(engine.close)
            if request_log is not None:
                await asyncio.to_thread(request_log.close)

    app = make_app(service, tokens, lifespan)
    server = http.make_server(app, options.drain, options.limits.seconds, service.leave)
    if options.host not in _LOOPBACK and tokens is None:
        logger.warning("everybody who reaches %s may ask: there are no --tokens", options.host)
    with listener:
        server.run([listener])
    if hangs:
        logger.error("the device does not answer")
    if hangs or loader.is_busy:
        # A network that hangs, or a compiler: Python would wait for it, or fall over it.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1 if hangs else 0)
    if isinstance(source, OneBundle) and loader.problem:
        raise BundleError(loader.problem)


def _listen(options: Options) -> socket.socket:
    """A socket that listens, before anything takes time."""
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((options.host, options.port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        where = f"{_in_url(options.host)}:{options.port}"
        raise ConfigError(f"--host and --port: cannot listen on {where}: {error}") from error


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
