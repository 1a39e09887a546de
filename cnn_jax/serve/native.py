"""The native protocol of this server: POST /predict takes image files and returns JSON."""

import base64
import functools
import io
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal, cast

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from PIL import Image
from pydantic import BaseModel, Field, ValidationError, field_validator

from cnn_jax.explain.names import method_named
from cnn_jax.explain.overlay import draw_overlay
from cnn_jax.serve.engine import Computed
from cnn_jax.serve.images import Part, read_images
from cnn_jax.serve.limits import Refused, cancel_on_disconnect, check_query, first_problem
from cnn_jax.serve.responses import JSONResponse
from cnn_jax.serve.service import Service, image_refusal
from cnn_jax.system.errors import DataError

# A request body with more bytes than this is parsed on a separate thread.
_LARGE_BODY = 1_000_000
_FILES = {
    "type": "array",
    "items": {"type": "string", "contentMediaType": "application/octet-stream"},
}
# The OpenAPI description of the request body. FastAPI cannot derive the description, because
# FastAPI does not parse the body.
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
    """A class and its probability."""

    class_: str = Field(alias="class")
    probability: float = Field(ge=0, le=1)


class Explanation(BaseModel):
    """An explanation map (saliency map) for the most probable class."""

    method: str
    png: str = Field(
        description="PNG in base64: the map over the image, in the size of the network's input"
    )


class PredictionOut(BaseModel):
    """The prediction for one image, or an error if the image cannot be used."""

    name: str = Field(description="the file's name, or the image's index in the request")
    class_: str | None = Field(default=None, alias="class")
    probability: float | None = Field(default=None, ge=0, le=1)
    top: list[ClassProbability] | None = None
    disagreement: float | None = Field(
        default=None,
        ge=0,
        description="of an ensemble: how much the predictions of its members differ, in nats",
    )
    explanation: Explanation | None = None
    error: str | None = None
    reason: str | None = None


class Timings(BaseModel):
    """The time that a request took at the server, in milliseconds."""

    total: float


class PredictOut(BaseModel):
    """The predictions for all images of a request."""

    model: str
    version: int
    request_id: str = Field(description="the id that POST /feedback needs")
    predictions: list[PredictionOut]
    milliseconds: Timings


class PredictQuery(BaseModel):
    """The query parameters of /predict."""

    model: str | None = Field(
        default=None, description="model name; required if the server has several models"
    )
    version: int | None = Field(
        default=None, ge=1, description="model version; the alias's version by default"
    )
    alias: str | None = Field(default=None, description="alias of a version; not with version")
    top: int = Field(default=5, ge=1, le=1000, description="number of classes to return")
    explain: Literal["grad_cam"] | None = Field(
        default=None, description="method of the map to return with each image"
    )

    @field_validator("explain", mode="before")
    @classmethod
    def _resolve_spelling(cls, text: object) -> object:
        return (method_named(text, ("grad_cam",)) or text) if isinstance(text, str) else text


class _LeanRoute(APIRoute):
    """A route that validates only the query parameters of a request.

    For a small image, FastAPI's parsing of all parameters would take a large part of the time.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            return await endpoint(request, _query(request))

        return handle


def _query(request: Request) -> PredictQuery:
    """Validates and returns the query parameters of a request.

    Raises:
      Refused: A parameter is not known or is given twice, or its value is invalid.
    """
    check_query(request, PredictQuery.model_fields)
    try:
        return PredictQuery.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise Refused(400, "parameter", first_problem(error)) from error


def make_router(service: Service) -> APIRouter:
    """Returns the routes of the native protocol."""
    router = APIRouter(tags=["predict"], route_class=_LeanRoute)

    @router.post(
        "/predict",
        summary="Classify images",
        response_model=PredictOut,
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> JSONResponse:
        """The request body is an image file, or a form with one or more image files."""
        start = time.monotonic()
        if query.version is not None and query.alias is not None:
            raise Refused(400, "parameter", "give either version or alias, not both")
        version = service.select(request, query.model, query.version, query.alias)
        content_type, state = request.headers.get("content-type", ""), request.state
        async with (
            service.body(request, version) as body,
            cancel_on_disconnect(request.receive),
        ):
            read = functools.partial(read_images, body, content_type, service.limits)
            # Parse a large form on another thread, because parsing would block the event loop.
            is_large = len(body) > _LARGE_BODY
            parts = await service.parse(read, request) if is_large else read()
            images = [part.content for part in parts]
            answers = await service.answer(version, images, request, query.explain is not None)
            if all(isinstance(answer, DataError) for answer in answers):
                raise image_refusal(cast(DataError, answers[0]))
            predictions = []
            for part, answer in zip(parts, answers, strict=True):
                predictions.append(_prediction(part, answer, version.class_names, query.top))
                if query.explain and isinstance(answer, Computed):
                    draw = functools.partial(_explanation, answer)
                    drawing = service.engine.run_on_decoder(draw, state.deadline, state.client)
                    predictions[-1]["explanation"] = await drawing
        return JSONResponse(
            {
                "model": version.model,
                "version": version.number,
                "request_id": request.state.request_id,
                "predictions": predictions,
                "milliseconds": {"total": round(1000 * (time.monotonic() - start), 3)},
            }
        )

    return router


def _prediction(
    part: Part, answer: Computed | DataError, class_names: list[str], top: int
) -> dict[str, Any]:
    if isinstance(answer, DataError):
        refused = image_refusal(answer)
        return {"name": part.name, "error": str(refused), "reason": refused.reason}
    order = np.argsort(-answer.result.probabilities, kind="stable")[:top]
    best = [
        {"class": class_names[index], "probability": float(answer.result.probabilities[index])}
        for index in order
    ]
    prediction = {"name": part.name, **best[0], "top": best}
    if answer.result.disagreement is not None:
        prediction["disagreement"] = answer.result.disagreement
    return prediction


def _explanation(answer: Computed) -> dict[str, str]:
    """Draws the explanation map over the image, and encodes the result as PNG in base64."""
    assert answer.result.explanation is not None
    picture = draw_overlay(Image.fromarray(answer.pixels), answer.result.explanation)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {"method": "grad_cam", "png": base64.b64encode(file.getvalue()).decode()}
