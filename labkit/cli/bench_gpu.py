"""``labkit bench-gpu``: what plans cost on a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from labkit.cli.arguments import UNQUANTIZED_MODEL, add_command, kept_config
from labkit.common.errors import LabError
from labkit.common.options import add_options
from labkit.measure.options import GpuOptions


def add(commands: Any) -> None:
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
    with kept_config(options, Path(options.output)):
        return _measure(options)


def _measure(options: argparse.Namespace) -> int:
    from labkit.cli.terminal import console, make_table
    from labkit.common.errors import WorkerFailedError
    from labkit.common.process import module_command, run_workers
    from labkit.loading.prepare import choose_device
    from labkit.models.spec import get_spec
    from labkit.plans.plan import as_plan
    from labkit.results.gpu import HEADERS, PROMPT_HEADERS, load_records, prompt_table, table

    numbers = {name: list(getattr(options, name)) for name in ("batches", "contexts", "prompts")}
    if empty := [name for name, values in numbers.items() if not values]:
        raise LabError(f"--{empty[0]} names no number; write 1,8")
    choose_device("cuda")  # a GPU is required
    folder = Path(options.output)
    screen = console()
    failed = []
    for source in options.plans:
        plan = as_plan(source)
        record = {
            "model": get_spec(options.model).name,
            "plan": plan.name,
            "definition": plan.to_dict(),
            "weights": options.weights,
        }
        request = {
            "record": record,
            "source": source,
            "folder": str(folder),
            "screenshot": options.screenshot,
            **numbers,
        }
        screen.print(f"{plan.name} …")
        log = folder / "logs" / f"{plan.name}.txt"
        try:
            run_workers(
                module_command("labkit.measure.gpu_worker"),
                {log: request},
                lambda event: None,
                threads=4,
                timeout_s=options.timeout_s,
            )
        except WorkerFailedError as error:
            failed.append(plan.name)
            screen.print(f"{plan.name} could not be measured: {error}", highlight=False)
    records = load_records(folder)
    screen.print(make_table("Decoding", HEADERS, table(records), (2,)))
    screen.print(make_table("Prompts", PROMPT_HEADERS, prompt_table(records)))
    if any(record.weights for record in records):
        screen.print(
            "The weights are random: this is what plans cost, and says nothing of how well they answer."
        )
    return 1 if failed else 0
