"""The engine: the one generation loop.  Evaluation, measurement, service and chat all go through it.

engine = labkit.load("pocket", "int8")
answer = engine.generate([{"role": "user", "content": [{"type": "image", "image": screenshot},
                                                       {"type": "text", "text": "打开设置"}]}])
answer.text, answer.ttft_s, answer.decode_tokens_per_s
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from labkit.detokenize import Detokenizer
from labkit.errors import LabError
from labkit.forward import CachedForward, collate
from labkit.generation import Generation, RunningAnswer, TextStream
from labkit.media import normalise_messages
from labkit.models.families import family_of
from labkit.models.spec import ModelSpec
from labkit.sampling import Sampler, SamplingSettings

Messages = Sequence[Mapping[str, Any]]


class GenerationError(LabError):
    """A request that this model cannot answer."""


class Engine:
    """A loaded, quantized model that answers.

    Made by :func:`labkit.load`.  Attributes: ``model``, ``processor``, ``tokenizer``, ``spec``, ``plan``,
    ``resolved`` (what the plan did to each module), ``roles``, ``device``, ``dtype``, ``load_s`` (seconds
    of reading and quantizing the weights; importing libraries is not counted) and ``provenance`` (what the
    model was calibrated with and, if it was restored, made of: for the record that `labkit.save` writes).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        *,
        spec: ModelSpec,
        plan: Any = None,
        resolved: Any = None,
        roles: Mapping[str, str] | None = None,
        load_s: float = 0.0,
        provenance: Mapping[str, Any] | None = None,
    ):
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.spec, self.plan, self.resolved = spec, plan, resolved
        self.roles = dict(roles or {})
        self.load_s = load_s
        self.provenance = dict(provenance or {})
        self.device = next(model.parameters()).device
        self.dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
        known = family_of(model.config.model_type).modalities
        self.modalities = frozenset(getattr(processor, "modalities", known))
        self.end_token_ids = _end_token_ids(model, self.tokenizer)
        text_config = model.config.get_text_config(decoder=True)
        self.max_length: int | None = getattr(text_config, "max_position_embeddings", None)

    def generate(self, messages: Messages, *, enable_thinking: bool = False, **settings: Any) -> Generation:
        """Answer one conversation.

        Args:
            messages: ``[{"role", "content"}]``; content is text or a list of text, image and audio parts.
            enable_thinking: let the model think aloud before it answers, where its template knows how.
            settings: ``max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0, seed=None, stop=()``;
                see :class:`labkit.sampling.SamplingSettings`.

        Raises:
            LabError: a setting, message, image or recording that cannot be used, before anything is computed.
        """
        stream = self.stream(messages, enable_thinking=enable_thinking, **settings)
        for _ in stream:
            pass
        return stream.generation

    def stream(self, messages: Messages, *, enable_thinking: bool = False, **settings: Any) -> TextStream:
        """As :meth:`generate`, but gives the text in pieces as they come.  Wrong requests raise here."""
        return TextStream(*self._start([messages], enable_thinking, settings))

    def generate_batch(
        self, conversations: Sequence[Messages], *, enable_thinking: bool = False, **settings: Any
    ) -> list[Generation]:
        """Answer several conversations in one batch, padded on the left.

        Each answer is the one its conversation gets alone, up to the rounding of larger matrix products; with
        a seed, each row draws from a generator of its own.  Times are those of the whole batch.
        """
        if not conversations:
            return []
        steps, sequences = self._start(conversations, enable_thinking, settings)
        for _ in steps:
            pass
        return [sequence.generation for sequence in sequences]

    def prepare(self, messages: Messages, enable_thinking: bool = False) -> dict[str, torch.Tensor]:
        """Model inputs for one conversation, on the CPU: ``input_ids [1, L]`` and what its media need.

        Raises:
            GenerationError: media this model has no sense for, or a prompt longer than its context.
        """
        messages = normalise_messages(messages)
        kinds = {
            part["type"]
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
        }
        for kind in sorted(kinds - {"text"} - self.modalities):
            reason = getattr(self.processor, "missing", {}).get(kind)
            senses = ", ".join(["text", *sorted(self.modalities)])
            raise GenerationError(
                f"{self.spec.name} does not take {kind} input"
                + (f": {reason}" if reason else f"; it takes {senses}")
            )
        inputs = dict(self.processor(messages, enable_thinking=enable_thinking))
        length = inputs["input_ids"].shape[1]
        if length == 0:
            raise GenerationError("the prompt is empty")
        if self.max_length is not None and length >= self.max_length:
            raise GenerationError(
                f"the prompt has {length} tokens; {self.spec.name} takes {self.max_length - 1}"
            )
        return inputs

    def _start(
        self, conversations: Sequence[Messages], enable_thinking: bool, options: Mapping[str, Any]
    ) -> tuple[Iterator[list[tuple[int, str]]], list[RunningAnswer]]:
        """Check and prepare everything, compute nothing yet."""
        started = time.perf_counter()
        try:
            settings = SamplingSettings(**options)
        except TypeError:
            known = list(SamplingSettings.__dataclass_fields__)
            unknown = sorted(set(options) - set(known))
            raise GenerationError(
                f"unknown setting {', '.join(unknown)}; known: {', '.join(known)}"
            ) from None
        prompts = [self.prepare(messages, enable_thinking) for messages in conversations]
        sequences = []
        for prompt in prompts:
            length = prompt["input_ids"].shape[1]
            room = settings.max_new_tokens if self.max_length is None else self.max_length - length
            sequences.append(
                RunningAnswer(
                    Sampler(settings, self.device),
                    Detokenizer(self.tokenizer),
                    self.end_token_ids,
                    prompt_tokens=length,
                    limit=min(settings.max_new_tokens, room),
                )
            )
        pad = self.tokenizer.pad_token_id
        batch = collate(prompts, pad if pad is not None else 0)
        batch = {key: value.to(self.device) for key, value in batch.items()}
        for sequence in sequences:
            sequence.generation.prepare_s = time.perf_counter() - started
        return self._steps(batch, sequences, started), sequences

    def _steps(
        self, batch: dict[str, torch.Tensor], sequences: list[RunningAnswer], started: float
    ) -> Iterator[list[tuple[int, str]]]:
        """The loop: after each step, the text of each unfinished row as ``(row, text)``."""
        waited = time.perf_counter()
        forward = CachedForward(self.model, batch)
        batch.clear()
        active = list(range(len(sequences)))
        logits = forward.prefill()
        while True:
            tokens = _choose(logits, [sequences[row].sampler for row in active])
            deltas = [(row, sequences[row].push(token)) for row, token in zip(active, tokens.tolist())]
            now = time.perf_counter()
            for row in active:
                first = not sequences[row].generation.token_times_s
                prepared = sequences[row].generation.prepare_s if first else 0.0
                sequences[row].spend(now - waited + prepared)
            yield deltas
            waited = time.perf_counter()
            rows = [index for index, row in enumerate(active) if not sequences[row].finished]
            if not rows:
                return
            if len(rows) < len(active):
                forward.keep(rows)
                tokens = tokens[rows]
                active = [active[index] for index in rows]
            logits = forward.step(tokens)


@torch.inference_mode()
def _choose(logits: torch.Tensor, samplers: list[Sampler]) -> torch.Tensor:
    """The next token of each row, ``[B]`` int64 on the logits' device.  The check waits for the GPU."""
    if all(sampler.greedy for sampler in samplers):
        best, tokens = logits.max(dim=-1)
    else:
        best = logits.amax(dim=-1)
    if not bool(torch.isfinite(best).all()):
        raise GenerationError(
            f"the model's logits are not finite in {str(logits.dtype).removeprefix('torch.')}: "
            "try a plan with bf16 or fp32 as default"
        )
    if all(sampler.greedy for sampler in samplers):
        return tokens
    return torch.stack([sampler(row) for row, sampler in zip(logits, samplers)])


def _end_token_ids(model: torch.nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, as the generation config, the config and the tokenizer say."""
    found: set[int] = set()
    sources = (
        getattr(model, "generation_config", None),
        model.config,
        model.config.get_text_config(),
        tokenizer,
    )
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)
