"""A request's parameters as the engine's settings, one set for each answer it wants."""

from __future__ import annotations

from typing import Any

from labkit.common.errors import ApiError
from labkit.service.options import ServiceOptions
from labkit.service.schemas import ChatRequest


def settings_of(request: ChatRequest, options: ServiceOptions, count: int) -> list[dict[str, Any]]:
    """Keyword arguments of `labkit.engine.engine.Engine.request`, ``count`` times; each answer has a seed of its own.

    Raises:
        ApiError: a logit_bias whose token is no number.
    """
    settings: dict[str, Any] = {
        "max_new_tokens": longest_answer(request, options),
        "temperature": _or(request.temperature, 0.0),
        "top_p": _or(request.top_p, 1.0),
        "top_k": max(_or(request.top_k, 0), 0),
        "stop": request.stop or (),
        "frequency_penalty": _or(request.frequency_penalty, 0.0),
        "presence_penalty": _or(request.presence_penalty, 0.0),
        "repetition_penalty": _or(request.repetition_penalty, 1.0),
        "logit_bias": _biases(request.logit_bias or {}),
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
    }
    return [settings | {"seed": _seed(request.seed, index)} for index in range(count)]


def longest_answer(request: ChatRequest, options: ServiceOptions) -> int:
    """Most tokens of an answer; the model's context may allow fewer."""
    return request.max_completion_tokens or request.max_tokens or options.max_tokens


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _seed(seed: int | None, index: int) -> int | None:
    """A seed of 64 bits for the index-th answer."""
    return None if seed is None else (seed + index + 2**63) % 2**64 - 2**63


def _biases(given: dict[str, float]) -> dict[int, float]:
    biases = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ApiError(
                "logit_bias: tokens are named by their numbers, as '17'",
                param="logit_bias",
                code="value_error",
            )
        biases[int(token)] = bias
    return biases
