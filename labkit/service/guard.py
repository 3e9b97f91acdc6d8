"""Around every request: its host and key, its id, one line in the log, a count; and JSON for whatever went wrong."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from labkit.common.errors import ApiError
from labkit.service import log
from labkit.service.errors import as_api_error, stopping
from labkit.service.metrics import Metrics
from labkit.service.options import ServiceOptions
from labkit.service.replies import error_text
from labkit.service.transport import ClientGoneError

ALIVE = ("/health", "/ready")
ASSETS = ("/page.css", "/page.js")
OPEN = ("/", "/docs", "/docs.json", "/openapi.json", *ALIVE, *ASSETS)
"""What needs no key, and ``/docs-assets/``: it tells nothing of the model, nor of its work."""
QUIET = (*ALIVE, *ASSETS, "/metrics", "/status")
KNOWN = (*OPEN, "/screen.png", "/v1/chat/completions", "/v1/models", *QUIET)
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def error_response(error: ApiError) -> Response:
    """An error as a response."""
    return Response(error_text(error.body()), error.status, error.headers, "application/json")


class Guard:
    """ASGI middleware; see the module.

    Args:
        app: what it stands around.
        options: the key that all but `OPEN` asks for, and the host's names.
        metrics: counts responses.
    """

    def __init__(self, app: ASGIApp, options: ServiceOptions, metrics: Metrics):
        self._app, self._metrics = app, metrics
        self._key = options.api_key.encode() if options.api_key else None
        self._hosts = options.host_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; lifespan and others pass."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, started, status = Headers(scope=scope), time.monotonic(), 0
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["X-Request-Id"] = request_id
                sent["X-Content-Type-Options"] = "nosniff"
            await send(message)

        # HEAD is answered as GET is; the server leaves the body out. It reads the method in its own scope.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        gone = ""
        try:
            self._check_host(scope["path"], headers)
            self._check_key(scope["path"], headers)
            await self._app(inner, receive, send_with_id)
        except asyncio.CancelledError:  # uvicorn cancels what still runs at the end of --grace
            if status == 0:
                await error_response(stopping())(scope, receive, send_with_id)
        except ClientGoneError:
            gone = ", the client went away"
            self._metrics.abandoned()
        except Exception as error:
            if not isinstance(error, ApiError):
                log.fault(f"request {request_id}", error)
            if status == 0:
                await error_response(as_api_error(error))(scope, receive, send_with_id)
        path = _path(scope["path"])
        self._metrics.answered(path, status or 499)
        if scope["path"] not in QUIET:
            took = time.monotonic() - started
            log.info(f"{scope['method']} {path} {status or 499} in {took:.2f} s, request {request_id}{gone}")

    def _check_host(self, path: str, headers: Headers) -> None:
        if self._hosts is None or path in ALIVE or "host" not in headers:
            return
        name = _host_name(headers["host"])
        is_foreign = "." in name and not name.endswith(".localhost") and not _is_address(name)
        if is_foreign and name not in self._hosts:  # a name without a dot is no web page's
            raise ApiError(
                "the service is not called by this host's name; --allowed-hosts lets others in",
                403,
                code="host_not_allowed",
            )

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path in OPEN or path.startswith("/docs-assets/"):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode(), self._key)
        if kind.lower() != "bearer" or not is_right:
            what = "no API key was sent" if not given else "the API key is wrong"
            raise ApiError(
                f"{what}: send the header Authorization: Bearer KEY",
                401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _host_name(host: str) -> str:
    """The name in ``name:port`` or ``[address]:port``."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _path(path: str) -> str:
    """A path for log and counts: one of the service's own, never a client's invention."""
    if path in KNOWN:
        return path
    return "/v1/models/…" if path.startswith("/v1/models/") else "other"
