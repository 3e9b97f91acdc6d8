"""Continuous batching: the one generation loop.

A :class:`Batch` has a queue of prepared answers and a number of rows. Each `Batch.step` does one thing: it
prefills the first prompt of the queue into a free row, or it adds one token to every row. So a new answer
joins between two tokens of the others and a finished one leaves its row at once.

Prefilling a screenshot takes as long as many tokens. After each prefill the rows get at least
`DECODE_SHARE` of the time before the next one, so that a stream of new prompts slows answers down, but never
stops them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.common.errors import LabError
from labkit.engine.forward import Forward
from labkit.engine.generation import Generation, RunningAnswer

DECODE_SHARE = 0.25
"""The least share of the time that goes to rows which are being decoded while prompts wait."""


@dataclass(frozen=True)
class Piece:
    """What one step gave one answer: a token, and the text that it let go, possibly none."""

    answer: RunningAnswer
    text: str


class Batch:
    """Answers that are generated together. Not to be used from two threads at a time.

    Args:
        forward: the model's passes.
        device: where they are computed.
        rows: most answers at a time; 1 lets the one row be multiplied as it comes (`Forward.step`).
        decode_share: of the time, for the rows while prompts wait; 0 prefills all prompts first.

    Attributes:
        waiting: answers that are not prefilled yet.
        active: those that have a row.
        worked_s: seconds spent in `step` so far.
        failures: passes of the model that failed one after another, up to now.
    """

    def __init__(
        self,
        forward: Forward,
        device: torch.device,
        rows: int = 8,
        decode_share: float = DECODE_SHARE,
    ):
        if rows < 1:
            raise LabError(f"rows is {rows}; a batch has at least one")
        self.rows = rows
        self.waiting: deque[RunningAnswer] = deque()
        self.active: list[RunningAnswer] = []
        self.worked_s = 0.0
        self.failures = 0
        self._forward = forward
        self._device = device
        self._owed = decode_share / (1 - decode_share)  # seconds for each second of a prefill
        self._owed_s = 0.0  # to the rows, before the next prefill
        self._next: Tensor | None = None  # the last token of each active answer, [B]

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting or self.active)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all rows' keys and values."""
        return sum(answer.row.cache.stored_bytes for answer in self.active)

    def add(self, answer: RunningAnswer) -> None:
        """Put an answer at the queue's end."""
        answer.since_s = self.worked_s
        self.waiting.append(answer)

    def remove(self, answer: RunningAnswer) -> None:
        """Forget an answer, wherever it is; nothing happens if it is gone already."""
        if answer in self.waiting:
            self.waiting.remove(answer)
        elif answer in self.active:
            self._keep([entry is not answer for entry in self.active])

    def step(self) -> list[Piece]:
        """Prefill one prompt, or add one token to every row. Returns what came of it.

        An answer that cannot go on fails alone, whatever the reason: it is finished, and its ``error`` says why.

        Raises:
            BaseException: the pass of all rows failed. Every active answer has failed with it and left its row.
        """
        started = time.perf_counter()
        prefills = self.waiting and len(self.active) < self.rows and not (self.active and self._owed_s > 0)
        if prefills:
            pieces = self._prefill(self.waiting.popleft())
        elif self.active:
            pieces = self._decode()
        else:
            return []
        elapsed = time.perf_counter() - started
        self.worked_s += elapsed
        self._owed_s = elapsed * self._owed if prefills else self._owed_s - elapsed
        for piece in pieces:
            piece.answer.spend(self.worked_s)
        if any(answer.finished for answer in self.active):
            self._keep([not answer.finished for answer in self.active])
        return pieces

    def run(self) -> None:
        """Work until nothing is left."""
        while self.busy:
            self.step()

    def _prefill(self, answer: RunningAnswer) -> list[Piece]:
        try:
            inputs = {key: value.to(self._device) for key, value in answer.inputs.items()}
            answer.inputs = None
            answer.row, logits = self._forward.prefill(inputs)
            self.failures = 0
            pieces, tokens = _choose(logits, [answer], self._forward)
        except torch.OutOfMemoryError:
            answer.fail(LabError("there is not enough memory on the device for this prompt"))
        except BaseException as error:
            self.failures += not isinstance(error, LabError)
            answer.fail(_of_one_row(error))
        if answer.finished:
            answer.inputs = answer.row = None
            return pieces if answer.error is None else [Piece(answer, "")]
        self.active.append(answer)
        self._next = tokens if self._next is None else torch.cat((self._next, tokens))
        return pieces

    def _decode(self) -> list[Piece]:
        try:
            logits = self._forward.step(
                [answer.row for answer in self.active], self._next, alone=self.rows == 1
            )
            pieces, self._next = _choose(logits, self.active, self._forward)
        except BaseException as error:  # some rows may have a token more than others: none of them can go on
            self.failures += 1
            for answer in self.active:
                answer.fail(error)
            self._keep([False] * len(self.active))
            raise
        self.failures = 0
        return pieces

    def _keep(self, kept: list[bool]) -> None:
        for answer, stays in zip(self.active, kept):
            if not stays:
                answer.row = None
        self.active = [answer for answer, stays in zip(self.active, kept) if stays]
        self._next = self._next[torch.tensor(kept, device=self._next.device)] if self.active else None


