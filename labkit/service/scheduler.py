"""The thread that owns the engine: it takes prepared answers, works through their batch, and tells what came.

Everything else of the service runs in the event loop's thread and in two small pools: one thread prepares
prompts (tokenizers are not to be used from two threads at a time), and the engine's detokenizer is a copy of its
own for the same reason. Only this thread touches the batch.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from labkit.common.errors import ApiError, LabError
from labkit.engine.batching import Piece
from labkit.engine.engine import Engine
from labkit.engine.generation import RunningAnswer
from labkit.engine.sampling import TokenLogprobs
from labkit.service import log
from labkit.service.errors import FAILED, as_api_error, stopping
from labkit.service.media import in_thread
from labkit.service.options import ServiceOptions

MOST_FAILURES = 3
"""Passes of the model that may fail one after another before the engine counts as broken."""


@dataclass(frozen=True)
class Event:
    """What one step gave one answer. Ends the answer if ``finish_reason`` or ``error`` is set."""

    index: int
    text: str = ""
    token: int | None = None
    is_end: bool = False
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None
    error: ApiError | None = None


@dataclass(eq=False)
class Job:
    """One answer on its way: ``index`` is its place among the request's choices."""

    answer: RunningAnswer
    index: int
    deadline: float
    events: asyncio.Queue[Event]
    cancelled: bool = False


class Scheduler:
    """See the module. Made and started in the event loop's thread.

    Args:
        engine: a loaded model.
        options: rows, queue and times.
        on_step: told ``(new tokens, seconds)`` after each step, in the engine's thread.

    ``cache_bytes`` is what all keys and values took after the last step.
    """

    def __init__(
        self, engine: Engine, options: ServiceOptions, on_step: Callable[[int, float], None] | None = None
    ):
        self.engine = engine
        self.options = options
        self._on_step = on_step or (lambda tokens, seconds: None)
        self._batch = engine.batch(options.streams)
        self._jobs: dict[RunningAnswer, Job] = {}
        self._new: list[Job] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._held = 0
        self.cache_bytes = 0
        self._progress = time.monotonic()
        self._seconds_per_answer = 1.0
        self._preparing = ThreadPoolExecutor(1, "labkit-prepare")
        self._thread = threading.Thread(target=self._run, name="labkit-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        engine.tokenizer = copy.deepcopy(engine.tokenizer)

    def start(self) -> None:
        """Start working; from the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread; answers that still run get an error."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        self._preparing.shutdown(wait=False, cancel_futures=True)

    @property
    def running(self) -> int:
        """Answers that have a row now."""
        return len(self._batch.active)

    @property
    def waiting(self) -> int:
        """Answers that were admitted and have no row yet."""
        return max(self._held - self.running, 0)

    @property
    def trouble(self) -> str | None:
        """Why the service is not healthy, or None."""
        if self._loop is not None and not self._thread.is_alive():
            return "the engine has stopped"
        if self._batch.failures >= MOST_FAILURES:
            return "the engine fails at every step"
        idle = not self._jobs and not self._new
        if not idle and time.monotonic() - self._progress > self.options.stuck_s:
            return f"the engine has given no token for {self.options.stuck_s:g} s"
        return None

    def admit(self, count: int) -> None:
        """Take places for ``count`` answers; every one must be given back by `release`.

        Raises:
            ApiError: 429, with the seconds after which to try again.
        """
        room = self.options.streams + self.options.queue
        if self._held + count > room:
            seconds = self._seconds_per_answer * self._held / self.options.streams
            raise ApiError(
                f"the service is busy: {self._held} answers run or wait, of {room} at most; try again later",
                429,
                code="queue_full",
                headers={"Retry-After": str(int(min(max(seconds, 1), 60)))},
            )
        self._held += count

    def release(self, count: int, seconds: float | None = None) -> None:
        """Give places back; ``seconds`` is how long the answers took, if they were given."""
        self._held -= count
        if seconds is not None:
            self._seconds_per_answer += 0.2 * (seconds - self._seconds_per_answer)

    async def prepare(self, make: Callable[[], Any]) -> Any:
        """Run ``make`` in the one thread that may tokenize."""
        return await in_thread(self._preparing, make)

    def submit(self, answer: RunningAnswer, index: int, deadline: float, events: asyncio.Queue[Event]) -> Job:
        """Queue a prepared answer; what comes of it is put into ``events``."""
        job = Job(answer, index, deadline, events)
        with self._wake:
            if self._stopping:
                raise stopping()
            if not self._jobs and not self._new:
                self._progress = time.monotonic()
            self._new.append(job)
            self._wake.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Forget an answer before the next step; nothing happens if it has ended."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    # From here on: the engine's thread.

    def _run(self) -> None:
        while self._take_orders():
            started = time.perf_counter()
            try:
                pieces = self._batch.step()
                seconds = time.perf_counter() - started
                self.cache_bytes = self._batch.cache_bytes
                self._tell(pieces)
                self._on_step(sum(piece.answer.error is None for piece in pieces), seconds)
            except BaseException as error:  # a bug or a broken device: the service goes on
                log.fault("a step failed", error)
                self._drop_failed()
            finally:
                self._progress = time.monotonic()
        for job in [*self._jobs.values(), *self._new]:
            self._end(job, stopping())

    def _take_orders(self) -> bool:
        """Wait for something to do; False when the service stops."""
        with self._wake:
            while not (self._stopping or self._new or self._jobs):
                self._wake.wait()
            if self._stopping:
                return False
            new, self._new = self._new, []
            for job in new:
                self._jobs[job.answer] = job
                self._batch.add(job.answer)
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if job.cancelled:
                self._forget(job)
            elif now > job.deadline:
                self._forget(job)
                self._end(job, ApiError("the answer took too long and was given up", 504, code="timeout"))
        return True

    def _forget(self, job: Job) -> None:
        self._batch.remove(job.answer)
        del self._jobs[job.answer]

    def _drop_failed(self) -> None:
        """End what a failed step has ended. Its error may quote any of its answers, so none of them is told it."""
        for job in [job for job in self._jobs.values() if job.answer.finished]:
            self._forget(job)
            self._end(job, ApiError(FAILED, 500, code="internal_error"))

    def _tell(self, pieces: list[Piece]) -> None:
        events = []
        for piece in pieces:
            answer, job = piece.answer, self._jobs[piece.answer]
            try:
                event = _event(job.index, answer, piece.text)
            except Exception as error:
                answer.fail(error)
                self._batch.remove(answer)
                event = Event(job.index, error=as_api_error(error))
            events.append((job, event))
            if answer.finished:
                del self._jobs[answer]
            if answer.error is not None and not isinstance(answer.error, LabError):
                log.fault("an answer failed", answer.error)
        self._send(events)

    def _end(self, job: Job, error: ApiError) -> None:
        self._send([(job, Event(job.index, error=error))])

    def _send(self, events: list[tuple[Job, Event]]) -> None:
        def deliver() -> None:
            for job, event in events:
                job.events.put_nowait(event)

        if events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)


def _event(index: int, answer: RunningAnswer, text: str) -> Event:
    """What a step gave an answer."""
    if answer.error is not None:
        return Event(index, error=as_api_error(answer.error))
    generation = answer.generation
    token = generation.token_ids[-1]
    return Event(
        index,
        text,
        token,
        token in answer.end_tokens,
        generation.logprobs[-1] if generation.logprobs else None,
        generation.finish_reason if answer.finished else None,
    )
