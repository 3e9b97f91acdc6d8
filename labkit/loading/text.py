"""Sequences of tokens from plain text, on which language models are calibrated and scored."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from labkit.common.errors import LabError


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """Token ids of a text."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The tokens' names."""


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before every text (BOS; GLM-4 has two): the model was trained with them."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    return whole[: next(starts, 0)]


def describe_start(tokenizer: Tokenizer) -> str:
    """The names of the leading tokens, for records: ``<s>``; empty if there are none."""
    return " ".join(tokenizer.convert_ids_to_tokens(leading_ids(tokenizer)))


def text_sequences(tokenizer: Tokenizer, text: str, length: int, name: str) -> Tensor:
    """A text as token ids [n, length], each sequence with the leading tokens first.

    Raises:
        LabError: the text, which messages call ``name``, is shorter than a sequence, or ``length`` leaves no room for it.
    """
    first = leading_ids(tokenizer)
    step = length - len(first)
    if step < 1:
        raise LabError(
            f"a sequence of {length} tokens has no room for text after {describe_start(tokenizer)}"
        )
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if not (count := len(ids) // step):
        raise LabError(
            f"{name} has {len(ids)} tokens, fewer than one sequence of {length}: give a longer text"
        )
    rows = torch.tensor(ids[: count * step], dtype=torch.long).view(count, step)
    return torch.cat([torch.tensor(first, dtype=torch.long).expand(count, -1), rows], 1)
