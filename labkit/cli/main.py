"""The command ``labkit``: arguments, help and exit codes. What the commands do is in `labkit.cli.listing`.

Exit codes: 0 done; 1 a plan failed, or the lab itself; 2 something asked for is wrong (one line on standard
error says what); 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from labkit import __version__
from labkit.cli.ask import add_ask, add_screen
from labkit.cli.bench import add_bench_gpu
from labkit.cli.chat import add_chat
from labkit.cli.compare import add_compare, add_plot
from labkit.cli.context import add_context
from labkit.cli.doctor import doctor
from labkit.cli.fit import add_fit
from labkit.cli.listing import models, plans
from labkit.cli.quantize import add_export, add_quantize
from labkit.cli.search import add_perplexity, add_search, add_sensitivity
from labkit.cli.serve import add_serve
from labkit.common.errors import LabError


class Parser(argparse.ArgumentParser):
    """Errors in one line, as all other errors of this command."""

    def error(self, message: str) -> NoReturn:
        raise LabError(f"{message} (see `{self.prog} --help`)")


class CommandParser(Parser):
    """Takes options between the positional arguments: ``labkit ask pocket --image FILE "instruction"``."""

    _nested = False

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, intermixed (which calls this method again for each kind of argument)."""
        if self._nested:
            return super().parse_known_args(args, namespace)
        self._nested = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._nested = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        options = build_parser().parse_args(arguments)
        return options.run(options) or 0
    except LabError as error:
        print(f"labkit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"\nlabkit: {interruption or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="labkit",
        description="Pick a model, pick a plan, get measured truth: bytes, milliseconds, taps that hit.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit compare pocket --plans fp32,int8,int4 --items 200 --output results/first\n"
            "  labkit quantize pocket --plan int4 --output pocket-int4\n"
            "  labkit plot results/first --output comparison.svg\n"
            "  labkit screen --seed 1 --output screen.png\n"
            '  labkit ask pocket --image screen.png "Open App Store"\n'
            "  labkit search pocket --memory 20MB\n"
            "  labkit fit autoglm-phone-9b --memory 8GB\n"
            "  labkit serve pocket --plan int8 --port 8000\n"
            "\n`labkit COMMAND --help` explains one command."
        ),
    )
    parser.add_argument("--version", action="version", version=f"labkit {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    add_compare(commands)
    add_ask(commands)
    add_quantize(commands)
    add_export(commands)
    add_screen(commands)
    add_plot(commands)
    add_sensitivity(commands)
    add_search(commands)
    add_perplexity(commands)
    add_fit(commands)
    add_context(commands)
    add_bench_gpu(commands)
    add_serve(commands)
    add_chat(commands)
    for name, run, text in (
        ("models", models, "list the models that can be named"),
        ("plans", plans, "list the quantization plans"),
        ("doctor", doctor, "say what this machine can run, and what is missing"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        if name == "models":
            command.add_argument(
                "folder",
                nargs="?",
                help="a folder of `labkit quantize`: check its files, and say what is in it",
            )
        if name == "plans":
            command.add_argument(
                "--model", metavar="MODEL", help="also predict the bytes of this model under every plan"
            )
    return parser
