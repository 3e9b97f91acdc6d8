"""Measurements of one model under several plans."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.results import report, tables
from labkit.results.charts import comparison
from labkit.results.measurement import Measurement, load_results, save_results
from labkit.results.summary import summarize_paired

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects


@dataclass
class Comparison:
    """Measurements of one model under several plans, and where they were made.

    `failures` maps the plans that could not be measured to the reason.
    """

    environment: dict[str, Any]
    measurements: list[Measurement]
    failures: dict[str, str] = field(default_factory=dict)

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
        """What the numbers say, in sentences."""
        return tables.conclusions(self.measurements)

    def plot(self, kind: str = "overview") -> "plotly.graph_objects.Figure":
        """A plotly figure: ``overview`` or one of ``bytes, latency, accuracy, paired, drift``."""
        return comparison.figure(self.measurements, kind)

    def save(self, path: str | os.PathLike) -> None:
        """Write ``results.json`` and ``report.html`` into the folder `path`, or only JSON to ``*.json``."""
        path = Path(path)
        stored = {**self.environment, "failures": self.failures}
        if path.suffix == ".json":
            save_results(path, stored, self.measurements)
            return
        save_results(path / "results.json", stored, self.measurements)
        report.write_report(path / "report.html", stored, self.measurements)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Comparison":
        """Read what `save` wrote, a folder or a JSON file. Raises `ResultsError` if missing or damaged."""
        stored, measurements = load_results(path)
        return cls(stored, measurements, dict(stored.pop("failures", None) or {}))

    def _repr_html_(self) -> str:
        tables = report.tables_html(self.measurements)  # numbers keep their units; a narrow place scrolls
        return f'<div style="overflow-x:auto;white-space:nowrap">{tables}</div>'


def describe(settings: Mapping[str, Any]) -> str:
    """One line: what a comparison was made with."""
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
