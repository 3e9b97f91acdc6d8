"""JSON schemas made narrower, so that an answer comes to its end: what fits the narrow one fits the given one.

Small models add properties and letters for as long as they may, and llguidance 1.9 lets them: ``x-guidance`` takes no
length (``max_length``, ``maxLength`` and ``max_tokens`` are unknown fields to it), and a rule's ``max_tokens`` cuts JSON.
Only what a schema leaves open is narrowed (an explicit ``additionalProperties`` or limit stays), and the service's
README says so.
"""

from __future__ import annotations

from typing import Any

SHORTEST_LIMIT = 32
_LIMITED = ("maxLength", "pattern", "format", "enum", "const", "minLength")
_OF_SCHEMAS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_AS_IS = ("enum", "const", "default", "examples", "x-guidance")


def narrowed(schema: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A copy of a schema for an answer of at most ``tokens`` tokens."""
    limit = max(SHORTEST_LIMIT, tokens // (2 * max(_strings(schema), 1)))
    return _narrowed(schema, limit)


def _narrowed(schema: Any, limit: int) -> Any:
    if isinstance(schema, list):
        return [_narrowed(entry, limit) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    narrow = {
        key: {name: _narrowed(part, limit) for name, part in value.items()}
        if key in _OF_SCHEMAS and isinstance(value, dict)
        else value
        if key in _AS_IS
        else _narrowed(value, limit)
        for key, value in schema.items()
    }
    joins = any(key in schema for key in ("allOf", "patternProperties"))
    if "properties" in schema and not joins:
        narrow.setdefault("additionalProperties", False)
    if _is_free_string(schema):
        narrow["maxLength"] = limit
    return narrow


def _is_free_string(schema: dict[str, Any]) -> bool:
    kind = schema.get("type")
    is_string = kind == "string" or (isinstance(kind, list) and "string" in kind)
    return is_string and not any(key in schema for key in _LIMITED)


def _strings(schema: Any) -> int:
    if isinstance(schema, list):
        return sum(map(_strings, schema))
    if not isinstance(schema, dict):
        return 0
    return _is_free_string(schema) + sum(map(_strings, schema.values()))
