"""``labkit context``: its arguments, and what it prints."""

from __future__ import annotations

import argparse

from labkit.cli.arguments import add_machine, count, count_or_none
from labkit.common.errors import LabError

DEFAULT_CONTEXTS = "160,240,320,480,720,1440"


def add_context(commands: argparse._SubParsersAction) -> None:
    """``labkit context``."""
    command = commands.add_parser(
        "context",
        help="measure plans at growing context: KV cache, time, taps",
        description=(
            "Ask the same PhoneTap requests behind a growing beginning, under each plan, and take down the bytes\n"
            "of the KV cache, the time to the first token and of each further one, and whether the taps land.\n"
            "Prints a table and writes context.json to --output.\n\n"
            "Ctrl-C keeps what is measured; the same command again continues."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit context pocket --windows 192,384\n"
            "  labkit context autoglm-phone-9b --weights random --contexts 1024,8192,24000 --device cuda"
        ),
    )
    command.add_argument("model", help="a name from `labkit models`, a checkpoint's folder, or a hub id")
    command.add_argument(
        "--plans", default="bf16,int8-kv", metavar="A,B,…",
        help="names or files; the others are compared with the first (bf16,int8-kv)",
    )  # fmt: skip
    command.add_argument(
        "--windows", default="", metavar="N,M,…", help="the first plan once more with each of these windows"
    )
    command.add_argument(
        "--contexts",
        default=DEFAULT_CONTEXTS,
        metavar="N,M,…",
        help=f"tokens of the prompt ({DEFAULT_CONTEXTS})",
    )
    command.add_argument(
        "--items", type=count_or_none, default=60, metavar="N", help="items answered at each context (60)"
    )
    command.add_argument("--prompts", type=count, default=4, metavar="N", help="requests that are timed (4)")
    command.add_argument(
        "--weights", choices=("random",), help="random: cost alone, without the model's weights"
    )
    command.add_argument("--batch-size", type=count, default=8, metavar="N", help="answers at a time (8)")
    command.add_argument("--output", metavar="FOLDER", help="where context.json goes (results/context-MODEL)")
    add_machine(command)
    command.set_defaults(run=context)


def context(options: argparse.Namespace) -> None:
    """What ``labkit context`` does."""
    from pathlib import Path

    import torch

    from labkit.cli.terminal import console, make_table
    from labkit.measure.context import Timing, measure_growth
    from labkit.models.spec import get_spec

    if options.threads:
        torch.set_num_threads(options.threads)
    spec = get_spec(options.model)
    output = Path(options.output or Path("results") / f"context-{Path(spec.name).name}")
    found = measure_growth(
        options.model,
        [name.strip() for name in options.plans.split(",") if name.strip()],
        windows=_numbers(options.windows, "--windows"),
        contexts=_numbers(options.contexts, "--contexts"),
        items=options.items,
        timing=Timing(prompts=options.prompts),
        weights=options.weights,
        device=options.device,
        batch_size=options.batch_size,
        output=output,
    )
    screen = console()
    screen.print(make_table(f"{spec.name} at growing context", *found.rows()))
    screen.print(str(output / found.FILE), highlight=False, soft_wrap=True)


def _numbers(text: str, name: str) -> list[int]:
    """``192,384`` -> [192, 384]."""
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    if wrong := [piece for piece in pieces if not piece.isdigit() or int(piece) < 1]:
        raise LabError(f"{name}: {wrong[0]!r} is no whole number from 1 on; write 192,384")
    return [int(piece) for piece in pieces]
