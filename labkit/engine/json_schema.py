"""JSON schemas as rules of a grammar: what is refused before the start, and how an answer is laid out. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from labkit.common.errors import GrammarError

Json = Mapping[str, "Json"] | list["Json"] | str | int | float | bool | None

MAX_SCHEMA_CHARACTERS = 65_536
MAX_SCHEMA_DEPTH = 100  # the reader of JSON in llguidance takes 127
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LITERAL = ("const", "enum", "required", "dependentRequired")
_BY_PATTERN = "patternProperties"


def object_rule() -> str:
    """The Lark rule ``body`` for a JSON object of any form."""
    return "body: %json " + json.dumps({"type": "object", "x-guidance": _STYLE})


def schema_rule(schema: Json) -> str:
    """The Lark rule ``body`` for JSON under a schema.

    Raises:
        GrammarError: no schema, or one that is too large.
    """
    if not isinstance(schema, Mapping):
        raise GrammarError("json_schema needs a schema: a JSON object")
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise GrammarError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    style = schema.get("x-guidance", {})
    if not isinstance(style, Mapping):
        raise GrammarError("the schema's x-guidance must be a JSON object")
    try:
        text = json.dumps({**schema, "x-guidance": {**_STYLE, **style}}, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise GrammarError(f"the schema is no JSON: {error}") from None
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise GrammarError(
            f"the schema has {len(text):,} characters; at most {MAX_SCHEMA_CHARACTERS:,} are accepted"
        )
    return f"body: %json {text}"


def is_deeper(document: Json, levels: int) -> bool:
    """Whether more objects and arrays than that stand inside one another; without recursion."""
    layer = [document]
    for _ in range(levels + 1):
        layer = [part for part in layer if isinstance(part, Mapping | list)]
        if not layer:
            return False
        layer = [inner for part in layer for inner in (part.values() if isinstance(part, Mapping) else part)]
    return True


def literal_texts(schema: Json) -> Iterator[str]:
    """What an answer under a schema may have to write literally: its constants and the names of properties."""
    if isinstance(schema, list):
        for part in schema:
            yield from literal_texts(part)
    elif isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in _LITERAL:
                yield from _strings(value)
            elif key == "properties" and isinstance(value, Mapping):
                yield from value
                yield from literal_texts(list(value.values()))
            else:
                yield from literal_texts(value)


def patterns(schema: Json) -> Iterator[str]:
    """The regular expressions that strings and names of properties must match."""
    if isinstance(schema, list):
        for part in schema:
            yield from patterns(part)
    elif isinstance(schema, Mapping):
        for key, value in schema.items():
            if key == "pattern" and isinstance(value, str):
                yield value
            elif key == _BY_PATTERN and isinstance(value, Mapping):
                yield from value
            yield from patterns(value)


def _strings(value: Json) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, Mapping):
        yield from _strings([*value, *value.values()])
