"""The web application: the routes of all protocols, with access checks, logging and metrics."""

import contextlib
import ipaddress
import logging
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import cnn_jax
from cnn_jax.serve import feedback, native, open_inference, page, tf_serving
from cnn_jax.serve.limits import ClientDisconnected, Refused, check_query
from cnn_jax.serve.metrics import CONTENT_TYPE
from cnn_jax.serve.responses import JSONResponse, new_request_id
from cnn_jax.serve.service import Service
from cnn_jax.serve.tokens import Tokens

logger = logging.getLogger(__name__)

# The HTTP status that nginx logs if the client disconnected before the response was sent.
_CLIENT_DISCONNECTED = 499
# An id that a client sends is recorded only if it matches this pattern. All characters of the
# pattern are safe in any log.
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,100}")
_PORT = re.compile(r":\d*$")
# The header of https://www.w3.org/TR/trace-context/.
_TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
# The headers that are copied to the log: the field of the log, the pattern, and the header. The
# server gives each request an id of its own, because ids of clients may be repeated.
_LOGGED_HEADERS = (
    ("client_request_id", _ID, b"x-request-id"),
    ("traceparent", _TRACE, b"traceparent"),
)
# The headers that web pages of other origins may send.
_CORS_HEADERS = ("Authorization", "Content-Type", "Traceparent", "X-Request-Id", "X-Unit-Id")
# The paths of health checks and web pages, which clients may request without a token.
_OPEN = ("/", "/healthz", "/readyz", "/docs", "/openapi.json")
_OPEN_PREFIXES = ("/v2/health/",)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class ErrorOut(BaseModel):
    """The JSON body of an error response."""

    error: str
    reason: str
    request_id: str


# The statuses of errors.
_STATUSES = (400, 401, 404, 405, 408, 413, 415, 421, 422, 429, 503)


def make_app(
    service: Service,
    tokens: Tokens | None,
    lifespan: Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]],
    hosts: Collection[str] = (),
    cors_origins: Sequence[str] = (),
) -> ASGIApp:
    """Creates the web application.

    Args:
      service: The service that makes the predictions.
      tokens: The access tokens; with None, every client may predict.
      lifespan: A context manager that is entered before the first request and left at shutdown.
      hosts: The host names that the Host header of a request may have, without ports; if empty, it
        may have any. It may always have an IP address.
      cors_origins: The origins whose web pages may use the server, such as https://example.com; or
        "*" for all web pages.
    """
    app = _make_app(
        title="cnn_jax",
        version=cnn_jax.__version__,
        lifespan=lifespan,
        responses={status: {"model": ErrorOut} for status in _STATUSES},
    )
    for protocol in (native, tf_serving, open_inference, feedback):
        app.include_router(protocol.make_router(service))
    app.include_router(page.make_router(service, app))
    _add_health(app, service)
    guard = _Guard(app, service, tokens, hosts)
    if not cors_origins:
        return guard
    return CORSMiddleware(
        guard,
        allow_origins=cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=_CORS_HEADERS,
        expose_headers=("X-Request-Id", "X-Arm", "Retry-After"),
    )


def make_health_app(service: Service, hosts: Collection[str] = ()) -> ASGIApp:
    """Creates an application with the health checks and the metrics only, which needs no token.

    It may run in another thread than the application of `make_app`; see there for `hosts`.
    """
    app = _make_app()
    _add_health(app, service)
    return _Guard(app, service, None, hosts)


def _make_app(**options: Any) -> FastAPI:
    """Creates an application that refuses query parameters, and answers errors with JSON."""
    app = FastAPI(
        dependencies=[Depends(_refuse_query)],
        openapi_url=None,  # FastAPI's own route would accept unknown query parameters.
        docs_url=None,  # FastAPI's documentation pages load scripts from another server.
        redoc_url=None,
        # A redirect would go to the host that the client's Host header names.
        redirect_slashes=False,
        **options,
    )
    app.add_exception_handler(Refused, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnected, _client_disconnected)
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _invalid_parameter)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _internal_error)
    return app


async def _refuse_query(request: Request) -> None:
    """Refuses query parameters on all routes except /predict.

    The module `native` checks the query parameters of /predict.
    """
    check_query(request)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["health"], summary="Check that the process and its device work")
    async def healthz() -> JSONResponse:
        if not service.engine.is_alive:
            raise Refused(503, "hanging", "the device does not answer")
        return JSONResponse({"status": "ok"})

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["health"], summary="Check that all models are ready")
    async def readyz() -> JSONResponse:
        if service.is_shutting_down:
            raise Refused(503, "leaving", "the server is shutting down")
        loading = service.models.loading()
        if not service.is_ready:
            versions = ", ".join(
                f"version {number} of {model} has been loading for {seconds:.0f} s"
                for (model, number), seconds in loading.items()
            )
            message = f"a model is not ready; {versions or 'no version is loading'}"
            raise Refused(503, "not_ready", message, retry_after="1")
        described = [
            {"model": model, "version": number, "seconds": round(seconds, 1)}
            for (model, number), seconds in loading.items()
        ]
        return JSONResponse({"status": "ready", "loading": described})

    @app.get(
        "/metrics",
        tags=["health"],
        summary="Metrics for Prometheus",
        response_class=PlainTextResponse,
    )
    async def metrics() -> Response:
        return Response(service.expose(), media_type=CONTENT_TYPE)


