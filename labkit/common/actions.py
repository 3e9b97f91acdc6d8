"""Parses and formats phone actions in AutoGLM's syntax, without torch.

A model answers ``<think>…</think><answer>do(action="Tap", element=[500,120])</answer>`` or
``finish(message="…")``; coordinates are integers from 0 to 999, whatever the screen's size
(source: Open-AutoGLM, ``phone_agent/config/prompts_zh.py`` and ``phone_agent/actions/handler.py``).

Messages are OpenAI-like: ``[{"role": "user", "content": text or [part, …]}]`` with the parts
``{"type": "image", "image": PIL.Image}``, ``{"type": "audio", "audio": float32 [samples] at 16 kHz, mono}``
and ``{"type": "text", "text": str}``.
"""

import ast
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from labkit.common.errors import ActionSyntaxError
from labkit.common.marks import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    CALL_START,
    CLOSE,
    OPEN,
    TYPED,
    partition_at,
    read_marks,
)

COORDINATE_MAX = 999
"""The largest coordinate: (0, 0) is the top left corner, (999, 999) the bottom right corner."""

SAMPLE_RATE = 16_000
"""Samples per second of every recording in a message."""

# Required and optional arguments of every action, in the order in which they are written.
ACTIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "Launch": (("app",), ()),
        "Tap": (("element",), ("message",)),
        "Type": (("text",), ()),
        "Type_Name": (("text",), ()),
        "Swipe": (("start", "end"), ()),
        "Long Press": (("element",), ()),
        "Double Tap": (("element",), ()),
        "Back": ((), ()),
        "Home": ((), ()),
        "Wait": (("duration",), ()),
        "Take_over": ((), ("message",)),
        "Note": ((), ("message",)),
        "Call_API": ((), ("instruction",)),
        "Interact": ((), ("message",)),
        "finish": (("message",), ()),
    }
)
POINTS = ("element", "start", "end")
_CONTROL = re.compile(r"<\|[^|>]*\|>")  # <|endoftext|>, <|user|>
_BROKEN = (SyntaxError, ValueError, RecursionError, MemoryError)  # what ast.parse raises on hostile text


