"""A completion as OpenAI's objects: whole, or in the chunks of a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from labkit.service import replies
from labkit.service.chat import Completion
from labkit.service.choice import ChoiceReader


async def whole(completion: Completion) -> replies.ChatCompletion:
    """The finished answer as one object."""
    async for _ in completion.news():
        pass
    return replies.ChatCompletion(
        object="chat.completion",
        choices=[_choice(completion, reader) for reader in completion.readers],
        usage=_usage(completion),
        **_common(completion),
    )


async def chunks(completion: Completion) -> AsyncIterator[replies.ChatChunk]:
    """The answer in pieces: the role first, a finish reason last, then the usage if it is wanted."""
    for index in range(completion.count):
        yield _chunk(completion, index, {"role": "assistant", "content": ""})
    async for news in completion.news():
        delta: dict[str, Any] = {}
        if news.reasoning:
            thought = {"reasoning_content": news.reasoning, "reasoning": news.reasoning}
            yield _chunk(completion, news.index, thought)
        if news.content:
            delta["content"] = news.content
        if news.tool_call is not None:
            delta["tool_calls"] = [news.tool_call.model_copy(update={"index": 0})]
        if delta or news.logprobs:
            yield _chunk(completion, news.index, delta, news.logprobs)
        if news.finish_reason is not None:
            yield _chunk(completion, news.index, {}, finish_reason=news.finish_reason)
    if _wants_usage(completion):
        yield replies.ChatChunk(
            object="chat.completion.chunk", choices=[], usage=_usage(completion), **_common(completion)
        )


def _choice(completion: Completion, reader: ChoiceReader) -> replies.Choice:
    fields: dict[str, Any] = {"role": "assistant", "content": reader.content, "refusal": None}
    if reader.reasoning:
        fields |= {"reasoning_content": reader.reasoning, "reasoning": reader.reasoning}
    if reader.tool_call is not None:
        fields |= {"content": None, "tool_calls": [reader.tool_call]}
    return replies.Choice(
        index=reader.index,
        message=replies.AnswerMessage(**fields),
        logprobs=_logprobs(reader.logprobs) if completion.request.logprobs else None,
        finish_reason=reader.finish_reason,
    )


def _chunk(
    completion: Completion,
    index: int,
    delta: dict[str, Any],
    logprobs: list[replies.TokenLogprob] | None = None,
    finish_reason: str | None = None,
) -> replies.ChatChunk:
    choice = replies.ChunkChoice(
        index=index,
        delta=replies.Delta(**delta),
        logprobs=_logprobs(logprobs) if logprobs else None,
        finish_reason=finish_reason,
    )
    usage = {"usage": None} if _wants_usage(completion) else {}
    return replies.ChatChunk(object="chat.completion.chunk", choices=[choice], **usage, **_common(completion))


def _usage(completion: Completion) -> replies.Usage:
    """Tokens in and out; thinking counts even where it is hidden."""
    generated = completion.completion_tokens
    return replies.Usage(
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=generated,
        total_tokens=completion.prompt_tokens + generated,
        completion_tokens_details=replies.CompletionDetails(
            reasoning_tokens=sum(reader.reasoning_tokens for reader in completion.readers)
        ),
        prompt_tokens_details=replies.PromptDetails(cached_tokens=0),
    )


def _wants_usage(completion: Completion) -> bool:
    options = completion.request.stream_options
    return bool(options and options.include_usage)


def _common(completion: Completion) -> dict[str, Any]:
    return {
        "id": completion.id,
        "created": completion.created,
        "model": completion.request.model,
        "system_fingerprint": completion.fingerprint,
    }


def _logprobs(entries: list[replies.TokenLogprob]) -> replies.Logprobs:
    return replies.Logprobs(content=entries, refusal=None)
