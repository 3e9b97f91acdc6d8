"""Several prompts, or answers, as one batch: padded on the left, media joined.

For measuring distributions and calibrating; the engine itself runs prompts one by one (see `labkit.engine.forward`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

SEQUENCE_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "prompt_mask")
"""Inputs with one value a token; everything else belongs to images and recordings."""


def collate(prompts: Sequence[Mapping[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Several single prompts as one batch, padded on the left so that every row ends at the same place.

    Tensors with one value a token, ``[1, L]``, become ``[B, max L]``.  Tensors of media, ``[n, ...]``, are
    joined along the first dimension in the order of the rows; where later dimensions differ (recordings of
    different lengths), they are padded with zeros on the right.
    """
    if len(prompts) == 1:
        return dict(prompts[0])
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    keys = {key: None for prompt in prompts for key in prompt}
    batch = {}
    for key in keys:
        if key in SEQUENCE_KEYS:
            fill = pad_token_id if key == "input_ids" else 0
            rows = [_pad_left(_row(prompt, key), longest, fill) for prompt in prompts]
            batch[key] = torch.cat(rows)
        else:
            batch[key] = _join([prompt[key] for prompt in prompts if key in prompt])
    return batch


def _row(prompt: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    if key in prompt:
        return prompt[key]
    one = torch.ones_like if key == "attention_mask" else torch.zeros_like
    return one(prompt["input_ids"])


def _pad_left(row: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (length - row.shape[1], 0), value=value)


def _join(tensors: list[torch.Tensor]) -> torch.Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
    padded = []
    for tensor in tensors:
        padding: list[int] = []
        for size, wanted in zip(reversed(tensor.shape[1:]), reversed(shape)):
            padding += [0, wanted - size]
        padded.append(torch.nn.functional.pad(tensor, padding) if any(padding) else tensor)
    return torch.cat(padded)
