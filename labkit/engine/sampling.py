"""From logits to the next token: penalties and biases, then greedy, or temperature, top-k and top-p with a seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from labkit.common.errors import LabError

MAX_LOGPROBS = 20
"""Most alternatives whose log-probabilities can be asked for at each token."""


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
        frequency_penalty: taken off a token's logit for each time the answer has it already (-2..2).
        presence_penalty: taken off once if the answer has it (-2..2).
        repetition_penalty: divides the logits of tokens of prompt and answer (0..100]; 1 is off.
        logit_bias: token id to what is added to its logit (-100..100).
        logprobs: how many alternatives' log-probabilities to keep at each token (0..20); None keeps none.
        stop_token_ids: tokens that end the answer besides the model's own; they are not part of it.
        min_new_tokens: no end token before that many.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        for name, test, expected in _RULES:
            value = getattr(self, name)
            if not test(value):
                raise LabError(f"{name} is {value!r}; expected {expected}")
        if self.min_new_tokens > self.max_new_tokens:
            raise LabError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _between(low: float, high: float):
    return lambda value: _is_number(value) and low <= value <= high


def _is_bias(value: Mapping[int, float]) -> bool:
    return all(
        _is_integer(token) and token >= 0 and _between(-100, 100)(bias) for token, bias in value.items()
    )


# Field, test, what would be right. Comparisons with NaN are false.
_RULES = (
    ("max_new_tokens", lambda value: _is_integer(value) and value >= 1, "a whole number from 1"),
    ("temperature", _between(0, 100), "a number from 0 (greedy) to 100"),
    ("top_p", lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    ("top_k", lambda value: _is_integer(value) and value >= 0, "a whole number from 0 (off)"),
    (
        "seed",
        lambda value: value is None or (_is_integer(value) and -(2**63) <= value < 2**63),
        "a whole number of 64 bits or None",
    ),
    (
        "stop",
        lambda value: all(isinstance(entry, str) and entry for entry in value),
        "strings of at least one character",
    ),
    ("frequency_penalty", _between(-2, 2), "a number from -2 to 2"),
    ("presence_penalty", _between(-2, 2), "a number from -2 to 2"),
    (
        "repetition_penalty",
        lambda value: _is_number(value) and 0 < value <= 100,
        "a number above 0 and at most 100; 1 is off",
    ),
    ("logit_bias", _is_bias, "token ids with numbers from -100 to 100"),
    (
        "logprobs",
        lambda value: value is None or (_is_integer(value) and 0 <= value <= MAX_LOGPROBS),
        f"a whole number from 0 to {MAX_LOGPROBS}, or None",
    ),
    ("stop_token_ids", lambda value: all(_is_integer(entry) and entry >= 0 for entry in value), "token ids"),
    ("min_new_tokens", lambda value: _is_integer(value) and value >= 0, "a whole number from 0"),
)


class Constraint(Protocol):
    """What keeps an answer to a grammar (`labkit.engine.grammar`)."""

    done: bool

    def allowed(self) -> Tensor:
        """Which tokens may come next: bool ``[vocabulary]``, on the CPU."""

    def accept(self, token: int) -> None:
        """Take the token that came."""


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability, and the likeliest tokens at its place with theirs, the likeliest first.

    They are the model's own, before penalties, temperature and grammar.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def distribution(logits: Tensor, settings: SamplingSettings) -> Tensor:
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
    """Chooses tokens for one sequence; holds its own random generator, so that batching changes nothing.

    Args:
        settings: how to choose.
        device: where the logits are.
        prompt_ids: the prompt's tokens, for the repetition penalty.
        end_token_ids: what `min_new_tokens` holds back.
        constraint: a grammar to keep to.

    ``plain`` says whether the likeliest token is taken as it is, with nothing added to logits or wanted to know.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        device: torch.device | str = "cpu",
        *,
        prompt_ids: Iterable[int] = (),
        end_token_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
    ):
        self.settings = settings
        self.constraint = constraint
        self._counts: dict[int, int] = {}
        self._taken = 0
        self._prompt = frozenset(prompt_ids) if settings.repetition_penalty != 1 else frozenset()
        self._ends = sorted(end_token_ids) if settings.min_new_tokens else []
        self._adjusts = bool(
            settings.frequency_penalty
            or settings.presence_penalty
            or settings.repetition_penalty != 1
            or settings.logit_bias
            or self._ends
            or constraint is not None
        )
        self._generator = None
        if settings.temperature > 0:
            self._generator = torch.Generator(device)
            if settings.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(settings.seed)
        self.plain = self.greedy and settings.logprobs is None and not self._adjusts

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self._generator is None

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token as an int64 scalar tensor on the logits' device.

        Args:
            logits: ``[vocabulary]``, any float dtype, on the sampler's device.

        Raises:
            LabError: biases and grammar together leave no token.
        """
        if self._adjusts:
            logits = self._adjusted(logits.float())
            if not bool(torch.isfinite(logits.amax())):
                raise LabError("no token is left: logit_bias or the grammar excludes all of them")
        if self._generator is None:
            return logits.argmax(dim=-1)
        probabilities = distribution(logits.float(), self.settings)
        return torch.multinomial(probabilities, 1, generator=self._generator)[0]

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""
        self._taken += 1
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.constraint is not None:
            self.constraint.accept(token)

    def logprobs(self, logits: Tensor, token: int) -> TokenLogprobs | None:
        """The log-probabilities that are wanted of a token that was chosen from these logits ``[vocabulary]``."""
        if self.settings.logprobs is None:
            return None
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        best = logprobs.topk(min(self.settings.logprobs, logprobs.numel()))
        top = tuple(zip(best.indices.tolist(), best.values.tolist()))
        return TokenLogprobs(token, logprobs[token].item(), top)

    def _adjusted(self, logits: Tensor) -> Tensor:
        settings, logits = self.settings, logits.clone()
        if settings.repetition_penalty != 1:
            seen = self._index(self._prompt | self._counts.keys(), logits)
            values = logits[seen]
            penalty = settings.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if (settings.frequency_penalty or settings.presence_penalty) and self._counts:
            counts = torch.tensor(list(self._counts.values()), device=logits.device, dtype=logits.dtype)
            less = settings.frequency_penalty * counts + settings.presence_penalty
            logits[self._index(self._counts, logits)] -= less
        if settings.logit_bias:
            biases = torch.tensor(
                list(settings.logit_bias.values()), device=logits.device, dtype=logits.dtype
            )
            logits[self._index(settings.logit_bias, logits)] += biases
        if self._ends and self._taken < settings.min_new_tokens:
            logits[self._index(self._ends, logits)] = -torch.inf
        if self.constraint is not None:
            allowed = self.constraint.allowed().to(logits.device)
            logits = logits.masked_fill(~allowed, -torch.inf)
        return logits

    @staticmethod
    def _index(tokens: Iterable[int], logits: Tensor) -> Tensor:
        return torch.tensor(list(tokens), device=logits.device, dtype=torch.long)
