"""The command ``labkit``: arguments, help and exit codes. What the commands do is in `labkit.commands`.

Exit codes: 0 done; 1 a plan failed, or the lab itself; 2 something asked for is wrong (one line on standard
error says what); 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from labkit import __version__
from labkit.amounts import Amounts
from labkit.arguments import add_machine, count, count_or_none, later
from labkit.chat_cli import add_chat
from labkit.context_cli import add_context
from labkit.errors import LabError
from labkit.fit_cli import add_fit
from labkit.gpu_cli import add_bench_gpu
from labkit.search_cli import add_search, add_sensitivity
from labkit.service.arguments import add_service_arguments

PLANS = "fp32,bf16,int8,int8-dynamic,int4,nf4,llm-int8"
EXPORT_FORMATS = ("compressed-tensors", "gptq")
MODEL = "a name from `labkit models`, a checkpoint's folder, a folder of `labkit quantize`, or a hub id"


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
            "  labkit screen --seed 7 --output screen.png\n"
            '  labkit ask pocket --image screen.png "打开设置"\n'
            "  labkit search pocket --memory 20MB\n"
            "  labkit fit autoglm-phone-9b --memory 8GB\n"
            "  labkit serve pocket --plan int8 --port 8000\n"
            "\n`labkit COMMAND --help` explains one command."
        ),
    )
    parser.add_argument("--version", action="version", version=f"labkit {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    _add_compare(commands)
    _add_ask(commands)
    _add_quantize(commands)
    _add_export(commands)
    _add_screen(commands)
    _add_plot(commands)
    add_sensitivity(commands)
    add_search(commands)
    add_fit(commands)
    add_bench_gpu(commands)
    add_context(commands)
    _add_serve(commands)
    add_chat(commands)
    for name, run, text in (
        ("models", "models", "list the models that can be named"),
        ("plans", "plans", "list the quantization plans"),
        ("doctor", "doctor", "say what this machine can run, and what is missing"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=later(run))
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


def _add_compare(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        help="measure one model under many plans",
        description=(
            "Measure one model under many plans: bytes, memory, load time, latency, and whether its taps\n"
            "land. Every plan runs in a fresh process, on the same PhoneTap test items. Prints a table, and\n"
            "writes results.json (raw samples, environment) and report.html (charts, opens offline) to\n"
            "--output.\n\n"
            "Ctrl-C keeps what is measured; the same command again continues."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit compare pocket --output results/first\n"
            "  labkit compare pocket --plans fp32,int4,my-plan.yaml --split hard --items 400 --seed 3 \\\n"
            "      --output results/hard\n"
            "  labkit compare autoglm-phone-9b --weights random --plans bf16,int4 --device cuda\n\n"
            "An unquantized plan (fp32, bf16 or fp16) is added if none is named: every table needs that row."
        ),
    )
    command.add_argument("model", help=MODEL)
    command.add_argument(
        "--plans",
        metavar="A,B,…",
        help=f"names from `labkit plans`, or YAML files ({PLANS}; a quantized folder has its own)",
    )
    command.add_argument("--items", type=count, default=200, metavar="N", help="how many test items (200)")
    command.add_argument(
        "--split",
        default="all",
        metavar="NAME",
        help="typed, spoken, hard, or all: which items (all)",
    )
    command.add_argument(
        "--seed", type=count_or_none, metavar="N", help="draw other test items than the standard set"
    )
    command.add_argument(
        "--output", metavar="FOLDER", help="where results.json and report.html go (results/MODEL)"
    )
    command.add_argument(
        "--weights",
        choices=("random",),
        help="random: what the architecture costs, without its weights; no item is answered",
    )
    command.add_argument("--batch-size", type=count, default=8, metavar="N", help="answers at a time (8)")
    add_machine(command)
    _add_thinking(command)
    command.set_defaults(run=later("compare"))


def _add_ask(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "ask",
        help="ask a model one thing, with an image, a recording, or both",
        description="Ask a model one thing and print its answer as it comes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            '  labkit ask pocket --image screen.png "open the settings" --thinking\n'
            "  labkit ask pocket --image screen.png --audio command.wav --plan int4"
        ),
    )
    command.add_argument("model", help=MODEL)
    command.add_argument("instruction", nargs="?", help="what is asked, in writing")
    command.add_argument("--image", metavar="FILE", help="a screenshot")
    command.add_argument("--audio", metavar="FILE", help="a recording (wav, flac, ogg or mp3)")
    command.add_argument(
        "--plan", help="a name from `labkit plans`, or a YAML file (bf16; a quantized folder has its own)"
    )
    command.add_argument(
        "--max-new-tokens", type=count, default=512, metavar="N", help="longest answer (512)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)"
    )
    command.add_argument("--seed", type=count_or_none, metavar="N", help="makes sampling repeatable")
    add_machine(command)
    _add_thinking(command)
    command.set_defaults(run=later("ask"))


def _add_quantize(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "quantize",
        help="quantize a model and save it",
        description=(
            "Quantize a model by a plan and save it: packed weights, tokenizer, the plan, hashes, a card. The\n"
            "folder can be named wherever a model can, restores bit for bit in seconds, and needs neither the\n"
            "original weights nor calibration.\n\n"
            "Ctrl-C, or a crash, keeps the finished Linears in FOLDER.partial; the same command again continues."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit quantize pocket --plan int4 --output pocket-int4\n"
            '  labkit ask pocket-int4 --image screen.png "open the settings"\n'
            "  labkit export pocket-int4 --format compressed-tensors"
        ),
    )
    command.add_argument("model", help="a name from `labkit models`, a checkpoint's folder, or a hub id")
    command.add_argument("--plan", required=True, help="a name from `labkit plans`, or a YAML file")
    command.add_argument("--output", required=True, metavar="FOLDER", help="the folder to make")
    command.add_argument(
        "--calibration-items",
        type=count,
        default=Amounts.calibration,
        metavar="N",
        help=f"how many calibration items plans are shown that look at activations ({Amounts.calibration})",
    )
    command.add_argument(
        "--calibration-text", metavar="FILE", help="show them a text instead, for models that see no screens"
    )
    command.add_argument(
        "--calibration-seed", type=count_or_none, metavar="N", help="draw other items than the standard set"
    )
    _add_force(command, "and drop an unfinished one of another plan")
    add_machine(command)
    command.set_defaults(run=later("quantize"))


def _add_export(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "export",
        help="write a quantized model in a format that other engines load",
        description=(
            "Write a folder of `labkit quantize` anew in a format of other engines: the same integers and\n"
            "scales in their layout.\n\n"
            "compressed-tensors  transformers, vLLM: int4 (2, 4 and 8 bits), int8, int8-dynamic, each Linear its\n"
            "                    own; the format of choice\n"
            "gptq                older engines: int4 (2, 3, 4 and 8 bits) and int8\n\n"
            "A scheme that the format cannot express is refused with the nearest that can."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit export pocket-int4 --format compressed-tensors\n"
            "  labkit export phone-mixed --format gptq --dequantize vision,projector --output phone-gptq"
        ),
    )
    command.add_argument("folder", help="a folder of `labkit quantize`")
    command.add_argument("--format", required=True, choices=EXPORT_FORMATS, help="what to write")
    command.add_argument("--output", metavar="FOLDER", help="the folder to make (FOLDER-FORMAT)")
    command.add_argument(
        "--dequantize",
        default="",
        metavar="A,B,…",
        help="parts (vision, projector, …) or names of Linears to write unquantized, as they multiply",
    )
    _add_force(command)
    command.set_defaults(run=later("export"))


def _add_screen(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "screen",
        help="draw a phone screen of the benchmark",
        description="Draw a PhoneTap screen. The same seed always draws the same one.",
    )
    command.add_argument("--seed", type=count_or_none, required=True, metavar="N", help="which screen")
    command.add_argument("--output", required=True, metavar="FILE", help="a .png file")
    command.set_defaults(run=later("screen"))


def _add_plot(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "plot",
        help="draw a finished comparison as one picture",
        description="Draw bytes, time of an answer and right steps of a comparison as one SVG picture.",
    )
    command.add_argument("results", metavar="RESULTS", help="results.json, or the folder it is in")
    command.add_argument("--output", required=True, metavar="FILE", help="an .svg file")
    command.set_defaults(run=later("plot"))


def _add_serve(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "serve",
        help="serve a model to OpenAI's clients",
        description=(
            "Serve a model at http://HOST:PORT/v1 to any client of OpenAI's API, with a status page at /, its\n"
            "documentation at /docs, and counts for Prometheus at /metrics. Answers are those that\n"
            "`labkit compare` measures, alone and in company. Ctrl-C finishes what runs and stops."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit serve pocket\n"
            "  labkit serve autoglm-phone-9b --plan int4 --engine vllm --tensor-parallel-size 2\n\n"
            "assets/run_autoglm_server.sh does the same in the background."
        ),
    )
    command.add_argument("model", help=MODEL)
    command.add_argument(
        "--plan", help="a name from `labkit plans`, or a YAML file (bf16; a quantized folder has its own)"
    )
    add_machine(command)
    add_service_arguments(command)
    command.set_defaults(run=later("serve"))


def _add_force(command: argparse.ArgumentParser, more: str = "") -> None:
    told = f"replace what the lab wrote there before{', ' + more if more else ''}"
    command.add_argument("--force", action="store_true", help=told)


def _add_thinking(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let the model think before it answers (--no-thinking)",
    )
