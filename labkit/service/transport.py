"""Reading bodies within limits, sending streams to clients that may go away: what HTTP needs around an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from labkit.common.errors import ApiError
from labkit.service.options import ServiceOptions

T = TypeVar("T")
SEND_S = 60.0
"""Seconds that a client may take to read one piece of a stream."""
DRAIN_BYTES = 256 * 2**20
"""How much of a body over the limit is read and dropped, so that its sender gets to read the answer."""
SMALL_BODY = 64 * 2**10
_DOCUMENT = TypeAdapter(Any)


class ClientGoneError(Exception):
    """The client went away: nobody reads the answer."""


async def read_document(request: Request, options: ServiceOptions) -> Any:
    """The JSON of a request's body.

    Raises:
        ApiError: not JSON by its type (415) or content, too large (413), too slow (408).
        ClientGoneError: half a body.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError("the body's Content-Type must be application/json", 415, code="unsupported_media_type")
    try:
        async with asyncio.timeout(options.body_s):
            body = await _read(request, options.max_body_bytes)
    except TimeoutError:
        raise ApiError(f"the body was not there within {options.body_s:g} s", 408, code="timeout") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    if len(body) <= SMALL_BODY:
        return parse_json(body)
    return await asyncio.to_thread(parse_json, body)


async def _read(request: Request, limit: int) -> bytes:
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            body += chunk
        elif size > limit + DRAIN_BYTES:
            break
        else:
            body.clear()
    if size > limit:
        raise ApiError(
            f"the body is larger than {limit:,} bytes",
            413,
            code="body_too_large",
            headers={"Connection": "close"},
        )
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """A JSON document; depth is limited, and numbers are too.

    Raises:
        ApiError: what is wrong, without quoting the body.
    """
    try:
        return _DOCUMENT.validate_json(body)
    except ValidationError as error:
        reason = error.errors(include_url=False, include_input=False)[0]["ctx"]["error"]
        raise ApiError(f"the body is not valid JSON: {reason}", code="invalid_json") from None


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await ``work``, or cancel it when the client goes away.

    Raises:
        ClientGoneError: it did.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await gone
        if not working.done():
            with suppress(asyncio.CancelledError, Exception):
                await working


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. Ends early when the client goes away, or reads nothing for `SEND_S` seconds.

    Args:
        lines: the events' data, each one line.
        close: called at the end, however it came.
        on_gone: called if the client went away.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        lines: AsyncIterator[str],
        close: Callable[[], None],
        on_gone: Callable[[], None] = lambda: None,
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._lines, self._close, self._on_gone = lines, close, on_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                self._on_gone()
                sending.cancel()
            with suppress(asyncio.CancelledError, TimeoutError, OSError):
                await sending
        finally:
            sending.cancel()
            gone.cancel()
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for line in self._lines:
            async with asyncio.timeout(SEND_S):
                await send(
                    {"type": "http.response.body", "body": f"data: {line}\n\n".encode(), "more_body": True}
                )
        await send({"type": "http.response.body", "body": b""})
