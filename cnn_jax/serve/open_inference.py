"""The REST routes of the Open Inference Protocol, version 2 (KServe, Triton and Seldon).

The input is a single tensor. It is either UINT8 [images, height, width, 3], grey levels of images
of any height and width, or BYTES [images], image files in base64. The outputs are `probabilities`,
FP32 [images, classes], and `class`, BYTES [images].

With the binary tensor extension, which Triton's clients use, the bytes of the tensor follow the
JSON. Image files are then not in base64. The outputs are always JSON.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

import cnn_jax
from cnn_jax.serve.images import check_range, decode_base64, parse_grey_levels, parse_json
from cnn_jax.serve.limits import Limits, Refused, cancel_on_disconnect
from cnn_jax.serve.responses import JSONResponse
from cnn_jax.serve.service import Service, VersionNumber, probability_rows
from cnn_jax.serve.versions import Version

_INPUT, _OUTPUTS = "image", ("probabilities", "class")
_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"id": {"type": "string"}, "inputs": {"type": "array"}},
                "required": ["inputs"],
            },
            "example": {
                "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["..."]}]
            },
        }
    },
}


def make_router(service: Service) -> APIRouter:
    """Returns the routes of the Open Inference Protocol."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
    models = service.models

    @router.get("", summary="Name and version of the server")
    async def server() -> JSONResponse:
        return JSONResponse({"name": "cnn_jax", "version": cnn_jax.__version__, "extensions": []})

    @router.get("/health/live", summary="Check that the process and its device work")
    async def live() -> JSONResponse:
        is_live = service.engine.is_alive
        return JSONResponse({"live": is_live}, 200 if is_live else 503)

    @router.get("/health/ready", summary="Check that all models are ready")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": service.is_ready}, 200 if service.is_ready else 503)

    @router.get("/models/{model}", summary="Inputs and outputs of a model")
    async def model_metadata(model: str) -> JSONResponse:
        return JSONResponse(_metadata(service, models.find(model)))

    @router.get("/models/{model}/versions/{version}", summary="Inputs and outputs of a version")
    async def version_metadata(model: str, version: VersionNumber) -> JSONResponse:
        return JSONResponse(_metadata(service, models.find(model, version)))

    @router.get("/models/{model}/ready", summary="Check that a model is ready")
    async def model_ready(model: str) -> JSONResponse:
        models.states(model)  # This call raises `Refused` if the model is unknown.
        is_ready = models.is_ready(model) and service.is_serving
        return JSONResponse({"name": model, "ready": is_ready}, 200 if is_ready else 503)

    @router.get("/models/{model}/versions/{version}/ready", summary="Check that a version is ready")
    async def version_ready(model: str, version: VersionNumber) -> JSONResponse:
        if version not in models.states(model):
            raise Refused(404, "no_version", f"{model} has no version {version} here")
        is_ready = version in models.loaded(model) and service.is_serving
        content = {"name": model, "version": str(version), "ready": is_ready}
        return JSONResponse(content, 200 if is_ready else 503)

    async def infer(request: Request, version: Version) -> JSONResponse:
        async with service.body(request, version) as body:
            length = request.headers.get("inference-header-content-length")
            async with cancel_on_disconnect(request.receive):
                inference = await service.parse(
                    lambda: _parse(body, length, service.limits), request
                )
                answers = await service.answer(version, inference.images, request)
        rows = probability_rows(answers, "image")
        content: dict[str, Any] = {
            "model_name": version.model,
            "model_version": str(version.number),
        }
        if inference.id is not None:
            content["id"] = inference.id
        outputs = _outputs(version, rows)
        content["outputs"] = [one for one in outputs if one["name"] in inference.outputs]
        return JSONResponse(content)

    @router.post(
        "/models/{model}/infer",
        summary="Classify images with a model",
        openapi_extra={"requestBody": _BODY},
    )
    async def infer_model(request: Request, model: str) -> JSONResponse:
        return await infer(request, service.select(request, model))

    @router.post(
        "/models/{model}/versions/{version}/infer",
        summary="Classify images with a version",
        openapi_extra={"requestBody": _BODY},
    )
    async def infer_version(request: Request, model: str, version: VersionNumber) -> JSONResponse:
        return await infer(request, service.select(request, model, version))

    return router


