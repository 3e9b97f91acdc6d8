"""One turn of a conversation: the question and each service's answer, shown in the chat and exported as JSON."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from labkit.client import Reply
from labkit.common.actions import POINTS, Action, format_action
from labkit.common.formats import format_bytes, format_seconds
from labkit.interactive.chat.endpoint import Endpoint
from labkit.phonetap import Item, Screen
from labkit.results import show


@dataclass
class Turn:
    """A question and its answers.

    Attributes:
        message: the user message as sent.
        text: the typed text.
        picture: the screen that was sent, or None.
        target: the true target's box in thousandths, or None if unknown.
        audio: path of the recording, or None.
        replies: the answers of A and B.
        endpoints: the services that answered.
        facts: each service's status.
        drawn: service index -> path of the picture with its tap.
    """

    message: dict[str, Any]
    text: str
    picture: Image.Image | None = None
    target: tuple[float, ...] | None = None
    audio: str | None = None
    replies: list[Reply] = field(default_factory=list)
    endpoints: list[Endpoint] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    drawn: dict[int, str] = field(default_factory=dict)


def target_of(screen: Screen | None, item: Item | None, text: str) -> tuple[float, ...] | None:
    """The box that a request names, in thousandths: the drawn item's own box, or that of the only label in the text.

    item: the PhoneTap item that was drawn with the screen, or None. Returns None where the target is uncertain.
    """
    if item is not None and text == item.instruction:
        return item.box
    if screen is None or not text:
        return None
    request = text.casefold()
    named = [element for element in screen.elements if element.label and element.label.casefold() in request]
    longest = max((len(element.label) for element in named), default=0)
    named = [element for element in named if len(element.label) == longest]
    if len(named) != 1:
        return None
    sides = screen.size * 2
    return tuple(edge / side * 1000 for edge, side in zip(named[0].box, sides))


def shown(turns: Sequence[Turn], which: int, words: Mapping[str, str]) -> list[dict[str, Any]]:
    """The conversation with service ``which`` (0 or 1) as Gradio's chat messages."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages += _asked(turn)
        if which < len(turn.replies):
            messages += _answered(turn, which, words)
    return messages


def history(turns: Sequence[Turn], which: int) -> list[dict[str, Any]]:
    """The earlier turns as messages for service ``which``."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if which < len(turn.replies) and turn.replies[which].error is None:
            messages += [turn.message, {"role": "assistant", "content": turn.replies[which].text}]
    return messages


def export(turns: Sequence[Turn], folder: str | None = None) -> str:
    """Write the conversation as JSON, without pictures and recordings; return the file's path."""
    records = [
        {
            "question": _without_media(turn.message),
            "target": turn.target,
            "answers": [
                {
                    "service": endpoint.base_url,
                    "model": endpoint.model,
                    "plan": facts.get("plan"),
                    "weights_bytes": facts.get("weights_bytes"),
                    "content": reply.text,
                    "thinking": reply.reasoning,
                    "heard": reply.heard,
                    "ttft_s": reply.ttft_s,
                    "total_s": reply.total_s,
                    "tokens": reply.tokens,
                    "finished": reply.finished,
                    "error": reply.error,
                }
                for endpoint, facts, reply in zip(turn.endpoints, turn.facts, turn.replies)
            ],
        }
        for turn in turns
    ]
    path = Path(folder or tempfile.mkdtemp(prefix="labkit-chat-")) / "conversation.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    return str(path)


def _without_media(message: Mapping[str, Any]) -> str:
    """A message as text, with placeholders for pictures and recordings."""
    if isinstance(message["content"], str):
        return message["content"]
    names = {"image_url": "[picture]", "input_audio": "[recording]"}
    return " ".join(part.get("text") or names.get(part["type"], "") for part in message["content"])


def _asked(turn: Turn) -> list[dict[str, Any]]:
    contents: list[Any] = []
    if turn.audio is not None:
        contents.append({"path": turn.audio})
    if turn.text:
        contents.append(turn.text)
    return [{"role": "user", "content": content} for content in contents or ["…"]]


def _answered(turn: Turn, which: int, words: Mapping[str, str]) -> list[dict[str, Any]]:
    reply, answer = turn.replies[which], turn.replies[which].answer
    messages: list[dict[str, Any]] = []

    def say(content: Any, **metadata: Any) -> None:
        messages.append({"role": "assistant", "content": content, "metadata": metadata})

    if reply.thinking:
        say(reply.thinking, title=words["thought"], status="done" if reply.text else "pending")
    if reply.heard:
        say(f"*{words['heard']}: “{_escaped(reply.heard)}”*")
    if answer.action is not None:
        say(f"`{format_action(answer.action)}`\n\n{_escaped(_in_words(answer.action, words))}")
    elif answer.text:
        say(_escaped(answer.text))
    if reply.error:
        say(f"⚠️ {_escaped(reply.error)}")
    if turn.picture is not None and reply.finished and _has_point(answer.action):
        say({"path": _drawn(turn, which)})
    if reply.finished and not reply.error:
        say(_cost(turn, which, words))
    return messages


def _cost(turn: Turn, which: int, words: Mapping[str, str]) -> str:
    reply, facts = turn.replies[which], turn.facts[which]
    action = reply.answer.action
    parts = []
    if turn.target is not None and turn.picture is not None:
        point = action.point if action else None
        x0, y0, x1, y1 = turn.target
        hit = point is not None and x0 <= point[0] <= x1 and y0 <= point[1] <= y1
        parts.append(f"**{words['hit' if hit else 'miss']}**")
    if reply.ttft_s is not None:
        parts.append(f"{format_seconds(reply.ttft_s)} {words['first']}")
    parts.append(f"{format_seconds(reply.total_s)} {words['whole']}")
    if reply.tokens:
        parts.append(f"{reply.tokens} tokens")
    if facts.get("weights_bytes"):
        plan = f" ({facts['plan']})" if facts.get("plan") else ""
        parts.append(f"{format_bytes(facts['weights_bytes'])} {words['weights']}{plan}")
    return " · ".join(parts)


def _in_words(action: Action, words: Mapping[str, str]) -> str:
    """Describe an action: a point in the window's language, anything else in English."""
    if action.point is None:
        return show.in_words(action)
    x, y = (side / 10 for side in action.point)
    return words["place"].format(name=action.name.lower(), x=x, y=y)


def _has_point(action: Action | None) -> bool:
    """Does the action have a point to draw?"""
    return action is not None and any(name in action.arguments for name in POINTS)


def _drawn(turn: Turn, which: int) -> str:
    """Path of the screen with tap and target; drawn once for each service."""
    if which in turn.drawn:
        return turn.drawn[which]
    picture = show.tap(turn.picture, turn.replies[which].text, turn.target)
    with tempfile.NamedTemporaryFile(prefix="labkit-tap-", suffix=".png", delete=False) as file:
        picture.save(file, format="PNG")
    turn.drawn[which] = file.name
    return file.name


def _escaped(text: str) -> str:
    """Escape Markdown."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#+-.!|~$" else letter for letter in text)
