"""Load a skeleton from a source of tensors and quantize it, module by module.

Memory holds the quantized model, one shard, and the work on one module, so a machine can quantize a model that it
could not hold unquantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.common.machine import give_back_memory
from labkit.models.weights import Source
from labkit.plans.batches import Batch
from labkit.plans.calibrate import calibrate_
from labkit.plans.finished import WorkFolder
from labkit.plans.resolve import default_dtype_of
from labkit.plans.resolved import ResolvedPlan
from labkit.plans.unread import UnreadLinear
from labkit.plans.walk import Placement, PlanWalk
from labkit.quantization import Scheme

TRIMMED_BYTES = 32 << 20
"""After this many bytes of unquantized weights, freed memory is returned to the system."""


@torch.no_grad()
def fill_(
    skeleton: nn.Module,
    source: Source,
    resolved: ResolvedPlan,
    place: Placement,
    *,
    batches: Sequence[Batch] = (),
    work: WorkFolder | None = None,
    progress: bool = True,
) -> None:
    """Turn ``skeleton``, a transformers model on the meta device, into the quantized model, in place.

    Each module is quantized as soon as its weights are read and is then placed; tensors without a scheme are placed
    in the plan's default dtype. Linears that need calibration keep their weights in the files
    (`labkit.plans.unread`) until the calibration reaches them: it runs through the quantized rest and reads each
    weight when it is used, three times in all. Memory then also holds the inputs of one layer.

    Args:
        skeleton: the model; afterwards no parameter requires gradients.
        source: its tensors.
        resolved: the plan, resolved for it.
        place: the device of each module.
        batches: calibration batches, for schemes that need them; the model is then on one device.
        work: the folder of finished modules, to save and reload them.
        progress: show a progress bar.

    Raises:
        SchemeError: a weight cannot be quantized, naming its module.
        LoadError: a file is broken.
        LabError: calibration batches do not run, or do not reach every Linear that needs them.
    """
    _SkeletonLoader(skeleton, source, resolved, place, work).run(batches, progress)
    initialize_computed_(skeleton, place)
    skeleton.requires_grad_(False)


class _SkeletonLoader:
    """The state of `fill_`."""

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        resolved: ResolvedPlan,
        place: Placement,
        work: WorkFolder | None,
    ) -> None:
        self.model, self.source, self.place = model, source, place
        self.title = resolved.plan.name
        self.walk = PlanWalk(model, resolved, place, work)
        self.holders = _holders(model)
        self.waiting: dict[str, dict[str, Tensor]] = {}  # tensors of modules that are read in part
        self.freed = 0  # bytes of unquantized weights since memory was last given back
        self.stored: dict[tuple[str, str], str] = {}  # names in the source of the sequential Linears' tensors

    def run(self, batches: Sequence[Batch], progress: bool) -> None:
        for name in self.walk.schemes:
            if name not in self.walk.sequential:
                self.walk.take_finished(name)
        needed = len({id(places) for places in self.holders.values()})
        with tqdm(total=needed, desc=f"Loading ({self.title})", unit="tensor", disable=not progress) as bar:
            for names in self.source.shards():
                for name in names:
                    self._take(name, self.holders[name])
                    bar.update()
        if self.walk.sequential:
            self._calibrate(batches, progress)

    def _take(self, name: str, places: Sequence[tuple[str, str]]) -> None:
        """Read a tensor for every module that holds it."""
        plain: list[tuple[nn.Module, str]] = []
        for owner, attribute in places:
            module = self.model.get_submodule(owner)
            if owner in self.walk.sequential:
                self.stored[owner, attribute] = name
            elif not _is_meta(module, attribute):
                continue  # already loaded by an earlier run, or tied to another stored tensor
            elif owner in self.walk.schemes:
                self._take_part(owner, attribute, name)
            else:
                plain.append((module, attribute))
        if plain:
            module, attribute = plain[0]
            dtype = default_dtype_of(getattr(module, attribute), True, self.walk.dtype)
            tensor = self.source.read(name, self.place(places[0][0]), dtype)
            shared = nn.Parameter(tensor, requires_grad=False)
            for module, attribute in plain:
                _assign(module, attribute, shared)

    def _take_part(self, owner: str, attribute: str, name: str) -> None:
        """Read a weight or bias of a module that has a scheme, and quantize the module once it is complete."""
        module = self.model.get_submodule(owner)
        parts = self.waiting.setdefault(owner, {})
        parts[attribute] = self.source.read(name, self.place(owner))
        if len(parts) < sum(parameter is not None for parameter in module._parameters.values()):
            return
        for attribute, tensor in self.waiting.pop(owner).items():
            _assign(module, attribute, nn.Parameter(tensor, requires_grad=False))
        del parts, tensor
        self.walk.quantize(owner)
        self.freed += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        if self.freed > TRIMMED_BYTES:
            self.freed = 0
            give_back_memory()

    def _calibrate(self, batches: Sequence[Batch], progress: bool) -> None:
        for name in self.walk.sequential:
            linear = self.model.get_submodule(name)

            def read(own: str, name: str = name) -> Tensor:
                return self.source.read(self.stored[name, own], self.place(name))

            self.walk.replace(name, UnreadLinear(linear, read))
        initialize_computed_(self.model, self.place)
        total = len(self.walk.sequential)
        with tqdm(total=total, desc=f"Quantizing ({self.title})", unit="layer", disable=not progress) as bar:
            calibrate_(self.walk, batches, self.place(""), bar)


def initialize_computed_(model: nn.Module, place: Placement) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies, as transformers does when it loads.

    These are the non-persistent buffers that are still on the meta device.
    """
    lacking = False
    for name, module in model.named_modules():
        computed = [
            key
            for key, buffer in module._buffers.items()
            if buffer is not None and buffer.is_meta and key in module._non_persistent_buffers_set
        ]
        for key in computed:
            module._buffers[key] = torch.empty_like(module._buffers[key], device=place(name))
        for tensor in module._parameters.values():
            if tensor is not None:
                tensor._is_hf_initialized = True
        module._is_hf_initialized = not computed
        lacking = lacking or bool(computed)
    if lacking:
        model.initialize_weights()


def largest_work_bytes(skeleton: nn.Module, schemes: Mapping[str, Scheme], source: Source) -> int:
    """Bytes needed beyond the model's own while it is loaded: the largest tensor as stored, and one byte a value for
    the codes of the largest one."""
    largest = max((parameter.numel() for parameter in skeleton.parameters()), default=0)
    return source.largest_bytes + (largest if schemes else 0)


def _holders(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Name of a tensor -> each (module, attribute) that holds it; tied tensors are listed under every name."""
    places: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                places.setdefault(id(tensor), []).append((name, key))
    return {f"{name}.{key}".lstrip("."): holders for holders in places.values() for name, key in holders}


def _is_meta(module: nn.Module, attribute: str) -> bool:
    tensor = module._parameters.get(attribute, module._buffers.get(attribute))
    return tensor is not None and tensor.is_meta


def _assign(module: nn.Module, attribute: str, tensor: nn.Parameter) -> None:
    if attribute in module._parameters:
        module._parameters[attribute] = tensor
    else:
        module._buffers[attribute] = tensor.data
