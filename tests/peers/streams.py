"""Several answers at a time against one: tokens a second of decoding, and whether each is the answer it gets alone."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from labkit.cli.arguments import count
from labkit.common.errors import LabError
from labkit.engine.engine import Engine
from labkit.loading.load import load

QUESTIONS = (
    "你是谁?",
    "打开设置",
    "Who are you?",
    "open the settings",
    "返回上一页",
    "go back",
    "你能做什么?",
    "What can you do?",
)


def bench_streams(
    engine: Engine,
    *,
    streams: int = 8,
    tokens: int = 64,
    rounds: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Decode ``streams`` answers of ``tokens`` tokens together, and one after another alone, in turns.

    Prompts are short and their prefill is not counted: every answer waits until all have their first token. Whole
    steps are timed, with choosing each token and writing its text.

    Returns:
        ``alone_tokens_per_s`` and ``together_tokens_per_s`` (medians), ``ratio`` (the median of the rounds' ratios),
        ``ratios``, and ``equal`` (whether every answer was the one it gets alone, in every round).

    Raises:
        LabError: fewer than two streams.
    """
    if streams < 2:
        raise LabError(f"streams is {streams}; two at least are compared with one")
    alone, together, ratios, equal = [], [], [], True
    for number in range(rounds + 1):  # the first is not counted
        say(f"Round {number} of {rounds}")
        questions = [QUESTIONS[index % len(QUESTIONS)] for index in range(streams)]
        pairs = [_decode(engine, [question], tokens) for question in questions]
        single = statistics.median(speed for speed, _ in pairs)
        many, answers = _decode(engine, questions, tokens)
        equal = equal and answers == [one for _, (one,) in pairs]
        if number:
            alone.append(single)
            together.append(many)
            ratios.append(many / single)
    return {
        "streams": streams,
        "tokens": tokens,
        "alone_tokens_per_s": statistics.median(alone),
        "together_tokens_per_s": statistics.median(together),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "equal": equal,
    }


def _decode(engine: Engine, questions: Sequence[str], tokens: int) -> tuple[float, list[list[int]]]:
    """Tokens a second after the prompts, and the answers' token ids; answers go on beyond their end marks."""
    batch = engine.batch(len(questions), decode_share=0)
    answers = [
        engine.request([{"role": "user", "content": question}], max_new_tokens=tokens)
        for question in questions
    ]
    for answer in answers:
        answer.end_tokens = frozenset()
        batch.add(answer)
    while batch.waiting:
        batch.step()
    before = sum(answer.generation.completion_tokens for answer in answers)
    began = time.perf_counter()
    batch.run()
    spent = time.perf_counter() - began
    return (
        (sum(answer.generation.completion_tokens for answer in answers) - before) / spent,
        [answer.result().token_ids for answer in answers],
    )


def arguments() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        description=(
            "Decode several answers together and one after another alone, in turns: how many times one stream's\n"
            "tokens a second the streams together get, and whether each answer is the one it gets alone."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tests/peers/streams.py pocket --plan int8 --streams 8 --threads 2",
    )
    command.add_argument("model", help="a name from `labkit models`, a checkpoint's folder, or a hub id")
    command.add_argument("--plan", help="a name from `labkit plans`, or a YAML file (bf16)")
    command.add_argument("--streams", type=count, default=8, metavar="N", help="answers at a time (8)")
    command.add_argument("--tokens", type=count, default=64, metavar="N", help="of each answer (64)")
    command.add_argument("--rounds", type=count, default=5, metavar="N", help="turns of each (5)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    command.add_argument("--threads", type=count, metavar="N", help="CPU threads (all cores)")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; exit code 1 if an answer is not the one it gets alone."""
    options = arguments().parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    engine = load(options.model, options.plan, options.device)
    found = bench_streams(
        engine,
        streams=options.streams,
        tokens=options.tokens,
        rounds=options.rounds,
        say=lambda text: print(text, file=sys.stderr),
    )
    ratios = sorted(found["ratios"])
    print(
        f"one stream      {found['alone_tokens_per_s']:10,.1f} tokens/s\n"
        f"{found['streams']} streams       {found['together_tokens_per_s']:10,.1f} tokens/s\n"
        f"ratio           {found['ratio']:10.2f}   ({ratios[0]:.2f} … {ratios[-1]:.2f})\n"
        f"answers         {'each the one it gets alone' if found['equal'] else 'NOT the ones they get alone'}"
    )
    return 0 if found["equal"] else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as error:
        sys.exit(f"{error}")
