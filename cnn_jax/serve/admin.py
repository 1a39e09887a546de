"""What an administrator may do: look for versions now, and have others be there besides."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from cnn_jax.registry.ledger import RegistryError
from cnn_jax.serve.limits import Refused
from cnn_jax.serve.loader import Loader
from cnn_jax.serve.service import Service, VersionNumber
from cnn_jax.system.errors import UserError


def make_router(service: Service) -> APIRouter:
    """The routes; they need an administrator's token."""
    router = APIRouter(prefix="/admin", tags=["administration"])

    seconds = service.limits.seconds

    def in_time(is_done: bool) -> None:
        if not is_done:
            raise Refused(503, "late", f"not done after {seconds:g} s; it goes on")

    def states(model: str) -> JSONResponse:
        found = service.models.states(model).items()
        versions = [
            {"version": number, "state": state, "problem": problem}
            for number, (state, problem) in sorted(found)
        ]
        return JSONResponse({"model": model, "versions": versions})

    async def want(request: Request, model: str, version: int, is_wanted: bool) -> JSONResponse:
        loader: Loader = request.app.state.loader
        try:
            in_time(await loader.want(model, version, is_wanted, seconds))
        except RegistryError as error:
            raise Refused(404, "no_version", str(error)) from error
        except UserError as error:
            raise Refused(503, "registry", "the registry cannot be asked") from error
        is_there = version in service.models.present(model)
        if is_wanted and not is_there:
            _, problem = service.models.states(model).get(version, ("", "it is not served"))
            raise Refused(409, "not_loaded", problem)
        if is_there and not is_wanted:
            raise Refused(409, "in_use", "it is served in any case, by an alias or --versions")
        return states(model)

    @router.post("/refresh", summary="Look for versions now")
    async def refresh(request: Request) -> JSONResponse:
        loader: Loader = request.app.state.loader
        in_time(await loader.look_again(seconds))
        return JSONResponse({"models": service.models.names})

    @router.put("/models/{model}/versions/{version}", summary="Have a version be there besides")
    async def bring(request: Request, model: str, version: VersionNumber) -> JSONResponse:
        return await want(request, model, version, True)

    @router.delete("/models/{model}/versions/{version}", summary="Let it go again")
    async def let_go(request: Request, model: str, version: VersionNumber) -> JSONResponse:
        return await want(request, model, version, False)

    return router
