"""What a calibration was: its batches hashed as they are used, so that a checkpoint can say what it saw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from labkit.plans.finished import hash_of


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
            digest.update(hash_of(batch).encode())
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
