"""Texts that cannot fit into a context, found out without tokenizing all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from labkit.common.errors import PromptTooLongError

PIECE = 65_536
"""Characters that are tokenized at a time."""
MARGIN = 2
"""Pieces give a few more tokens than the whole text: only so many times the context is surely too much."""


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        """Every token's name, and its number."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """A text's tokens."""


def check_length(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    longest: int,
    max_length: int | None,
    model: str,
) -> None:
    """Refuse messages whose text is far over a context of ``max_length`` tokens, in time and memory of that context.

    longest: what `longest_token` gives for the tokenizer. model: its name, for the message.

    First by characters, since no token stands for more than the longest one's; then by the tokens of one piece after
    the other. What is a little too long is left to whoever counts the prompt's tokens.

    Raises:
        PromptTooLongError: names the limit.
    """
    texts = list(_texts(messages))
    characters = sum(map(len, texts))
    if max_length is None or characters <= max_length:
        return
    most = max_length * longest
    if characters > most:
        raise PromptTooLongError(
            f"the prompt has {characters:,} characters; the {max_length:,} tokens of {model} hold {most:,} at most"
        )
    if characters <= PIECE:
        return
    tokens = 0
    for text in texts:
        for start in range(0, len(text), PIECE):
            tokens += len(tokenizer.encode(text[start : start + PIECE], add_special_tokens=False))
            if tokens > MARGIN * max_length:
                raise PromptTooLongError(
                    f"the prompt has more than {tokens - 1:,} tokens; {model} takes {max_length - 1}"
                )


def longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token; byte by byte where the tokenizer counts in bytes, which are no fewer."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def _texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content if part["type"] == "text")
