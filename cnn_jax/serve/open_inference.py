"""The Open Inference Protocol, version 2 (KServe, Triton, Seldon), over REST.

Inputs are one tensor: UINT8 of [images, height, width, 3] grey levels, of any height and width,
or BYTES of [images], each an image file in base64. Outputs are `probabilities`, FP32
[images, classes], and `class`, BYTES [images].
"""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse

import cnn_jax
from cnn_jax.serve.images import from_base64, parse_json
from cnn_jax.serve.limits import Refused, unless_client_leaves
from cnn_jax.serve.service import Answer, Service, error_of
from cnn_jax.serve.versions import Version

_Number = Annotated[int, Path(ge=1, lt=2**31)]
_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "inputs": {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": 1,
                        "items": {
                            "type": "object",
                            "properties": {
                                "name": {"type": "string"},
                                "shape": {"type": "array", "items": {"type": "integer"}},
                                "datatype": {"type": "string", "enum": ["UINT8", "BYTES"]},
                                "data": {"type": "array"},
                            },
                            "required": ["name", "shape", "datatype", "data"],
                        },
                    },
                },
                "required": ["inputs"],
            },
        }
    },
}


def make_router(service: Service) -> APIRouter:
    """The routes of this protocol."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
    models = service.models

    @router.get("", summary="The server")
    async def server() -> JSONResponse:
        return JSONResponse({"name": "cnn_jax", "version": cnn_jax.__version__, "extensions": []})

    @router.get("/health/live", summary="Whether it lives")
    async def live() -> JSONResponse:
        return JSONResponse({"live": True})

    @router.get("/health/ready", summary="Whether all models are ready")
    async def ready() -> JSONResponse:
        is_ready = models.is_ready()
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @router.get("/models/{model}", summary="Inputs and outputs")
    async def metadata_of_model(model: str) -> JSONResponse:
        return JSONResponse(_metadata(service, models.find(model)))

    @router.get("/models/{model}/versions/{version}", summary="Inputs and outputs")
    async def metadata_of_version(model: str, version: _Number) -> JSONResponse:
        return JSONResponse(_metadata(service, models.find(model, version)))

    @router.get("/models/{model}/ready", summary="Whether a model is ready")
    async def model_ready(model: str) -> JSONResponse:
        models.states(model)  # There must be one.
        is_ready = models.is_ready(model)
        return JSONResponse({"name": model, "ready": is_ready}, 200 if is_ready else 503)

    @router.get("/models/{model}/versions/{version}/ready", summary="Whether a version is ready")
    async def version_ready(model: str, version: _Number) -> JSONResponse:
        found = models.find(model, version)
        return JSONResponse({"name": found.model, "version": str(version), "ready": True})

    async def infer(request: Request, version: Version) -> JSONResponse:
        async with service.body(request) as body:
            deadline = request.state.deadline
            images, name = await service.engine.decode(lambda: _images(body), deadline)
            work = service.answer(version, images, request)
            answers = await unless_client_leaves(request.receive, work)
        rows = []
        for place, answer in enumerate(answers):
            if not isinstance(answer, Answer):
                refused = error_of(answer)
                raise Refused(refused.status, refused.reason, f"image {place}: {refused}")
            rows.append(answer.probabilities)
        described = {"model_name": version.model, "model_version": str(version.number)}
        return JSONResponse(described | name | {"outputs": _outputs(version, rows)})

    @router.post(
        "/models/{model}/infer",
        summary="Probabilities",
        openapi_extra={"requestBody": _BODY},
    )
    async def infer_by_model(request: Request, model: str) -> JSONResponse:
        return await infer(request, models.find(model))

    @router.post(
        "/models/{model}/versions/{version}/infer",
        summary="Probabilities",
        openapi_extra={"requestBody": _BODY},
    )
    async def infer_by_version(request: Request, model: str, version: _Number) -> JSONResponse:
        return await infer(request, models.find(model, version))

    return router


def _metadata(service: Service, version: Version) -> dict[str, Any]:
    states = service.models.states(version.model)
    height, width = version.preprocessing.image_size
    return {
        "name": version.model,
        "versions": [str(number) for number in sorted(states)],
        "platform": "jax",
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [-1, height, width, 3]},
        ],
        "outputs": [
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": [-1, len(version.class_names)],
                "parameters": {"class_names": version.class_names},
            },
            {"name": "class", "datatype": "BYTES", "shape": [-1]},
        ],
    }


def _images(body: bytes) -> tuple[list[bytes | np.ndarray], dict[str, str]]:
    """The images of a request, and its id if it has one.

    Raises:
      Refused: It is no request of this protocol.
    """
    found = parse_json(body)
    inputs = found.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refused(400, "json", '"inputs" must be a list of one tensor')
    (tensor,) = inputs
    shape, data = tensor.get("shape"), tensor.get("data")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise Refused(400, "json", '"shape" must be a list of positive integers')
    if not isinstance(data, list):
        raise Refused(400, "json", '"data" must be a list')
    own_id = found.get("id")
    if own_id is not None and not isinstance(own_id, str):
        raise Refused(400, "json", '"id" must be a string')
    name = {} if own_id is None else {"id": own_id}
    if tensor.get("datatype") == "BYTES":
        if shape not in ([len(data)], [len(data), 1]):
            raise Refused(400, "json", f'"shape" is {shape}, and "data" has {len(data)} images')
        return [from_base64(image) for image in data], name
    if tensor.get("datatype") != "UINT8":
        raise Refused(400, "json", '"datatype" must be UINT8 or BYTES')
    return list(_pixels(shape, data)), name


def _pixels(shape: Sequence[int], data: list[Any]) -> np.ndarray:
    """A tensor of grey levels, flat or nested, as uint8 [images, height, width, 3].

    Raises:
      Refused: Its shape is another, or its values are none.
    """
    if len(shape) != 4 or shape[3] != 3:
        raise Refused(400, "json", '"shape" must be [images, height, width, 3]')
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise Refused(400, "image", '"data" has rows that differ in length') from error
    # In Python's integers: NumPy's would wrap.
    size = 1
    for side in shape:
        size *= side
    if array.dtype.kind not in "iu" or array.size != size:
        raise Refused(400, "image", f'"data" must be {size} integers, as its shape says')
    if array.min() < 0 or array.max() > 255:
        raise Refused(400, "image", '"data" must be from 0 to 255')
    return array.astype(np.uint8).reshape(shape)


def _outputs(version: Version, rows: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    best = [version.class_names[int(np.argmax(row))] for row in rows]
    count = len(version.class_names)
    return [
        {
            "name": "probabilities",
            "datatype": "FP32",
            "shape": [len(rows), count],
            "data": np.concatenate(rows).tolist() if rows else [],
        },
        {"name": "class", "datatype": "BYTES", "shape": [len(rows)], "data": best},
    ]
