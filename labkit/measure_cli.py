"""The arguments of ``labkit compare``, ``ask``, ``screen`` and ``plot``."""

import argparse

from labkit.arguments import MODEL, add_machine, count, count_or_none, later

PLANS = "fp32,bf16,int8,int8-dynamic,int4,nf4,llm-int8"


def add_compare(commands: argparse._SubParsersAction) -> None:
    """``labkit compare``."""
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


def add_ask(commands: argparse._SubParsersAction) -> None:
    """``labkit ask``."""
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


def add_screen(commands: argparse._SubParsersAction) -> None:
    """``labkit screen``."""
    command = commands.add_parser(
        "screen",
        help="draw a phone screen of the benchmark",
        description="Draw a PhoneTap screen. The same seed always draws the same one.",
    )
    command.add_argument("--seed", type=count_or_none, required=True, metavar="N", help="which screen")
    command.add_argument("--output", required=True, metavar="FILE", help="a .png file")
    command.set_defaults(run=later("screen"))


def add_plot(commands: argparse._SubParsersAction) -> None:
    """``labkit plot``."""
    command = commands.add_parser(
        "plot",
        help="draw a finished comparison as one picture",
        description="Draw bytes, time of an answer and right steps of a comparison as one SVG picture.",
    )
    command.add_argument("results", metavar="RESULTS", help="results.json, or the folder it is in")
    command.add_argument("--output", required=True, metavar="FILE", help="an .svg file")
    command.set_defaults(run=later("plot"))


def _add_thinking(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let the model think before it answers (--no-thinking)",
    )
