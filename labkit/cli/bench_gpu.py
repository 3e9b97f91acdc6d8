"""``labkit bench-gpu``: what plans cost on a GPU."""

from __future__ import annotations

import argparse

from labkit.cli.arguments import UNQUANTIZED_MODEL, Commands, add_command, measured
from labkit.common.options import add_options
from labkit.measure.options import GpuOptions


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "bench-gpu",
        run,
        "measure what plans cost on a GPU: prompts, steps, memory",
        (
            "Measure prompts, decoding steps and memory of each plan on this machine's GPU, one process a plan:\n"
            "the lab's captured step at every batch and context, and the model's own modules beside it. With\n"
            "--weights random the model's weights are drawn on the GPU, and nothing is fetched but its\n"
            "configuration; what plans cost is the same. Every figure is written as soon as it is known; the\n"
            "same command continues."
        ),
        (
            "examples:\n"
            "  labkit bench-gpu autoglm-phone-9b --weights random --output results/gpu-9b\n"
            "  labkit bench-gpu autoglm-phone-9b --plans bf16,int4 --contexts 1024 --output results/gpu-9b"
        ),
    )
    command.add_argument("model", help=UNQUANTIZED_MODEL)
    add_options(command, GpuOptions)


def run(options: argparse.Namespace) -> int:
    """Measure plan after plan, then print the tables."""
    from labkit.cli.terminal import console, make_table
    from labkit.measure.bench_gpu import bench_gpu
    from labkit.results.gpu import HEADERS, PROMPT_HEADERS, prompt_table, table

    screen = console()
    (records, failures), _ = measured(
        options, bench_gpu, GpuOptions, say=lambda line: screen.print(line, highlight=False)
    )
    screen.print(make_table("Decoding", HEADERS, table(records), (2,)))
    screen.print(make_table("Prompts", PROMPT_HEADERS, prompt_table(records)))
    if any(record.weights for record in records):
        screen.print(
            "The weights are random: this is what plans cost, and says nothing of how well they answer."
        )
    return 1 if failures else 0
