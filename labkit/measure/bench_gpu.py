"""``labkit bench-gpu``: plan after plan on this machine's GPU, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from labkit.common.errors import LabError, WorkerFailedError
from labkit.common.files import user_path
from labkit.common.process import module_command, run_workers
from labkit.measure.options import GpuOptions
from labkit.models.spec import get_spec
from labkit.plans.plan import as_plan
from labkit.results.config import write_config
from labkit.results.gpu import GpuRecord, load_records

THREADS = 4
"""CPU threads of each process; the GPU does the work."""


def bench_gpu(
    model: str | os.PathLike,
    plans: Sequence[str] = GpuOptions.plans,
    *,
    weights: str | None = None,
    batches: Sequence[int] = GpuOptions.batches,
    contexts: Sequence[int] = GpuOptions.contexts,
    prompts: Sequence[int] = GpuOptions.prompts,
    screenshot: int = GpuOptions.screenshot,
    timeout_s: int = GpuOptions.timeout_s,
    output: str | os.PathLike,
    say: Callable[[str], None] = print,
) -> tuple[list[GpuRecord], dict[str, str]]:
    """Measure each plan's prompts, decoding steps and memory; the arguments are the fields of `GpuOptions`.

    Every figure is stored at once, so the same call continues. ``say`` is called with each plan, and each failure.

    Returns:
        The records in the folder, and the reasons of the plans that could not be measured.

    Raises:
        LabError: an argument is wrong, or there is no GPU.
    """
    arguments = {name: value for name, value in locals().items() if name != "say"}
    from labkit.loading.prepare import choose_device

    numbers = {"batches": list(batches), "contexts": list(contexts), "prompts": list(prompts)}
    if empty := [name for name, values in numbers.items() if not values]:
        raise LabError(f"--{empty[0]} names no number; write 1,8")
    chosen, folder = [as_plan(plan) for plan in plans], user_path(output)
    choose_device("cuda")  # a GPU is required
    write_config(folder, "bench-gpu", arguments)
    failures: dict[str, str] = {}
    for plan in chosen:
        definition = plan.to_dict()
        record = {
            "model": get_spec(model).name,
            "plan": plan.name,
            "definition": definition,
            "weights": weights,
        }
        request = {"record": record, "source": definition, "folder": str(folder), "screenshot": screenshot}
        say(f"{plan.name} …")
        try:
            run_workers(
                module_command("labkit.measure.gpu_worker"),
                {folder / "logs" / f"{plan.name}.txt": {**request, **numbers}},
                lambda event: None,
                threads=THREADS,
                timeout_s=timeout_s,
            )
        except WorkerFailedError as error:
            failures[plan.name] = str(error)
            say(f"{plan.name} could not be measured: {error}")
    return load_records(folder), failures
