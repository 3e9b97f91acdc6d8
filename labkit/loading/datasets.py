"""Disjoint data for calibrating, comparing and scoring a model, apart from all test items.

Phone agents use PhoneTap's calibration items, with a seed for each purpose; other models use the parts of a text.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from labkit.common.errors import LabError
from labkit.common.files import user_path
from labkit.common.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from labkit.loading.text import Tokenizer

PROBE_SEED, VALIDATION_SEED = 1, 2
DRAWN_FROM = 100
"""Seeds of other calibration items start above it, so they never equal the two seeds."""
SHARES = {"calibration": (0.0, 0.6), "probe": (0.6, 0.8), "validation": (0.8, 1.0)}
"""The parts of a text: the first calibrates, the next compares, the last scores."""


@dataclass(frozen=True)
class Datasets:
    """The amount of data for each purpose: items for phone agents, else sequences of ``length`` tokens from
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

    def settings(self, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
        """The settings that `labkit.results.folders` stores; the SHA-256 of its content stands for ``text``.

        ``starts_with`` names the tokens that ``tokenizer``, if any, puts before each sequence of text.
        """
        import hashlib

        facts = asdict(self)
        if self.text is not None:
            facts["text"] = hashlib.sha256(self._read().encode()).hexdigest()
            if tokenizer is not None:
                from labkit.loading.text import describe_start

                # Left out where there are none: folders of such models keep their settings.
                facts |= {"starts_with": start} if (start := describe_start(tokenizer)) else {}
        return facts

    def check(self, name: str, modalities: Collection[str]) -> None:
        """Check that the data is available, before a model is loaded.

        Raises:
            LabError: no text for a model that takes no images, or an unreadable text.
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
            default_calibration,  # imports torch, which the command line does not need
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

    def sequences(self, tokenizer: Tokenizer, purpose: str) -> Tensor:
        """Token ids [n, length] from the text's part for ``purpose``, n at most the requested number: the first sequences,
        or random sequences for calibration with a ``seed``. Each begins with the tokens that the tokenizer puts first.

        Raises:
            LabError: the part is shorter than a sequence.
        """
        import torch

        from labkit.loading.text import text_sequences

        text = self._read()
        low, high = (round(share * len(text)) for share in SHARES[purpose])
        name = f"{self.text}: its part for {purpose}"
        sequences = text_sequences(tokenizer, text[low:high], self.length, name)
        count = len(sequences)
        if purpose == "calibration" and self.seed:
            sequences = sequences[torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))]
        return sequences[: max(getattr(self, purpose), 1)]

    def _read(self) -> str:
        try:
            return user_path(self.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LabError(f"the text {self.text} cannot be read: {error}") from None
