"""The results that come with labkit, in ``assets/results``."""

from pathlib import Path

from labkit.common.files import assets_folder
from labkit.results.comparison import Comparison
from labkit.results.context import ContextGrowth
from labkit.results.gpu import GpuRecord, load_records


def names() -> list[str]:
    """The names of the shipped comparisons, which are those of their folders."""
    return sorted(path.parent.name for path in _folder().glob("*/results.json"))


def load(name: str) -> Comparison:
    """The shipped comparison ``name``. Raises ResultsError if there is none."""
    return Comparison.load(_folder() / name)


def context(name: str = "pocket-kv") -> ContextGrowth | None:
    """The shipped result of `labkit.measure.context.measure_growth`; None if there is none."""
    path = _folder() / name / ContextGrowth.FILE
    return ContextGrowth.load(path) if path.is_file() else None


def on_gpus() -> dict[str, Comparison]:
    """Name -> shipped comparison, of those measured on a GPU."""
    comparisons = {name: load(name) for name in names()}
    return {
        name: comparison
        for name, comparison in comparisons.items()
        if any(m.device.startswith("cuda") for m in comparison.measurements)
    }


def gpu_records(name: str = "gpu-9b") -> list[GpuRecord]:
    """The shipped records of `labkit bench-gpu`. Raises LabError if there are none."""
    return load_records(_folder() / name)


def _folder() -> Path:
    return assets_folder() / "results"
