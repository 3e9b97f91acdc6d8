"""The device of each part of a model: a single device, or decoder layers split over several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from labkit.common.errors import LabError
from labkit.common.machine import memory
from labkit.models.checkpoint import LoadError
from labkit.models.spec import ModelSpec
from labkit.plans.plan import QuantizationPlan
from labkit.plans.resolved import ResolvedPlan


@dataclass(frozen=True)
class Placement:
    """The device of each module.

    Attributes:
        first: the device of the inputs, the encoders, the embedding and the head.
        parts: prefix of module names -> device; the longest matching prefix decides, else ``first``.
    """

    first: torch.device
    parts: Mapping[str, torch.device] = field(default_factory=dict)

    def __call__(self, name: str) -> torch.device:
        """The device of the module ``name``."""
        while name:
            if name in self.parts:
                return self.parts[name]
            name = name.rpartition(".")[0]
        return self.parts.get("", self.first)

    @property
    def devices(self) -> list[torch.device]:
        """All devices, ``first`` at the front."""
        return list(dict.fromkeys([self.first, *self.parts.values()]))

    def bytes_by_device(self, resolved: ResolvedPlan) -> dict[torch.device, int]:
        """Device -> predicted bytes of the weights there."""
        total = dict.fromkeys(self.devices, 0)
        for part in resolved.parts:
            total[self(part.module)] += part.bytes
        return total


def split_by_layers(
    skeleton: nn.Module, resolved: ResolvedPlan, devices: Sequence[torch.device]
) -> Placement:
    """Distribute the decoder's layers in their order, so that each device holds about the same bytes.

    Layers stay whole, so a token's activations cross to the next device once. The encoders, the embedding and the head
    are on the first device: the engine sends prompts there and reads logits there.

    Raises:
        LabError: fewer layers than devices, or a repeated device.
    """
    if len(set(devices)) < len(devices):
        raise LabError(f"a device is named twice: {', '.join(map(str, devices))}")
    layers = decoder_layers(skeleton)
    if len(layers) < len(devices):
        raise LabError(f"{len(layers)} decoder layers cannot be split over {len(devices)} devices")
    sizes = dict.fromkeys(layers, 0)
    rest = 0
    for part in resolved.parts:
        layer = next((name for name in layers if part.module.startswith(f"{name}.")), None)
        if layer is None:
            rest += part.bytes
        else:
            sizes[layer] += part.bytes
    parts: dict[str, torch.device] = {}
    # The first device also holds everything outside the layers.
    position, assigned, remaining = 0, rest, rest + sum(sizes.values())
    for index, (name, size) in enumerate(sizes.items()):
        others = len(devices) - 1 - position
        full = assigned > 0 and assigned + size / 2 > remaining / (others + 1)
        if others and (full or len(layers) - index <= others):
            position, assigned, remaining = position + 1, 0, remaining - assigned
        parts[name] = devices[position]
        assigned += size
    norm = f"{layers[0].rpartition('.')[0].rpartition('.')[0]}.norm"
    if any(name == norm for name, _ in skeleton.named_modules()):
        parts[norm] = devices[position]
    return Placement(devices[0], parts)


def placed_on(skeleton: nn.Module, resolved: ResolvedPlan, devices: Sequence[torch.device]) -> Placement:
    """The whole model on a single device, or `split_by_layers` over several."""
    return Placement(devices[0]) if len(devices) == 1 else split_by_layers(skeleton, resolved, devices)


def decoder_layers(model: nn.Module) -> list[str]:
    """Names of the decoder's layers, in their order.

    Raises:
        LabError: the decoder has no list of layers.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and re.search(r"(^|\.)layers$", name):
            owner = model.get_submodule(name.rpartition(".")[0])
            if owner is decoder:
                return [f"{name}.{index}" for index in range(len(module))]
    raise LabError(f"{type(model).__name__} has no decoder with a list of layers to split")


def check_map(skeleton: nn.Module, parts: Mapping[str, Any], first: torch.device) -> Placement:
    """The placement by the caller's device map: prefix of module names -> device.

    Raises:
        LabError: an unknown module name, a split decoder layer, or an embedding or head off the first device.
    """
    names = {name for name, _ in skeleton.named_modules()}
    layers = decoder_layers(skeleton)
    for name in parts:
        if name not in names:
            raise LabError(f"the device map names {name!r}, which the model does not have")
        if any(name.startswith(f"{layer}.") for layer in layers):
            raise LabError(f"the device map splits a layer ({name}): name whole layers")
    placed = Placement(first, {name: torch.device(device) for name, device in parts.items()})
    ends = {"input embedding": skeleton.get_input_embeddings(), "head": skeleton.get_output_embeddings()}
    for what, module in ends.items():
        if placed(name := _name_of(skeleton, module)) != first:
            raise LabError(f"the {what} ({name}) must be on the first device, {first}")
    return placed


def connect_(model: nn.Module, placement: Placement) -> None:
    """Add hooks that move tensors where the model crosses from one device to another; none for a single device.

    accelerate's hooks move every argument of every inner module and set each weight anew, which packed integers with
    their own byte order do not allow; here the weights are on their device as soon as they are read.
    """
    if len(placement.devices) == 1:
        return
    movers = {device: _Mover(device) for device in placement.devices}
    doors = {*placement.parts, *decoder_layers(model), _name_of(model, model.get_output_embeddings())}
    for name in doors - {""}:
        model.get_submodule(name).register_forward_pre_hook(movers[placement(name)], with_kwargs=True)


class _Mover:
    """Forward pre-hook that moves tensor arguments to a device; it moves the tensors that all layers share (the
    rotary table, the mask) once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moved = WeakIdKeyDictionary()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return self._bring(args), self._bring(kwargs)

    def _bring(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device == self.device:
                return value
            if value not in self._moved:
                self._moved[value] = value.to(self.device)
            return self._moved[value]
        if type(value) in (tuple, list):
            return type(value)(self._bring(item) for item in value)
        if type(value) is dict:
            return {key: self._bring(item) for key, item in value.items()}
        return value


def _name_of(model: nn.Module, target: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is target), "")


def staging_device(stored: int, target: torch.device, name: str) -> torch.device:
    """The device that receives the unquantized weights, ``stored`` bytes: the target if they fit, else the CPU.

    Raises:
        LoadError: the weights fit neither device.
    """
    for device in dict.fromkeys((target, torch.device("cpu"))):
        if stored < free_bytes(device):
            return device
    raise LoadError(
        f"reading {name} takes {stored / 1e9:.1f} GB for a while, before it is quantized; "
        f"cpu has {memory()[1] / 1e9:.1f} GB free"
    )


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory()[1]


def check_placed_memory(place: Placement, resolved: ResolvedPlan, spec: ModelSpec, work: int = 0) -> None:
    """`check_memory` on every device; quantizing takes ``work`` bytes more."""
    for device, size in place.bytes_by_device(resolved).items():
        check_memory(size, device, spec, resolved.plan, work)


def check_memory(
    needed: int, device: torch.device, spec: ModelSpec, plan: QuantizationPlan, work: int = 0
) -> None:
    """Compare the plan's predicted bytes with the free memory.

    Raises:
        LoadError: the model does not fit; the message has all figures.
    """
    free = free_bytes(device)
    if needed + work > free:
        more = f" and {work / 1e9:.1f} GB to make them" if work else ""
        raise LoadError(
            f"{spec.name} under the plan {plan.name} needs {needed / 1e9:.1f} GB for its weights{more}; "
            f"{device} has {free / 1e9:.1f} GB free. Try a plan with fewer bits, such as int4"
        )