class _Guard:
    """Middleware for all requests: request ids, tokens, deadlines, headers, metrics and logging."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        tokens: Tokens | None,
        hosts: Collection[str] = (),
    ):
        self._app = app
        self._service = service
        self._tokens = tokens
        self._hosts = frozenset(map(_plain_host, hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        headers = dict(scope["headers"])
        request_id = new_request_id()
        state = scope.setdefault("state", {})
        state["deadline"] = start + self._service.limits.seconds
        state["request_id"] = request_id
        state["client"] = self._client(scope, headers)
        state["unit"] = _matching(_ID, headers.get(b"x-unit-id"))
        state["log_fields"] = log_fields = {
            name: value
            for name, pattern, header in _LOGGED_HEADERS
            if (value := _matching(pattern, headers.get(header)))
        }
        status = _CLIENT_DISCONNECTED

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name for name, _ in message["headers"]}
                added = [header for header in _HEADERS if header[0] not in names]
                added.append((b"x-request-id", request_id.encode()))
                if "/" in (arm := state.get("arm") or ""):  # An arm of an experiment.
                    added.append((b"x-arm", arm.encode()))
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            refused = self._refuse_host(headers.get(b"host")) or self._refuse(
                scope["path"], headers.get(b"authorization")
            )
            if refused is None:
                await self._app(scope, receive, send_with_headers)
            else:
                answer = _refused(Request(scope), refused)
                await answer(scope, receive, send_with_headers)
        except Exception:  # The response to the client contains no details of the error.
            logger.exception("request %s failed", state["request_id"])
        finally:
            self._log(scope, status, time.monotonic() - start, log_fields)

    def _client(self, scope: Scope, headers: Mapping[bytes, bytes]) -> str:
        """Returns the key of a client for the limits: its token, or without tokens its address."""
        if self._tokens is not None:
            return self._tokens.client(headers.get(b"authorization", b"").decode("latin-1"))
        return _client_network((scope.get("client") or [""])[0])

    def _refuse_host(self, header: bytes | None) -> Refused | None:
        """Returns an error if the Host header has a name that is not allowed, else None.

        A web page of another site can point its own host name to the address of this server (DNS
        rebinding). Its requests then have this name in the Host header, and never an IP address.
        """
        if not self._hosts or header is None:
            return None
        name = _plain_host(_PORT.sub("", header.decode("latin-1")))
        if name in self._hosts or is_address(name):
            return None
        message = f"this server is not known as {name[:100]!r}; --allowed_hosts adds a name"
        return Refused(421, "host", message)

    def _refuse(self, path: str, authorization: bytes | None) -> Refused | None:
        """Returns an error if the request needs a token and has none, else None."""
        if self._tokens is None or path in _OPEN or path.startswith(_OPEN_PREFIXES):
            return None
        if self._tokens.allow((authorization or b"").decode("latin-1")):
            return None
        return Refused(
            401,
            "token",
            "this request needs a bearer token of this server",
            www_authenticate="Bearer",
        )

    def _log(self, scope: Scope, status: int, seconds: float, fields: dict[str, Any]) -> None:
        """Adds an answered request to the metrics and to the log."""
        route = getattr(scope.get("route"), "path", "other")
        metrics = self._service.metrics
        metrics.requests.labels(route, scope["method"], status).inc()
        metrics.latency.labels(route).observe(seconds)
        if "reason" in fields:
            metrics.refused.labels(fields["reason"]).inc()
        state = scope["state"]
        if "/" in (arm := state.get("arm") or ""):
            fields["arm"] = arm
            metrics.arm_seconds.labels(arm, status).observe(seconds)
            if status >= 500:
                reason = fields.get("reason", "internal")
                ids = {name: state[name] for name in ("request_id", "unit", "arm")}
                self._service.record_failure(state["model"], ids, reason)
        if route in ("/healthz", "/readyz", "/metrics") and status == 200:
            return  # Do not log monitoring requests, which arrive every few seconds.
        logger.info(
            "request",
            extra={
                "fields": {
                    "request_id": scope["state"]["request_id"],
                    "client": (scope.get("client") or ["?"])[0],
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "milliseconds": round(1000 * seconds, 3),
                    **fields,
                }
            },
        )


def _plain_host(host: str) -> str:
    """Returns a host in lower case, without the dot at its end or the brackets of IPv6."""
    return host.lower().strip("[]").removesuffix(".")


def is_address(host: str) -> bool:
    """Returns whether a host is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _client_network(address: str) -> str:
    """Returns the addresses that one client has: an IPv4 address, or the first 64 bits of IPv6."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # A proxy may have sent another text.
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    return str(parsed.ipv4_mapped or f"{int(parsed) >> 64:x}")


def _matching(pattern: re.Pattern[bytes], value: bytes | None) -> str | None:
    """Returns a header's value as text if it matches a pattern, else None."""
    return value.decode() if value is not None and pattern.fullmatch(value) else None


def _refused(request: Request, error: Refused) -> Response:
    request.state.log_fields["reason"] = error.reason
    content = {"error": str(error), "reason": error.reason, "request_id": request.state.request_id}
    return JSONResponse(content, error.status, headers=error.headers)


def _client_disconnected(request: Request, error: Exception) -> Response:
    request.state.log_fields["reason"] = "client_left"
    return Response(status_code=_CLIENT_DISCONNECTED)


def _http_error(request: Request, error: HTTPException) -> Response:
    """Returns the error response for an unknown path or an unsupported HTTP method."""
    message = str(error.detail)
    if error.status_code == 404:
        message = "this path does not exist; /docs lists the paths"
        if request.url.path.endswith("/"):
            message = "this path does not exist; no path ends with a slash"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"this path does not support {request.method}; use {allowed}"
    refused = Refused(error.status_code, "route", message)
    refused.headers |= dict(error.headers or {})
    return _refused(request, refused)


def _invalid_parameter(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])
    return _refused(request, Refused(400, "parameter", f"{name}: {first['msg']}"))


def _internal_error(request: Request, error: Exception) -> Response:
    return _refused(request, Refused(500, "internal", "internal error; see the server's log"))
