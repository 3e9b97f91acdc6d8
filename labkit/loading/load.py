"""Loads a model under a plan into an engine.

Every check precedes the slow work. Weights come from safetensors only; code from a model's repository never runs.
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
from labkit.plans.batches import checked_batches
from labkit.plans.fill import fill_, largest_work_bytes
from labkit.plans.finished import WorkFolder, fingerprint_of, opened
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import quantize_
from labkit.plans.resolved import ResolvedPlan
from labkit.quantization.native import library as native
from labkit.quantization.torch_state import guarded


@guarded
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
    """Load a model, quantize it by a plan, and return its engine.

    The checks come first: the folder and its files, the configuration, the device and its memory, the plan on the
    model's skeleton (meta device), and each scheme on the device. Weights are read shard by shard, and each module is
    quantized and placed as soon as its weights are complete: memory holds the quantized model, one shard and the work
    of one module (`labkit.plans.fill`). A folder that the lab has quantized (`labkit.save`, ``labkit quantize``) is
    restored unchanged.

    Args:
        model: ``"pocket"``, another registered name, a folder with a transformers checkpoint or a quantized
            checkpoint, or a hub id.
        plan: a preset's name, the path of a plan file, a plan, or a plan's definition (default: ``"bf16"``; a
            quantized folder takes only its own plan).
        device: ``"auto"`` (a GPU if available), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; several GPUs,
            ``"cuda:0,cuda:1"``, share the decoder's layers (`labkit.loading.placement`).
        weights: ``"random"`` builds the same architecture with random weights, to measure its cost; this reads only
            the configuration, and without a tokenizer prompts are token ids.
        device_map: prefixes of module names -> device, instead of an even split; other modules are on the
            first device.
        calibration: batches for schemes that need them, or a number of PhoneTap's calibration items; the default for
            such plans is the standard set (see :mod:`labkit.loading.calibration`).
        work_folder: the folder for calibrated layers, from which the same call continues after an interruption. An open
            `labkit.plans.finished.WorkFolder` stores all modules.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"`` instead of the plan's default for unquantized modules.
        progress: show progress bars.

    Raises:
        LabError: anything that cannot work, before weights are read; the message says what would work.
    """
    prepared = Prepared.of(model, device, weights=weights)
    plan = prepared.choose_plan(plan, dtype, calibration)
    prepared.check_files()
    resolved, place = prepared.check(plan, calibration=calibration, device_map=device_map)
    return load_prepared(
        prepared, resolved, place, calibration=calibration, work_folder=work_folder, progress=progress
    )


@guarded
def load_prepared(
    prepared: Prepared,
    resolved: ResolvedPlan,
    place: Placement,
    *,
    calibration: Any = None,
    work_folder: str | Path | WorkFolder | None = None,
    progress: bool = True,
) -> Engine:
    """`load` for a model and a plan that `Prepared.check` has accepted."""
    plan, manifest = resolved.plan, prepared.manifest
    if place.first.type == "cpu":
        native.available()  # compiles the CPU's step at its first use, outside the measured time
    started = time.perf_counter()  # the imports are done: the time covers reading files and arithmetic
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
    """The batches for a plan that calibrates: the caller's, or PhoneTap's; None for other plans."""
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
    """The model with its weights, quantized during reading."""
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
        batch_list = [] if batches is None else checked_batches(batches)
        fill_(skeleton, source, resolved, place, batches=batch_list, work=work, progress=progress)
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
    """The same for architectures whose stored tensors transformers combines: read whole, then quantized."""
    checkpoint = prepared.checkpoint
    staging = staging_device(checkpoint.stored_bytes(prepared.skeleton), target, prepared.spec.name)
    model = checkpoint.weights(staging, progress)
    quantize_(
        model, resolved.plan, batches, roles=prepared.roles, device=target, work_folder=work_folder,
        progress=progress,
    )  # fmt: skip
    return model.to(target)
