"""AutoGLM's action syntax as a grammar: exactly what `labkit.common.actions.format_action` writes. No torch."""

from __future__ import annotations

import json

from labkit.common.actions import ACTIONS, POINTS

LONGEST_STRING = 200
"""Characters of a string of an action, at most."""

# Tags are letters like others here: the parser tells them by where they stand. An escape counts as a character.
_CHARACTER = r'[^"\\\x00-\x1f\x7f]|\\(["\\ntr]|x[01][0-9a-f]|x7f)'


def action_rules(opening: str, closing: str, string_characters: int) -> str:
    """The Lark rules of one action between two tags, which are given as terminals; the rule to begin with is ``body``."""
    return "\n".join(
        [
            f"body: {opening} call {closing}",
            f"call: {' | '.join(_call(name) for name in ACTIONS)}",
            'point: "[" NUMBER "," NUMBER "]"',
            "NUMBER: /0|[1-9][0-9]{0,2}/",
            'string: "\\"" TEXT "\\""',
            rf"TEXT: /({_CHARACTER}){{0,{string_characters}}}/",
        ]
    )


def _call(name: str) -> str:
    """One action; only ``finish`` begins with an argument of its own."""
    required, optional = ACTIONS[name]
    parts = [json.dumps("finish(")] if name == "finish" else [json.dumps(f'do(action="{name}"')]
    for index, argument in enumerate(required + optional):
        comma = "" if name == "finish" and index == 0 else ", "
        part = f"{json.dumps(f'{comma}{argument}=')} {'point' if argument in POINTS else 'string'}"
        parts.append(f"({part})?" if argument in optional else part)
    return f'{" ".join(parts)} ")"'
