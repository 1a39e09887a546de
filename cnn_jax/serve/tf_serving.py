"""TensorFlow Serving's REST protocol, for clients that speak it already.

As its documentation has it ("RESTful API"): status, metadata and predict. An instance is an
image file in base64, `{"b64": "..."}`, or nested lists of grey levels, [height, width, 3] of
any size; either may stand under the input's name, "image".
"""

from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from cnn_jax.serve.images import from_base64, from_numbers, parse_json
from cnn_jax.serve.limits import Refused, unless_client_leaves
from cnn_jax.serve.service import Service, VersionNumber, rows_of
from cnn_jax.serve.versions import Version

_INPUT, _OUTPUT, _SIGNATURE = "image", "probabilities", "serving_default"
_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "signature_name": {"type": "string"},
                    "instances": {"type": "array"},
                    "inputs": {},
                },
            },
            "example": {"instances": [{"b64": "..."}]},
        }
    },
}


def make_router(service: Service) -> APIRouter:
    """The routes of this protocol."""
    router = APIRouter(prefix="/v1/models", tags=["TensorFlow Serving"])
    models = service.models

    def status(model: str, number: int | None = None) -> JSONResponse:
        states = models.states(model)
        if number is not None:
            if number not in states:
                raise Refused(404, "no_version", f"{model} has no version {number} here")
            states = {number: states[number]}
        described = [
            {
                "version": str(version),
                "state": state,
                "status": {
                    "error_code": "UNKNOWN" if problem else "OK",
                    "error_message": problem,
                },
            }
            for version, (state, problem) in sorted(states.items(), reverse=True)
        ]
        return JSONResponse({"model_version_status": described})

    async def predict(request: Request, version: Version) -> JSONResponse:
        async with service.body(request, version) as body:
            deadline = request.state.deadline
            images, key = await service.engine.parse(lambda: _images(body), deadline)
            async with unless_client_leaves(request.receive):
                answers = await service.answer(version, images, request)
        return JSONResponse({key: [row.tolist() for row in rows_of(answers, "instance")]})

    options: dict[str, Any] = {"openapi_extra": {"requestBody": _BODY}}

    @router.post("/{model}:predict", summary="Probabilities", **options)
    async def predict_by_model(request: Request, model: str) -> JSONResponse:
        return await predict(request, models.find(model))

    @router.post("/{model}/versions/{version}:predict", summary="Probabilities", **options)
    async def predict_by_version(
        request: Request, model: str, version: VersionNumber
    ) -> JSONResponse:
        return await predict(request, models.find(model, version))

    @router.post("/{model}/labels/{alias}:predict", summary="Probabilities", **options)
    async def predict_by_alias(request: Request, model: str, alias: str) -> JSONResponse:
        return await predict(request, models.find(model, alias=alias))

    # Before the routes whose {model} would take the verb for a part of the name.
    for path in ("/{model}", "/{model}/versions/{version}", "/{model}/labels/{alias}"):

        @router.api_route(f"{path}:{{verb}}", methods=["GET", "POST"], include_in_schema=False)
        async def refuse_verb(request: Request, verb: str) -> JSONResponse:
            if verb == "predict":
                raise Refused(405, "route", "GET is not for this path; use POST", allow="POST")
            if verb in ("classify", "regress"):
                raise Refused(
                    400,
                    "signature",
                    f":{verb} takes tf.Example records, which this server does not; send images "
                    "to :predict, which answers with all probabilities",
                )
            raise Refused(404, "route", f"there is no :{verb[:100]} here; there is :predict")

    @router.get("/{model}", summary="Status of all versions")
    async def status_of_model(model: str) -> JSONResponse:
        return status(model)

    @router.get("/{model}/versions/{version}", summary="Status of a version")
    async def status_of_version(model: str, version: VersionNumber) -> JSONResponse:
        return status(model, version)

    @router.get("/{model}/labels/{alias}", summary="Status of an alias")
    async def status_of_alias(model: str, alias: str) -> JSONResponse:
        return status(model, models.find(model, alias=alias).number)

    @router.get("/{model}/metadata", summary="Inputs and outputs")
    async def metadata_of_model(model: str) -> JSONResponse:
        return JSONResponse(_metadata(models.find(model)))

    @router.get("/{model}/versions/{version}/metadata", summary="Inputs and outputs")
    async def metadata_of_version(model: str, version: VersionNumber) -> JSONResponse:
        return JSONResponse(_metadata(models.find(model, version)))

    @router.get("/{model}/labels/{alias}/metadata", summary="Inputs and outputs")
    async def metadata_of_alias(model: str, alias: str) -> JSONResponse:
        return JSONResponse(_metadata(models.find(model, alias=alias)))

    return router


def _images(body: bytes) -> tuple[list[bytes | np.ndarray], str]:
    """The images of a request, and what their answers stand under.

    Raises:
      Refused: It is no request of this protocol.
    """
    found = parse_json(body)
    signature = found.get("signature_name", _SIGNATURE)
    if signature not in (_SIGNATURE, ""):
        raise Refused(400, "signature", f"the only signature is {_SIGNATURE}")
    forms = [key for key in ("instances", "inputs") if key in found]
    if len(forms) != 1:
        raise Refused(400, "json", 'the body must have either "instances" or "inputs"')
    instances = found[forms[0]]
    if forms[0] == "inputs" and isinstance(instances, dict) and instances.keys() == {_INPUT}:
        instances = instances[_INPUT]
    if not isinstance(instances, list):
        form = f'"{forms[0]}" must be a list of images'
        raise Refused(400, "json", form + (f', or {{"{_INPUT}": [...]}}' * (forms[0] == "inputs")))
    images = [_image(place, instance) for place, instance in enumerate(instances)]
    return images, {"instances": "predictions", "inputs": "outputs"}[forms[0]]


def _image(place: int, instance: Any) -> bytes | np.ndarray:
    """The image of an instance, which is the one at this place.

    Raises:
      Refused: There is none.
    """
    if isinstance(instance, dict) and instance.keys() == {_INPUT}:
        instance = instance[_INPUT]
    try:
        if not isinstance(instance, dict):
            return from_numbers(instance)
        if instance.keys() != {"b64"}:
            raise Refused(400, "image", 'an instance must be {"b64": "..."} or nested lists')
        return from_base64(instance["b64"])
    except Refused as refused:
        message = f"instance {place}: {refused}"
        raise Refused(refused.status, refused.reason, message) from refused


def _metadata(version: Version) -> dict[str, Any]:
    def tensor(name: str, dtype: str, *sizes: int) -> dict[str, Any]:
        dimensions = [{"size": str(size), "name": ""} for size in sizes]
        shape = {"dim": dimensions, "unknown_rank": False}
        return {"dtype": dtype, "tensor_shape": shape, "name": f"{name}:0"}

    signature = {
        "inputs": {_INPUT: tensor(_INPUT, "DT_STRING", -1)},
        "outputs": {_OUTPUT: tensor(_OUTPUT, "DT_FLOAT", -1, len(version.class_names))},
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {
            "name": version.model,
            "signature_name": "",
            "version": str(version.number),
        },
        "metadata": {
            "signature_def": {
                "@type": "type.googleapis.com/tensorflow.serving.SignatureDefMap",
                "signature_def": {_SIGNATURE: signature},
            },
        },
    }
