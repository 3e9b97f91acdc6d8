"""``labkit compare``: one model under many plans."""

import argparse
import sys
from typing import Any

from labkit.cli.arguments import MODEL, Commands, add_command, measured
from labkit.cli.terminal import console, make_table
from labkit.common.options import add_options
from labkit.measure.options import CompareOptions


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "compare",
        run,
        "measure one model under many plans",
        (
            "Measure one model under many plans: bytes, memory, load time, latency, and whether its taps\n"
            "land. Every plan runs in a fresh process, on the same PhoneTap test items. Prints a table, and\n"
            "writes results.json (raw samples, environment) and report.html (charts, opens offline) to\n"
            "--output.\n\n"
            "Ctrl-C keeps what is measured; the same command again continues."
        ),
        (
            "examples:\n"
            "  labkit compare pocket --output results/first\n"
            "  labkit compare pocket --plans fp32,int4,my-plan.yaml --split hard --items 400 --seed 3 \\\n"
            "      --output results/hard\n"
            "  labkit compare autoglm-phone-9b --weights random --plans bf16,int4 --device cuda\n"
            "  labkit compare --config results/first/config.yaml --output results/again\n\n"
            "An unquantized plan (fp32, bf16 or fp16) is added if none is named: every table needs that row."
        ),
    )
    command.add_argument("model", help=MODEL)
    add_options(command, CompareOptions)


def run(options: argparse.Namespace) -> int:
    """Measure, then print conclusions, tables and the paths of the files."""
    from labkit.measure.compare import compare
    from labkit.results import tables
    from labkit.results.comparison import Comparison, describe

    def measure(model: str, *, thinking: bool, **rest: Any) -> Comparison:
        return compare(model, enable_thinking=thinking, **rest)

    comparison, output = measured(options, measure, CompareOptions)
    screen = console()
    screen.print()
    screen.print(describe(comparison.settings), style="dim")
    for sentence in comparison.conclusions():
        screen.print(f"• {sentence}", highlight=False)
    if added := comparison.added_plan:
        screen.print(f"• {added} was added, to have an unquantized row.", highlight=False)
    for title, table in tables.shown_tables(comparison.measurements).items():
        screen.print()
        screen.print(make_table(title, *table))
    screen.print()
    screen.print(f"{output / 'results.json'}\n{output / 'report.html'}", highlight=False, soft_wrap=True)
    for plan, reason in comparison.failures.items():
        print(f"labkit: plan {plan} could not be measured: {reason}", file=sys.stderr)
    return 1 if comparison.failures else 0
