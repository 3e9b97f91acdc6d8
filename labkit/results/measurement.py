"""Costs and scores of one model under one plan on one device: plain data, without torch.

A measurement has its raw samples, from which every mean and interval can be computed again.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from labkit.results.record import read_fields


@dataclass(kw_only=True)
class Measurement:
    """Cost and quality of one (model, plan, device).

    Bytes are bytes, times seconds, rates 0…1; distances and biases are in units of the screen's side
    (1.0 = from edge to edge), biases signed prediction minus target centre: positive is right and down.
    Names ending in ``_low`` and ``_high`` are the ends of a 95 % interval. None means: not measured, or no
    such item in the split.
    """

    model: str
    plan: str
    device: str
    plan_definition: dict[str, Any] = field(default_factory=dict)
    """The measured plan: its rules, default and runtime."""
    weights: str | None = None
    """``random``: the architecture with random weights, for cost alone. None: the model's own weights."""
    seed: int | None = None
    split: str | None = None
    enable_thinking: bool | None = None
    batch_size: int | None = None

    weights_bytes: int | None = None
    predicted_bytes: int | None = None
    bytes_by_role: dict[str, int] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    peak_memory_kind: str | None = None
    """``process peak RSS`` on the CPU (interpreter and libraries included; with a remark where it is an upper bound, see
    `labkit.common.machine.peak_rss`), or ``GPU peak allocated``."""
    load_s: float | None = None
    ttft_s: float | None = None
    """Median time from the request to the first token, one request at a time, after warm-up."""
    decode_tokens_per_s: float | None = None
    answer_s: float | None = None
    """Median time of a whole answer: one request at a time, first token and decoding together."""
    prompt_tokens: float | None = None

    items: int = 0
    clicks: int = 0
    """Items whose right action has a point: click accuracy, distance and bias are over these."""
    click_accuracy: float | None = None
    click_accuracy_low: float | None = None
    click_accuracy_high: float | None = None
    step_success_rate: float | None = None
    step_success_rate_low: float | None = None
    step_success_rate_high: float | None = None
    parse_rate: float | None = None
    parse_rate_low: float | None = None
    parse_rate_high: float | None = None
    mean_distance: float | None = None
    mean_distance_low: float | None = None
    mean_distance_high: float | None = None
    bias_x: float | None = None
    bias_x_low: float | None = None
    bias_x_high: float | None = None
    bias_y: float | None = None
    bias_y_low: float | None = None
    bias_y_high: float | None = None

    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same quality fields for each group: ``split=typed``, ``lang=zh``, ``target_kind=icon``, …"""
    paired: dict[str, Any] = field(default_factory=dict)
    """Difference to the unquantized row on the same items: ``reference``, ``<metric>`` with its ends."""
    samples: dict[str, Any] = field(default_factory=dict)
    """Raw samples: lists of numbers such as ``ttft_s``, and ``items``, one record an item."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Facts from the measuring process: threads, GPU, driver, versions of the loaded libraries."""

    @property
    def label(self) -> str:
        """The name in tables and charts: the plan, with a note if the weights are random."""
        return self.plan if self.weights is None else f"{self.plan} ({self.weights} weights)"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str = "measurement") -> "Measurement":
        """The inverse of `to_dict`. Raises `ResultsError`, which names the wrong field."""
        return read_fields(cls, values, where)
