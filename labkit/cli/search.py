"""The arguments of ``labkit sensitivity``, ``labkit search`` and ``labkit perplexity``."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from labkit.cli.arguments import add_machine, count, count_or_none
from labkit.cli.terminal import console, make_table
from labkit.common.files import atomic_path
from labkit.common.formats import format_bytes, format_rate
from labkit.loading.datasets import Datasets
from labkit.measure.defaults import CANDIDATES, PERPLEXITY_PLANS
from labkit.measure.search.goal import AGAINST, KEPT_DTYPES, ROUNDS

SHOWN_LINEARS = 12
BROKEN = 9.0
"""From ten times the perplexity on nobody asks for per cent."""


def sensitivity(options: argparse.Namespace) -> None:
    """``labkit sensitivity``: measure, then print the most sensitive and where the files are."""
    from labkit.measure.search.sensitivity import measure_sensitivity

    found = measure_sensitivity(
        options.model,
        options.schemes,
        datasets=_datasets(options),
        parts=not options.no_parts,
        device=options.device,
        jobs=options.jobs,
        threads=options.threads,
        output=options.output,
    )
    output = Path(options.output or Path("results") / f"sensitivity-{Path(found.settings['model']).name}")
    _write_chart(output / "sensitivity.html", found.plot())
    screen = console()
    for scheme in found.settings["schemes"]:
        measured = [one for one in found.linears if one["scheme"] == scheme and "kl" in one]
        rows = [
            [one["linear"], one["role"] or "–", f"{one['kl']:.2e}", f"{one['sqnr_db']:.1f} dB"]
            for one in sorted(measured, key=lambda one: -one["kl"])[:SHOWN_LINEARS]
        ]
        headers = ["Linear", "Part", "KL, nats a token", "Output"]
        screen.print(make_table(f"Most sensitive to {scheme}, each alone", headers, rows, text_columns=(1,)))
    if found.parts:
        headers = ["Part", "Scheme", "Bytes", "KL, nats a token", "Click accuracy", "Right steps"]
        rows = [
            [
                one["part"],
                one["scheme"],
                format_bytes(one["bytes"]),
                f"{one['kl']:.2e}",
                format_rate(one.get("click_accuracy")),
                format_rate(one.get("step_success_rate")),
            ]
            for one in found.parts
        ]
        screen.print(make_table("Whole parts", headers, rows, text_columns=(1,)))
    _tell_files(screen, output / "sensitivity.json", output / "sensitivity.html")


def search(options: argparse.Namespace) -> None:
    """``labkit search``: find a plan, then print what was measured and where the files are."""
    from labkit.measure.search.search import search_plan

    found = search_plan(
        options.model,
        memory=options.memory,
        bits=options.bits,
        max_loss=options.max_loss,
        schemes=options.schemes,
        against=[one.strip() for one in options.against.split(",") if one.strip()],
        datasets=_datasets(options),
        test_items=options.test_items,
        name=options.name,
        device=options.device,
        jobs=options.jobs,
        threads=options.threads,
        sensitivities=options.sensitivities,
        parts=not options.no_parts,
        apart=options.apart,
        rounds=options.rounds,
        dtype=options.dtype,
        output=options.output,
    )
    output = Path(found.path).parent
    _write_chart(output / "pareto.html", found.plot())
    screen = console()
    rows = [
        [
            one["plan"],
            format_bytes(one["bytes"]),
            "–" if one.get("predicted_kl") is None else f"{one['predicted_kl']:.2e}",
            f"{one['kl']:.2e}",
            f"{one['perplexity']:.2f}" if "perplexity" in one else format_rate(one.get("step_success_rate")),
        ]
        for one in found.rows()
    ]
    judged = "Perplexity" if "perplexity" in found.found else "Right steps"
    headers = ["Plan", "Weights", "KL, predicted", "KL, measured", judged]
    screen.print(make_table("On validation items", headers, rows))
    for sentence in found.conclusions():
        screen.print(f"• {sentence}", highlight=False)
    if found.test:
        from labkit.results import tables
        from labkit.results.comparison import Comparison

        measurements = Comparison.load(output / "test").measurements
        screen.print(make_table("On test items", *tables.quality_table(measurements)))
    _tell_files(screen, found.path, output / "search.json", output / "pareto.html")


def perplexity(options: argparse.Namespace) -> None:
    """``labkit perplexity``: measure, then print the table and where the file is."""
    from labkit.measure.perplexity import compare_perplexity

    output = Path(options.output or Path("results") / f"perplexity-{Path(options.model).name}")
    found = compare_perplexity(
        options.model,
        options.plans,
        datasets=_datasets(options),
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        output=output,
    )
    rows = [
        [
            one["plan"],
            format_bytes(one["bytes"]),
            f"{one['bits']:.2f}",
            f"{one['perplexity']:.2f}",
            _change(one["change"], one["low"], one["high"]),
            f"{one['kl']:.2e}",
        ]
        for one in found.rows()
    ]
    headers = ["Plan", "Weights", "Bits a value", "Perplexity", "vs unquantized [95 %]", "KL, nats a token"]
    screen = console()
    screen.print(make_table("", headers, rows))
    _tell_files(screen, output / found.FILE)


def _change(change: float, low: float, high: float) -> str:
    """``+3.0% [+2.1%, +4.0%]``; of a model that is broken how many times as large."""
    if change > BROKEN:
        return f"{1 + change:,.0f} times"
    return f"{change:+.1%} [{low:+.1%}, {high:+.1%}]".replace("-", "−")


def _datasets(options: argparse.Namespace) -> Any:

    return Datasets(**{item.name: getattr(options, item.name) for item in fields(Datasets)})


def _write_chart(path: Path, chart: Any) -> None:
    with atomic_path(path) as temporary:
        chart.write_html(temporary, include_plotlyjs=True)


def _tell_files(screen: Any, *paths: Any) -> None:
    screen.print("\n".join(map(str, paths)), highlight=False, soft_wrap=True)


COMMANDS = "labkit.cli.search"
SCHEMES = ",".join(CANDIDATES)


def add_sensitivity(commands: argparse._SubParsersAction) -> None:
    """``labkit sensitivity``."""
    command = commands.add_parser(
        "sensitivity",
        help="measure what each layer costs when it alone is quantized",
        description=(
            "Replace every Linear alone by every candidate scheme, and take down how far the model's answers\n"
            "move (KL divergence of the answers' tokens) and how noisy the layer's output becomes; then\n"
            "every part as a whole, with its taps. Prints the most sensitive, and writes a table\n"
            "(sensitivity.json) and a heat map (sensitivity.html) to --output.\n\n"
            "Ctrl-C keeps what is measured; the same command again continues."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit sensitivity pocket\n"
            "  labkit sensitivity ./my-llama --text book.txt --schemes gptq-4bit,gptq-8bit\n\n"
            "A candidate is a scheme's name, with -Nbit and :option=value,… where it has options."
        ),
    )
    _add_common(command)
    command.add_argument("--output", metavar="FOLDER", help="where it goes (results/sensitivity-MODEL)")
    command.set_defaults(run=sensitivity)


def add_search(commands: argparse._SubParsersAction) -> None:
    """``labkit search``."""
    command = commands.add_parser(
        "search",
        help="find the best plan for so many bytes",
        description=(
            "Choose a scheme for every Linear so that the model loses least within a budget, or the smallest\n"
            "plan that loses no more than is allowed: by prediction from sensitivities, then by measuring.\n"
            "The plan is judged beside uniform plans and reported on test items that the search never saw.\n"
            "Writes the plan file with its evidence, search.json and pareto.html to --output.\n\n"
            "Its rules speak of parts and relative depth: the same file fits models of other heights.\n\n"
            "Ctrl-C keeps what is measured; the same command again continues."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit search pocket --memory 20MB\n"
            "  labkit search pocket --max-loss 0.5\n"
            "  labkit search ./my-llama --bits 5 --text book.txt"
        ),
    )
    goal = command.add_mutually_exclusive_group(required=True)
    goal.add_argument("--memory", metavar="60MB", help="bytes of all weights")
    goal.add_argument(
        "--bits", type=float, metavar="4.5", help="bits a value of the Linears, on average, scales included"
    )
    goal.add_argument(
        "--max-loss", type=float, metavar="0.5",
        help="points of right steps; of a model without eyes per cent of perplexity",
    )  # fmt: skip
    _add_common(command)
    command.add_argument(
        "--against",
        default=",".join(AGAINST),
        metavar="A,B,…",
        help=f"plans to judge beside it ({','.join(AGAINST)})",
    )
    command.add_argument(
        "--test-items", type=count_or_none, default=200, metavar="N",
        help="test items the plan is reported on, 0 for none (200)",
    )  # fmt: skip
    command.add_argument(
        "--rounds", type=count, default=ROUNDS, metavar="N",
        help=f"plans measured at most before the best of them is kept ({ROUNDS})",
    )  # fmt: skip
    command.add_argument(
        "--dtype", choices=("auto", *KEPT_DTYPES), default="auto",
        help="of what is not quantized: fp16 rounds finer, bf16 is faster on many CPUs (auto: by measuring)",
    )  # fmt: skip
    command.add_argument(
        "--apart", action="store_true",
        help="let q, k and v differ, and gate and up: can lose less in as many bytes; vLLM requires them alike",
    )  # fmt: skip
    command.add_argument("--name", help="the plan's name (from the goal)")
    command.add_argument(
        "--sensitivities", metavar="FOLDER", help="where they are, or go (results/sensitivity-MODEL)"
    )
    command.add_argument("--output", metavar="FOLDER", help="where it goes (results/search-MODEL-GOAL)")
    command.set_defaults(run=search)


def add_perplexity(commands: argparse._SubParsersAction) -> None:
    """``labkit perplexity``."""
    command = commands.add_parser(
        "perplexity",
        help="compare plans on a language model by the perplexity of text",
        description=(
            "Quantize a language model under each plan, calibrated on the first part of a text, and judge it on\n"
            "the last: perplexity beside the unquantized model's, with a 95 % interval, and KL divergence.\n"
            "Prints a table and writes perplexity.json to --output.\n\n"
            "Ctrl-C keeps what is measured; the same command again continues, and may name further plans."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit perplexity ./my-llama --text book.txt\n"
            "  labkit perplexity ./my-llama --text book.txt --plans int4,gptq,gptq:dampening_frac=0.05,gptq-3bit"
        ),
    )
    command.add_argument("model", help="a checkpoint's folder, or a hub id")
    command.add_argument(
        "--plans", default=",".join(PERPLEXITY_PLANS), metavar="A,B,…",
        help="presets, plan files, or candidates such as gptq-3bit, laid on every Linear "
        f"({','.join(PERPLEXITY_PLANS)})",
    )  # fmt: skip
    _add_amounts(command)
    command.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of what is not quantized (fp32)"
    )
    command.add_argument("--output", metavar="FOLDER", help="where it goes (results/perplexity-MODEL)")
    add_machine(command)
    command.set_defaults(run=perplexity)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a name from `labkit models`, a checkpoint's folder, or a hub id")
    command.add_argument("--schemes", default=SCHEMES, metavar="A,B,…", help=f"candidates ({SCHEMES})")
    command.add_argument("--no-parts", action="store_true", help="leave out the parts as wholes")
    _add_amounts(command)
    command.add_argument("--jobs", type=count, metavar="N", help="processes side by side (half the cores)")
    add_machine(command)


def _add_amounts(command: argparse.ArgumentParser) -> None:
    for item in fields(Datasets):
        kind = {"validation": count_or_none, "seed": count_or_none, "text": str}.get(item.name, count)
        usual = "" if item.default is None else f" ({item.default})"
        command.add_argument(
            f"--{item.name}",
            type=kind,
            default=item.default,
            metavar="FILE" if item.name == "text" else "N",
            help=item.metadata["help"] + usual,
        )
