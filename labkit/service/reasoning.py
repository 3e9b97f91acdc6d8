"""Thinking told apart from the answer while both come in pieces.

A model writes ``<think>…</think>`` before its answer, or the prompt has opened the tag already. Asked with
``return_reasoning``, clients get the thinking in a field of its own; else it stays in the content, because
published clients of AutoGLM look for the action after it and know no other place.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"
ANSWER_TAGS = ("<answer>", "</answer>")


class ReasoningSplitter:
    """Takes text piece by piece and gives ``(thinking, answer)``, possibly empty, without the tags.

    Args:
        opened: the prompt ended in ``<think>``.

    ``thinking`` says whether the next token belongs to the thinking, as far as is known.
    """

    def __init__(self, opened: bool = False):
        self._state = "thinking" if opened else "start"
        self._held = ""
        self._bare = True  # nothing but white space so far, which is dropped around the tags

    @property
    def thinking(self) -> bool:
        """Whether thinking has begun and not ended."""
        return self._state == "thinking"

    def push(self, text: str) -> tuple[str, str]:
        """Take a piece."""
        text = self._held + text
        self._held = ""
        thought = ""
        if self._state == "start":
            stripped = text.lstrip()
            if stripped.startswith(OPEN):
                self._state, text = "thinking", stripped[len(OPEN) :]
            elif OPEN.startswith(stripped):
                self._held = text
                return "", ""
            else:
                self._state, self._bare = "answer", False
        if self._state == "thinking":
            thought, closed, rest = text.partition(CLOSE)
            if closed:
                self._state, text = "answer", rest
            else:
                keep = next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
                self._held, text = text[len(text) - keep :], ""
                thought = thought[: len(thought) - keep]
            thought = self._trimmed(thought)
            if closed:
                self._bare = True
        return thought, self._trimmed(text)

    def flush(self) -> tuple[str, str]:
        """What is still held back, when no more text comes."""
        held, self._held = self._held, ""
        return (held, "") if self._state == "thinking" else ("", held)

    def _trimmed(self, text: str) -> str:
        if self._bare and text:
            text = text.lstrip("\r\n") if self._state == "thinking" else text.lstrip()
            self._bare = not text
        return text


class TagFilter:
    """Takes ``<answer>`` and ``</answer>`` out of a text that comes in pieces.

    AutoGLM's published client looks for ``do(action=`` and takes all that follows as Python: a closing tag behind it
    is an error there.
    """

    def __init__(self):
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is safe to give out; what may become a tag is held back."""
        text = self._held + text
        for tag in ANSWER_TAGS:
            text = text.replace(tag, "")
        ends = [n for tag in ANSWER_TAGS for n in range(1, len(tag)) if text.endswith(tag[:n])]
        keep = max(ends, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        held, self._held = self._held, ""
        return held
