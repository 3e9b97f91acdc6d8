"""What a calibration was: its batches hashed as they are used, so that a checkpoint can say what it saw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


class Fingerprinted:
    """Calibration batches that are hashed as they are used, so that a checkpoint can say what it saw.

    Args:
        batches: model inputs, as `calibration_batches` gives them; may be iterated only once.
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
