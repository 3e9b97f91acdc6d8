"""``labkit quantize``: quantize a model and save it."""

import argparse

from labkit.cli.arguments import UNQUANTIZED_MODEL, Commands, add_command
from labkit.common.formats import format_bytes
from labkit.common.options import add_options, settings_of
from labkit.loading.options import CalibrationOptions, QuantizeOptions


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "quantize",
        run,
        "quantize a model and save it",
        (
            "Quantize a model by a plan and save it: packed weights, tokenizer, the plan, hashes, a card. The\n"
            "folder can be named wherever a model can, restores bit for bit in seconds, and needs neither the\n"
            "original weights nor calibration.\n\n"
            "Ctrl-C, or a crash, keeps the finished Linears in FOLDER.partial; the same command again continues."
        ),
        (
            "examples:\n"
            "  labkit quantize pocket --plan int4 --output pocket-int4\n"
            '  labkit ask pocket-int4 --image screen.png "open App Store"\n'
            "  labkit export pocket-int4 --format compressed-tensors"
        ),
    )
    command.add_argument("model", help=UNQUANTIZED_MODEL)
    add_options(command, QuantizeOptions)
    add_options(command, CalibrationOptions, prefix="calibration_")


def run(options: argparse.Namespace) -> None:
    """Quantize and save the model, then print a summary; all checks precede reading the model."""
    import torch

    from labkit.loading.quantize_to import CalibrationSettings, quantize_to

    settings = settings_of(options, QuantizeOptions)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    quantized = quantize_to(
        options.model,
        settings.plan,
        settings.output,
        settings.device,
        calibration=settings_of(options, CalibrationSettings, prefix="calibration_"),
        force=settings.force,
    )
    for note in quantized.engine.resolved.summary:
        print(f"• {note}")
    if quantized.continued:
        print(f"• {quantized.continued} Linears were finished by an earlier run.")
    size = sum(path.stat().st_size for path in quantized.folder.iterdir())
    predicted = quantized.engine.resolved.predicted_bytes
    print(f"{quantized.folder}: {format_bytes(predicted)} of weights, {format_bytes(size)} on disk")
