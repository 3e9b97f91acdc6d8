"""One answer: what it is when it is done, and while it grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from labkit.engine.detokenize import Detokenizer, StopMatcher
from labkit.engine.sampling import Sampler, TokenLogprobs

if TYPE_CHECKING:
    from labkit.engine.step import Row


@dataclass
class Generation:
    """One answer and what it cost.

    Attributes:
        text: the answer, without stop strings and special tokens.
        prompt_tokens: tokens of the prompt, image and audio tokens included.
        completion_tokens: tokens generated, the end token included.
        finish_reason: ``stop`` (end token, stop string or a finished grammar) or ``length``
            (``max_new_tokens`` or the context).
        ttft_s: seconds from the request to the first token: processor, prefill, first choice; in a batch also
            what it waited for others.
        decode_s: seconds of all later steps together.
        token_times_s: seconds of each step; the first is ``ttft_s``.
        prepare_s: the processor's share of ``ttft_s``.
        token_ids: the tokens generated.
        logprobs: one entry a token, if ``logprobs`` was asked for.
    """

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "length"
    ttft_s: float = 0.0
    decode_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    prepare_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens a second after the first; None if there was only one."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else None


class RunningAnswer:
    """One answer from the prepared prompt to the last token: what a `labkit.engine.batching.Batch` works on.

    Attributes:
        inputs: the prompt's tensors on the CPU, until it is prefilled.
        row: the conversation's state in the model, from then on.
        generation: the answer so far.
        finished: no more tokens will come.
        error: why it ended without an answer, or None: a `LabError` is for who asked, any other is a bug.
        end_tokens: the tokens that end it.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        sampler: Sampler,
        detokenizer: Detokenizer,
        end_token_ids: frozenset[int],
        *,
        prompt_tokens: int,
        limit: int,
    ):
        self.inputs: Mapping[str, Any] | None = inputs
        self.row: Row | None = None
        self.sampler = sampler
        self.generation = Generation(prompt_tokens=prompt_tokens)
        self.finished = False
        self.error: BaseException | None = None
        self.since_s = 0.0
        self._limit = limit
        self.end_tokens = end_token_ids
        self._detokenizer = detokenizer
        self._stops = StopMatcher(sampler.settings.stop)

    def push(self, token: int, logprobs: TokenLogprobs | None = None) -> str:
        """Take one token; returns the text it lets go."""
        generation = self.generation
        generation.token_ids.append(token)
        generation.completion_tokens += 1
        if logprobs is not None:
            generation.logprobs.append(logprobs)
        ended = token in self.end_tokens
        if not ended:
            self.sampler.accept(token)
        constraint = self.sampler.constraint
        text = "" if ended else self._stops.push(self._detokenizer.push(token))
        if ended or self._stops.stopped or (constraint is not None and constraint.done):
            self.finished, generation.finish_reason = True, "stop"
        elif generation.completion_tokens >= self._limit:
            self.finished, generation.finish_reason = True, "length"
        if self.finished:
            text += self._stops.flush()
        generation.text += text
        return text

    def fail(self, error: BaseException) -> None:
        """End without an answer."""
        self.error, self.finished = error, True

    def spend(self, until_s: float) -> None:
        """Book the time that the last token took; ``until_s`` is what the batch has worked in all."""
        seconds, self.since_s = until_s - self.since_s, until_s
        times = self.generation.token_times_s
        if times:
            self.generation.decode_s += seconds
        else:
            seconds += self.generation.prepare_s
            self.generation.ttft_s = seconds
        times.append(seconds)

    def result(self) -> Generation:
        """The finished answer.

        Raises:
            BaseException: what it failed with.
        """
        if self.error is not None:
            raise self.error
        return self.generation
