"""Chat completions: from a checked request to prepared answers, and to the events that tell them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from labkit.common.errors import ApiError, GrammarError, LabError
from labkit.common.marks import OPEN
from labkit.engine.engine import Engine
from labkit.engine.generation import RunningAnswer
from labkit.engine.grammar import Grammar
from labkit.service.choice import ChoiceReader, News, thinks_apart
from labkit.service.conversation import check_media
from labkit.service.engine_settings import longest_answer, settings_of
from labkit.service.errors import as_api_error
from labkit.service.media import Media
from labkit.service.metrics import Metrics
from labkit.service.options import ServiceOptions
from labkit.service.scheduler import Event, Job, Scheduler
from labkit.service.schema_limits import narrowed
from labkit.service.schemas import ChatRequest
from labkit.service.tools import ToolUse, call_schema, describe, tool_use


class ChatService:
    """Answers chat requests with one engine.

    Args:
        engine: a loaded model.
        scheduler: its thread.
        options: limits.
        metrics: told what happens.
        names: what clients may call the model; the first is its own.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        options: ServiceOptions,
        metrics: Metrics,
        names: Sequence[str],
    ):
        self.engine, self.scheduler, self.options = engine, scheduler, options
        self.metrics, self.names = metrics, tuple(names)
        self.media = Media(options)

    async def close(self) -> None:
        """Let go of threads and connections."""
        await self.media.close()

    async def start(self, request: ChatRequest) -> Completion:
        """Check everything, prepare the prompt and queue its answers; wait for the first token of one of them.

        So whatever is wrong is known before a stream begins. The completion must be closed.

        Raises:
            ApiError: what is wrong, or that the service is busy.
        """
        if request.model not in self.names:
            raise ApiError(
                f"the model {request.model[:100]!r} does not exist; known: {', '.join(self.names)}",
                404,
                param="model",
                code="model_not_found",
            )
        count = request.n or 1
        if count > self.options.max_choices:
            raise ApiError(f"n: at most {self.options.max_choices} answers to one request", param="n")
        check_media(request.messages, self.options)
        tools = tool_use(request)
        if tools.must and request.response_format and request.response_format.type != "text":
            raise ApiError("a tool call and a response_format exclude each other", param="response_format")
        self.scheduler.admit(count)
        completion = Completion(self, request, count)
        try:
            await completion.begin(tools)
        except BaseException:
            completion.close()
            raise
        return completion


