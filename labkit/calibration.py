"""Calibration batches: model inputs of PhoneTap's calibration items, never of test items.

Schemes that measure activations (GPTQ, smoothing) run these through the model; screenshots are among them,
because text alone shows a vision-language model's decoder the wrong activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from labkit.amounts import Amounts
from labkit.answers import answer_tokens, keeps_logits, with_answer
from labkit.common.errors import LabError
from labkit.common.messages import normalise_messages

PROMPT_END = 8
DEFAULT_COUNT = Amounts.calibration
"""Calibration items where nothing else is said."""


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
        device: where the batches are wanted.
        answers: put the right answer behind each prompt, so that layers also see what decoding shows them.
        last_logits: with that, ask for the logits of the answer and `PROMPT_END` tokens before it alone.

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


def default_calibration(
    processor: Any,
    modalities: Collection[str],
    count: int = DEFAULT_COUNT,
    *,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    model: Any = None,
) -> list[dict[str, Any]]:
    """The standard calibration batches for a model that takes ``modalities``, with the right answers.

    ``seed`` None draws the standard set. ``model``, or its class: if it can, its head is shown the answer and
    the end of the prompt alone, for what it says of other places is never used.

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
