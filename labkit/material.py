"""What a model is calibrated on, compared on and judged by, apart from each other and from all test items.

A phone agent gets PhoneTap's calibration items, of different seeds for each purpose; any other language model
gets a text, the first part of which calibrates, the next compares and the last judges.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit import phonetap
from labkit.amounts import Amounts, MaterialError
from labkit.calibration import default_calibration
from labkit.divergence import Probe, answer_probe, text_probe

PROBE_SEED, VALIDATION_SEED = 1, 2
DRAWN_FROM = 100
"""Seeds of other calibration items are above it, and so never those of the two."""
SHARES = {"calibration": (0.0, 0.6), "probe": (0.6, 0.8), "validation": (0.8, 1.0)}
PURPOSES = tuple(SHARES)


@dataclass(frozen=True)
class Material(Amounts):
    """Amounts, and what they are of."""

    def settings(self) -> dict[str, Any]:
        """What `labkit.results.folders` remembers; ``text`` by its content."""
        import hashlib

        facts = asdict(self)
        if self.text is not None:
            facts["text"] = hashlib.sha256(self._read().encode()).hexdigest()
        return facts

    def check(self, name: str, modalities: Collection[str]) -> None:
        """Refuse what cannot be had, before a model is loaded.

        Raises:
            MaterialError: a model without eyes and no text, or a text that cannot be read.
        """
        if self.text is not None:
            self._read()
        elif "image" not in modalities:
            raise MaterialError(
                f"{name} takes no images, so PhoneTap cannot judge it: give a file of plain text (--text)"
            )

    def calibration_batches(self, processor: Any, modalities: Collection[str], model: Any) -> list[Any]:
        """Model inputs for calibration of ``model``, or of models of that class."""
        if self.text is not None:
            return list(self.sequences(processor.tokenizer, "calibration").split(1))
        seed = DRAWN_FROM + self.seed if self.seed else None
        return default_calibration(processor, modalities, self.calibration, seed=seed, model=model)

    def make_probe(self, engine: Any) -> Probe:
        """The probe of the unquantized ``engine``."""
        if self.text is not None:
            return text_probe(engine.model, self.sequences(engine.tokenizer, "probe").split(4))
        return answer_probe(engine, self.items("probe", engine.modalities))

    def items(self, purpose: str, modalities: Collection[str]) -> list[Any]:
        """PhoneTap items of the calibration part for ``probe`` or ``validation``."""
        count = getattr(self, purpose)
        if not count:
            return []
        seed = PROBE_SEED if purpose == "probe" else VALIDATION_SEED
        split = "all" if "audio" in modalities else "typed"
        return phonetap.items(split=split, count=count, seed=seed, part="calibration")

    def sequences(self, tokenizer: Any, purpose: str) -> Tensor:
        """Token ids [n, length] of the text's part for ``purpose``, at most as many as are wanted: its first ones, or
        for calibration with a ``seed`` such as that draws.

        Raises:
            MaterialError: the part is shorter than one sequence.
        """
        text = self._read()
        low, high = (round(share * len(text)) for share in SHARES[purpose])
        ids = tokenizer.encode(text[low:high], add_special_tokens=False)
        there = len(ids) // self.length
        if not there:
            raise MaterialError(
                f"{self.text}: its part for {purpose} has {len(ids)} tokens, and a sequence takes {self.length}"
            )
        whole = torch.tensor(ids[: there * self.length]).view(there, self.length)
        if purpose == "calibration" and self.seed:
            whole = whole[torch.randperm(there, generator=torch.Generator().manual_seed(self.seed))]
        return whole[: max(getattr(self, purpose), 1)]

    def _read(self) -> str:
        try:
            return Path(self.text).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MaterialError(f"the text {self.text} cannot be read: {error}") from None
