"""Costs and scores of plans at growing context: the file of `labkit context`. Plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from labkit.common.formats import format_bytes, format_difference, format_rate, format_seconds
from labkit.results.record import Record

if TYPE_CHECKING:
    import pandas


@dataclass
class ContextGrowth(Record):
    """What `labkit.measure.context.measure_growth` returns.

    Attributes:
        records: one for each plan and context: ``plan, context, prompt_tokens, cache_bytes`` (of one conversation,
            counted), ``predicted_cache_bytes, weights_bytes, peak_memory_bytes`` (on a GPU, of this context),
            ``ttft_s, token_s`` (medians), ``samples``, and the fields of `labkit.results.summary.summarize` with
            ``paired`` differences; without items only the cost.
    """

    FILE: ClassVar[str] = "context.json"
    COMMAND: ClassVar[str] = "context"
    ALLOW_NAN: ClassVar[bool] = True

    records: list[dict[str, Any]]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows, as text."""
        random = " (random weights)" if self.settings["weights"] else ""
        headers = ["Plan", "Prompt", "KV cache", "predicted", "First token", "A token"]
        scored = bool(self.settings["items"])
        headers += ["Right steps [95 %]", f"vs {self.settings['reference']}, paired"] if scored else []
        rows = []
        for record in self.records:
            row = [
                f"{record['plan']}{random}",
                f"{record['prompt_tokens']:,.0f}",
                format_bytes(record["cache_bytes"]),
                format_bytes(record["predicted_cache_bytes"]),
                format_seconds(record["ttft_s"]),
                format_seconds(record["token_s"]),
            ]
            if scored:
                ends = record["step_success_rate_low"], record["step_success_rate_high"]
                row.append(format_rate(record["step_success_rate"], *ends))
                paired = record.get("paired") or {}
                difference = (paired.get(f"step_success_rate{end}") for end in ("", "_low", "_high"))
                row.append(format_difference(*difference))
            rows.append(row)
        return headers, rows

    def table(self) -> pandas.DataFrame:
        """`rows` as a DataFrame."""
        import pandas

        headers, rows = self.rows()
        return pandas.DataFrame(rows, columns=headers).set_index("Plan")