class Completion:
    """One request being answered; `labkit.service.writing` makes OpenAI's objects of it.

    Attributes:
        request, count: what was asked for, and how many answers to it.
        readers: one for each answer, with what has come of it.
        id, created: of the reply.
        prompt_tokens: tokens in.
        fingerprint: names what answers: the lab and its plan.
    """

    def __init__(self, chat: ChatService, request: ChatRequest, count: int):
        self._chat, self.request, self.count = chat, request, count
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._first: Event | None = None
        self._jobs: list[Job] = []
        self.readers: list[ChoiceReader] = []
        self._started = time.monotonic()
        self._closed = False
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.prompt_tokens = 0
        plan = chat.engine.plan
        self.fingerprint = f"labkit-{plan.name if plan is not None else 'plain'}"

    async def begin(self, tools: ToolUse) -> None:
        """Decode, prepare, queue, and wait for the first event."""
        chat, request = self._chat, self.request
        limit = min(request.timeout or chat.options.timeout_s, chat.options.timeout_s)
        deadline = self._started + limit
        answers, opened = await self._prepared(tools, limit)
        self.prompt_tokens = answers[0].generation.prompt_tokens
        for index, answer in enumerate(answers):
            self.readers.append(
                ChoiceReader(
                    index,
                    apart=thinks_apart(request, tools),
                    opened=opened,
                    tools=tools,
                    tags=request.keeps_tags,
                    grammars=chat.engine.grammars if request.logprobs else None,
                )
            )
            self._jobs.append(chat.scheduler.submit(answer, index, deadline, self._events))
        self._first = await self._events.get()
        if self._first.error is not None:
            raise self._first.error
        chat.metrics.first_token(time.monotonic() - self._started)

    async def _prepared(self, tools: ToolUse, seconds: float) -> tuple[list[RunningAnswer], bool]:
        """As `_prepare`; the media are let go of when it returns, as the engine has its tensors then."""
        chat, conversation = self._chat, self.request.messages
        fetched = await chat.media.fetch(conversation)
        async with chat.media.decoded(conversation, fetched, seconds) as messages:
            prepared = await chat.scheduler.prepare(lambda: self._prepare(messages, tools))
        conversation.clear()  # base64 of megabytes, which would stay as long as the answer runs
        return prepared

    def _prepare(self, messages: list[dict[str, Any]], tools: ToolUse) -> tuple[list[RunningAnswer], bool]:
        """In the preparing thread: the answers, and whether the prompt ends in ``<think>``."""
        chat, request = self._chat, self.request
        if tools.functions:
            messages.insert(0, {"role": "system", "content": describe(tools)})
        schema = call_schema(tools.functions) if tools.must else None
        try:
            thinking = chat.options.thinking if request.thinks is None else request.thinks
            inputs = chat.engine.prepare(messages, thinking)
            tail = chat.engine.processor.tokenizer.decode(inputs["input_ids"][0, -8:].tolist())
            opened = tail.rstrip().endswith(OPEN)
            grammar = self._grammar(schema, "open" if opened else "may" if thinking else "none")
            if request.logprobs:
                _ = (
                    chat.engine.grammars.tokenizer.view
                )  # tokens' bytes; refused here where they are not to be had
            answers = [
                chat.engine.request(messages, grammar=grammar, inputs=inputs, **settings)
                for settings in settings_of(request, chat.options, self.count)
            ]
        except GrammarError as error:
            raise as_api_error(error, "response_format" if schema is None else "tools") from None
        except LabError as error:
            raise as_api_error(error, _field_of(error)) from None
        except ValueError:  # what processors say of media that they cannot take
            raise ApiError(
                f"{chat.engine.spec.name} cannot take these messages: an image or a recording does not suit it",
                param="messages",
            ) from None
        return answers, opened

    def _grammar(self, schema: dict | None, thinking: str) -> Grammar | None:
        grammars, wanted = self._chat.engine.grammars, self.request.response_format
        if schema is None:
            if wanted is None or wanted.type == "text":
                return None
            if wanted.type != "json_schema":
                return grammars.grammar(wanted.type, thinking=thinking)
            schema = wanted.json_schema.schema_
        tokens = longest_answer(self.request, self._chat.options)
        return grammars.grammar("json_schema", narrowed(schema, tokens), thinking=thinking)

    async def news(self) -> AsyncIterator[News]:
        """What comes, for all choices, until the last of them has ended.

        Raises:
            ApiError: an answer that cannot go on.
        """
        open_choices = self.count
        while open_choices:
            event, self._first = self._first or await self._events.get(), None
            if event.error is not None:
                raise event.error
            news = self.readers[event.index].read(event)
            open_choices -= news.finish_reason is not None
            if not news.is_empty:
                yield news
        self._chat.metrics.finished(self.prompt_tokens, time.monotonic() - self._started)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, of all choices."""
        return sum(reader.tokens for reader in self.readers)

    def close(self) -> None:
        """End whatever still runs, and give the places back."""
        if self._closed:
            return
        self._closed = True
        ended = bool(self.readers) and all(reader.finish_reason for reader in self.readers)
        for job in self._jobs:
            self._chat.scheduler.cancel(job)
        self._chat.scheduler.release(self.count, time.monotonic() - self._started if ended else None)


def _field_of(error: LabError) -> str:
    """The field that the engine's message begins with, if it does."""
    word = str(error).partition(" ")[0].replace("max_new_tokens", "max_tokens")
    return word if word in ChatRequest.model_fields else "messages"
