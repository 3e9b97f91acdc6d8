"""One pass over a model with its KV cache: prefill once, then one token a row and step.

The only place that calls ``model.forward``.  What a batch of conversations needs between two steps - the
cache, the attention mask, the positions - lives in a :class:`CachedForward`; the model itself keeps no state
that the next request could stumble over (Glm4v stores the positions' offset of its last image on the module;
here they are passed explicitly at every step).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache

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


class CachedForward:
    """A batch on its way through a model.

    Args:
        model: a transformers causal model (text or multimodal) in evaluation mode.
        inputs: ``input_ids [B, L]``, optionally ``attention_mask [B, L]`` (0 = left padding), media tensors.
    """

    def __init__(self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]):
        self._model = model
        self._inputs = dict(inputs)
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self._mask: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included."""
        return self._cache.get_seq_length()

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """Run the prompts.  Returns the logits after their last tokens, ``[B, vocabulary]``."""
        model, inputs = self._model, self._inputs
        ids = inputs.pop("input_ids")
        mask = inputs.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask
        positions = model._prepare_position_ids_for_generation(
            ids, {"input_ids": ids, "attention_mask": mask, **inputs}
        )
        arguments: dict[str, Any] = model.prepare_inputs_for_generation(
            ids,
            past_key_values=self._cache,
            attention_mask=mask,
            position_ids=positions,
            is_first_iteration=True,
            use_cache=True,
            **inputs,
        )
        if model._supports_logits_to_keep():
            arguments["logits_to_keep"] = 1
        output = model(**arguments, return_dict=True)
        self._inputs = {}
        positions = arguments.get("position_ids")
        self._positions = None if positions is None else positions[..., -1:]
        # A row without padding sees the whole cache: no mask means less work in every step.
        needs_mask = positions is None or bool((mask == 0).any())
        self._mask = mask if needs_mask else None
        return output.logits[:, -1]

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token a row, ``[B]`` int64.  Returns the logits after it, ``[B, vocabulary]``."""
        if self._positions is not None:
            self._positions = self._positions + 1
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        output = self._model(
            input_ids=tokens[:, None],
            position_ids=self._positions,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
        )
        return output.logits[:, -1]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in this order: finished answers stop costing."""
        device = self._cache.layers[0].keys.device
        index = torch.tensor(rows, device=device)
        self._cache.batch_select_indices(index)
        if self._positions is not None and self._positions.shape[-2] > 1:
            self._positions = self._positions.index_select(-2, index.to(self._positions.device))
        if self._mask is not None:
            self._mask = self._mask[index.to(self._mask.device)]
