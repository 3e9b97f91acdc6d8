"""Reading bodies within limits, sending streams to clients that may go away: what HTTP needs around an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from labkit.common.errors import ApiError
from labkit.service.errors import stopping
from labkit.service.options import ServiceOptions
from labkit.service.replies import error_text

T = TypeVar("T")
SEND_S = 60.0
"""Seconds that a client may take to read one piece of a stream."""
LAST_WORDS_S = 1.0
"""Seconds that a client may take to read why its stream ends before the answer does."""
DRAIN_BYTES = 256 * 2**20
"""How much of a body over the limit is read and dropped, so that its sender gets to read the answer."""
SMALL_BODY = 64 * 2**10
"""Bytes up to which a body is always read, and parsed at once."""
BODIES_AT_A_TIME = 8
"""How many of the largest bodies the service holds at a time."""
MAX_VALUES = 2**18
"""Values of a JSON document, at most: each takes some time and memory, and the event loop waits meanwhile."""
_DOCUMENT = TypeAdapter(Any)


class ClientGoneError(Exception):
    """The client went away: nobody reads the answer."""


class Bodies:
    """The bytes of all bodies that are held now, bounded together."""

    def __init__(self, options: ServiceOptions):
        self._limit = BODIES_AT_A_TIME * options.max_body_bytes
        self.held = 0

    @contextmanager
    def counted(self) -> Iterator[Callable[[int], None]]:
        """Gives what counts a body's bytes as they come; they are held until the block ends.

        Raises:
            ApiError: 429, from the function: other bodies hold too much.
        """
        mine = 0

        def count(size: int) -> None:
            nonlocal mine
            mine += size
            self.held += size
            if self.held > self._limit and mine > SMALL_BODY:
                raise ApiError(
                    "the service is busy with other large requests; try again later",
                    429,
                    code="queue_full",
                    headers={"Retry-After": "2", "Connection": "close"},
                )

        try:
            yield count
        finally:
            self.held -= mine


async def read_document(request: Request, options: ServiceOptions, count: Callable[[int], None]) -> Any:
    """The JSON of a request's body, whose bytes are counted as they come.

    Raises:
        ApiError: not JSON by its type (415) or content, too large (413), too slow (408), too much at a time (429).
        ClientGoneError: half a body.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError("the body's Content-Type must be application/json", 415, code="unsupported_media_type")
    try:
        async with asyncio.timeout(options.body_s):
            body = await _read(request, options.max_body_bytes, count)
    except TimeoutError:
        raise ApiError(f"the body was not there within {options.body_s:g} s", 408, code="timeout") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    if len(body) <= SMALL_BODY:
        return parse_json(body)
    return await asyncio.to_thread(parse_json, body)


async def _read(request: Request, limit: int, count: Callable[[int], None]) -> bytes:
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            count(len(chunk))
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
    """A JSON document; its depth is limited, and so are its numbers and the number of its values.

    Raises:
        ApiError: what is wrong, without quoting the body.
    """
    if body.count(b",") > MAX_VALUES:  # in strings too, but no context holds a text with so many
        raise ApiError(
            f"the body has more than {MAX_VALUES:,} values, counted by their commas", code="too_many_values"
        )
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
        self._begun = False

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
        except asyncio.CancelledError:  # uvicorn cancels what still runs at the end of --grace
            sending.cancel()
            await asyncio.wait({sending})
            await self._end(send)
        finally:
            sending.cancel()
            gone.cancel()
            self._close()

    async def _end(self, send: Send) -> None:
        """Tell the reader of a stream that it is not finished."""
        if not self._begun:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(LAST_WORDS_S):
                for line in (error_text(stopping().body()), "[DONE]"):
                    await self._send_line(send, line)
                await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send) -> None:
        self._begun = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for line in self._lines:
            async with asyncio.timeout(SEND_S):
                await self._send_line(send, line)
        await send({"type": "http.response.body", "body": b""})

    async def _send_line(self, send: Send, line: str) -> None:
        await send({"type": "http.response.body", "body": f"data: {line}\n\n".encode(), "more_body": True})
