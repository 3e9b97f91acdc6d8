"""Spec and plan in, engine out.

Everything that can be wrong is checked before anything takes long: the folder and its files, the
configuration, the device and its memory, the plan against the model's skeleton on the meta device, and whether
each scheme runs on the device. Weights come from safetensors only, shard by shard, and code from a model's
repository is never run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from labkit.engine.engine import Engine
from labkit.loading.calibration import Fingerprinted, default_calibration
from labkit.loading.datasets import Datasets
from labkit.loading.placement import Placement, check_placed_memory, connect_, staging_device
from labkit.loading.prepare import RANDOM, Prepared
from labkit.loading.restore import restore
from labkit.models.spec import ModelSpec
from labkit.models.weights import RandomSource, has_plain_names
from labkit.plans.fill import fill_, largest_work_bytes
from labkit.plans.finished import WorkFolder, fingerprint_of, opened
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import quantize_
from labkit.plans.resolved import ResolvedPlan
from labkit.plans.sequential import checked_batches
from labkit.quantization.native import library as native


def load(
    model: str | Path | ModelSpec = "pocket",
    plan: str | Path | Mapping[str, Any] | QuantizationPlan | None = None,
    device: str | torch.device | Sequence[str] = "auto",
    *,
    weights: str | None = None,
    device_map: Mapping[str, Any] | None = None,
    calibration: Any = None,
    work_folder: str | Path | WorkFolder | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> Engine:
    """Load a model, quantize it by a plan, and give the engine that answers with it.

    Weights are read shard by shard, and each module is quantized and put where it stays as soon as its weights
    are there: memory holds the quantized model, one shard and one module's work (`labkit.plans.fill`). A folder
    that the lab has quantized (`labkit.save`, ``labkit quantize``) is restored as it is.

    Args:
        model: ``"pocket"``, another registered name, a folder with a transformers checkpoint or a quantized
            one, or a hub id.
        plan: a preset's name, the path of a plan file, a plan, or a plan's definition (default: ``"bf16"``; of a
            quantized folder its own, and no other).
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; several GPUs,
            ``"cuda:0,cuda:1"``, share the decoder's layers (`labkit.loading.placement`).
        weights: ``"random"`` builds the same architecture with random weights, for measuring what it costs;
            nothing is read but its configuration, and where there is no tokenizer, prompts are token ids.
        device_map: prefixes of module names -> device, instead of an even split; the rest is on the first
            device.
        calibration: batches for schemes that need them, or how many of PhoneTap's calibration items to use;
            the standard ones are used if a plan needs some and none are given (see :mod:`labkit.loading.calibration`).
        work_folder: where layers solved on calibration are kept, so that the same call continues after an
            interruption. One that is open already (`labkit.plans.finished.WorkFolder`) keeps all modules.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"`` instead of the plan's default for what is not quantized.
        progress: show progress bars.

    Raises:
        LabError: whatever cannot work, before weights are read; the message says what would.
    """
    prepared = Prepared.of(model, device, weights=weights)
    plan = prepared.choose_plan(plan, dtype, calibration)
    prepared.check_files()
    resolved, place = prepared.check(plan, calibration=calibration, device_map=device_map)
    return load_prepared(
        prepared, resolved, place, calibration=calibration, work_folder=work_folder, progress=progress
    )


def load_prepared(
    prepared: Prepared,
    resolved: ResolvedPlan,
    place: Placement,
    *,
    calibration: Any = None,
    work_folder: str | Path | WorkFolder | None = None,
    progress: bool = True,
) -> Engine:
    """`load`, of a model and a plan that `Prepared.check` has seen."""
    plan, manifest = resolved.plan, prepared.manifest
    if place.first.type == "cpu":
        native.available()  # compiles the CPU's step if that was never done here, which no measured time contains
    started = time.perf_counter()  # libraries are imported by now: what follows is files and arithmetic
    if prepared.weights == RANDOM:
        processor = prepared.checkpoint.processor_or_ids(plan.dtype)
    else:
        processor = prepared.checkpoint.processor(plan.dtype)
    if manifest is not None:
        model = restore(prepared.checkpoint, manifest, resolved, prepared.skeleton, place, progress)
        provenance = {name: getattr(manifest, name) for name in ("base", "calibration", "made_with")}
    else:
        batches = _batches(prepared, resolved, calibration, processor)
        model = _quantized(prepared, resolved, place, batches, work_folder, progress)
        provenance = {"calibration": None if batches is None else batches.facts()}
    connect_(model, place)
    return Engine(
        model,
        processor,
        spec=prepared.spec,
        plan=plan,
        resolved=resolved,
        roles=prepared.roles,
        load_s=time.perf_counter() - started,
        provenance=provenance,
        weights=prepared.weights,
    )


def _batches(
    prepared: Prepared, resolved: ResolvedPlan, calibration: Any, processor: Any
) -> Fingerprinted | None:
    """What the plan is calibrated on, if it is: the given batches, or PhoneTap's."""
    if not resolved.requires_calibration:
        return None
    if calibration is None or isinstance(calibration, int):
        modalities = getattr(processor, "modalities", prepared.modalities)
        count = calibration or Datasets.calibration
        calibration = default_calibration(processor, modalities, count, model=prepared.checkpoint.model_class)
    return Fingerprinted.of(calibration)


def _quantized(
    prepared: Prepared,
    resolved: ResolvedPlan,
    place: Placement,
    batches: Fingerprinted | None,
    work_folder: str | Path | WorkFolder | None,
    progress: bool,
) -> torch.nn.Module:
    """The model with its weights, quantized as they are read."""
    checkpoint, skeleton = prepared.checkpoint, prepared.skeleton
    if prepared.weights == RANDOM:
        source, work_folder = RandomSource(skeleton), None
    elif has_plain_names(skeleton):
        source = checkpoint.tensors(skeleton)
    else:
        return _quantized_whole(prepared, resolved, place.first, batches, work_folder, progress)
    work_bytes = largest_work_bytes(skeleton, resolved.schemes, source)
    check_placed_memory(place, resolved, prepared.spec, work_bytes)
    run = None
    if batches is not None:
        facts = checkpoint.facts()
        weights = str(facts["fingerprint"] or facts["commit"])
        run = partial(fingerprint_of, weights, resolved.schemes, resolved.plan.dtype, batches)
    with opened(work_folder, run) as work:
        given = [] if batches is None else checked_batches(batches)
        fill_(skeleton, source, resolved, place, batches=given, work=work, progress=progress)
    checkpoint.add_generation_config(skeleton)
    return skeleton


def _quantized_whole(
    prepared: Prepared,
    resolved: ResolvedPlan,
    target: torch.device,
    batches: Fingerprinted | None,
    work_folder: str | Path | WorkFolder | None,
    progress: bool,
) -> torch.nn.Module:
    """The same for architectures whose tensors transformers puts together: read whole, then quantized."""
    checkpoint = prepared.checkpoint
    staging = staging_device(checkpoint.stored_bytes(prepared.skeleton), target, prepared.spec.name)
    model = checkpoint.weights(staging, progress)
    quantize_(
        model, resolved.plan, batches, roles=prepared.roles, device=target, work_folder=work_folder,
        progress=progress,
    )  # fmt: skip
    return model.to(target)
