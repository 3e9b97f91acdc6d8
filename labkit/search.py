"""The search for a plan: the least loss within a number of bytes, found by prediction and settled by measuring.

``labkit.search_plan("pocket", memory="20MB")`` measures sensitivities (or takes those that are there), chooses a
scheme for each Linear by an integer program, and **measures** the plan that comes out. Where its divergence is not
what was predicted, each part of it is measured alone, predictions are corrected by what that finds, and the program
is solved again. The plan is then judged beside uniform plans on items that neither calibrated nor chose it, and in
the end on test items, in fresh processes. Everything measured is kept; the same call continues.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from labkit import allocation
from labkit.allocation import Allocation, Unit
from labkit.amounts import AGAINST, CANDIDATES
from labkit.errors import LabError
from labkit.formats import format_bytes
from labkit.goal import Goal
from labkit.judge import Judge
from labkit.material import Material
from labkit.models import get_spec
from labkit.plan import QuantizationPlan
from labkit.planwriter import plan_of
from labkit.preflight import check_count, lab_version
from labkit.recordfolder import RecordFolder
from labkit.searchresult import Search, finish
from labkit.sensitivity import Sensitivity, measure_sensitivity

DEFAULT_DTYPE = "bf16"
ROUNDS = 3
AGREEMENT = 1.25
"""The program is solved again where a plan diverges this many times more, or less, than predicted."""
BISECTIONS = 6
LARGEST_CORRECTION = 4.0
"""No prediction is divided by more: differences of small divergences are uncertain."""


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C: what was measured is on disk."""


def search_plan(
    model: str | os.PathLike = "pocket",
    *,
    memory: str | int | None = None,
    bits: float | None = None,
    max_loss: float | None = None,
    schemes: str | Sequence[str] = CANDIDATES,
    against: Sequence[str | os.PathLike] = AGAINST,
    material: Material | None = None,
    test_items: int = 200,
    name: str | None = None,
    device: str = "auto",
    jobs: int | None = None,
    threads: int | None = None,
    sensitivities: str | os.PathLike | None = None,
    parts: bool = True,
    output: str | os.PathLike | None = None,
    progress: bool = True,
) -> Search:
    """Find the plan that loses least within a budget, or the smallest that loses no more than ``max_loss``.

    Args:
        model: a name from ``labkit models``, a checkpoint folder, or a hub id.
        memory: bytes of all the model's weights: a number, or a text such as ``"60MB"``.
        bits: or bits a value of the Linears, on average, scales and zero points included (embeddings and convolutions stay).
        max_loss: or the largest loss: points of right steps; of a model without eyes per cent of perplexity.
        schemes: candidates for each Linear, as `labkit.candidates` reads them.
        against: uniform plans to judge beside it, names or files.
        material: how many items, or which text (`labkit.material`).
        test_items: how many test items the plan is reported on (0: none).
        name: the plan's name (default: from the goal).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        jobs, threads: as for `labkit.measure_sensitivity`.
        sensitivities: the folder of sensitivities (default: ``results/sensitivity-MODEL``).
        parts: measure whole parts too before choosing; without, the first choice is a poorer guess, sooner made.
        output: the folder of the search (default: ``results/search-MODEL-GOAL``).
        progress: say on standard error what is being done.

    Raises:
        LabError: whatever cannot work, before anything is measured.
        SearchInterrupted: Ctrl-C; the same call again continues.
    """
    goal = Goal.of(memory, bits, max_loss)
    spec = get_spec(model)
    material = material or Material()
    short = Path(spec.name).name
    name = name or f"searched-{goal.label}"
    if test_items:
        check_count("test items", test_items)
    others = [QuantizationPlan.from_yaml(one) for one in against]
    sensitivities = Path(sensitivities or Path("results") / f"sensitivity-{short}")
    output = Path(output or Path("results") / f"search-{short}-{goal.label}")
    say = _say if progress else lambda text: None
    try:
        found = measure_sensitivity(
            model, schemes, material=material, parts=parts, device=device, jobs=jobs, threads=threads,
            output=sensitivities, progress=progress,
        )  # fmt: skip
        folder = RecordFolder(output, "a search")
        settings = {
            **found.settings,
            "version": lab_version(),
            "goal": goal.settings(),
            "against": [one.to_dict() for one in others],
            "name": name,
        }
        folder.open(settings)
        probe = str(sensitivities / "probe.safetensors")
        judge = Judge(spec, material, probe, device, folder, found.settings["dtype"])
        solver = _Solver(judge, found, name, say, linears_only=goal.bits is not None)
        room = solver.room(goal)
        say("judging the unquantized model")
        judge.reference()
        for plan in others:
            say(f"judging {plan.name}")
            judge.measure(plan)
        measured = solver.best(room) if goal.max_loss is None else solver.smallest(goal.max_loss)
        return finish(
            judge, settings, measured[-1], [judge.measure(plan) for plan in others], solver.front(), against,
            test_items, threads=threads, progress=progress,
        )  # fmt: skip
    except KeyboardInterrupt as interruption:
        told = str(interruption) or "interrupted; run the same again to continue"
        raise SearchInterrupted(told) from None


