"""Facts about the accelerator of this machine, as plain data for records and for ``labkit doctor``."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch


def gpus() -> list[dict[str, Any]]:
    """One entry a GPU: ``name``, ``memory_bytes``, ``free_bytes``, ``capability``, ``driver``, ``cuda``."""
    if not torch.cuda.is_available():
        return []
    drivers = driver_versions()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "free_bytes": torch.cuda.mem_get_info(index)[0],
                "capability": f"{properties.major}.{properties.minor}",
                "driver": drivers[index] if index < len(drivers) else None,
                "cuda": torch.version.cuda,
            }
        )
    return found


def driver_versions() -> list[str]:
    """The NVIDIA driver's version for each GPU, as ``nvidia-smi`` tells; empty where there is none."""
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
