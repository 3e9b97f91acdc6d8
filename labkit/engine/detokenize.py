"""Tokens into text as they come: no half characters, no stop strings, the same text streamed or whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from labkit.common.marks import MARKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
MOST_TEXTS = 1 << 14
"""Runs of tokens whose text is remembered."""


class Detokenizer:
    """Decodes a growing list of tokens, a piece at a time.

    Byte-level tokenizers split a Chinese character over several tokens; decoding the first of them alone
    gives U+FFFD.  Text is held back while its end is such a half character, and bytes that never become one
    are dropped.  Tokens are decoded together with those just before them, because some tokenizers treat the
    first token of a text differently (a leading space).

    Args:
        tokenizer: what decodes.
        texts: those of short runs of tokens, by their tokens. Answers of one tokenizer may share it: an agent's are much
            alike, and looking up takes less than decoding.
        hidden: what `hidden_tokens` gives for the tokenizer, if that is at hand.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: dict[tuple[int, ...], str] | None = None,
        hidden: frozenset[int] | None = None,
    ):
        self._tokenizer = tokenizer
        self._hidden = hidden_tokens(tokenizer) if hidden is None else hidden
        self._texts = {} if texts is None else texts
        self._tokens: list[int] = []
        self._start = 0  # first token of the window that is decoded
        self._boundary = 0  # tokens before this are given out completely
        self._given = 0  # characters of the window already given out

    def _decode(self, tokens: Sequence[int]) -> str:
        run = tuple(tokens)
        text = self._texts.get(run)
        if text is None:
            shown = [token for token in tokens if token not in self._hidden]
            text = self._tokenizer.decode(
                shown, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if len(self._texts) >= MOST_TEXTS:
                self._texts.clear()
            self._texts[run] = text
        return text

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self._tokens.append(token)
        text = self._decode(self._tokens[self._start :])
        if text.endswith(REPLACEMENT):  # tokens of single bytes give one for each byte
            return self._give(text.rstrip(REPLACEMENT))
        delta = self._give(text)
        self._start, self._boundary = self._boundary, len(self._tokens)
        self._given = len(self._decode(self._tokens[self._start :]))
        return delta

    def _give(self, text: str) -> str:
        delta = text[self._given :]
        self._given = max(self._given, len(text))
        return delta.replace(REPLACEMENT, "")


def hidden_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The special tokens, which are no part of a text; tags are, even where a tokenizer calls them special."""
    return frozenset(
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in MARKS
    )


class StopMatcher:
    """Cuts a stream of text at the first stop string, also when it spans several pieces."""

    def __init__(self, stop: Sequence[str] = ()):
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to give out: a possible beginning of a stop string is held back."""
        if self.stopped:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        places = [place for place in (text.find(entry) for entry in self._stop) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max(_overlap(text, entry) for entry in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
