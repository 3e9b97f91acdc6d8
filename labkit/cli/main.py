"""The command ``labkit``: its commands, help and exit codes. Each command is a file in this folder.

Exit codes: 0 done; 1 a plan or the lab failed; 2 a wrong request (one line on standard error); 130 interrupted.
"""

import argparse
import os
import sys
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
from labkit.cli.arguments import CommandParser, Parser
from labkit.common.errors import LabError

COMMANDS = (
    *(compare, ask, quantize, export, screen, plot),
    *(sensitivity, search, perplexity, fit, context, bench_gpu),
    *(serve, chat, models, plans, doctor),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        options = build_parser().parse_args(arguments)
        return options.run(options) or 0
    except LabError as error:
        print(f"labkit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"\nlabkit: {interruption or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


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
