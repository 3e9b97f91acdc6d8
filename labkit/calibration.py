"""Calibration batches: model inputs of PhoneTap's calibration items, never of test items.

Schemes that measure activations (GPTQ, smoothing) run these through the model; screenshots are among them,
because text alone shows a vision-language model's decoder the wrong activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from labkit.errors import LabError
from labkit.media import normalise_messages


def calibration_batches(
    processor: Callable[..., dict[str, torch.Tensor]],
    count: int = 32,
    *,
    split: str = "all",
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Any]]:
    """Model inputs for ``count`` calibration items, one conversation each: call ``model(**batch)``.

    Args:
        processor: an engine's ``processor``, or ``Checkpoint.processor()``.
        count: number of items.
        split: ``typed``, ``spoken``, ``hard`` or ``all``.
        seed: None for the standard calibration set.
        device: where the batches are wanted.

    Raises:
        LabError: ``count`` below 1.
    """
    if count < 1:
        raise LabError(f"count is {count}; at least one calibration item is needed")
    from labkit import phonetap

    for item in phonetap.items(split=split, count=count, seed=seed, part="calibration"):
        inputs = processor(normalise_messages(item.messages()))
        yield {key: value.to(device) for key, value in inputs.items()}
