"""The arguments of ``labkit sensitivity``, ``labkit search`` and ``labkit perplexity``."""

import argparse
from dataclasses import fields

from labkit.arguments import add_machine, count, count_or_none, later
from labkit.loading.datasets import Datasets
from labkit.measure.defaults import CANDIDATES, PERPLEXITY_PLANS
from labkit.measure.search.goal import AGAINST, KEPT_DTYPES, ROUNDS

COMMANDS = "labkit.search_commands"
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
    command.set_defaults(run=later("sensitivity", COMMANDS))


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
    command.set_defaults(run=later("search", COMMANDS))


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
    command.set_defaults(run=later("perplexity", COMMANDS))


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
