"""What comes back from a service, and what is sent."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from labkit.client.parts import as_openai, user_message
from labkit.common.actions import Action, Answer, parse_answer
from labkit.common.errors import ClientError


@dataclass(frozen=True)
class Piece:
    """What one event of a stream adds: to the answer, or to the thinking before it."""

    text: str = ""
    reasoning: str = ""


@dataclass
class Reply:
    """One answer.

    Attributes:
        text: the answer, without its thinking.
        reasoning: the thinking, or "".
        finish_reason: ``stop``, ``length`` or ``tool_calls``; None while it is coming.
        usage: tokens, as the service counts them.
        tool_calls: calls of functions, if there were any.
        choices: the texts of all answers, if several were asked for.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)

    @property
    def answer(self) -> Answer:
        """The text taken apart."""
        return parse_answer(self.text)

    @property
    def action(self) -> Action | None:
        """The action on the phone, or None if the answer holds none."""
        return self.answer.action

    def message(self) -> dict[str, Any]:
        """The answer as a turn for the next request."""
        return {"role": "assistant", "content": self.text}

    def add(self, event: Mapping[str, Any]) -> Piece | None:
        """Take an event of a stream; the piece it holds of the first choice, or None."""
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            if choice["index"] != 0:
                continue
            delta = choice["delta"]
            piece = Piece(delta.get("content") or "", _reasoning_of(delta))
            self.text += piece.text
            self.reasoning += piece.reasoning
            self.tool_calls += delta.get("tool_calls") or []
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            self.choices = [self.text]
            return piece if piece != Piece() else None
        return None


def _reasoning_of(message: Mapping[str, Any]) -> str:
    return message.get("reasoning_content") or message.get("reasoning") or ""


def read_reply(document: Mapping[str, Any]) -> Reply:
    """A whole answer."""
    message = document["choices"][0]["message"]
    return Reply(
        message.get("content") or "",
        _reasoning_of(message),
        document["choices"][0]["finish_reason"],
        document.get("usage") or {},
        message.get("tool_calls") or [],
        [choice["message"].get("content") or "" for choice in document["choices"]],
    )


def make_request(
    model: str,
    text: str | None = None,
    *,
    image: Any = None,
    audio: Any = None,
    messages: Iterable[Mapping[str, Any]] = (),
    thinking: bool = False,
    **parameters: Any,
) -> dict[str, Any]:
    """The body of a chat request; the arguments are those of `labkit.client.Client.ask`."""
    turns = as_openai([dict(message) for message in messages])
    if text is not None or image is not None or audio is not None or not turns:
        turns.append(user_message(text, image, audio))
    thought = {"enable_thinking": thinking, "return_reasoning": True}
    return {"model": model, "messages": turns, **thought, **parameters}


def make_stream_request(model: str, text: str | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The same for an answer in pieces, with its usage at the end."""
    return {**make_request(model, text, **asked), "stream": True, "stream_options": {"include_usage": True}}


def error_of(status: int, body: bytes, headers: Mapping[str, str]) -> ClientError:
    """The error in a response."""
    try:
        told = json.loads(body)["error"]
        message, param, code = told["message"], told.get("param"), told.get("code")
    except (ValueError, KeyError, TypeError):
        message, param, code = f"the service answered with status {status}", None, None
    after = headers.get("retry-after", "")
    return ClientError(message, status, param, code, float(after) if after.isdigit() else None)


def event_of(line: str) -> dict[str, Any] | None:
    """The event in one line of a stream, or None: an empty line, a comment, the end.

    Raises:
        ClientError: the event is an error.
    """
    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
    if not data or data == "[DONE]":
        return None
    event = json.loads(data)
    if error := event.get("error"):
        raise ClientError(error["message"], None, error.get("param"), error.get("code"))
    return event


def unreachable(url: str, error: Exception) -> ClientError:
    """What to say when nothing answers."""
    kind = type(error).__name__
    return ClientError(
        f"the service at {url} does not answer ({kind}): start it with labkit.client.launch.start()"
    )


def trusts_environment(url: str) -> bool:
    """Whether a proxy variable may apply: never on the way to this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
