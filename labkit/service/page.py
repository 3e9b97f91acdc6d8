"""The pages for people: the status page at ``/``, and ``/docs``; neither needs a network."""

from __future__ import annotations

import html
import importlib.resources
import io
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from labkit.phonetap import draw_screen
from labkit.service.backend import Backend

FOLDER = Path(__file__).parent
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


def add_page(app: FastAPI, backend: Backend) -> None:
    """Add the pages and what they load."""
    swagger = importlib.resources.files("fastapi_offline") / "static"  # Swagger UI 5; its own app is not used
    app.mount("/docs-assets", StaticFiles(directory=str(swagger)), name="docs-assets")
    files = {
        name: (FOLDER / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    }
    page = files["page.html"].replace("{{model}}", html.escape(backend.names[0]))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def status_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @app.get("/page.css", include_in_schema=False)
    async def style() -> Response:
        return Response(files["page.css"], media_type="text/css")

    @app.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return Response(files["page.js"], media_type="text/javascript")

    @app.get("/screen.png", include_in_schema=False)
    def screen(seed: Annotated[int, Query(ge=0, lt=2**31)] = 0) -> Response:
        buffer = io.BytesIO()
        draw_screen(seed).image.save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    @app.get("/docs.json", include_in_schema=False)
    async def description() -> JSONResponse:
        """The API's description with addresses that hold behind JupyterLab's proxy too."""
        return JSONResponse({**app.openapi(), "servers": [{"url": "./"}]})

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="docs.json",
            title="labkit's API",
            swagger_js_url="docs-assets/swagger-ui-bundle.js",
            swagger_css_url="docs-assets/swagger-ui.css",
            swagger_favicon_url="docs-assets/favicon.png",
        )
