"""Restores the model of a quantized checkpoint, without the original weights and without calibration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from labkit.common.errors import CheckpointError
from labkit.loading.manifest import Manifest
from labkit.loading.stored_plan import versions
from labkit.loading.tensors import read_tensors
from labkit.models.checkpoint import Checkpoint
from labkit.plans.resolved import ResolvedPlan
from labkit.plans.walk import find_places


def restore(
    checkpoint: Checkpoint,
    manifest: Manifest,
    resolved: ResolvedPlan,
    skeleton: nn.Module,
    place: Callable[[str], torch.device],
    progress: bool = True,
) -> nn.Module:
    """Fill the skeleton (meta device) with the stored tensors; ``place`` maps a module's name to its device.

    Raises:
        CheckpointError: the files do not match the model's tensors.
    """
    folder = checkpoint.spec.folder
    places = find_places(skeleton, set(resolved.schemes))
    for name, scheme in resolved.schemes.items():
        original = skeleton.get_submodule(name)
        module = scheme.empty_module(original, device="meta", dtype=resolved.plan.dtype)
        for parent, attribute in places[name]:
            setattr(parent, attribute, module)
    try:
        read_tensors(skeleton, folder, manifest.weight_files, manifest.ties, place, progress)
    except CheckpointError as error:
        raise CheckpointError(f"{error} ({versions(manifest)})") from None
    skeleton.requires_grad_(False)
    checkpoint.add_generation_config(skeleton)
    return skeleton.eval()
