"""Calibration batches: model inputs of PhoneTap's calibration items, never of test items.

Schemes that measure activations (GPTQ, smoothing) run these through the model; screenshots are among them,
because text alone shows a vision-language model's decoder the wrong activations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
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


def text_batches(
    tokenizer: Any, path: str | Path, count: int = 32, *, length: int = 512, device: Any = "cpu"
) -> list[dict[str, torch.Tensor]]:
    """Model inputs for ``count`` sequences of ``length`` tokens from the beginning of a text file, or as many as
    it has: ``input_ids [1, length]``, for language models.

    Raises:
        LabError: the file cannot be read, or is shorter than one sequence.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:count]
    if not found:
        raise LabError(
            f"{path} has {len(ids)} tokens, fewer than one sequence of {length}: give a longer text"
        )
    return [{"input_ids": torch.tensor([one], device=device)} for one in found]


class Fingerprinted:
    """Calibration batches that are hashed as they are used, so that a checkpoint can say what it saw.

    Args:
        batches: model inputs, as :func:`calibration_batches` gives them; may be iterated only once.
        source: where they come from, in words.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], source: str = "given by the caller") -> None:
        self.batches = batches
        self.source = source
        self.count = 0
        self._digest = hashlib.sha256()
        self._complete = False

    @classmethod
    def of(cls, calibration: Any) -> Fingerprinted:
        """``calibration`` itself if it is one already."""
        return calibration if isinstance(calibration, cls) else cls(calibration)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        digest, count = hashlib.sha256(), 0
        for batch in self.batches:
            _hash_batch(digest, batch)
            count += 1
            yield batch
        if not self._complete:
            self._digest, self.count, self._complete = digest, count, True

    def facts(self) -> dict[str, Any]:
        """``{"source", "batches", "sha256"}``; batches that were not used yet are run through first."""
        if not self._complete:
            for _ in self:
                pass
        return {"source": self.source, "batches": self.count, "sha256": self._digest.hexdigest()}


def _hash_batch(digest: Any, batch: Any) -> None:
    """Names, dtypes, shapes and values of one batch, tensors in any nesting of mappings and sequences."""
    if isinstance(batch, torch.Tensor):
        values = batch.detach().cpu().contiguous()
        digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(batch, Mapping):
        for name in sorted(batch):
            digest.update(f"{name}:".encode())
            _hash_batch(digest, batch[name])
    elif isinstance(batch, (list, tuple)):
        for one in batch:
            _hash_batch(digest, one)
    else:
        digest.update(repr(batch).encode())
