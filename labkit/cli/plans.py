"""``labkit plans``: the quantization plans, with ``--model`` also their predicted bytes."""

import argparse

from labkit.cli.arguments import Commands, add_command
from labkit.cli.terminal import console, make_table
from labkit.common.formats import format_bytes


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(commands, "plans", run, "list the quantization plans", config=False)
    command.add_argument(
        "--model", metavar="MODEL", help="also predict the bytes of this model under every plan"
    )


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    from labkit.plans.plan import QuantizationPlan, presets

    plans = [QuantizationPlan.preset(name) for name in presets()]
    headers, rows = ["Plan", "What it does"], [[plan.name, plan.description] for plan in plans]
    text_columns = (1,)
    if options.model:
        from labkit.loading.prepare import Prepared

        model = Prepared.of(options.model, quantized=f"`labkit models {options.model}` says how")
        predicted = [model.predicted_bytes(plan) for plan in plans]
        headers.insert(1, f"Bytes of {options.model}")
        for row, size in zip(rows, predicted):
            row.insert(1, format_bytes(size))
        text_columns = (2,)
    console().print(make_table("", headers, rows, text_columns=text_columns))
    console().print("\nA YAML file of your own works too: --plans fp32,my-plan.yaml", style="dim")
