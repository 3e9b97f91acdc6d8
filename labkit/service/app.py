"""The HTTP interface: routes in front of a backend."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from labkit import __version__
from labkit.common.errors import ApiError
from labkit.service import page
from labkit.service.backend import Backend
from labkit.service.guard import Guard, error_response
from labkit.service.options import ServiceOptions
from labkit.service.replies import ChatCompletion, ErrorReply, ModelCard, ModelList
from labkit.service.schemas import ChatRequest
from labkit.service.transport import Bodies, read_document

_ERRORS = {
    status: {"model": ErrorReply, "description": description}
    for status, description in (
        (400, "a field is wrong; `param` names it"),
        (401, "the API key is missing or wrong"),
        (404, "no such model"),
        (408, "the body came too slowly"),
        (413, "the body is too large"),
        (415, "the body is not declared as JSON"),
        (429, "the queue is full; try again after `Retry-After` seconds"),
        (500, "the service failed"),
        (503, "the service is not ready, or being stopped"),
        (504, "the answer took too long"),
    )
}
_STREAMED = {
    "description": "the answer; with `stream` its chunks as events, the last of them `[DONE]`",
    "content": {
        "text/event-stream": {
            "schema": {
                "type": "object",
                "description": "one event",
                "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
                "required": ["data"],
            }
        }
    },
}


def build_app(backend: Backend, options: ServiceOptions) -> FastAPI:
    """The app in front of a backend; starts and stops it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        yield
        await backend.stop()

    app = FastAPI(
        title="labkit",
        version=__version__,
        description="An OpenAI-compatible service of one quantized model.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_handlers(app)
    _add_chat(app, backend, options)
    _add_state(app, backend)
    page.add_page(app, backend)
    app.add_middleware(Guard, options=options, metrics=backend.metrics)
    if options.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=[options.cors_origin], allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def misunderstood(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return error_response(ApiError(f"{name}: {first['msg']}", param=name, code=first["type"]))

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> Response:
        messages = {404: "there is nothing at this address", 405: "this address takes another method"}
        codes = {404: "not_found", 405: "method_not_allowed"}
        return error_response(
            ApiError(
                messages.get(error.status_code, "the request cannot be served"),
                error.status_code,
                code=codes.get(error.status_code),
                headers=error.headers,
            )
        )


def _add_chat(app: FastAPI, backend: Backend, options: ServiceOptions) -> None:
    bodies = Bodies(options)
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs")
    body = {"required": True, "content": {"application/json": {"schema": schema}}}

    @app.post(
        "/v1/chat/completions",
        summary="Answer a conversation, whole or as a stream of server-sent events",
        response_model=ChatCompletion,
        responses={200: _STREAMED, **_ERRORS},
        openapi_extra={"requestBody": body},
        tags=["OpenAI"],
    )
    async def chat(request: Request) -> Response:
        with bodies.counted() as count:
            return await backend.chat(await read_document(request, options, count), request)

    def cards() -> dict[str, ModelCard]:
        created = int(backend.metrics.started)
        return {
            name: ModelCard(
                id=name,
                object="model",
                created=created,
                owned_by="labkit",
                root=backend.names[0],
                max_model_len=backend.max_length,
            )
            for name in backend.names
        }

    @app.get("/v1/models", summary="The model's names", response_model=ModelList, tags=["OpenAI"])
    async def models() -> Response:
        return _json(ModelList(object="list", data=list(cards().values())).json_text())

    @app.get(
        "/v1/models/{name:path}",
        summary="One of them",
        response_model=ModelCard,
        responses={404: _ERRORS[404]},
        tags=["OpenAI"],
    )
    async def model(name: str) -> Response:
        card = cards().get(name)
        if card is None:
            raise ApiError(
                f"this model does not exist; known: {', '.join(backend.names)}",
                404,
                param="model",
                code="model_not_found",
            )
        return _json(card.json_text())

    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            plain()["components"]["schemas"].update(definitions)
        return app.openapi_schema

    app.openapi = openapi


def _add_state(app: FastAPI, backend: Backend) -> None:
    unwell = {503: _ERRORS[503]}

    @app.get("/health", summary="Is the service alive?", responses=unwell, tags=["State"])
    async def health() -> JSONResponse:
        if backend.trouble:
            raise ApiError(backend.trouble, 503, code="unhealthy")
        return JSONResponse({"status": "ok"})

    @app.get("/ready", summary="Has a real answer been generated?", responses=unwell, tags=["State"])
    async def ready() -> JSONResponse:
        if backend.trouble:
            raise ApiError(backend.trouble, 503, code="unhealthy")
        if not backend.is_ready:
            raise ApiError("the model is warming up", 503, code="not_ready", headers={"Retry-After": "1"})
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", summary="Counts for Prometheus", response_class=Response, tags=["State"])
    async def metrics() -> Response:
        return Response(backend.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status", summary="What the status page shows", tags=["State"])
    async def status() -> JSONResponse:
        return JSONResponse(
            {
                **backend.facts(),
                "names": backend.names,
                "ready": backend.is_ready,
                "trouble": backend.trouble,
                "time": time.time(),
            }
        )


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")