class _Solver:
    """Chooses plans by prediction, and learns from what they measure."""

    def __init__(
        self,
        judge: Judge,
        sensitivity: Sensitivity,
        name: str,
        say: Callable[[str], None],
        linears_only: bool = False,
    ) -> None:
        self.judge, self.name, self.say = judge, name, say
        units: list[Unit] = allocation.units_of(sensitivity.linears, DEFAULT_DTYPE, 2)
        self.units = [unit for unit in units if unit.module == "linear" or not linears_only]
        self.weights = _weights_of_parts(sensitivity)
        self.nothing = QuantizationPlan("nothing quantized", (), default=DEFAULT_DTYPE)
        whole = judge.predicted_bytes(self.nothing)
        # what no choice changes: norms, and what is tied or has no candidate
        self.fixed = whole - sum(unit.options[0].bytes for unit in self.units)

    def room(self, goal: Goal) -> float:
        """Bytes for the Linears. Raises LabError if the smallest plan takes more."""
        smallest = sum(min(option.bytes for option in unit.options) for unit in self.units)
        if goal.memory is not None and goal.memory < self.fixed + smallest:
            raise LabError(
                f"the smallest plan of these schemes takes {format_bytes(self.fixed + smallest)}, of which "
                f"{format_bytes(self.fixed)} are not quantized (norms, tied embeddings and the like); "
                f"{format_bytes(goal.memory)} are allowed"
            )
        parameters = sum(unit.parameters for unit in self.units)
        if goal.bits is not None and goal.bits / 8 * parameters < smallest:
            raise LabError(
                f"the smallest plan of these schemes takes {8 * smallest / parameters:.2f} bits a value, and "
                f"{goal.bits:g} are allowed"
            )
        if goal.bits is not None:
            return goal.bits / 8 * parameters
        return 0.0 if goal.memory is None else goal.memory - self.fixed

    def front(self) -> list[dict[str, Any]]:
        """The predicted best plans of all sizes."""
        found = allocation.front(self.units, weights=self.weights)
        return [{"bytes": one.bytes + self.fixed, "kl": one.loss} for one in found]

    def best(self, room: float) -> list[dict[str, Any]]:
        """Choose, measure, and choose again where prediction and measurement disagree; the best record last."""
        dtype_kl = self.judge.measure(self.nothing, judged=False)["kl"]  # sensitivities do not hold this
        measured: dict[str, dict[str, Any]] = {}
        for number in range(1, ROUNDS + 1):
            chosen = allocation.allocate(self.units, room, self.weights)
            size = format_bytes(chosen.bytes + self.fixed)
            plan = plan_of(
                self.units, chosen, self.name, f"Found by search: {size} of weights.", DEFAULT_DTYPE
            )
            predicted = chosen.loss + dtype_kl
            self.say(f"round {number}: {size}, predicted divergence {predicted:.3g}")
            record = self.judge.measure(plan, predicted)
            if record["key"] in measured:
                break
            measured[record["key"]] = record
            self.say(f"round {number}: measured divergence {record['kl']:.3g}")
            ratio = max(record["kl"], 1e-9) / max(predicted, 1e-9)
            if 1 / AGREEMENT < ratio < AGREEMENT:
                break
            self._learn(plan, chosen, dtype_kl)
        return sorted(measured.values(), key=lambda one: -one["kl"])

    def smallest(self, max_loss: float) -> list[dict[str, Any]]:
        """The smallest plan whose measured loss is at most ``max_loss``, by halving the range of sizes.

        Raises:
            LabError: not even the largest plan tried loses so little.
        """
        sizes = [one.bytes for one in allocation.front(self.units, weights=self.weights)]
        low, high, best = sizes[0], sizes[-1], None
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            measured = self.best(middle)
            loss = self.judge.loss_of(measured[-1])
            self.say(f"{format_bytes(measured[-1]['bytes'])}: loss {loss:.2f}, allowed {max_loss:g}")
            if loss <= max_loss:
                best, high = measured, middle
            else:
                low = middle
            if high / low < 1.02:
                break
        if best is None:
            raise LabError(
                f"no plan of these schemes loses at most {max_loss:g}: allow more, or candidates of more bits"
            )
        return best

    def _learn(self, plan: QuantizationPlan, chosen: Allocation, dtype_kl: float) -> None:
        """Measure each part of the plan alone, and weigh its schemes' predictions by what comes out, less what the
        default dtype alone does."""
        for role in dict.fromkeys(unit.role for unit in self.units):
            mine = [
                (unit, option)
                for unit, option in zip(self.units, chosen.choices)
                if unit.role == role and option.scheme != DEFAULT_DTYPE
            ]
            predicted = sum(option.loss * self.weights.get((role, option.scheme), 1.0) for _, option in mine)
            if role is None or predicted <= 0:
                continue
            rules = tuple(rule for rule in plan.rules if role in rule.roles)
            self.say(f"its {role} alone")
            alone = replace(plan, name=f"{plan.name}: {role}", rules=rules)
            record = self.judge.measure(alone, predicted + dtype_kl, judged=False)
            kl = max(record["kl"] - dtype_kl, predicted / LARGEST_CORRECTION)
            for scheme in {option.scheme for _, option in mine}:
                weight = self.weights.get((role, scheme), 1.0)
                self.weights[role, scheme] = weight * kl / predicted


def _weights_of_parts(sensitivity: Sensitivity) -> dict[tuple[str | None, str], float]:
    """What whole parts diverged, as a multiple of the sum over their Linears."""
    weights: dict[tuple[str | None, str], float] = {}
    for part in sensitivity.parts:
        total = sum(
            one.get("kl", 0.0)
            for one in sensitivity.linears
            if (one["role"], one["scheme"], one.get("module", "linear"))
            == (part["part"], part["scheme"], "linear")
        )
        if total > 0 and part["kl"] > 0:
            weights[part["part"], part["scheme"]] = part["kl"] / total
    return weights


def _say(text: str) -> None:
    import sys

    print(f"search: {text}", file=sys.stderr, flush=True)
