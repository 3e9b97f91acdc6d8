"""The comparisons that come with the lab, under ``assets/results``: for those without the machine that made them."""

from pathlib import Path

from labkit.common.files import assets_folder
from labkit.results.comparison import Comparison
from labkit.results.context import ContextGrowth
from labkit.results.gpu import GpuRecord, load_records


def names() -> list[str]:
    """Their folders' names."""
    return sorted(path.parent.name for path in _folder().glob("*/results.json"))


def load(name: str) -> Comparison:
    """One of them. Raises ResultsError if it is not there."""
    return Comparison.load(_folder() / name)


def context(name: str = "pocket-kv") -> ContextGrowth | None:
    """What `labkit.measure.context.measure_growth` found at growing context; None if it is not shipped."""
    path = _folder() / name / ContextGrowth.FILE
    return ContextGrowth.load(path) if path.is_file() else None


def on_gpus() -> dict[str, Comparison]:
    """Name -> comparison, of those that were measured on a GPU; empty if none is shipped."""
    found = {name: load(name) for name in names()}
    return {
        name: comparison
        for name, comparison in found.items()
        if any(m.device.startswith("cuda") for m in comparison.measurements)
    }


def gpu_records(name: str = "gpu-9b") -> list[GpuRecord]:
    """What `labkit bench-gpu` measured at a model's size. Raises LabError if it is not there."""
    return load_records(_folder() / name)


def _folder() -> Path:
    return assets_folder() / "results"
