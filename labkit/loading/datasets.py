"""What a model is calibrated on, compared on and scored on, apart from each other and from all test items.

A phone agent gets PhoneTap's calibration items, of different seeds for each purpose; any other language model
gets a text, the first part of which calibrates, the next compares and the last scores.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.common.errors import LabError
from labkit.common.options import option

if TYPE_CHECKING:
    from torch import Tensor


PROBE_SEED, VALIDATION_SEED = 1, 2
DRAWN_FROM = 100
"""Seeds of other calibration items are above it, and so never those of the two."""
SHARES = {"calibration": (0.0, 0.6), "probe": (0.6, 0.8), "validation": (0.8, 1.0)}
"""The parts of a text, from its beginning to its end."""


@dataclass(frozen=True)
class Datasets:
    """How much of what: for phone agents the counts are items, for other models sequences of ``length`` tokens from
    ``text``."""

    calibration: int = option(64, "items, or sequences, to calibrate on", least=1)
    probe: int = option(24, "items, or sequences, whose answers' distributions are compared", least=1)
    validation: int = option(100, "items, or sequences, on which plans are scored; 0 for none", least=0)
    text: str | None = option(None, "a plain text file, for a model that takes no images", metavar="FILE")
    length: int = option(256, "tokens of a sequence of text", least=1)
    seed: int = option(0, "draws other items, or sequences, to calibrate on", least=0)

    def __post_init__(self) -> None:
        for name in ("calibration", "probe", "validation", "length", "seed"):
            value = getattr(self, name)
            least = 0 if name in ("validation", "seed") else 1
            if type(value) is not int or value < least:
                raise LabError(f"{name} must be a whole number of at least {least}, not {value!r}")

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
            LabError: a model that takes no images, and no text, or a text that cannot be read.
        """
        if self.text is not None:
            self._read()
        elif "image" not in modalities:
            raise LabError(
                f"{name} takes no images, so PhoneTap cannot judge it: give a file of plain text (--text)"
            )

    def calibration_batches(self, processor: Any, modalities: Collection[str], model: Any) -> list[Any]:
        """Model inputs for calibration of ``model``, or of models of that class."""
        from labkit.loading.calibration import (
            default_calibration,  # torch comes with it; the command line reads fields
        )

        if self.text is not None:
            return list(self.sequences(processor.tokenizer, "calibration").split(1))
        seed = DRAWN_FROM + self.seed if self.seed else None
        return default_calibration(processor, modalities, self.calibration, seed=seed, model=model)

    def items(self, purpose: str, modalities: Collection[str]) -> list[Any]:
        """PhoneTap items of the calibration part for ``probe`` or ``validation``."""
        from labkit import phonetap

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
            LabError: the part is shorter than one sequence.
        """
        import torch

        text = self._read()
        low, high = (round(share * len(text)) for share in SHARES[purpose])
        ids = tokenizer.encode(text[low:high], add_special_tokens=False)
        there = len(ids) // self.length
        if not there:
            raise LabError(
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
            raise LabError(f"the text {self.text} cannot be read: {error}") from None
