"""The arguments of ``labkit compare``, ``ask``, ``screen`` and ``plot``."""

import argparse
import sys
from pathlib import Path

from labkit.cli.arguments import MODEL, add_machine, count, count_or_none, listed
from labkit.cli.terminal import console, make_table
from labkit.common.errors import LabError
from labkit.measure.defaults import OPTION_HELP

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
    command.add_argument("--items", type=count, default=200, metavar="N", help=OPTION_HELP["items"])
    command.add_argument(
        "--split",
        default="all",
        metavar="NAME",
        help=OPTION_HELP["split"],
    )
    command.add_argument("--seed", type=count_or_none, metavar="N", help=OPTION_HELP["seed"])
    command.add_argument("--output", metavar="FOLDER", help=OPTION_HELP["output"])
    command.add_argument(
        "--weights",
        choices=("random",),
        help="random: what the architecture costs, without its weights; no item is answered",
    )
    command.add_argument("--batch-size", type=count, default=8, metavar="N", help=OPTION_HELP["batch-size"])
    add_machine(command)
    _add_thinking(command)
    command.set_defaults(run=compare)


def add_plot(commands: argparse._SubParsersAction) -> None:
    """``labkit plot``."""
    command = commands.add_parser(
        "plot",
        help="draw a finished comparison as one picture",
        description="Draw bytes, time of an answer and right steps of a comparison as one SVG picture.",
    )
    command.add_argument("results", metavar="RESULTS", help="results.json, or the folder it is in")
    command.add_argument("--output", required=True, metavar="FILE", help="an .svg file")
    command.set_defaults(run=plot)


def _add_thinking(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        default=False,
        help=OPTION_HELP["thinking"],
    )


def compare(options: argparse.Namespace) -> int:
    """``labkit compare``: measure, then print conclusions, tables and where the files are."""
    from labkit.measure.compare import compare as run_comparison
    from labkit.models.spec import get_spec
    from labkit.results import tables
    from labkit.results.comparison import describe

    spec = get_spec(options.model)
    output = Path(options.output or Path("results") / Path(spec.name).name)
    comparison = run_comparison(
        options.model,
        None if options.plans is None else listed(options.plans),
        options.items,
        seed=options.seed,
        split=options.split,
        device=options.device,
        threads=options.threads,
        enable_thinking=options.thinking,
        batch_size=options.batch_size,
        weights=options.weights,
        output=output,
    )
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


def plot(options: argparse.Namespace) -> None:
    """``labkit plot``: the picture says below what it was measured with."""
    from labkit.common.files import atomic_path
    from labkit.results.charts.svg import comparison_svg
    from labkit.results.comparison import Comparison, describe

    path = Path(options.output)
    if path.suffix.lower() != ".svg":
        raise LabError(f"--output must end in .svg, not {path.suffix or path.name!r}")
    comparison = Comparison.load(options.results)
    settings = comparison.settings
    picture = comparison_svg(comparison.measurements, describe(settings) if settings else "")
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise LabError(f"{path} cannot be written: {error.strerror or error}") from None
    print(path)
