"""The result of a search: the plan with its evidence, all that was measured, and conclusions."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from labkit.common.formats import format_bytes, format_difference, format_perplexity, format_rate
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
        found: the record of that plan (see `labkit.measure.evaluator.PlanEvaluator.measure`).
        reference: the record of the unquantized model.
        others: the records of the uniform plans.
        front: ``bytes, kl`` of the predicted best plan of each size.
        test: rows of the comparison on test items; empty if there was none.
        rounds: ``round, bytes, predicted_kl, kl`` of each plan that was tried; the best of them is kept.
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
        """One entry for each measured plan: the unquantized model, the uniform plans, the searched plan."""
        return [
            {name: record.get(name) for name in SHOWN if name in record}
            for record in (self.reference, *self.others, self.found)
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
        """Sentences that compare the plan with each uniform one, as measured."""
        record = self.found
        sentences = [
            f"{record['plan']}: {format_bytes(record['bytes'])} of weights, divergence {record['kl']:.3g} nats a "
            f"token (predicted {record['predicted_kl']:.3g}){_loss_text(record, self.reference)}."
        ]
        for other in sorted(self.others, key=lambda row: row["bytes"]):
            size = "smaller than" if other["bytes"] < record["bytes"] else "at least as large as"
            sentences.append(
                f"{other['plan']} ({format_bytes(other['bytes'])}, {size} it): divergence {other['kl']:.3g}"
                f"{_against(record, other)}."
            )
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """``path`` is the name of the plan's file, without its folder, so that the folder can be moved."""
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
    """Write the plan with its evidence, measure it on test items, and return the result."""
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
            {name: _rounded(record[name]) for name in SHOWN if record.get(name) is not None}
            for record in (reference, *others, found)
        ],
        "rounds": [{name: _rounded(value) for name, value in record.items()} for record in rounds],
    }
    replace(plan, evidence=evidence).to_yaml(path)
    environments = evaluator.folder.environments()
    result = Search(
        path=str(path),
        settings=settings,
        found=found,
        reference=reference,
        others=others,
        front=front,
        rounds=rounds,
        environments=environments,
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


def _loss_text(record: dict[str, Any], reference: dict[str, Any]) -> str:
    if "perplexity" in record:
        change = record["perplexity"] / reference["perplexity"] - 1
        text = f", perplexity {format_perplexity(record['perplexity'])}"
        if not math.isfinite(change):  # a broken model's is beyond what a float holds
            return f"{text} (unquantized: {format_perplexity(reference['perplexity'])})"
        return f"{text} ({change:+.1%} against the unquantized model's)"
    if "step_success_rate" in record:
        rates = format_rate(record["step_success_rate"]), format_rate(reference["step_success_rate"])
        return f", {rates[0]} right steps on validation items (unquantized: {rates[1]})"
    return ""


def _against(record: dict[str, Any], other: dict[str, Any]) -> str:
    if "perplexity" in other:
        return f", perplexity {format_perplexity(other['perplexity'])}"
    if "right" not in other:
        return ""
    ids = [item for item in record["right"] if item in other["right"]]
    difference = paired_difference(
        [record["right"][item] for item in ids], [other["right"][item] for item in ids]
    )
    return f"; right steps of the plan found, against it: {format_difference(*difference)} points"
