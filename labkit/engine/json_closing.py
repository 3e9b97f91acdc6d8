"""JSON that has begun, and what would end it soonest: so an answer can be closed while there is room for it.

llguidance closes nothing: a rule's ``max_tokens`` stops in the middle of a string (tried with 1.9: ``body[max_tokens=20]:
%json {"type": "object"}`` ends as ``{"6}LoaW``), and its JSON has no limit of its own.
"""

from __future__ import annotations

_LITERALS = ("true", "false", "null")


class JsonTail:
    """Reads the beginning of a JSON object, piece by piece; `closing` is what makes it whole.

    What comes must be well-formed as far as it goes, with ``": "`` and ``", "`` between things, as
    `labkit.engine.grammar` writes them.
    """

    def __init__(self) -> None:
        self._open: list[str] = []  # what closes each object and array, the outermost first
        self._text = False  # inside a string
        self._escape = ""  # a backslash in it, and what has followed
        self._is_key = False  # the string is, or was, a property's name
        self._word = ""  # a number or literal so far
        self._mark = ""  # the last of { [ , : if nothing has followed it
        self._spaced = False  # ... but a space

    @property
    def begun(self) -> bool:
        """Whether the object has begun, and not ended."""
        return bool(self._open)

    def push(self, text: str) -> None:
        """Read on."""
        for character in text:
            self._push(character)

    def _push(self, character: str) -> None:
        if self._text:
            self._in_string(character)
        elif character == '"':
            self._is_key = self._open[-1:] == ["}"] and self._mark in ("{", ",")
            self._text, self._mark, self._word = True, "", ""
        elif character in "{[":
            self._open.append("}" if character == "{" else "]")
            self._mark, self._spaced = character, False
        elif character in "}]":
            self._open.pop()
            self._mark = self._word = ""
            self._is_key = False
        elif character in ",:":
            self._mark, self._spaced, self._word, self._is_key = character, False, "", False
        elif character == " ":
            self._spaced = True
        else:
            self._word, self._mark = self._word + character, ""

    def _in_string(self, character: str) -> None:
        if self._escape:
            self._escape += character
            if self._escape[1] != "u" or len(self._escape) == 6:
                self._escape = ""
        elif character == "\\":
            self._escape = character
        elif character == '"':
            self._text = False

    @property
    def closing(self) -> str:
        """The shortest end, but for a number's digits; "" of a whole object."""
        return self._value() + "".join(reversed(self._open))

    def _value(self) -> str:
        """What ends the innermost value."""
        if self._text:
            escape = (
                "" if not self._escape else '"' if len(self._escape) == 1 else "0" * (6 - len(self._escape))
            )
            return f'{escape}"' + (": null" if self._is_key else "")
        if self._is_key:
            return ": null"
        space = "" if self._spaced else " "
        if self._mark == ":":
            return f"{space}null"
        if self._mark == ",":
            return space + ('"": null' if self._open[-1] == "}" else "null")
        whole = next(
            (literal for literal in _LITERALS if self._word and literal.startswith(self._word)), None
        )
        if whole is not None:
            return whole.removeprefix(self._word)
        return "0" if self._word[-1:] in tuple("-+.eE") and self._word else ""
