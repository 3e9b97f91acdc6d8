"""What is checked before a model is loaded: the device, its memory, the calibration, the plan's runtime options."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from labkit.common.machine import memory
from labkit.engine.row_cache import keeps_rows
from labkit.models.checkpoint import Checkpoint, LoadError
from labkit.models.spec import ModelSpec
from labkit.placement import Placement
from labkit.plans.plan import QuantizationPlan
from labkit.plans.resolved import ResolvedPlan


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device meant, checked to exist.

    Raises:
        LoadError: an unknown name, or a GPU that is not there.
    """
    if str(device) == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise LoadError(f"unknown device {str(device)!r}; known: auto, cpu, cuda, cuda:0, ...") from None
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise LoadError(f"the device {chosen} is not supported; known: auto, cpu, cuda, cuda:0, ...")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (chosen.index or 0) >= count:
        found = (
            f"this machine has {count} GPU{'s' if count != 1 else ''}"
            if count
            else "there is no usable GPU here"
        )
        raise LoadError(f"the device {chosen} does not exist: {found}; 'auto' takes what there is")
    return torch.device("cuda", chosen.index or 0)


def choose_devices(device: str | torch.device | Sequence[str] = "auto") -> list[torch.device]:
    """The devices meant: one, or several with commas between them or in a list.

    Raises:
        LoadError: as `choose_device`, or several that are not all GPUs.
    """
    if isinstance(device, str):
        device = [one.strip() for one in device.split(",") if one.strip()] or [device]
    elif isinstance(device, torch.device):
        device = [device]
    found = [choose_device(one) for one in device]
    if len(found) > 1 and any(one.type != "cuda" for one in found):
        raise LoadError(f"only GPUs share a model, such as cuda:0,cuda:1; not {', '.join(map(str, found))}")
    return found


def check_runtime(checkpoint: Checkpoint, plan: QuantizationPlan) -> None:
    """Refuse runtime options that this model's cache cannot follow.

    Raises:
        LoadError: its layers have windows or states of their own.
    """
    config = checkpoint.config.get_text_config(decoder=True)
    if plan.runtime.is_default or keeps_rows(config):
        return
    raise LoadError(
        f"plan {plan.name}: runtime kv_cache and sliding_window are for models whose layers all keep plain keys "
        f"and values; those of {checkpoint.spec.name} have windows or states of their own"
    )


def check_calibration(resolved: ResolvedPlan, calibration: Any, modalities: Collection[str]) -> None:
    """Refuse a plan whose schemes look at activations when there is nothing for them to look at.

    Raises:
        LoadError: no batches are given, and the model takes no images, which PhoneTap's items are.
    """
    for name, scheme in resolved.schemes.items():
        if not scheme.requires_calibration:
            continue
        if "image" not in modalities and (calibration is None or isinstance(calibration, int)):
            raise LoadError(
                f"plan {resolved.plan.name}: {scheme.name} ({name}) needs calibration batches, and PhoneTap's are "
                "screenshots, which this model does not take: pass calibration=[token ids, ...]"
            )
        if isinstance(calibration, int) and (isinstance(calibration, bool) or calibration < 1):
            raise LoadError(
                f"calibration must be batches or a number of items from 1 on, not {calibration!r}"
            )
        return


def staging_device(stored: int, target: torch.device, name: str) -> torch.device:
    """Where the unquantized weights, ``stored`` bytes, are read to: the target if they fit, else the CPU.

    Raises:
        LoadError: they fit neither.
    """
    for device in dict.fromkeys((target, torch.device("cpu"))):
        if stored < free_bytes(device):
            return device
    raise LoadError(
        f"reading {name} takes {stored / 1e9:.1f} GB for a while, before it is quantized; "
        f"cpu has {memory()[1] / 1e9:.1f} GB free"
    )


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory()[1]


def check_placed_memory(place: Placement, resolved: ResolvedPlan, spec: ModelSpec, work: int = 0) -> None:
    """`check_memory` on every device; ``work`` bytes more are needed while the model is made."""
    for device, size in place.bytes_by_device(resolved).items():
        check_memory(size, device, spec, resolved.plan, work)


def check_memory(
    needed: int, device: torch.device, spec: ModelSpec, plan: QuantizationPlan, work: int = 0
) -> None:
    """Refuse what cannot fit, by the plan's predicted bytes against the memory that is free now.

    Raises:
        LoadError: with all figures.
    """
    free = free_bytes(device)
    if needed + work > free:
        more = f" and {work / 1e9:.1f} GB to make them" if work else ""
        raise LoadError(
            f"{spec.name} under the plan {plan.name} needs {needed / 1e9:.1f} GB for its weights{more}; "
            f"{device} has {free / 1e9:.1f} GB free. Try a plan with fewer bits, such as int4"
        )
