"""What is checked before a model is loaded: the device, its memory, the calibration, the plan's runtime options."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from labkit.engine.row_cache import keeps_rows
from labkit.loading.calibration import default_calibration
from labkit.loading.datasets import Datasets
from labkit.loading.placement import Placement, check_map, placed_on
from labkit.models.checkpoint import Checkpoint, LoadError
from labkit.plans.finished import FinishedModules, WorkFolder, fingerprint_of
from labkit.plans.plan import QuantizationPlan
from labkit.plans.resolved import ResolvedPlan
from labkit.quantization.native import library as native


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


def _work(
    checkpoint: Checkpoint,
    resolved: ResolvedPlan,
    batches: Any,
    work_folder: Any,
    steps: FinishedModules | None,
) -> FinishedModules | None:
    """Where finished modules are kept, if anywhere."""
    if steps is not None or work_folder is None or batches is None:
        return steps
    facts = checkpoint.facts()
    weights = str(facts["fingerprint"] or facts["commit"])
    return WorkFolder(work_folder, fingerprint_of(weights, resolved.schemes, resolved.plan.dtype, batches))


def _place(
    skeleton: torch.nn.Module,
    resolved: ResolvedPlan,
    targets: Sequence[torch.device],
    device_map: Mapping[str, Any] | None,
) -> Placement:
    """Where each module goes."""
    if device_map is not None:
        return check_map(skeleton, {name: choose_device(one) for name, one in device_map.items()}, targets[0])
    return placed_on(skeleton, resolved, targets)


def _prepare(target: torch.device) -> None:
    """Compile the CPU's step if that was never done here: some seconds, once, that no measured time contains."""
    if target.type == "cpu":
        native.available()


def _batches(resolved: ResolvedPlan, calibration: Any, processor: Any, checkpoint: Checkpoint) -> Any:
    """What `quantize_` calibrates on: the given batches, or PhoneTap's."""
    if not any(scheme.requires_calibration for scheme in resolved.schemes.values()):
        return None
    if calibration is not None and not isinstance(calibration, int):
        return calibration
    modalities = getattr(processor, "modalities", checkpoint.family.modalities)
    return default_calibration(
        processor, modalities, calibration or Datasets.calibration, model=checkpoint.model_class
    )
