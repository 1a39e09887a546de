"""The web page and the API documentation page, which load no resources from other servers."""

import base64
import functools
import hashlib
import importlib.resources
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse

import cnn_jax
from cnn_jax.serve.responses import JSONResponse
from cnn_jax.serve.service import Service

_POLICY = (
    "default-src 'none'; img-src blob: data:; style-src 'unsafe-inline'; script-src {script}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_router(service: Service, app: FastAPI) -> APIRouter:
    """Returns the routes of the web pages and of their JSON data."""
    router = APIRouter(tags=["page"])
    script = importlib.resources.files("cnn_jax.serve").joinpath("page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    headers = {
        "content-security-policy": _POLICY.format(script=f"'sha256-{digest}'"),
        "permissions-policy": "camera=(self)",
    }

    @functools.cache
    def page() -> str:
        return _render("page.html", script=script)

    @router.head("/", include_in_schema=False)
    @router.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page(), headers=headers)

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    @router.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        routes = [
            {"method": method.upper(), "path": path, **route}
            for path, methods in app.openapi()["paths"].items()
            for method, route in methods.items()
        ]
        content = _render("docs.html", routes=routes)
        policy = _POLICY.format(script="'none'")
        return HTMLResponse(content, headers={"content-security-policy": policy})

    @router.get("/models", summary="Models and versions, with their test metrics")
    async def models() -> JSONResponse:
        return JSONResponse({"models": [_describe(service, name) for name in service.models.names]})

    return router


def _render(name: str, **values: Any) -> str:
    """Returns a page with the version of cnn_jax and other values."""
    # Jinja needs 4 MB and delays the start, so it is imported when a page is opened.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(f"cnn_jax.{package}", ".") for package in ("serve", "report")]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(values, version=cnn_jax.__version__)


def _describe(service: Service, model: str) -> dict[str, Any]:
    models = service.models
    loaded = models.loaded(model)
    versions = []
    for number, (state, problem) in sorted(models.states(model).items(), reverse=True):
        described: dict[str, Any] = {"version": number, "state": state}
        if problem:
            described["problem"] = problem
        if version := loaded.get(number):
            described |= {
                "digest": version.digest,
                "classes": len(version.class_names),
                "class_names": version.class_names,
                "image_size": list(version.preprocessing.image_size),
                "metrics": version.metrics,
                "loaded": version.load_time,
                "in_use": version.in_use,
            }
        versions.append(described)
    default = models.default(model)
    return {
        "name": model,
        "default": default.number if default else None,
        "aliases": models.aliases(model),
        "versions": versions,
    }
