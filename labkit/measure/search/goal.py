"""The goal of a search: a number of bytes, of bits a value, or a largest loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from labkit.common.errors import LabError
from labkit.common.formats import UNITS, bytes_of


@dataclass(frozen=True)
class Goal:
    """One of three: ``memory`` in bytes, ``bits`` a value of the Linears on average, ``max_loss``."""

    memory: int | None = None
    bits: float | None = None
    max_loss: float | None = None

    @classmethod
    def of(cls, memory: str | int | None, bits: float | None, max_loss: float | None) -> Goal:
        """The goal from the one argument that is not None.

        Raises:
            LabError: none or several are set, or the number is out of range.
        """
        goals = [value for value in (memory, bits, max_loss) if value is not None]
        if len(goals) != 1:
            raise LabError("give one goal: memory (60MB), bits (4.5) or max-loss (0.5)")
        if memory is not None:
            return cls(memory=bytes_of(memory))
        if bits is not None and not 1 <= bits <= 32:
            raise LabError(f"bits must be between 1 and 32, not {bits!r}")
        if max_loss is not None and not 0 <= max_loss <= 100:
            raise LabError(f"max-loss must be between 0 and 100, not {max_loss!r}")
        return cls(bits=bits, max_loss=max_loss)

    @property
    def label(self) -> str:
        """``20MB``, ``4.5bit`` or ``loss-0.5``: part of names."""
        if self.memory is not None:
            power = "GB" if self.memory >= 10**9 else "MB"
            return f"{self.memory / UNITS[power.lower()]:.4g}{power}"
        return f"{self.bits:g}bit" if self.bits is not None else f"loss-{self.max_loss:g}"

    def settings(self) -> dict[str, Any]:
        """The goal that is set, as plain data."""
        return {key: value for key, value in asdict(self).items() if value is not None}


ROUNDS = 8
"""Most plans that a search measures before it keeps the best of them."""


KEPT_DTYPES = ("bf16", "fp16")
"""Types for what is not quantized: fp16 rounds finer, bf16 holds larger values and is faster on many CPUs."""


AGAINST = ("int4", "gptq", "int8")
"""Uniform plans that the searched plan is compared with."""
