"""Tool calls, as well as a model without training for them can.

``tool_choice: "required"`` or a named function always gives a call: the answer is kept to one by a grammar, with
arguments that fit the function's schema. With ``"auto"`` the model is told of the functions, answers as it likes, and
an answer that is a call of one of them becomes a call. ``"none"`` leaves the tools aside.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.common.errors import ApiError
from labkit.service.replies import CalledFunction, ToolCall
from labkit.service.schemas import ChatRequest, FunctionDefinition, NamedTool

TAG = "<tool_call>"
"""Many models write it around a call."""
_ANY = {"type": "object"}


@dataclass(frozen=True)
class ToolUse:
    """What a request wants of its tools: the functions that can be called, and whether one must, or this one."""

    functions: tuple[FunctionDefinition, ...] = ()
    must: bool = False
    named: bool = False

    @property
    def names(self) -> frozenset[str]:
        """The functions' names."""
        return frozenset(function.name for function in self.functions)


def tool_use(request: ChatRequest) -> ToolUse:
    """What a request wants of its tools; no functions if the answer is free of them.

    Raises:
        ApiError: a function that is not there is named, two have the same name, or there are none.
    """
    functions = tuple(tool.function for tool in request.tools or ())
    choice = request.tool_choice
    if not functions:
        if choice not in (None, "none", "auto"):
            raise ApiError("tool_choice needs tools", param="tool_choice")
        return ToolUse()
    if len({function.name for function in functions}) < len(functions):
        raise ApiError("two tools have the same name", param="tools")
    if isinstance(choice, NamedTool):
        named = tuple(function for function in functions if function.name == choice.function.name)
        if not named:
            raise ApiError("tool_choice names a function that is not among the tools", param="tool_choice")
        return ToolUse(named, must=True, named=True)
    return ToolUse() if choice == "none" else ToolUse(functions, must=choice == "required")


def call_schema(functions: Sequence[FunctionDefinition]) -> dict[str, Any]:
    """The JSON schema of one call: ``{"name": …, "arguments": {…}}``; definitions move to its top."""
    definitions: dict[str, Any] = {}
    calls = []
    for number, function in enumerate(functions):
        parameters = dict(function.parameters or _ANY)
        prefix = f"tool{number}_"
        for key in ("$defs", "definitions"):
            for name, schema in dict(parameters.pop(key, None) or {}).items():
                definitions[prefix + name] = _moved(schema, prefix)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, "arguments": _moved(parameters, prefix)},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions} if definitions else schema


def describe(use: ToolUse) -> str:
    """What a model is told of them."""
    definitions = [
        json.dumps(function.model_dump(exclude_none=True), ensure_ascii=False) for function in use.functions
    ]
    form = '{"name": …, "arguments": {…}}'
    asked = (
        f"Call one of these functions. Answer with JSON of the form {form} only."
        if use.must
        else f"You may call one of these functions: then answer with JSON of the form {form} only."
    )
    return "\n".join([asked, *definitions])


def may_be_call(text: str) -> bool:
    """Whether a text that has begun so can still become a call."""
    text = text.lstrip()
    return text.startswith(("{", TAG)) or TAG.startswith(text)


def as_tool_call(text: str, names: Collection[str]) -> ToolCall | None:
    """The call that an answer is, or None: it was cut off, or is something else."""
    try:
        call = json.loads(
            text.strip().removeprefix(TAG).removesuffix(TAG.replace("<", "</")), parse_constant=_refuse
        )
        name, arguments = call["name"], call["arguments"]
        written = json.dumps(arguments, ensure_ascii=False)
        if not _is_unicode(written):
            written = json.dumps(arguments)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    function = CalledFunction(name=name, arguments=written)
    return ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", type="function", function=function)


def _refuse(constant: str) -> None:
    """NaN and the infinities are no JSON."""
    raise ValueError(constant)


def _is_unicode(text: str) -> bool:
    """Whether it can be sent: halves of surrogate pairs, which JSON can write as escapes, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _moved(schema: Any, prefix: str) -> Any:
    """The schema with its references to definitions renamed."""
    if isinstance(schema, dict):
        return {
            key: _renamed(value, prefix)
            if key == "$ref" and isinstance(value, str)
            else _moved(value, prefix)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_moved(entry, prefix) for entry in schema]
    return schema


def _renamed(reference: str, prefix: str) -> str:
    for start in ("#/$defs/", "#/definitions/"):
        if reference.startswith(start):
            return f"#/$defs/{prefix}{reference.removeprefix(start)}"
    return reference
