"""Calibration batches: what a model takes, and how it runs on one."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.quantization.kernels.upcast import upcast

Batch = Tensor | Mapping[str, object] | tuple | list
"""The arguments of one call of a model: a single tensor, by name, or in order."""


def run_model(model: nn.Module, batch: Batch) -> object:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else ``model(batch)``.

    Transformers models run without a KV cache, which nothing would read.
    """
    options = {"use_cache": False} if hasattr(model, "prepare_inputs_for_generation") else {}
    with upcast(next((tensor.device for tensor in model.parameters()), torch.device("cpu"))):
        if isinstance(batch, Mapping):
            return model(**{**options, **batch})
        return model(*batch, **options) if isinstance(batch, tuple | list) else model(batch, **options)


def to_device(batch: Batch, device: torch.device | str | None) -> Batch:
    """``batch`` with its tensors on ``device`` (None: where they are)."""
    if isinstance(batch, Tensor):
        return batch if device is None else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return type(batch)(to_device(value, device) for value in batch) if type(batch) in (tuple, list) else batch


def kind_of_batch(batch: Batch) -> Hashable:
    """What batches with the same arguments share: they take the same path through a model."""
    if isinstance(batch, Mapping):
        return frozenset(key for key, value in batch.items() if value is not None)
    return len(batch) if isinstance(batch, tuple | list) else None


def checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The batches as a list. Raises LabError if it is empty or a batch has a type that no model takes."""
    if isinstance(batches, Tensor | Mapping):
        raise LabError("calibration is a list of batches; this is a single one: put it in a list")
    checked = list(batches)
    if not checked:
        raise LabError("there are no calibration batches")
    for index, batch in enumerate(checked):
        if not isinstance(batch, Tensor | Mapping | tuple | list):
            raise LabError(
                f"calibration batch {index} is of type {type(batch).__name__}; a batch is a tensor, a mapping of "
                "arguments, or a tuple of them"
            )
    return checked
