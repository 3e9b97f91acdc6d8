"""A model on devices, and every check that precedes reading its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.common.errors import CheckpointError
from labkit.engine.row_cache import keeps_rows
from labkit.engine.trial import check_family
from labkit.loading.datasets import Datasets
from labkit.loading.manifest import Manifest
from labkit.loading.placement import Placement, check_map, check_placed_memory, placed_on
from labkit.loading.stored_plan import check_stored_plan, resolve_stored
from labkit.models.checkpoint import Checkpoint, LoadError
from labkit.models.families import find_roles
from labkit.models.spec import ModelSpec, get_spec
from labkit.models.weights import has_plain_names
from labkit.plans.plan import QuantizationPlan, as_plan
from labkit.plans.resolved import ResolvedPlan
from labkit.quantization.torch_state import guarded

RANDOM = "random"


@dataclass(frozen=True)
class Prepared:
    """A model on devices, for any number of plans. Each part is built once, at its first use.

    Attributes:
        spec: the model.
        devices: the devices to run on, in order; none suffice for predicting sizes.
        weights: ``"random"``, or None for the model's own weights.
        ask_hub: whether to ask the hub for missing files; without it a published configuration serves.
    """

    spec: ModelSpec
    devices: tuple[torch.device, ...] = ()
    weights: str | None = None
    ask_hub: bool = True

    @classmethod
    @guarded
    def of(
        cls,
        model: str | Path | ModelSpec,
        device: str | torch.device | Sequence[str] | None = None,
        *,
        weights: str | None = None,
        ask_hub: bool = True,
        quantized: str | None = None,
    ) -> Prepared:
        """
        Args:
            model, device, weights: as for `labkit.load`; predicting sizes needs no device.
            ask_hub: see `Prepared`.
            quantized: refuse a folder that the lab has quantized; this text says what to pass instead.

        Raises:
            LabError: an unknown model, device or kind of weights, or a quantized model where none is allowed.
        """
        spec = get_spec(model)
        if weights not in (None, RANDOM):
            raise LoadError(f"weights is {weights!r}; it is {RANDOM!r}, or None for the model's own")
        if spec.is_quantized and weights is not None:
            raise LoadError(f"{spec.name} is quantized already and has its weights: name the model it is of")
        if spec.is_quantized and quantized is not None:
            raise CheckpointError(f"{spec.name} is quantized already: {quantized}")
        devices = () if device is None else tuple(choose_devices(device))
        return cls(spec, devices, weights, ask_hub and weights is None)

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest of a folder that the lab has quantized; None for other models."""
        return Manifest.read(self.spec.folder) if self.spec.is_quantized else None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Configuration, processor and weights."""
        return Checkpoint(self.spec, self.ask_hub)

    @cached_property
    @guarded
    def skeleton(self) -> nn.Module:
        """The model on the meta device. Loading fills it: a `Prepared` is loaded once."""
        return self.checkpoint.skeleton()

    @cached_property
    def roles(self) -> dict[str, str]:
        """Module name -> role."""
        return find_roles(self.skeleton)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The model's input modalities besides text: ``image``, ``audio``."""
        return self.checkpoint.family.modalities

    def choose_plan(
        self, plan: Any = None, dtype: str | None = None, calibration: Any = None
    ) -> QuantizationPlan:
        """The plan by that name, path or definition; a quantized folder has its own plan and refuses any other.

        Raises:
            LabError: no such plan, or a plan, dtype or calibration that differs from the quantized folder's.
        """
        if self.manifest is not None:
            return check_stored_plan(self.spec, self.manifest, plan, dtype, calibration)
        return as_plan("bf16" if plan is None else plan, dtype)

    def dataset_settings(self, datasets: Datasets) -> dict[str, Any]:
        """The settings of ``datasets``; for text, with the tokens that this model's tokenizer puts first."""
        return datasets.settings(self.checkpoint.processor().tokenizer if datasets.text is not None else None)

    @guarded
    def calibration_batches(self, datasets: Datasets) -> list[Any]:
        """The batches of ``datasets`` that calibrate this model."""
        processor = self.checkpoint.processor()
        senses = getattr(processor, "modalities", self.modalities)
        return datasets.calibration_batches(processor, senses, self.checkpoint.model_class)

    def check_files(self, *, contents: bool = True) -> None:
        """Check the weight files without reading tensors; random weights need no files.

        contents: also compare the files of a quantized folder with their hashes.

        Raises:
            LabError: a missing, truncated or changed file.
        """
        if self.manifest is not None:
            self.manifest.check_sizes(self.spec.folder)
            if contents:
                self.manifest.check_hashes(self.spec.folder)
        elif self.weights is None:
            self.checkpoint.check_weights()

    @guarded
    def resolve(self, plan: QuantizationPlan) -> ResolvedPlan:
        """The plan resolved on the skeleton for the first device; for a quantized folder, its stored schemes.

        Raises:
            LabError: the plan does not fit the model or the device.
        """
        device = self.devices[0] if self.devices else None
        if self.manifest is not None:
            return resolve_stored(
                self.manifest, self.skeleton, self.roles, device or torch.device("cpu"), self.spec.folder
            )
        return plan.resolve(self.skeleton, roles=self.roles, device=device)

    def predicted_bytes(self, plan: QuantizationPlan) -> int:
        """Bytes of all weights under a plan, on any device."""
        return plan.resolve(self.skeleton, roles=self.roles).predicted_bytes

    def place(self, resolved: ResolvedPlan, device_map: Mapping[str, Any] | None = None) -> Placement:
        """The device of each module: by the map, else with the layers distributed over the devices."""
        if device_map is None:
            return placed_on(self.skeleton, resolved, self.devices)
        devices = {name: choose_device(device) for name, device in device_map.items()}
        return check_map(self.skeleton, devices, self.devices[0])

    @guarded
    def check(
        self, plan: QuantizationPlan, *, calibration: Any = None, device_map: Mapping[str, Any] | None = None
    ) -> tuple[ResolvedPlan, Placement]:
        """Resolve and place the plan, after every check that needs no weights.

        Raises:
            LabError: the plan does not fit the model, the devices or their memory, or lacks its calibration.
        """
        check_family(self.checkpoint.model_class, self.checkpoint.config)
        check_runtime(self.checkpoint, plan)
        resolved = self.resolve(plan)
        calibrated = self.manifest is None and resolved.requires_calibration
        if calibrated and self.weights is not None:
            raise LoadError(
                f"plan {plan.name} calibrates, which says nothing on random weights; int4 has the same bytes as "
                "gptq and awq"
            )
        if calibrated:
            check_calibration(resolved, calibration, self.modalities)
        place = self.place(resolved, device_map)
        if len(place.devices) > 1:
            self._check_split(plan, calibrated)
        check_placed_memory(place, resolved, self.spec)
        return resolved, place

    def _check_split(self, plan: QuantizationPlan, calibrated: bool) -> None:
        """Refuse a model or plan that needs a single device."""
        if calibrated:
            raise LoadError(
                f"plan {plan.name} calibrates, which runs on one device: quantize it there (labkit quantize), "
                "then load the folder on several"
            )
        if self.weights is None and self.manifest is None and not has_plain_names(self.skeleton):
            raise LoadError(
                f"the stored tensors of {self.spec.name} are put together by transformers, on one device alone"
            )


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device by that name, which must exist.

    Raises:
        LoadError: an unknown name, or a missing GPU.
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
        available = (
            f"this machine has {count} GPU{'s' if count != 1 else ''}"
            if count
            else "there is no usable GPU here"
        )
        raise LoadError(f"the device {chosen} does not exist: {available}; 'auto' takes what there is")
    return torch.device("cuda", chosen.index or 0)


