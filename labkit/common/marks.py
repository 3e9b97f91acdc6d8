"""An answer's tags, told from the same letters inside the text that an action types. No torch."""

import re
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
MARKS = (OPEN, CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
MARK, PLAIN, TYPED = "mark", "plain", "typed"
CALL_START = re.compile(r"\b(?:do\s*\(\s*action|finish\s*\(\s*message)\s*=")

_CONTEXT = 64  # characters before a sign that are looked at: a call's beginning is far shorter
_CALL_JUST_BEGUN = re.compile(CALL_START.pattern + r"\Z")
_ANY_MARK = "|".join(MARKS)
_OUTSIDE = re.compile(f"{_ANY_MARK}|=")
_IN_CALL = re.compile(rf"{_ANY_MARK}|[\"'()\[\]{{}}]")
_IN_STRING = {quote: re.compile(rf"\\.|{quote}", re.DOTALL) for quote in "\"'"}


class Segment(NamedTuple):
    """A piece of a text: a tag (`MARK`), the inside of a call's string (`TYPED`), or anything else (`PLAIN`)."""

    kind: str
    text: str


class MarkReader:
    """Splits a text that comes in pieces into `Segment`s; joined, they are the text.

    Thinking is plain up to its closing tag, whatever it quotes. A ``</answer>`` that ends the whole text is a tag
    even in a string, because then the string was never closed.
    """

    def __init__(self):
        self._held = ""  # may become a tag
        self._before = ""  # the last characters outside strings
        self._thinking = False
        self._depth = 0  # brackets that are open in a call
        self._quote = ""  # what closes the string

    def push(self, text: str) -> list[Segment]:
        """Take a piece; what may become a tag is held back."""
        text, self._held = self._held + text, ""
        segments: list[Segment] = []
        begin = at = 0
        while match := self._pattern.search(text, at):
            at, sign = match.end(), match.group()
            if self._quote:
                if sign == self._quote:
                    self._give(segments, TYPED, text[begin : match.start()])
                    self._quote, begin = "", match.start()
            elif sign in MARKS:
                self._give(segments, PLAIN, text[begin : match.start()])
                self._give(segments, MARK, sign)
                begin = at
            else:
                self._step(sign, (self._before + text[max(begin, at - _CONTEXT) : at])[-_CONTEXT:])
                if self._quote:
                    self._give(segments, PLAIN, text[begin:at])
                    begin = at
        end = self._safe_end(text, at)
        self._give(segments, TYPED if self._quote else PLAIN, text[begin:end])
        self._held = text[end:]
        return segments

    def flush(self) -> list[Segment]:
        """What is still held back, when no more text comes."""
        segments: list[Segment] = []
        held, self._held = self._held, ""
        if self._quote and held.startswith(ANSWER_CLOSE):
            self._quote = ""
            self._give(segments, MARK, ANSWER_CLOSE)
            held = held.removeprefix(ANSWER_CLOSE)
        self._give(segments, TYPED if self._quote else PLAIN, held)
        return segments

    @property
    def _pattern(self) -> re.Pattern:
        """The signs that matter next."""
        if self._quote:
            return _IN_STRING[self._quote]
        return _IN_CALL if self._depth else _OUTSIDE

    def _step(self, sign: str, context: str) -> None:
        """Follow a sign outside strings; ``context`` ends with it."""
        if sign == "=":
            named = not self._thinking and context[:-1].rstrip().endswith(("action", "message"))
            self._depth = int(named and _CALL_JUST_BEGUN.search(context) is not None)
        elif sign in "([{":
            self._depth += 1
        elif sign in ")]}":
            self._depth -= 1
        # A model may forget to escape a quote within a string: only a value begins with one.
        elif context[:-1].rstrip().endswith("="):
            self._quote = sign

    def _give(self, segments: list[Segment], kind: str, text: str) -> None:
        if not text:
            return
        segments.append(Segment(kind, text))
        if kind == PLAIN:
            self._before = (self._before + text)[-_CONTEXT:]
        elif kind == MARK:
            self._before, self._depth = "", 0
            self._thinking = text == OPEN or (self._thinking and text == ANSWER_CLOSE)

    def _safe_end(self, text: str, at: int) -> int:
        """Where the text ends that no further piece can turn into a tag or an escape; all before ``at`` is read."""
        start = text.rfind("<", at)
        if start >= 0:
            tail = text[start:]
            # In a string, a whole closing tag waits too: whether it is one shows in what follows.
            whole = self._quote and tail.rstrip() == ANSWER_CLOSE
            if whole or any(mark.startswith(tail) for mark in MARKS):
                return start
        return len(text) - (bool(self._quote) and text.endswith("\\", at))


def read_marks(text: str) -> list[Segment]:
    """The segments of a whole text."""
    reader = MarkReader()
    return reader.push(text) + reader.flush()


def partition_at(text: str, mark: str) -> tuple[str, str, str]:
    """As `str.partition`, at the first tag ``mark`` that is not typed text."""
    at = 0
    for segment in read_marks(text):
        if segment == (MARK, mark):
            return text[:at], mark, text[at + len(mark) :]
        at += len(segment.text)
    return text, "", ""
