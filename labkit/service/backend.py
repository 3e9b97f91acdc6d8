"""What stands behind the service's door: the lab's engine here; `labkit.service.vllm.backend` has another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from labkit.common.errors import ApiError, LabError
from labkit.engine.engine import Engine
from labkit.service import log, writing
from labkit.service.chat import ChatService, Completion
from labkit.service.errors import as_api_error
from labkit.service.metrics import Metrics
from labkit.service.options import ALIAS, ServiceOptions
from labkit.service.replies import error_text
from labkit.service.scheduler import Scheduler
from labkit.service.schemas import read_request
from labkit.service.transport import EventStream, unless_gone

WARM_UP_TOKENS = 8
WARM_UP_SIZE = (224, 476)


class Backend(Protocol):
    """What the app asks for.

    Attributes:
        names: what clients may call the model; the first is its own.
        max_length: the model's context in tokens, or None.
        metrics: the service's counts.
        is_ready: a real answer has been generated.
        trouble: why it is not healthy, or None.
    """

    names: tuple[str, ...]
    max_length: int | None
    metrics: Metrics
    is_ready: bool
    trouble: str | None

    async def start(self) -> None:
        """Get ready, in the running event loop; returns at once."""

    async def stop(self) -> None:
        """End."""

    async def chat(self, document: Any, request: Request) -> Response:
        """Answer a chat request."""

    def facts(self) -> dict[str, Any]:
        """What the status page shows of the model and of the moment."""


def served_names(name: str, options: ServiceOptions) -> tuple[str, ...]:
    """The model's names: its own, the one it was given, and the one published clients use."""
    return tuple(dict.fromkeys(filter(None, (name.rpartition("/")[2], options.served_name, name, ALIAS))))


class EngineBackend:
    """The lab's own engine: see `Backend`.

    Args:
        engine: a loaded model.
        options: limits and times.
        on_ready: called once the warm-up answer is there.
    """

    def __init__(self, engine: Engine, options: ServiceOptions, on_ready: Callable[[], None] | None = None):
        parts = engine.resolved.bytes_by_role if engine.resolved is not None else {}
        self.engine, self.options = engine, options
        self.names = served_names(engine.spec.name, options)
        self.max_length = engine.max_length
        self.metrics = Metrics(parts)
        self.scheduler = Scheduler(engine, options, self.metrics.stepped)
        scheduler = self.scheduler
        self.metrics.watch(
            lambda: scheduler.running, lambda: scheduler.waiting, lambda: scheduler.cache_bytes
        )
        self.is_ready = False
        self._failure: str | None = None
        self._on_ready = on_ready or (lambda: None)
        self._chat = ChatService(engine, scheduler, options, self.metrics, self.names)
        self._warming: asyncio.Task | None = None

    @property
    def trouble(self) -> str | None:
        """Why the service is not healthy, or None."""
        return self._failure or self.scheduler.trouble

    async def start(self) -> None:
        """Start the engine's thread and the warm-up."""
        self.scheduler.start()
        self._warming = asyncio.create_task(self._warm_up())

    async def stop(self) -> None:
        """End threads and connections."""
        self._warming.cancel()
        await asyncio.to_thread(self.scheduler.stop)
        await self._chat.close()

    async def _warm_up(self) -> None:
        """Generate a real answer, with a picture where the model sees: libraries load, memory is taken."""
        content: list[dict[str, Any]] = [{"type": "text", "text": "hello"}]
        if "image" in self.engine.modalities:
            content.insert(0, {"type": "image", "image": Image.new("RGB", WARM_UP_SIZE, "white")})
        messages = [{"role": "user", "content": content}]
        limit = WARM_UP_TOKENS
        try:
            answer = await self.scheduler.prepare(
                lambda: self.engine.request(messages, max_new_tokens=limit, min_new_tokens=limit)
            )
            events: asyncio.Queue = asyncio.Queue()
            self.scheduler.submit(answer, 0, time.monotonic() + 3600, events)
            finished = None
            while finished is None:
                event = await events.get()
                if event.error is not None:
                    raise event.error
                finished = event.finish_reason
        except Exception as error:
            reason = str(error) if isinstance(error, LabError) else type(error).__name__
            self._failure = f"the warm-up failed: {reason}"
            log.fault("the warm-up failed", error)
            return
        self.is_ready = True
        self._on_ready()

    async def chat(self, document: Any, request: Request) -> Response:
        """One answer, whole or as a stream."""
        asked = read_request(document)
        del document  # base64 of megabytes, which would stay as long as the answer runs
        completion = await unless_gone(request, self._chat.start(asked))
        if asked.stream:
            return EventStream(_lines(completion), completion.close, self.metrics.abandoned)
        try:
            whole = await unless_gone(request, writing.whole(completion))
        finally:
            completion.close()
        return Response(whole.json_text(), media_type="application/json")

    def facts(self) -> dict[str, Any]:
        """See `Backend`."""
        engine, options = self.engine, self.options
        resolved, plan = engine.resolved, engine.plan
        return {
            "model": engine.spec.name,
            "description": engine.spec.description,
            "plan": plan.name if plan is not None else None,
            "plan_description": plan.description if plan is not None else "",
            "engine": "labkit",
            "device": str(engine.device),
            "modalities": ["text", *sorted(engine.modalities)],
            "context": engine.max_length,
            "parts": resolved.rows() if resolved is not None else [],
            "weights_bytes": resolved.predicted_bytes if resolved is not None else None,
            "running": self.scheduler.running,
            "waiting": self.scheduler.waiting,
            "cache_bytes": self.scheduler.cache_bytes,
            "streams": options.streams,
            "queue": options.queue,
            **self.metrics.facts(),
        }


async def _lines(completion: Completion) -> AsyncIterator[str]:
    """The stream's events; an error is one of them, and ``[DONE]`` always comes last."""
    try:
        async for chunk in writing.chunks(completion):
            yield chunk.json_text()
    except Exception as error:
        if not isinstance(error, ApiError):
            log.fault("a stream failed", error)
        yield error_text(as_api_error(error).body())
    yield "[DONE]"