def choose_devices(device: str | torch.device | Sequence[str] = "auto") -> list[torch.device]:
    """The devices by those names: a comma-separated string or a list.

    Raises:
        LoadError: as `choose_device`, or several devices that are not all GPUs.
    """
    if isinstance(device, str):
        device = [entry.strip() for entry in device.split(",") if entry.strip()] or [device]
    elif isinstance(device, torch.device):
        device = [device]
    devices = [choose_device(entry) for entry in device]
    if len(devices) > 1 and any(entry.type != "cuda" for entry in devices):
        raise LoadError(f"only GPUs share a model, such as cuda:0,cuda:1; not {', '.join(map(str, devices))}")
    return devices


def check_runtime(checkpoint: Checkpoint, plan: QuantizationPlan) -> None:
    """Refuse runtime options that this model's cache does not support.

    Raises:
        LoadError: the model's layers have their own windows or states.
    """
    config = checkpoint.config.get_text_config(decoder=True)
    if plan.runtime.is_default or keeps_rows(config):
        return
    raise LoadError(
        f"plan {plan.name}: runtime kv_cache and sliding_window are for models whose layers all keep plain keys "
        f"and values; those of {checkpoint.spec.name} have windows or states of their own"
    )


def check_calibration(resolved: ResolvedPlan, calibration: Any, modalities: Collection[str]) -> None:
    """Refuse a plan whose schemes need activations if no calibration input is available.

    Raises:
        LoadError: a wrong ``calibration``, or none for a model without image input (PhoneTap's items are images).
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