def _metadata(service: Service, version: Version) -> dict[str, Any]:
    loaded = service.models.loaded(version.model)
    return {
        "name": version.model,
        "versions": [str(number) for number in sorted(loaded)],
        "platform": "jax",
        "inputs": [
            {
                "name": _INPUT,
                "datatype": "UINT8",
                "shape": [-1, -1, -1, 3],
                "parameters": {
                    "seen_at": list(version.preprocessing.image_size),
                    "also": "BYTES of [-1], each an image file in base64",
                },
            },
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


@dataclasses.dataclass(frozen=True)
class _Inference:
    """A parsed inference request."""

    images: list[bytes | np.ndarray]  # Image files, or pixels, uint8 [height, width, 3].
    outputs: frozenset[str]  # The names of the requested outputs.
    id: str | None  # The client's id of the request, which the answer repeats.


def _parse(body: bytes, json_length: str | None, limits: Limits) -> _Inference:
    """Parses the body of a request, of which the first `json_length` bytes (None: all) are JSON.

    Raises:
      Refused: The body is not a request of this protocol, or has too many images.
    """
    binary = None
    if json_length is not None:
        if not json_length.isdecimal() or len(json_length) > 10:
            raise Refused(400, "json", "Inference-Header-Content-Length must be a number of bytes")
        body, binary = body[: int(json_length)], body[int(json_length) :]
    fields = parse_json(body)
    request_id = fields.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise Refused(400, "json", '"id" must be a string')
    inputs = fields.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refused(400, "json", '"inputs" must be a list of one tensor')
    images = _images(inputs[0], binary, limits)
    return _Inference(images, _requested_outputs(fields.get("outputs")), request_id)


def _requested_outputs(outputs: Any) -> frozenset[str]:
    if outputs is None or outputs == []:
        return frozenset(_OUTPUTS)
    if not isinstance(outputs, list) or not all(
        isinstance(one, dict) and one.get("name") in _OUTPUTS for one in outputs
    ):
        raise Refused(400, "json", f'"outputs" must be a list of {" and ".join(_OUTPUTS)}')
    if any("classification" in (one.get("parameters") or ()) for one in outputs):
        raise Refused(400, "json", 'Triton\'s parameter "classification" is not supported')
    return frozenset(one["name"] for one in outputs)


def _images(
    tensor: dict[str, Any], binary: bytes | None, limits: Limits
) -> list[bytes | np.ndarray]:
    """Returns the images in the input tensor.

    Args:
      tensor: The JSON description of the tensor.
      binary: The bytes after the JSON; None if the request has no binary part.
      limits: The limits of a request.

    Raises:
      Refused: The tensor does not contain images, or contains too many.
    """
    if tensor.get("name", _INPUT) != _INPUT:
        raise Refused(400, "json", f"the only input is {_INPUT}")
    shape, data = tensor.get("shape"), tensor.get("data")
    if not isinstance(shape, list) or not 0 < len(shape) <= 4:
        raise Refused(400, "json", '"shape" must be a list of one to four integers')
    if not all(type(side) is int and 0 < side < 2**31 for side in shape):
        raise Refused(400, "json", '"shape" must be positive integers, below 2**31')
    kind = tensor.get("datatype")
    if kind not in ("UINT8", "BYTES"):
        message = '"datatype" must be UINT8 (grey levels from 0 to 255) or BYTES (image files)'
        raise Refused(400, "json", message)
    if data is not None and binary:
        raise Refused(400, "json", 'the tensor has both "data" and bytes after the JSON')
    if data is None and binary is not None:
        if kind == "UINT8":
            return list(_pixels(shape, np.frombuffer(binary, np.uint8), limits))
        elements = _elements(binary, limits)
        _check_files(shape, len(elements), limits)
        return elements
    if not isinstance(data, list):
        raise Refused(400, "json", '"data" must be a list')
    if kind == "UINT8":
        return list(_pixels(shape, parse_grey_levels(data), limits))
    _check_files(shape, len(data), limits)
    return [decode_base64(image) for image in data]


def _check_files(shape: Sequence[int], count: int, limits: Limits) -> None:
    if shape not in ([count], [count, 1]):
        raise Refused(400, "json", f'"shape" must be [{count}], the number of images')
    limits.check_count(count)


def _elements(binary: bytes, limits: Limits) -> list[bytes | np.ndarray]:
    """Splits bytes into files; 4 little-endian bytes before each file give its length."""
    elements, start = [], 0
    while start < len(binary):
        length = int.from_bytes(binary[start : start + 4], "little")
        start += 4
        if start + length > len(binary):
            raise Refused(400, "image", "the binary data is shorter than its lengths say")
        elements.append(binary[start : start + length])
        limits.check_count(len(elements))
        start += length
    return elements


def _pixels(shape: Sequence[int], levels: np.ndarray, limits: Limits) -> np.ndarray:
    """Reshapes pixel values to an array of images, uint8 [images, height, width, 3].

    Raises:
      Refused: The shape does not fit, there are too many images, or the largest grey level of an
        image is 1.
    """
    if len(shape) != 4 or shape[3] != 3:
        raise Refused(400, "json", '"shape" must be [images, height, width, 3]')
    # Use math.prod, because the product of NumPy integers could overflow.
    if levels.size != math.prod(shape):
        message = f'"shape" does not match the number of values, which is {levels.size}'
        raise Refused(400, "image", message)
    limits.check_count(shape[0])
    images = levels.reshape(shape)
    for image in images:
        check_range(image)
    return images


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
