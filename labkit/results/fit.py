"""Errors of predicted memory: the file of `labkit fit --check`. Plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from labkit.common.formats import format_bytes
from labkit.results.record import Record


@dataclass
class FitCheck(Record):
    """The result of `labkit fit --check`.

    Attributes:
        limits: the largest relative errors allowed for ``weights`` and ``peak``.
        records: one a plan, as `labkit.measure.fit_check.check_plan` returns them.
        failures: the plans that could not be measured, and why.
    """

    FILE: ClassVar[str] = "fit.json"
    COMMAND: ClassVar[str] = "fit --check"
    ALLOW_NAN: ClassVar[bool] = True

    limits: dict[str, float]
    records: list[dict[str, Any]]
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every plan was measured and every prediction is within its limits."""
        within = all(record["weights_within"] and record["peak_within"] for record in self.records)
        return within and not self.failures

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows, as text."""
        names = ("Weights", "KV cache", "Peak")
        headers = ["Plan (random weights)"]
        headers += [f"{name}{kind}" for name in names for kind in ("", ", measured", " off by")]
        rows = []
        for record in self.records:
            row = [record["plan"]]
            for what in ("weights", "cache", "peak"):
                row += [format_bytes(record[f"{what}_{kind}"]) for kind in ("predicted", "measured")]
                row.append(f"{100 * record[f'{what}_error']:+.1f} %")
            rows.append(row)
        return headers, rows
