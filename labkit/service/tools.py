"""Tool calls, as well as a model without training for them can: the answer is kept to a call by a grammar.

``tool_choice: "required"`` or a named function always gives a call whose arguments fit the function's schema.
``"auto"`` would need a model that knows when to call; it is refused. ``"none"`` leaves the tools aside.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from labkit.service.errors import ApiError
from labkit.service.replies import CalledFunction, ToolCall
from labkit.service.schemas import ChatRequest, FunctionDefinition, NamedTool

_ANY = {"type": "object"}


def chosen_tools(request: ChatRequest) -> list[FunctionDefinition]:
    """The functions of which one must be called; none if the answer is free.

    Raises:
        ApiError: the model is left to choose, or a function that is not there is named.
    """
    functions = [tool.function for tool in request.tools or ()]
    choice = request.tool_choice
    if not functions:
        if choice not in (None, "none", "auto"):
            raise ApiError("tool_choice needs tools", param="tool_choice")
        return []
    if isinstance(choice, NamedTool):
        named = [one for one in functions if one.name == choice.function.name]
        if not named:
            raise ApiError("tool_choice names a function that is not among the tools", param="tool_choice")
        return named[:1]
    if choice == "none":
        return []
    if choice == "required":
        if len({one.name for one in functions}) < len(functions):
            raise ApiError("two tools have the same name", param="tools")
        return functions
    raise ApiError(
        "this model was not trained to choose tools: with tool_choice 'required', or a named function, it always "
        "calls one; with 'none' it answers without them",
        param="tool_choice",
        code="unsupported_value",
    )


def call_schema(functions: list[FunctionDefinition]) -> dict[str, Any]:
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


def describe(functions: list[FunctionDefinition]) -> str:
    """What a model is told of them."""
    told = [json.dumps(one.model_dump(exclude_none=True), ensure_ascii=False) for one in functions]
    form = '{"name": …, "arguments": {…}}'
    return "\n".join([f"Call one of these functions. Answer with JSON of the form {form} only.", *told])


def as_tool_call(text: str) -> ToolCall | None:
    """The call in an answer, or None if it was cut off."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call["arguments"]
    except (ValueError, KeyError, TypeError):
        return None
    function = CalledFunction(name=name, arguments=json.dumps(arguments, ensure_ascii=False))
    return ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", type="function", function=function)


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
        return [_moved(one, prefix) for one in schema]
    return schema


def _renamed(reference: str, prefix: str) -> str:
    for start in ("#/$defs/", "#/definitions/"):
        if reference.startswith(start):
            return f"#/$defs/{prefix}{reference.removeprefix(start)}"
    return reference
