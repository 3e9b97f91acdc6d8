"""From logits to the next token: greedy, or temperature, top-k and top-p with a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from labkit.errors import LabError


class SamplingError(LabError):
    """A sampling setting out of range."""


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen, and when to stop.

    Attributes:
        max_new_tokens: most tokens to generate, the end token included; at least 1.
        temperature: 0 takes the likeliest token; higher flattens the distribution.
        top_p: sample from the smallest set of tokens whose probabilities sum to this (0..1].
        top_k: sample from this many likeliest tokens; 0 means all.
        seed: the same seed gives the same answer again; None draws another one each time.
        stop: strings that end the answer; they are not part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        if not _is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise SamplingError(f"max_new_tokens is {self.max_new_tokens!r}; expected a whole number from 1")
        if not _is_number(self.temperature) or not 0 <= self.temperature <= 100:
            raise SamplingError(
                f"temperature is {self.temperature!r}; expected a number from 0 (greedy) to 100"
            )
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p!r}; expected a number above 0 and at most 1")
        if not _is_integer(self.top_k) or self.top_k < 0:
            raise SamplingError(f"top_k is {self.top_k!r}; expected a whole number from 0 (off)")
        if self.seed is not None and (not _is_integer(self.seed) or not -(2**63) <= self.seed < 2**63):
            raise SamplingError(f"seed is {self.seed!r}; expected a whole number of 64 bits or None")
        if not all(isinstance(one, str) and one for one in stop):
            raise SamplingError(f"stop is {self.stop!r}; expected strings of at least one character")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def distribution(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Probabilities ``[vocabulary]`` after temperature, top-k and top-p, in that order.

    Args:
        logits: float32 ``[vocabulary]``.
        settings: ``temperature`` above 0.
    """
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.numel():
        threshold = logits.topk(settings.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if settings.top_p < 1:
        sorted_probabilities, order = probabilities.sort(descending=True, stable=True)
        before = sorted_probabilities.cumsum(-1) - sorted_probabilities
        sorted_probabilities = sorted_probabilities.masked_fill(before >= settings.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(0, order, sorted_probabilities)
        probabilities = probabilities / probabilities.sum()
    return probabilities


class Sampler:
    """Chooses tokens for one sequence; holds its own random generator, so that batching changes nothing."""

    def __init__(self, settings: SamplingSettings, device: torch.device | str = "cpu"):
        self.settings = settings
        self._generator = None
        if settings.temperature > 0:
            self._generator = torch.Generator(device)
            if settings.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(settings.seed)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self._generator is None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token as an int64 scalar tensor on the logits' device.

        Args:
            logits: ``[vocabulary]``, any float dtype, on the sampler's device.
        """
        if self._generator is None:
            return logits.argmax(dim=-1)
        probabilities = distribution(logits.float(), self.settings)
        return torch.multinomial(probabilities, 1, generator=self._generator)[0]
