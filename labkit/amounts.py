"""What sensitivity and search use unless told otherwise; plain data, so that the command line needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from labkit.common.errors import LabError

CANDIDATES = ("gptq-2bit", "gptq-3bit", "gptq-4bit", "int8", "gptq-8bit")
"""Schemes of which sensitivity is measured, and plans are put together."""
ROUNDS = 8
"""Plans that a search measures at most before it keeps the best of them."""
KEPT_DTYPES = ("bf16", "fp16")
"""What is not quantized may be kept in: fp16 rounds finer, bf16 holds larger values and is faster on many CPUs."""
AGAINST = ("int4", "gptq", "int8")
"""Uniform plans beside which a searched one is judged."""

PERPLEXITY_PLANS = ("int8", "gptq", "awq", "hqq", "nf4", "int4")
"""Plans that `labkit perplexity` compares."""


class MaterialError(LabError):
    """There is nothing to calibrate on or to judge by, or too little of it."""


@dataclass(frozen=True)
class Amounts:
    """For phone agents the counts are items, for other models sequences of ``length`` tokens from ``text``."""

    calibration: int = field(default=64, metadata={"help": "items, or sequences, that calibrate"})
    probe: int = field(default=24, metadata={"help": "those whose answers' distributions are compared"})
    validation: int = field(default=100, metadata={"help": "those on which plans are judged; 0 for none"})
    text: str | None = field(
        default=None, metadata={"help": "a file of plain text, for a model without eyes"}
    )
    length: int = field(default=256, metadata={"help": "tokens of a sequence of text"})
    seed: int = field(default=0, metadata={"help": "draws other items, or sequences, that calibrate"})

    def __post_init__(self) -> None:
        for name in ("calibration", "probe", "validation", "length", "seed"):
            value = getattr(self, name)
            least = 0 if name in ("validation", "seed") else 1
            if type(value) is not int or value < least:
                raise MaterialError(f"{name} must be a whole number of at least {least}, not {value!r}")
