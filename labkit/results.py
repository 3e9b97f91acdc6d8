"""What one model under one plan on one device cost and scored: plain data, without torch.

``results.json`` is ``{"environment": {…}, "measurements": [{…}, …]}``; a measurement keeps its raw
samples, so every mean and interval in it can be worked out again.
"""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from labkit.errors import LabError
from labkit.files import atomic_path, checkout_folder

Z95 = 1.959963984540054
"""Half-width, in standard errors, of a two-sided 95 % interval."""

PACKAGES = ("labkit", "torch", "transformers", "bitsandbytes", "tokenizers", "safetensors", "numpy", "pillow")


class ResultsError(LabError):
    """A results file is missing, damaged or of another shape; the message says which and where."""


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


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate; ``(0.0, 1.0)`` when `count` is 0 (Wilson 1927)."""
    if not 0 <= successes <= count:
        raise ValueError(f"successes must lie in 0…{count}, not {successes}")
    if count == 0:
        return 0.0, 1.0
    rate, square = successes / count, Z95 * Z95
    centre = (rate + square / (2 * count)) / (1 + square / count)
    half = Z95 / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """``(mean, low, high)`` with the 95 % normal interval; its ends are None for fewer than two values."""
    count = len(values)
    if count == 0:
        return None, None, None
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None, None
    half = Z95 * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean, mean - half, mean + half


def paired_difference(
    values: Sequence[float | bool], reference: Sequence[float | bool]
) -> tuple[float | None, float | None, float | None]:
    """``(mean, low, high)`` of ``values[i] - reference[i]``, two measurements of the same items.

    Negative means: lower than the reference. The interval covers 95 %: for hits and misses (booleans) the
    adjusted Wald interval of paired proportions (Bonett and Price 2012), which stays honest when both agree
    on every item; for numbers the normal interval of the mean difference. All None without items.
    Raises ValueError if the lengths differ.
    """
    if len(values) != len(reference):
        raise ValueError(f"paired values must match item by item: {len(values)} and {len(reference)} differ")
    if not values:
        return None, None, None
    differences = [float(a) - float(b) for a, b in zip(values, reference)]
    if not all(isinstance(value, bool) for value in (*values, *reference)):
        return mean_interval(differences)
    count = len(values)
    gained = (sum(d > 0 for d in differences) + 1) / (count + 2)
    lost = (sum(d < 0 for d in differences) + 1) / (count + 2)
    centre = gained - lost
    half = Z95 * math.sqrt((gained + lost - centre * centre) / (count + 2))
    return math.fsum(differences) / count, max(-1.0, centre - half), min(1.0, centre + half)


def environment(gpu: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Where and with what a measurement was made: machine, versions, commit and time.

    `gpu` (name, driver, memory …) comes from a caller that has torch loaded; without one it is None.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_bytes": _memory_bytes(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": dict(gpu) if gpu else None,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "command": _command(),
    }


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


def read_json(path: str | os.PathLike) -> Any:
    """Parse a JSON file. Raises `ResultsError` that names the file and the place of the damage."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{path}: damaged: not UTF-8 text") from None
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ResultsError(f"{path}: damaged: {error}") from None


def _command() -> list[str]:
    program = Path(sys.argv[0]) if sys.argv and sys.argv[0] else None
    if program is None:
        return []
    name = program.parent.name if program.name == "__main__.py" else program.name
    return [name, *sys.argv[1:]]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The lab's own git commit, with ``+`` if files differ from it; None outside a checkout."""
    folder = checkout_folder()
    if not (folder / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode != 0:
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
