"""The command ``labkit``: its commands and help. Each command is a file in this folder."""

import argparse
from collections.abc import Sequence

from labkit import __version__
from labkit.cli import (
    ask,
    bench_gpu,
    chat,
    compare,
    context,
    doctor,
    export,
    fit,
    models,
    perplexity,
    plans,
    plot,
    quantize,
    screen,
    search,
    sensitivity,
    serve,
)
from labkit.cli.arguments import CommandParser
from labkit.common.command import exit_code
from labkit.common.options import Parser

COMMANDS = (
    *(compare, ask, quantize, export, screen, plot),
    *(sensitivity, search, perplexity, fit, context, bench_gpu),
    *(serve, chat, models, plans, doctor),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""

    def run(words: Sequence[str]) -> int:
        options = build_parser().parse_args(words)
        return options.run(options) or 0

    return exit_code(run, arguments)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="labkit",
        description="Pick a model, pick a plan, get measured truth: bytes, milliseconds, taps that hit.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit screen --seed 1 --output screen.png\n"
            '  labkit ask pocket --image screen.png "open App Store"\n'
            "  labkit compare pocket --plans fp32,int8,int4 --items 200 --output results/first\n"
            "  labkit compare --config results/first/config.yaml\n"
            "  labkit plot results/first --output comparison.svg\n"
            "  labkit quantize pocket --plan int4 --output pocket-int4\n"
            "  labkit search pocket --memory 20MB\n"
            "  labkit fit autoglm-phone-9b --memory 8GB\n"
            "  labkit serve pocket --plan int8 --port 8000\n"
            "\n`labkit COMMAND --help` explains one command."
        ),
    )
    parser.add_argument("--version", action="version", version=f"labkit {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    for command in COMMANDS:
        command.add(commands)
    return parser
