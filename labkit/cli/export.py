"""``labkit export``: a quantized folder in a format that other engines load."""

import argparse

from labkit.cli.arguments import Commands, add_command
from labkit.common.formats import format_bytes
from labkit.common.options import add_options, settings_of
from labkit.loading.options import ExportOptions


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "export",
        run,
        "write a quantized model in a format that other engines load",
        (
            "Write a folder of `labkit quantize` anew in a format of other engines: the same integers and\n"
            "scales in their layout.\n\n"
            "compressed-tensors  transformers, vLLM: int4 (2, 4 and 8 bits), int8, int8-dynamic, each Linear its\n"
            "                    own; the format of choice\n"
            "gptq                older engines: int4 (2, 3, 4 and 8 bits) and int8, of the decoder and lm_head\n"
            "gguf                llama.cpp: glm4v with its eye, llama, qwen2, qwen3; int4 in groups of 32 or a\n"
            "                    multiple, int8, or unquantized\n\n"
            "Schemes that the format cannot express are refused, all at once, each with the nearest that can;\n"
            "--dequantize auto takes the nearest."
        ),
        (
            "examples:\n"
            "  labkit export pocket-int4 --format compressed-tensors\n"
            "  labkit export phone-mixed --format gptq --dequantize vision,projector --output phone-gptq\n"
            "  labkit export pocket-glm4v --format gguf"
        ),
    )
    command.add_argument("folder", help="a folder of `labkit quantize`; for gguf any model")
    add_options(command, ExportOptions)


def run(options: argparse.Namespace) -> None:
    """Write the folder, and print a summary."""
    from labkit.loading.export import export

    settings = settings_of(options, ExportOptions)
    exported = export(
        options.folder,
        settings.output,
        format=settings.format,
        dequantize=list(settings.dequantize),
        force=settings.force,
    )
    for note in exported.notes:
        print(f"• {note}")
    size = sum(path.stat().st_size for path in exported.folder.iterdir())
    print(f"{exported.folder}: {exported.quantized} Linears quantized, {format_bytes(size)} on disk")
