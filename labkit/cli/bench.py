"""``labkit bench-gpu``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from labkit.cli.arguments import count
from labkit.common.errors import LabError

PLANS = "fp32,bf16,int8,int8-dynamic,int4,article,nf4,llm-int8"


def add_bench_gpu(commands: argparse._SubParsersAction) -> None:
    """``labkit bench-gpu``."""
    command = commands.add_parser(
        "bench-gpu",
        help="measure what plans cost on a GPU: prompts, steps, memory",
        description=(
            "Measure prompts, decoding steps and memory of each plan on this machine's GPU, one process a plan:\n"
            "the lab's captured step at every batch and context, and the model's own modules beside it. With\n"
            "--weights random the model's weights are made up on the GPU, and nothing is fetched but its\n"
            "configuration; what plans cost is the same. Every figure is written as soon as it is known; the\n"
            "same command continues."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit bench-gpu autoglm-phone-9b --weights random --output results/gpu-9b\n"
            "  labkit bench-gpu autoglm-phone-9b --plans bf16,int4 --contexts 1024 --output results/gpu-9b"
        ),
    )
    command.add_argument("model", help="a name from `labkit models`, a checkpoint's folder, or a hub id")
    command.add_argument("--weights", choices=("random",), help="make them up (the model's own)")
    command.add_argument("--plans", default=PLANS, metavar="A,B,…", help=f"names or files ({PLANS})")
    for name, numbers, text in (
        ("--batches", "1,8", "conversations at a time"),
        ("--contexts", "1024,8192,24576", "tokens that each of them has"),
        ("--prompts", "1024,3200", "tokens of the prompts"),
    ):
        command.add_argument(name, default=numbers, metavar="N,…", help=f"{text} ({numbers})")
    command.add_argument(
        "--screenshot",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of the prompt with a screenshot; 0: none (4096)",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="the folder for the results")
    command.add_argument(
        "--timeout", type=count, default=1800, metavar="S", help="seconds for each plan (1800)"
    )
    command.set_defaults(run=bench_gpu)


def bench_gpu(options: argparse.Namespace) -> int:
    """What ``labkit bench-gpu`` does."""
    from labkit.cli.terminal import console, make_table
    from labkit.common.errors import WorkerFailedError
    from labkit.common.process import module_command, run_workers
    from labkit.loading.prepare import choose_device
    from labkit.models.spec import get_spec
    from labkit.plans.plan import as_plan
    from labkit.results.gpu import HEADERS, PROMPT_HEADERS, load_records, prompt_table, table

    numbers = {name: _numbers(name, getattr(options, name)) for name in ("batches", "contexts", "prompts")}
    choose_device("cuda")  # there has to be one
    folder = Path(options.output)
    screen = console()
    failed = []
    for source in options.plans.split(","):
        plan = as_plan(source.strip())
        record = {
            "model": get_spec(options.model).name,
            "plan": plan.name,
            "definition": plan.to_dict(),
            "weights": options.weights,
        }
        request = {
            "record": record,
            "source": source.strip(),
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
                timeout_s=options.timeout,
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


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise LabError(f"--{name} is {text!r}; write numbers from 1 on, such as 1,8")
    return numbers
