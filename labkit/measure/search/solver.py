"""Chooses plans by prediction, measures them, and corrects the predictions; the best measured plan is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from labkit.common.errors import AllocationError, LabError
from labkit.common.formats import format_bytes
from labkit.measure.evaluator import PlanEvaluator
from labkit.measure.search import allocate
from labkit.measure.search.allocate import TOGETHER, Allocation, Unit
from labkit.measure.search.goal import KEPT_DTYPES, Goal
from labkit.measure.search.plan_writer import plan_of
from labkit.measure.search.sensitivity import Sensitivity
from labkit.plans.plan import QuantizationPlan
from labkit.quantization.int8_storage import KINDS

FINER = 0.5
"""fp16 is chosen where it alone diverges less than this share of the divergence of bf16."""
AGREEMENT = 1.25
"""Predictions are corrected where a plan diverges by this factor more, or less, than predicted."""
CORRECTIONS = 2
"""Most corrections of the predictions: each one measures every part of a plan alone."""
PATIENCE = 3
"""Plans measured in a row without a better one, after which the search stops."""
APART = 1 / 10
"""A further plan differs from each measured plan in at least this share of its units."""
BISECTIONS = 6
BISECTION_ROUNDS = 2
"""Most plans measured for each size."""
LARGEST_CORRECTION = 4.0
"""A correction divides a prediction by no more: differences of small divergences are uncertain."""


class Solver:
    """Chooses plans by prediction, and corrects the predictions by measurements.

    A prediction is the sum of the divergences of single layers. Their errors also add up or cancel in ways that it
    does not cover, so plans near the predicted best are measured too: each is the predicted best that
    differs enough from all before. Every choice follows from measurements, so an interrupted search repeats the same path.
    """

    def __init__(
        self,
        evaluator: PlanEvaluator,
        sensitivity: Sensitivity,
        name: str,
        say: Callable[[str], None],
        rounds: int,
        linears_only: bool = False,
        apart: bool = False,
    ) -> None:
        self.evaluator, self.name, self.say, self.rounds = evaluator, name, say, rounds
        self.together = () if apart else TOGETHER
        modules = ("linear",) if linears_only else ("linear", *KINDS)
        self.records = [record for record in sensitivity.linears if record.get("module", "linear") in modules]
        self.weights = _weights_of_parts(sensitivity)
        self.measured: list[dict[str, Any]] = []  # of each plan tried: round, bytes, predicted_kl, kl
        self._take(KEPT_DTYPES[0])
        whole = evaluator.prepared.predicted_bytes(_nothing(self.dtype))
        # what no choice changes: norms, and what is tied or has no candidate
        self.fixed = whole - sum(unit.options[0].bytes for unit in self.units)

    def settle_dtype(self, wanted: str) -> None:
        """Choose ``wanted`` as the dtype of what is not quantized, or for ``auto`` the better one of `KEPT_DTYPES` as
        measured; set ``dtype_kl`` to the divergence of that dtype alone, which sensitivities do not include."""
        if wanted != "auto":
            self._take(wanted)
            self.dtype_kl = self.evaluator.measure(_nothing(wanted), validated=False)["kl"]
            return
        coarse, fine = KEPT_DTYPES
        self.settle_dtype(coarse)
        try:
            kl = self.evaluator.measure(_nothing(fine), validated=False)["kl"]
        except (LabError, RuntimeError) as error:  # too large a value for it, or no kernel
            self.say(f"{fine} is not for this model: {error}")
            return
        self.say(f"nothing quantized diverges {self.dtype_kl:.3g} in {coarse}, {kl:.3g} in {fine}")
        if kl < FINER * self.dtype_kl:
            self._take(fine)
            self.dtype_kl = kl

    def _take(self, dtype: str) -> None:
        self.dtype = dtype
        self.units: list[Unit] = allocate.units_of(self.records, dtype, 2, self.together)

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
        allocations = allocate.front(self.units, weights=self.weights)
        return [{"bytes": allocation.bytes + self.fixed, "kl": allocation.loss} for allocation in allocations]

    def best(self, room: float, rounds: int | None = None) -> dict[str, Any]:
        """Choose and measure plans while they get better; returns the record of the best one, validated."""
        apart = max(round(APART * len(self.units)), 1)
        tried: list[Allocation] = []
        best: tuple[float, float, QuantizationPlan] | None = None
        corrections = fruitless = 0
        for number in range(1, (rounds or self.rounds) + 1):
            try:
                avoid = [allocation.choices for allocation in tried]
                chosen = allocate.allocate(self.units, room, self.weights, avoid, apart)
            except AllocationError:
                if best is None:
                    raise
                break  # nothing else fits
            tried.append(chosen)
            size = format_bytes(chosen.bytes + self.fixed)
            plan = plan_of(self.units, chosen, self.name, f"Found by search: {size} of weights.", self.dtype)
            predicted = chosen.loss + self.dtype_kl
            self.say(f"round {number}: {size}, predicted divergence {predicted:.3g}")
            record = self.evaluator.measure(plan, predicted, validated=False)
            kl = record["kl"]
            self.measured.append(
                {"round": number, "bytes": record["bytes"], "predicted_kl": predicted, "kl": kl}
            )
            self.say(f"round {number}: measured divergence {kl:.3g}")
            fruitless += 1
            if best is None or kl < best[0]:
                best, fruitless = (kl, predicted, plan), 0
            if fruitless == PATIENCE:
                break
            ratio = max(kl, 1e-9) / max(predicted, 1e-9)
            if corrections < CORRECTIONS and not 1 / AGREEMENT < ratio < AGREEMENT:
                corrections += 1
                self._learn(plan, chosen)
        _, predicted, plan = best
        self.say("validating the best of them")
        return self.evaluator.measure(plan, predicted)

    def smallest(self, max_loss: float) -> dict[str, Any]:
        """The smallest plan whose measured loss is at most ``max_loss``, by halving the range of sizes.

        Raises:
            LabError: even the largest plan that was tried loses more.
        """
        sizes = [allocation.bytes for allocation in allocate.front(self.units, weights=self.weights)]
        low, high, best = sizes[0], sizes[-1], None
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            record = self.best(middle, min(self.rounds, BISECTION_ROUNDS))
            loss = self.evaluator.loss_of(record)
            self.say(f"{format_bytes(record['bytes'])}: loss {loss:.2f}, allowed {max_loss:g}")
            if loss <= max_loss:
                best, high = record, middle
            else:
                low = middle
            if high / low < 1.02:
                break
        if best is None:
            raise LabError(
                f"no plan of these schemes loses at most {max_loss:g}: allow more, or candidates of more bits"
            )
        return best

    def _learn(self, plan: QuantizationPlan, chosen: Allocation) -> None:
        """Measure each part of the plan alone, and correct the predictions of its schemes by the result, less the
        divergence of the default dtype alone."""
        for role in dict.fromkeys(unit.role for unit in self.units):
            mine = [
                (unit, option)
                for unit, option in zip(self.units, chosen.choices)
                if unit.role == role and option.scheme != self.dtype
            ]
            predicted = sum(option.loss * self.weights.get((role, option.scheme), 1.0) for _, option in mine)
            if role is None or predicted <= 0:
                continue
            rules = tuple(rule for rule in plan.rules if role in rule.roles)
            self.say(f"its {role} alone")
            alone = replace(plan, name=f"{plan.name}: {role}", rules=rules)
            record = self.evaluator.measure(alone, predicted + self.dtype_kl, validated=False)
            kl = max(record["kl"] - self.dtype_kl, predicted / LARGEST_CORRECTION)
            for scheme in {option.scheme for _, option in mine}:
                weight = self.weights.get((role, scheme), 1.0)
                self.weights[role, scheme] = weight * kl / predicted


def _nothing(dtype: str) -> QuantizationPlan:
    return QuantizationPlan(f"nothing quantized, {dtype}", (), default=dtype)


def _weights_of_parts(sensitivity: Sensitivity) -> dict[tuple[str | None, str], float]:
    """(role, scheme) -> divergence of the whole part, as a multiple of the sum over its Linears."""
    weights: dict[tuple[str | None, str], float] = {}
    for part in sensitivity.parts:
        total = sum(
            record.get("kl", 0.0)
            for record in sensitivity.linears
            if (record["role"], record["scheme"], record.get("module", "linear"))
            == (part["part"], part["scheme"], "linear")
        )
        if total > 0 and part["kl"] > 0:
            weights[part["part"], part["scheme"]] = part["kl"] / total
    return weights
