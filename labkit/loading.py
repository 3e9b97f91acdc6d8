"""Spec and plan in, engine out.

Everything that can be wrong is checked before anything takes long: the folder and its files, the
configuration, the device, the plan against the model's skeleton on the meta device, and whether each scheme
runs on the device. Weights come from safetensors only, and code from a model's repository is never run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from labkit.apply import quantize_
from labkit.calibration import DEFAULT_COUNT, default_calibration
from labkit.checkpoint.fingerprint import Fingerprinted
from labkit.checkpoint.manifest import CheckpointError, Manifest
from labkit.checkpoint.restore import resolve_stored, restore, stored_plan
from labkit.engine import Engine
from labkit.machine import memory
from labkit.models.checkpoint import Checkpoint, LoadError
from labkit.models.families import find_roles
from labkit.models.spec import ModelSpec, get_spec
from labkit.native import library as native
from labkit.plan import QuantizationPlan
from labkit.quantization import DTYPES
from labkit.resolution import ResolvedPlan
from labkit.workfolder import FinishedModules


def load(
    model: str | Path | ModelSpec = "pocket",
    plan: str | Path | QuantizationPlan | None = None,
    device: str | torch.device = "auto",
    *,
    calibration: Any = None,
    work_folder: str | Path | None = None,
    dtype: str | None = None,
    steps: FinishedModules | None = None,
    progress: bool = True,
) -> Engine:
    """Load a model, quantize it by a plan, and give the engine that answers with it.

    A folder that the lab has quantized (`labkit.save`, ``labkit quantize``) is restored as it is.

    Args:
        model: ``"pocket"``, another registered name, a folder with a transformers checkpoint or a quantized
            one, or a hub id.
        plan: a preset's name, the path of a plan file, or a plan (default: ``"bf16"``; of a quantized folder
            its own, and no other).
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        calibration: batches for schemes that need them, or how many of PhoneTap's calibration items to use;
            the standard ones are used if a plan needs some and none are given (see :mod:`labkit.calibration`).
        work_folder: where layers solved on calibration are kept, so that the same call continues after an
            interruption.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"`` instead of the plan's default for what is not quantized.
        steps: where finished modules are kept and found again (`labkit.checkpoint.steps`).
        progress: show progress bars.

    Raises:
        LabError: whatever cannot work, before weights are read; the message says what would.
    """
    spec = get_spec(model)
    if spec.is_quantized:
        return _load_quantized(spec, plan, device, dtype, calibration, progress)
    plan = as_plan("bf16" if plan is None else plan, dtype)
    target = choose_device(device)
    checkpoint = Checkpoint(spec)
    checkpoint.check_weights()
    skeleton = checkpoint.skeleton()
    roles = find_roles(skeleton)
    predicted = plan.resolve(skeleton, roles=roles, device=target)
    check_calibration(predicted, calibration, checkpoint.family.modalities)
    check_memory(predicted.predicted_bytes, target, spec, plan)
    staging = staging_device(checkpoint.stored_bytes(skeleton), target, spec.name)
    del skeleton

    _prepare(target)
    started = time.perf_counter()  # libraries are imported by now: what follows is files and arithmetic
    processor = checkpoint.processor(plan.dtype)
    loaded = checkpoint.weights(staging, progress)
    batches = _batches(predicted, calibration, processor, checkpoint)
    batches = None if batches is None else Fingerprinted.of(batches)
    resolved = quantize_(
        loaded,
        plan,
        batches,
        roles=roles,
        device=target,
        work_folder=work_folder,
        steps=steps,
        progress=progress,
    )
    loaded.to(target)
    return Engine(
        loaded,
        processor,
        spec=spec,
        plan=plan,
        resolved=resolved,
        roles=roles,
        load_s=time.perf_counter() - started,
        provenance={"calibration": batches.facts() if batches is not None else None},
    )


def _load_quantized(
    spec: ModelSpec, plan: Any, device: Any, dtype: str | None, calibration: Any, progress: bool
) -> Engine:
    """`load` for a folder that the lab has quantized."""
    manifest = Manifest.read(spec.folder)
    plan = check_stored_plan(spec, manifest, plan, dtype, calibration)
    target = choose_device(device)
    manifest.check_sizes(spec.folder)
    manifest.check_hashes(spec.folder)
    checkpoint = Checkpoint(spec)
    skeleton = checkpoint.skeleton()
    resolved, roles = resolve_stored(manifest, skeleton, target, spec.folder)
    check_memory(resolved.predicted_bytes, target, spec, plan)

    _prepare(target)
    started = time.perf_counter()
    processor = checkpoint.processor(plan.dtype)
    loaded = restore(checkpoint, manifest, resolved, skeleton, target, progress)
    return Engine(
        loaded,
        processor,
        spec=spec,
        plan=plan,
        resolved=resolved,
        roles=roles,
        load_s=time.perf_counter() - started,
        provenance={name: getattr(manifest, name) for name in ("base", "calibration", "made_with")},
    )


def _prepare(target: torch.device) -> None:
    """Compile the CPU's step if that was never done here: some seconds, once, that no measured time contains."""
    if target.type == "cpu":
        native.available()


