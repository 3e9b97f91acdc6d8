"""What a search found: the plan with its evidence, what was measured on the way, and what that says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from labkit.common.formats import format_bytes, format_difference, format_rate
from labkit.common.intervals import paired_difference
from labkit.measure.evaluator import KEPT, PlanEvaluator
from labkit.plans.plan import QuantizationPlan
from labkit.results.record import Record

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

SHOWN = ("plan", "bytes", "predicted_kl", "kl", "agreement", *KEPT, "perplexity")


@dataclass
class Search(Record):
    """What `labkit.search_plan` returns.

    Attributes:
        path: the plan's file.
        found: the record of the plan (see `labkit.measure.evaluator.PlanEvaluator.measure`).
        reference: that of the unquantized model.
        others: those of the uniform plans.
        front: ``bytes, kl`` of the predicted best plan of each size.
        test: rows of the comparison on test items, empty if there was none.
        rounds: ``round, bytes, predicted_kl, kl`` of each plan that was tried; the best of them is the one found.
    """

    FILE: ClassVar[str] = "search.json"
    COMMAND: ClassVar[str] = "search"
    ALLOW_NAN: ClassVar[bool] = True

    path: str
    settings: dict[str, Any]
    found: dict[str, Any] = field(repr=False)
    reference: dict[str, Any] = field(repr=False)
    others: list[dict[str, Any]] = field(repr=False)
    front: list[dict[str, Any]] = field(repr=False)
    test: list[dict[str, Any]] = field(default_factory=list, repr=False)
    rounds: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def plan(self) -> QuantizationPlan:
        """The plan, with its evidence."""
        return QuantizationPlan.from_yaml(self.path)

    def rows(self) -> list[dict[str, Any]]:
        """One entry a measured plan: the unquantized model, the uniform plans, the one found."""
        return [
            {name: other.get(name) for name in SHOWN if name in other}
            for other in (self.reference, *self.others, self.found)
        ]

    def table(self) -> pandas.DataFrame:
        """`rows` as a DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows()).set_index("plan")

    def plot(self) -> plotly.graph_objects.Figure:
        """The predicted front with the measured plans."""
        from labkit.results.charts.methods import pareto_front

        return pareto_front(self.front, [*self.others, self.found])

    def conclusions(self) -> list[str]:
        """What the measurements say of the plan beside each uniform one, in sentences."""
        found = self.found
        sentences = [
            f"{found['plan']}: {format_bytes(found['bytes'])} of weights, divergence {found['kl']:.3g} nats a "
            f"token (predicted {found['predicted_kl']:.3g}){_loss_text(found, self.reference)}."
        ]
        for other in sorted(self.others, key=lambda record: record["bytes"]):
            size = "smaller than" if other["bytes"] < found["bytes"] else "at least as large as"
            sentences.append(
                f"{other['plan']} ({format_bytes(other['bytes'])}, {size} it): divergence {other['kl']:.3g}"
                f"{_against(found, other)}."
            )
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """It names the plan's file alone, which lies beside it, so that the folder can be moved."""
        return {**super().to_dict(), "path": Path(self.path).name}

    @classmethod
    def _from_json(cls, values: dict[str, Any], file: Path) -> dict[str, Any]:
        return {**values, "path": str(file.with_name(Path(str(values.get("path"))).name))}


def finish(
    evaluator: PlanEvaluator,
    settings: dict[str, Any],
    found: dict[str, Any],
    others: list[dict[str, Any]],
    front: list[dict[str, Any]],
    rounds: list[dict[str, Any]],
    test_items: int,
    *,
    threads: int | None,
    progress: bool,
) -> Search:
    """Write the plan with its evidence, try it on test items, and put the result together."""
    folder = evaluator.folder.path
    plan = QuantizationPlan.from_dict(found["definition"], found["plan"])
    path = folder / f"{plan.name}.yaml"
    reference = evaluator.reference()
    evidence = {
        "model": settings["model"],
        "model_fingerprint": settings["model_fingerprint"],
        "goal": settings["goal"],
        "schemes": settings["schemes"],
        "found": datetime.now(UTC).isoformat(timespec="seconds"),
        "labkit": settings["version"],
        "bytes": found["bytes"],
        "predicted_kl": found["predicted_kl"],
        "measured": [
            {name: _rounded(other[name]) for name in SHOWN if other.get(name) is not None}
            for other in (reference, *others, found)
        ],
        "rounds": [{name: _rounded(value) for name, value in step.items()} for step in rounds],
    }
    replace(plan, evidence=evidence).to_yaml(path)
    environments = evaluator.folder.environments()
    result = Search(
        str(path), settings, found, reference, others, front, rounds=rounds, environments=environments
    )
    result.save(folder)
    if test_items and evaluator.datasets.text is None:
        from labkit.measure.compare import compare

        comparison = compare(
            str(evaluator.spec.folder or evaluator.spec.source),
            [*(QuantizationPlan.from_dict(other["definition"], other["plan"]) for other in others), plan],
            test_items,
            split="all" if "audio" in evaluator.prepared.modalities else "typed",
            device=str(evaluator.device),
            threads=threads,
            output=folder / "test",
            progress=progress,
        )
        result.test = json.loads(comparison.table().reset_index().to_json(orient="records"))
        result.save(folder)
    return result


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _loss_text(found: dict[str, Any], reference: dict[str, Any]) -> str:
    if "perplexity" in found:
        change = found["perplexity"] / reference["perplexity"] - 1
        return f", perplexity {found['perplexity']:.2f} ({change:+.1%} against the unquantized model's)"
    if "step_success_rate" in found:
        rates = format_rate(found["step_success_rate"]), format_rate(reference["step_success_rate"])
        return f", {rates[0]} right steps on validation items (unquantized: {rates[1]})"
    return ""


def _against(found: dict[str, Any], other: dict[str, Any]) -> str:
    if "perplexity" in other:
        return f", perplexity {other['perplexity']:.2f}"
    if "right" not in other:
        return ""
    ids = [entry for entry in found["right"] if entry in other["right"]]
    difference = paired_difference([found["right"][id_] for id_ in ids], [other["right"][id_] for id_ in ids])
    return f"; right steps of the plan found, against it: {format_difference(*difference)} points"
