"""The application: all protocols behind one guard."""

import contextlib
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import cnn_jax
from cnn_jax.serve import admin, native, open_inference, page, tf_serving
from cnn_jax.serve.engine import Late, Overloaded
from cnn_jax.serve.limits import ClientLeft, Refused, check_query
from cnn_jax.serve.metrics import CONTENT_TYPE
from cnn_jax.serve.service import Service
from cnn_jax.serve.tokens import Tokens

logger = logging.getLogger(__name__)

# As nginx notes that a client has left before its answer.
_CLIENT_LEFT = 499
# A request id of a client's is kept if it can harm no log.
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,100}")
# What everybody may ask: whether it lives, and the pages.
_OPEN = ("/", "/healthz", "/readyz", "/docs", "/openapi.json")
_OPEN_PREFIXES = ("/v2/health/",)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class ErrorOut(BaseModel):
    """Why a request was refused."""

    error: str
    reason: str
    request_id: str


_STATUSES = {
    400: "The request is wrong.",
    401: "No token, or an unknown one.",
    403: "The token is not for this.",
    404: "There is no such model or version.",
    405: "Not with this method.",
    408: "The body came too slowly.",
    409: "A version that is not to be had, or is served in any case.",
    413: "Too many bytes, pixels or images.",
    415: "Not an image of a known format.",
    422: "The image is damaged.",
    429: "Too much at once; try again after Retry-After seconds.",
    503: "Not ready, or not computed in time.",
}


def make_app(
    service: Service,
    tokens: Tokens | None,
    lifespan: Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]],
) -> ASGIApp:
    """The whole application.

    Args:
      service: What answers.
      tokens: Who may ask; None: everybody.
      lifespan: What is done before the first request and after the last.
    """
    app = FastAPI(
        title="cnn_jax",
        version=cnn_jax.__version__,
        lifespan=lifespan,
        dependencies=[Depends(_refuse_query)],
        openapi_url=None,  # As its own route it would take any query.
        docs_url=None,  # Its pages take their scripts from another server.
        redoc_url=None,
        redirect_slashes=False,  # They would lead to whatever Host says.
        responses={
            status: {"model": ErrorOut, "description": description}
            for status, description in _STATUSES.items()
        },
    )
    for protocol in (native, tf_serving, open_inference, admin):
        app.include_router(protocol.make_router(service))
    app.include_router(page.make_router(service, app))
    _add_health(app, service)
    app.add_exception_handler(Refused, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(ClientLeft, _client_left)
    app.add_exception_handler(Overloaded, _overloaded)  # type: ignore[arg-type]
    app.add_exception_handler(Late, _late)
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _wrong_parameter)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _own_fault)
    return _Guard(app, service, tokens)


async def _refuse_query(request: Request) -> None:
    """Refuses every query; the one route that takes a query checks it itself (`native`)."""
    check_query(request)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["health"], summary="Whether the process lives")
    async def healthz() -> JSONResponse:
        if not service.engine.is_alive:
            raise Refused(503, "hanging", "the device does not answer")
        return JSONResponse({"status": "ok"})

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["health"], summary="Whether all models are compiled and warm")
    async def readyz() -> JSONResponse:
        if service.is_leaving:
            raise Refused(503, "leaving", "the server is about to end")
        if not service.is_ready:
            raise Refused(503, "not_ready", "a model is not ready", retry_after="1")
        return JSONResponse({"status": "ready"})

    @app.get(
        "/metrics",
        tags=["health"],
        summary="Figures for Prometheus",
        response_class=PlainTextResponse,
    )
    async def metrics() -> Response:
        return Response(service.expose(), media_type=CONTENT_TYPE)


