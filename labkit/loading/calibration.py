"""Calibration batches: model inputs of PhoneTap's calibration items, never of test items.

They contain screenshots, because text alone gives a vision-language model's decoder the wrong activations.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from labkit.common.actions import Action, format_action
from labkit.common.errors import LabError
from labkit.common.messages import normalise_messages
from labkit.plans.finished import hash_of
from labkit.quantization.torch_state import guarded


class Fingerprinted:
    """Calibration batches that are hashed during use, so that a checkpoint can record its calibration.

    Args:
        batches: model inputs, as `calibration_batches` yields them; a one-time iterator is enough.
        source: a description of their source.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], source: str = "given by the caller") -> None:
        self.batches = batches
        self.source = source
        self.count = 0
        self._digest = hashlib.sha256()
        self._complete = False

    @classmethod
    def of(cls, calibration: Any) -> Fingerprinted:
        """``calibration`` wrapped, unless it is already `Fingerprinted`."""
        return calibration if isinstance(calibration, cls) else cls(calibration)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        digest, count = hashlib.sha256(), 0
        for batch in self.batches:
            digest.update(hash_of(batch).encode())
            count += 1
            yield batch
        if not self._complete:
            self._digest, self.count, self._complete = digest, count, True

    def facts(self) -> dict[str, Any]:
        """``{"source", "batches", "sha256"}``; runs through the batches first if they are unused."""
        if not self._complete:
            for _ in self:
                pass
        return {"source": self.source, "batches": self.count, "sha256": self._digest.hexdigest()}


SEQUENCE_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "prompt_mask")
"""Inputs with one value per token; all others belong to images and recordings."""


@guarded
def collate(prompts: Sequence[Mapping[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Join single prompts into a batch, padded on the left so that all rows end at the same position.

    Tensors with one value per token, ``[1, L]``, become ``[B, max L]``. Media tensors, ``[n, ...]``, are concatenated
    along the first dimension in row order; differing later dimensions (recordings of different lengths) are padded
    with zeros on the right.
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
    fill = torch.ones_like if key == "attention_mask" else torch.zeros_like
    return fill(prompt["input_ids"])


def _pad_left(row: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (length - row.shape[1], 0), value=value)


def _join(tensors: list[torch.Tensor]) -> torch.Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
    padded = []
    for tensor in tensors:
        padding: list[int] = []
        for size, target in zip(reversed(tensor.shape[1:]), reversed(shape)):
            padding += [0, target - size]
        padded.append(torch.nn.functional.pad(tensor, padding) if any(padding) else tensor)
    return torch.cat(padded)


@guarded
def with_answer(prompt: Mapping[str, Tensor], token_ids: Sequence[int], processor: Any) -> dict[str, Tensor]:
    """Model inputs for ``prompt`` (one conversation, [1, L]) followed by an answer of A tokens: [1, L + A].

    The logits of the answer's tokens are at positions L - 1 ... L + A - 2. A model that treats its prompt
    separately (its processor has ``marks_prompt``) gets ``prompt_mask`` [1, L + A], 1 over the prompt.
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
    """Whether a model, or its class, can compute only the last logits (``logits_to_keep``)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def answer_tokens(action: Action, tokenizer: Any) -> list[int]:
    """Token ids of ``<answer>do(…)</answer>``, as the model writes it without thinking."""
    return tokenizer.encode(f"<answer>{format_action(action)}</answer>", add_special_tokens=False)


PROMPT_END = 8


@guarded
def calibration_batches(
    processor: Callable[..., dict[str, torch.Tensor]],
    count: int = 32,
    *,
    split: str = "all",
    seed: int | None = None,
    device: torch.device | str = "cpu",
    answers: bool = False,
    last_logits: bool = False,
) -> Iterator[dict[str, Any]]:
    """Model inputs for ``count`` calibration items, one conversation each: call ``model(**batch)``.

    Args:
        processor: an engine's ``processor``, or ``Checkpoint.processor()``.
        count: number of items.
        split: ``typed``, ``spoken``, ``hard`` or ``all``.
        seed: None for the standard calibration set.
        device: the device of the batches.
        answers: append the correct answer to each prompt, so that layers also see the activations of decoding.
        last_logits: with ``answers``, request only the logits of the answer and of the `PROMPT_END` tokens before it.

    Raises:
        LabError: ``count`` below 1.
    """
    if count < 1:
        raise LabError(f"count is {count}; at least one calibration item is needed")
    from labkit import phonetap

    for item in phonetap.items(split=split, count=count, seed=seed, part="calibration"):
        inputs = processor(normalise_messages(item.messages()))
        if answers:
            answer = answer_tokens(item.action, processor.tokenizer)
            inputs = with_answer(inputs, answer, processor)
        batch = {key: value.to(device) for key, value in inputs.items()}
        yield {**batch, "logits_to_keep": len(answer) + PROMPT_END} if answers and last_logits else batch


@guarded
def default_calibration(
    processor: Any,
    modalities: Collection[str],
    count: int,
    *,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    model: Any = None,
) -> list[dict[str, Any]]:
    """The standard calibration batches for a model that takes ``modalities``, with the correct answers.

    ``seed`` None draws the standard set. ``model``, or its class: if it supports ``logits_to_keep``, its head computes
    only the answer and the end of the prompt, because no other logits are used.

    Raises:
        LabError: the model takes no images, so no PhoneTap item suits it.
    """
    if "image" not in modalities:
        raise LabError(
            "PhoneTap's calibration items are screenshots and this model takes no images: pass "
            "calibration=[token ids, ...] of text like that it is used for"
        )
    last = model is not None and keeps_logits(model)
    splits = {"all": count} if "audio" in modalities else {"typed": -(-count // 2), "hard": count // 2}
    return [
        batch
        for split, number in splits.items()
        if number
        for batch in calibration_batches(
            processor, number, split=split, seed=seed, device=device, answers=True, last_logits=last
        )
    ]
