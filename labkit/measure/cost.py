"""The cost of one engine: bytes, seconds, tokens a second."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from labkit.common.errors import LabError
from labkit.common.machine import gpu_of, peak_rss
from labkit.engine.engine import Engine, Generation
from labkit.plans.quantize import weights_bytes
from labkit.quantization.torch_state import guarded

STANDARD_TEXTS = (
    "你是谁?",
    "Who are you?",
    "Explain in two sentences what a phone's operating system does.",
    "用一句话说明什么是量化。",
    "List five things that people keep in the settings of a phone.",
    "请写一条约朋友周六下午见面的短信。",
    "What is the difference between a byte and a bit?",
    "把这句话翻译成英文：明天早上七点叫我起床。",
)
"""Prompts for models that take no images."""


ID_PROMPT = 32
"""Token ids of a prompt for a model without a tokenizer, besides its image: about as many as a PhoneTap request has."""


@guarded
def measure(
    engine: Engine,
    items: Sequence[Any] | None = None,
    *,
    prompts: int = 8,
    warmup: int = 2,
    max_new_tokens: int = 64,
    enable_thinking: bool = False,
) -> dict[str, Any]:
    """Cost of one engine, one request at a time, greedy.

    Call it in a process that has loaded nothing else: peak memory is that of the process. The clock waits for the GPU
    at every token. Figures are medians over the answers after the warm-up; the raw samples are kept.

    Args:
        engine: as :func:`labkit.load` gave it.
        items: PhoneTap items; ``prompts`` of them are used, spread over the list.  None takes the standard
            set, or standard texts for a model that takes no images.
        prompts: number of timed answers.
        warmup: number of answers before them that are not counted.
        max_new_tokens: longest answer.
        enable_thinking: as in :meth:`labkit.engine.engine.Engine.generate`.

    Returns:
        Fields of :class:`labkit.results.measurement.Measurement`: ``weights_bytes, predicted_bytes, bytes_by_role,
        peak_memory_bytes, peak_memory_kind, load_s, ttft_s, decode_tokens_per_s, answer_s, prompt_tokens``,
        ``samples`` (a list a quantity) and ``environment`` (dtype, threads, batch, GPU, ...).

    Raises:
        LabError: ``prompts`` below 1 or ``warmup`` below 0.
    """
    if prompts < 1 or warmup < 0:
        raise LabError(f"prompts is {prompts} and warmup {warmup}; expected at least 1 and 0")
    conversations = standard_conversations(engine, items, prompts)
    load_peak = start_peak(engine)
    options = {"max_new_tokens": max_new_tokens, "enable_thinking": enable_thinking}
    for index in range(warmup):
        engine.generate(conversations[index % len(conversations)], **options)
    answers = [engine.generate(messages, **options) for messages in conversations]
    peak = peak_memory(*engine.devices)
    samples = samples_of(answers)
    by_role = bytes_by_role(engine)
    return {
        "weights_bytes": sum(by_role.values()),
        "predicted_bytes": getattr(engine.resolved, "predicted_bytes", None),
        "bytes_by_role": by_role,
        "peak_memory_bytes": max(peak, load_peak),
        "peak_memory_kind": "GPU peak allocated" if engine.device.type == "cuda" else peak_rss()[1],
        "load_s": engine.load_s,
        "ttft_s": median(samples["ttft_s"]),
        "decode_tokens_per_s": median(rates) if (rates := samples["decode_tokens_per_s"]) else None,
        "answer_s": median(samples["answer_s"]),
        "prompt_tokens": float(median(samples["prompt_tokens"])),
        "samples": samples,
        "environment": {
            "dtype": str(engine.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch": 1,
            "decoding": engine.route,
            "warmup": warmup,
            "prompts": len(answers),
            "max_new_tokens": max_new_tokens,
            "load_peak_bytes": load_peak,
            "answer_peak_bytes": peak,
            "gpu": gpu_of(engine.device),
        },
    }


def standard_conversations(engine: Engine, items: Sequence[Any] | None, count: int) -> list[Any]:
    """``count`` conversations with inputs that the model takes, spread evenly over the items."""
    takes_ids = getattr(engine.processor, "takes_ids", False)
    if "image" not in engine.modalities:
        if takes_ids:
            return [_in_ids(engine, None, index) for index in range(count)]
        return [
            [{"role": "user", "content": STANDARD_TEXTS[index % len(STANDARD_TEXTS)]}]
            for index in range(count)
        ]
    if items is None:
        from labkit import phonetap

        items = phonetap.items(split="all" if "audio" in engine.modalities else "typed", count=count)
    items = list(items)
    if not items:
        raise LabError("there are no items to measure with")
    chosen = [items[index * len(items) // count] for index in range(min(count, len(items)))]
    if takes_ids:
        return [_in_ids(engine, item.screen.image, index) for index, item in enumerate(chosen)]
    return [item.messages() for item in chosen]


def _in_ids(engine: Engine, image: Any, seed: int) -> list[dict[str, Any]]:
    """A screen and `ID_PROMPT` random token ids, for a model without a tokenizer."""
    parts = [{"type": "text", "text": engine.tokenizer.random_text(ID_PROMPT, seed)}]
    return [{"role": "user", "content": [*([{"type": "image", "image": image}] if image else []), *parts]}]


def samples_of(answers: Sequence[Generation]) -> dict[str, list[float]]:
    """Raw samples of timed answers; ``decode_tokens_per_s`` only for answers with a second token."""
    return {
        "ttft_s": [answer.ttft_s for answer in answers],
        "prepare_s": [answer.prepare_s for answer in answers],
        "answer_s": [answer.ttft_s + answer.decode_s for answer in answers],
        "decode_tokens_per_s": [
            answer.decode_tokens_per_s for answer in answers if answer.decode_tokens_per_s
        ],
        "token_s": [seconds for answer in answers for seconds in answer.token_times_s[1:]],
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
        "completion_tokens": [answer.completion_tokens for answer in answers],
    }


def bytes_by_role(engine: Engine) -> dict[str, int]:
    """Resident bytes of the weights by role; ``other`` holds norms and all else without a role.

    A tensor that two modules share (tied embeddings) counts for the first of them.
    """
    total = weights_bytes(engine.model)
    modules: dict[str, list[torch.nn.Module]] = {}
    for name, role in engine.roles.items():
        modules.setdefault(role, []).append(engine.model.get_submodule(name))
    sizes: dict[str, int] = {}
    before, together = 0, torch.nn.ModuleList()
    for role, members in modules.items():
        together.extend(members)
        now = weights_bytes(together)
        sizes[role], before = now - before, now
    if total - before:
        sizes["other"] = total - before
    return sizes


def peak_memory(*devices: torch.device) -> int:
    """Peak bytes so far: of the process (resident set) on the CPU, allocated by torch on GPUs (their sum)."""
    if devices[0].type == "cuda":
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    return peak_rss()[0]


def start_peak(engine: Engine) -> int:
    """The peak so far, which is that of loading; resets the counters of GPUs."""
    peak = peak_memory(*engine.devices)
    for device in engine.devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    return peak
