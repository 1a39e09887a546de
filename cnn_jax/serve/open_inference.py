"""The Open Inference Protocol, version 2 (KServe, Triton, Seldon), over REST.

Inputs are one tensor: UINT8 of [images, height, width, 3] grey levels, of any height and width,
or BYTES of [images], each an image file in base64. Outputs are `probabilities`, FP32
[images, classes], and `class`, BYTES [images].

A tensor may also come as bytes behind the JSON, as the extension for binary tensors has it and
Triton's clients do; files are then as they are. Outputs are JSON in any case.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

import cnn_jax
from cnn_jax.serve.images import check_range, from_base64, grey_levels, parse_json
from cnn_jax.serve.limits import Refused, unless_client_leaves
from cnn_jax.serve.service import Service, VersionNumber, rows_of
from cnn_jax.serve.versions import Version

_INPUT, _OUTPUTS = "image", ("probabilities", "class")
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
        is_live = service.engine.is_alive
        return JSONResponse({"live": is_live}, 200 if is_live else 503)

    @router.get("/health/ready", summary="Whether all models are ready")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": service.is_ready}, 200 if service.is_ready else 503)

    @router.get("/models/{model}", summary="Inputs and outputs")
    async def metadata_of_model(model: str) -> JSONResponse:
        return JSONResponse(_metadata(service, models.find(model)))

    @router.get("/models/{model}/versions/{version}", summary="Inputs and outputs")
    async def metadata_of_version(model: str, version: VersionNumber) -> JSONResponse:
        return JSONResponse(_metadata(service, models.find(model, version)))

    @router.get("/models/{model}/ready", summary="Whether a model is ready")
    async def model_ready(model: str) -> JSONResponse:
        models.states(model)  # There must be one.
        is_ready = models.is_ready(model) and service.is_able
        return JSONResponse({"name": model, "ready": is_ready}, 200 if is_ready else 503)

    @router.get("/models/{model}/versions/{version}/ready", summary="Whether a version is ready")
    async def version_ready(model: str, version: VersionNumber) -> JSONResponse:
        if version not in models.states(model):
            raise Refused(404, "no_version", f"{model} has no version {version} here")
        is_ready = version in models.present(model) and service.is_able
        found = {"name": model, "version": str(version), "ready": is_ready}
        return JSONResponse(found, 200 if is_ready else 503)

    async def infer(request: Request, version: Version) -> JSONResponse:
        async with service.body(request, version) as body:
            deadline = request.state.deadline
            length = request.headers.get("inference-header-content-length")
            asked = await service.engine.parse(lambda: _parse(body, length), deadline)
            async with unless_client_leaves(request.receive):
                answers = await service.answer(version, asked.images, request)
        rows = rows_of(answers, "image")
        described = {"model_name": version.model, "model_version": str(version.number)}
        if asked.id is not None:
            described["id"] = asked.id
        found = [output for output in _outputs(version, rows) if output["name"] in asked.outputs]
        return JSONResponse(described | {"outputs": found})

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
    async def infer_by_version(
        request: Request, model: str, version: VersionNumber
    ) -> JSONResponse:
        return await infer(request, models.find(model, version))

    return router


def _metadata(service: Service, version: Version) -> dict[str, Any]:
    present = service.models.present(version.model)
    return {
        "name": version.model,
        "versions": [str(number) for number in sorted(present)],
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
class _Asked:
    """A request.

    Attributes:
      images: Files, or pixels.
      outputs: Names of those that are wanted.
      id: Its own, which comes back.
    """

    images: list[bytes | np.ndarray]
    outputs: frozenset[str]
    id: str | None


def _parse(body: bytes, json_length: str | None) -> _Asked:
    """What a body asks.

    Args:
      body: All of it.
      json_length: How much of it is JSON, if that is not all.

    Raises:
      Refused: It is no request of this protocol.
    """
    binary = None
    if json_length is not None:
        if not json_length.isdecimal() or len(json_length) > 10:
            raise Refused(400, "json", "Inference-Header-Content-Length must be a number of bytes")
        body, binary = body[: int(json_length)], body[int(json_length) :]
    found = parse_json(body)
    own_id = found.get("id")
    if own_id is not None and not isinstance(own_id, str):
        raise Refused(400, "json", '"id" must be a string')
    inputs = found.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refused(400, "json", '"inputs" must be a list of one tensor')
    images = _images(inputs[0], binary)
    return _Asked(images, _wanted_outputs(found.get("outputs")), own_id)


def _wanted_outputs(outputs: Any) -> frozenset[str]:
    if outputs is None or outputs == []:
        return frozenset(_OUTPUTS)
    if not isinstance(outputs, list) or not all(
        isinstance(one, dict) and one.get("name") in _OUTPUTS for one in outputs
    ):
        raise Refused(400, "json", f'"outputs" must be a list of {" and ".join(_OUTPUTS)}')
    if any("classification" in (one.get("parameters") or ()) for one in outputs):
        raise Refused(400, "json", 'the parameter "classification" of Triton is not known here')
    return frozenset(one["name"] for one in outputs)


def _images(tensor: dict[str, Any], binary: bytes | None) -> list[bytes | np.ndarray]:
    """The images of the only tensor, whose values may stand behind the JSON.

    Raises:
      Refused: It has none.
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
        raise Refused(
            400, "json", '"datatype" must be UINT8, grey levels from 0 to 255, or BYTES, files'
        )
    if data is not None and binary:
        raise Refused(400, "json", 'the tensor has "data", and there are bytes behind the JSON')
    if data is None and binary is not None:
        if kind == "UINT8":
            return list(_pixels(shape, np.frombuffer(binary, np.uint8)))
        return _files(shape, _elements(binary))
    if not isinstance(data, list):
        raise Refused(400, "json", '"data" must be a list')
    if kind == "UINT8":
        return list(_pixels(shape, grey_levels(data)))
    return _files(shape, [from_base64(image) for image in data])


def _files(shape: Sequence[int], files: list[bytes]) -> list[bytes | np.ndarray]:
    if shape not in ([len(files)], [len(files), 1]):
        raise Refused(400, "json", f'"shape" does not say {len(files)} images')
    return list(files)


def _elements(binary: bytes) -> list[bytes]:
    """Strings of bytes, each behind its length in four bytes, little endian."""
    found, start = [], 0
    while start < len(binary):
        length = int.from_bytes(binary[start : start + 4], "little")
        start += 4
        if start + length > len(binary):
            raise Refused(400, "image", "the binary data is shorter than it says")
        found.append(binary[start : start + length])
        start += length
    return found


def _pixels(shape: Sequence[int], levels: np.ndarray) -> np.ndarray:
    """Grey levels, flat or nested, as uint8 [images, height, width, 3].

    Raises:
      Refused: They are not of this shape, or all levels of an image are 0 or 1.
    """
    if len(shape) != 4 or shape[3] != 3:
        raise Refused(400, "json", '"shape" must be [images, height, width, 3]')
    # In Python's integers: NumPy's would wrap.
    if levels.size != math.prod(shape):
        raise Refused(400, "image", f'there are {levels.size} numbers, and "shape" says otherwise')
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
