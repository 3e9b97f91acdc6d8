"""The pages for people: the status page at ``/``, and ``/docs``, which needs no network."""

from __future__ import annotations

import html
import importlib.resources
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from labkit.service.backend import Backend

PAGE = Path(__file__).with_name("page.html")
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)


def add_page(app: FastAPI, backend: Backend) -> None:
    """Add the pages."""
    swagger = importlib.resources.files("fastapi_offline") / "static"  # Swagger UI 5; its own app is not used
    app.mount("/docs-assets", StaticFiles(directory=str(swagger)), name="docs-assets")
    source = PAGE.read_text(encoding="utf-8").replace("{{model}}", html.escape(backend.names[0]))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def status_page() -> HTMLResponse:
        return HTMLResponse(source, headers={"Content-Security-Policy": _POLICY})

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="labkit's API",
            swagger_js_url="docs-assets/swagger-ui-bundle.js",
            swagger_css_url="docs-assets/swagger-ui.css",
            swagger_favicon_url="docs-assets/favicon.png",
        )
