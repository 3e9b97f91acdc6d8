"""One answer: what it is when it is done, while it grows, and as a stream of text."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from labkit.detokenize import Detokenizer, StopMatcher
from labkit.sampling import Sampler


@dataclass
class Generation:
    """One answer and what it cost.

    Attributes:
        text: the answer, without stop strings and special tokens.
        prompt_tokens: tokens of the prompt, image and audio tokens included.
        completion_tokens: tokens generated, the end token included.
        finish_reason: ``stop`` (end token or stop string) or ``length`` (``max_new_tokens`` or the context).
        ttft_s: seconds from the request to the first token: processor, prefill, first choice.
        decode_s: seconds of all later steps together.
        token_times_s: seconds of each step; the first is ``ttft_s``.
        prepare_s: the processor's share of ``ttft_s``.
        token_ids: the tokens generated.
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

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens a second after the first; None if there was only one."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else None


class RunningAnswer:
    """The state of one answer between steps."""

    def __init__(
        self,
        sampler: Sampler,
        detokenizer: Detokenizer,
        end_token_ids: Container[int],
        *,
        prompt_tokens: int,
        limit: int,
    ):
        self.sampler = sampler
        self.generation = Generation(prompt_tokens=prompt_tokens)
        self.finished = False
        self._limit = limit
        self._end_tokens = end_token_ids
        self._detokenizer = detokenizer
        self._stops = StopMatcher(sampler.settings.stop)

    def push(self, token: int) -> str:
        """Take one token; returns the text it lets go."""
        generation = self.generation
        generation.token_ids.append(token)
        generation.completion_tokens += 1
        ended = token in self._end_tokens
        text = "" if ended else self._stops.push(self._detokenizer.push(token))
        if ended or self._stops.stopped:
            self.finished, generation.finish_reason = True, "stop"
        elif generation.completion_tokens >= self._limit:
            self.finished, generation.finish_reason = True, "length"
        if self.finished:
            text += self._stops.flush()
        generation.text += text
        return text

    def spend(self, seconds: float) -> None:
        """Book the time of the step that gave the last token."""
        times = self.generation.token_times_s
        if times:
            self.generation.decode_s += seconds
        else:
            self.generation.ttft_s = seconds
        times.append(seconds)


class TextStream(Iterator[str]):
    """Pieces of an answer as they are generated; ``generation`` holds the whole once they are exhausted.

    Leaving early (``close()``, or the end of a ``with`` block) stops generating; ``generation`` stays None.
    """

    def __init__(self, steps: Iterator[list[tuple[int, str]]], sequences: list[RunningAnswer]):
        self._steps = steps
        self._sequences = sequences
        self.generation: Generation | None = None

    def __next__(self) -> str:
        for deltas in self._steps:
            if text := "".join(text for _, text in deltas):
                return text
        if self._sequences and self._sequences[0].finished:
            self.generation = self._sequences[0].generation
        raise StopIteration

    def close(self) -> None:
        """Stop generating and free the cache."""
        self._steps.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
