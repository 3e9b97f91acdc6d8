"""The engine: the one generation loop.  Evaluation, measurement, service and chat all go through it.

engine = labkit.load("pocket", "int8")
answer = engine.generate([{"role": "user", "content": [{"type": "image", "image": screenshot},
                                                       {"type": "text", "text": "打开设置"}]}])
answer.text, answer.ttft_s, answer.decode_tokens_per_s
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from labkit.common.errors import LabError, PromptTooLongError
from labkit.common.messages import normalise_messages
from labkit.engine.batching import DECODE_SHARE, Batch, TextStream
from labkit.engine.detokenize import Detokenizer, hidden_tokens
from labkit.engine.forward import Forward
from labkit.engine.generation import Generation, RunningAnswer
from labkit.engine.grammar import Grammar, Grammars
from labkit.engine.kv_cache import keeping_of
from labkit.engine.prompt_length import check_length, longest_token
from labkit.engine.sampling import Sampler, SamplingSettings
from labkit.engine.trial import forward_of
from labkit.models.families import family_of
from labkit.models.spec import ModelSpec
from labkit.quantization.logits import keep_logits_
from labkit.quantization.torch_state import guarded

__all__ = ["Engine", "Generation", "Messages"]

Messages = Sequence[Mapping[str, Any]]


class Engine:
    """A loaded, quantized model that answers.

    Made by :func:`labkit.load`.  Attributes: ``model``, ``processor``, ``tokenizer``, ``spec``, ``plan``,
    ``resolved`` (what the plan did to each module), ``roles``, ``device``, ``devices``, ``dtype``, ``load_s`` (seconds
    of reading and quantizing the weights; importing libraries is not counted) and ``provenance`` (what the
    model was calibrated with and, if it was restored, made of: for the record that `labkit.save` writes), and
    ``weights`` (``random`` if they are, else None).
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
        weights: str | None = None,
    ):
        self.model = model.eval()
        keep_logits_(model)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.spec, self.plan, self.resolved = spec, plan, resolved
        self.roles = dict(roles or {})
        self.load_s = load_s
        self.provenance = dict(provenance or {})
        self.weights = weights
        self._texts: dict[tuple[int, ...], str] = {}
        self.device = next(model.parameters()).device
        self.devices = list(dict.fromkeys(parameter.device for parameter in model.parameters()))
        self.dtype = next(
            (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()),
            torch.float32,
        )
        family = family_of(model.config.model_type)
        self.modalities = frozenset(getattr(processor, "modalities", family.modalities))
        self.end_token_ids = _end_token_ids(model, self.tokenizer)
        text_config = model.config.get_text_config(decoder=True)
        self.max_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self.vocabulary: int = text_config.vocab_size

    def generate(self, messages: Messages, *, enable_thinking: bool = False, **settings: Any) -> Generation:
        """Answer one conversation.

        Args:
            messages: ``[{"role", "content"}]``; content is text or a list of text, image and audio parts.
            enable_thinking: let the model think aloud before it answers, where its template knows how.
            settings: ``max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0, seed=None, stop=()`` and
                more; see :class:`labkit.engine.sampling.SamplingSettings`. ``grammar`` keeps the answer to one of
                ``engine.grammars`` (:mod:`labkit.engine.grammar`).

        Raises:
            LabError: a setting, message, image or recording that cannot be used, before anything is computed.
        """
        answer = self.request(messages, enable_thinking=enable_thinking, **settings)
        batch = self.batch(1)
        batch.add(answer)
        batch.run()
        return answer.result()

    def stream(self, messages: Messages, *, enable_thinking: bool = False, **settings: Any) -> TextStream:
        """As :meth:`generate`, but gives the text in pieces as they come.  Wrong requests raise here."""
        answer = self.request(messages, enable_thinking=enable_thinking, **settings)
        batch = self.batch(1)
        batch.add(answer)
        return TextStream(batch, answer)

    def generate_batch(
        self, conversations: Sequence[Messages], *, enable_thinking: bool = False, **settings: Any
    ) -> list[Generation]:
        """Answer several conversations in one batch.

        Each answer is the one its conversation gets alone: to the last bit in bf16 and with integer weights,
        up to the rounding of larger matrix products in fp32 and fp16. With a seed, each row draws from a
        generator of its own. Times include what an answer waited for the others.
        """
        answers = [
            self.request(messages, enable_thinking=enable_thinking, **settings) for messages in conversations
        ]
        batch = self.batch(max(len(answers), 1))
        for answer in answers:
            batch.add(answer)
        batch.run()
        return [answer.result() for answer in answers]

    def batch(self, rows: int, decode_share: float = DECODE_SHARE) -> Batch:
        """A new batch of this engine, for answers that :meth:`request` gives."""
        return Batch(self.forward, self.device, rows, decode_share)

    @guarded
    def request(
        self,
        messages: Messages,
        *,
        enable_thinking: bool = False,
        grammar: Grammar | None = None,
        inputs: Mapping[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> RunningAnswer:
        """Check and prepare one answer for a batch; computes nothing yet, and may be called from any thread.

        ``inputs`` are what :meth:`prepare` gave for these messages, if that is known already.

        Raises:
            LabError: as :meth:`generate`.
        """
        started = time.perf_counter()
        try:
            settings = SamplingSettings(**options)
        except TypeError:
            names = list(SamplingSettings.__dataclass_fields__)
            unknown = sorted(set(options) - set(names))
            raise LabError(f"unknown setting {', '.join(unknown)}; known: {', '.join(names)}") from None
        outside = [token for token in settings.logit_bias if token >= self.vocabulary]
        if outside:
            raise LabError(
                f"logit_bias names the token {outside[0]}; {self.spec.name} has 0 to {self.vocabulary - 1}"
            )
        inputs = self.prepare(messages, enable_thinking) if inputs is None else inputs
        length = inputs["input_ids"].shape[1]
        room = settings.max_new_tokens if self.max_length is None else self.max_length - length
        limit = min(settings.max_new_tokens, room)
        ends = self.end_token_ids | set(settings.stop_token_ids)
        sampler = Sampler(
            settings,
            self.device,
            prompt_ids=inputs["input_ids"][0].tolist(),
            end_token_ids=ends,
            constraint=grammar.start(limit) if grammar is not None else None,
        )
        answer = RunningAnswer(
            inputs,
            sampler,
            Detokenizer(self.tokenizer, self._texts, self._hidden_tokens),
            ends,
            prompt_tokens=length,
            limit=limit,
        )
        answer.generation.prepare_s = time.perf_counter() - started
        return answer

    @guarded
    def prepare(self, messages: Messages, enable_thinking: bool = False) -> dict[str, torch.Tensor]:
        """Model inputs for one conversation, on the CPU: ``input_ids [1, L]`` and what its media need.

        Raises:
            LabError: media this model has no sense for, or a prompt longer than its context.
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
            raise LabError(
                f"{self.spec.name} does not take {kind} input"
                + (f": {reason}" if reason else f"; it takes {senses}")
            )
        check_length(messages, self.tokenizer, self._longest_token, self.max_length, self.spec.name)
        inputs = dict(self.processor(messages, enable_thinking=enable_thinking))
        length = inputs["input_ids"].shape[1]
        if length == 0:
            raise LabError("the prompt is empty")
        last = int(inputs["input_ids"].max())
        if last >= self.vocabulary:
            raise LabError(
                f"the prompt has the token {last} ({self.tokenizer.decode([last])!r}), and {self.spec.name} has "
                f"0 to {self.vocabulary - 1}: its tokenizer has more tokens than the model"
            )
        if self.max_length is not None and length >= self.max_length:
            raise PromptTooLongError(
                f"the prompt has {length} tokens; {self.spec.name} takes {self.max_length - 1}"
            )
        return inputs

    @cached_property
    def _hidden_tokens(self) -> frozenset[int]:
        return hidden_tokens(self.tokenizer)

    @cached_property
    def grammars(self) -> Grammars:
        """What answers can be kept to: ``engine.generate(…, grammar=engine.grammars.grammar("action"))``."""
        return Grammars(self.tokenizer, self.vocabulary, self.end_token_ids)

    @cached_property
    def _longest_token(self) -> int:
        return longest_token(self.tokenizer)

    @cached_property
    def _forward(self) -> Forward:
        return forward_of(self.model, keeping_of(getattr(self.plan, "runtime", None)))

    @property
    def forward(self) -> Forward:
        """The model's passes."""
        return self._forward

    @property
    def route(self) -> str:
        """By what a token is decoded: a captured or compiled step, or the model's own modules and why."""
        return self.forward.route


def _end_token_ids(model: torch.nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, as the generation config, the config and the tokenizer say."""
    ends: set[int] = set()
    sources = (
        getattr(model, "generation_config", None),
        model.config,
        model.config.get_text_config(),
        tokenizer,
    )
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        ends.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(ends)
