"""``labkit sensitivity``: the loss from quantizing each layer alone."""

import argparse

from labkit.cli.arguments import UNQUANTIZED_MODEL, Commands, add_command, measured
from labkit.cli.terminal import console, make_table, print_files, write_chart
from labkit.common.formats import format_bytes, format_rate
from labkit.common.options import add_options, settings_of
from labkit.loading.datasets import Datasets
from labkit.measure.options import SensitivityOptions

SHOWN_LINEARS = 12


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "sensitivity",
        run,
        "measure what each layer costs when it alone is quantized",
        (
            "Replace every Linear alone by every candidate scheme, and take down how far the model's answers\n"
            "move (KL divergence of the answers' tokens) and how noisy the layer's output becomes; then\n"
            "every part as a whole, with its taps. Prints the most sensitive, and writes a table\n"
            "(sensitivity.json) and a heat map (sensitivity.html) to --output.\n\n"
            "Ctrl-C keeps what is measured; the same command again continues."
        ),
        (
            "examples:\n"
            "  labkit sensitivity pocket\n"
            "  labkit sensitivity ./my-llama --text book.txt --schemes gptq-4bit,gptq-8bit\n\n"
            "A candidate is a scheme's name, with -Nbit and :option=value,… where it has options."
        ),
    )
    command.add_argument("model", help=UNQUANTIZED_MODEL)
    add_options(command, SensitivityOptions)
    add_options(command, Datasets)


def run(options: argparse.Namespace) -> None:
    """Measure, then print the most sensitive layers and the paths of the files."""
    from labkit.measure.search.sensitivity import measure_sensitivity

    datasets = settings_of(options, Datasets)
    result, output = measured(
        options, measure_sensitivity, SensitivityOptions, "sensitivity-{model}", datasets=datasets
    )
    write_chart(output / "sensitivity.html", result.plot())
    screen = console()
    for scheme in result.settings["schemes"]:
        records = [record for record in result.linears if record["scheme"] == scheme and "kl" in record]
        rows = [
            [record["linear"], record["role"] or "–", f"{record['kl']:.2e}", f"{record['sqnr_db']:.1f} dB"]
            for record in sorted(records, key=lambda record: -record["kl"])[:SHOWN_LINEARS]
        ]
        headers = ["Linear", "Part", "KL, nats a token", "Output"]
        screen.print(make_table(f"Most sensitive to {scheme}, each alone", headers, rows, text_columns=(1,)))
    if result.parts:
        headers = ["Part", "Scheme", "Bytes", "KL, nats a token", "Click accuracy", "Right steps"]
        rows = [
            [
                record["part"],
                record["scheme"],
                format_bytes(record["bytes"]),
                f"{record['kl']:.2e}",
                format_rate(record.get("click_accuracy")),
                format_rate(record.get("step_success_rate")),
            ]
            for record in result.parts
        ]
        screen.print(make_table("Whole parts", headers, rows, text_columns=(1,)))
    print_files(screen, output / "sensitivity.json", output / "sensitivity.html")