class TextStream(Iterator[str]):
    """Pieces of an answer as they are generated; ``generation`` holds the whole once they are exhausted.

    Leaving early (``close()``, or the end of a ``with`` block) stops generating; ``generation`` stays None.
    """

    def __init__(self, batch: Batch, answer: RunningAnswer):
        self._batch = batch
        self._answer = answer
        self.generation: Generation | None = None

    def __next__(self) -> str:
        while self._batch.busy:
            if text := "".join(piece.text for piece in self._batch.step()):
                return text
        if self._answer.finished:
            self.generation = self._answer.result()
        raise StopIteration

    def close(self) -> None:
        """Stop generating and free the cache."""
        self._batch.remove(self._answer)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def not_finite_advice(dtype: torch.dtype) -> str:
    """The dtype of such logits in words, and what helps."""
    larger = {torch.float16: "bf16 or fp32", torch.bfloat16: "fp32"}.get(dtype)
    advice = (
        f"try a plan with {larger} as default"
        if larger
        else "no dtype is larger, so the weights hold NaN or inf, or values too large: load another copy of the model"
    )
    return f"in {str(dtype).removeprefix('torch.')}: {advice}"


@torch.inference_mode()
def _choose(logits: Tensor, answers: list[RunningAnswer], forward: Forward) -> tuple[list[Piece], Tensor]:
    """Choose and push the next token of each answer from ``logits [B, vocabulary]``, which ``forward`` computed; also the
    tokens ``[B]``. An answer whose sampler, grammar or text fails is failed, and the others are as without it.

    The check for numbers that are not finite waits for the GPU.
    """
    best, tokens = forward.likeliest(logits)
    if not all(answer.sampler.plain for answer in answers):
        tokens = tokens.clone()
        for index, answer in enumerate(answers):
            if math.isfinite(best[index]) and not answer.sampler.plain:
                try:
                    tokens[index] = answer.sampler(logits[index])
                except BaseException as error:
                    answer.fail(_of_one_row(error))
    pieces = []
    for index, (answer, token) in enumerate(zip(answers, tokens.tolist())):
        text = ""
        try:
            if not math.isfinite(best[index]):
                raise LabError(f"the model's logits are not finite {not_finite_advice(forward.dtype)}")
            if answer.error is None and answer.sampler.plain:
                text = answer.push(token)
            elif answer.error is None:
                if not 0 <= token < logits.shape[-1]:  # the compiled step reads its embedding unchecked
                    raise IndexError(f"the sampler chose the token {token} of {logits.shape[-1]}")
                text = answer.push(token, answer.sampler.logprobs(logits[index], token))
        except BaseException as error:
            answer.fail(_of_one_row(error))
        pieces.append(Piece(answer, text))
    return pieces, tokens


def _of_one_row(error: BaseException) -> BaseException:
    """An error that ends one answer. A panic of a library in Rust is one too, and no `Exception`.

    Raises:
        KeyboardInterrupt, SystemExit: those are for the whole program.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    return error
