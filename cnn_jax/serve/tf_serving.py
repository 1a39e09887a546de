"""The REST protocol of TensorFlow Serving.

The server implements status, metadata and predict as TensorFlow Serving's page "RESTful API"
describes them. An instance is an image file in base64, `{"b64": "..."}`, or nested lists of grey
levels, [height, width, 3] of any size. An instance may also be an object that has the image under
the key "image", which is the name of the input.
"""

from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from cnn_jax.serve.images import decode_base64, parse_json, parse_pixels
from cnn_jax.serve.limits import Limits, Refused, cancel_on_disconnect
from cnn_jax.serve.responses import JSONResponse
from cnn_jax.serve.service import Service, VersionNumber, probability_rows
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
    """Returns the routes of TensorFlow Serving's protocol."""
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
        async with (
            service.body(request, version) as body,
            cancel_on_disconnect(request.receive),
        ):
            images, key = await service.parse(lambda: _images(body, service.limits), request)
            answers = await service.answer(version, images, request)
        rows = probability_rows(answers, "instance")
        return JSONResponse({key: [row.tolist() for row in rows]})

    options: dict[str, Any] = {"openapi_extra": {"requestBody": _BODY}}

    @router.post("/{model}:predict", summary="Classify images with a model", **options)
    async def predict_model(request: Request, model: str) -> JSONResponse:
        return await predict(request, service.select(request, model))

    @router.post(
        "/{model}/versions/{version}:predict", summary="Classify images with a version", **options
    )
    async def predict_version(request: Request, model: str, version: VersionNumber) -> JSONResponse:
        return await predict(request, service.select(request, model, version))

    @router.post(
        "/{model}/labels/{alias}:predict", summary="Classify images with an alias", **options
    )
    async def predict_alias(request: Request, model: str, alias: str) -> JSONResponse:
        return await predict(request, service.select(request, model, alias=alias))

    # Register the routes that end with a verb (":predict") first, because {model} in the routes
    # below would also match the verb.
    for path in ("/{model}", "/{model}/versions/{version}", "/{model}/labels/{alias}"):

        @router.api_route(f"{path}:{{verb}}", methods=["GET", "POST"], include_in_schema=False)
        async def refuse_verb(request: Request, verb: str) -> JSONResponse:
            if verb == "predict":
                message = "this path does not support GET; use POST"
                raise Refused(405, "route", message, allow="POST")
            if verb in ("classify", "regress"):
                raise Refused(
                    400,
                    "signature",
                    f":{verb} takes tf.Example records, which this server does not support; send "
                    "images to :predict, which answers with all probabilities",
                )
            raise Refused(404, "route", f"there is no :{verb[:100]}; use :predict")

    @router.get("/{model}", summary="Status of all versions")
    async def model_status(model: str) -> JSONResponse:
        return status(model)

    @router.get("/{model}/versions/{version}", summary="Status of a version")
    async def version_status(model: str, version: VersionNumber) -> JSONResponse:
        return status(model, version)

    @router.get("/{model}/labels/{alias}", summary="Status of an alias")
    async def alias_status(model: str, alias: str) -> JSONResponse:
        return status(model, models.find(model, alias=alias).number)

    @router.get("/{model}/metadata", summary="Inputs and outputs of a model")
    async def model_metadata(model: str) -> JSONResponse:
        return JSONResponse(_metadata(models.find(model)))

    @router.get("/{model}/versions/{version}/metadata", summary="Inputs and outputs of a version")
    async def version_metadata(model: str, version: VersionNumber) -> JSONResponse:
        return JSONResponse(_metadata(models.find(model, version)))

    @router.get("/{model}/labels/{alias}/metadata", summary="Inputs and outputs of an alias")
    async def alias_metadata(model: str, alias: str) -> JSONResponse:
        return JSONResponse(_metadata(models.find(model, alias=alias)))

    return router


def _images(body: bytes, limits: Limits) -> tuple[list[bytes | np.ndarray], str]:
    """Returns the images in a request's body, and the key of the predictions in the response.

    Raises:
      Refused: The body is not a request of this protocol, or has too many images.
    """
    fields = parse_json(body)
    signature = fields.get("signature_name", _SIGNATURE)
    if signature not in (_SIGNATURE, ""):
        raise Refused(400, "signature", f"the only signature is {_SIGNATURE}")
    keys = [key for key in ("instances", "inputs") if key in fields]
    if len(keys) != 1:
        raise Refused(400, "json", 'the body must have either "instances" or "inputs"')
    (key,) = keys
    instances = fields[key]
    if key == "inputs" and isinstance(instances, dict) and instances.keys() == {_INPUT}:
        instances = instances[_INPUT]
    if not isinstance(instances, list):
        alternative = f', or {{"{_INPUT}": [...]}}' if key == "inputs" else ""
        raise Refused(400, "json", f'"{key}" must be a list of images{alternative}')
    limits.check_count(len(instances))
    images = [_image(index, instance) for index, instance in enumerate(instances)]
    return images, {"instances": "predictions", "inputs": "outputs"}[key]


def _image(index: int, instance: Any) -> bytes | np.ndarray:
    """Returns the image of the element `index` of "instances" or "inputs".

    Raises:
      Refused: The instance is not an image.
    """
    if isinstance(instance, dict) and instance.keys() == {_INPUT}:
        instance = instance[_INPUT]
    try:
        if not isinstance(instance, dict):
            return parse_pixels(instance)
        if instance.keys() != {"b64"}:
            raise Refused(400, "image", 'an instance must be {"b64": "..."} or nested lists')
        return decode_base64(instance["b64"])
    except Refused as refused:
        message = f"instance {index}: {refused}"
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
