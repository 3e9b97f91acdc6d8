"""Thinking told apart from the answer while both come in pieces.

A model writes ``<think>…</think>`` before its answer, or the prompt has opened the tag already. Asked with
``return_reasoning``, clients get the thinking in a field of its own; else it stays in the content, because
published clients of AutoGLM look for the action after it and know no other place.
"""

from __future__ import annotations

from labkit.common.marks import ANSWER_CLOSE, ANSWER_OPEN, CLOSE, MARK, OPEN, MarkReader, Segment


class ReasoningSplitter:
    """Takes text piece by piece and gives ``(thinking, answer)``, possibly empty, without the tags.

    Args:
        opened: the prompt ended in ``<think>``.

    ``thinking`` says whether the next token belongs to the thinking, as far as is known.
    """

    def __init__(self, opened: bool = False):
        self._opened = opened
        self._state = "start"
        self._held = ""
        self._thought = ""  # all of an unfinished thought
        self._bare = True  # nothing but white space so far, which is dropped around the tags

    @property
    def thinking(self) -> bool:
        """Whether thinking has begun and not ended."""
        return self._state == "thinking" or (self._opened and self._state == "start")

    @property
    def unfinished(self) -> str:
        """The thought that has begun and not ended, all of it."""
        return self._thought

    def push(self, text: str) -> tuple[str, str]:
        """Take a piece."""
        text, self._held = self._held + text, ""
        if self._state == "start":
            text = self._begin(text)
        if self._state != "thinking":
            return "", self._trimmed(text)
        thought, closed, rest = text.partition(CLOSE)
        if not closed:
            keep = next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
            self._held = text[len(text) - keep :]
            thought = thought[: len(thought) - keep]
        thought = self._trimmed(thought)
        if not closed:
            self._thought += thought
            return thought, ""
        self._state, self._bare, self._thought = "answer", True, ""
        return thought, self._trimmed(rest)

    def flush(self) -> tuple[str, str]:
        """What is still held back, when no more text comes."""
        held, self._held = self._held, ""
        if not self.thinking:
            return "", held
        self._thought += held
        return held, ""

    def _begin(self, text: str) -> str:
        """Find out what the text begins with; returns what stands behind a tag that opens the thinking."""
        stripped = text.lstrip()
        if stripped.startswith(OPEN):  # some models repeat the tag that their prompt ends in
            self._state = "thinking"
            return stripped[len(OPEN) :]
        if OPEN.startswith(stripped) or (
            self._opened and ANSWER_OPEN.startswith(stripped) and stripped != ANSWER_OPEN
        ):
            self._held = text
            return ""
        # A model that skips the thinking answers at once, and may type a closing tag.
        thinks = self._opened and not stripped.startswith(ANSWER_OPEN)
        self._state = "thinking" if thinks else "answer"
        self._bare = thinks
        return text

    def _trimmed(self, text: str) -> str:
        if self._bare and text:
            text = text.lstrip("\r\n") if self._state == "thinking" else text.lstrip()
            self._bare = not text
        return text


class TagFilter:
    """Takes ``<answer>`` and ``</answer>`` out of a text that comes in pieces, but not out of what an action types.

    AutoGLM's published client looks for ``do(action=`` and takes all that follows as Python: a closing tag behind it
    is an error there.
    """

    def __init__(self):
        self._reader = MarkReader()

    def push(self, text: str) -> str:
        """The text that is safe to give out; what may become a tag is held back."""
        return _without_answer_tags(self._reader.push(text))

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        return _without_answer_tags(self._reader.flush())


def _without_answer_tags(segments: list[Segment]) -> str:
    return "".join(text for kind, text in segments if kind != MARK or text not in (ANSWER_OPEN, ANSWER_CLOSE))
