"""``compare``: one model under many plans, each measured in a fresh process, resumable.

``labkit.compare("pocket", plans=["fp32", "int4"], items=200)`` checks everything that can be checked, starts
one process a plan, and returns a `Comparison`: ``.table()``, ``.save()``, ``.plot()``, ``.conclusions()``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.common.errors import Interrupted, WorkerFailedError
from labkit.common.machine import environment
from labkit.common.process import module_command, run_workers
from labkit.measure.job import Job, prepare
from labkit.results.comparison import Comparison
from labkit.results.config import write_config
from labkit.results.folders import RunFolder

if TYPE_CHECKING:
    from labkit.plans.plan import QuantizationPlan


def compare(
    model: str | os.PathLike = "pocket",
    plans: Sequence[str | os.PathLike | QuantizationPlan] | None = None,
    items: int = 200,
    *,
    seed: int | None = None,
    split: str = "all",
    device: str = "auto",
    threads: int | None = None,
    enable_thinking: bool = False,
    batch_size: int = 8,
    weights: str | None = None,
    output: str | os.PathLike | None = None,
    progress: bool = True,
    _worker: Sequence[str] | None = None,
) -> Comparison:
    """Measure `model` under every plan on the same PhoneTap items, one fresh process a plan.

    model: a name from ``labkit models``, a checkpoint folder, or a hub id; a folder that labkit has quantized
    is measured under its own plan, beside its unquantized base model. plans: preset names or YAML files
    (default: `DEFAULT_PLANS`); an unquantized plan is added if there is none. items: number of test items.
    seed: None for the standard set, a number for other screens. split: ``typed``, ``spoken``, ``hard``,
    several (``typed,hard``), or ``all`` that the model takes. device: several GPUs, ``cuda:0,cuda:1``, share
    the layers. weights: ``random`` measures what the architecture costs with random weights; no item is
    answered. threads: CPU threads of the measuring process (default: all cores). output: a folder;
    measurements in it with the same settings are kept, and an interrupted comparison continues. Without a
    folder nothing stays on disk.

    Raises `LabError` (wrong model, plan, split, number, folder, or a folder that holds another comparison)
    before anything is measured, `Interrupted` (a KeyboardInterrupt) on Ctrl-C, and OSError where the folder cannot be
    written, as on a full disk; what is measured stays in it.
    """
    arguments = dict(locals())
    arguments["thinking"] = arguments.pop("enable_thinking")  # the command's word for it
    job = prepare(
        model,
        plans,
        items,
        seed=seed,
        split=split,
        device=device,
        threads=threads,
        enable_thinking=enable_thinking,
        batch_size=batch_size,
        weights=weights,
    )
    with contextlib.ExitStack() as stack:
        if output is None:
            output = stack.enter_context(tempfile.TemporaryDirectory(prefix="labkit-"))
        folder = RunFolder(output)
        folder.open(job.settings)
        write_config(folder.path, "compare", arguments)
        return _measure_all(job, folder, progress, _worker)


def _measure_all(job: Job, folder: RunFolder, progress: bool, worker: Sequence[str] | None) -> Comparison:
    """Measure the missing plans; write the results and the report again after every plan."""
    loaded = {name: folder.load_finished(name, plan.definition) for name, plan in job.plans.items()}
    measurements = {name: m for name, m in loaded.items() if m is not None}
    for name, plan in job.plans.items():
        folder.load_partial(
            name, plan.definition
        )  # raises now, not after an hour, if the plan cannot continue
    failures: dict[str, str] = {}
    where = environment()

    def current() -> Comparison:
        finished = [measurements[name] for name in job.plans if name in measurements]
        return Comparison(where, finished, failures, job.added_plan, settings=job.settings)

    def save(comparison: Comparison) -> None:
        try:
            comparison.save(folder.path)
        except OSError as error:  # it names no file if the disk is full
            raise OSError(
                error.errno,
                f"{error.strerror}: {len(comparison.measurements)} finished measurements are kept in its plans/; "
                "make room and run the same again for the results and the report",
                str(folder.path),
            ) from None

    order = sorted(job.plans, key=lambda name: name != job.reference)  # the reference first
    for number, name in enumerate(order, start=1):
        if name in measurements:
            continue
        try:
            run_worker(
                job.request(name, folder.path),
                log=folder.log_path(name),
                title=f"{number}/{len(order)} {name}",
                progress=progress,
                command=worker,
            )
        except WorkerFailedError as error:
            failures[name] = str(error)
            continue
        except KeyboardInterrupt:
            comparison = current()
            if comparison.measurements:
                save(comparison)
            answers = len(folder.load_partial(name, job.plans[name].definition)["records"])
            message = (
                f"interrupted: {len(measurements)} of {len(order)} plans are finished, {answers} answers of "
                f"{name} are kept; run the same again to continue"
            )
            raise Interrupted(message, comparison) from None
        measurements[name] = folder.load_finished(name, job.plans[name].definition)
        save(current())
    if not measurements:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise WorkerFailedError(f"no plan could be measured ({reasons})")
    comparison = current()
    save(comparison)
    return comparison


STAGES = {"loading": "loading and quantizing", "measuring": "measuring latency", "answering": "answering"}


def run_worker(
    request: Mapping[str, Any],
    *,
    log: Path,
    title: str = "",
    progress: bool = True,
    command: Sequence[str] | None = None,
) -> None:
    """Run ``python -m labkit.measure.compare_worker`` on `request` (see there) until its measurement is on disk.

    Its output goes to the file `log`; a progress bar shows stage, answers and right steps.
    Raises `WorkerFailedError` if the process reports an error or dies.
    """
    from tqdm.auto import tqdm

    command = command or module_command("labkit.measure.compare_worker")
    with tqdm(
        total=request["items"],
        desc=title,
        unit=" answers",
        mininterval=0,
        disable=not progress,
        file=sys.stderr,
    ) as bar:

        def show(event: Mapping[str, Any]) -> None:
            if event["event"] == "stage":
                bar.set_description(f"{title}: {STAGES[event['stage']]}")
            elif event["event"] == "answers":
                _show(bar, event)

        try:
            run_workers(command, {log: request}, show, threads=request["threads"])
        except WorkerFailedError:
            bar.set_description(f"{title}: failed")
            raise
        bar.set_description(f"{title}: done")


def _show(bar: Any, event: Mapping[str, Any]) -> None:
    bar.update(event["done"] - bar.n)
    if event["done"]:
        bar.set_postfix_str(f"right steps {event['hits'] / event['done']:.1%}", refresh=False)
