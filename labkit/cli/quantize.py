"""The arguments of ``labkit quantize`` and ``labkit export``."""

import argparse

from labkit.cli.arguments import add_machine, count, count_or_none, listed
from labkit.common.formats import format_bytes
from labkit.loading.datasets import Datasets

EXPORT_FORMATS = ("compressed-tensors", "gptq")


def add_quantize(commands: argparse._SubParsersAction) -> None:
    """``labkit quantize``."""
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
        default=Datasets.calibration,
        metavar="N",
        help=f"how many calibration items plans are shown that look at activations ({Datasets.calibration})",
    )
    command.add_argument(
        "--calibration-text", metavar="FILE", help="show them a text instead, for models that see no screens"
    )
    command.add_argument(
        "--calibration-seed", type=count_or_none, metavar="N", help="draw other items than the standard set"
    )
    _add_force(command, "and drop an unfinished one of another plan")
    add_machine(command)
    command.set_defaults(run=quantize)


def add_export(commands: argparse._SubParsersAction) -> None:
    """``labkit export``."""
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
    command.set_defaults(run=export)


def _add_force(command: argparse.ArgumentParser, more: str = "") -> None:
    told = f"replace what the lab wrote there before{', ' + more if more else ''}"
    command.add_argument("--force", action="store_true", help=told)


def quantize(options: argparse.Namespace) -> None:
    """``labkit quantize``: everything that can be refused is refused before the model is read."""
    import torch

    from labkit.loading.quantize_to import CalibrationSettings, quantize_to

    if options.threads:
        torch.set_num_threads(options.threads)
    made = quantize_to(
        options.model,
        options.plan,
        options.output,
        options.device,
        calibration=CalibrationSettings(
            options.calibration_items, options.calibration_seed, options.calibration_text
        ),
        force=options.force,
    )
    for note in made.engine.resolved.notes:
        print(f"• {note}")
    if made.continued:
        print(f"• {made.continued} Linears were finished by an earlier run.")
    size = sum(path.stat().st_size for path in made.folder.iterdir())
    predicted = made.engine.resolved.predicted_bytes
    print(f"{made.folder}: {format_bytes(predicted)} of weights, {format_bytes(size)} on disk")


def export(options: argparse.Namespace) -> None:
    """``labkit export``."""
    from labkit.loading.export import export as write

    done = write(
        options.folder,
        options.output,
        format=options.format,
        dequantize=listed(options.dequantize),
        force=options.force,
    )
    for note in done.notes:
        print(f"• {note}")
    size = sum(path.stat().st_size for path in done.folder.iterdir())
    print(f"{done.folder}: {done.quantized} Linears quantized, {format_bytes(size)} on disk")
