"""What decoding and prompts cost on a GPU, plan by plan: the files of `labkit bench-gpu`. Plain data, without torch.

A folder holds one ``PLAN.json`` for each plan, written anew after every figure, so that an interrupted run continues.
Times are seconds, every sample of them; bytes are bytes.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from labkit.common.errors import ResultsError
from labkit.results.record import Record

CAPTURED, MODULES = "captured", "modules"
"""The two routes of a step: the lab's captured one, and the model's own modules, called one after another."""


@dataclass
class Prompt:
    """Prompts of ``tokens`` tokens, one at a time, and the most memory that the GPU held."""

    tokens: int
    seconds: list[float]
    peak_bytes: int | None = None


@dataclass
class Decoding:
    """Steps of ``batch`` conversations that have ``context`` tokens each.

    Attributes:
        route: `CAPTURED` or `MODULES`.
        seconds: of single steps, each waited for, with the choice of the next token.
        queued_s: of one step, when many are queued and the host waits for the last.
        read_bytes: what a step reads at least: decoder, head, and all caches, once.
    """

    route: str
    batch: int
    context: int
    seconds: list[float]
    queued_s: float
    read_bytes: int
    peak_bytes: int | None = None

    @property
    def step_s(self) -> float:
        """Seconds of a step: the median."""
        return statistics.median(self.seconds)


@dataclass
class GpuRecord(Record):
    """One plan on one GPU.

    Attributes:
        weights: ``random`` where they are, else None.
        route: what `labkit.engine.engine.Engine.route` says.
        copy_bytes_per_s: what a copy on the device moves, bytes read and written.
        screenshot: ``tokens`` and ``peak_bytes`` of a prompt with one screenshot, and some tokens after it.
        agreement: of the captured step's logits with those of the model's own modules, on the same cache:
            ``relative_error``, ``same_token`` (1 if both choose it), and ``in_company``, the relative change of the
            captured step's when other rows are beside it.
        notes: what could not be measured, and why.
    """

    COMMAND: ClassVar[str] = "bench-gpu"

    model: str
    plan: str
    definition: dict[str, Any]
    weights: str | None = None
    route: str = ""
    load_s: float | None = None
    weights_bytes: int | None = None
    predicted_bytes: int | None = None
    copy_bytes_per_s: float | None = None
    prompts: list[Prompt] = field(default_factory=list)
    decoding: list[Decoding] = field(default_factory=list)
    screenshot: dict[str, int] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def decoded(self, batch: int, context: int, route: str = CAPTURED) -> Decoding | None:
        """That measurement, if it was made."""
        for entry in self.decoding:
            if (entry.batch, entry.context, entry.route) == (batch, context, route):
                return entry
        return None

    def prompt(self, tokens: int) -> Prompt | None:
        """That measurement, if it was made."""
        return next((prompt for prompt in self.prompts if prompt.tokens == tokens), None)

    def floor_s(self, one: Decoding) -> float | None:
        """Seconds that a step's bytes take at the speed of a copy."""
        return one.read_bytes / self.copy_bytes_per_s if self.copy_bytes_per_s else None

    @property
    def file_name(self) -> str:
        """A folder holds one file for each plan."""
        return f"{self.plan}.json"


def load_records(folder: str | os.PathLike) -> list[GpuRecord]:
    """All plans of a folder, the heaviest first. Raises `ResultsError` if there is none."""
    records = [GpuRecord.load(path) for path in sorted(Path(folder).glob("*.json"))]
    if not records:
        raise ResultsError(f"{folder}: no records of labkit bench-gpu")
    return sorted(records, key=lambda entry: -(entry.weights_bytes or 0))


HEADERS = (
    "Plan", "Weights, GB", "Route", "Batch", "Context", "Step, ms", "Queued, ms", "Floor, ms", "Of the roof",
)  # fmt: skip


def table(records: Sequence[GpuRecord]) -> list[list[str]]:
    """One line for each decoding measurement, under `HEADERS`."""
    lines = []
    for record in records:
        for entry in record.decoding:
            floor = record.floor_s(entry)
            lines.append(
                [
                    record.plan,
                    "" if record.weights_bytes is None else f"{record.weights_bytes / 1e9:.2f}",
                    entry.route,
                    str(entry.batch),
                    f"{entry.context:,}",
                    f"{1e3 * entry.step_s:.2f}",
                    f"{1e3 * entry.queued_s:.2f}",
                    "" if floor is None else f"{1e3 * floor:.2f}",
                    "" if floor is None else f"{floor / entry.queued_s:.0%}",
                ]
            )
    return lines


PROMPT_HEADERS = ("Plan", "Prompt", "ms", "Peak, GB")


def prompt_table(records: Sequence[GpuRecord]) -> list[list[str]]:
    """One line for each prompt, and for each screenshot, under `PROMPT_HEADERS`."""
    lines = []
    for record in records:
        for prompt in record.prompts:
            milliseconds = 1e3 * statistics.median(prompt.seconds)
            peak = "" if prompt.peak_bytes is None else f"{prompt.peak_bytes / 1e9:.2f}"
            lines.append([record.plan, f"{prompt.tokens:,}", f"{milliseconds:.1f}", peak])
        if record.screenshot:
            tokens, peak = record.screenshot["tokens"], record.screenshot["peak_bytes"]
            lines.append([record.plan, f"{tokens:,} with a screenshot", "", f"{peak / 1e9:.2f}"])
    return lines
