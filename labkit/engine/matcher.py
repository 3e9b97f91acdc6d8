"""One answer kept to its grammar, token by token. No torch at import."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from labkit.common.errors import GrammarError
from labkit.common.marks import CLOSE, OPEN
from labkit.engine.grammar_tokenizer import GrammarTokenizer
from labkit.engine.json_closing import JsonTail

if TYPE_CHECKING:
    from torch import Tensor

_CLOSING_ROOM = 12  # tokens: the rest of a character, and what a token may add to the closing
_DETAILS = re.compile(r"\n\s*1 \| |<state>")


class Matcher:
    """Keeps one answer to a grammar: `labkit.engine.sampling.Constraint`.

    Args:
        tokenizer: what tokens are.
        lark: the grammar's text.
        thinks: the answer begins within the thinking.
        closes_within: for a JSON object of any form: it is closed before it has so many tokens.
    """

    def __init__(
        self,
        tokenizer: GrammarTokenizer,
        lark: str,
        *,
        thinks: bool = False,
        closes_within: int | None = None,
    ):
        import llguidance
        import llguidance.numpy

        # At other levels it prints what an answer's grammar and tokens are.
        self._matcher = llguidance.LLMatcher(
            tokenizer.view, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0
        )
        self._tokenizer = tokenizer
        self._bits = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocabulary)
        self._left = closes_within
        self._tail, self._decoder = JsonTail(), codecs.getincrementaldecoder("utf-8")("ignore")
        self._thinks = thinks
        self._check()

    @property
    def done(self) -> bool:
        """Whether nothing more can come."""
        return self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        """Which tokens may come next: bool ``[vocabulary]``.

        Raises:
            GrammarError: the grammar became too complex to follow.
        """
        import llguidance.numpy
        import numpy as np
        import torch

        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")[: self._tokenizer.vocabulary]
        allowed = torch.from_numpy(bits.astype(bool))
        closing = self._closing_token()
        if closing is not None and allowed[closing]:
            allowed = torch.zeros_like(allowed)
            allowed[closing] = True
        return allowed

    def _closing_token(self) -> int | None:
        """The token that the object must be closed with, if it is time."""
        if self._left is None or not self._tail.begun:
            return None
        tokens = self._tokenizer.view.tokenize_str(self._tail.closing)
        return tokens[0] if len(tokens) + _CLOSING_ROOM >= self._left else None

    def accept(self, token: int) -> None:
        """Take the token that came.

        Raises:
            GrammarError: it was not allowed, or the grammar became too complex to follow.
        """
        self._matcher.consume_token(token)
        self._check()
        if self._left is not None:
            self._left -= 1
            self._follow(self._tokenizer.bytes_of(token))

    def _follow(self, piece: bytes) -> None:
        """Read what belongs to the object: not the thinking before it."""
        text = self._decoder.decode(piece)
        if not self._tail.begun and OPEN in text:
            self._thinks = True
        elif self._thinks:
            self._thinks = CLOSE not in text
        else:
            self._tail.push(text)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {short_reason(self._matcher.get_error())}")


def short_reason(text: str) -> str:
    """llguidance's reason in one line, without the grammar and the parser's state."""
    line = " ".join(_DETAILS.split(text, maxsplit=1)[0].split())
    return line if len(line) <= 200 else line[:199] + "…"
