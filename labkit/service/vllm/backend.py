"""vLLM behind the service's door: requests are checked here, translated, and sent on; answers come back the same way.

What differs between the two engines is evened out: thinking is split off here, the action grammar is sent as a
grammar, wrong requests are refused with the same words, and a full queue answers 429.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response

from labkit.common.errors import ApiError
from labkit.service import log
from labkit.service.conversation import check_media
from labkit.service.errors import as_api_error
from labkit.service.media import Media
from labkit.service.metrics import Metrics
from labkit.service.options import ServiceOptions
from labkit.service.replies import error_text
from labkit.service.schemas import ChatRequest, read_request
from labkit.service.transport import EventStream, unless_gone
from labkit.service.vllm.reply import ReplyTranslator
from labkit.service.vllm.request import translated

WAIT_S = 0.5
WARM_UP = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}


class VllmBackend:
    """See `labkit.service.backend.Backend`.

    Args:
        process: vLLM.
        url: where it listens.
        names: what it was told that it is called.
        options: limits and times.
        model_facts: what the status page shows of the model.
        on_ready: called once a warm-up answer is there.
        transport: for tests.
    """

    def __init__(
        self,
        process: subprocess.Popen,
        url: str,
        names: Sequence[str],
        options: ServiceOptions,
        model_facts: dict[str, Any],
        on_ready: Callable[[], None] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self.names, self.options = tuple(names), options
        self.max_length: int | None = None
        self.metrics = Metrics({})
        self.is_ready = False
        self._process, self._facts = process, model_facts
        self._held = 0
        self._on_ready = on_ready or (lambda: None)
        self._http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=None, transport=transport)
        self._media = Media(options)
        self._warming: asyncio.Task | None = None
        self.metrics.watch(
            lambda: min(self._held, options.streams), lambda: max(self._held - options.streams, 0), lambda: 0
        )

    @property
    def trouble(self) -> str | None:
        """Why the service is not healthy, or None."""
        code = self._process.poll()
        return None if code is None else f"vLLM has ended with code {code}; the log says why"

    async def start(self) -> None:
        """Wait for vLLM in the background."""
        self._warming = asyncio.create_task(self._warm_up())

    async def stop(self) -> None:
        """Let go of connections."""
        self._warming.cancel()
        await self._http.aclose()
        await self._media.close()

    async def _warm_up(self) -> None:
        while self.trouble is None:
            try:
                answer = await self._http.post(
                    "/v1/chat/completions", json={"model": self.names[0], **WARM_UP}
                )
                if answer.status_code == 200:
                    cards = (await self._http.get("/v1/models")).json()["data"]
                    self.max_length = cards[0].get("max_model_len")
                    self.is_ready = True
                    self._on_ready()
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(WAIT_S)
        log.warning(self.trouble)

    async def chat(self, document: Any, request: Request) -> Response:
        """One answer, whole or as a stream."""
        asked = read_request(document)
        if asked.model not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                f"this model does not exist; known: {known}", 404, param="model", code="model_not_found"
            )
        if (asked.n or 1) > self.options.max_choices:
            raise ApiError(f"n: at most {self.options.max_choices} answers to one request", param="n")
        check_media(asked.messages, self.options)
        self._admit(asked.n or 1)
        release = self._releaser(asked.n or 1)
        try:
            body = await unless_gone(request, self._translate(asked, document))
            if asked.stream:
                lines = self._stream(asked, body)
                first = await unless_gone(request, anext(lines))
                return EventStream(_with_first(first, lines), release, self.metrics.abandoned)
            whole = await unless_gone(request, self._whole(asked, body))
        except BaseException:
            release()
            raise
        release()
        return Response(json.dumps(whole, ensure_ascii=False), media_type="application/json")

    async def _translate(self, asked: ChatRequest, document: dict[str, Any]) -> dict[str, Any]:
        """vLLM's form; media are decoded once here, so that what is broken is refused in the same words."""
        fetched = await self._media.fetch(asked.messages)
        async with self._media.decoded(asked.messages, fetched, self._seconds(asked)) as decoded:
            return await asyncio.to_thread(translated, asked, document, self.options, decoded)

    async def _whole(self, asked: ChatRequest, body: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        async with self._deadline(asked):
            try:
                answer = await self._http.post("/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                raise self._unreachable(error) from None
        if answer.status_code != 200:
            raise _error_of(answer)
        whole = ReplyTranslator(asked).whole(answer.json())
        self.metrics.first_token(time.monotonic() - started)
        self._count(whole.get("usage"), started)
        return whole

    async def _stream(self, asked: ChatRequest, body: dict[str, Any]) -> AsyncIterator[str]:
        """Events of the answer, one a line; the first is awaited before the stream begins."""
        started, translator, begun, usage = time.monotonic(), ReplyTranslator(asked), False, None
        try:
            async with (
                self._deadline(asked),
                self._http.stream("POST", "/v1/chat/completions", json=body) as answer,
            ):
                if answer.status_code != 200:
                    await answer.aread()
                    raise _error_of(answer)
                async for line in answer.aiter_lines():
                    data = line.removeprefix("data: ")
                    if not line.startswith("data: ") or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ApiError("vLLM failed; the service's log says more", 500)
                    usage = chunk.get("usage") or usage
                    for made in translator.chunks(chunk):
                        if not begun:
                            self.metrics.first_token(time.monotonic() - started)
                        begun = True
                        yield json.dumps(made, ensure_ascii=False)
        except Exception as error:
            reason = self._unreachable(error) if isinstance(error, httpx.HTTPError) else as_api_error(error)
            if not begun:
                raise reason from None
            yield error_text(reason.body())
        self._count(usage, started)
        yield "[DONE]"

    def _count(self, usage: dict[str, Any] | None, started: float) -> None:
        took = time.monotonic() - started
        self.metrics.finished((usage or {}).get("prompt_tokens", 0), took)
        self.metrics.stepped((usage or {}).get("completion_tokens", 0), took)

    def _admit(self, count: int) -> None:
        room = self.options.streams + self.options.queue
        if self._held + count > room:
            raise ApiError(
                f"the service is busy: {self._held} answers run or wait, of {room} at most; try again later",
                429,
                code="queue_full",
                headers={"Retry-After": "2"},
            )
        self._held += count

    def _releaser(self, count: int) -> Callable[[], None]:
        left = [count]

        def release() -> None:
            self._held -= left[0]
            left[0] = 0

        return release

    def _deadline(self, asked: ChatRequest) -> Any:
        return _Deadline(self._seconds(asked))

    def _seconds(self, asked: ChatRequest) -> float:
        return min(asked.timeout or self.options.timeout_s, self.options.timeout_s)

    def _unreachable(self, error: Exception) -> ApiError:
        log.warning(f"vLLM does not answer: {type(error).__name__}")
        return ApiError(self.trouble or "the model is not ready yet", 503, code="not_ready")

    def facts(self) -> dict[str, Any]:
        """See `Backend`."""
        return {
            **self._facts,
            "context": self.max_length,
            "running": min(self._held, self.options.streams),
            "waiting": max(self._held - self.options.streams, 0),
            "cache_bytes": None,
            "streams": self.options.streams,
            "queue": self.options.queue,
            **self.metrics.facts(),
        }


class _Deadline:
    """`asyncio.timeout`, told as an error of the API."""

    def __init__(self, seconds: float):
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError:
            raise ApiError("the answer took too long and was given up", 504, code="timeout") from None


async def _with_first(first: str, lines: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for line in lines:
        yield line


def _error_of(answer: httpx.Response) -> ApiError:
    """vLLM's own refusal, in its words; a fault of its is told as one."""
    try:
        told = answer.json()
        message = str(told.get("error", told).get("message", ""))[:500]
    except (ValueError, AttributeError):
        message = ""
    if answer.status_code >= 500 or not message:
        return ApiError("vLLM failed; the service's log says more", 500, code="internal_error")
    code = "context_length_exceeded" if "context length" in message else None
    return ApiError(message, answer.status_code, param="messages" if code else None, code=code)
