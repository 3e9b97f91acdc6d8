"""What one model under one plan on one device cost and scored: plain data, without torch.

``results.json`` is ``{"environment": {…}, "measurements": [{…}, …]}``; a measurement keeps its raw
samples, so every mean and interval in it can be worked out again.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from labkit.common.errors import ResultsError
from labkit.common.files import atomic_path, read_json


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
    """The plan itself as it was measured: its rules, default and runtime."""
    weights: str | None = None
    """``random``: the architecture with random weights. Then only cost was measured. None: the model's own."""
    seed: int | None = None
    split: str | None = None
    enable_thinking: bool | None = None
    batch_size: int | None = None

    weights_bytes: int | None = None
    predicted_bytes: int | None = None
    bytes_by_role: dict[str, int] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    peak_memory_kind: str | None = None
    """``process peak RSS`` on the CPU (interpreter and libraries included), or ``GPU peak allocated``."""
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
    """What only the measuring process knew: threads, GPU, driver, versions it really loaded."""

    @property
    def label(self) -> str:
        """What tables and charts call it: the plan, and that the weights are random if they are."""
        return self.plan if self.weights is None else f"{self.plan} ({self.weights} weights)"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str = "measurement") -> "Measurement":
        """The inverse of `to_dict`. Raises `ResultsError` that names the wrong field."""
        if not isinstance(values, Mapping):
            raise ResultsError(f"{where}: expected an object, found {type(values).__name__}")
        hints = get_type_hints(cls)
        for name in ("model", "plan", "device"):
            if name not in values:
                raise ResultsError(f"{where}: field {name!r} is missing")
        for name, value in values.items():
            if name not in hints:
                raise ResultsError(f"{where}: unknown field {name!r}; known are {', '.join(hints)}")
            if not _matches(value, hints[name]):
                raise ResultsError(
                    f"{where}: field {name!r} must be {_type_name(hints[name])}, not {value!r}"[:300]
                )
        return cls(**values)


def _matches(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_matches(value, option) for option in get_args(hint))
    plain = get_origin(hint) or hint
    if plain is float:
        return type(value) in (int, float)
    if plain is int:
        return type(value) is int
    return isinstance(value, plain)


def _type_name(hint: Any) -> str:
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    names = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        dict: "an object",
    }
    return " or ".join("null" if o is NoneType else names[get_origin(o) or o] for o in options)


def save_results(
    path: str | os.PathLike, environment: Mapping[str, Any], measurements: Iterable[Measurement]
):
    """Write ``results.json`` in one step: a reader sees the old file or the new one, never half of one."""
    body = {"environment": dict(environment), "measurements": [m.to_dict() for m in measurements]}
    with atomic_path(path) as temporary:
        temporary.write_text(
            json.dumps(body, ensure_ascii=False, indent=1, allow_nan=False), encoding="utf-8"
        )


def load_results(path: str | os.PathLike) -> tuple[dict[str, Any], list[Measurement]]:
    """Read ``results.json``, or the one in a folder. Raises `ResultsError` for a missing or damaged file."""
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    body = read_json(path)
    if not isinstance(body, dict) or not isinstance(body.get("environment"), dict):
        raise ResultsError(f"{path}: no results file: the object 'environment' is missing")
    if not isinstance(body.get("measurements"), list):
        raise ResultsError(f"{path}: no results file: the list 'measurements' is missing")
    where = f"{path}: measurements"
    rows = [Measurement.from_dict(row, f"{where}[{index}]") for index, row in enumerate(body["measurements"])]
    return body["environment"], rows
