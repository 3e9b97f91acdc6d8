"""Requests to a service and its replies, shared by `Client`, `AsyncClient` and the chat."""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from labkit.client.parts import as_openai, user_message
from labkit.common.actions import Action, Answer, parse_answer
from labkit.common.errors import ClientError

HEARD = ("听到：", "I heard: ")
"""The beginnings of the pocket model's thinking after a spoken instruction."""


@dataclass(frozen=True)
class Piece:
    """The text that an event of a stream adds to the answer, or to the thinking before it."""

    text: str = ""
    reasoning: str = ""


@dataclass
class Reply:
    """An answer, or the part of it that has arrived.

    Attributes:
        text: the answer, without its thinking if the service separates them.
        reasoning: the thinking in its own field (``reasoning_content`` or ``reasoning``), or "".
        finish_reason: ``stop``, ``length`` or ``tool_calls``; None while the answer is incomplete.
        usage: token counts from the service.
        tool_calls: function calls, if any.
        choices: the texts of all answers, if the request asks for several.
        ttft_s: seconds to the first piece of a stream; None without a stream.
        total_s: seconds to the end, or until now.
        finished: whether the answer is complete.
        error: why a streamed answer in the chat is incomplete, or None; clients raise it as `ClientError`.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    ttft_s: float | None = None
    total_s: float = 0.0
    finished: bool = False
    error: str | None = None

    @property
    def answer(self) -> Answer:
        """The parsed text."""
        return parse_answer(self.text)

    @property
    def action(self) -> Action | None:
        """The action on the phone, or None if the answer holds none."""
        return self.answer.action

    @property
    def thinking(self) -> str:
        """The thinking, from its own field or from the text."""
        return self.reasoning or self.answer.thinking or ""

    @property
    def heard(self) -> str | None:
        """The transcript of the spoken instruction, if the thinking begins with it."""
        thinking = self.thinking
        for mark in HEARD:
            if thinking.startswith(mark):
                rest = thinking.removeprefix(mark)
                end = min((at for at in (rest.find("。"), rest.find(". ")) if at >= 0), default=len(rest))
                return rest[:end].strip()
        return None

    @property
    def tokens(self) -> int | None:
        """The number of generated tokens as the service counts them; None if it sends no count."""
        return self.usage.get("completion_tokens")

    def message(self) -> dict[str, Any]:
        """The answer as a turn for the next request."""
        return {"role": "assistant", "content": self.text}

    def expect_action(self) -> Action:
        """The action. Raises ClientError if the answer holds none."""
        if self.action is None:
            raise ClientError(f"the answer holds no action: {self.answer.error}")
        return self.action

    def add(self, event: Mapping[str, Any], spent_s: float) -> Piece | None:
        """Add an event that arrived after ``spent_s``; returns its piece of the first choice, or None."""
        self.usage = event.get("usage") or self.usage
        self.total_s = spent_s
        for choice in event.get("choices") or ():
            if choice["index"] != 0:
                continue
            delta = choice["delta"]
            piece = Piece(delta.get("content") or "", _reasoning_of(delta))
            self.text += piece.text
            self.reasoning += piece.reasoning
            self.tool_calls += delta.get("tool_calls") or []
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            self.choices = [self.text]
            if piece == Piece():
                return None
            self.ttft_s = spent_s if self.ttft_s is None else self.ttft_s
            return piece
        return None


def _reasoning_of(message: Mapping[str, Any]) -> str:
    return message.get("reasoning_content") or message.get("reasoning") or ""


def list_in(document: Any, name: str) -> list[Any]:
    """The list under ``name`` in a service's document.

    Raises:
        ClientError: the list is missing or empty, so the server uses another protocol.
    """
    entries = document.get(name) if isinstance(document, Mapping) else None
    if not entries:
        raise ClientError(f"the service's answer has no {name}: is the base URL right? It ends in /v1")
    return entries


def read_reply(document: Any, spent_s: float) -> Reply:
    """A complete answer from the JSON that arrived after ``spent_s``."""
    choices = list_in(document, "choices")
    message = choices[0]["message"]
    return Reply(
        message.get("content") or "",
        _reasoning_of(message),
        choices[0]["finish_reason"],
        document.get("usage") or {},
        message.get("tool_calls") or [],
        [choice["message"].get("content") or "" for choice in choices],
        total_s=spent_s,
        finished=True,
    )


def make_request(
    model: str,
    text: str | None = None,
    *,
    image: Any = None,
    audio: Any = None,
    messages: Iterable[Mapping[str, Any]] = (),
    thinking: bool | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """The body of a chat request; the arguments are those of `labkit.client.Client.ask`."""
    turns = as_openai([dict(message) for message in messages])
    if text is not None or image is not None or audio is not None or not turns:
        turns.append(user_message(text, image, audio))
    # Other services refuse unknown fields, so nothing is sent unless the caller asks for it.
    wish = {} if thinking is None else {"enable_thinking": thinking, "return_reasoning": True}
    return {"model": model, "messages": turns, **wish, **parameters}


def make_stream_request(model: str, text: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a streaming request; the token usage comes at the end."""
    return {**make_request(model, text, **options), "stream": True, "stream_options": {"include_usage": True}}


@contextlib.contextmanager
def client_errors(url: str, *, begun: bool = False) -> Iterator[None]:
    """Turn the openai package's errors into `ClientError`.

    Args:
        url: the service's URL, for the message.
        begun: whether a stream has begun, which means status 200.
    """
    import openai

    try:
        yield
    except (openai.OpenAIError, json.JSONDecodeError) as error:
        raise _client_error(error, url, begun) from None


def _client_error(error: Exception, url: str, begun: bool) -> ClientError:
    """The error with the service's own message, if it sent a message."""
    import openai

    if isinstance(error, openai.APIConnectionError):
        kind = type(error.__cause__ or error).__name__
        if begun:
            return ClientError(f"the answer of {url} broke off ({kind})", 200)
        return ClientError(
            f"the service at {url} does not answer ({kind}): start it with labkit.client.launch.start()"
        )
    status = getattr(error, "status_code", 200)
    body = getattr(error, "body", None)
    body = body if isinstance(body, Mapping) else {}
    message = body.get("message") or body.get("detail")  # FastAPI's own errors have a detail
    if not message:
        message = f"the service answered with status {status}" if status != 200 else f"{url}: {error}"
    after = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
    return ClientError(
        str(message),
        status,
        getattr(error, "param", None),
        getattr(error, "code", None),
        float(after) if after.isdigit() else None,
    )


def trusts_environment(url: str) -> bool:
    """Whether proxy variables apply; they never apply to this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
