"""What a search found: the plan with its evidence, what was measured on the way, and what that says."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.common.errors import LabError
from labkit.common.files import atomic_path
from labkit.common.formats import format_bytes, format_difference, format_rate
from labkit.common.intervals import paired_difference
from labkit.measure.evaluator import KEPT, Judge
from labkit.plans.plan import QuantizationPlan

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

SHOWN = ("plan", "bytes", "predicted_kl", "kl", "agreement", *KEPT, "perplexity")


@dataclass
class Search:
    """What `labkit.search_plan` returns.

    Attributes:
        path: the plan's file.
        settings: what was searched, and with what.
        found: the record of the plan (see `labkit.measure.evaluator.Judge.measure`).
        reference: that of the unquantized model.
        others: those of the uniform plans.
        front: ``bytes, kl`` of the predicted best plan of each size.
        test: rows of the comparison on test items, empty if there was none.
        rounds: ``round, bytes, predicted_kl, kl`` of each plan that was tried; the best of them is the one found.
        environments: of each run that measured plans.
    """

    path: str
    settings: dict[str, Any]
    found: dict[str, Any] = field(repr=False)
    reference: dict[str, Any] = field(repr=False)
    others: list[dict[str, Any]] = field(repr=False)
    front: list[dict[str, Any]] = field(repr=False)
    test: list[dict[str, Any]] = field(default_factory=list, repr=False)
    rounds: list[dict[str, Any]] = field(default_factory=list, repr=False)
    environments: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def plan(self) -> QuantizationPlan:
        """The plan, with its evidence."""
        return QuantizationPlan.from_yaml(self.path)

    def rows(self) -> list[dict[str, Any]]:
        """One entry a measured plan: the unquantized model, the uniform plans, the one found."""
        return [
            {name: one.get(name) for name in SHOWN if name in one}
            for one in (self.reference, *self.others, self.found)
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
            f"token (predicted {found['predicted_kl']:.3g}){_judged(found, self.reference)}."
        ]
        for other in sorted(self.others, key=lambda one: one["bytes"]):
            size = "smaller than" if other["bytes"] < found["bytes"] else "at least as large as"
            sentences.append(
                f"{other['plan']} ({format_bytes(other['bytes'])}, {size} it): divergence {other['kl']:.3g}"
                f"{_against(found, other)}."
            )
        return sentences

    def save(self, path: str | os.PathLike) -> None:
        """Write ``search.json`` into the folder of the plan's file, whole or not at all; it names that file alone, so
        that the folder can be moved."""
        facts = {**asdict(self), "path": Path(self.path).name}
        with atomic_path(Path(path) / "search.json") as temporary:
            temporary.write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Search:
        """Read what `save` wrote. Raises LabError if it is missing or damaged."""
        file = Path(path) / "search.json"
        try:
            found = cls(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise LabError(f"{file} is not there: the search has not finished") from None
        except (OSError, ValueError, TypeError) as error:
            raise LabError(f"{file} is damaged: {error}") from None
        return replace(found, path=str(file.with_name(Path(found.path).name)))


def finish(
    judge: Judge,
    settings: dict[str, Any],
    found: dict[str, Any],
    others: list[dict[str, Any]],
    front: list[dict[str, Any]],
    rounds: list[dict[str, Any]],
    against: Sequence[str | os.PathLike],
    test_items: int,
    *,
    threads: int | None,
    progress: bool,
) -> Search:
    """Write the plan with its evidence, try it on test items, and put the result together."""
    folder = judge.folder.path
    plan = QuantizationPlan.from_dict(found["definition"], found["plan"])
    path = folder / f"{plan.name}.yaml"
    reference = judge.reference()
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
            {name: _rounded(one[name]) for name in SHOWN if one.get(name) is not None}
            for one in (reference, *others, found)
        ],
        "rounds": [{name: _rounded(value) for name, value in one.items()} for one in rounds],
    }
    replace(plan, evidence=evidence).to_yaml(path)
    environments = judge.folder.environments()
    result = Search(
        str(path), settings, found, reference, others, front, rounds=rounds, environments=environments
    )
    result.save(folder)
    if test_items and judge.datasets.text is None:
        from labkit.measure.compare import compare

        comparison = compare(
            str(judge.spec.folder or judge.spec.source),
            [*against, path],
            test_items,
            split="all" if "audio" in judge.prepared.modalities else "typed",
            device=str(judge.device),
            threads=threads,
            output=folder / "test",
            progress=progress,
        )
        result.test = json.loads(comparison.table().reset_index().to_json(orient="records"))
        result.save(folder)
    return result


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _judged(found: dict[str, Any], reference: dict[str, Any]) -> str:
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
    ids = [one for one in found["right"] if one in other["right"]]
    difference = paired_difference([found["right"][one] for one in ids], [other["right"][one] for one in ids])
    return f"; right steps of the plan found, against it: {format_difference(*difference)} points"
