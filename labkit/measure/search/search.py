"""Searches a plan: the least loss within a number of bytes, predicted from sensitivities and then measured."""

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

    The search measures sensitivities (or reads those in their folder), chooses a scheme for each Linear by an integer
    program, and measures the resulting plan. Where its divergence differs from the prediction, the search measures
    each part alone, corrects the predictions and solves again (`labkit.measure.search.solver`). It keeps the best
    measured plan, and compares it with uniform plans on validation items, which neither calibrated nor chose it, and
    finally on test items, in fresh processes. All measurements are stored; the same call continues.

    Args:
        model: a name from ``labkit models``, a checkpoint folder, or a hub id.
        memory: bytes of all the model's weights: a number, or a text such as ``"60MB"``.
        bits: or bits a value of the Linears, on average, with scales and zero points; embeddings and convolutions
            are not quantized.
        max_loss: or the largest loss: points of right steps, or percent of perplexity for a model that takes no
            images.
        schemes: candidates for each Linear, as `labkit.quantization.shorthand` reads them.
        against: uniform plans to compare it with, names or files.
        datasets: how many items, or which text (`labkit.loading.datasets`).
        test_items: number of test items for the final comparison (0: none).
        name: the plan's name (default: from the goal).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        jobs, threads: as for `labkit.measure_sensitivity`.
        sensitivities: the folder of sensitivities (default: ``results/sensitivity-MODEL``).
        parts: measure whole parts too before choosing; False is faster, and the first choice is a poorer guess.
        apart: allow different schemes for q, k and v, and for gate and up, for engines that do not multiply them as
            one (vLLM requires one scheme for them).
        rounds: most plans to measure before the best of them is kept.
        dtype: for what is not quantized, and for computing: ``bf16`` or ``fp16``; ``auto``: fp16 where it measurably
            diverges much less, else bf16 (which is faster on many CPUs).
        output: the folder of the search (default: ``results/search-MODEL-GOAL``).
        progress: report each step on standard error.

    Raises:
        LabError: an argument is wrong, before anything is measured.
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
    others = [QuantizationPlan.from_yaml(source) for source in against]
    sensitivities = Path(sensitivities or Path("results") / f"sensitivity-{short}")
    output = Path(output or Path("results") / f"search-{short}-{goal.label}")
    say = _say if progress else lambda text: None
    try:
        sensitivity = measure_sensitivity(
            model, schemes, datasets=datasets, parts=parts, device=device, jobs=jobs, threads=threads,
            output=sensitivities, progress=progress,
        )  # fmt: skip
        folder = RecordFolder(output, "a search")
        settings = {
            **sensitivity.settings,
            "version": lab_version(),
            "goal": goal.settings(),
            "against": [plan.to_dict() for plan in others],
            "name": name,
            "kept_dtype": dtype,
            "apart": apart,
        }
        folder.open(settings)
        probe = str(sensitivities / "probe.safetensors")
        evaluator = PlanEvaluator(spec, datasets, probe, device, folder, sensitivity.settings["dtype"])
        solver = Solver(
            evaluator, sensitivity, name, say, rounds, linears_only=goal.bits is not None, apart=apart
        )
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
        message = str(interruption) or "interrupted; run the same again to continue"
        raise Interrupted(message) from None


def _say(text: str) -> None:
    import sys

    print(f"search: {text}", file=sys.stderr, flush=True)
