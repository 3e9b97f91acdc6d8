"""Spec and plan in, engine out.

Everything that can be wrong is checked before anything takes long: the folder and its files, the
configuration, the device and its memory, the plan against the model's skeleton on the meta device, and whether
each scheme runs on the device. Weights come from safetensors only, shard by shard, and code from a model's
repository is never run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from labkit.engine.engine import Engine
from labkit.loading.calibration import Fingerprinted
from labkit.loading.placement import (
    check_placed_memory,
    connect_,
    staging_device,
)
from labkit.loading.prepare import (
    _batches,
    _place,
    _prepare,
    _work,
    check_calibration,
    check_runtime,
    choose_devices,
)
from labkit.loading.restore import _load_quantized
from labkit.models.checkpoint import Checkpoint, LoadError
from labkit.models.families import find_roles
from labkit.models.spec import ModelSpec, get_spec
from labkit.models.weights import RandomSource, Source, has_plain_names
from labkit.plans.fill import fill_, largest_work_bytes
from labkit.plans.finished import FinishedModules
from labkit.plans.plan import QuantizationPlan, as_plan
from labkit.plans.quantize import quantize_
from labkit.plans.sequential import checked_batches

RANDOM = "random"


def load(
    model: str | Path | ModelSpec = "pocket",
    plan: str | Path | QuantizationPlan | None = None,
    device: str | torch.device | Sequence[str] = "auto",
    *,
    weights: str | None = None,
    device_map: Mapping[str, Any] | None = None,
    calibration: Any = None,
    work_folder: str | Path | None = None,
    dtype: str | None = None,
    steps: FinishedModules | None = None,
    progress: bool = True,
) -> Engine:
    """Load a model, quantize it by a plan, and give the engine that answers with it.

    Weights are read shard by shard, and each module is quantized and put where it stays as soon as its weights
    are there: memory holds the quantized model, one shard and one module's work (`labkit.plans.fill`). A folder
    that the lab has quantized (`labkit.save`, ``labkit quantize``) is restored as it is.

    Args:
        model: ``"pocket"``, another registered name, a folder with a transformers checkpoint or a quantized
            one, or a hub id.
        plan: a preset's name, the path of a plan file, or a plan (default: ``"bf16"``; of a quantized folder
            its own, and no other).
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; several GPUs,
            ``"cuda:0,cuda:1"``, share the decoder's layers (`labkit.loading.placement`).
        weights: ``"random"`` builds the same architecture with random weights, for measuring what it costs;
            nothing is read but its configuration, and where there is no tokenizer, prompts are token ids.
        device_map: prefixes of module names -> device, instead of an even split; the rest is on the first
            device.
        calibration: batches for schemes that need them, or how many of PhoneTap's calibration items to use;
            the standard ones are used if a plan needs some and none are given (see :mod:`labkit.loading.calibration`).
        work_folder: where layers solved on calibration are kept, so that the same call continues after an
            interruption.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"`` instead of the plan's default for what is not quantized.
        steps: where finished modules are kept and found again (`labkit.plans.finished`).
        progress: show progress bars.

    Raises:
        LabError: whatever cannot work, before weights are read; the message says what would.
    """
    spec = get_spec(model)
    if weights not in (None, RANDOM):
        raise LoadError(f"weights is {weights!r}; it is {RANDOM!r}, or None for the model's own")
    if spec.is_quantized:
        if weights is not None:
            raise LoadError(f"{spec.name} is quantized already and has its weights: name the model it is of")
        return _load_quantized(spec, plan, device, device_map, dtype, calibration, progress)
    plan = as_plan("bf16" if plan is None else plan, dtype)
    targets = choose_devices(device)
    checkpoint = Checkpoint(spec, ask_hub=weights is None)
    check_runtime(checkpoint, plan)
    if weights is None:
        checkpoint.check_weights()
    skeleton = checkpoint.skeleton()
    roles = find_roles(skeleton)
    resolved = plan.resolve(skeleton, roles=roles, device=targets[0])
    calibrated = any(scheme.requires_calibration for scheme in resolved.schemes.values())
    if weights is None:
        check_calibration(resolved, calibration, checkpoint.family.modalities)
    elif calibrated:
        raise LoadError(
            f"plan {plan.name} calibrates, which says nothing on random weights; int4 has the same bytes as gptq "
            "and awq"
        )
    place = _place(skeleton, resolved, targets, device_map)
    if calibrated and len(place.devices) > 1:
        raise LoadError(
            f"plan {plan.name} calibrates, which runs on one device: quantize it there (labkit quantize), "
            "then load the folder on several"
        )
    check_placed_memory(place, resolved, spec)

    _prepare(targets[0])
    started = time.perf_counter()  # libraries are imported by now: what follows is files and arithmetic
    if weights == RANDOM:
        processor = checkpoint.processor_or_ids(plan.dtype)
        source: Source = RandomSource(skeleton)
    else:
        processor = checkpoint.processor(plan.dtype)
    batches = _batches(resolved, calibration, processor, checkpoint)
    batches = None if batches is None else Fingerprinted.of(batches)
    work = {"work_folder": work_folder, "steps": steps}
    if weights is None and not has_plain_names(skeleton):
        if len(place.devices) > 1:
            raise LoadError(
                f"the stored tensors of {spec.name} are put together by transformers, on one device alone"
            )
        skeleton = _load_whole(checkpoint, skeleton, plan, batches, roles, targets[0], progress, **work)
    else:
        if weights is None:
            source = checkpoint.tensors(skeleton)
        check_placed_memory(place, resolved, spec, largest_work_bytes(skeleton, resolved.schemes, source))
        kept = _work(checkpoint, resolved, batches, **work) if weights is None else None
        given = [] if batches is None else checked_batches(batches)
        fill_(skeleton, source, resolved, place, batches=given, work=kept, progress=progress)
        checkpoint.add_generation_config(skeleton)
    connect_(skeleton, place)
    return Engine(
        skeleton,
        processor,
        spec=spec,
        plan=plan,
        resolved=resolved,
        roles=roles,
        load_s=time.perf_counter() - started,
        provenance={"calibration": batches.facts() if batches is not None else None},
        weights=weights,
    )


def _load_whole(
    checkpoint: Checkpoint,
    skeleton: torch.nn.Module,
    plan: QuantizationPlan,
    batches: Any,
    roles: Mapping[str, str],
    target: torch.device,
    progress: bool,
    **work: Any,
) -> torch.nn.Module:
    """`load` for architectures whose tensors transformers puts together: read whole, then quantized."""
    staging = staging_device(checkpoint.stored_bytes(skeleton), target, checkpoint.spec.name)
    loaded = checkpoint.weights(staging, progress)
    quantize_(loaded, plan, batches, roles=roles, device=target, progress=progress, **work)
    return loaded.to(target)