class _Guard:
    """Stands before all routes: request ids, tokens, deadlines, headers, figures and the log."""

    def __init__(self, app: ASGIApp, service: Service, tokens: Tokens | None):
        self._app = app
        self._service = service
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        state = scope.setdefault("state", {})
        state["deadline"] = start + self._service.limits.seconds
        state["request_id"] = request_id.decode()
        state["told"] = told = {}
        status = _CLIENT_LEFT
        is_read = b"content-length" not in headers and b"transfer-encoding" not in headers

        async def receive_more() -> Message:
            nonlocal is_read
            message = await receive()
            is_read |= message["type"] == "http.request" and not message.get("more_body", False)
            return message

        async def send_more(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                own = [header for header in _HEADERS if header[0] not in present]
                message["headers"] = [*message["headers"], *own, (b"x-request-id", request_id)]
                if not is_read and b"connection" not in present:
                    # What is still to come of the body is not read.
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            refused = self._refuse(scope["path"], headers.get(b"authorization"))
            if refused is None:
                await self._app(scope, receive_more, send_more)
            else:
                await _refused(Request(scope), refused)(scope, receive_more, send_more)
        except Exception:  # It was answered, without a word of this.
            logger.exception("request %s failed", state["request_id"])
        finally:
            self._count(scope, status, time.monotonic() - start, told)

    def _refuse(self, path: str, authorization: bytes | None) -> Refused | None:
        """Why this request may not be made; None if it may."""
        is_admin = path.startswith("/admin/")
        if path in _OPEN or path.startswith(_OPEN_PREFIXES):
            return None
        if self._tokens is None:
            message = "administering needs a token, and the server was started without --tokens"
            return Refused(403, "token", message, connection="close") if is_admin else None
        header = None if authorization is None else authorization.decode("latin-1")
        is_allowed = self._tokens.allow(header, "admin" if is_admin else "predict")
        if is_allowed is None:
            return Refused(
                401,
                "token",
                "a bearer token of this server is needed",
                connection="close",
                www_authenticate="Bearer",
            )
        if not is_allowed:
            return Refused(403, "token", "the token is not for this", connection="close")
        return None

    def _count(self, scope: Scope, status: int, seconds: float, told: dict[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", "other")
        counted = self._service.measures
        counted.requests.labels(route, scope["method"], status).inc()
        counted.latency.labels(route).observe(seconds)
        if "reason" in told:
            counted.refused.labels(told["reason"]).inc()
        if route in ("/healthz", "/readyz", "/metrics") and status == 200:
            return  # Asked every few seconds, and nothing to know.
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
                    **told,
                }
            },
        )


def _refused(request: Request, error: Refused) -> Response:
    request.state.told["reason"] = error.reason
    content = {"error": str(error), "reason": error.reason, "request_id": request.state.request_id}
    return JSONResponse(content, error.status, headers=error.headers)


def _overloaded(request: Request, error: Overloaded) -> Response:
    refused = Refused(429, "busy", str(error), retry_after=str(error.retry_after))
    return _refused(request, refused)


def _late(request: Request, error: Exception) -> Response:
    return _refused(request, Refused(503, "late", str(error), retry_after="1"))


def _client_left(request: Request, error: Exception) -> Response:
    request.state.told["reason"] = "client_left"
    return Response(status_code=_CLIENT_LEFT)


def _http_error(request: Request, error: HTTPException) -> Response:
    """What the router itself refuses: there is no such path, or not with this method."""
    message = str(error.detail)
    if error.status_code == 404:
        message = "there is nothing at this path; /docs lists the paths"
        if request.url.path.endswith("/"):
            message = "there is nothing at this path; no path here ends with a slash"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.method} is not for this path; use {allowed}"
    refused = Refused(error.status_code, "route", message)
    refused.headers |= dict(error.headers or {})
    return _refused(request, refused)


def _wrong_parameter(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return _refused(request, Refused(400, "parameter", f"{where}: {first['msg']}"))


def _own_fault(request: Request, error: Exception) -> Response:
    return _refused(request, Refused(500, "internal", "something is wrong with the server"))
