"""The plan of a quantized checkpoint: what it gave each module, and the refusal of any other plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.common.errors import CheckpointError, PlanError, SchemeError
from labkit.loading.manifest import Manifest
from labkit.models.spec import ModelSpec
from labkit.plans.plan import QuantizationPlan, as_plan
from labkit.plans.resolve import replaceable_linears, replaceable_others, resolved_as
from labkit.plans.resolved import ResolvedPlan
from labkit.quantization import get_scheme
from labkit.quantization.int8_storage import KINDS


def stored_plan(manifest: Manifest) -> QuantizationPlan:
    """The plan of the quantized checkpoint.

    Raises:
        CheckpointError: the plan has schemes or options that this version lacks.
    """
    try:
        return QuantizationPlan.from_dict(manifest.plan, "the stored plan")
    except PlanError as error:
        raise CheckpointError(f"{error}: the checkpoint was made by another version of labkit") from error


def resolve_stored(
    manifest: Manifest, skeleton: nn.Module, roles: Mapping[str, str], device: torch.device, folder: Path
) -> ResolvedPlan:
    """The stored scheme of each Linear, checked against the model's skeleton and ``device``.

    Raises:
        CheckpointError: a module is missing, or its scheme is unknown or cannot run on the device.
    """
    plan = stored_plan(manifest)
    linears, _ = replaceable_linears(skeleton)
    replaceable = linears | replaceable_others(skeleton, KINDS)
    schemes, rules = {}, {}
    for name, facts in manifest.modules.items():
        if name not in replaceable:
            raise CheckpointError(
                f"{folder} quantizes {name}, which the model of its config.json does not have "
                f"({versions(manifest)})"
            )
        try:
            scheme = get_scheme(facts["scheme"], **facts["options"])
            scheme.validate_module(replaceable[name], device)
        except SchemeError as error:
            raise CheckpointError(f"{folder}: {name}: {error}") from error
        schemes[name], rules[name] = scheme, facts["rule"]
    return resolved_as(plan, skeleton, schemes, rules, roles, manifest.notes)


def check_stored_plan(
    spec: ModelSpec, manifest: Manifest, plan: Any = None, dtype: str | None = None, calibration: Any = None
) -> QuantizationPlan:
    """The plan of a quantized folder, which accepts no other plan.

    Raises:
        CheckpointError: the plan, dtype or calibration differs from the folder's.
    """
    stored = stored_plan(manifest)
    remedy = f"load {manifest.base['name']} to quantize it otherwise"
    if plan is not None:
        requested = as_plan(plan)
        if requested != stored:
            same = ", of that name but another content" if requested.name == stored.name else ""
            raise CheckpointError(
                f"{spec.name} is quantized already, by the plan {stored.name}; "
                f"it cannot be loaded under {requested.name}{same}: {remedy}"
            )
    if dtype is not None and dtype != stored.default:
        raise CheckpointError(f"{spec.name} is stored in {stored.default}, not in {dtype}: {remedy}")
    if calibration is not None:
        raise CheckpointError(f"{spec.name} is quantized already and takes no calibration: {remedy}")
    return stored


def versions(manifest: Manifest) -> str:
    """transformers' version when the checkpoint was made, and here: names of tensors may differ."""
    import transformers

    version = manifest.made_with.get("packages", {}).get("transformers", "an unknown version")
    return f"made with transformers {version}, here is {transformers.__version__}"
