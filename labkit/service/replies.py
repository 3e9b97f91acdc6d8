"""What the service answers: OpenAI's objects, with the thinking beside the content.

The thinking stands under two names: ``reasoning_content``, as most clients read it, and ``reasoning``, as newer
vLLM calls it. Fields that are not set are not sent.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class Reply(BaseModel):
    """Sent as JSON with the fields that were set."""

    def json_text(self) -> str:
        """JSON in one line."""
        return self.model_dump_json(exclude_unset=True)


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(Reply):
    content: list[TokenLogprob] | None
    refusal: None = None


class CalledFunction(Reply):
    name: str
    arguments: str


class ToolCall(Reply):
    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int = 0


class AnswerMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = []


class Choice(Reply):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class CompletionDetails(Reply):
    reasoning_tokens: int


class PromptDetails(Reply):
    cached_tokens: int = 0


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails
    prompt_tokens_details: PromptDetails


class ChatCompletion(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class Delta(Reply):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = []


class ChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Reply):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int | None


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    error: ErrorDetail


def error_text(body: dict[str, Any]) -> str:
    """An error's JSON, as `labkit.service.errors.ApiError.body` gives it."""
    return ErrorReply(error=ErrorDetail(**body["error"])).json_text()