@dataclass(frozen=True)
class Action:
    """A step on the phone: a name from `ACTIONS` and its arguments; points are ``(x, y)`` in 0…999.

    Raises `ActionSyntaxError` for unknown names, unknown or missing arguments, and points off the screen.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.name not in ACTIONS:
            raise ActionSyntaxError(f"unknown action {self.name!r}; known are {', '.join(ACTIONS)}")
        required, optional = ACTIONS[self.name]
        for name in self.arguments:
            if name not in required + optional:
                allowed = ", ".join(required + optional) or "none"
                raise ActionSyntaxError(f"{self.name} has no argument {name!r}; it takes: {allowed}")
        for name in required:
            if name not in self.arguments:
                raise ActionSyntaxError(f"{self.name} lacks its argument {name!r}")
        clean = {
            name: _point(self.name, name, self.arguments[name])
            if name in POINTS
            else _text(self.name, name, self.arguments[name])
            for name in required + optional
            if name in self.arguments
        }
        object.__setattr__(self, "arguments", MappingProxyType(clean))

    def __hash__(self):
        return hash((self.name, tuple(self.arguments.items())))

    def __reduce__(self):  # a MappingProxyType cannot be pickled
        return Action, (self.name, dict(self.arguments))

    def __repr__(self):
        return f"<Action {format_action(self)}>"

    @property
    def point(self) -> tuple[int, int] | None:
        """The point that the finger touches: the element of Tap, Long Press and Double Tap; None for other actions."""
        return self.arguments.get("element")


@dataclass(frozen=True)
class Answer:
    """A model's parsed answer.

    thinking: the content of ``<think>``, or None. action: the action, or None. text: the answer without its
    thinking and tags (an action's source, or prose). error: why there is no action, or None.
    """

    thinking: str | None
    action: Action | None
    text: str
    error: str | None


def format_action(action: Action) -> str:
    """Write `action` as the model does: ``do(action="Tap", element=[500,120])`` or ``finish(message="…")``.

    Quotes, backslashes and control characters are escaped: ``parse_action(format_action(a)) == a``. The action
    grammar (`labkit.engine.action_rules`) accepts all that is written here but lone surrogates.
    """
    parts = [] if action.name == "finish" else [f'action="{action.name}"']
    for name, value in action.arguments.items():
        parts.append(f"{name}=[{value[0]},{value[1]}]" if name in POINTS else f"{name}={_quote(value)}")
    return f"{'finish' if action.name == 'finish' else 'do'}({', '.join(parts)})"


def parse_action(text: str) -> Action:
    """Parse the single action in `text`, without evaluating code.

    Raises `ActionSyntaxError`. Like Open-AutoGLM, it accepts line breaks inside strings, and unescaped quotes inside
    the string of Type and finish.
    """
    text = text.strip()
    try:
        call = _parse(text)
    except _BROKEN:
        return _parse_loose_string(text)
    if not (
        isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("do", "finish")
    ):
        raise ActionSyntaxError(f"not an action: {_short(text)}; right is do(action=…) or finish(message=…)")
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ActionSyntaxError(f"arguments need names: {_short(text)}")
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg in arguments:
            raise ActionSyntaxError(f"argument {keyword.arg!r} stands twice: {_short(text)}")
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (*_BROKEN, TypeError):
            raise ActionSyntaxError(f"argument {keyword.arg!r} is no plain value: {_short(text)}") from None
    if call.func.id == "finish":
        return Action("finish", arguments)
    name = arguments.pop("action", None)
    if not isinstance(name, str) or name == "finish":
        raise ActionSyntaxError(f'do(…) needs action="…": {_short(text)}')
    return Action(name, arguments)


def parse_answer(text: str) -> Answer:
    """Parse a model's answer; never raises.

    Tolerates the slips of real outputs: a missing ``</answer>``, ``</think>`` or ``<think>`` (the prompt may end in
    it), a bare ``do(…)``, prose before or after the action. Of several actions the first counts. `text` still shows
    the caller what was tolerated. Tags inside the string of an action are its text.
    """
    text = _without_end(text)
    answer = _read(text, partition_at(text, CLOSE))
    if answer.action is None and CLOSE in text:
        # The thinking may quote an action that it does not finish, whose open string hid the tag.
        answer = _read(text, text.partition(CLOSE))
    return answer


def _read(text: str, parts: tuple[str, str, str]) -> Answer:
    """The answer in a text whose thinking ends where ``parts`` divide it."""
    before, closed, after = parts
    thinking, rest = (before.replace(OPEN, "", 1).strip(), after) if closed else _unclosed_thinking(text)
    _, opened, inner = partition_at(rest, ANSWER_OPEN)
    body = _without_control(partition_at(inner if opened else rest, ANSWER_CLOSE)[0]).strip()
    start = CALL_START.search(body)
    if start is None:
        return Answer(thinking, None, body, "the answer holds no do(action=…) or finish(message=…)")
    try:
        return Answer(thinking, parse_action(_one_call(body[start.start() :])), body, None)
    except ActionSyntaxError as error:
        return Answer(thinking, None, body, str(error))


def _unclosed_thinking(text: str) -> tuple[str | None, str]:
    """The thinking (or None) and the text after it, where no closing tag divides them."""
    _, opened, after = partition_at(text, OPEN)
    if not opened:
        return None, text
    thinking, answer, rest = after.partition(ANSWER_OPEN)
    if answer:
        return thinking.strip(), answer + rest
    # Neither closing tag nor answer: the action itself ends the thinking.
    action = CALL_START.search(after)
    if action:
        return after[: action.start()].strip(), after[action.start() :]
    return after.strip(), ""


def _without_end(text: str) -> str:
    """The text without the control tokens and the closing tag that end it."""
    while True:
        text = text.rstrip()
        start = text.rfind("<|")
        if text.endswith(ANSWER_CLOSE):
            text = text.removesuffix(ANSWER_CLOSE)
        elif start >= 0 and _CONTROL.fullmatch(text, start):
            text = text[:start]
        else:
            return text


def _without_control(text: str) -> str:
    """The text without control tokens, but for those that an action types."""
    return "".join(
        segment.text if segment.kind == TYPED else _CONTROL.sub("", segment.text)
        for segment in read_marks(text)
    )


def _one_call(text: str) -> str:
    """The first call in `text`, up to its closing bracket; all of `text` if none closes."""
    quote, escaped, depth = "", False, 0
    for index, character in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                call = text[: index + 1]
                try:
                    _parse(call)
                except _BROKEN:
                    continue  # an unescaped quote misled the count; a later bracket may match
                return call
    return text


def _parse_loose_string(text: str) -> Action:
    """Parse Type and finish with unescaped quotes in their string, or without the closing quote and bracket."""
    match = re.match(r"do\(\s*action\s*=\s*[\"'](Type|Type_Name)[\"']\s*,\s*text\s*=\s*([\"'])", text)
    name = match.group(1) if match else "finish"
    match = match or re.match(r"finish\(\s*message\s*=\s*([\"'])", text)
    end = text.rfind(match.group(match.lastindex) + ")") if match else -1
    if match is None or end < match.end():
        raise ActionSyntaxError(f"not an action: {_short(text)}")
    value = text[match.end() : end]
    return Action(name, {"message" if name == "finish" else "text": value})


def _parse(text: str) -> ast.expr:
    for character, escaped in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t"), ("\0", "\\x00")):
        text = text.replace(character, escaped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # "\\d" in a model's string is no news to the user
        return ast.parse(text, mode="eval").body


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", _escape_one, escaped) + '"'


def _escape_one(match: re.Match) -> str:
    escapes = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    code = ord(match.group())
    return escapes.get(match.group(), f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")


def _point(action: str, name: str, value: Any) -> tuple[int, int]:
    numbers = isinstance(value, list | tuple) and len(value) == 2 and all(type(part) is int for part in value)
    if not numbers:
        raise ActionSyntaxError(f"{action}: {name} must be two integers [x,y], not {_short(str(value))}")
    if not all(0 <= part <= COORDINATE_MAX for part in value):
        raise ActionSyntaxError(f"{action}: {name} {list(value)} is off the screen (0…{COORDINATE_MAX})")
    return value[0], value[1]


def _text(action: str, name: str, value: Any) -> str:
    if action == "Wait" and type(value) in (int, float):
        return f"{value} seconds"
    if not isinstance(value, str):
        raise ActionSyntaxError(f"{action}: {name} must be a string, not {_short(str(value))}")
    return value
