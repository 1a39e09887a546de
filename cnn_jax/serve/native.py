"""The server's own protocol: an image file in, JSON out."""

import base64
import functools
import io
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from PIL import Image
from pydantic import BaseModel, Field, ValidationError, field_validator

from cnn_jax.explain.maps import method_named
from cnn_jax.explain.overlay import draw_overlay
from cnn_jax.serve.images import Part, images_of
from cnn_jax.serve.limits import Refused, check_query, unless_client_leaves
from cnn_jax.serve.service import Answer, Service, error_of
from cnn_jax.serve.versions import Version
from cnn_jax.system.errors import DataError

# Bytes of a body whose parts are looked for on a thread.
_LARGE_BODY = 1_000_000
_FILES = {
    "type": "array",
    "items": {"type": "string", "contentMediaType": "application/octet-stream"},
}
# What a request's body may be; FastAPI cannot say it by a type, since it is not parsed by it.
_BODY = {
    "required": True,
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"file": _FILES}, "required": ["file"]}
        },
    },
}


class ClassProbability(BaseModel):
    """A class and how probable it is."""

    class_: str = Field(alias="class")
    probability: float = Field(ge=0, le=1)


class Explanation(BaseModel):
    """Where in the image the evidence is."""

    method: str
    png: str = Field(description="base64: the map over the image, as the network sees it")


class PredictionOut(BaseModel):
    """What is said of one image; `error` alone if it cannot be used."""

    name: str = Field(description="the file's name, or its place in the request")
    class_: str | None = Field(default=None, alias="class")
    probability: float | None = Field(default=None, ge=0, le=1)
    top: list[ClassProbability] | None = None
    explanation: Explanation | None = None
    error: str | None = None
    reason: str | None = None


class Timings(BaseModel):
    """Milliseconds; of several images the longest."""

    decode: float
    queue: float
    compute: float
    total: float


class PredictOut(BaseModel):
    """The answer to a request."""

    model: str
    version: int
    predictions: list[PredictionOut]
    milliseconds: Timings


class PredictQuery(BaseModel):
    """The parameters behind the path."""

    model: str | None = Field(default=None, description="needed if there are several")
    version: int | None = Field(default=None, ge=1, description="instead of an alias")
    alias: str | None = Field(default=None, description="instead of a version")
    top: int = Field(default=5, ge=1, le=1000, description="number of classes to return")
    explain: Literal["grad_cam"] | None = Field(default=None, description="method of a map")

    @field_validator("explain", mode="before")
    @classmethod
    def _resolve_spelling(cls, text: object) -> object:
        return (method_named(text) if isinstance(text, str) else None) or text


class _LeanRoute(APIRoute):
    """A route that FastAPI documents, and of which only the query is validated.

    FastAPI's way from a request to a function's parameters takes a good part of the time that
    one small image spends in the server.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            return await endpoint(request, _query(request))

        return handle


def _query(request: Request) -> PredictQuery:
    """Returns the checked parameters behind the path.

    Raises:
      Refused: A parameter is not known, or is given twice.
      RequestValidationError: A value is wrong.
    """
    check_query(request, PredictQuery.model_fields)
    try:
        return PredictQuery.model_validate(dict(request.query_params))
    except ValidationError as error:
        found = [{**one, "loc": ("query", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(found) from error


def make_router(service: Service) -> APIRouter:
    """The routes of this protocol."""
    router = APIRouter(tags=["predict"], route_class=_LeanRoute)

    @router.post(
        "/predict",
        summary="Classify images",
        response_model=PredictOut,
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> JSONResponse:
        """The body is an image file, or a form with one or many files."""
        start = time.monotonic()
        if query.version is not None and query.alias is not None:
            raise Refused(400, "parameter", "either a version or an alias, not both")
        chosen = service.models.find(query.model, query.version, query.alias)
        explain = query.explain is not None
        async with service.body(request, chosen) as body:
            parts = await _parts(service, request, body)
            async with unless_client_leaves(request.receive):
                answers, pictures = await _answer(service, chosen, parts, request, explain)
            errors = [answer for answer in answers if isinstance(answer, DataError)]
            if len(errors) == len(answers):
                raise error_of(errors[0])
            predictions = [
                _describe(part, answer, chosen.class_names, query.top)
                for part, answer in zip(parts, answers, strict=True)
            ]
            for place, picture in pictures.items():
                predictions[place]["explanation"] = picture
        return JSONResponse(
            {
                "model": chosen.model,
                "version": chosen.number,
                "predictions": predictions,
                "milliseconds": _timings(answers, time.monotonic() - start),
            }
        )

    return router


async def _parts(service: Service, request: Request, body: bytes) -> list[Part]:
    """The images of a body."""
    read = functools.partial(
        images_of, body, request.headers.get("content-type", ""), service.limits
    )
    # Looking for the ends of parts takes time in which nobody else would be served.
    if len(body) > _LARGE_BODY:
        return await service.engine.parse(read, request.state.deadline)
    return read()


async def _answer(
    service: Service, version: Version, parts: Sequence[Part], request: Request, explain: bool
) -> tuple[list[Answer | DataError], dict[int, dict[str, str]]]:
    """What is said of images, and maps by their places, if they are asked for."""
    images = [part.content for part in parts]
    answers = await service.answer(version, images, request, explain)
    pictures = {}
    for place, answer in enumerate(answers):
        if explain and isinstance(answer, Answer):
            draw = functools.partial(_explanation, answer)
            pictures[place] = await service.engine.draw(draw, request.state.deadline)
    return answers, pictures


def _describe(
    part: Part, answer: Answer | DataError, class_names: list[str], top: int
) -> dict[str, Any]:
    if isinstance(answer, DataError):
        refused = error_of(answer)
        return {"name": part.name, "error": str(refused), "reason": refused.reason}
    order = np.argsort(-answer.probabilities, kind="stable")[:top]
    best = [
        {"class": class_names[index], "probability": float(answer.probabilities[index])}
        for index in order
    ]
    return {"name": part.name, **best[0], "top": best}


def _explanation(answer: Answer) -> dict[str, str]:
    """The map over the image, as PNG."""
    assert answer.explanation is not None
    picture = draw_overlay(Image.fromarray(answer.pixels), answer.explanation)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"method": "grad_cam", "png": base64.b64encode(file.getvalue()).decode()}


def _timings(answers: Sequence[Answer | DataError], total: float) -> dict[str, float]:
    """Milliseconds, to a thousandth."""
    found = [answer for answer in answers if isinstance(answer, Answer)]
    longest = {
        "decode": max(answer.decode_seconds for answer in found),
        "queue": max(answer.queue_seconds for answer in found),
        "compute": max(answer.compute_seconds for answer in found),
        "total": total,
    }
    return {name: round(1000 * seconds, 3) for name, seconds in longest.items()}