def check_stored_plan(
    spec: ModelSpec, manifest: Manifest, plan: Any = None, dtype: str | None = None, calibration: Any = None
) -> QuantizationPlan:
    """The plan of a quantized folder, after refusing another one.

    Raises:
        CheckpointError: another plan, dtype or calibration is asked for than the folder was made with.
    """
    stored = stored_plan(manifest)
    remedy = f"load {manifest.base['name']} to quantize it otherwise"
    if plan is not None:
        wanted = as_plan(plan)
        if wanted != stored:
            same = ", of that name but another content" if wanted.name == stored.name else ""
            raise CheckpointError(
                f"{spec.name} is quantized already, by the plan {stored.name}; "
                f"it cannot be loaded under {wanted.name}{same}: {remedy}"
            )
    if dtype is not None and dtype != stored.default:
        raise CheckpointError(f"{spec.name} is stored in {stored.default}, not in {dtype}: {remedy}")
    if calibration is not None:
        raise CheckpointError(f"{spec.name} is quantized already and takes no calibration: {remedy}")
    return stored


def as_plan(plan: str | Path | QuantizationPlan, dtype: str | None = None) -> QuantizationPlan:
    """A plan from its name, its file or itself, with another default dtype if one is given."""
    if not isinstance(plan, QuantizationPlan):
        plan = QuantizationPlan.from_yaml(plan)
    if dtype is None:
        return plan
    if dtype not in DTYPES:
        raise LoadError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return dataclasses.replace(plan, default=dtype)


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


def _batches(resolved: ResolvedPlan, calibration: Any, processor: Any, checkpoint: Checkpoint) -> Any:
    """What `quantize_` calibrates on: the given batches, or PhoneTap's."""
    if not any(scheme.requires_calibration for scheme in resolved.schemes.values()):
        return None
    if calibration is not None and not isinstance(calibration, int):
        return calibration
    modalities = getattr(processor, "modalities", checkpoint.family.modalities)
    return default_calibration(
        processor, modalities, calibration or DEFAULT_COUNT, model=checkpoint.model_class
    )


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


def check_memory(needed: int, device: torch.device, spec: ModelSpec, plan: QuantizationPlan) -> None:
    """Refuse what cannot fit, by the plan's predicted bytes against the memory that is free now.

    Raises:
        LoadError: with both figures.
    """
    free = free_bytes(device)
    if needed > free:
        raise LoadError(
            f"{spec.name} under the plan {plan.name} needs {needed / 1e9:.1f} GB for its weights; "
            f"{device} has {free / 1e9:.1f} GB free. Try a plan with fewer bits, such as int4"
        )
