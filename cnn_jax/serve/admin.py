"""The administration API: routes that reread the registry, and load or unload a version."""

from fastapi import APIRouter, Request

from cnn_jax.registry.ledger import RegistryError
from cnn_jax.serve.limits import Refused
from cnn_jax.serve.loader import Loader
from cnn_jax.serve.responses import JSONResponse
from cnn_jax.serve.service import Service, VersionNumber
from cnn_jax.system.errors import UserError


def make_router(service: Service) -> APIRouter:
    """Returns the routes of the administration API; each request needs an administrator's token."""
    router = APIRouter(prefix="/admin", tags=["administration"])

    seconds = service.limits.seconds

    def check_done(is_done: bool) -> None:
        if not is_done:
            message = f"not done after {seconds:g} s; the server continues with it"
            raise Refused(503, "late", message)

    def states(model: str) -> JSONResponse:
        versions = [
            {"version": number, "state": state, "problem": problem}
            for number, (state, problem) in sorted(service.models.states(model).items())
        ]
        return JSONResponse({"model": model, "versions": versions})

    async def set_extra(request: Request, model: str, version: int, is_extra: bool) -> JSONResponse:
        loader: Loader = request.app.state.loader
        try:
            check_done(await loader.set_extra(model, version, is_extra, seconds))
        except RegistryError as error:
            raise Refused(404, "no_version", str(error)) from error
        except UserError as error:
            raise Refused(503, "registry", "the registry does not answer") from error
        is_loaded = version in service.models.loaded(model)
        if is_extra and not is_loaded:
            _, problem = service.models.states(model).get(version, ("", "it is not served"))
            raise Refused(409, "not_loaded", problem)
        if is_loaded and not is_extra:
            message = "the version stays loaded, because an alias or --versions selects it"
            raise Refused(409, "in_use", message)
        return states(model)

    @router.post("/refresh", summary="Read the registry now")
    async def refresh(request: Request) -> JSONResponse:
        loader: Loader = request.app.state.loader
        check_done(await loader.synchronize_now(seconds))
        return JSONResponse({"models": service.models.names})

    @router.put("/models/{model}/versions/{version}", summary="Load a version")
    async def load(request: Request, model: str, version: VersionNumber) -> JSONResponse:
        return await set_extra(request, model, version, True)

    @router.delete("/models/{model}/versions/{version}", summary="Unload a version")
    async def unload(request: Request, model: str, version: VersionNumber) -> JSONResponse:
        return await set_extra(request, model, version, False)

    return router
