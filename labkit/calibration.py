"""Calibration batches: model inputs of PhoneTap's calibration items, never of test items.

Schemes that measure activations (GPTQ, smoothing) run these through the model; screenshots are among them,
because text alone shows a vision-language model's decoder the wrong activations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from labkit.engine import Engine
from labkit.errors import LabError


def calibration_batches(
    engine: Engine, count: int = 32, *, split: str = "all", seed: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Model inputs for ``count`` calibration items, one conversation each, on the engine's device.

    Args:
        engine: gives the processor and the device.
        count: number of items.
        split: ``typed``, ``spoken``, ``hard`` or ``all``; items the model has no senses for are an error.
        seed: None for the standard calibration set.

    Raises:
        LabError: ``count`` below 1, or a model without the item's modality.
    """
    if count < 1:
        raise LabError(f"count is {count}; at least one calibration item is needed")
    from labkit import phonetap

    for item in phonetap.items(split=split, count=count, seed=seed, part="calibration"):
        inputs = engine.prepare(item.messages())
        yield {key: value.to(engine.device) for key, value in inputs.items()}
