"""The search for a plan: the least loss within a number of bytes, found by prediction and settled by measuring.

``labkit.search_plan("pocket", memory="20MB")`` measures sensitivities (or takes those that are there), chooses a
scheme for each Linear by an integer program, and **measures** the plan that comes out. Where its divergence is not
what was predicted, each part of it is measured alone, predictions are corrected by what that finds, and the program
is solved again. Then plans near by are measured, each the best by prediction that differs enough from all before,
for errors of layers add up or cancel in ways that no prediction knows; the best **measured** plan is kept. It is
compared with uniform plans on items that neither calibrated nor chose it, and in the end on test items, in fresh
processes. Everything measured is kept; the same call continues.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from labkit.common.errors import Interrupted, LabError
from labkit.loading.datasets import Datasets
from labkit.measure.defaults import CANDIDATES
from labkit.measure.evaluator import PlanEvaluator
from labkit.measure.job import check_count, lab_version
from labkit.measure.search.goal import AGAINST, KEPT_DTYPES, ROUNDS, Goal
from labkit.measure.search.result import Search, finish
from labkit.measure.search.sensitivity import measure_sensitivity
from labkit.measure.search.solver import Solver
from labkit.models import get_spec
from labkit.plans.plan import QuantizationPlan
from labkit.results.folders import RecordFolder


def search_plan(
    model: str | os.PathLike = "pocket",
    *,
    memory: str | int | None = None,
    bits: float | None = None,
    max_loss: float | None = None,
    schemes: str | Sequence[str] = CANDIDATES,
    against: Sequence[str | os.PathLike] = AGAINST,
    datasets: Datasets | None = None,
    test_items: int = 200,
    name: str | None = None,
    device: str = "auto",
    jobs: int | None = None,
    threads: int | None = None,
    sensitivities: str | os.PathLike | None = None,
    parts: bool = True,
    apart: bool = False,
    rounds: int = ROUNDS,
    dtype: str = "auto",
    output: str | os.PathLike | None = None,
    progress: bool = True,
) -> Search:
    """Find the plan that loses least within a budget, or the smallest that loses no more than ``max_loss``.

    Args:
        model: a name from ``labkit models``, a checkpoint folder, or a hub id.
        memory: bytes of all the model's weights: a number, or a text such as ``"60MB"``.
        bits: or bits a value of the Linears, on average, scales and zero points included (embeddings and convolutions stay).
        max_loss: or the largest loss: points of right steps; of a model without eyes per cent of perplexity.
        schemes: candidates for each Linear, as `labkit.quantization.shorthand` reads them.
        against: uniform plans to compare it with, names or files.
        datasets: how many items, or which text (`labkit.loading.datasets`).
        test_items: how many test items the plan is reported on (0: none).
        name: the plan's name (default: from the goal).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        jobs, threads: as for `labkit.measure_sensitivity`.
        sensitivities: the folder of sensitivities (default: ``results/sensitivity-MODEL``).
        parts: measure whole parts too before choosing; without, the first choice is a poorer guess, sooner made.
        apart: let q, k and v differ, and gate and up, for engines that do not multiply them as one (vLLM requires
            one scheme for them).
        rounds: plans measured at most before the best of them is kept.
        dtype: what is not quantized is kept and computed in, ``bf16`` or ``fp16``; ``auto``: fp16 where it diverges
            much less, as measured, else bf16 (which is faster on many CPUs).
        output: the folder of the search (default: ``results/search-MODEL-GOAL``).
        progress: say on standard error what is being done.

    Raises:
        LabError: whatever cannot work, before anything is measured.
        Interrupted: Ctrl-C; the same call again continues.
    """
    goal = Goal.of(memory, bits, max_loss)
    spec = get_spec(model)
    datasets = datasets or Datasets()
    short = Path(spec.name).name
    name = name or f"searched-{goal.label}"
    check_count("rounds", rounds)
    if dtype not in ("auto", *KEPT_DTYPES):
        raise LabError(f"dtype must be auto, {' or '.join(KEPT_DTYPES)}, not {dtype!r}")
    if test_items:
        check_count("test items", test_items)
    others = [QuantizationPlan.from_yaml(entry) for entry in against]
    sensitivities = Path(sensitivities or Path("results") / f"sensitivity-{short}")
    output = Path(output or Path("results") / f"search-{short}-{goal.label}")
    say = _say if progress else lambda text: None
    try:
        found = measure_sensitivity(
            model, schemes, datasets=datasets, parts=parts, device=device, jobs=jobs, threads=threads,
            output=sensitivities, progress=progress,
        )  # fmt: skip
        folder = RecordFolder(output, "a search")
        settings = {
            **found.settings,
            "version": lab_version(),
            "goal": goal.settings(),
            "against": [other.to_dict() for other in others],
            "name": name,
            "kept_dtype": dtype,
            "apart": apart,
        }
        folder.open(settings)
        probe = str(sensitivities / "probe.safetensors")
        evaluator = PlanEvaluator(spec, datasets, probe, device, folder, found.settings["dtype"])
        solver = Solver(evaluator, found, name, say, rounds, linears_only=goal.bits is not None, apart=apart)
        room = solver.room(goal)
        say("measuring the unquantized model")
        evaluator.reference()
        for plan in others:
            say(f"measuring {plan.name}")
            evaluator.measure(plan)
        solver.settle_dtype(dtype)
        chosen = solver.best(room) if goal.max_loss is None else solver.smallest(goal.max_loss)
        return finish(
            evaluator, settings, chosen, [evaluator.measure(plan) for plan in others], solver.front(), solver.measured,
            test_items, threads=threads, progress=progress,
        )  # fmt: skip
    except KeyboardInterrupt as interruption:
        told = str(interruption) or "interrupted; run the same again to continue"
        raise Interrupted(told) from None


def _say(text: str) -> None:
    import sys

    print(f"search: {text}", file=sys.stderr, flush=True)
