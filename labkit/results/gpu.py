"""Costs of decoding and prompts on a GPU, plan by plan: the files of `labkit bench-gpu`. Plain data, without torch.

A folder has one ``PLAN.json`` a plan, written again after every figure, so that an interrupted run continues.
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
"""The two routes of a step: a captured CUDA graph, and the model's own modules, called one after another."""


@dataclass
class Prompt:
    """Seconds of prompts of ``tokens`` tokens, one at a time, and the GPU's peak memory."""

    tokens: int
    seconds: list[float]
    peak_bytes: int | None = None


@dataclass
class Decoding:
    """Steps of ``batch`` conversations with ``context`` tokens each.

    Attributes:
        route: `CAPTURED` or `MODULES`.
        seconds: of single steps with the choice of the next token; the host waits for each.
        queued_s: of one step, when many are queued and the host waits for the last.
        read_bytes: the least bytes that a step reads: decoder, head, and all caches, once.
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
        weights: ``random`` for random weights, else None.
        route: `labkit.engine.engine.Engine.route`.
        copy_bytes_per_s: bytes read and written by a copy on the device.
        screenshot: ``tokens`` and ``peak_bytes`` of a prompt with one screenshot and some decoded tokens.
        agreement: of the captured step's logits with those of the model's own modules, on the same cache:
            ``relative_error``, ``same_token`` (1 if both choose the same), and ``in_company``, the relative change of
            the captured step's logits with other rows beside it.
        notes: figures that could not be measured, and why.
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
        """The measurement with these parameters, or None."""
        for decoding in self.decoding:
            if (decoding.batch, decoding.context, decoding.route) == (batch, context, route):
                return decoding
        return None

    def prompt(self, tokens: int) -> Prompt | None:
        """The measurement with these parameters, or None."""
        return next((prompt for prompt in self.prompts if prompt.tokens == tokens), None)

    def floor_s(self, decoding: Decoding) -> float | None:
        """Seconds that a step's bytes take at the speed of a copy."""
        return decoding.read_bytes / self.copy_bytes_per_s if self.copy_bytes_per_s else None

    @property
    def file_name(self) -> str:
        """One file a plan."""
        return f"{self.plan}.json"


def load_records(folder: str | os.PathLike) -> list[GpuRecord]:
    """All plans of a folder, the largest weights first. Raises `ResultsError` if there is none."""
    records = [GpuRecord.load(path) for path in sorted(Path(folder).glob("*.json"))]
    if not records:
        raise ResultsError(f"{folder}: no records of labkit bench-gpu")
    return sorted(records, key=lambda record: -(record.weights_bytes or 0))


HEADERS = (
    "Plan", "Weights, GB", "Route", "Batch", "Context", "Step, ms", "Queued, ms", "Floor, ms", "Of the roof",
)  # fmt: skip


def table(records: Sequence[GpuRecord]) -> list[list[str]]:
    """One line for each decoding measurement, under `HEADERS`."""
    lines = []
    for record in records:
        for decoding in record.decoding:
            floor = record.floor_s(decoding)
            lines.append(
                [
                    record.plan,
                    "" if record.weights_bytes is None else f"{record.weights_bytes / 1e9:.2f}",
                    decoding.route,
                    str(decoding.batch),
                    f"{decoding.context:,}",
                    f"{1e3 * decoding.step_s:.2f}",
                    f"{1e3 * decoding.queued_s:.2f}",
                    "" if floor is None else f"{1e3 * floor:.2f}",
                    "" if floor is None else f"{floor / decoding.queued_s:.0%}",
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
