"""``labkit context``: plans at growing context."""

from __future__ import annotations

import argparse
from typing import Any

from labkit.cli.arguments import UNQUANTIZED_MODEL, Commands, add_command, measured
from labkit.common.options import add_options
from labkit.measure.options import ContextOptions


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "context",
        run,
        "measure plans at growing context: KV cache, time, taps",
        (
            "Ask the same PhoneTap requests behind a growing beginning, under each plan, and take down the bytes\n"
            "of the KV cache, the time to the first token and of each further one, and whether the taps land.\n"
            "Prints a table and writes context.json to --output.\n\n"
            "Ctrl-C keeps what is measured; the same command again continues."
        ),
        (
            "examples:\n"
            "  labkit context pocket --windows 192,384\n"
            "  labkit context autoglm-phone-9b --weights random --contexts 1024,8192,24000 --device cuda"
        ),
    )
    command.add_argument("model", help=UNQUANTIZED_MODEL)
    add_options(command, ContextOptions)


def run(options: argparse.Namespace) -> None:
    """Measure, then print the table and the path of the file."""
    from labkit.cli.terminal import console, make_table
    from labkit.measure.context import ContextGrowth, Timing, measure_growth
    from labkit.models.spec import get_spec

    def measure(model: str, *, prompts: int, **rest: Any) -> ContextGrowth:
        return measure_growth(model, timing=Timing(prompts=prompts), **rest)

    growth, output = measured(options, measure, ContextOptions, "context-{model}")
    screen = console()
    screen.print(make_table(f"{get_spec(options.model).name} at growing context", *growth.rows()))
    screen.print(str(output / growth.FILE), highlight=False, soft_wrap=True)
