"""Calibration batches: model inputs of PhoneTap's calibration items, never of test items.

Schemes that measure activations (GPTQ, smoothing) run these through the model; screenshots are among them,
because text alone shows a vision-language model's decoder the wrong activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from labkit.amounts import Amounts
from labkit.answers import answer_tokens, with_answer
from labkit.errors import LabError
from labkit.media import normalise_messages

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
) -> Iterator[dict[str, Any]]:
    """Model inputs for ``count`` calibration items, one conversation each: call ``model(**batch)``.

    Args:
        processor: an engine's ``processor``, or ``Checkpoint.processor()``.
        count: number of items.
        split: ``typed``, ``spoken``, ``hard`` or ``all``.
        seed: None for the standard calibration set.
        device: where the batches are wanted.
        answers: put the right answer behind each prompt, so that layers also see what decoding shows them.

    Raises:
        LabError: ``count`` below 1.
    """
    if count < 1:
        raise LabError(f"count is {count}; at least one calibration item is needed")
    from labkit import phonetap

    for item in phonetap.items(split=split, count=count, seed=seed, part="calibration"):
        inputs = processor(normalise_messages(item.messages()))
        if answers:
            inputs = with_answer(inputs, answer_tokens(item.action, processor.tokenizer), processor)
        yield {key: value.to(device) for key, value in inputs.items()}


def default_calibration(
    processor: Any, modalities: Collection[str], count: int = DEFAULT_COUNT
) -> list[dict[str, Any]]:
    """The standard calibration batches for a model that takes ``modalities``, with the right answers.

    Raises:
        LabError: the model takes no images, so no PhoneTap item suits it.
    """
    if "image" not in modalities:
        raise LabError(
            "PhoneTap's calibration items are screenshots and this model takes no images: pass "
            "calibration=[token ids, ...] of text like that it is used for"
        )
    if "audio" in modalities:
        return list(calibration_batches(processor, count, answers=True))
    half = -(-count // 2)
    typed = calibration_batches(processor, half, split="typed", answers=True)
    hard = calibration_batches(processor, half, split="hard", answers=True)
    return [*typed, *hard][:count]
