"""The route POST /feedback, with which clients send true classes and rewards to the request log."""

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cnn_jax.serve.engine import ending_at
from cnn_jax.serve.images import parse_json
from cnn_jax.serve.limits import Refused, first_problem
from cnn_jax.serve.responses import JSONResponse
from cnn_jax.serve.service import Service

_MAX_BYTES = 10_000


class Feedback(BaseModel):
    """The true class of an image, or a reward for its prediction, or both."""

    model_config = ConfigDict(extra="forbid")

    request_id: str = Field(pattern="^[0-9a-f]{32}$", description="X-Request-Id of the answer")
    image_index: int = Field(default=0, ge=0, lt=2**31, description="index of the image, from 0")
    label: str | None = Field(
        default=None, min_length=1, max_length=200, description="the true class"
    )
    reward: float | None = Field(
        default=None, allow_inf_nan=False, description="a number, larger for a better prediction"
    )
    new_class: bool = Field(
        default=False, description="whether label may be a class that the model does not know"
    )


class FeedbackOut(BaseModel):
    """The image whose feedback is stored."""

    request_id: str
    image_index: int


def make_router(service: Service) -> APIRouter:
    """Returns the route of feedback."""
    router = APIRouter(tags=["feedback"])

    @router.post(
        "/feedback",
        summary="Store the true class of an image, or a reward for its prediction",
        response_model=FeedbackOut,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": Feedback.model_json_schema()}},
            }
        },
    )
    async def feedback(request: Request) -> JSONResponse:
        """The answer is sent after the feedback was written to the request log."""
        async with service.body(request) as body:
            given = _parse(body)
        if service.request_log is None:
            message = "there is no request log; start the server with --request_log"
            raise Refused(404, "no_log", message)
        message = "the request timed out before its feedback was written"
        async with ending_at(request.state.deadline, message):
            await service.request_log.add_feedback(request.state.client, given)
        return JSONResponse({"request_id": given.request_id, "image_index": given.image_index})

    return router


def _parse(body: bytes) -> Feedback:
    if len(body) > _MAX_BYTES:  # The event loop would wait until a large body is parsed.
        raise Refused(413, "too_large", f"feedback may have at most {_MAX_BYTES:,} bytes")
    try:
        given = Feedback.model_validate(parse_json(body), strict=True)
    except ValidationError as error:
        raise Refused(400, "json", first_problem(error)) from error
    if given.label is None and given.reward is None:
        raise Refused(400, "json", 'the feedback needs "label" or "reward"')
    return given
