"""A trial of a family before its weights are read: does its small random twin answer here as by its own `generate`?"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LoadError
from labkit.engine.forward import Forward
from labkit.engine.kv_cache import PLAIN, Keeping
from labkit.engine.own_way import OwnForward, has_own_way, plain_forward
from labkit.models.checkpoint import quiet_transformers
from labkit.models.twin import twin_of

TRIED = frozenset(
    {
        "GlmAsrForConditionalGeneration",
        "Gemma3nForConditionalGeneration",
        "Glm4vForConditionalGeneration",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Phi4MultimodalForCausalLM",
        "PocketForConditionalGeneration",
        "Qwen2ForCausalLM",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen3ForCausalLM",
    }
)
"""Classes that the tests hold against transformers; no twin of theirs is built at load."""
PROMPTS = (4, 13, 20)
"""Tokens of the trial's prompts: a twin's windows and short contexts are met in the answer and in the prompt."""
ANSWER = 6
PATIENCE_S = 5.0
"""After this time the trial begins no further prompt: some families have slow layers on the CPU."""
TOLERANCE = 1e-2
"""The largest difference of two logits, in standard deviations of the logits; sums in another order give 1e-4."""


@dataclass(frozen=True)
class Outcome:
    """What a trial shows.

    Attributes:
        fault: how the lab's answers differ from transformers'; None if they do not, or no twin could be built.
        joins: whether several rows may be computed in one pass.
    """

    fault: str | None
    joins: bool


_outcomes: dict[tuple[type, str], Outcome] = {}


def check_family(model_class: type, config: Any) -> None:
    """Refuse a family whose twin answers otherwise than transformers' own `generate`.

    Raises:
        LoadError: naming the family and what differs.
    """
    fault = try_family(model_class, config).fault
    if fault is not None:
        raise LoadError(
            f"models of the family {config.model_type} ({model_class.__name__}) are not supported: a small random one "
            f"does not answer here as by transformers' own generate ({fault})"
        )


def try_family(model_class: type, config: Any) -> Outcome:
    """The outcome of the trial, computed once for each class and configuration. No twin: rows go one by one."""
    if model_class.__name__ in TRIED:
        return Outcome(None, joins=True)
    key = model_class, json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _outcomes:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            _outcomes[key] = _try(model_class, config)
    return _outcomes[key]


def forward_of(model: nn.Module, keeping: Keeping = PLAIN) -> Forward:
    """The passes of a model; ``keeping`` says how its cache is kept."""
    if has_own_way(type(model)):
        return OwnForward(model, keeping)
    return Forward(model, keeping, joins=try_family(type(model), model.config).joins)


@dataclass(frozen=True)
class _Reference:
    """A prompt [1, L], transformers' answer to it, and the logits [1, vocabulary] before each of its tokens."""

    prompt: Tensor
    answer: Tensor
    logits: tuple[Tensor, ...]


@torch.inference_mode()
def _try(model_class: type, config: Any) -> Outcome:
    twin = twin_of(model_class, config)
    if twin is None:
        return Outcome(None, joins=False)
    started = time.monotonic()
    try:
        references = [
            _reference(twin, length) for length in PROMPTS if time.monotonic() - started < PATIENCE_S
        ]
    except (
        Exception
    ):  # the twin itself cannot answer: its size was guessed wrongly, which says nothing of the family
        return Outcome(None, joins=False)
    if not all(logits.isfinite().all() for reference in references for logits in reference.logits):
        return Outcome(None, joins=False)
    try:
        fault = _alone(twin, references)
    except Exception as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return Outcome(fault, joins=fault is None and _agree_together(twin, references))


def _reference(twin: nn.Module, length: int) -> _Reference:
    vocabulary = twin.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(vocabulary // 8, vocabulary // 2, (1, length))
    output = twin.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER, do_sample=False, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return _Reference(prompt, output.sequences[0, length:], output.logits)


def _alone(twin: nn.Module, references: list[_Reference]) -> str | None:
    forward = plain_forward(twin, joins=False)
    for reference in references:
        row, logits = forward.prefill({"input_ids": reference.prompt})
        for number, expected in enumerate(reference.logits):
            if not _same(logits[0], expected[0]):
                return f"token {number + 1} after a prompt of {reference.prompt.shape[1]} tokens"
            if number + 1 < ANSWER:
                logits = forward.step([row], reference.answer[number : number + 1], alone=True)
    return None


def _agree_together(twin: nn.Module, references: list[_Reference]) -> bool:
    """Whether rows of one pass get the logits that they get alone."""
    try:
        forward = plain_forward(twin, joins=True)
        rows = [forward.prefill({"input_ids": reference.prompt})[0] for reference in references]
        for number in range(ANSWER - 1):
            tokens = torch.stack([reference.answer[number] for reference in references])
            logits = forward.step(rows, tokens)
            for row_logits, reference in zip(logits, references):
                if not _same(row_logits, reference.logits[number + 1][0]):
                    return False
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError):
        return False  # its attention takes the rows' keys and values apart
    return True


def _same(logits: Tensor, expected: Tensor) -> bool:
    return bool((logits - expected).abs().max() < TOLERANCE * expected.float().std())
