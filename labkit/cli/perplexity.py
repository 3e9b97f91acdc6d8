"""``labkit perplexity``: plans on a language model, by the perplexity of text."""

import argparse

from labkit.cli.arguments import Commands, add_command, measured
from labkit.cli.terminal import console, make_table, print_files
from labkit.common.formats import format_bytes, format_perplexity
from labkit.common.options import add_options, settings_of
from labkit.loading.datasets import Datasets
from labkit.measure.options import PerplexityOptions

BROKEN = 9.0
"""A larger change of the perplexity than this is shown as a factor, not in percent."""


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "perplexity",
        run,
        "compare plans on a language model by the perplexity of text",
        (
            "Quantize a language model under each plan, calibrated on the first part of a text, and judge it on\n"
            "the last: perplexity beside the unquantized model's, with a 95 % interval, and KL divergence.\n"
            "Prints a table and writes perplexity.json to --output.\n\n"
            "Ctrl-C keeps what is measured; the same command again continues, and may name further plans."
        ),
        (
            "examples:\n"
            "  labkit perplexity ./my-llama --text book.txt\n"
            "  labkit perplexity ./my-llama --text book.txt --plans int4,gptq,gptq:dampening_frac=0.05,gptq-3bit"
        ),
    )
    command.add_argument("model", help="a checkpoint's folder, or a hub id")
    add_options(command, PerplexityOptions)
    add_options(command, Datasets)


def run(options: argparse.Namespace) -> None:
    """Measure, then print the table and the path of the file."""
    from labkit.measure.perplexity import compare_perplexity

    datasets = settings_of(options, Datasets)
    result, output = measured(
        options, compare_perplexity, PerplexityOptions, "perplexity-{model}", datasets=datasets
    )
    rows = [
        [
            record["plan"],
            format_bytes(record["bytes"]),
            f"{record['bits']:.2f}",
            format_perplexity(record["perplexity"]),
            _change(record["change"], record["low"], record["high"]),
            f"{record['kl']:.2e}",
        ]
        for record in result.rows()
    ]
    headers = ["Plan", "Weights", "Bits a value", "Perplexity", "vs unquantized [95 %]", "KL, nats a token"]
    screen = console()
    screen.print(make_table("", headers, rows))
    if start := result.settings["material"].get("starts_with"):
        screen.print(f"Each sequence begins with {start}, as the tokenizer puts it first.", markup=False)
    print_files(screen, output / result.FILE)


def _change(change: float, low: float, high: float) -> str:
    """``+3.0% [+2.1%, +4.0%]``; for a broken model, the factor: ``120 times``."""
    if change > BROKEN:
        return f"{1 + change:,.0f} times" if change < 1e6 else f"{format_perplexity(1 + change)} times"
    return f"{change:+.1%} [{low:+.1%}, {high:+.1%}]".replace("-", "−")
