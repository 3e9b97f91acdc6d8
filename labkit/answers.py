"""A prompt with its answer in one forward pass: what the model would have seen had it written that answer.

Calibration runs prompts with the right answers behind them, so that the decoder's layers see what decoding
shows them; the sensitivity of a layer is read off the distributions of the answer's tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from labkit.collate import SEQUENCE_KEYS
from labkit.common.actions import Action, format_action


def with_answer(prompt: Mapping[str, Tensor], token_ids: Sequence[int], processor: Any) -> dict[str, Tensor]:
    """Model inputs for ``prompt`` (one conversation, [1, L]) followed by an answer of A tokens: [1, L + A].

    Logits at positions L - 1 ... L + A - 2 are those of the answer's tokens. A model that treats its prompt
    apart (its processor has ``marks_prompt``) gets ``prompt_mask`` [1, L + A], 1 over the prompt.
    """
    length = prompt["input_ids"].shape[1]
    answer = torch.tensor([list(token_ids)], dtype=prompt["input_ids"].dtype)
    inputs = dict(prompt)
    for key in SEQUENCE_KEYS:
        if key in prompt:
            fill = torch.ones_like if key == "attention_mask" else torch.zeros_like
            rows = answer if key == "input_ids" else fill(answer, dtype=prompt[key].dtype)
            inputs[key] = torch.cat((prompt[key], rows.to(prompt[key].device)), 1)
    if getattr(processor, "marks_prompt", False):
        mask = torch.ones_like(inputs["input_ids"])
        mask[:, length:] = 0
        inputs["prompt_mask"] = mask
    return inputs


def keeps_logits(model: torch.nn.Module | type[torch.nn.Module]) -> bool:
    """Whether a model, or its class, can be asked for the last logits alone (``logits_to_keep``)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def answer_tokens(action: Action, tokenizer: Any) -> list[int]:
    """Token ids of ``<answer>do(…)</answer>``, as the model writes it without thinking."""
    return tokenizer.encode(f"<answer>{format_action(action)}</answer>", add_special_tokens=False)
