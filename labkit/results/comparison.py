"""Measurements of one model under several plans."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from labkit.results import report, tables
from labkit.results.charts import comparison
from labkit.results.measurement import Measurement
from labkit.results.record import Record
from labkit.results.summary import summarize_paired

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects


@dataclass
class Comparison(Record):
    """Measurements of one model under several plans, with their environment.

    Attributes:
        failures: the plans that could not be measured, and why.
        added_plan: the unquantized plan that was added because the request had none.
    """

    COMMAND: ClassVar[str] = "compare"

    environment: dict[str, Any]
    measurements: list[Measurement]
    failures: dict[str, str] = field(default_factory=dict)
    added_plan: str | None = None

    def __post_init__(self):
        reference = tables.reference_of(self.measurements)
        for m in self.measurements:
            m.paired = {}
            if reference is not None and m is not reference:
                difference = summarize_paired(m.samples.get("items", []), reference.samples.get("items", []))
                m.paired = {"reference": reference.plan, **difference}

    def table(self) -> "pandas.DataFrame":
        """One row a plan: raw numbers, changes against the unquantized row, paired differences."""
        import pandas

        return pandas.DataFrame(tables.comparison_rows(self.measurements)).set_index("plan")

    def conclusions(self) -> list[str]:
        """Conclusions from the numbers, in sentences."""
        return tables.conclusions(self.measurements)

    def plot(self, kind: str = "overview") -> "plotly.graph_objects.Figure":
        """A plotly figure: ``overview`` or one of ``bytes, latency, accuracy, paired, drift``."""
        return comparison.figure(self.measurements, kind)

    def save(self, path: str | os.PathLike) -> Path:
        """As `Record.save`; a folder also gets ``report.html``."""
        file = super().save(path)
        if Path(path) != file:
            facts = {**self.environment, "failures": self.failures, "added_plan": self.added_plan}
            report.write_report(file.with_name("report.html"), facts, self.measurements)
        return file

    @classmethod
    def _from_json(cls, values: dict[str, Any], file: Path) -> dict[str, Any]:
        environment = values.get("environment")
        if not isinstance(environment, dict):
            return values
        # older files have these fields inside the environment
        names = {"settings", "failures", "added_plan"} & set(environment)
        moved = {name: environment[name] for name in names if environment[name] is not None}
        rest = {name: value for name, value in environment.items() if name not in names}
        return {**moved, **values, "environment": rest}

    def _repr_html_(self) -> str:
        tables = report.tables_html(
            self.measurements
        )  # nowrap keeps numbers with their units; a narrow page scrolls
        return f'<div style="overflow-x:auto;white-space:nowrap">{tables}</div>'


def describe(settings: Mapping[str, Any]) -> str:
    """The settings of a comparison in one line."""
    if settings.get("weights"):
        return (
            f"{settings['model']} with {settings['weights']} weights on {settings['device']}, "
            f"{settings['threads']} threads: cost only"
        )
    seed = "standard set" if settings["seed"] is None else f"seed {settings['seed']}"
    return (
        f"{settings['model']} on {settings['device']}, {settings['threads']} threads, "
        f"{settings['items']} test items ({settings['split']}, {seed}), "
        f"thinking {'on' if settings['enable_thinking'] else 'off'}"
    )
