"""Facts about this machine: memory, accelerators and required packages, as plain data."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.common.files import checkout_folder

if TYPE_CHECKING:
    import torch

CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""Files with a container's memory limit and usage on Linux: control groups version 2, and version 1."""


def environment_on(device: torch.device | str) -> dict[str, Any]:
    """`environment` of a measurement on ``device``."""
    import torch  # measuring is about to use it; reading records is not

    return environment(gpu_of(torch.device(device)))


def gpu_of(device: torch.device) -> dict[str, Any] | None:
    """The entry of `gpus` for a device; None for the CPU."""
    return gpus()[device.index or 0] if device.type == "cuda" else None


def gpus() -> list[dict[str, Any]]:
    """An entry for each GPU: ``name``, ``memory_bytes``, ``free_bytes``, ``capability``, ``driver``, ``cuda``."""
    import torch  # measuring is about to use it; reading records is not

    if not torch.cuda.is_available():
        return []
    drivers = driver_versions()
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "free_bytes": torch.cuda.mem_get_info(index)[0],
                "capability": f"{properties.major}.{properties.minor}",
                "driver": drivers[index] if index < len(drivers) else None,
                "cuda": torch.version.cuda,
            }
        )
    return devices


def driver_versions() -> list[str]:
    """The NVIDIA driver's version for each GPU, from ``nvidia-smi``; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def memory() -> tuple[int, int]:
    """Main memory that this process may use, in bytes: ``(total, free)``, within a container's limit."""
    import psutil

    host = psutil.virtual_memory()
    total, free = host.total, host.available
    for limit_file, used_file in CGROUP_FILES:
        try:
            limit = int(limit_file.read_text())
            used = int(used_file.read_text())
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
        if limit < total:
            total, free = limit, min(free, limit - used)
    return total, free


def peak_rss() -> tuple[int, str]:
    """The most main memory that this process has used, in bytes, and what that figure is.

    On Linux it counts from the start of this program. ``ru_maxrss``, which must do elsewhere, may also count the
    process that started it: there a small child of a large notebook reports the notebook's peak.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    if match := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
        return int(match[1]) * 1024, "process peak RSS"
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset, "process peak working set"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return peak * unit, "process peak RSS (ru_maxrss: perhaps that of the process that started it)"


def give_back_memory() -> None:
    """Make the C library return freed memory to the system, if it supports that (glibc).

    Short-lived arrays of tens of megabytes leave holes that it otherwise keeps.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def forget_models() -> None:
    """Free the memory of unused models, on GPUs too, before the next model is loaded.

    Hooks and captured steps refer to each other, so Python frees such a model only in its next cycle collection.
    """
    import torch  # measuring is about to use it; reading records is not

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back_memory()


def requirements() -> Iterator[tuple[str, str]]:
    """Name and version pin of each required package: from a checkout's requirements.txt, else from the wheel's metadata."""
    path = checkout_folder() / "requirements.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        try:
            lines = metadata.requires("labkit") or []
        except metadata.PackageNotFoundError:
            return
    for line in lines:
        requirement, _, marker = line.split("#")[0].partition(";")
        match = re.match(r"\s*([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?\s*(.*?)\s*$", requirement)
        if match and "extra ==" not in marker and _applies(marker):
            yield match[1], match[2].replace(" ", "")


def _applies(marker: str) -> bool:
    if not marker.strip():
        return True
    from packaging.markers import Marker

    return Marker(marker.strip()).evaluate()


PACKAGES = ("labkit", "torch", "transformers", "bitsandbytes", "tokenizers", "safetensors", "numpy", "pillow")


def environment(gpu: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The environment of a measurement: machine, versions, commit and time.

    `gpu` (name, driver, memory …) comes from a caller that has imported torch; None without a GPU.
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
    """The lab's git commit, with ``+`` if files differ from it; None outside a checkout."""
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


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
